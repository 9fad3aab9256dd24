"""The squared error."""

from __future__ import annotations

from torch import Tensor

from handgrad.errors import DtypeError, ShapeError
from handgrad.losses.loss import Loss


class MSE(Loss):
    """The squared difference between x and target.

    Forward:   loss = (x - target)^2 elementwise; "mean" takes the mean of all elements, "sum" their sum, "none" neither
    Shapes:    x and target the same, any; loss () or like x
    Backward:  dx = dloss 2 (x - target), with dloss = dout/n for the mean of n elements
    Recorded:  x - target
    Raises:    ShapeError where the shapes differ: nothing is broadcast; DtypeError; ArgumentError; StateError.

    >>> import torch
    >>> loss = MSE()
    >>> loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    >>> loss.backward()
    tensor([ 0., -2.])
    """

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        self.check_input(x)
        if not isinstance(target, Tensor) or target.dtype is not x.dtype:
            came = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise self.error(DtypeError, "forward", f"target must be a tensor of x's dtype, {x.dtype}, got {came}")
        if target.shape != x.shape:
            problem = f"target must have x's shape, {tuple(x.shape)}, got {tuple(target.shape)}"
            raise self.error(ShapeError, "forward", problem)
        diff = x - target
        square = diff * diff
        out = square if self.reduction == "none" else square.sum() if self.reduction == "sum" else square.mean()
        self.push(diff, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        (diff,) = self.pop(dout)
        # loss = (x - target)^2
        dx: Tensor = diff * (2 / max(diff.numel(), 1) if self.reduction == "mean" else 2)
        return dx if dout is None else dx.mul_(dout)

    def extra_repr(self) -> str:
        return "" if self.reduction == "mean" else f"reduction={self.reduction!r}"
