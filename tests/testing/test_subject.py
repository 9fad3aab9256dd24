"""What a layer must be and return to be checked at all; each breach is told with the contract."""

from __future__ import annotations

import pytest
import torch

from handgrad import Embedding, Layer
from handgrad.testing import ContractError, LayerCrash, assert_gradients, check_layer
from handgrad.testing.subject import flatten
from tests.testing.strangers import Double


def test_an_object_that_is_no_layer_passes_by_keeping_the_contract():
    """No base class of handgrad's is needed: forward, backward and tensors in attributes."""

    class Scale:
        def __init__(self, size):
            self.weight = torch.ones(size)
            self.stack = []

        def forward(self, x):
            if torch.is_grad_enabled():
                self.stack.append(x.clone())
            return x * self.weight

        def backward(self, dout):
            if not self.stack:
                raise RuntimeError("Scale: no forward waits for this backward")
            grad = (dout * self.stack.pop()).reshape(-1, self.weight.numel()).sum(0)
            self.weight.grad = grad if self.weight.grad is None else self.weight.grad + grad
            return dout * self.weight

        def __deepcopy__(self, memo):
            twin = Scale(1)
            twin.weight = self.weight.clone()
            return twin

    report = check_layer(lambda D: Scale(D), x="*N D")
    assert report.subject == "Scale"


def test_a_layer_without_backward_is_told_the_contract():
    """By name."""

    class OneWay(Layer):
        def forward(self, x):
            return x

    with pytest.raises(ContractError, match=r"OneWay\(\) has no backward\.\nThe contract of a layer"):
        check_layer(OneWay, x="*N")


def test_a_gradient_on_an_unlisted_tensor_is_a_contract_error():
    """No optimizer would ever see it."""

    class Hidden(Double):
        def __init__(self):
            self.gain = torch.ones(())

        def backward(self, dout):
            self.gain.grad = torch.ones_like(self.gain)
            return super().backward(dout)

    with pytest.raises(ContractError, match=r"wrote a gradient to gain, which parameters\(\) does not list"):
        check_layer(Hidden, x="*N")


def test_a_gradient_for_integers_is_a_contract_error():
    """An index has none."""

    class Looks(Embedding):
        def backward(self, dout):
            super().backward(dout)
            return dout

    with pytest.raises(ContractError, match="dx must be None, for the input is not floating point"):
        check_layer(lambda V, D: Looks(V, D), x="N < V")


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda dx: None, "backward must return dx as a tensor like x, got None"),
        (lambda dx: (dx,), "backward must return dx as a tensor like x, got a tuple"),
        (lambda dx: [dx], "backward must return dx as a tensor like x, got a list"),
    ],
    ids=["None", "tuple", "list"],
)
def test_what_backward_returns_is_told_the_contract(returned, text):
    """One input: one tensor."""

    class Returns(Double):
        def backward(self, dout):
            return returned(super().backward(dout))

    with pytest.raises(ContractError) as caught:
        check_layer(Returns, x="*N")
    assert text in str(caught.value)
    assert "The contract of a layer" in str(caught.value)


def nests(nest=lambda out: out, nest_dx=lambda dx: dx):
    """A layer with its output in some nesting of tuples, and the dx of its input in some."""

    class Nests(Double):
        def forward(self, x):
            out = nest(2 * (x[0] if isinstance(x, tuple) else x))
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return nest_dx(2 * sum(flatten(dout)))

    return Nests


NESTINGS = {
    "(out,)": lambda out: (out,),
    "(out, out)": lambda out: (out, out.clone()),
    "(out, (out, out))": lambda out: (out, (out.clone(), out.clone())),
    "(((out,),), out)": lambda out: (((out,),), out.clone()),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_outputs_may_be_nested_in_tuples(nest):
    """Dout then comes nested as they are."""
    assert check_layer(nests(nest), x="*N", reference=lambda x: nest(2 * x)).oracle == "reference"
    assert_gradients(nests(nest)(), torch.ones(3, dtype=torch.float64))


def test_an_empty_tuple_is_no_output():
    with pytest.raises(ContractError, match="must return a tensor or a tuple of them; it returned a tuple of none"):
        check_layer(nests(lambda out: ()), x="*N")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda dx: dx, "dx"),
        (lambda dx: (dx, dx), "(dx, dx)"),
        (lambda dx: ((dx,),), "((dx,),)"),
        (lambda dx: (), "()"),
    ],
)
def test_dx_is_nested_as_the_inputs_are(wrong, text):
    """An input that is a tuple of one has a dx that is a tuple of one."""
    check_layer(nests(nest_dx=lambda dx: (dx,)), x=[("*N",)])
    with pytest.raises(ContractError) as caught:
        check_layer(nests(nest_dx=wrong), x=[("*N",)])
    assert f"backward must return (dx,), got {text}\nThe contract of a layer" in str(caught.value)


def test_what_forward_returns_is_told():
    """A tensor, or a tuple of them."""

    class Returns(Double):
        def forward(self, x):
            return [super().forward(x)]

    with pytest.raises(ContractError, match="forward must return a tensor or a tuple of them; output is a list"):
        check_layer(Returns, x="*N")


def test_a_crash_is_reported_with_the_input():
    """A size of two or more must not be refused."""

    class Picky(Double):
        def forward(self, x):
            if x.numel() > 3:
                raise ValueError("too much")
            return super().forward(x)

    with pytest.raises(LayerCrash, match="forward raised ValueError: too much"):
        check_layer(Picky, x="*N")
