"""The containers: sequences, branches, and what they refuse. Their gradients are in the cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handgrad import (
    ArgumentError,
    Concat,
    DtypeError,
    Identity,
    Linear,
    Parallel,
    Product,
    Residual,
    Sequential,
    ShapeError,
    Sum,
    Tanh,
)


def test_the_first_layer_may_decline_dx():
    """Autograd does not compute the gradient of data either; the parameters get theirs all the same."""
    model = Sequential(Linear(3, 4), Tanh())
    x = torch.randn(5, 3)
    out = model(x)
    assert model.backward(torch.ones_like(out), need_dx=False) is None
    declined = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x)
    assert model.backward(torch.ones_like(out)).shape == x.shape
    assert all(torch.equal(a, b.grad) for a, b in zip(declined, model.parameters()))


def test_sequential_is_a_sequence():
    """Indexing, slicing, iteration, nesting, and a repr that shows the tree."""
    model = Sequential(Linear(2, 3), Sequential(Tanh(), Linear(3, 1, bias=False)))
    assert isinstance(model[0], Linear)
    assert len(model) == 2
    assert list(model) == [model[0], model[1]]
    assert isinstance(model[:1], Sequential)
    assert model[:1][0] is model[0]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.1.weight"]
    assert repr(model) == (
        "Sequential(\n  (0): Linear(2 -> 3)\n  (1): Sequential(\n    (0): Tanh()\n"
        "    (1): Linear(3 -> 1, bias=False)\n  )\n)"
    )


def test_identity_passes_the_tensors_through():
    layer, x, dout = Identity(), torch.randn(2, 3), torch.randn(2, 3)
    assert layer(x) is x
    assert layer.backward(dout) is dout


@pytest.mark.parametrize(
    "make", [lambda b: Residual(b), lambda b: Sum(b, b), lambda b: Product(b, b), lambda b: Concat(b, dim=1)]
)
def test_the_bodies_are_told_that_nobody_wants_dx(make):
    """Their parameters get their gradients all the same."""
    wanted = []

    class Spy(Linear):
        def backward(self, dout: Tensor, need_dx: bool = True) -> Tensor | None:
            wanted.append(need_dx)
            return super().backward(dout, need_dx)

    layer = make(Spy(3, 3))
    layer(torch.randn(2, 3))
    dout = torch.randn(2, 3)
    assert layer.backward(dout, need_dx=False) is None
    assert set(wanted) == {False}
    assert next(layer.parameters()).grad is not None


def test_errors_name_the_path():
    model = Sequential(Tanh(), Identity(), Residual(Sequential(Linear(3, 4), Tanh(), Linear(4, 3))))
    with pytest.raises(ShapeError, match=r"^in 2\.body\.0 \(Linear\(3 -> 4\)\): Linear\(3 -> 4\)\.forward: last dim"):
        model(torch.zeros(2, 5))
    model = Sequential(Sum(Identity(), Parallel(Linear(3, 3))))
    with pytest.raises(ShapeError, match=r"^in 0\.1 \(Parallel\("):
        model(torch.zeros(2, 3))

    class Broken(Identity):
        def backward(self, dout: Tensor) -> Tensor:
            raise ZeroDivisionError("broken")

    model = Sequential(Residual(Product(Identity(), Broken())))
    model(torch.zeros(2))
    with pytest.raises(ZeroDivisionError, match="broken") as caught:
        model.backward(torch.zeros(2))
    assert getattr(caught.value, "__notes__", [""])[0] in ("in 1 (Broken())", "")


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ShapeError, match=r"x and the output of body must have one shape, got \(2, 3\) and \(2, 4\)"):
        Residual(Linear(3, 4))(torch.zeros(2, 3))
    with pytest.raises(
        ShapeError, match=r"the output of 0 and the output of 1 must have one shape, got \(2, 3\) and \(2, 1\)"
    ):
        Sum(Identity(), Linear(3, 1))(torch.zeros(2, 3))
    with pytest.raises(
        ShapeError,
        match=r"the output of 0 and the output of 1 must have one shape apart from dimension 0, got",
    ):
        Concat(Identity(), Linear(3, 4), dim=0)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"the output of 0 must have dimension 2, got shape \(2, 3\)"):
        Concat(Identity(), dim=2)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"x must be a tuple of 2 inputs, one per body, got 3 of them"):
        Parallel(Identity(), Identity())((torch.zeros(1),) * 3)
    with pytest.raises(DtypeError, match=r"the output of 0 must be a torch\.Tensor, got tuple"):
        Sum(Parallel(Identity()))((torch.zeros(1),))
    layer = Parallel(Identity(), Identity())
    layer((torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ShapeError, match="dout must be a tuple of 2 tensors"):
        layer.backward((torch.zeros(1),))
    with pytest.raises(ArgumentError, match="Sum: at least one body is needed"):
        Sum()
    with pytest.raises(ArgumentError, match="Product: every argument must be a Layer, got float at 1"):
        Product(Identity(), 2.5)
    with pytest.raises(ArgumentError, match="Residual: body must be a Layer, got int"):
        Residual(3)
