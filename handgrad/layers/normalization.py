"""Normalisation of each sample by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, blockwise, parameter, total


class LayerNorm(Layer):
    """Normalise the last dimensions of each sample, then scale and shift them elementwise.

    Forward:   xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               with mean and var = mean((x - mean)^2) over the dimensions of normalized_shape, n values a sample
    Shapes:    x (..., *normalized_shape); weight, bias normalized_shape; out like x
    Backward:  dbias = sum dout;  dweight = sum dout xhat, both over the leading dimensions;  dxhat = dout weight.
               x also acts through var and mean; with `avg` the mean over a sample's n values,
               dvar  = sum dxhat (x - mean) (-1/2) rstd^3 = -1/2 rstd^2 n avg(dxhat xhat)
               dmean = -rstd n avg(dxhat)           (the way through var adds nothing: sum (x - mean) = 0)
               dx    = dxhat rstd + dvar 2 (x - mean)/n + dmean/n
                     = rstd (dxhat - avg(dxhat) - xhat avg(dxhat xhat))
    Recorded:  x, mean, rstd, weight
    Raises:    ShapeError where x does not end in normalized_shape; DtypeError; StateError.
    Source:    Ba, Kiros and Hinton 2016, arXiv:1607.06450

    `bias=False` leaves out the bias alone, `elementwise_affine=False` both parameters.

    >>> layer = LayerNorm(2)
    >>> out = layer(torch.tensor([[1.0, 3.0], [0.0, 8.0]]))
    >>> out.round(decimals=3)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """

    weight: Tensor | None = parameter("*D")
    bias: Tensor | None = parameter("*D")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.normalized_shape, self.eps = _shape("LayerNorm", normalized_shape), eps
        ones = torch.ones(self.normalized_shape, dtype=dtype, device=device)
        self.weight = ones if elementwise_affine else None
        self.bias = torch.zeros_like(ones) if elementwise_affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x, self.normalized_shape, self.weight)
        out, mean, rstd = torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        self.push(x, mean, rstd, self.weight, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, mean, rstd, weight = self.pop(dout)
        rows = [_rows(t, self.normalized_shape) for t in (dout, x)]
        columns, (flat, shares) = (mean.reshape(-1, 1), rstd.reshape(-1, 1)), _flat(weight)
        sums: list[tuple[Tensor, Tensor]] = []

        def formula(
            d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor | None, product: Tensor | None
        ) -> Tensor:
            xhat = torch.sub(x, mean, out=dx).mul_(rstd)
            # out = xhat weight + bias
            product = torch.mul(d, xhat, out=product)
            sums.append((product.sum(0), d.sum(0)))
            if not need_dx:
                return xhat
            # xhat = (x - mean) rstd; dx takes the memory of xhat
            through_var, through_mean = _minus_average(product, shares), _minus_average(d, shares)
            dxhat = d if flat is None else torch.mul(d, flat, out=product)
            # (a product rounded by itself: where n = 1 it cancels with its mean to an exact 0)
            return xhat.mul_(through_var).add_(through_mean).add_(dxhat).mul_(rstd)

        dx = blockwise(formula, *rows, *columns, scratch=1)
        dweight, dbias = total(sums)
        if weight is not None:
            self.add_grad(weight, dweight.view_as(weight))
        if self.bias is not None:
            self.add_grad(self.bias, dbias.view_as(self.bias))
        return dx.view_as(x) if need_dx else None

    def extra_repr(self) -> str:
        affine = (
            ", elementwise_affine=False" if self.weight is None else "" if self.bias is not None else ", bias=False"
        )
        return _sizes(self.normalized_shape) + ("" if self.eps == 1e-5 else f", eps={self.eps}") + affine


class RMSNorm(Layer):
    """Divide the last dimensions of each sample by their root mean square, then scale them elementwise.

    Forward:   xhat = x rstd,  rstd = 1/sqrt(mean(x^2) + eps),  out = xhat weight
               with the mean over the dimensions of normalized_shape; eps=None stands for the precision of x's dtype
    Shapes:    x (..., *normalized_shape); weight normalized_shape; out like x
    Backward:  dweight = sum dout xhat over the leading dimensions;  dxhat = dout weight.
               x also acts through rstd; with `avg` the mean over a sample's n values, d rstd / dx = -rstd^3 x/n, hence
               dx = dxhat rstd + sum(dxhat x) (-rstd^3 x/n) = rstd (dxhat - xhat avg(dxhat xhat))
    Recorded:  x, rstd, weight
    Raises:    ShapeError where x does not end in normalized_shape; DtypeError; StateError.
    Source:    Zhang and Sennrich 2019, arXiv:1910.07467

    >>> layer = RMSNorm(2)
    >>> layer(torch.tensor([[1.0, 1.0], [0.0, 8.0]]))
    tensor([[1.0000, 1.0000],
            [0.0000, 1.4142]])
    """

    weight: Tensor | None = parameter("*D")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.normalized_shape, self.eps = _shape("RMSNorm", normalized_shape), eps
        self.weight = torch.ones(self.normalized_shape, dtype=dtype, device=device) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x, self.normalized_shape, self.weight)
        dims = tuple(range(-len(self.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        rstd = ((x * x).mean(dims, keepdim=True) + eps).rsqrt()  # one a sample
        out = x * rstd if self.weight is None else x * rstd * self.weight
        self.push(x, rstd, self.weight, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, rstd, weight = self.pop(dout)
        rows, (flat, shares) = [_rows(t, self.normalized_shape) for t in (dout, x)], _flat(weight)
        sums: list[tuple[Tensor]] = []

        def formula(d: Tensor, x: Tensor, rstd: Tensor, dx: Tensor | None, product: Tensor | None) -> Tensor:
            xhat = torch.mul(x, rstd, out=dx)
            # out = xhat weight
            product = torch.mul(d, xhat, out=product)
            sums.append((product.sum(0),))
            if not need_dx:
                return xhat
            # xhat = x rstd; dx takes the memory of xhat
            dx = xhat.mul_(_minus_average(product, shares))
            return (dx.add_(d) if flat is None else dx.addcmul_(d, flat)).mul_(rstd)

        dx = blockwise(formula, *rows, rstd.reshape(-1, 1), scratch=1)
        (dweight,) = total(sums)
        if weight is not None:
            self.add_grad(weight, dweight.view_as(weight))
        return dx.view_as(x) if need_dx else None

    def extra_repr(self) -> str:
        eps = "" if self.eps is None else f", eps={self.eps}"
        return _sizes(self.normalized_shape) + eps + ("" if self.weight is not None else ", elementwise_affine=False")


def _shape(kind: str, normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape or min(shape) < 1:
        raise ArgumentError(f"{kind}: normalized_shape must be one or more sizes of at least 1, got {normalized_shape}")
    return shape


def _check(layer: Layer, x: Tensor, shape: tuple[int, ...], weight: Tensor | None) -> None:
    layer.check_input(x, None if weight is None else weight.dtype)
    if tuple(x.shape[-len(shape) :]) != shape:
        wanted = shape[0] if len(shape) == 1 else shape
        last = "last dimension" if len(shape) == 1 else f"last {len(shape)} dimensions"
        raise layer.error(ShapeError, "forward", f"{last} of x must be {wanted}, got shape {tuple(x.shape)}")


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A row a sample."""
    return x.reshape(-1, math.prod(shape))


def _flat(weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight as a row, and -weight/n as a column: what a value counts in its row's average of products with weight."""
    return (None, None) if weight is None else (weight.reshape(-1), weight.reshape(-1, 1) / -weight.numel())


def _minus_average(rows: Tensor, shares: Tensor | None) -> Tensor:
    """Minus the mean over each row, times the weights if there are any, as a column."""
    return rows.mean(1, keepdim=True).neg_() if shares is None else rows @ shares


def _sizes(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(shape)
