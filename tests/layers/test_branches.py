"""Containers side by side: gradients against autograd, reuse of one object in several places, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handgrad import (
    ArgumentError,
    Concat,
    DtypeError,
    Embedding,
    Flatten,
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
from tests.reference import compare, draw


class TorchBranches(torch.nn.Sequential):
    """The same bodies in torch.nn, joined by a function."""

    def __init__(self, join, *bodies):
        super().__init__(*bodies)
        self.join = join

    def forward(self, x):
        return self.join([body(x) for body in self])


class TorchResidual(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def total(outs):
    return sum(outs[1:], outs[0])


def product(outs):
    out = outs[0]
    for factor in outs[1:]:
        out = out * factor
    return out


def test_identity_passes_the_tensors_through():
    layer, x, dout = Identity(), draw(2, 3), draw(2, 3)
    assert layer(x) is x
    assert layer.backward(dout) is dout


def test_residual_agrees_with_torch():
    compare(
        Residual(Sequential(Linear(3, 5), Tanh(), Linear(5, 3))),
        TorchResidual(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))),
        [(draw(4, 3),), (draw(2, 6, 3),)],
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "join"), [(Sum, total), (Product, product), (lambda *b: Concat(*b, dim=1), lambda o: torch.cat(o, 1))]
)
def test_branches_agree_with_torch(kind, join, count):
    """Identity and Tanh among the bodies: dout, x and outputs are shared by several of them."""
    ours = [Linear(3, 3), Identity(), Tanh(), Sequential(Linear(3, 3), Tanh())]
    theirs = [
        torch.nn.Linear(3, 3),
        torch.nn.Identity(),
        torch.nn.Tanh(),
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()),
    ]
    compare(kind(*ours[:count]), TorchBranches(join, *theirs[:count]), [(draw(4, 3),), (draw(2, 3),)])


def test_concat_of_different_widths_and_negative_dim():
    compare(
        Concat(Linear(3, 2), Linear(3, 4), dim=-1),
        TorchBranches(lambda outs: torch.cat(outs, -1), torch.nn.Linear(3, 2), torch.nn.Linear(3, 4)),
        [(draw(4, 3),), (draw(2, 6, 3),)],
    )


def test_parallel_of_parallel_agrees_with_torch():
    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", torch.nn.Linear(3, 2))
            self.add_module("1", torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Tanh()]))

        def forward(self, x):
            inner = self.get_submodule("1")
            return self.get_submodule("0")(x[0]), (inner[0](x[1][0]), inner[1](x[1][1]))

    layer = Parallel(Linear(3, 2), Parallel(Linear(2, 2), Tanh()))
    layer.to(torch.float64)
    reference = Reference().double()
    reference.load_state_dict(layer.state_dict())
    x = (draw(4, 3), (draw(5, 2), draw(6)))
    leaves = (x[0].clone().requires_grad_(), (x[1][0].clone().requires_grad_(), x[1][1].clone().requires_grad_()))
    out, truth = layer(x), reference(leaves)
    dout = (draw(4, 2), (draw(5, 2), draw(6)))
    dx = layer.backward(dout)
    torch.autograd.backward([truth[0], *truth[1]], [dout[0], *dout[1]])
    torch.testing.assert_close(out, truth, check_layout=False)
    torch.testing.assert_close(dx, (leaves[0].grad, (leaves[1][0].grad, leaves[1][1].grad)))
    for name, param in reference.named_parameters():
        torch.testing.assert_close(layer.state_dict()[name].grad, param.grad)


def test_one_object_in_several_places():
    """The record stack hands each use its own forward: reverse order, whatever the nesting."""
    shared, theirs = Linear(3, 3), torch.nn.Linear(3, 3)
    layer = Sum(Residual(shared), Product(shared, Sequential(shared, Tanh())), Concat(Sequential(shared), dim=1))

    class Reference(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = theirs

        def forward(self, x):
            y = self.linear(x)
            return x + y + y * torch.tanh(y) + y

    assert [name for name, _ in layer.named_parameters()] == ["0.body.weight", "0.body.bias"]
    layer.to(torch.float64)
    reference = Reference().double()
    with torch.no_grad():
        theirs.weight.copy_(shared.weight)
        theirs.bias.copy_(shared.bias)
    x, dout = draw(4, 3), draw(4, 3)
    leaf = x.clone().requires_grad_()
    layer(x)
    dx = layer.backward(dout)
    reference(leaf).backward(dout)
    torch.testing.assert_close(dx, leaf.grad)
    torch.testing.assert_close(shared.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(shared.bias.grad, theirs.bias.grad)


def test_integer_inputs_have_no_gradient():
    layer = Sum(Embedding(5, 3), Sequential(Embedding(5, 3), Tanh()))
    layer(torch.tensor([1, 4, 1]))
    assert layer.backward(torch.randn(3, 3)) is None
    layer = Parallel(Embedding(5, 3), Identity())
    layer((torch.tensor([1]), torch.ones(2)))
    dx = layer.backward((torch.ones(1, 3), torch.ones(2)))
    assert dx[0] is None
    assert torch.equal(dx[1], torch.ones(2))


@pytest.mark.parametrize(
    "make", [lambda b: Residual(b), lambda b: Sum(b, b), lambda b: Product(b, b), lambda b: Concat(b, dim=1)]
)
def test_nobody_wants_dx(make):
    """need_dx=False reaches the bodies, the parameters still get their gradients."""
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
    with pytest.raises(ShapeError, match=r"x and body must have one shape, got \(2, 3\) and \(2, 4\)"):
        Residual(Linear(3, 4))(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"0 and 1 must have one shape, got \(2, 3\) and \(2, 1\)"):
        Sum(Identity(), Linear(3, 1))(torch.zeros(2, 3))
    with pytest.raises(
        ShapeError, match=r"0 and 1 must have one shape apart from dimension 0, got \(2, 3\) and \(2, 4"
    ):
        Concat(Identity(), Linear(3, 4), dim=0)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"the output of 0 must have dimension 2, got shape \(2, 3\)"):
        Concat(Identity(), dim=2)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"x must be a tuple of 2 inputs, one a body, got 3 of them"):
        Parallel(Identity(), Identity())((torch.zeros(1),) * 3)
    with pytest.raises(DtypeError, match="the output of 0 must be a tensor, got tuple"):
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


def test_views_of_dout_are_not_written_to():
    """Identity and Flatten return dout itself as dx: the sum must not be written into it."""
    for layer in (Sum(Identity(), Flatten(0), Identity()), Residual(Identity()), Product(Identity(), Identity())):
        x, dout = draw(4), draw(4)
        kept = dout.clone()
        layer(x)
        dx = layer.backward(dout)
        dx.zero_()
        assert torch.equal(dout, kept)
