"""Several processes take the step of one on the joined minibatch; and what one of them gets wrong, all are told."""

from __future__ import annotations

import copy
import functools
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
from tests.processes import results, together
from tests.versions import COMPILES

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
    layers = [Embedding(V, 3, generator=g), Flatten(), Sometimes(6), Idle(), Linear(6, V, generator=g)]
    return Sequential(*layers).to(torch.float64)


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


def trained(rank, world, scenario, how, group=None, compiled=False):
    """The first gradients, the losses and the model after 20 steps on this process's part, the latter 10 by `many`."""
    make, make_loss, _, options = SCENARIOS[scenario]
    torch.manual_seed(0)
    model, loss = make(), make_loss()
    step = TrainStep(
        model, loss, SGD(model.parameters(), lr=0.1, momentum=0.9), **options, process_group=group, joined_loss=True
    )
    step = step.compile() if compiled else step
    parts = cuts(world, how)
    x, y = (t[:, :, parts[rank] : parts[rank + 1]] for t in data(scenario))
    y = y.flatten(2)
    if "accumulate" not in options:
        x, y = x[:, 0], y[:, 0]
    losses, grads = [], None
    for k in range(STEPS // 2):
        losses.append(step(x[k], y[k]))
        if grads is None:
            grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    losses += step.many(x[STEPS // 2 :], y[STEPS // 2 :])
    return grads, torch.stack(losses), model.state_dict()


@functools.cache
def alone(scenario):
    return trained(0, 1, scenario, "even")


def all_of(rank, world, names, ways, compiled=False):
    return {(name, how): trained(rank, world, name, how, True, compiled) for name in names for how in ways}


def compare(found, world, compiled=False):
    """Hold every process against one; the largest differences of gradients and of weights."""
    worst = [0.0, 0.0]
    for result in found:
        for (name, how), (grads, losses, state) in result.items():
            expected_grads, expected_losses, expected_state = alone(name)
            assert [g is None for g in grads] == [g is None for g in expected_grads], (name, how)
            for g, e in zip(grads, expected_grads):
                if g is not None:
                    worst[0] = max(worst[0], float((g - e).abs().max()))
                    assert compiled or g.untyped_storage().nbytes() == g.nbytes  # no view of a bucket
            for key, tensor in state.items():
                worst[1] = max(worst[1], float((tensor - expected_state[key]).abs().max()))
            assert float((losses - expected_losses).abs().max()) < WEIGHT, (name, how)
            assert worst[0] < GRADIENT, (name, how, worst)
            assert worst[1] < WEIGHT, (name, how, worst)
            assert all(state[key].equal(found[0][name, how][2][key]) for key in state)  # alike to the bit
    return worst


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize(
    ("world", "names", "ways"),
    [
        (1, ["mlp"], ["even"]),
        (2, ["mlp", "clipping", "accumulation"], ["even", "uneven", "empty"]),
        (2, ["a sum", "ignored rows", "tied", "frozen"], ["uneven"]),
        (3, ["mlp", "clipping", "accumulation"], ["even", "uneven", "empty"]),
    ],
)
def test_compiled_they_take_it_too(world, names, ways):
    compare(results(world, all_of, names, ways, True, timeout=200, limit=500), world, compiled=True)


@pytest.mark.slow
@COMPILES
@pytest.mark.usefixtures("alone_in_a_group")
def test_a_compiled_one_is_traced_once_and_a_copy_trains_the_copy(capsys):
    model = mlp()
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1, momentum=0.9), process_group=True)
    step = step.compile(progress=True)
    x, y = torch.ones(4, 2, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    losses = [step(x, y) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert capsys.readouterr().err.count("tracing") == 1
    before = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(step)
    expected = step(x, y)
    assert twin(x, y).equal(expected)
    assert twin.model is not model
    assert all(t.equal(twin.model.state_dict()[key]) for key, t in model.state_dict().items())
    assert not model[2].weight.equal(before["2.weight"])


@pytest.mark.slow
@COMPILES
@pytest.mark.usefixtures("alone_in_a_group")
def test_a_compiled_one_accumulates_minibatches_of_unequal_size():
    """The second is traced while the gradients of the first are there."""
    x, y = torch.arange(8).view(4, 2) % V, torch.arange(4)
    states = []
    for compiled in (False, True):
        model = mlp()
        step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1), process_group=True, accumulate=2)
        step = step.compile() if compiled else step
        step([x, x[:3]], [y, y[:3]])
        states.append(model.state_dict())
    assert all(float((t - states[1][key]).abs().max()) < WEIGHT for key, t in states[0].items())


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
    if world > 1:
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
    assert expected["3.weight"] is None
    for found, small in results(world, averaged_in_small_buckets):
        for first, state in (*found.values(), small):
            for name, e in expected.items():
                assert (first[name] is None) == (e is None), name
                if e is not None:
                    assert float((first[name] - e).abs().max()) < GRADIENT
            assert all(float((state[key] - w).abs().max()) < WEIGHT for key, w in weights.items())


# ---------------------------------------------------------------------- what goes wrong


def test_without_a_process_group():
    model = mlp()
    text = r": torch\.distributed has no process group; call torch\.distributed\.init_process_group first, in every pro"
    with pytest.raises(StateError, match="average_gradients" + text):
        average_gradients(model, 3)
    with pytest.raises(StateError, match="broadcast_model" + text):
        broadcast_model(model)
    with pytest.raises(StateError, match="TrainStep" + text):
        TrainStep(model, CrossEntropy(), SGD(model.parameters()), process_group=True)
    with pytest.raises(StateError, match="SyncBatchNorm" + text):
        SyncBatchNorm(3, process_group=object())


@pytest.fixture
def alone_in_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_arguments(monkeypatch):
    model = mlp()
    for rows in (-1, True, "3", float("nan"), float("inf")):
        with pytest.raises(ArgumentError, match="average_gradients: rows must be a number from 0 on, got"):
            average_gradients(model, rows)
    text = r"the process group must be one of torch\.distributed, and this process be in it; got 3"
    with pytest.raises(ArgumentError, match=text):
        average_gradients(model, 1, 3)
    with pytest.raises(ArgumentError, match=text):
        TrainStep(model, CrossEntropy(), SGD(model.parameters()), process_group=3)
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1), process_group=True)
    text = "messages to other processes are no part of a program; use the step as it is, or without a "
    joined = TrainStep(norm := mlp(SyncBatchNorm(8)), CrossEntropy(), SGD(norm.parameters()), process_group=True)
    with pytest.raises(CompileError, match=r"TrainStep\.compile: " + text + "SyncBatchNorm"):
        joined.compile()
    x, y = torch.ones(4, 2, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    with pytest.raises(CompileError, match=r"TrainStep\.export: " + text + "process_group"):
        step.export("step", x, y)
    twin = copy.deepcopy(step)
    assert step(x, y).equal(twin(x, y))
    assert twin.model is not model
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    text = "the backend of the process group, nccl, takes tensors on cuda, got one on cpu; move the model there, or "
    with pytest.raises(ArgumentError, match=text + r"choose another backend \(on a CPU gloo\)"):
        broadcast_model(model)
    with pytest.raises(ArgumentError, match="average_gradients: " + text):
        average_gradients(model, 3)


def test_several_losses_weigh_by_rows():
    """There is one share for all of them: where they do not agree on it, that is said."""
    both = hg.Losses(CrossEntropy(), MSE())
    assert both.divisor((torch.tensor([1, 2, 0]), torch.zeros(3, 2))) == 3
    for wrong in (hg.Losses(MSE(), CrossEntropy(ignore_index=0)), hg.Losses(MSE(reduction="sum"), CrossEntropy())):
        with pytest.raises(
            ArgumentError, match="each loss must be a mean over all rows, without class weights, and no"
        ):
            wrong.divisor((torch.zeros(3, 2), torch.tensor([1, 2, 0])))


def test_what_a_mean_divides_by():
    assert MSE().divisor(torch.zeros(3, 7)) == 3
    assert MSE().divisor((torch.zeros(4, 7), None)) == 4
    assert MSE().divisor(torch.tensor(1.0)) == 1
    assert CrossEntropy().divisor(torch.tensor([[1, -100], [2, 3]])) == 3
    assert CrossEntropy().divisor(torch.rand(2, 3)) == 2
    assert CrossEntropy(torch.tensor([1.0, 3.0])).divisor(torch.tensor([1, 1, 0, -100])) == 7
    with pytest.raises(hg.IndexRangeError, match=r"targets must be in 0\.\.1"):
        CrossEntropy(torch.ones(2)).divisor(torch.tensor([2]))


def differing(rank, world):
    found = []
    for make in (
        lambda: Linear(3, 4 + rank),
        lambda: Linear(3, 4, bias=rank == 0),
        lambda: Linear(3, 4, dtype=torch.float64 if rank == 1 else None),
    ):
        try:
            broadcast_model(make())
        except ArgumentError as error:
            found.append(str(error))
    model = Linear(3, 4)
    try:
        TrainStep(model, MSE(), SGD(model.parameters()), accumulate=1 + rank, process_group=True)
    except ArgumentError as error:
        found.append(str(error))
    return found


def refusing(rank, world, compiled):
    """The second process is given a target that is no class, and then a wrong shape; then all go on."""
    model, found = mlp(hg.BatchNorm1d(8)), []
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1), process_group=True)
    step = step.compile() if compiled else step
    before = {key: t.clone() for key, t in model.state_dict().items()}
    x, y = torch.arange(8).view(4, 2) % V, torch.ones(4, dtype=torch.int64)
    for wrong in (y + 7, y[:3], y.double(), "y"):
        try:
            step(x, wrong if rank == 1 else y)
        except hg.HandgradError as error:
            found.append(f"{type(error).__name__}: {error}")
        assert all(t.equal(before[key]) for key, t in model.state_dict().items())
        assert model.pending == 0
    step(x, y)
    assert not model[2].weight.equal(before["2.weight"])
    return found


def dying(rank, world, how, compiled=False):
    model = mlp(SyncBatchNorm(8) if how == "refuses" else None)
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1), process_group=True)
    step = step.compile() if compiled else step
    x, y = torch.ones(4, 2, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
    step(x, y)
    if rank == 1:
        if how == "ends":
            os._exit(1)
        if how == "refuses":
            step(x, y + 7)
        time.sleep(10)
    begun = time.monotonic()
    try:
        step(x, y)
    except ProcessError as error:
        return str(error), time.monotonic() - begun


@pytest.mark.slow
def test_different_models_are_an_error_in_every_process():
    first, second = results(2, differing)
    assert first == second
    text = "broadcast_model: all processes must have the same model and options; got "
    assert first[:3] == [
        text + "weight (4, 3) torch.float32 in process 0 and weight (5, 3) torch.float32 in process 1",
        text + "bias (4,) torch.float32 in process 0 and no bias in process 1",
        text + "weight (4, 3) torch.float32 in process 0 and weight (4, 3) torch.float64 in process 1",
    ]
    assert first[3].startswith("TrainStep: all processes must have the same model and options; got accumulate 1 in")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILES)])
def test_a_step_that_fails_in_one_process_changes_nothing_in_any(compiled):
    others, own = results(2, refusing, compiled, timeout=200)
    text = "ProcessError: TrainStep: another process failed in this step, and nothing has changed; see its error"
    assert others == [text] * 4
    assert [text.split(":")[0] for text in own] == ["IndexRangeError", "ShapeError", "DtypeError", "DtypeError"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "hangs", "refuses"])
def test_a_process_that_does_not_come_is_an_error(how):
    """At once where it has ended, else after the time limit of the group."""
    found = together(2, dying, how, timeout=3)
    text, seconds = found[0]
    assert "another process has ended, does something else, or did not come within the time limit of the group" in text
    assert seconds < (2 if how == "ends" else 6)
    assert found[1] is None or how != "ends"


@pytest.mark.slow
@COMPILES
@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_a_process_that_does_not_come_is_an_error_compiled_too(how):
    together(1, dying, "", True)  # so that the program is in the cache
    text, seconds = together(2, dying, how, True, timeout=8)[0]
    assert "another process has ended, does something else, or did not come within the time limit of the group" in text
    assert seconds < (4 if how == "ends" else 12)


# ---------------------------------------------------------------------- what torch has


def sharded(rank, world, optimizer, options):
    """With a ZeroRedundancyOptimizer, and without: the same weights, the state divided."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    states = []
    x, y = (t[:, 0, rank::world] for t in data("mlp"))
    for divided in (False, True):
        model = mlp()
        if divided:
            opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optimizer, **options)
        else:
            opt = optimizer(model.parameters(), **options)
        step = TrainStep(model, CrossEntropy(), opt, process_group=True)
        for k in range(STEPS):
            step(x[k], y[k])
        states.append(model.state_dict())
    kept = len(opt.optim.state)
    return states, kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_an_optimizer_whose_state_is_divided(optimizer, options):
    found = results(2, sharded, optimizer, options)
    for (plain, divided), kept in found:
        assert all(divided[key].equal(plain[key]) for key in plain)
        assert 0 < kept < 5
    assert sum(kept for _, kept in found) == 5


def distributed(rank, world, scenario):
    """By DistributedDataParallel around the model as a torch module, layer by layer and as a whole."""
    make, make_loss, _, _ = SCENARIOS[scenario]
    x, y = (t[:, 0, rank::world] for t in data(scenario))
    found = []
    for layer_by_layer in (False, True):
        model, loss = make(), to_torch(make_loss())
        module = nn.parallel.DistributedDataParallel(to_torch(model, layer_by_layer=layer_by_layer))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for k in range(STEPS):
            optimizer.zero_grad()
            loss(module(x[k]), y[k].flatten()).backward()
            optimizer.step()
        found.append({key: t.clone() for key, t in model.state_dict().items()})
    return found


def stepped_alone(scenario):
    make, make_loss, _, _ = SCENARIOS[scenario]
    model = make()
    step = TrainStep(model, make_loss(), SGD(model.parameters(), lr=0.1, momentum=0.9))
    x, y = data(scenario)
    for k in range(STEPS):
        step(x[k, 0], y[k, 0].flatten())
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["mlp", "tied", "batch norm", "gru"])
def test_distributed_data_parallel_through_to_torch(scenario):
    expected = stepped_alone(scenario)
    for states in results(2, distributed, scenario):
        for state in states:
            assert max(float((state[key] - e).abs().max()) for key, e in expected.items()) < WEIGHT
