"""Convolutions, and transposed ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from handgrad.arguments import integer, integers, refused
from handgrad.errors import ShapeError
from handgrad.layer import Layer, parameter


class Convolution(Layer):
    """What convolutions and transposed ones share: the sizes, the parameters and their gradients.

    A weight is (C_out, C_in/G, *K), or (C_in, C_out/G, *K) if `transposed`: a transposed convolution is the backward of
    the convolution with the same weight. Initialisation as in torch.nn: both uniform within 1/sqrt(weight[0].numel()).
    """

    shown = ("in_channels", "out_channels")
    weight: Tensor = parameter("C_out", "C_in/groups", "*K")
    bias: Tensor | None = parameter("C_out")
    dims: ClassVar[int] = 1  # how many dimensions it runs over
    transposed: ClassVar[bool] = False
    padding: tuple[int, ...]
    conv: ClassVar[Callable[..., Tensor]] = staticmethod(functional.conv1d)
    conv_transpose: ClassVar[Callable[..., Tensor]] = staticmethod(functional.conv_transpose1d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...],
        dilation: int | tuple[int, ...],
        groups: int,
        bias: bool,
        *,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        self.in_channels = in_channels = integer(self, "in_channels", in_channels)
        self.out_channels = out_channels = integer(self, "out_channels", out_channels)
        self.groups = groups = integer(self, "groups", groups)
        if in_channels % groups or out_channels % groups:
            raise refused(self, f"groups must divide the channels, got {groups} for {in_channels} -> {out_channels}")
        self.kernel_size = integers(self, "kernel_size", kernel_size, self.dims)
        self.stride = integers(self, "stride", stride, self.dims)
        self.dilation = integers(self, "dilation", dilation, self.dims)
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.weight = torch.empty(first, second // groups, *self.kernel_size, dtype=dtype, device=device)
        self.bias = self.weight.new_empty(out_channels) if bias else None
        bound = 1 / math.sqrt(self.weight[0].numel())
        for param in (self.weight, self.bias):
            if param is not None:
                param.uniform_(-bound, bound, generator=generator)

    def _dweight(self, x: Tensor, dout: Tensor) -> Tensor:
        """For a convolution of x; for a transposed one, which exchanges the two, given (dout, x)."""
        if x.numel() == 0:
            return torch.zeros_like(self.weight)
        if x.dim() == self.dims + 1:
            x, dout = x.unsqueeze(0), dout.unsqueeze(0)
        G = self.groups
        # channels in the batch's place, the batch in the channels', run by run
        x = torch.unflatten(x, 1, (G, -1)).transpose(0, 2).flatten(1, 2)  # (C_in/G, G N, ...)
        dout = torch.unflatten(dout, 1, (G, -1)).movedim(0, 2).flatten(0, 1)  # (C_out, N, ...)
        dweight = self.conv(x, dout, None, self.dilation, self.padding, self.stride, G)  # (C_in/G, C_out, K or more)
        for dim, k in enumerate(self.kernel_size):
            dweight = dweight.narrow(dim + 2, 0, k)
        return dweight.transpose(0, 1).contiguous()

    def _dbias(self, dout: Tensor) -> Tensor:
        """The sum over all dimensions but the channels'."""
        return dout.sum([d for d in range(dout.dim()) if d != dout.dim() - self.dims - 1])

    def _check_form(self, x: Tensor) -> None:
        self.check_input(x, self.weight.dtype)
        if x.dim() not in (self.dims + 1, self.dims + 2) or x.shape[-self.dims - 1] != self.in_channels:
            form = f"{self.in_channels}, " + ", ".join("L" if self.dims == 1 else "HW")
            problem = f"x must be (N, {form}) or ({form}), got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)


class Conv1d(Convolution):
    """Convolution over one dimension (the cross-correlation that is called so).

    Forward:   with s = stride, p = padding, d = dilation, and x counted as 0 outside,
               out[n, o, t] = bias[o] + sum_{c, k} weight[o, c, k] x[n, c, s t + d k - p]
               With `groups` G, the channels of x and of out are cut into G runs, and out's run g reads x's run g only.
    Shapes:    x (N, C_in, L), or without N; weight (C_out, C_in/G, K); bias (C_out,); out (N, C_out, L_out) likewise,
               L_out = floor((L + 2p - d (K - 1) - 1)/s) + 1. padding="same" keeps L (s = 1; the odd zero goes last).
    Backward:  out[n, o, t] reads x[n, c, u] with u = s t + d k - p, so each dout goes back there with the same weight:
               dx[n, c, u] = sum_{o, k, t: s t + d k - p = u} weight[o, c, k] dout[n, o, t]: the transposed convolution
               for s = 1, t = u + p - d k: the convolution of dout with the kernel turned round, c and o exchanged
               dweight[o, c, k] = sum_{n, t} dout[n, o, t] x[n, c, s t + d k - p]: again a convolution of x, with dout
               as its kernel, the batch in the channels' place, and stride and dilation exchanged
               dbias[o] = sum_{n, t} dout[n, o, t]
    Recorded:  x, weight
    Raises:    ArgumentError; ShapeError, also where x is shorter than the kernel reaches; DtypeError; StateError.
    Source:    Dumoulin and Visin 2016, arXiv:1603.07285. Initialisation as in torch.nn.Conv1d.

    >>> layer = Conv1d(2, 3, kernel_size=4, stride=2, padding=1)
    >>> layer
    Conv1d(2 -> 3, kernel_size=(4,), stride=(2,), padding=(1,))
    >>> layer(torch.zeros(5, 2, 8)).shape
    torch.Size([5, 3, 4])
    >>> layer.backward(torch.zeros(5, 3, 4)).shape
    torch.Size([5, 2, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        where: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": device}
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, groups, bias, **where)
        self.extra: list[int] = []  # zeros after x, by functional.pad, where both sides cannot have as many
        if isinstance(padding, str):
            self.padding = self._named_padding(padding)
        else:
            self.padding = integers(self, "padding", padding, self.dims, 0)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        x = functional.pad(x, self.extra) if self.extra else x
        out = self.conv(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        self.push(x, self.weight, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, weight = self.pop(dout)
        # out[o, t] = bias[o] + sum weight[o, c, k] x[c, s t + d k - p]
        self.add_grad(weight, self._dweight(x, dout))
        if self.bias is not None:
            self.add_grad(self.bias, self._dbias(dout))
        if not need_dx:
            return None
        beyond = [d * (k - 1) - p for k, p, d in zip(self.kernel_size, self.padding, self.dilation)]
        by_steps_of_1 = all(s == 1 for s in self.stride) and min(beyond) >= 0
        dx = self._dx_by_conv(dout, weight, beyond) if by_steps_of_1 else self._dx(dout, weight, x.shape)
        return functional.pad(dx, [-n for n in self.extra]) if self.extra else dx

    def _dx(self, dout: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The transposed convolution."""
        rest = [  # what the stride left unread at the end of x
            (size + 2 * p - d * (k - 1) - 1) % s
            for size, k, s, p, d in zip(shape[-self.dims :], self.kernel_size, self.stride, self.padding, self.dilation)
        ]
        return self.conv_transpose(dout, weight, None, self.stride, self.padding, rest, self.groups, self.dilation)

    def _dx_by_conv(self, dout: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
        """The same for s = 1, which torch computes faster so: a convolution of dout, padded by d (K - 1) - p.

        t = u + p - d k, so with k' = K - 1 - k in k's place dx[c, u] = sum weight[o, c, k] dout[o, u + d k' - padding].
        """
        turned = weight.flip(list(range(2, weight.dim())))
        turned = torch.unflatten(turned, 0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)  # (C_in, C_out/G, *K)
        return self.conv(dout, turned, None, 1, padding, self.dilation, self.groups)

    def _check(self, x: Tensor) -> None:
        self._check_form(x)
        reach = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(self.kernel_size, self.dilation, self.padding)]
        extra = self.extra[-1::-2] or [0] * self.dims
        if any(size + more < least for size, more, least in zip(x.shape[-self.dims :], extra, reach)):
            problem = (
                f"x must have sizes of at least {tuple(reach)} for one step of the kernel, got shape {tuple(x.shape)}"
            )
            raise self.error(ShapeError, "forward", problem)

    def _named_padding(self, padding: str) -> tuple[int, ...]:
        if padding not in ("same", "valid"):
            raise refused(self, f"padding must be numbers, 'same' or 'valid', got {padding!r}")
        if padding == "valid":
            return (0,) * self.dims
        if any(s != 1 for s in self.stride):
            raise refused(self, f"padding='same' needs stride 1, got {self.stride}")
        reach = [d * (k - 1) for k, d in zip(self.kernel_size, self.dilation)]
        if any(r % 2 for r in reach):
            self.extra = [n for r in reversed(reach) for n in (0, r % 2)]
        return tuple(r // 2 for r in reach)


class Conv2d(Conv1d):
    """Convolution over two dimensions: Conv1d with every position, size and step a pair.

    Forward:   out[n, o, t] = bias[o] + sum_{c, k} weight[o, c, k] x[n, c, s t + d k - p],  t, k, s, d, p pairs
    Shapes:    x (N, C_in, H, W) or (C_in, H, W); weight (C_out, C_in/G, K_h, K_w); bias (C_out,); out likewise, with
               H_out = floor((H + 2p - d (K - 1) - 1)/s) + 1 and W_out the same
    Backward:  as in Conv1d: dx the transposed convolution, dweight the convolution of x with dout
    Recorded:  x, weight
    Raises:    as Conv1d
    Source:    as Conv1d; initialisation as in torch.nn.Conv2d.

    >>> layer = Conv2d(2, 3, kernel_size=3, padding="same")
    >>> layer(torch.zeros(5, 2, 8, 6)).shape
    torch.Size([5, 3, 8, 6])
    >>> layer.backward(torch.zeros(5, 3, 8, 6)).shape
    torch.Size([5, 2, 8, 6])
    """

    dims: ClassVar[int] = 2
    conv: ClassVar[Callable[..., Tensor]] = staticmethod(functional.conv2d)
    conv_transpose: ClassVar[Callable[..., Tensor]] = staticmethod(functional.conv_transpose2d)


class ConvTranspose2d(Convolution):
    """Transposed convolution over two dimensions: every position of x spreads a kernel over out.

    Forward:   with s = stride, p = padding, d = dilation, and all positions and sizes pairs,
               out[n, o, u] = bias[o] + sum_{c, k, t: s t + d k - p = u} weight[c, o, k] x[n, c, t]
               With `groups` G, the channels of x and of out are cut into G runs, and out's run g reads x's run g only.
    Shapes:    x (N, C_in, H, W) or (C_in, H, W); weight (C_in, C_out/G, K_h, K_w); bias (C_out,); out likewise, with
               H_out = (H - 1) s - 2p + d (K - 1) + output_padding + 1 and W_out the same
    Backward:  x[n, c, t] acts on out[n, o, u] with u = s t + d k - p, and dout counts as 0 outside, hence
               dx[n, c, t] = sum_{o, k} weight[c, o, k] dout[n, o, s t + d k - p]: a convolution
               dweight[c, o, k] = sum_{n, t} x[n, c, t] dout[n, o, s t + d k - p]: that of Conv2d, x and dout exchanged
               dbias[o] = sum_{n, u} dout[n, o, u]
    Recorded:  x, weight
    Raises:    ArgumentError; ShapeError, also where nothing would be left of out; DtypeError; StateError.
    Source:    as Conv1d; initialisation as in torch.nn.ConvTranspose2d.

    >>> layer = ConvTranspose2d(3, 2, kernel_size=4, stride=2, padding=1)
    >>> layer(torch.zeros(5, 3, 8, 6)).shape
    torch.Size([5, 2, 16, 12])
    >>> layer.backward(torch.zeros(5, 2, 16, 12)).shape
    torch.Size([5, 3, 8, 6])
    """

    dims: ClassVar[int] = 2
    transposed: ClassVar[bool] = True
    conv: ClassVar[Callable[..., Tensor]] = staticmethod(functional.conv2d)
    conv_transpose: ClassVar[Callable[..., Tensor]] = staticmethod(functional.conv_transpose2d)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        where: dict[str, Any] = {"generator": generator, "dtype": dtype, "device": device}
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, groups, bias, **where)
        self.padding = integers(self, "padding", padding, self.dims, 0)
        self.output_padding = integers(self, "output_padding", output_padding, self.dims, 0)
        if any(o >= max(s, d) for o, s, d in zip(self.output_padding, self.stride, self.dilation)):
            problem = f"output_padding must be below stride or dilation, got {self.output_padding} for {self.stride} "
            raise refused(self, problem + f"and {self.dilation}")

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        out = self.conv_transpose(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        self.push(x, self.weight, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
        x, weight = self.pop(dout)
        # out[o, s t + d k - p] = bias[o] + sum weight[c, o, k] x[c, t]
        self.add_grad(weight, self._dweight(dout, x))
        if self.bias is not None:
            self.add_grad(self.bias, self._dbias(dout))
        if not need_dx:
            return None
        dx = self.conv(dout, weight, None, self.stride, self.padding, self.dilation, self.groups)
        for dim, size in enumerate(x.shape[-self.dims :], start=-self.dims):
            dx = dx.narrow(dim, 0, size)  # output_padding may have room for one position more
        return dx

    def _check(self, x: Tensor) -> None:
        self._check_form(x)
        options = zip(
            x.shape[-self.dims :], self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation
        )
        if any(size < 1 or (size - 1) * s - 2 * p + d * (k - 1) + o < 0 for size, k, s, p, o, d in options):
            problem = f"x must be large enough for something to be left without the padding, got shape {tuple(x.shape)}"
            raise self.error(ShapeError, "forward", problem)
