"""Making images larger."""

from __future__ import annotations

from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from handgrad.arguments import integer, number, refused
from handgrad.errors import ShapeError
from handgrad.layer import Layer


class Upsample(Layer):
    """Larger images (or smaller ones), in which every position repeats one of the input.

    Forward:   out[n, c, t, u] = x[n, c, i[t], j[u]],  i[t] = floor(t H/H_out), or floor(t/scale_factor) where that is
               given, rounded as torch rounds; j likewise
    Shapes:    x (N, C, H, W), or with one or three dimensions in place of H, W; out likewise, of `size`, or of
               H_out = floor(H scale_factor); a single number stands for all dimensions
    Backward:  x[n, c, h, w] was copied to every t with i[t] = h and u with j[u] = w, hence, dimension by dimension,
               dx[n, c, h, w] = sum over those u of the sum over those t of dout[n, c, t, u]
    Recorded:  i, j, the shape of x
    Raises:    ArgumentError for another mode, or unless one of size and scale_factor is given; ShapeError; DtypeError;
               StateError.
    Source:    torch.nn.Upsample for the semantics

    >>> layer = Upsample(scale_factor=2)
    >>> layer(torch.tensor([[[1.0, 3.0]]]))
    tensor([[[1., 1., 3., 3.]]])
    >>> layer.backward(torch.tensor([[[1.0, 2.0, 10.0, 20.0]]]))
    tensor([[[ 3., 30.]]])
    """

    def __init__(
        self,
        size: int | tuple[int, ...] | None = None,
        scale_factor: float | tuple[float, ...] | None = None,
        mode: str = "nearest",
    ) -> None:
        if mode != "nearest":
            instead = f"instead take from_torch(torch.nn.Upsample(..., mode={mode!r}))"
            raise refused(self, f"mode must be 'nearest', got {mode!r}; {instead}")
        if (size is None) == (scale_factor is None):
            raise refused(self, f"one of size and scale_factor must be given, got {size} and {scale_factor}")
        for each in _each(size, 1) if scale_factor is None else ():
            integer(self, "size", each)
        for each in _each(scale_factor, 1) if size is None else ():
            if number(self, "scale_factor", each) <= 0:
                raise refused(self, f"scale_factor must be above 0, got {scale_factor}")
        self.size, self.scale_factor, self.mode = size, scale_factor, mode

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        indices = [self._index(x, dim) for dim in range(2, x.dim())]
        out = x
        for dim, index in enumerate(indices, start=2):
            out = out.index_select(dim, index)
        self.push(indices, x.shape, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        indices, shape = self.pop(dout)
        # out[n, c, t, u] = x[n, c, i[t], j[u]]
        dx = dout
        for dim, index in enumerate(indices, start=2):
            dx = dx.new_zeros(*shape[: dim + 1], *dx.shape[dim + 1 :]).index_add_(dim, index, dx)
        return dx

    def _index(self, x: Tensor, dim: int) -> Tensor:
        """Which position of x each position of out repeats along a dimension: torch's own rule, asked of torch."""
        positions = torch.arange(x.shape[dim], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        size, factor = (_each(given, x.dim() - 2)[dim - 2] for given in (self.size, self.scale_factor))
        return interpolate(positions[None, None], size, factor)[0, 0].long()

    def _check(self, x: Tensor) -> None:
        self.check_input(x)
        given = self.scale_factor if self.size is None else self.size
        problem = ""
        if x.dim() not in (3, 4, 5) or 0 in x.shape[1:]:
            problem = "x must be (N, C, L), (N, C, H, W) or (N, C, D, H, W), with no size of 0 but N"
        elif isinstance(given, tuple) and len(given) != x.dim() - 2:
            problem = f"x must have {len(given)} dimension(s) after C, as many as size or scale_factor has numbers"
        elif self.scale_factor is not None and min(map(mul, x.shape[2:], _each(self.scale_factor, x.dim() - 2))) < 1:
            problem = f"x must be large enough to leave something, scaled by {self.scale_factor}"
        if problem:
            raise self.error(ShapeError, "forward", f"{problem}, got shape {tuple(x.shape)}")


def _each(given: Any, n: int) -> Any:
    """One number for each of n dimensions."""
    return given if isinstance(given, tuple) else (given,) * n
