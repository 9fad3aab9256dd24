"""What SGD shares with torch.optim.SGD beyond the numbers of a step; torch's own on the parameters of handgrad."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

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


def test_a_closure_may_run_forward_and_backward() -> None:
    """Step never has it under no_grad, where nothing is recorded."""
    layer, x = hg.Linear(2, 1), torch.ones(3, 2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x).sum()
        layer.backward(torch.ones(3, 1))
        return loss

    optimizer = hg.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.clone()
    optimizer.step(closure)
    with torch.no_grad():
        optimizer.step(closure)
    torch.testing.assert_close(layer.weight, before - 2 * 0.1 * 3)


def test_hooks_see_every_step() -> None:
    """One's own and those of all optimizers, before and after the update, in torch's order; removed, they are gone."""
    (param, *_), seen = tensors(), []
    optimizer, before = hg.SGD([param], lr=0.1), param.clone()

    def note(name: str) -> Callable[..., None]:
        return lambda of, args, kwargs: seen.append((name, of is optimizer, torch.equal(param, before)))

    handles = [optimizer.register_step_pre_hook(note("pre")), optimizer.register_step_post_hook(note("post"))]
    optimizer.step()
    assert seen == [("pre", True, True), ("post", True, False)]
    handles += [
        torch_optimizer.register_optimizer_step_pre_hook(note("global pre")),
        torch_optimizer.register_optimizer_step_post_hook(note("global post")),
    ]
    seen.clear()
    optimizer.step()
    assert [name for name, *_ in seen] == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    seen.clear()
    optimizer.step()
    assert seen == []


def test_a_hook_may_change_the_arguments() -> None:
    """A hook before the step that returns other arguments of step has its way."""
    optimizer = hg.SGD(tensors(), lr=0.1)
    optimizer.register_step_pre_hook(lambda of, args, kwargs: ((of, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


class Loud(hg.SGD):
    """An SGD whose step and zero_grad say that they ran."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.said = [*getattr(self, "said", []), "step"]
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.said = [*getattr(self, "said", []), "zero_grad"]
        super().zero_grad(set_to_none)


def test_a_subclass_may_override_step_and_zero_grad() -> None:
    """Its own run, a hook sees a step once, and the update is done once."""
    ours, theirs, seen = tensors(), tensors(), []
    optimizer, plain = Loud(ours, lr=0.1), hg.SGD(theirs, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: seen.append("hook"))
    optimizer.step()
    plain.step()
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b)
    optimizer.zero_grad()
    assert optimizer.said == ["step", "zero_grad"]
    assert seen == ["hook"]
    assert all(param.grad is None for param in ours)


def test_a_subclass_that_overrides_neither_is_hooked_too() -> None:
    """It has the step of SGD."""
    seen: list[str] = []
    optimizer = type("Quiet", (hg.SGD,), {})(tensors(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("hook"))
    optimizer.step()
    assert seen == ["hook"]


@pytest.mark.parametrize("kind", [hg.SGD, Loud])
def test_a_profile_shows_step_and_zero_grad(kind: type[hg.SGD]) -> None:
    """Under the names that torch.optim gives them, once a call, and only while the profiler is on."""
    optimizer = kind(tensors(), lr=0.1)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    optimizer.step()
    counts = {row.key: row.count for row in profile.key_averages() if row.key.startswith("Optimizer.")}
    name = kind.__name__
    assert counts == {f"Optimizer.step#{name}.step": 1, f"Optimizer.zero_grad#{name}.zero_grad": 1}
    assert all(param.grad is None for param in optimizer.param_groups[0]["params"])


def test_a_profile_of_all_threads_shows_a_step_in_another() -> None:
    """As with torch.optim."""
    optimizer = hg.SGD(tensors(), lr=0.1)
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profile:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()
    assert "Optimizer.step#SGD.step" in {event.name for event in profile.events()}


def test_gradients_may_be_set_to_zero() -> None:
    """The tensors stay, and are zero; a gradient of None stays None."""
    params = tensors()
    params[1].grad = None
    grads = [param.grad for param in params]
    hg.SGD(params, lr=0.1).zero_grad(set_to_none=False)
    assert all(param.grad is grad for param, grad in zip(params, grads))
    assert all(grad is None or not grad.any() for grad in grads)


def test_a_scheduler_knows_of_the_steps() -> None:
    """It warns of a scheduler step before the first of the optimizer, and only of that."""
    optimizer = hg.SGD(tensors(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()  # a warning would be an error here
    assert optimizer.param_groups[0]["lr"] == 0.05
    scheduler = torch.optim.lr_scheduler.StepLR(hg.SGD(tensors(), lr=0.1), 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
def test_a_copy_steps_on(make: Callable[[Any], Any]) -> None:
    """With the momentum it had, on its own parameters, and can be hooked."""
    params, seen = tensors(), []
    optimizer = hg.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    copied, copies = make((optimizer, params))
    for param, grad in zip(copies, [param.grad for param in params]):
        param.grad = grad  # which a pickle does not carry
    copied.register_step_post_hook(lambda *_: seen.append("hook"))
    copied.step()
    assert seen == ["hook"]
    assert not any(torch.equal(a, b) for a, b in zip(params, copies))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies))


def test_parameters_of_autograd_are_updated() -> None:
    """Tensors that require grad, too, as by torch.optim."""
    ours, theirs = (torch.ones(2, requires_grad=True) for _ in range(2))
    for param, kind in ((ours, hg.SGD), (theirs, torch.optim.SGD)):
        (param**2).sum().backward()
        kind([param], lr=0.1, momentum=0.9).step()
    assert torch.equal(ours, theirs)
    assert ours.requires_grad


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
