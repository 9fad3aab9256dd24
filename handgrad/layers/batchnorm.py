"""Normalisation over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, buffer, parameter


class BatchNorm1d(Layer):
    """Normalise each channel over the batch, then scale and shift it.

    Forward:   xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               In training, mean and var are those of the batch, per channel over its n = N (or N L) values:
               var = sum (x - mean)^2 / m with m = n, or m = n - 1 if `unbiased`, and then
               running_mean += momentum (mean - running_mean)
               running_var  += momentum (sum (x - mean)^2 / (n - 1) - running_var)
               With momentum=None the factor is 1/num_batches_tracked: the plain average. In evaluation, mean and var
               are the running ones, constants; without running statistics they are always those of the batch.
    Shapes:    x (N, C) or (N, C, L); weight, bias, running_mean, running_var (C,); out like x
    Backward:  dbias = sum dout;  dweight = sum dout xhat;  dxhat = dout weight.
               In evaluation dx = dxhat rstd. In training x also acts through var and mean:
               dvar  = sum dxhat (x - mean) (-1/2) rstd^3 = -1/2 rstd^2 sum dxhat xhat
               dmean = -rstd sum dxhat              (the way through var adds nothing: sum (x - mean) = 0)
               dx    = dxhat rstd + dvar 2 (x - mean)/m + dmean/n
                     = a dout + b xhat + c  with, per channel, a = weight rstd, b = -a dweight/m, c = -a dbias/n
    Recorded:  xhat, rstd, weight
    Raises:    ShapeError, also for a batch of one value a channel in training; DtypeError; StateError.
    Source:    Ioffe and Szegedy 2015, arXiv:1502.03167; the simplified dx in makemore lecture 4, which uses n - 1.

    >>> layer = BatchNorm1d(2)
    >>> out = layer(torch.tensor([[1.0, 0.0], [3.0, 8.0]]))
    >>> out.round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> layer.running_mean, layer.running_var  # a tenth of the way from 0 and 1 to the batch's mean and variance
    (tensor([0.2000, 0.4000]), tensor([1.1000, 4.1000]))
    """

    weight: Tensor | None = parameter("C")
    bias: Tensor | None = parameter("C")
    running_mean: Tensor | None = buffer("C")
    running_var: Tensor | None = buffer("C")
    num_batches_tracked: Tensor | None = buffer()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        unbiased: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if num_features < 1:
            raise ArgumentError(f"BatchNorm1d: num_features must be at least 1, got {num_features}")
        self.num_features, self.eps, self.momentum, self.unbiased = num_features, eps, momentum, unbiased
        ones = torch.ones(num_features, dtype=dtype, device=device)
        self.weight, self.bias = (ones, torch.zeros_like(ones)) if affine else (None, None)
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.running_mean, self.running_var = torch.zeros_like(ones), torch.ones_like(ones)
            self.num_batches_tracked = torch.tensor(0, device=device)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self.weight is None else self.weight.dtype
        self.check_input(x, dtype if self.running_mean is None else self.running_mean.dtype)
        if x.dim() not in (2, 3) or x.shape[1] != self.num_features:
            problem = f"x must be (N, {self.num_features}) or (N, {self.num_features}, L), got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
        n = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[2]
        m: int | None = None  # None: mean and var are constants, and the backward has nothing to send through them
        if self.training or self.running_mean is None or self.running_var is None:
            if n == 1:
                problem = f"the variance of a batch needs more than one value a channel, got shape {tuple(x.shape)}; "
                raise self.error(ShapeError, "forward", problem + "evaluate a single row under eval()")
            dims = _all_but_channels(x)
            mean = x.mean(dims)  # (C,)
            diff = x - _column(mean, x)
            var = (diff * diff).mean(dims)  # (C,)
            m = n
            if self.unbiased:
                m = n - 1
                var = var * (n / m)
            if self.training and n > 0:
                self._update_running(mean, var if self.unbiased else var * (n / (n - 1)))
        else:
            var = self.running_var
            diff = x - _column(self.running_mean, x)
        rstd = (var + self.eps).rsqrt()  # (C,)
        xhat = diff * _column(rstd, x)
        out = xhat
        if self.weight is not None and self.bias is not None:
            out = torch.addcmul(_column(self.bias, x), xhat, _column(self.weight, x))
        self.push(xhat, rstd, self.weight, m, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        xhat, rstd, weight, m = self.pop(dout)
        dims = _all_but_channels(dout)
        # out = xhat weight + bias
        dbias = dout.sum(dims)  # (C,)
        dweight = (dout * xhat).sum(dims)  # (C,)
        self.add_grad(weight, dweight)
        self.add_grad(self.bias, dbias)
        if not need_dx:
            return None
        # xhat = (x - mean) rstd
        a = rstd if weight is None else weight * rstd  # (C,)
        if m is None:
            return dout * _column(a, dout)
        n = dout.numel() // self.num_features
        dx = torch.addcmul(_column(dbias, dout), xhat, _column(dweight, dout), value=n / max(m, 1))
        return torch.sub(dout, dx, alpha=1 / max(n, 1), out=dx).mul_(_column(a, dout))

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        factor = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.detach(), factor)
        self.running_var.lerp_(var.detach(), factor)

    def extra_repr(self) -> str:
        defaults = {"eps": 1e-5, "momentum": 0.1, "unbiased": False}
        changes = [f", {k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        affine = "" if self.weight is not None else ", affine=False"
        track = "" if self.running_mean is not None else ", track_running_stats=False"
        return f"{self.num_features}{''.join(changes)}{affine}{track}"


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0,) if x.dim() == 2 else (0, 2)


def _column(per_channel: Tensor, x: Tensor) -> Tensor:
    """A (C,) tensor, shaped to broadcast against x."""
    return per_channel if x.dim() == 2 else per_channel.unsqueeze(1)
