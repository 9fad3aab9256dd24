"""What SGD shares with torch.optim.SGD beyond the numbers of a step; torch's own on the parameters of handgrad."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import handgrad as hg
from handgrad import twins


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


def mlp(lib: Any) -> Any:
    """The names MLP, small, of handgrad's layers or of torch's."""
    hidden = lib.Linear(12, 16, bias=False)  # a bias before BatchNorm1d has no gradient but rounding
    return lib.Sequential(
        lib.Embedding(11, 4), lib.Flatten(), hidden, lib.BatchNorm1d(16), lib.Tanh(), lib.Linear(16, 11)
    ).to(torch.float64)


Optimizers = tuple[Callable[..., torch.optim.Optimizer], Callable[..., torch.optim.Optimizer]]
PLAIN: Optimizers = (lambda params: hg.SGD(params, lr=0.5), lambda params: torch.optim.SGD(params, lr=0.5))
NESTEROV: Optimizers = (
    lambda params: hg.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
)
ADAMW: Optimizers = (
    lambda params: torch.optim.AdamW(params, lr=0.01),
    lambda params: torch.optim.AdamW(params, lr=0.01),
)


@pytest.mark.parametrize("optimizers", [PLAIN, NESTEROV, ADAMW], ids=["sgd", "nesterov", "adamw"])
def test_training_equals_autograd(optimizers: Optimizers) -> None:
    """Many steps with clipping and a falling lr: every loss, gradient, parameter and buffer, to float64 noise."""
    torch.manual_seed(1)
    ours, theirs = mlp(hg), mlp(twins)
    theirs.load_state_dict(ours.state_dict())
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    optimizer, torch_optimizer = optimizers[0](ours.parameters()), optimizers[1](theirs.parameters())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9) for o in (optimizer, torch_optimizer)]
    loss, torch_loss = hg.CrossEntropy(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(25):
        x, y = torch.randint(11, (9, 3), generator=generator), torch.randint(11, (9,), generator=generator)
        value = loss(ours(x), y)
        optimizer.zero_grad()
        ours.backward(loss.backward())
        torch_value = torch_loss(theirs(x), y)
        torch_optimizer.zero_grad()
        torch_value.backward()
        norms = [float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)) for model in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-9)
        for got, expected in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-12)
        for o in (optimizer, torch_optimizer, *schedulers):
            o.step()
        torch.testing.assert_close(value, torch_value.detach(), rtol=1e-10, atol=0)
    for (name, tensor), (torch_name, expected) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        assert name == torch_name
        torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(tensor, before[name]), name  # the equality is none of models that stand still


def test_an_average_of_the_weights() -> None:
    """By a copy that follows, as documented, and by torch's AveragedModel on the module, not on the layer."""
    torch.manual_seed(0)
    model = mlp(hg)
    average, module = copy.deepcopy(model), hg.to_torch(model)
    swa = torch.optim.swa_utils
    theirs = swa.AveragedModel(module, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9), use_buffers=False)
    theirs.update_parameters(module)  # the first takes the weights as they are
    step = hg.TrainStep(model, hg.CrossEntropy(), hg.SGD(model.parameters(), lr=0.5))
    for _ in range(5):
        step(torch.randint(11, (9, 3)), torch.randint(11, (9,)))
        for p, q in zip(average.parameters(), model.parameters()):
            p.lerp_(q, 0.1)
        for (_, b), (_, c) in zip(average.named_buffers(), model.named_buffers()):
            b.copy_(c)
        theirs.update_parameters(module)
    for (name, p), q, now in zip(average.named_parameters(), theirs.module.parameters(), model.parameters()):
        torch.testing.assert_close(p, q.detach(), msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(p, now)
    x = torch.randint(11, (9, 3))
    with torch.no_grad():
        torch.testing.assert_close(average.eval()(x), theirs.eval()(x))
    with pytest.raises(AttributeError, match="buffers"):
        swa.AveragedModel(model).update_parameters(model)
