"""What a layer must be and return to be checked at all; each breach is told with the contract."""

from __future__ import annotations

import pytest
import torch

from handgrad import (
    MSE,
    BatchNorm1d,
    CrossEntropy,
    Embedding,
    GRUCell,
    Layer,
    Linear,
    Loss,
    Losses,
    Sequential,
    Tanh,
    buffer,
)
from handgrad.testing import (
    ContractError,
    GradientMismatch,
    LayerCrash,
    OutputMismatch,
    assert_gradients,
    check_layer,
    check_loss,
)
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


class Undeclared(Double):
    """Scales by a tensor that `hold_it` puts somewhere."""

    def __init__(self, size):
        self.hold_it(torch.linspace(1, 2, size))

    def forward(self, x):
        scale = self.scale()
        out = x * scale
        self.push(scale, out=out)
        return out

    def backward(self, dout):
        (scale,) = self.pop(dout)
        return dout * scale


def undeclared(hold_it, scale, **declared):
    return type("Scale", (Undeclared,), {"hold_it": hold_it, "scale": scale, **declared})


HELD = {
    "gain": (lambda self, t: setattr(self, "gain", t), lambda self: self.gain, "gain", ""),
    "a list": (
        lambda self, t: setattr(self, "gains", [t]),
        lambda self: self.gains[0],
        "gains.0",
        "; a tensor in a list or dict needs an attribute of its own for that",
    ),
}


@pytest.mark.parametrize("where", HELD)
def test_a_tensor_that_forward_reads_and_nobody_declared_is_told(where):
    """And how to declare it: to() and state_dict() do not know it."""
    hold_it, scale, name, more = HELD[where]
    with pytest.raises(ContractError) as caught:
        check_layer(lambda D: undeclared(hold_it, scale)(D), x="*N D")
    text = str(caught.value)
    assert f"reads {name}, a tensor that the layer does not declare, so to() leaves it behind" in text
    assert f'`{name.replace(".", "_")}: Tensor = buffer("D")` (or parameter, where it is trained; ' in text
    assert f"buffer(..., persistent=False) where state_dict() need not have it){more}\n" in text


def test_inside_another_layer_it_is_told_with_that_layer():
    hold_it, scale, *_ = HELD["gain"]
    with pytest.raises(ContractError, match=r"forward of Scale\(\) reads gain"):
        check_layer(lambda D: Sequential(Tanh(), undeclared(hold_it, scale)(D)), x="*N D")


@pytest.mark.parametrize("persistent", [True, False])
def test_a_declared_buffer_is_right(persistent):
    hold_it, scale, *_ = HELD["gain"]
    check_layer(lambda D: undeclared(hold_it, scale, gain=buffer("D", persistent=persistent))(D), x="*N D")


def test_a_tensor_that_no_operation_reads_is_nobodys_business():
    class Keeps(Double):
        def __init__(self):
            self.example = torch.ones(3)

    check_layer(Keeps, x="*N")


class Both(Loss):
    """A loss of two outputs, with a weight for each row."""

    def forward(self, x, target):
        a, b = x
        out = ((a - b).square().sum(-1) * target).sum()
        self.push(a - b, target, out=out)
        return out

    def backward(self, dout=None):
        diff, target = self.pop(dout)
        dx = 2 * diff * target.unsqueeze(-1) * (1 if dout is None else dout)
        return dx, -dx


@pytest.mark.parametrize("x", [("N D", "N D"), ["N D", "N D"]])
def test_a_loss_may_take_a_tuple(x):
    """As a tuple or a list of entries; dx is a tuple."""
    check_loss(Both, x=x, target="N")


def test_a_loss_of_a_tuple_is_told_what_dx_must_be():
    class One(Both):
        def backward(self, dout=None):
            return super().backward(dout)[0]

    class Wrong(Both):
        def backward(self, dout=None):
            da, _ = super().backward(dout)
            return da, da.clone()

    with pytest.raises(ContractError, match=r"backward must return \(dx, dx\), got dx"):
        check_loss(One, x=("N D", "N D"), target="N")
    with pytest.raises(GradientMismatch, match=r"dx\[1\] is wrong"):
        check_loss(Wrong, x=("N D", "N D"), target="N")


def test_a_loss_may_take_a_tuple_of_targets():
    make = lambda: Losses(CrossEntropy(), MSE(), weights=(1, 0.5))  # noqa: E731
    assert check_loss(make, x=("N C", "M"), target=("N < C", "M")).subject == "Losses"


class Largest(Layer):
    """Values, indices and a mask: what is not floating has no dout."""

    def __init__(self, size):
        self.size = size

    def forward(self, x):
        values, where = x.max(-1)
        out = values, where, x > 0
        self.push(x, where, out=out)
        return out

    def backward(self, dout):
        x, where = self.pop(dout)
        assert dout[1] is dout[2] is None
        return torch.zeros_like(x).scatter(-1, where.unsqueeze(-1), dout[0].unsqueeze(-1))


def test_outputs_may_be_indices_and_masks():
    """Backward is given None for them."""
    check_layer(lambda D: Largest(D), x="*N D", distinct=True, reference=lambda x: (*x.max(-1), x > 0))
    with pytest.raises(OutputMismatch, match=r"out\[2\] is wrong"):
        check_layer(lambda D: Largest(D), x="*N D", distinct=True, reference=lambda x: (*x.max(-1), x > 1))


def frozen_below(D):
    model = Sequential(Linear(D, 4), BatchNorm1d(4), Tanh(), Linear(4, 2))
    model[0].freeze()
    model[1].freeze()
    return model


@pytest.mark.parametrize("of_layer", [frozen_below, lambda D: Linear(D, 3).freeze(), lambda D: GRUCell(D, 3).freeze()])
def test_frozen_parameters_have_no_gradient(of_layer):
    report = check_layer(lambda D: of_layer(D), x="N D")
    assert report.faults["parameter gradients slightly scaled"] in (
        "noticed by gradients",
        "does not apply: no parameters",
    )
    far = "of equal rows far out, a batch norm changes too much within a difference"
    skip = {"sensitivity": "as above", "special": far}
    check_layer(lambda D: of_layer(D), x="N D", oracle="differences", skip=skip, examples=10)


def test_a_frozen_parameter_that_gets_a_gradient_is_told():
    class Writes(Linear):
        def backward(self, dout, need_dx=True):
            self.bias.grad = dout.sum(0)
            return super().backward(dout, need_dx)

    with pytest.raises(GradientMismatch) as caught:
        check_layer(lambda D: Writes(D, 2).freeze(), x="N D")
    assert "bias is wrong: there is no gradient, yet backward made one" in str(caught.value)
    assert "hint: it is frozen: add_grad(parameter, gradient) passes it over, writing to .grad" in str(caught.value)
