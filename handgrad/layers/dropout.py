"""Dropping elements at random."""

from __future__ import annotations

import torch
from torch import Tensor

from handgrad.errors import ArgumentError
from handgrad.layer import Layer


class Dropout(Layer):
    """In training, set each element to zero with probability p and scale up the others; in evaluation, do nothing.

    Forward:   out = x mask,  mask = 1/(1 - p) with probability 1 - p, else 0, drawn anew for every element and forward.
               In evaluation, or with p = 0, out is x itself.
    Shapes:    any
    Backward:  the mask is a constant, hence dx = dout mask; dout itself where out was x itself
    Recorded:  mask
    Raises:    ArgumentError for p outside 0..1; DtypeError; ShapeError and StateError from backward.
    Source:    Srivastava et al. 2014 (jmlr.org/papers/v15/srivastava14a.html)

    The mask is drawn from `generator`, on its device; by default from torch's global one, as torch.nn.Dropout draws it.
    A mode that changes between forward and backward changes nothing: the record says what forward did.

    >>> layer = Dropout(0.5, generator=torch.Generator().manual_seed(1))
    >>> layer(torch.ones(6))
    tensor([2., 2., 2., 2., 0., 2.])
    >>> layer.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    tensor([ 2.,  4.,  6.,  8.,  0., 12.])
    >>> layer.eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def __init__(self, p: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        if not 0 <= p <= 1:
            raise ArgumentError(f"Dropout: p must be in 0..1, got {p}")
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if not self.training or self.p == 0:
            self.push(None, out=x)
            return x
        home = x.device if self.generator is None else self.generator.device
        mask = torch.empty_like(x, device=home).bernoulli_(1 - self.p, generator=self.generator).to(x.device)
        if self.p < 1:
            mask.div_(1 - self.p)
        out = x * mask
        self.push(mask, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (mask,) = self.pop(dout)
        # out = x mask
        return dout if mask is None else dout * mask

    def extra_repr(self) -> str:
        return f"{self.p}"
