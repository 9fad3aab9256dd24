"""What SGD shares with torch.optim.SGD beyond the numbers of a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import handgrad as hg


def tensors(*, grads: bool = True) -> list[Tensor]:
    """Three parameters of different shapes."""
    generator = torch.Generator().manual_seed(4)
    params = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in [(3, 2), (2,), ()]]
    for param in params:
        param.grad = torch.randn(param.shape, dtype=torch.float64, generator=generator) if grads else None
    return params


def test_a_parameter_without_gradient_is_left_alone() -> None:
    """No decay, no momentum, no update; a momentum buffer begins with the first gradient."""
    params = tensors()
    params[1].grad = None
    before = params[1].clone()
    optimizer = hg.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(before, params[1])
    assert params[1] not in optimizer.state
    hg.SGD(tensors(grads=False), lr=0.1).step()


def test_gradients_are_never_written_to() -> None:
    """Whatever the flags: only zero_grad clears them."""
    for flags in ({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}, {"maximize": True}):
        params = tensors()
        before = [param.grad.clone() for param in params]
        optimizer = hg.SGD(params, lr=0.1, **flags)
        optimizer.step()
        optimizer.step()
        assert all(torch.equal(b, param.grad) for b, param in zip(before, params))
        optimizer.zero_grad()
        assert all(param.grad is None for param in params)


def test_groups_have_their_own_settings() -> None:
    """As in torch.optim."""
    ours, theirs = tensors(), tensors()
    for params, kind in ((ours, hg.SGD), (theirs, torch.optim.SGD)):
        groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:], "momentum": 0.5, "dampening": 0.2}]
        optimizer = kind(groups, lr=0.1)
        for _ in range(3):
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kinds", [(hg.SGD, torch.optim.SGD), (torch.optim.SGD, hg.SGD)], ids=["out", "in"])
def test_the_state_is_torchs(kinds: tuple[type, type]) -> None:
    """A run begun with one goes on with the other."""
    one, other = tensors(), tensors()
    first = kinds[0](one, lr=0.1, momentum=0.9)
    first.step()
    copies = [param.clone() for param in one]
    for target, source, given in zip(other, copies, one):
        target.copy_(source)
        target.grad = given.grad
    second = kinds[1](other, lr=0.1, momentum=0.9)
    second.load_state_dict({**second.state_dict(), "state": copy.deepcopy(first.state_dict()["state"])})
    first.step()
    second.step()
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_closure_is_evaluated_once() -> None:
    """Its result is what step returns."""
    calls = []
    assert hg.SGD(tensors(), lr=0.1).step(lambda: calls.append(1) or 7.0) == 7.0
    assert calls == [1]
    assert hg.SGD(tensors(), lr=0.1).step() is None
