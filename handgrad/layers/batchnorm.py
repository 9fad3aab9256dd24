"""Normalisation over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, blocks, buffer, parameter, sum_of_products


class BatchNorm1d(Layer):
    """Normalise each channel over the batch, then scale and shift it.

    Forward:   xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               In training, mean and var are those of the batch, per channel over its n = N (or N L, ...) values:
               var = sum (x - mean)^2 / m with m = n, or m = n - 1 if `unbiased`, and then
               running_mean += momentum (mean - running_mean)
               running_var  += momentum (sum (x - mean)^2 / (n - 1) - running_var)
               With momentum=None the factor is 1/num_batches_tracked: the plain average. In evaluation, mean and var
               are the running ones, constants; without running statistics they are always those of the batch.
    Shapes:    x (N, C) or (N, C, L), or (..., C) if `channels_last`; weight, bias, running_mean, running_var (C,);
               out like x
               In the code diff = x - mean and scale = weight rstd, so that out = diff scale + bias.
    Backward:  dbias = sum dout;  dweight = sum dout xhat = rstd sum dout diff;  dxhat = dout weight.
               In evaluation dx = dxhat rstd = dout scale. In training x also acts through var and mean:
               dvar  = sum dxhat diff (-1/2) rstd^3 = -1/2 rstd^2 weight dweight
               dmean = -rstd sum dxhat = -scale dbias    (the way through var adds nothing: sum diff = 0)
               dx    = dxhat rstd + dvar 2 diff/m + dmean/n
                     = a dout + b diff + c  with, per channel, a = scale, b = -scale rstd dweight/m, c = -scale dbias/n
    Recorded:  diff, rstd, scale, weight
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
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if num_features < 1:
            raise ArgumentError(f"BatchNorm1d: num_features must be at least 1, got {num_features}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.unbiased, self.channels_last = unbiased, channels_last
        ones = torch.ones(num_features, dtype=dtype, device=device)
        self.weight, self.bias = (ones, torch.zeros_like(ones)) if affine else (None, None)
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.running_mean, self.running_var = torch.zeros_like(ones), torch.ones_like(ones)
            self.num_batches_tracked = torch.tensor(0, device=device)

    def forward(self, x: Tensor) -> Tensor:
        own = self.running_mean if self.weight is None else self.weight
        self.check_input(x, None if own is None else own.dtype)
        C = self.num_features
        if x.dim() < 2 or (x.shape[-1] if self.channels_last else x.dim() < 4 and x.shape[1]) != C:
            wanted = f"(..., {C})" if self.channels_last else f"(N, {C}) or (N, {C}, L)"
            raise self.error(ShapeError, "forward", f"x must be {wanted}, got shape {tuple(x.shape)}")
        n = x.numel() // C
        m: int | None = None  # None: mean and var are constants, and the backward has nothing to send through them
        if self.training or self.running_mean is None or self.running_var is None:
            if n == 1:
                problem = f"the variance of a batch needs more than one value a channel, got shape {tuple(x.shape)}; "
                raise self.error(ShapeError, "forward", problem + "evaluate a single row under eval()")
            dims = self._dims(x)
            mean = x.mean(dims)  # (C,)
            diff = x - self._column(mean, x)
            square = sum_of_products(diff, diff, dims)  # (C,)
            m = n - 1 if self.unbiased else n
            var = square / max(m, 1)  # for no rows 0, not NaN: what they send back is nothing
            if self.training and n > 0:
                self._update_running(mean, var if self.unbiased else square / (n - 1))
        else:
            var = self.running_var
            diff = x - self._column(self.running_mean, x)
        rstd = (var + self.eps).rsqrt()  # (C,)
        scale = rstd if self.weight is None else self.weight * rstd  # (C,)
        if self.bias is None:
            out = diff * self._column(scale, x)
        else:
            out = torch.addcmul(self._column(self.bias, x), diff, self._column(scale, x))
        self.push(diff, rstd, scale, self.weight, m, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        diff, rstd, scale, weight, m = self.pop(dout)
        dims = self._dims(dout)
        # out = diff rstd weight + bias
        dbias = dout.sum(dims)  # (C,)
        dweight = sum_of_products(dout, diff, dims) * rstd  # (C,)
        self.add_grad(weight, dweight)
        self.add_grad(self.bias, dbias)
        if not need_dx:
            return None
        # diff = x - mean, rstd = 1/sqrt(sum diff^2 / m + eps)
        a = self._column(scale, dout)
        if m is None:
            return dout * a
        n = max(dout.numel() // self.num_features, 1)
        k = scale / -n  # (C,)
        b, c = self._column(k * rstd * dweight, dout), self._column(k * dbias, dout)
        dx = torch.empty_like(dout)
        for d, f, result in blocks(dout, diff, dx):
            torch.addcmul(c, f, b, value=n / max(m, 1), out=result).addcmul_(d, a)
        return dx

    def _dims(self, x: Tensor) -> tuple[int, ...]:
        """All dimensions but that of the channels."""
        if x.dim() == 2:
            return (0,)
        return tuple(range(x.dim() - 1)) if self.channels_last else (0, 2)

    def _column(self, per_channel: Tensor, x: Tensor) -> Tensor:
        """A (C,) tensor, shaped to broadcast against x."""
        return per_channel if x.dim() == 2 or self.channels_last else per_channel.unsqueeze(1)

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked.to(mean.dtype) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.detach(), factor)
        self.running_var.lerp_(var.detach(), factor)

    def extra_repr(self) -> str:
        defaults = {"eps": 1e-5, "momentum": 0.1, "unbiased": False, "channels_last": False}
        changes = [f", {k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        affine = "" if self.weight is not None else ", affine=False"
        track = "" if self.running_mean is not None else ", track_running_stats=False"
        return f"{self.num_features}{''.join(changes)}{affine}{track}"
