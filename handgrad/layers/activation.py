"""Elementwise nonlinearities, and the softmax."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import LOG2_E, Layer, blockwise, exp


class Tanh(Layer):
    """Hyperbolic tangent, elementwise.

    Forward:   out = tanh(x)
    Shapes:    any
    Backward:  tanh' = 1 - tanh^2, hence dx = dout (1 - out^2) = dout - dout out^2
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

        def formula(d: Tensor, o: Tensor, dx: Tensor | None) -> Tensor:
            # out = tanh(x)
            square = torch.mul(o, o, out=dx)
            return torch.addcmul(d, d, square, value=-1, out=square)

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

        def formula(d: Tensor, o: Tensor, dx: Tensor | None) -> Tensor:
            # out = 1/(1 + exp(-x))
            return torch.addcmul(o, o, o, value=-1, out=dx).mul_(d)

        return blockwise(formula, dout, out)


class ReLU(Layer):
    """The positive part, elementwise.

    Forward:   out = max(x, 0)
    Shapes:    any
    Backward:  the slope is 1 where x > 0 and 0 elsewhere, the kink at 0 included, hence dx = dout where out > 0, else 0
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

        def formula(d: Tensor, o: Tensor, dx: Tensor) -> Tensor:
            # out = max(x, 0)
            return torch.ne(o, 0, out=dx).mul_(d)

        # the slope is written as a number at once: a mask of bools is several times slower
        return blockwise(formula, dout, out, out=torch.empty_like(dout))


class LeakyReLU(Layer):
    """The positive part, and a small slope below zero, elementwise.

    Forward:   out = x where x > 0, else negative_slope x
    Shapes:    any
    Backward:  dx = dout where x > 0, else negative_slope dout, the kink at 0 included
    Recorded:  x
    Raises:    DtypeError; ShapeError and StateError from backward.

    >>> layer = LeakyReLU(0.1)
    >>> layer(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([-0.1000,  0.0000,  2.0000])
    >>> layer.backward(torch.tensor([3.0, 4.0, 5.0]))
    tensor([0.3000, 0.4000, 5.0000])
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        out = functional.leaky_relu(x, self.negative_slope)
        self.push(x, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (x,) = self.pop(dout)

        def formula(d: Tensor, x: Tensor, dx: Tensor) -> Tensor:
            # out = x where x > 0, else negative_slope x
            torch.gt(x, 0, out=dx).mul_(d)  # dout or 0
            return dx.lerp_(d, self.negative_slope)  # dx + negative_slope (dout - dx)

        return blockwise(formula, dout, x, out=torch.empty_like(dout))

    def extra_repr(self) -> str:
        return f"{self.negative_slope}"


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

        def formula(d: Tensor, x: Tensor, dx: Tensor | None, s: Tensor | None) -> Tensor:
            # out = x s
            s = torch.sigmoid(x, out=s)
            rest = torch.addcmul(x, x, s, value=-1, out=dx)  # x (1 - s)
            return torch.addcmul(s, s, rest, out=rest).mul_(d)

        return blockwise(formula, dout, x, scratch=1)


class GELU(Layer):
    """The input, weighted by the normal distribution function, elementwise; exact, or approximated by a tanh.

    Forward:   out = x Phi(x),  Phi(x) = (1 + erf(x/sqrt 2))/2
               with approximate="tanh": out = x (1 + tanh u)/2,  u = k (x + a x^3), k = sqrt(2/pi), a = 0.044715
    Shapes:    any
    Backward:  Phi'(x) = phi(x) = exp(-x^2/2)/sqrt(2 pi), hence
               dx = dout (Phi(x) + x phi(x))
               For the tanh form, (1 + tanh u)/2 = s with s = 1/(1 + exp(-v)), v = 2u, so that out = x s and
               dx = dout (s + s x v' (1 - s)),  x v' = 2k (x + 3 a x^3) = 3 v - 2w, w = 2k x
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

        def exact(d: Tensor, x: Tensor, dx: Tensor | None, erf: Tensor | None) -> Tensor:
            # out = x (1 + erf)/2, erf = erf(x/sqrt 2)
            density = torch.mul(x, x, out=dx).mul_(-0.5 * LOG2_E).exp2_()  # sqrt(2 pi) phi(x)
            erf = torch.mul(x, math.sqrt(0.5), out=erf).erf_()
            erf.addcmul_(x, density, value=math.sqrt(2 / math.pi)).mul_(d)  # dout (erf + 2 x phi(x))
            return torch.lerp(d, erf, 0.5, out=density)  # (dout + dout (erf + 2 x phi(x)))/2

        def approximate(d: Tensor, x: Tensor, dx: Tensor | None, v: Tensor | None, s: Tensor | None) -> Tensor:
            # out = x s, s = 1/(1 + exp(-v)), v = w + a w x^2, w = 2k x
            w = torch.mul(x, 2 * math.sqrt(2 / math.pi), out=dx)
            square = torch.mul(x, x, out=v)
            v = torch.addcmul(w, w, square, value=0.044715, out=square)
            s = torch.sigmoid(v, out=s)
            rest = w.lerp_(v, 3.0)  # x v' = w + 3 (v - w)
            rest.addcmul_(rest, s, value=-1)  # x v' (1 - s)
            return torch.addcmul(s, s, rest, out=rest).mul_(d)

        if self.approximate == "none":
            return blockwise(exact, dout, x, scratch=1)
        return blockwise(approximate, dout, x, scratch=2)

    def extra_repr(self) -> str:
        return "" if self.approximate == "none" else f"approximate={self.approximate!r}"


class Softmax(Layer):
    """Exponentials, scaled to add up to one along a dimension.

    Forward:   out_c = exp(x_c) / sum_k exp(x_k)
    Shapes:    any; out like x
    Backward:  d out_c / d x_k = out_c ([c = k] - out_k), hence
               dx_k = sum_c dout_c out_c ([c = k] - out_k) = out_k (dout_k - sum_c dout_c out_c)
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    ShapeError where x does not have the dimension; DtypeError; StateError.

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
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        _check_dim(self, x, self.dim)
        out = torch.softmax(x, self.dim)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(d: Tensor, o: Tensor, dx: Tensor | None) -> Tensor:
            # out_c = exp(x_c) / sum_k exp(x_k)
            dx = torch.mul(d, o, out=dx)
            return torch.sub(d, dx.sum(self.dim, keepdim=True), out=dx).mul_(o)

        return _samplewise(formula, self.dim, dout, out)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSoftmax(Layer):
    """The logarithm of the softmax along a dimension.

    Forward:   out_c = x_c - log sum_k exp(x_k)
    Shapes:    any; out like x
    Backward:  d out_c / d x_k = [c = k] - exp(out_k), hence dx_k = dout_k - exp(out_k) sum_c dout_c
    Recorded:  out. Changing out in place before the backward is a StateError.
    Raises:    ShapeError where x does not have the dimension; DtypeError; StateError.

    >>> layer = LogSoftmax(dim=-1)
    >>> layer(torch.tensor([0.0, 0.0]))
    tensor([-0.6931, -0.6931])
    >>> layer.backward(torch.tensor([1.0, 0.0]))
    tensor([ 0.5000, -0.5000])
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        _check_dim(self, x, self.dim)
        out = torch.log_softmax(x, self.dim)
        self.push(out, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (out,) = self.pop(dout)

        def formula(d: Tensor, o: Tensor, dx: Tensor | None) -> Tensor:
            # out_c = x_c - log sum_k exp(x_k)
            dx = exp(o, out=dx).mul_(d.sum(self.dim, keepdim=True))
            return torch.sub(d, dx, out=dx)

        return _samplewise(formula, self.dim, dout, out)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _check_dim(layer: Layer, x: Tensor, dim: int) -> None:
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        raise layer.error(ShapeError, "forward", f"x must have dimension {dim}, got shape {tuple(x.shape)}")


def _samplewise(formula: Callable[..., Tensor], dim: int, dout: Tensor, out: Tensor) -> Tensor:
    """The formula in pieces, which must not cut the dimension that is summed over."""
    return formula(dout, out, None) if dim in (0, -dout.dim()) else blockwise(formula, dout, out)
