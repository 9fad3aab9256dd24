"""The contract that all layers share: parameters, state, records, copies and conversions, shown on whole models."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

import handgrad as hg


def build(dtype: torch.dtype = torch.float64) -> hg.Sequential:
    """The names MLP, small."""
    return hg.Sequential(
        hg.Embedding(11, 4), hg.Flatten(), hg.Linear(12, 16), hg.BatchNorm1d(16), hg.Tanh(), hg.Linear(16, 11)
    ).to(dtype)


def minibatch() -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts and targets."""
    return torch.randint(11, (9, 3)), torch.randint(11, (9,))


def test_weights_go_to_torch_and_back() -> None:
    """The same keys in the same order, and the same outputs in both modes, from either side."""
    ours = build()
    layers = [nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 11)]
    theirs = nn.Sequential(*layers).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    step = hg.TrainStep(ours, hg.CrossEntropy(), hg.SGD(ours.parameters(), lr=0.1))
    for _ in range(5):
        step(*minibatch())
    theirs.load_state_dict(ours.state_dict())
    again = build()
    again.load_state_dict(theirs.state_dict())
    x, _ = minibatch()
    with torch.no_grad():
        for mode in (False, True):
            expected = theirs.train(mode)(x)
            torch.testing.assert_close(ours.train(mode)(x), expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(again.train(mode)(x), expected, rtol=1e-10, atol=1e-12)


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


def test_copies_and_pickles_carry_the_layer_without_its_records() -> None:
    """A copy computes the same and waits for nothing; the original still has its record."""
    model = build()
    x, _ = minibatch()
    state = copy.deepcopy(model)
    out = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.pending == 0
        assert again[2].weight is not model[2].weight
        again.load_state_dict(state.state_dict())
        torch.testing.assert_close(again(x), out, rtol=0, atol=0)
        again.backward(torch.ones_like(out))
    model.backward(torch.ones_like(out))
    assert repr(copy.copy(model)) == repr(model)


def test_to_keeps_identity_so_an_optimizer_stays_valid() -> None:
    """Dtypes change, integers stay integers, gradients come along, and the same optimizer goes on."""
    model = build(torch.float32)
    optimizer = hg.SGD(model.parameters(), lr=0.1)
    before = list(model.parameters())
    x, y = minibatch()
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
    x, _ = minibatch()
    with torch.no_grad():
        model(x)
    assert model.pending == 0
    out = model.eval()(x)
    assert model.pending == 7  # six layers and the Sequential itself
    model.backward(torch.ones_like(out))
    assert model.pending == 0
