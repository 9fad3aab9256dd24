"""Pooling over windows of an image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from handgrad.arguments import integer, integers, refused
from handgrad.errors import ShapeError
from handgrad.layer import Layer


class MaxPool2d(Layer):
    """The maximum of each window.

    Forward:   with s = stride, p = padding, d = dilation, positions in pairs, and x counted as -inf outside,
               out[n, c, t] = max_k x[n, c, s t + d k - p],  k over the window; stride is kernel_size by default
    Shapes:    x (N, C, H, W) or (C, H, W); out likewise, with H_out = floor((H + 2p - d (K - 1) - 1)/s) + 1, rounded up
               with `ceil_mode` as long as the last window starts inside
    Backward:  out[n, c, t] is one element of x, the first of the largest; index[n, c, t] says which. Its slope is 1 and
               every other's 0, hence dx[n, c, u] = sum of dout[n, c, t] over the t with index[n, c, t] = u
    Recorded:  index, the shape of x
    Raises:    ArgumentError; ShapeError where x is smaller than a window, or a dilated window lies outside x;
               DtypeError; StateError.

    >>> layer = MaxPool2d(2)
    >>> layer(torch.tensor([[[1.0, 2.0], [4.0, 3.0]]]))
    tensor([[[4.]]])
    >>> layer.backward(torch.tensor([[[10.0]]]))
    tensor([[[ 0.,  0.],
             [10.,  0.]]])
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        *,
        ceil_mode: bool = False,
    ) -> None:
        self.kernel_size = _pair(self, "kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else _pair(self, "stride", stride, 1)
        self.padding = _padding(self, padding, self.kernel_size)
        self.dilation, self.ceil_mode = _pair(self, "dilation", dilation, 1), ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(self.kernel_size, self.dilation, self.padding)]
        _check(self, x, reach)
        out, index = functional.max_pool2d_with_indices(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        if self.dilation != (1, 1) and self.padding != (0, 0):
            self._refuse_empty_windows(x, out)
        self.push(index, x.shape, out=out)
        return out

    def _refuse_empty_windows(self, x: Tensor, out: Tensor) -> None:
        """A dilated window may step over all of x, from padding to padding: then it has no maximum."""
        for dim, (k, s, p, d) in enumerate(zip(self.kernel_size, self.stride, self.padding, self.dilation), start=-2):
            for t in range(out.shape[dim]):
                if not any(0 <= s * t + d * i - p < x.shape[dim] for i in range(k)):
                    problem = f"every window must have a place inside x, got shape {tuple(x.shape)}"
                    raise self.error(ShapeError, "forward", problem)

    def backward(self, dout: Tensor) -> Tensor:
        index, shape = self.pop(dout)
        # out[t] = x[index[t]], x flat over its last two dimensions
        dx = dout.new_zeros(*shape[:-2], shape[-2] * shape[-1])
        return dx.scatter_add_(-1, index.flatten(-2), dout.flatten(-2)).view(*shape)


class AvgPool2d(Layer):
    """The mean of each window.

    Forward:   with s = stride, p = padding, positions in pairs, and x counted as 0 outside,
               out[n, c, t] = sum_k x[n, c, s t + k - p] / size[t],  k over the window; stride is kernel_size by default
               size[t] is the number of positions of the window inside x and its padding, or inside x alone where not
               `count_include_pad`, or `divisor_override`
    Shapes:    x (N, C, H, W) or (C, H, W); out likewise, with H_out = floor((H + 2p - K)/s) + 1, rounded up with
               `ceil_mode` as long as the last window starts inside
    Backward:  each x[u] has the slope 1/size[t] in every window t that covers it, hence
               dx[n, c, u] = sum over the (t, k) with s t + k - p = u of dout[n, c, t] / size[t]
    Recorded:  the shape of x
    Raises:    ArgumentError; ShapeError where x is smaller than a window; DtypeError; StateError.

    >>> layer = AvgPool2d(2)
    >>> layer(torch.tensor([[[1.0, 2.0], [4.0, 3.0]]]))
    tensor([[[2.5000]]])
    >>> layer.backward(torch.tensor([[[10.0]]]))
    tensor([[[2.5000, 2.5000],
             [2.5000, 2.5000]]])
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        self.kernel_size = _pair(self, "kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else _pair(self, "stride", stride, 1)
        self.padding = _padding(self, padding, self.kernel_size)
        self.ceil_mode, self.count_include_pad, self.divisor_override = ceil_mode, count_include_pad, divisor_override
        if divisor_override is not None and integer(self, "divisor_override", divisor_override, None) == 0:
            raise refused(self, "divisor_override must not be 0")

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        _check(self, x, [k - 2 * p for k, p in zip(self.kernel_size, self.padding)])
        out = functional.avg_pool2d(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )
        self.push(x.shape, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (shape,) = self.pop(dout)
        (ph, pw), (H, W) = self.padding, shape[-2:]
        # out[t, u] = sum x[s t + k - p] / size[t, u]
        share = dout / self._size(shape, dout)
        dx = self._side_by_side(share) if self.stride == self.kernel_size else self._overlapping(share)
        rest = (-pw, pw + W - dx.shape[-1], -ph, ph + H - dx.shape[-2])  # no padding; zeros after the last window
        return functional.pad(dx, rest) if any(rest) else dx

    def _overlapping(self, share: Tensor) -> Tensor:
        """Add each window's share up, position k of all windows at once, in padded coordinates."""
        (kh, kw), (sh, sw), (T, U) = self.kernel_size, self.stride, share.shape[-2:]
        dx = share.new_zeros(*share.shape[:-2], sh * (T - 1) + kh, sw * (U - 1) + kw)
        for i in range(kh):
            for j in range(kw):
                dx[..., i : i + sh * (T - 1) + 1 : sh, j : j + sw * (U - 1) + 1 : sw] += share
        return dx

    def _side_by_side(self, share: Tensor) -> Tensor:
        """The same where stride is kernel_size, so that each position is in one window: fewer calls."""
        kh, kw = self.kernel_size
        return share.repeat_interleave(kw, -1).repeat_interleave(kh, -2)

    def _size(self, shape: torch.Size, dout: Tensor) -> Tensor | int:
        """How many positions of each window count: rows times columns."""
        if self.divisor_override is not None:
            return self.divisor_override
        if not self.ceil_mode and (self.count_include_pad or self.padding == (0, 0)):
            return self.kernel_size[0] * self.kernel_size[1]
        sizes = []
        for dim, (k, s, p) in enumerate(zip(self.kernel_size, self.stride, self.padding), start=-2):
            start = torch.arange(dout.shape[dim], device=dout.device) * s - p
            end = (start + k).clamp_max(shape[dim] + p)
            if not self.count_include_pad:
                start, end = start.clamp_min(0), end.clamp_max(shape[dim])
            sizes.append((end - start).to(dout.dtype))
        return torch.outer(sizes[0], sizes[1])


class AdaptiveAvgPool2d(Layer):
    """The mean of each of as many windows as the output has positions; of the whole image for output_size=1.

    Forward:   output position t of T covers the rows floor(t H/T) to ceil((t + 1) H/T) - 1 of H; with P[t, h] = 1 over
               their number for these h, else 0, and Q the same for the columns,
               out[n, c, t, u] = sum_{h, w} P[t, h] x[n, c, h, w] Q[u, w], that is, out = P x Q^T for each image
    Shapes:    x (N, C, H, W) or (C, H, W); out likewise, with T, U = `output_size`: a number for both, or two, where
               None keeps the size of x; P (T, H); Q (U, W)
    Backward:  dx[n, c, h, w] = sum_{t, u} P[t, h] dout[n, c, t, u] Q[u, w], that is, dx = P^T dout Q
    Recorded:  the shape of x
    Raises:    ArgumentError; ShapeError; DtypeError; StateError.

    >>> layer = AdaptiveAvgPool2d(1)
    >>> layer(torch.tensor([[[1.0, 2.0], [4.0, 3.0]]]))
    tensor([[[2.5000]]])
    >>> layer.backward(torch.tensor([[[10.0]]]))
    tensor([[[2.5000, 2.5000],
             [2.5000, 2.5000]]])
    """

    def __init__(self, output_size: int | tuple[int | None, int | None]) -> None:
        pair = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
        if output_size is None or len(pair) != 2:
            raise refused(self, f"output_size must be an int, or two of them or None, got {output_size!r}")
        height, width = (None if size is None else integer(self, "output_size", size) for size in pair)
        self.output_size = height, width

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        _check(self, x, [1, 1])
        out = functional.adaptive_avg_pool2d(x, self.output_size)
        self.push(x.shape, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (shape,) = self.pop(dout)
        self._refuse_autocast("backward")  # products without a parameter
        P, Q = (self._shares(shape[dim], dout, dim) for dim in (-2, -1))
        # out = P x Q^T
        return (dout.mT @ P).mT @ Q

    def _shares(self, size: int, dout: Tensor, dim: int) -> Tensor:
        """P or Q: the share that each position of x, (size,), has in each of out."""
        t, count = torch.arange(dout.shape[dim], device=dout.device).unsqueeze(1), dout.shape[dim]
        start, end = t * size // count, ((t + 1) * size + count - 1) // count
        h = torch.arange(size, device=dout.device)
        return ((h >= start) & (h < end)).to(dout.dtype) / (end - start)


def _pair(layer: Layer, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    height, width = integers(layer, name, value, 2, least)
    return height, width


def _padding(layer: Layer, value: int | tuple[int, int], kernel_size: tuple[int, int]) -> tuple[int, int]:
    padding = _pair(layer, "padding", value, 0)
    if any(2 * p > k for p, k in zip(padding, kernel_size)):
        raise refused(layer, f"padding must be at most half of kernel_size, got {padding} for {kernel_size}")
    return padding


def _check(layer: Layer, x: Tensor, least: list[int]) -> None:
    if x.dim() not in (3, 4) or x.shape[-3] == 0:
        problem = f"x must be (N, C, H, W) or (C, H, W) with C at least 1, got shape {tuple(x.shape)}"
        raise layer.error(ShapeError, "forward", problem)
    if any(size < max(n, 1) for size, n in zip(x.shape[-2:], least)):
        problem = (
            f"x must be at least {max(least[0], 1)} by {max(least[1], 1)} for one window, got shape {tuple(x.shape)}"
        )
        raise layer.error(ShapeError, "forward", problem)
