"""Elementwise nonlinearities."""

from __future__ import annotations

import torch
from torch import Tensor

from handgrad.layer import Layer


class Tanh(Layer):
    """Hyperbolic tangent, elementwise.

    Forward:   out = tanh(x)
    Shapes:    any
    Backward:  tanh' = 1 - tanh^2, hence dx = dout (1 - out^2) = dout - (dout out) out
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
        # out = tanh(x)
        dx = dout * out
        return torch.addcmul(dout, dx, out, value=-1, out=dx)
