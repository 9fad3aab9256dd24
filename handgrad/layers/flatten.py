"""Joining dimensions."""

from __future__ import annotations

from torch import Tensor

from handgrad.errors import ShapeError
from handgrad.layer import Layer


class Flatten(Layer):
    """Join the dimensions from `start_dim` to `end_dim`, both included, into one.

    Forward:   out = x.flatten(start_dim, end_dim)
    Shapes:    x (N, A, B, ...); out (N, A*B*...) by default; a 0-d x becomes (1,) where both dims allow it
    Backward:  every element of x appears once in out, in the same order, hence dx = dout in x's shape.
               dx may share its storage with dout, as out may with x.
    Recorded:  the shape of x
    Raises:    ShapeError where x does not have the dimensions to join; DtypeError; StateError.

    >>> import torch
    >>> layer = Flatten()
    >>> layer(torch.zeros(32, 3, 10)).shape
    torch.Size([32, 30])
    >>> layer.backward(torch.zeros(32, 30)).shape
    torch.Size([32, 3, 10])
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        try:
            out = x.flatten(self.start_dim, self.end_dim)
        except (IndexError, RuntimeError):
            problem = f"x must have dimensions {self.start_dim} to {self.end_dim} in order, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem) from None
        self.push(x.shape, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (shape,) = self.pop(dout)
        # out = x.flatten(start_dim, end_dim)
        return dout.reshape(shape)

    def extra_repr(self) -> str:
        return "" if (self.start_dim, self.end_dim) == (1, -1) else f"{self.start_dim}, {self.end_dim}"
