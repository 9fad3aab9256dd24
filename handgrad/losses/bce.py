"""Binary cross-entropy between logits and probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from handgrad.arguments import floating
from handgrad.errors import DtypeError, ShapeError
from handgrad.layer import buffer
from handgrad.losses.loss import Loss
from handgrad.pieces import in_float32


class BCEWithLogits(Loss):
    """Negative log-likelihood of a yes or no under sigmoid(x), elementwise.

    Forward:   loss = -weight (pos_weight y log s + (1 - y) log(1 - s))  with y = target, s = sigmoid(x)
               computed as weight ((1 - y) x + a log(1 + exp(-x))),  a = 1 + (pos_weight - 1) y,
               which overflows nowhere; "mean" takes the mean of all elements, "sum" their sum, "none" neither
    Shapes:    x and target the same, any; weight and pos_weight broadcast against them; loss () or like x
    Backward:  d log(1 + exp(-x)) / dx = -sigmoid(-x), hence
               dx = dlosses weight ((1 - y) - a sigmoid(-x)), where dlosses is dout, or dout/n for the mean of n;
               without weights that is the familiar dlosses (s - y)
    Recorded:  x, target
    Raises:    ShapeError where the shapes differ; DtypeError; ArgumentError for an unknown reduction; StateError.
    Source:    torch.nn.BCEWithLogitsLoss for the semantics. The target may be any number, as it may be there.

    >>> loss = BCEWithLogits()
    >>> loss(torch.tensor([0.0, 100.0]), torch.tensor([1.0, 1.0]))  # (log 2 + 0)/2
    tensor(0.3466)
    >>> loss.backward()
    tensor([-0.2500,  0.0000])
    """

    weight: Tensor | None = buffer("*D")
    pos_weight: Tensor | None = buffer("*D")

    def __init__(
        self, weight: Tensor | None = None, *, reduction: str = "mean", pos_weight: Tensor | None = None
    ) -> None:
        super().__init__(reduction=reduction)
        self.weight, self.pos_weight = floating(self, "weight", weight), floating(self, "pos_weight", pos_weight)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self._check(x, target)
        a = self._slope(target)
        logs = logsigmoid(x)  # -log(1 + exp(-x))
        loss = (1 - target).mul_(x).sub_(logs if a is None else a * logs)
        if self.weight is not None:
            loss = loss * self.weight
        out = self.reduce(loss)
        self.push(x, target, self.weight, self.pos_weight, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        x, target, weight, _ = self.pop(dout)
        a = self._slope(target)
        dlosses = self.dlosses(dout, x, max(x.numel(), 1))
        # loss = weight ((1 - y) x + a log(1 + exp(-x)))
        if weight is not None:
            dlosses = dlosses * weight
        slope = torch.sigmoid(x).sub_(target) if a is None else (1 - target).sub_(a * torch.sigmoid(-x))
        return in_float32(slope).mul_(dlosses).to(x.dtype)

    def _slope(self, target: Tensor) -> Tensor | None:
        return None if self.pos_weight is None else 1 + (self.pos_weight - 1) * target

    def _check(self, x: Tensor, target: Tensor) -> None:
        self.check_like(x, target)
        for name, w in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if w is None:
                continue
            if w.dtype is not x.dtype:
                raise self.error(DtypeError, "forward", f"x must have the dtype of {name}, {w.dtype}, got {x.dtype}")
            sizes = zip(reversed(w.shape), reversed(x.shape))
            if w.dim() > x.dim() or any(own not in (1, size) for own, size in sizes):
                problem = f"{name} of shape {tuple(w.shape)} must broadcast to x, got shape {tuple(x.shape)}"
                raise self.error(ShapeError, "forward", problem)
