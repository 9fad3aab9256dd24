"""Elementwise nonlinearities, and the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from handgrad.arguments import integer, number
from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer
from handgrad.pieces import blockwise, exp, normal_cdf, normal_pdf, precise, where_positive


class Tanh(Layer):
    """Hyperbolic tangent, elementwise.

    Forward:   out = tanh(x)
    Shapes:    any
    Backward:  tanh' = 1 - tanh^2, hence dx = dout (1 - out^2) = dout - dout out^2, which is NaN where dout is infinite
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    DtypeError; ShapeError and StateError from backward.

    >>> layer = Tanh()
    >>> layer(torch.tensor([0.0, 100.0]))
    tensor([0., 1.])
    >>> layer.backward(torch.tensor([2.0, 2.0]))
    tensor([2., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = torch.tanh(x)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(dout: Tensor, out: Tensor) -> Tensor:
            # out = tanh(x)
            return torch.addcmul(dout, dout, out * out, value=-1)  # dout - dout out^2

        return blockwise(formula, dout, out)


class Sigmoid(Layer):
    """The logistic function, elementwise.

    Forward:   out = 1/(1 + exp(-x))
    Shapes:    any
    Backward:  d out / dx = exp(-x)/(1 + exp(-x))^2 = out (1 - out) = out - out^2, hence dx = dout (out - out^2)
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    DtypeError; ShapeError and StateError from backward.

    >>> layer = Sigmoid()
    >>> layer(torch.tensor([0.0, 100.0]))
    tensor([0.5000, 1.0000])
    >>> layer.backward(torch.tensor([2.0, 2.0]))
    tensor([0.5000, 0.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = torch.sigmoid(x)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(dout: Tensor, out: Tensor, dx: Tensor | None = None) -> Tensor:
            # out = 1/(1 + exp(-x))
            slope = torch.addcmul(out, out, out, value=-1, out=dx)  # out - out^2
            return slope.mul_(dout)

        return blockwise(formula, dout, out)


class ReLU(Layer):
    """The positive part, elementwise.

    Forward:   out = max(x, 0)
    Shapes:    any
    Backward:  the slope is 1 where x > 0, else 0, at the kink x = 0 and at NaN too. x > 0 is out > 0, hence
               dx = dout where out > 0, else 0
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    DtypeError; ShapeError and StateError from backward.

    >>> layer = ReLU()
    >>> layer(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    >>> layer.backward(torch.tensor([3.0, 4.0, 5.0]))
    tensor([0., 0., 5.])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = torch.relu(x)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(dout: Tensor, out: Tensor) -> Tensor:
            # out = max(x, 0)
            return where_positive(dout, out)  # dout where out > 0, else 0

        return blockwise(formula, dout, out)


class LeakyReLU(Layer):
    """The positive part, and a small slope below zero, elementwise.

    Forward:   out = x where x > 0, else negative_slope x
    Shapes:    any
    Backward:  dx = dout where x > 0, else negative_slope dout, at the kink x = 0 too
    Recorded:  x
    Raises:    ArgumentError; DtypeError; ShapeError and StateError from backward.

    >>> layer = LeakyReLU(0.1)
    >>> layer(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.1000,  0.0000,  2.0000])
    >>> layer.backward(torch.tensor([3.0, 4.0, 5.0]))
    tensor([0.3000, 0.4000, 5.0000])
    """

    shown = ("negative_slope",)

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = number(self, "negative_slope", negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = functional.leaky_relu(x, self.negative_slope)
        self.push(x, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (x,) = self.pop(dout)

        def formula(dout: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
            # out = x where x > 0, else negative_slope x
            slope = torch.threshold_(torch.sign(x, out=dx), 0, self.negative_slope)  # 1 where x > 0
            return slope.mul_(dout)

        return blockwise(formula, dout, x)


class SiLU(Layer):
    """The input, gated by its own sigmoid (also known as swish), elementwise.

    Forward:   out = x s  with s = 1/(1 + exp(-x))
    Shapes:    any
    Backward:  s' = s (1 - s), hence dx = dout (s + s x (1 - s))
    Recorded:  x
    Raises:    DtypeError; ShapeError and StateError from backward.
    Source:    Elfwing et al. 2017, arXiv:1702.03118

    >>> layer = SiLU()
    >>> layer(torch.tensor([0.0, 100.0]))
    tensor([  0., 100.])
    >>> layer.backward(torch.tensor([2.0, 2.0]))
    tensor([1., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = functional.silu(x)
        self.push(x, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (x,) = self.pop(dout)

        def formula(dout: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
            # out = x s,  s = 1/(1 + exp(-x))
            s = torch.sigmoid(x)
            x_rest = torch.addcmul(x, x, s, value=-1, out=dx)  # x (1 - s)
            slope = torch.addcmul(s, s, x_rest, out=dx)  # s + s x (1 - s)
            return slope.mul_(dout)

        return blockwise(formula, dout, x)


class GELU(Layer):
    """The input, weighted by the normal distribution function, elementwise; exact, or approximated by a tanh.

    Forward:   out = x Phi(x),  Phi(x) = (1 + erf(x/sqrt 2))/2
               with approximate="tanh": out = x (1 + tanh u)/2,  u = k (x + a x^3), k = sqrt(2/pi), a = 0.044715
    Shapes:    any
    Backward:  Phi'(x) = phi(x) = exp(-x^2/2)/sqrt(2 pi), hence
               dx = dout (Phi(x) + x phi(x))
               For the tanh form, (1 + tanh u)/2 = s with s = 1/(1 + exp(-v)), v = 2u, so that out = x s and
               dx = dout (s + s x v' (1 - s)).  With w = 2k x, v = w + a w x^2 and x v' = w + 3 a w x^2 = w + 3 (v - w)
    Recorded:  x
    Raises:    ArgumentError for an unknown `approximate`; DtypeError; ShapeError and StateError from backward.
    Source:    Hendrycks and Gimpel 2016, arXiv:1606.08415

    >>> layer = GELU()
    >>> layer(torch.tensor([0.0, 1.0, 100.0]))
    tensor([  0.0000,   0.8413, 100.0000])
    >>> layer.backward(torch.tensor([2.0, 2.0, 2.0]))
    tensor([1.0000, 2.1666, 2.0000])
    """

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ArgumentError(f"GELU: approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = functional.gelu(x, approximate=self.approximate)
        self.push(x, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (x,) = self.pop(dout)

        def exact(dout: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
            # out = x Phi(x)
            slope = torch.addcmul(normal_cdf(x), x, normal_pdf(x), out=dx)  # Phi + x phi
            return slope.mul_(dout)

        def approximate(dout: Tensor, x: Tensor, dx: Tensor | None = None) -> Tensor:
            # out = x s,  s = 1/(1 + exp(-v)),  v = w + a w x^2,  w = 2k x
            x = x.clamp(-100, 100)  # beyond, s is 1 or 0; and x^2 is finite
            w = x * (2 * math.sqrt(2 / math.pi))
            v = torch.addcmul(w, w, x * x, value=0.044715)
            s = torch.sigmoid(v)
            xdv = w.lerp_(v, 3.0)  # x v' = w + 3 (v - w)
            xdv_rest = torch.addcmul(xdv, xdv, s, value=-1)  # x v' (1 - s)
            slope = torch.addcmul(s, s, xdv_rest, out=dx)  # s + s x v' (1 - s)
            return slope.mul_(dout)

        return blockwise(exact if self.approximate == "none" else approximate, dout, x)


class Softmax(Layer):
    """Exponentials, scaled to add up to one along a dimension.

    Forward:   out_c = exp(x_c) / sum_k exp(x_k)
    Shapes:    any; out like x
    Backward:  d out_c / d x_k = out_c ([c = k] - out_k), hence
               dx_k = sum_c dout_c out_c ([c = k] - out_k) = p_k - out_k sum_c p_c  with p = dout out
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    ArgumentError; ShapeError where x does not have the dimension; DtypeError; StateError.

    Where the loss follows directly, CrossEntropy on the logits is shorter and more accurate.

    >>> layer = Softmax(dim=-1)
    >>> layer(torch.tensor([[0.0, 0.0], [0.0, 200.0]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    >>> layer.backward(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([[ 0.2500, -0.2500],
            [ 0.0000,  0.0000]])
    """

    def __init__(self, dim: int) -> None:
        self.dim = integer(self, "dim", dim, None)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        _check_dim(self, x, self.dim)
        out = torch.softmax(x, self.dim)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(dout: Tensor, out: Tensor, dx: Tensor | None = None) -> Tensor:
            # out_c = exp(x_c) / sum_k exp(x_k)
            p = torch.mul(dout, out, out=dx)
            return p.addcmul_(out, p.sum(self.dim, keepdim=True), value=-1)  # p - out sum p

        return _samplewise(formula, self.dim, dout, out)


class LogSoftmax(Layer):
    """The logarithm of the softmax along a dimension.

    Forward:   out_c = x_c - log sum_k exp(x_k)
    Shapes:    any; out like x
    Backward:  d out_c / d x_k = [c = k] - exp(out_k), hence dx_k = dout_k - exp(out_k) sum_c dout_c
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    ArgumentError; ShapeError where x does not have the dimension; DtypeError; StateError.

    >>> layer = LogSoftmax(dim=-1)
    >>> layer(torch.tensor([0.0, 0.0]))
    tensor([-0.6931, -0.6931])
    >>> layer.backward(torch.tensor([1.0, 0.0]))
    tensor([ 0.5000, -0.5000])
    """

    def __init__(self, dim: int) -> None:
        self.dim = integer(self, "dim", dim, None)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        _check_dim(self, x, self.dim)
        out = torch.log_softmax(x, self.dim)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(dout: Tensor, out: Tensor, dx: Tensor | None = None) -> Tensor:
            # out_c = x_c - log sum_k exp(x_k)
            p, total = exp(out, out=dx), dout.sum(self.dim, keepdim=True)
            return torch.addcmul(dout, p, total, value=-1, out=p)  # dout - exp(out) total

        return _samplewise(formula, self.dim, dout, out)


def _check_dim(layer: Layer, x: Tensor, dim: int) -> None:
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        raise layer.error(ShapeError, "forward", f"x must have dimension {dim}, got shape {tuple(x.shape)}")


def _samplewise(formula: Callable[..., Tensor], dim: int, dout: Tensor, out: Tensor) -> Tensor:
    """The formula piece by piece, unless that would cut the dimension that is summed over."""
    return precise(formula, dout, out) if dim in (0, -dout.dim()) else blockwise(formula, dout, out)
