"""Joining dimensions."""

from __future__ import annotations

from torch import Tensor

from handgrad.arguments import integer
from handgrad.errors import ShapeError
from handgrad.layer import Layer


class Flatten(Layer):
    """Join the dimensions from `start_dim` to `end_dim`, both included, into one.

    Forward:   out = x.flatten(start_dim, end_dim)
    Shapes:    x (N, A, B, ...); out (N, A*B*...) by default; a 0-d x becomes (1,) where both dims allow it
    Backward:  every element of x appears once in out, in the same order, hence dx = dout in x's shape.
               dx may share its storage with dout, as out may with x.
    Recorded:  the shape of x
    Raises:    ArgumentError; ShapeError where x does not have the dimensions to join; DtypeError; StateError.

    >>> import torch
    >>> layer = Flatten()
    >>> layer(torch.zeros(32, 3, 10)).shape
    torch.Size([32, 30])
    >>> layer.backward(torch.zeros(32, 30)).shape
    torch.Size([32, 3, 10])
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim, self.end_dim = (
            integer(self, "start_dim", start_dim, None),
            integer(self, "end_dim", end_dim, None),
        )

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        try:
            out = x.flatten(self.start_dim, self.end_dim)
        except (IndexError, RuntimeError):
            problem = f"x must have dimensions {self.start_dim} to {self.end_dim} in order, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem) from None
        self.push([*x.shape], out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (shape,) = self.pop(dout)
        # out = x.flatten(start_dim, end_dim)
        return dout.reshape(shape)


class FlattenConsecutive(Layer):
    """Join every n consecutive time steps into one, as a tree of layers over a sequence does.

    Forward:   out[n, t] = the `size` rows x[n, size t], ..., x[n, size t + size - 1], side by side;
               where a single step is left, T = size, its dimension is dropped
    Shapes:    x (N, T, C) with T a multiple of size; out (N, T/size, size C), or (N, size C) where T = size
    Backward:  every element of x appears once in out, in the same order, hence dx = dout in x's shape.
               dx may share its storage with dout, as out may with x.
    Recorded:  the shape of x
    Raises:    ArgumentError for a size below 1; ShapeError where T is no multiple of size; DtypeError; StateError.
    Source:    makemore lecture 5 (the WaveNet), after van den Oord et al. 2016, arXiv:1609.03499

    >>> import torch
    >>> layer = FlattenConsecutive(2)
    >>> layer(torch.zeros(32, 8, 10)).shape, layer(torch.zeros(32, 2, 10)).shape
    (torch.Size([32, 4, 20]), torch.Size([32, 20]))
    >>> layer.backward(torch.zeros(32, 20)).shape
    torch.Size([32, 2, 10])
    """

    shown = ("size",)

    def __init__(self, size: int) -> None:
        self.size = integer(self, "size", size)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if x.dim() != 3 or x.shape[1] % self.size or x.shape[1] == 0:
            problem = f"x must be (N, T, C) with T a multiple of {self.size}, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        N, T, C = x.shape
        out = x.reshape(N, self.size * C) if self.size == T else x.reshape(N, T // self.size, self.size * C)
        self.push([*x.shape], out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (shape,) = self.pop(dout)
        # out = x, every `size` consecutive rows read as one
        return dout.reshape(shape)
