"""Several losses at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from handgrad.arguments import number
from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer
from handgrad.layers.containers import total
from handgrad.losses.loss import ClassLoss, Loss


class Losses(Loss):
    """The weighted sum of several losses, each of an output and a target of its own.

    Forward:   loss = sum_i weights[i] losses[i](x[i], target[i])
    Shapes:    x and target tuples of as many entries as there are losses, each as its loss takes it; loss ()
    Backward:  d loss / d losses[i] = weights[i], hence dx[i] = losses[i].backward(weights[i] dout)
    Recorded:  nothing itself; the losses record
    Raises:    ArgumentError; ShapeError where x or target is no tuple of that length; what the losses raise, with the
               place: "in 1 (MSE()): ...".

    A loss that takes several outputs gets a tuple of them for its x.

    >>> import torch
    >>> from handgrad import MSE, CrossEntropy
    >>> loss = Losses(CrossEntropy(), MSE(), weights=(1, 0.5))
    >>> x = torch.zeros(2, 4), torch.ones(2)
    >>> loss(x, (torch.tensor([1, 3]), torch.zeros(2)))  # log 4 + 0.5
    tensor(1.8863)
    >>> [tuple(dx.shape) for dx in loss.backward()]
    [(2, 4), (2,)]
    """

    def __init__(self, *losses: Loss, weights: Sequence[float] | None = None) -> None:
        for i, loss in enumerate(losses):
            if not isinstance(loss, Loss) or loss.reduction == "none":
                came = 'reduction="none"' if isinstance(loss, Loss) else type(loss).__name__
                raise ArgumentError(f"Losses: every argument must be a Loss of one number, got {came} at {i}")
        if weights is not None and not isinstance(weights, (list, tuple)):
            raise ArgumentError(f"Losses: weights must be a list or a tuple of numbers, got {weights!r}")
        if not losses or (weights is not None and len(weights) != len(losses)):
            came = f"{len(losses)} losses" + ("" if weights is None else f" and {len(weights)} weights")
            raise ArgumentError(f"Losses: one or more losses are needed, and one weight per loss if any; got {came}")
        self.losses = list(losses)
        self.weights = tuple([number(self, "each of weights", w) for w in weights or (1.0,) * len(losses)])

    def forward(self, x: tuple[Any, ...], target: tuple[Any, ...]) -> Tensor:
        for name, value in (("x", x), ("target", target)):
            if not isinstance(value, tuple) or len(value) != len(self.losses):
                came = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
                problem = f"{name} must be a tuple of {len(self.losses)}, one entry per loss, got {came}"
                raise self.error(ShapeError, "forward", problem)
        values = [loss.forward_at(i, (x[i], target[i])) for i, loss in enumerate(self.losses)]
        out: Tensor = total([weight * value for weight, value in zip(self.weights, values)])
        self.push(*values, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> tuple[Any, ...]:
        values = self.pop(dout)
        dxs: list[Any] = [None] * len(values)
        for i in reversed(range(len(values))):
            # loss = sum_i weights[i] losses[i](x[i], target[i])
            dloss = values[i].new_full((), self.weights[i])
            dxs[i] = self.losses[i].backward_at(i, dloss if dout is None else dloss * dout)
        return tuple(dxs)

    def divisor(self, target: tuple[Any, ...]) -> Tensor | float:
        """The rows of the targets, which all the losses must divide by: one gradient weighs for all of them."""
        for i, (loss, own) in enumerate(zip(self.losses, target)):
            divisor = loss.divisor(own)
            unequal = isinstance(loss, ClassLoss) and not own.is_floating_point() and float(divisor) != own.numel()
            if loss.reduction != "mean" or unequal:
                problem = "in several processes each loss must be a mean over all rows, without class weights, and no "
                raise self.error(ArgumentError, "divisor", problem + f"row be ignored; {i} ({loss!r}) is none")
        return super().divisor(target)

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        return ((str(i), loss) for i, loss in enumerate(self.losses))
