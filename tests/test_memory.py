"""How the process handles memory."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from handgrad import (
    GRU,
    MSE,
    SGD,
    ArgumentError,
    BatchNorm1d,
    Dropout,
    Embedding,
    Graph,
    Layer,
    Linear,
    Multiply,
    Parallel,
    Recompute,
    Residual,
    SelfAttention,
    Sequential,
    ShapeError,
    StateError,
    Tanh,
    TrainStep,
    from_torch,
    watch,
)
from handgrad.records import tensors_in


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_kept_memory_spares_a_step_its_fresh_pages():
    """After the first steps, large tensors hardly cost page faults; and making a TrainStep changes nothing by itself.

    A free piece of memory does not always fit at once, so a later step may still take some.
    """
    code = """
import resource, sys, torch
from handgrad import MSE, SGD, BatchNorm1d, Sequential, Tanh, TrainStep, keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "True":
    assert keep_freed_memory()
model = Sequential(BatchNorm1d(512), Tanh(), BatchNorm1d(512), Tanh())
step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1))
x = torch.randn(20_000, 512)  # 40 MB: malloc by itself gives as much back to the system at once
for _ in range(3):
    step(x, x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step(x, x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for keep in (True, False):
        command = [sys.executable, "-c", code, str(keep)]
        faults[keep] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults[False] > 50_000
    assert faults[True] < faults[False] / 5


# ---------------------------------------------------------------------- Recompute


def twice(make, inputs, wrap, optimizer=lambda params: SGD(params, lr=0.1, momentum=0.9), steps=3, before=None):
    """Every number that training leaves behind: outputs, dx, parameters, buffers, and the state of the generator."""
    torch.manual_seed(1)
    model = make(wrap)
    opt = optimizer(model.parameters())
    seen = []
    for _ in range(steps):
        out = model.forward_at(None, inputs)
        dout = (
            tuple(torch.randn_like(o) for o in out)
            if isinstance(out, tuple)
            else torch.randn(out.shape, dtype=out.dtype)
        )
        dx = model.backward_at(None, dout)
        opt.step()
        seen += [*tensors_in((out, dx))]
        opt.zero_grad()
    assert model.pending == 0
    return [*seen, *model.state_dict().values(), torch.get_rng_state()], [*model.state_dict()]


def tied(wrap):
    linear = Linear(6, 6)
    return Sequential(wrap(Sequential(linear, Tanh())), wrap(Residual(linear)), linear)


def same_block_thrice(wrap):
    return Sequential(*[wrap(Sequential(Linear(6, 6), BatchNorm1d(6), Dropout(0.3), Tanh()))] * 3)


MODELS = {
    "plain": lambda wrap: wrap(Sequential(Linear(6, 9), Tanh(), Linear(9, 6))),
    "batch norm": lambda wrap: Sequential(wrap(Sequential(Linear(6, 6), BatchNorm1d(6), Tanh())), BatchNorm1d(6)),
    "average of all": lambda wrap: wrap(BatchNorm1d(6, momentum=None)),
    "evaluation": lambda wrap: wrap(Sequential(BatchNorm1d(6), Dropout(0.5), Linear(6, 6))).eval(),
    "dropout": lambda wrap: Sequential(wrap(Sequential(Linear(6, 6), Dropout(0.5))), wrap(Dropout(0.2))),
    "own generator": lambda wrap: Sequential(
        *[wrap(Sequential(Dropout(0.5, generator=g), Linear(6, 6))) for g in [torch.Generator().manual_seed(3)] * 2]
    ),
    "tied": tied,
    "one block thrice": same_block_thrice,
    "nested": lambda wrap: wrap(
        Sequential(wrap(Sequential(Linear(6, 6), Dropout(0.5), wrap(BatchNorm1d(6)))), Dropout(0.5), wrap(Linear(6, 6)))
    ),
    "around a graph": lambda wrap: wrap(Graph("x", "out", h=(wrap(Linear(6, 6)), "x"), out=(Multiply(), "x h"))),
    "torch inside": lambda wrap: wrap(
        from_torch(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh()))
    ),
    "attention": lambda wrap: Sequential(Unsqueeze(), wrap(SelfAttention(6, 2, causal=True)), wrap(GRU(6, 6))),
}


class Unsqueeze(Layer):
    """A dimension more."""

    def forward(self, x):
        self.push(out=x[None])
        return x[None]

    def backward(self, dout):
        self.pop(dout)
        return dout[0]


OPTIMIZERS = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_recomputed_is_bit_for_bit_the_body(name, optimizer):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    wanted, keys = twice(MODELS[name], x, lambda body: body, OPTIMIZERS[optimizer])
    found, wrapped = twice(MODELS[name], x, Recompute, OPTIMIZERS[optimizer])
    assert len(wanted) == len(found)
    assert len(keys) == len(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_recompute_takes_and_gives_several():
    def make(wrap):
        return wrap(Parallel(Linear(3, 3), Sequential(Embedding(4, 3), Dropout(0.5))))

    x = torch.randn(5, 3), torch.tensor([0, 3, 3])
    wanted, _ = twice(make, x, lambda body: body)
    found, _ = twice(make, x, Recompute)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))
    layer = Recompute(Multiply())
    out = layer(torch.tensor(2.0), torch.tensor(5.0))
    assert (out, *layer.backward(torch.tensor(1.0))) == (10, 5, 2)


def test_recompute_has_the_keys_of_its_body_under_its_own():
    assert list(Recompute(Linear(2, 3)).state_dict()) == ["body.weight", "body.bias"]


def test_recompute_keeps_its_input_alone():
    """And the copies of the buffers; from the inside nothing."""
    body = Sequential(Linear(10, 50), BatchNorm1d(50), Tanh())
    model = Recompute(body)
    x = torch.randn(4, 10)
    model(x)
    assert model.pending == 1
    assert model.records().bytes == 4 * 10 * 4 + 2 * 50 * 4 + 8
    before = [b.clone() for _, b in body.named_buffers()]
    model.backward(torch.randn(4, 50))
    assert model.pending == 0
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, body.named_buffers()))


def test_recompute_used_twice_before_backward_and_changed_between():
    """Each backward repeats its own forward, whatever modes, options and buffers have become since."""

    def results(wrap):
        torch.manual_seed(4)
        dropout = Dropout(0.5)
        norm = BatchNorm1d(3)
        model = wrap(Sequential(Linear(3, 3), norm, dropout))
        x, y, dout = torch.randn(4, 3), torch.randn(6, 3), torch.randn(6, 3)
        outs = [model(x), model(y)]
        model.eval()
        outs.append(model(y))
        norm.momentum, dropout.p = 0.7, 0.1
        model.train()
        norm.running_mean = torch.full((3,), 5.0)
        outs.append(model(y))
        torch.rand(3)
        dxs = [model.backward(dout), model.backward(dout), model.backward(dout), model.backward(dout[:4])]
        assert (norm.momentum, dropout.p, norm.training) == (0.7, 0.1, True)
        return [*outs, *dxs, *(p.grad for p in model.parameters()), *model.state_dict().values(), torch.rand(3)]

    assert all(torch.equal(a, b) for a, b in zip(results(lambda body: body), results(Recompute)))


@pytest.mark.parametrize("change", ["x", "parameter"])
def test_recompute_refuses_what_has_changed(change):
    model = Recompute(Sequential(Linear(3, 4), Tanh()))
    x = torch.randn(2, 3)
    model(x)
    (x if change == "x" else model.body[0].bias).add_(1)
    with pytest.raises(StateError, match="was changed in place after the forward that recorded it"):
        model.backward(torch.randn(2, 4))
    model.drop_records()
    with pytest.raises(StateError, match="no forward is waiting for a backward"):
        model.backward(torch.randn(2, 4))


def test_recompute_records_nothing_without_gradients():
    model = Recompute(Sequential(Linear(3, 4), BatchNorm1d(4)))
    with torch.no_grad():
        model(torch.randn(2, 3))
    assert model.pending == 0
    assert model.body[1].num_batches_tracked == 1


def test_recompute_runs_backward_without_gradients():
    """A backward does not ask for grad mode, and so the second forward does not either."""
    model = Recompute(Linear(3, 4))
    model(torch.ones(2, 3))
    with torch.no_grad():
        dx = model.backward(torch.ones(2, 4))
    assert torch.equal(dx, torch.ones(2, 4) @ model.body.weight)


def test_recompute_leaves_nothing_behind_when_the_second_forward_fails():
    class Once(Layer):
        calls = 0

        def forward(self, x):
            Once.calls += 1
            if Once.calls == 2:
                raise KeyError("twice")
            torch.rand(1)
            self.push(out=x)
            return x

        def backward(self, dout):
            self.pop(dout)
            return dout

    norm = BatchNorm1d(3)
    model = Recompute(Sequential(norm, Once()))
    model(torch.randn(4, 3))
    mean, buffers, dout, state = norm.running_mean, norm.running_mean.clone(), torch.randn(4, 3), torch.get_rng_state()
    model.eval()
    with pytest.raises(KeyError):
        model.backward(dout)
    assert norm.running_mean is mean
    assert torch.equal(mean, buffers)
    assert torch.equal(state, torch.get_rng_state())
    assert not norm.training


def test_the_second_forward_is_not_watched():
    model = Recompute(Sequential(Linear(3, 4), Tanh()))
    seen = []
    looks = {what: lambda path, layer, t, what=what: seen.append((what, path)) for what in ("out", "dout", "grad")}
    with watch(model, **looks):
        model(torch.randn(2, 3))
        model.backward(torch.randn(2, 4))
    outs = [("out", path) for path in ("body.0", "body.1", "body", "")]
    douts = [("dout", path) for path in ("", "body", "body.1", "body.0")]
    assert seen == [*outs, *douts, ("grad", "body.0.weight"), ("grad", "body.0.bias")]


def test_recompute_names_the_place_of_an_error():
    with pytest.raises(ShapeError, match=r"in body \(Linear\(3 -> 4\)\): .* last dimension of x must be 3"):
        Recompute(Linear(3, 4))(torch.zeros(2, 2))
    with pytest.raises(ArgumentError, match="Recompute: body must be a Layer, got Tensor"):
        Recompute(torch.zeros(1))


def test_a_failed_step_with_recompute_changes_nothing():
    model = Sequential(Recompute(Sequential(BatchNorm1d(3), Linear(3, 3))), Linear(3, 4))
    step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShapeError):
        step(torch.randn(2, 3), torch.randn(2, 3))
    assert model.pending == 0
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_a_compiled_step_takes_recompute_as_its_body():
    def losses(wrap, compiled):
        torch.manual_seed(0)
        model = Sequential(wrap(Sequential(Linear(3, 8), BatchNorm1d(8), Dropout(0.5), Tanh())), Linear(8, 2))
        step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1))
        x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
        return (step.compile(progress=False) if compiled else step).many(x, y)

    assert torch.equal(losses(Recompute, True), losses(lambda body: body, True))
