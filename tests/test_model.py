"""Whole models: training equal to autograd's, torch's own tools on handgrad's parameters, weights both ways."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import handgrad as hg

STEPS = 25


def build(dtype: torch.dtype = torch.float64) -> hg.Sequential:
    """The names MLP, small."""
    generator = torch.Generator().manual_seed(1)
    return hg.Sequential(
        hg.Embedding(11, 4, generator=generator),
        hg.Flatten(),
        hg.Linear(12, 16, generator=generator),
        hg.BatchNorm1d(16),
        hg.Tanh(),
        hg.Linear(16, 11, generator=generator),
    ).to(dtype)


def build_torch(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The equal torch.nn model, with other weights."""
    layers = [nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 11)]
    return nn.Sequential(*layers).to(dtype)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random contexts and targets."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randint(0, 11, (9, 3), generator=generator), torch.randint(0, 11, (9,), generator=generator)


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
    ours, theirs = build(), build_torch()
    theirs.load_state_dict(ours.state_dict())
    optimizer, torch_optimizer = optimizers[0](ours.parameters()), optimizers[1](theirs.parameters())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9) for o in (optimizer, torch_optimizer)]
    loss, torch_loss = hg.CrossEntropy(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)
    for x, y in batches(STEPS):
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
        torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_training_moves_every_tensor() -> None:
    """The equality above is none of models that stand still."""
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = hg.TrainStep(model, hg.CrossEntropy(), hg.SGD(model.parameters(), lr=0.5))
    for x, y in batches(STEPS):
        step(x, y)
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


def test_weights_go_to_torch_and_back() -> None:
    """The same keys in the same order, and the same outputs in both modes, from either side."""
    ours, theirs = build(), build_torch()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    step = hg.TrainStep(ours, hg.CrossEntropy(), hg.SGD(ours.parameters(), lr=0.1))
    for x, y in batches(5):
        step(x, y)
    theirs.load_state_dict(ours.state_dict())
    again = build()
    again.load_state_dict(theirs.state_dict())
    x, _ = next(batches(1))
    with torch.no_grad():
        for mode in (False, True):
            expected = theirs.train(mode)(x)
            torch.testing.assert_close(ours.train(mode)(x), expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(again.train(mode)(x), expected, rtol=1e-10, atol=1e-12)


def test_the_initial_weights_are_torchs() -> None:
    """Under the same seed, layer by layer."""
    torch.manual_seed(5)
    theirs = build_torch(torch.float32).state_dict()
    torch.manual_seed(5)
    layers = [hg.Embedding(11, 4), hg.Flatten(), hg.Linear(12, 16), hg.BatchNorm1d(16), hg.Tanh(), hg.Linear(16, 11)]
    ours = hg.Sequential(*layers).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_gain_sets_the_deviation() -> None:
    """Normal weights with deviation gain / sqrt(D_in), zero bias, and nothing from the global generator."""
    state = torch.get_rng_state()
    layer = hg.Linear(400, 300, gain=5 / 3, generator=torch.Generator().manual_seed(3))
    assert float(layer.weight.std()) == pytest.approx(5 / 3 / 20, rel=0.02)
    assert not layer.bias.any()
    assert torch.equal(layer.weight, hg.Linear(400, 300, gain=5 / 3, generator=torch.Generator().manual_seed(3)).weight)
    assert torch.equal(state, torch.get_rng_state())


def test_a_shared_tensor_is_one_parameter() -> None:
    """Listed once, updated once, and its gradients add up, as autograd's do."""
    torch.manual_seed(0)
    a, b = hg.Linear(5, 5, dtype=torch.float64), hg.Linear(5, 5, dtype=torch.float64)
    b.weight = a.weight
    model = hg.Sequential(a, hg.Tanh(), b)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.bias"]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x, dout = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    weight = a.weight.clone().requires_grad_()
    out = torch.tanh(x @ weight.T + a.bias) @ weight.T + b.bias
    out.backward(dout)
    torch.testing.assert_close(model(x), out.detach())
    model.backward(dout)
    torch.testing.assert_close(a.weight.grad, weight.grad)
    before = a.weight.clone()
    hg.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(a.weight, before - 0.1 * weight.grad)


def test_one_layer_in_several_places() -> None:
    """Each backward finds its own forward; the gradients of the uses add up."""
    torch.manual_seed(0)
    cell = hg.Linear(4, 4, dtype=torch.float64)
    model = hg.Sequential(cell, hg.Tanh(), cell, hg.Tanh(), cell)
    x, dout = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    reference = nn.Linear(4, 4, dtype=torch.float64)
    reference.load_state_dict(cell.state_dict())
    wanted = x.clone().requires_grad_()
    reference(torch.tanh(reference(torch.tanh(reference(wanted))))).backward(dout)
    model(x)
    torch.testing.assert_close(model.backward(dout), wanted.grad)
    torch.testing.assert_close(cell.weight.grad, reference.weight.grad)
    assert model.pending == 0


def test_copies_and_pickles_carry_the_layer_without_its_records() -> None:
    """A copy computes the same and waits for nothing; the original still has its record."""
    model = build()
    x, _ = next(batches(1))
    state = copy.deepcopy(model)
    out = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.pending == 0
        assert twin[2].weight is not model[2].weight
        twin.load_state_dict(state.state_dict())
        torch.testing.assert_close(twin(x), out, rtol=0, atol=0)
        twin.backward(torch.ones_like(out))
    model.backward(torch.ones_like(out))
    assert repr(copy.copy(model)) == repr(model)


def test_to_keeps_identity_so_an_optimizer_stays_valid() -> None:
    """Dtypes change, integers stay integers, gradients come along, and the same optimizer goes on."""
    model = build(torch.float32)
    optimizer = hg.SGD(model.parameters(), lr=0.1)
    before = list(model.parameters())
    x, y = next(batches(1))
    loss = hg.CrossEntropy()
    loss(model(x), y)
    model.backward(loss.backward())
    assert model.to(torch.float64) is model
    assert all(p is q for p, q in zip(before, model.parameters()))
    assert all(p.dtype is torch.float64 and p.grad is not None and p.grad.dtype is torch.float64 for p in before)
    assert model[3].num_batches_tracked.dtype is torch.int64
    weight = model[2].weight.clone()
    optimizer.step()
    assert not torch.equal(weight, model[2].weight)
    assert model(x).dtype is torch.float64


def test_no_grad_records_nothing_and_eval_still_records() -> None:
    """Two switches, two meanings."""
    model = build()
    x, _ = next(batches(1))
    with torch.no_grad():
        model(x)
    assert model.pending == 0
    out = model.eval()(x)
    assert model.pending == 7  # six layers and the Sequential itself
    model.backward(torch.ones_like(out))
    assert model.pending == 0


def test_the_first_layer_may_decline_dx() -> None:
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


def test_sequential_is_a_sequence() -> None:
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
