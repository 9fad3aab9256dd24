"""Dropping elements at random."""

from __future__ import annotations

import torch
from torch import Tensor

from handgrad.arguments import number
from handgrad.layer import Layer
from handgrad.pieces import wide
from handgrad.randomness import uniform


class Dropout(Layer):
    """In training, set each element to zero with probability p and scale up the others; in evaluation, do nothing.

    Forward:   out = x mask,  mask = 1/(1 - p) with probability 1 - p, else 0, drawn anew for every element and forward.
               In evaluation, or with p = 0, out is x itself.
    Shapes:    any
    Backward:  the mask is a constant, hence dx = dout mask; dout itself where out was x itself
    Recorded:  mask
    Raises:    ArgumentError for p outside 0..1; DtypeError; ShapeError and StateError from backward.
    Source:    Srivastava et al. 2014 (jmlr.org/papers/v15/srivastava14a.html)

    The mask is drawn from `generator`, on its device, by default torch's global one: a uniform number for each element.
    That takes half the time of torch.nn.Dropout, and the same seed gives another mask. A mode that changes between
    forward and backward changes nothing: the record says what forward did.

    >>> layer = Dropout(0.5, generator=torch.Generator().manual_seed(1))
    >>> x = torch.ones(1000)
    >>> out = layer(x)
    >>> out.unique(), 450 < int((out == 0).sum()) < 550
    (tensor([0., 2.]), True)
    >>> bool((layer.backward(3 * x) == 3 * out).all())  # dropped and scaled alike
    True
    >>> layer.eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    shown = ("p",)

    def __init__(self, p: float = 0.5, *, generator: torch.Generator | None = None) -> None:
        self.p, self.generator = number(self, "p", p, 0, 1), generator

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if not self.training or self.p == 0:
            self.push(None, out=x)
            return x
        mask = drawn_mask(x, self.p, self.generator)
        out = x * mask
        self.push(mask, out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (mask,) = self.pop(dout)
        # out = x mask
        return dout if mask is None else dout * mask


def drawn_mask(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """A number for each element of x: 1/(1 - p) with probability 1 - p, else 0."""
    mask = uniform(x.shape, generator, wide(x.dtype), x.device)
    torch.lt(mask, 1 - p, out=mask)  # 1 or 0
    if p < 1:
        mask.mul_(1 / (1 - p))
    return mask.to(x.device, x.dtype)
