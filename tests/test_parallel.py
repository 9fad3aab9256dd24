"""Several processes take the step of one on the joined minibatch; and what one of them gets wrong, all are told."""

from __future__ import annotations

import copy
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import handgrad as hg
from handgrad import (
    MSE,
    SGD,
    ArgumentError,
    BatchNorm1d,
    CompileError,
    CrossEntropy,
    Embedding,
    Flatten,
    Linear,
    ProcessError,
    Sequential,
    StateError,
    SyncBatchNorm,
    Tanh,
    TrainStep,
    average_gradients,
    broadcast_model,
    to_torch,
)
from handgrad.parallel import Processes
from tests.processes import results, together

V = 5
GRADIENT, WEIGHT = 1e-13, 1e-12  # how far from one process, in float64: gradients, and weights after 20 steps


class Sometimes(hg.Layer):
    """A bias that only rows above 0 reach; of none it gets no gradient at all."""

    bias = hg.parameter("D")

    def __init__(self, D):
        self.bias = torch.ones(D)

    def forward(self, x):
        used = (x > 0).any(1)
        out = x + used[:, None] * self.bias
        self.push(used, out=out)
        return out

    def backward(self, dout):
        (used,) = self.pop(dout)
        if used.any():
            self.add_grad(self.bias, dout[used].sum(0))
        return dout


def mlp(norm=None):
    g = torch.Generator().manual_seed(0)
    layers = [Embedding(V, 3, generator=g), Flatten(), Linear(6, 8, generator=g), norm or Tanh(), Tanh()]
    return Sequential(*layers, Linear(8, V, generator=g)).to(torch.float64)


def tied():
    g = torch.Generator().manual_seed(0)
    table, head = Embedding(V, 4, generator=g), Linear(4, V, bias=False, generator=g)
    head.weight = table.weight
    return Sequential(table, hg.SelfAttention(4, 2, generator=g), Flatten(0, 1), head).to(torch.float64)


def frozen():
    model = mlp()
    model[2].freeze()
    return model


def gru():
    g = torch.Generator().manual_seed(0)
    layers = [Embedding(V, 4, generator=g), hg.GRU(4, 8, batch_first=True, generator=g), Flatten(0, 1)]
    return Sequential(*layers, Linear(8, V, generator=g)).to(torch.float64)


def sometimes():
    g = torch.Generator().manual_seed(0)
    layers = [Embedding(V, 3, generator=g), Flatten(), Sometimes(6), Linear(6, V, generator=g)]
    unused = Linear(2, 2, generator=g)
    model = Sequential(*layers).to(torch.float64)
    model.beside = unused.to(torch.float64)  # found among the parameters, and used by nobody
    return model


def unused():
    """A layer between others that holds a parameter of no use."""
    model = mlp()
    model.layers.insert(3, Idle())
    return model.to(torch.float64)


class Idle(hg.Layer):
    """The identity, beside a parameter that has no gradient."""

    weight = hg.parameter("D")

    def __init__(self):
        self.weight = torch.ones(3)

    def forward(self, x):
        self.push(out=x)
        return x

    def backward(self, dout):
        self.pop(dout)
        return dout


def norm_over_places():
    """Statistics over the rows and the places, channels last."""
    g = torch.Generator().manual_seed(0)
    layers = [Embedding(V, 4, generator=g), SyncBatchNorm(4, momentum=None, unbiased=True, channels_last=True)]
    return Sequential(*layers, Flatten(), Linear(8, V, generator=g)).to(torch.float64)


# name: model, loss, whether each row has two targets, options of TrainStep
SCENARIOS = {
    "mlp": (mlp, CrossEntropy, False, {}),
    "clipping": (mlp, CrossEntropy, False, {"max_norm": 0.05}),
    "accumulation": (mlp, CrossEntropy, False, {"accumulate": 3}),
    "a sum": (mlp, lambda: CrossEntropy(reduction="sum"), False, {"accumulate": 2, "max_norm": 1.0}),
    "ignored rows": (mlp, lambda: CrossEntropy(ignore_index=1), False, {}),
    "class weights": (mlp, lambda: CrossEntropy(torch.rand(V, dtype=torch.float64) + 0.5), False, {}),
    "tied": (tied, CrossEntropy, True, {"accumulate": 2}),
    "gru": (gru, CrossEntropy, True, {}),
    "frozen": (frozen, CrossEntropy, False, {}),
    "unused": (unused, CrossEntropy, False, {"max_norm": 0.05}),
    "batch norm": (lambda: mlp(SyncBatchNorm(8)), CrossEntropy, False, {}),
    "batch norm, accumulation": (norm_over_places, CrossEntropy, False, {"accumulate": 2, "max_norm": 0.5}),
}
ROWS = 12
STEPS = 20


def cuts(world, how):
    """Where the parts of the rows begin and end."""
    if how == "even":
        return [ROWS * r // world for r in range(world + 1)]
    if how == "uneven":
        return [0, *[min(ROWS - 1, 1 + 2 * r * r) for r in range(1, world)], ROWS]
    return [0] * world + [ROWS]  # all but the last are empty


def data(scenario):
    _, _, places, options = SCENARIOS[scenario]
    g, A = torch.Generator().manual_seed(1), options.get("accumulate", 1)
    x = torch.randint(V, (STEPS, A, ROWS, 2), generator=g)
    y = torch.randint(V, (STEPS, A, ROWS, 2) if places else (STEPS, A, ROWS), generator=g)
    return x, y


def trained(rank, world, scenario, how, group=None):
    """The first gradients, the losses and the model after 20 steps on this process's part."""
    make, make_loss, _, options = SCENARIOS[scenario]
    torch.manual_seed(0)
    model, loss = make(), make_loss()
    step = TrainStep(
        model, loss, SGD(model.parameters(), lr=0.1, momentum=0.9), **options, process_group=group, joined_loss=True
    )
    parts = cuts(world, how)
    x, y = (t[:, :, parts[rank] : parts[rank + 1]] for t in data(scenario))
    y = y.flatten(2)
    if "accumulate" not in options:
        x, y = x[:, 0], y[:, 0]
    losses, grads = [], None
    for k in range(STEPS):
        losses.append(step(x[k], y[k]))
        if grads is None:
            grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return grads, torch.stack(losses), model.state_dict()


def all_of(rank, world, names, ways):
    return {(name, how): trained(rank, world, name, how, True) for name in names for how in ways}


def compare(found, world):
    """Hold every process against one; the largest differences of gradients and of weights."""
    worst = [0.0, 0.0]
    for result in found:
        for (name, how), (grads, losses, state) in result.items():
            expected_grads, expected_losses, expected_state = trained(0, 1, name, "even")
            assert [g is None for g in grads] == [g is None for g in expected_grads], (name, how)
            for g, e in zip(grads, expected_grads):
                if g is not None:
                    worst[0] = max(worst[0], float((g - e).abs().max()))
                    assert g.untyped_storage().nbytes() == g.nbytes  # no view of a bucket
            for key, tensor in state.items():
                worst[1] = max(worst[1], float((tensor - expected_state[key]).abs().max()))
            assert float((losses - expected_losses).abs().max()) < WEIGHT, (name, how)
            assert worst[0] < GRADIENT, (name, how, worst)
            assert worst[1] < WEIGHT, (name, how, worst)
            assert all(state[key].equal(found[0][name, how][2][key]) for key in state)  # alike to the bit
    return worst


def test_two_processes_take_the_step_of_one():
    compare(results(2, all_of, ["mlp", "batch norm"], ["uneven"]), 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_so_many_processes_take_the_step_of_one(world):
    worst = compare(results(world, all_of, list(SCENARIOS), ["even", "uneven", "empty"]), world)
    print(f"{world} processes: gradients within {worst[0]:.1e}, weights within {worst[1]:.1e}")


# ---------------------------------------------------------------------- a loop of one's own


def by_hand(rank, world, how):
    model, loss = sometimes(), CrossEntropy()
    if rank > 0:
        for p in model.parameters():
            p.zero_()
    broadcast_model(model)
    x, y = data("mlp")
    a, b = cuts(world, how)[rank : rank + 2]
    optimizer, first = SGD(model.parameters(), lr=0.1), None
    for k in range(STEPS):
        optimizer.zero_grad()
        loss(model(x[k, 0, a:b]), y[k, 0, a:b])
        model.backward(loss.backward())
        if world > 1:
            average_gradients(model, rows=b - a)
        first = first or {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return first, model.state_dict()


def averaged_in_small_buckets(rank, world):
    import handgrad.parallel

    found = {how: by_hand(rank, world, how) for how in ("even", "uneven", "empty")}
    handgrad.parallel.BUCKET = 100
    return found, by_hand(rank, world, "uneven")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_average_gradients_between_backward_and_update(world):
    """A parameter that one process alone has a gradient of gets it everywhere; one that nobody has stays None."""
    expected, weights = by_hand(0, 1, "even")
    assert expected["beside.weight"] is None
    for found, small in results(world, averaged_in_small_buckets):
        for first, state in (*found.values(), small):
            for name, e in expected.items():
                assert (first[name] is None) == (e is None), name
                if e is not None:
                    assert float((first[name] - e).abs().max()) < GRADIENT
            assert all(float((state[key] - w).abs().max()) < WEIGHT for key, w in weights.items())
