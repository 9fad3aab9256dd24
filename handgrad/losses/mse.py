"""The squared error."""

from __future__ import annotations

from torch import Tensor

from handgrad.losses.loss import Loss


class MSE(Loss):
    """The squared difference between x and target.

    Forward:   loss = (x - target)^2 elementwise; "mean" takes the mean of all elements, "sum" their sum, "none" neither
    Shapes:    x and target the same, any; loss () or like x
    Backward:  dx = dlosses 2 (x - target), where dlosses is dout, or dout/n for the mean of n elements
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
        self.check_like(x, target)
        diff = x - target
        out = self.reduce(diff * diff)
        self.push(diff, out=out)
        return out

    def backward(self, dout: Tensor | None = None) -> Tensor:
        (diff,) = self.pop(dout)
        # loss = (x - target)^2
        dlosses = self.dlosses(dout, diff, max(diff.numel(), 1))
        dx: Tensor = 2 * dlosses * diff
        return dx.to(diff.dtype)
