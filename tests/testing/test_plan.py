"""What is wrong with a description of the inputs is explained."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, Layer, Linear
from handgrad.testing import GradientMismatch, check_layer
from tests.testing.strangers import Double


@pytest.mark.parametrize("text", ["*N *M", "N < ", "N D >= 0", "N D in 0"])
def test_a_bad_input_is_explained(text):
    """With the syntax, or the rule."""
    with pytest.raises(ArgumentError, match=r"cannot read the input|one \*dimension"):
        check_layer(Double, x=text)


def test_an_unknown_argument_of_the_constructor_is_explained():
    """And how to give it."""
    with pytest.raises(ArgumentError, match="do not know what to give the constructor's argument 'in_features'"):
        check_layer(Linear, x="N D")


def elementwise(function, slope):
    """A layer of a function of x and its slope; further inputs are constants of both."""

    class Elementwise(Layer):
        def forward(self, x, *constants):
            out = function(x, *constants)
            self.push(x, constants, out=out)
            return out

        def backward(self, dout):
            x, constants = self.pop(dout)
            dx = dout * slope(x, *constants)
            return (dx, *[None] * len(constants)) if constants else dx

    return Elementwise()


class Rows(Layer):
    """Of a table that is an input: out = table[index]."""

    def forward(self, table, index):
        self.push(index, table.shape, out=(out := table[index]))
        return out

    def backward(self, dout):
        index, shape = self.pop(dout)
        return dout.new_zeros(shape).index_put((index,), dout, accumulate=True), None


class Sum(Layer):
    """Over the last dimensions, as many as a star stands for, and 2."""

    def forward(self, x):
        out = x.flatten(1).sum(1)
        self.push(x.shape, out=out)
        return out

    def backward(self, dout):
        (shape,) = self.pop(dout)
        return dout.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


KINDS = {
    "real": (lambda: elementwise(lambda x: x**2, lambda x: 2 * x), "*N D"),
    "positive": (lambda: elementwise(torch.log, torch.reciprocal), "*N D > 0"),
    "unit": (lambda: elementwise(torch.logit, lambda x: 1 / (x * (1 - x))), "N in 0 1"),
    "bool": (
        lambda: elementwise(lambda x, mask: torch.where(mask, x, 0), lambda x, mask: mask),
        ["N D", "N D bool"],
    ),
    "bool of any shape": (
        lambda: elementwise(lambda x, mask: x.masked_fill(mask, 7), lambda x, mask: ~mask),
        ["*N D", "*N D bool"],
    ),
    "integers": (Rows, ["V D", "*N < V"]),
    "integers below a number": (
        lambda: elementwise(lambda x, n: x * n, lambda x, n: n.to(x.dtype)),
        ["*N", "*N < 5"],
    ),
    "stars and numbers": (Sum, "N *M 2"),
    "a number alone": (lambda: elementwise(torch.exp, torch.exp), "3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input(kind):
    """That the syntax has, in a right layer."""
    make, x = KINDS[kind]
    report = check_layer(make, x=x)
    assert report.properties[0].examples > 0


def test_a_wrong_layer_of_a_mask_is_noticed():
    wrong = lambda: elementwise(lambda x, mask: torch.where(mask, x, 0), lambda x, mask: 1.0)  # noqa: E731
    with pytest.raises(GradientMismatch, match=r"dx\[0\] is wrong"):
        check_layer(wrong, x=["N D", "N D bool"])
