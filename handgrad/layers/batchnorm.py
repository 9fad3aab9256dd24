"""Normalisation over the batch."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import batch_norm

from handgrad.arguments import integer, number, refused
from handgrad.errors import ShapeError
from handgrad.layer import Layer, buffer, parameter
from handgrad.pieces import blockwise, is_whole, wide


class BatchNorm(Layer):
    """What BatchNorm1d and BatchNorm2d share: everything but the shapes that they take.

    Forward:   xhat = (x - mean) rstd,  rstd = 1/sqrt(var + eps),  out = xhat weight + bias
               In training, mean and var are those of the batch, per channel over its n values (N, N L, N H W, ...):
               var = sum (x - mean)^2 / m with m = n, or m = n - 1 if `unbiased`, and then
               running_mean += momentum (mean - running_mean)
               running_var  += momentum (sum (x - mean)^2 / (n - 1) - running_var)
               With momentum=None the factor is 1/num_batches_tracked: the plain average. In evaluation, mean and var
               are the running ones, constants; without running statistics they are always those of the batch.
    Shapes:    x as in `forms`, or (..., C) if `channels_last`; weight, bias, running_mean, running_var (C,); out like x
    Backward:  dbias = sum dout;  dweight = sum dout xhat.
               With scale = rstd weight, in evaluation dx = dout scale. In training x also acts through var and mean:
               dvar  = sum dout weight (x - mean) (-1/2) rstd^3 = -1/2 scale rstd dweight
               dmean = -sum dout scale = -scale dbias    (the way through var adds nothing: sum (x - mean) = 0)
               dx    = dout scale + dvar 2 (x - mean)/m + dmean/n
                     = scale (dout - (dbias + xhat dweight n/m)/n)
    Recorded:  x, mean, rstd, weight
    Raises:    ArgumentError; ShapeError, also for a batch of one value per channel in training; DtypeError; StateError.
    Source:    Ioffe and Szegedy 2015, arXiv:1502.03167; the simplified dx in makemore lecture 4, which uses n - 1.
    """

    shown = ("num_features",)
    weight: Tensor | None = parameter("C")
    bias: Tensor | None = parameter("C")
    running_mean: Tensor | None = buffer("C")
    running_var: Tensor | None = buffer("C")
    num_batches_tracked: Tensor | None = buffer()
    forms: ClassVar[dict[int, str]]  # what x may be, by its number of dimensions

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
        self.num_features, self.eps = integer(self, "num_features", num_features), number(self, "eps", eps)
        if self.eps <= 0:
            raise refused(self, f"eps must be above 0, got {eps!r}")
        self.momentum = None if momentum is None else number(self, "momentum", momentum, 0, 1)
        self.affine, self.track_running_stats = affine, track_running_stats
        self.unbiased, self.channels_last = unbiased, channels_last
        ones = torch.ones(self.num_features, dtype=dtype, device=device)
        self.weight, self.bias = (ones, torch.zeros_like(ones)) if affine else (None, None)
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if track_running_stats:
            self.running_mean, self.running_var = torch.zeros_like(ones), torch.ones_like(ones)
            self.num_batches_tracked = torch.tensor(0, device=device)

    def forward(self, x: Tensor) -> Tensor:
        self.check_shape(x)
        C, shape = self.num_features, x.shape
        rows = x.reshape(-1, C) if self.channels_last else x
        n = x.numel() // C
        m: int | None = None  # None: mean and var are constants, and the backward has nothing to send through them
        if self.training or self.running_mean is None or self.running_var is None:
            if n == 1:
                problem = f"the variance of a batch needs more than one value per channel, got shape {tuple(shape)}; "
                raise self.error(ShapeError, "forward", problem + "evaluate a single row under eval()")
            m = n - 1 if self.unbiased and n > 0 else n
            if self.training and self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)  # also for a batch of nothing, as torch does
            if n > 0:
                out, mean, rstd = self._normalize(rows, m / n)
            else:  # nothing to normalise, and nothing learnt of the data
                out, mean, rstd = x.clone(), x.new_zeros(C), x.new_ones(C)
        else:
            mean, rstd = self.running_mean.clone(), (self.running_var + self.eps).rsqrt_()  # what the record keeps
            out = batch_norm(rows, mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.channels_last:
            out = out.view(*shape)
        self.push(x, mean, rstd, self.weight, m, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, mean, rstd, weight, m = self.pop(dout)
        channel = x.dim() - 1 if self.channels_last else 1
        behind = x.dim() - 1 - channel  # dimensions behind the channels
        others = 0 if x.dim() == 2 else [*range(channel), *range(channel + 1, x.dim())]

        def column(per_channel: Tensor) -> Tensor:
            return per_channel.view(-1, *[1] * behind) if behind else per_channel

        def sums(dout: Tensor, xhat: Tensor) -> tuple[Tensor, Tensor]:
            # out = xhat weight + bias
            return dout.sum(others), (dout * xhat).sum(others)  # dbias, dweight

        xhat: Tensor | None = None
        if is_whole(x):
            xhat = (x - column(mean)).mul_(column(rstd))
            dbias, dweight = sums(dout, xhat)
        else:  # of each piece x - mean alone, and rstd once for all: a pass less over what is large
            _, dbias, dscale = blockwise(lambda dout, x: (None, *sums(dout, x - column(mean))), dout, x)
            dweight = rstd * dscale
        self.add_grad(weight, dweight)
        self.add_grad(self.bias, dbias)
        if not need_dx:
            return None
        scale = column(rstd if weight is None else rstd * weight)
        if m is None:
            return dout * scale
        n = max(x.numel() // self.num_features, 1)

        def formula(dout: Tensor, xhat: Tensor, dweight: Tensor) -> Tensor:
            # xhat = (x - mean) rstd,  rstd = 1/sqrt(sum (x - mean)^2 / m + eps)
            dmean_dvar = torch.addcmul(column(dbias), xhat, column(dweight), value=n / max(m, 1), out=xhat)
            return torch.sub(dout, dmean_dvar, alpha=1 / n, out=xhat).mul_(scale)  # both without the factor -scale/n

        if xhat is not None:
            return formula(dout, xhat, dweight)
        slope = rstd * dweight  # xhat dweight = (x - mean) slope
        return blockwise(lambda dout, x: formula(dout, x - column(mean), slope), dout, x)

    def check_shape(self, x: Tensor) -> None:
        """Raise unless x has the dtype of the parameters and one of the forms."""
        own = self.running_mean if self.weight is None else self.weight
        self.check_input(x, None if own is None else own.dtype)
        C, shape = self.num_features, x.shape
        fits = x.dim() > 1 if self.channels_last else x.dim() in self.forms
        if not fits or shape[-1 if self.channels_last else 1] != C:
            form = "(..., C)" if self.channels_last else " or ".join(self.forms.values())
            problem = f"x must be {form.replace('C', str(C))}, got shape {tuple(shape)}"
            raise self.error(ShapeError, "forward", problem)

    def _normalize(self, x: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
        """Out, mean and rstd from the batch's statistics, with k = m/n; in training, update the running ones.

        The operation normalises with n. To get m, note rstd = sqrt(k) / sqrt(sum diff^2 / n + k eps).
        """
        weight, mean, var, factor = self.weight, self.running_mean, self.running_var, self.momentum
        if k != 1:
            weight = (x.new_ones(self.num_features) if weight is None else weight) * math.sqrt(k)
        if not self.training or self.num_batches_tracked is None or mean is None or var is None:
            mean = var = None
        elif factor is None:  # momentum 1 leaves the batch's own in fresh ones
            mean, var = torch.zeros_like(mean), torch.zeros_like(var)
        momentum = 1.0 if factor is None else factor
        out, batch_mean, rstd = torch.native_batch_norm(x, weight, self.bias, mean, var, True, momentum, k * self.eps)
        if factor is None and mean is not None and self.num_batches_tracked is not None:
            share = (1 / self.num_batches_tracked.to(wide(mean.dtype))).to(mean.dtype)
            for running, own in ((self.running_mean, mean), (self.running_var, var)):
                if running is not None and own is not None:
                    running.lerp_(own, share)
        return out, batch_mean, rstd if k == 1 else rstd * math.sqrt(k)


class BatchNorm1d(BatchNorm):
    """Normalise each channel over the batch, then scale and shift it.

    Forward:   xhat = (x - mean) / sqrt(var + eps),  out = xhat weight + bias;  in training with mean and var of the
               batch, which move running_mean and running_var along; in evaluation with these
    Shapes:    x (N, C) or (N, C, L), or (..., C) if `channels_last`; weight, bias, running_mean, running_var (C,);
               out like x
    Backward:  derived at BatchNorm: dbias = sum dout,  dweight = sum dout xhat,  and with
               scale = weight/sqrt(var + eps), in training, with n values per channel,
               dx = scale (dout - (dbias + xhat dweight)/n);  in evaluation dx = scale dout
    Recorded:  x, mean, rstd, weight
    Raises:    ArgumentError; ShapeError, also for a batch of one value per channel in training; DtypeError; StateError.
    Source:    Ioffe and Szegedy 2015, arXiv:1502.03167. With `unbiased`, the form of makemore lecture 4: var and dx
               with n - 1.

    >>> layer = BatchNorm1d(2)
    >>> out = layer(torch.tensor([[1.0, 0.0], [3.0, 8.0]]))
    >>> out.round(decimals=3)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> layer.running_mean, layer.running_var  # a tenth of the way from 0 and 1 to the batch's mean and variance
    (tensor([0.2000, 0.4000]), tensor([1.1000, 4.1000]))
    """

    forms: ClassVar[dict[int, str]] = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNorm2d(BatchNorm):
    """Normalise each channel of images over the batch and all positions, then scale and shift it.

    Forward:   xhat = (x - mean) / sqrt(var + eps),  out = xhat weight + bias;  in training with mean and var of the
               batch, which move running_mean and running_var along; in evaluation with these
    Shapes:    x (N, C, H, W), or (..., C) if `channels_last`; weight, bias, running_mean, running_var (C,); out like x
    Backward:  derived at BatchNorm: dbias = sum dout,  dweight = sum dout xhat,  and with
               scale = weight/sqrt(var + eps), in training, with n = N H W,
               dx = scale (dout - (dbias + xhat dweight)/n);  in evaluation dx = scale dout
    Recorded:  x, mean, rstd, weight
    Raises:    ArgumentError; ShapeError, also for a batch of one value per channel in training; DtypeError; StateError.
    Source:    as BatchNorm1d

    >>> layer = BatchNorm2d(3)
    >>> out = layer(torch.randn(4, 3, 5, 6))
    >>> bool(torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-6))
    True
    """

    forms: ClassVar[dict[int, str]] = {4: "(N, C, H, W)"}
