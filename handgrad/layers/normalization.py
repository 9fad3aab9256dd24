"""Normalisation of each sample by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from handgrad.arguments import integer, integers, number, refused
from handgrad.errors import ShapeError
from handgrad.layer import Layer, parameter
from handgrad.pieces import blockwise, in_float32


class LayerNorm(Layer):
    """Normalise the last dimensions of each sample, then scale and shift them elementwise.

    Forward:   xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               with mean and var = mean((x - mean)^2) over the dimensions of normalized_shape, n values per sample
    Shapes:    x (..., *normalized_shape); weight, bias normalized_shape; out like x
    Backward:  dbias = sum dout;  dweight = sum dout xhat, both over the leading dimensions;  dxhat = dout weight.
               x also acts through var and mean; with `avg` the mean over a sample's n values,
               dvar  = sum dxhat (x - mean) (-1/2) rstd^3 = -1/2 rstd^2 n avg(dxhat xhat)
               dmean = -rstd n avg(dxhat)           (the way through var adds nothing: sum (x - mean) = 0)
               dx    = dxhat rstd + dvar 2 (x - mean)/n + dmean/n
                     = rstd (dxhat - avg(dxhat) - xhat avg(dxhat xhat))
               n avg(v weight), with rows v, is the product of v and weight, which spares the tensor v weight
    Recorded:  x, mean, rstd, weight
    Raises:    ArgumentError; ShapeError where x does not end in normalized_shape; DtypeError; StateError.
    Source:    Ba, Kiros and Hinton 2016, arXiv:1607.06450

    `bias=False` leaves out the bias alone, `elementwise_affine=False` both parameters.

    >>> layer = LayerNorm(2)
    >>> out = layer(torch.tensor([[1.0, 3.0], [0.0, 8.0]]))
    >>> out.round(decimals=3)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """

    shown = ("normalized_shape",)
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
        self.normalized_shape = integers(self, "normalized_shape", normalized_shape, None)
        self.eps = number(self, "eps", eps, 0)
        self.elementwise_affine = elementwise_affine
        ones = torch.ones(self.normalized_shape, dtype=dtype, device=device)
        self.weight = ones if elementwise_affine else None
        self.bias = torch.zeros_like(ones) if elementwise_affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x, self.normalized_shape, self.weight)
        out, mean, rstd = torch.native_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        self.push(x, mean, rstd, self.weight, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        x, mean, rstd, weight = self.pop(dout)
        n = math.prod(self.normalized_shape)
        gain = _gain(self, x, weight)
        column = gain.unsqueeze(1)

        def formula(
            dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor | None = None
        ) -> tuple[Tensor, Tensor, Tensor]:
            # out = xhat weight + bias
            xhat = torch.sub(x, mean, out=dx).mul_(rstd)
            product = dout * xhat
            dweight, dbias = product.sum(0), dout.sum(0)
            # dxhat = dout weight:  n avg(dxhat) and n avg(dxhat xhat)
            total, total_xhat = dout @ column, product @ column
            # xhat = (x - mean) rstd
            centred = torch.mul(dout, gain, out=product).sub_(total, alpha=1 / n)  # dxhat - avg(dxhat)
            rest = torch.addcmul(centred, xhat, total_xhat, value=-1 / n, out=xhat)  # - xhat avg(dxhat xhat)
            return rest.mul_(rstd), dweight, dbias

        # a row per sample
        dx, dweight, dbias = blockwise(
            formula, dout.reshape(-1, n), x.reshape(-1, n), mean.reshape(-1, 1), rstd.reshape(-1, 1)
        )
        if weight is not None:
            self.add_grad(weight, dweight.view_as(weight))
        if self.bias is not None:
            self.add_grad(self.bias, dbias.view_as(self.bias))
        return dx.view_as(x)


class RMSNorm(Layer):
    """Divide the last dimensions of each sample by their root mean square, then scale them elementwise.

    Forward:   xhat = x rstd,  rstd = 1/sqrt(mean(x^2) + eps),  out = xhat weight
               with the mean over the dimensions of normalized_shape; eps=None stands for the precision of x's dtype,
               for half precision that of float32
    Shapes:    x (..., *normalized_shape); weight normalized_shape; out like x
    Backward:  dweight = sum dout xhat over the leading dimensions;  dxhat = dout weight.
               x also acts through rstd; with `avg` the mean over a sample's n values, d rstd / dx = -rstd^3 x/n, hence
               dx = dxhat rstd + sum(dxhat x) (-rstd^3 x/n) = rstd (dxhat - xhat avg(dxhat xhat))
    Recorded:  x, rstd, weight
    Raises:    ArgumentError; ShapeError where x does not end in normalized_shape; DtypeError; StateError.
    Source:    Zhang and Sennrich 2019, arXiv:1910.07467

    >>> layer = RMSNorm(2)
    >>> layer(torch.tensor([[1.0, 1.0], [0.0, 8.0]]))
    tensor([[1.0000, 1.0000],
            [0.0000, 1.4142]])
    """

    shown = ("normalized_shape",)
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
        self.normalized_shape = integers(self, "normalized_shape", normalized_shape, None)
        self.eps = None if eps is None else number(self, "eps", eps, 0)
        self.elementwise_affine = elementwise_affine
        self.weight = torch.ones(self.normalized_shape, dtype=dtype, device=device) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        _check(self, x, self.normalized_shape, self.weight)
        dims = tuple(range(-len(self.normalized_shape), 0))
        wide_x = in_float32(x)
        eps = torch.finfo(wide_x.dtype).eps if self.eps is None else self.eps
        rstd = ((wide_x * wide_x).mean(dims, keepdim=True) + eps).rsqrt()  # one per sample
        xhat = wide_x * rstd
        out = (xhat if self.weight is None else xhat * self.weight).to(x.dtype)
        self.push(x, rstd, self.weight, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        x, rstd, weight = self.pop(dout)
        n = math.prod(self.normalized_shape)
        gain = _gain(self, x, weight)
        column = gain.unsqueeze(1)

        def formula(dout: Tensor, x: Tensor, rstd: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor]:
            # out = xhat weight
            xhat = torch.mul(x, rstd, out=dx)
            product = dout * xhat
            dweight = product.sum(0)
            # dxhat = dout weight:  n avg(dxhat xhat)
            total_xhat = product @ column
            # xhat = x rstd
            dxhat = torch.mul(dout, gain, out=product)
            rest = torch.addcmul(dxhat, xhat, total_xhat, value=-1 / n, out=xhat)  # dxhat - xhat avg(dxhat xhat)
            return rest.mul_(rstd), dweight

        dx, dweight = blockwise(formula, dout.reshape(-1, n), x.reshape(-1, n), rstd.reshape(-1, 1))  # a row per sample
        if weight is not None:
            self.add_grad(weight, dweight.view_as(weight))
        return dx.view_as(x)


class GroupNorm(Layer):
    """Normalise each group of channels of each sample, then scale and shift each channel.

    Forward:   the C channels are cut into G = num_groups runs, and per sample and run of n = C/G H W ... values
               xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               with mean and var = mean((x - mean)^2) over the n values, weight and bias per channel
    Shapes:    x (N, C, ...); weight, bias (C,); out like x; inside, (N, G, C/G, H W ...), with mean and rstd (N, G)
    Backward:  dbias = sum dout;  dweight = sum dout xhat, both over all but the channels;  dxhat = dout weight.
               Within a run all is as in LayerNorm: with `avg` the mean over its n values,
               dx = rstd (dxhat - avg(dxhat) - xhat avg(dxhat xhat))
               weight is one number per channel: with `sums` over the channel's values of a sample,
               n avg(dxhat) = sum weight sums(dout),  n avg(dxhat xhat) = sum weight sums(dout xhat) over its channels
    Recorded:  x, mean, rstd, weight
    Raises:    ArgumentError where num_groups does not divide num_channels; ShapeError, also for a single sample of one
               value per group; DtypeError; StateError.
    Source:    Wu and He 2018, arXiv:1803.08494

    >>> layer = GroupNorm(2, 4)
    >>> out = layer(torch.tensor([[1.0, 3.0, 0.0, 8.0]]))
    >>> out.round(decimals=3)
    tensor([[-1.,  1., -1.,  1.]])
    """

    weight: Tensor | None = parameter("C")
    bias: Tensor | None = parameter("C")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.num_groups = integer(self, "num_groups", num_groups)
        self.num_channels = integer(self, "num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise refused(self, f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        self.eps, self.affine = number(self, "eps", eps, 0), affine
        ones = torch.ones(self.num_channels, dtype=dtype, device=device)
        self.weight, self.bias = (ones, torch.zeros_like(ones)) if affine else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        (N, C), P = x.shape[:2], math.prod(x.shape[2:])
        out, mean, rstd = torch.native_group_norm(
            x.contiguous(), self.weight, self.bias, N, C, P, self.num_groups, self.eps
        )
        self.push(x, mean, rstd, self.weight, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        x, mean, rstd, weight = self.pop(dout)
        G = self.num_groups
        by_group = (len(x), G, self.num_channels // G, math.prod(x.shape[2:]))  # (N, G, C/G, H W ...)
        n = by_group[2] * by_group[3]
        gain = 1.0 if weight is None else in_float32(weight).view(G, -1, 1)

        def formula(dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # out = xhat weight + bias
            xhat = (x - mean) * rstd
            sums, sums_xhat = dout.sum(3, keepdim=True), (dout * xhat).sum(3, keepdim=True)  # (N, G, C/G, 1)
            dweight, dbias = sums_xhat.sum((0, 3)), sums.sum((0, 3))  # (G, C/G)
            # dxhat = dout weight:  avg(dxhat) and avg(dxhat xhat), (N, G, 1, 1)
            avg, avg_xhat = (sums * gain).sum(2, keepdim=True) / n, (sums_xhat * gain).sum(2, keepdim=True) / n
            # xhat = (x - mean) rstd
            dx = rstd * (dout * gain - avg - xhat * avg_xhat)
            return dx, dweight, dbias

        dx, dweight, dbias = blockwise(
            formula, dout.reshape(by_group), x.reshape(by_group), mean[..., None, None], rstd[..., None, None]
        )
        if weight is not None:
            self.add_grad(weight, dweight.view_as(weight))
            self.add_grad(self.bias, dbias.view_as(weight))
        return dx.view_as(x)

    def _check(self, x: Tensor) -> None:
        self.check_input(x, None if self.weight is None else self.weight.dtype)
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            problem = f"x must be (N, {self.num_channels}, ...), got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        if x.numel() == self.num_groups:
            problem = f"the variance of a group needs more than one value, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)


def _check(layer: Layer, x: Tensor, shape: tuple[int, ...], weight: Tensor | None) -> None:
    layer.check_input(x, None if weight is None else weight.dtype)
    if tuple(x.shape[-len(shape) :]) != shape:
        wanted = shape[0] if len(shape) == 1 else shape
        last = "last dimension" if len(shape) == 1 else f"last {len(shape)} dimensions"
        raise layer.error(ShapeError, "forward", f"{last} of x must be {wanted}, got shape {tuple(x.shape)}")


def _gain(layer: LayerNorm | RMSNorm, x: Tensor, weight: Tensor | None) -> Tensor:
    """Weight as a row, of ones where there is none, in what the formulas are computed in."""
    layer._refuse_autocast("backward")  # it would round the products with the row, and nothing would show it
    return in_float32(x.new_ones(layer.normalized_shape) if weight is None else weight).reshape(-1)
