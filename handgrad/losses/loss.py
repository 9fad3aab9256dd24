"""What all losses share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handgrad.arguments import floating, integer, number, refused
from handgrad.errors import DtypeError, IndexRangeError, ShapeError
from handgrad.layer import Layer, Spec, buffer
from handgrad.pieces import eager_on_cpu, in_float32, wide

REDUCTIONS = ("mean", "sum", "none")


class Loss(Layer):
    """A layer of two inputs that ends a model: ``loss(x, target)``, then ``model.backward(loss.backward())``.

    The target has no gradient, so `backward` returns dx alone. A reduced loss is a scalar whose own gradient is 1:
    `backward()` needs no argument. With reduction "none" the loss has a value per row, and `backward(dout)` wants one.

    A loss of one's own defines forward and backward as a layer does; there is no constructor to call. Where the model
    has several outputs, x is the tuple of them, and dx a tuple like it, as in the loss of a variational autoencoder:

    >>> class ELBO(Loss):
    ...     "loss = sum (out - target)^2 + 1/2 sum (mean^2 + exp(logvar) - 1 - logvar), over the number of rows N"
    ...     def forward(self, x, target):
    ...         out, mean, logvar = x
    ...         N, var = len(target), logvar.exp()
    ...         loss = ((out - target) ** 2).sum() + (mean**2 + var - 1 - logvar).sum() / 2
    ...         self.push(out - target, mean, var, N, out=loss / N)
    ...         return loss / N
    ...     def backward(self, dout=None):
    ...         diff, mean, var, N = self.pop(dout)
    ...         dloss = (1.0 if dout is None else dout) / N
    ...         return 2 * diff * dloss, mean * dloss, (var - 1) / 2 * dloss
    >>> loss = ELBO()
    >>> outputs = torch.ones(2, 3), torch.ones(2, 1), torch.zeros(2, 1)
    >>> loss(outputs, torch.zeros(2, 3))  # 3 of the squares, 1/2 of the mean
    tensor(3.5000)
    >>> [tuple(dx.shape) for dx in loss.backward()]
    [(2, 3), (2, 1), (2, 1)]
    """

    hands_on = True  # a dout of None stands for 1
    reduction: str = "mean"

    def __init__(self, *, reduction: str = "mean") -> None:
        if reduction not in REDUCTIONS:
            raise refused(self, f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self.reduction = reduction

    def reduce(self, losses: Tensor) -> Tensor:
        """The mean of all elements' losses, their sum, or themselves."""
        return losses if self.reduction == "none" else losses.sum() if self.reduction == "sum" else losses.mean()

    def divisor(self, target: Any) -> Tensor | float:
        """What the mean divides by, up to a factor that all minibatches share: by default the rows of the target.

        Parts of a minibatch in several processes weigh by it.
        """
        while isinstance(target, (tuple, list)) and target:
            target = target[0]
        return len(target) if isinstance(target, Tensor) and target.dim() else 1

    def dlosses(self, dout: Tensor | None, x: Tensor, count: int | Tensor) -> Tensor:
        """The gradient of each element's loss: like dout, or () where it is 1.

        It is dout, or dout/count for the mean, which is that of `count` elements (a number, or a tensor like x). It has
        x's dtype, but float32 for half precision, where 1/count may be too small.
        """
        share = 1 / count if self.reduction == "mean" else 1.0
        if dout is not None:
            return in_float32(dout) * share
        return share if isinstance(share, Tensor) else x.new_full((), share, dtype=wide(x.dtype))

    def check_like(self, x: Tensor, target: Tensor) -> None:
        """Raise unless x is floating and the target has its dtype and shape."""
        self.check_input(x)
        if not isinstance(target, Tensor) or target.dtype is not x.dtype:
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise self.error(DtypeError, "forward", f"target must be a tensor of x's dtype, {x.dtype}, got {came}")
        if target.shape != x.shape:
            problem = f"target must have x's shape, {tuple(x.shape)}, got {tuple(target.shape)}"
            raise self.error(ShapeError, "forward", problem)

    def _check_dout(self, dout: Any, spec: Spec) -> None:
        """Accept None, standing for 1, where the loss is a scalar."""
        self._refuse_autocast("backward")
        if dout is not None:
            super()._check_dout(dout, spec)
        elif isinstance(spec, tuple) and spec[0]:
            problem = f"only a scalar loss has a default dout; this one needs dout of shape {tuple(spec[0])}"
            raise self.error(ShapeError, "backward", problem)


class ClassLoss(Loss):
    """A loss whose target is the index of a class for each row, or `ignore_index` for a row that does not count."""

    weight: Tensor | None = buffer("C")

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.weight = floating(self, "weight", weight)
        if weight is not None and weight.dim() != 1:
            raise refused(self, f"weight must be (C,), one per class, got shape {tuple(weight.shape)}")
        self.ignore_index = integer(self, "ignore_index", ignore_index, None)
        self.label_smoothing = number(self, "label_smoothing", label_smoothing, 0, 1)

    def check_target(self, target: Tensor) -> None:
        """Raise unless the target is a tensor of class indices."""
        if not isinstance(target, Tensor) or target.dtype is not torch.int64:
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise self.error(DtypeError, "forward", f"target must be an int64 tensor of class indices, got {came}")

    def labels(self, target: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which rows count, None for all of them, and the labels, with 0 for those of ignored rows.

        The usual batch, where nothing is negative and so nothing is ignored, goes without masks. Where values may not
        be looked at, the mask is always taken.
        """
        ignored = self.ignore_index
        if ignored < 0 and eager_on_cpu(target) and (target.numel() == 0 or target.min().item() >= 0):
            return None, target
        used = target != ignored
        return used, where_used(target, used)

    def divisor(self, target: Tensor) -> Tensor | float:
        if isinstance(target, Tensor) and target.is_floating_point():  # probabilities of the classes
            return super().divisor(target)
        self.check_target(target)
        used, y = self.labels(target)
        if self.weight is not None and eager_on_cpu(y):
            self.check_range(y, len(self.weight))
        return self.count(y, used, torch.float64)

    def count(self, y: Tensor, used: Tensor | None, dtype: torch.dtype) -> Tensor | int:
        """What the mean divides by: the sum of w[y] over the rows that are used."""
        if self.weight is None:
            return y.numel() if used is None else used.sum(dtype=dtype)
        return where_used(self.weight[y], used).sum()

    def row_dlosses(self, dout: Tensor | None, x: Tensor, y: Tensor, used: Tensor | None) -> Tensor:
        """The gradient of each row's loss, 0 for an ignored row: like y, or () where it is one for all."""
        count: Tensor | int = 1
        if self.reduction == "mean":  # 0 where no row counts: then nothing has a gradient, whatever divides it
            count = self.count(y, used, x.dtype)
            count = count.masked_fill(count == 0, 1) if isinstance(count, Tensor) else max(count, 1)
        return where_used(self.dlosses(dout, x, count), used)

    def check_range(self, y: Tensor, classes: int) -> None:
        """Raise IndexRangeError unless every label is a class."""
        if y.numel() > 0:
            low, high = (int(limit) for limit in y.aminmax())
            if low < 0 or high >= classes:
                wanted = f"targets must be in 0..{classes - 1} or ignore_index={self.ignore_index}"
                raise self.error(IndexRangeError, "forward", f"{wanted}, got {low if low < 0 else high}")


def where_used(x: Tensor, used: Tensor | None) -> Tensor:
    """A copy of x that is 0 where not used; x itself where all is. (`where(used, 0)` would copy the 0 to a device.)"""
    return x if used is None else x.masked_fill(~used, 0)
