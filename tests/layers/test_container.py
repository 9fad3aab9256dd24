"""Sequential is a sequence, and passes on that nobody wants dx."""

from __future__ import annotations

import torch

import handgrad as hg


def test_the_first_layer_may_decline_dx():
    """Autograd does not compute the gradient of data either; the parameters get theirs all the same."""
    model = hg.Sequential(hg.Linear(3, 4), hg.Tanh())
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
    model = hg.Sequential(hg.Linear(2, 3), hg.Sequential(hg.Tanh(), hg.Linear(3, 1, bias=False)))
    assert isinstance(model[0], hg.Linear)
    assert len(model) == 2
    assert list(model) == [model[0], model[1]]
    assert isinstance(model[:1], hg.Sequential)
    assert model[:1][0] is model[0]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.1.weight"]
    assert repr(model) == (
        "Sequential(\n  (0): Linear(2 -> 3)\n  (1): Sequential(\n    (0): Tanh()\n"
        "    (1): Linear(3 -> 1, bias=False)\n  )\n)"
    )
