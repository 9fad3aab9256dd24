"""How the process handles memory."""

from __future__ import annotations

import copy
import pickle
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
    CrossEntropy,
    Dropout,
    Embedding,
    Graph,
    Layer,
    Linear,
    LinearCrossEntropy,
    Multiply,
    Parallel,
    Recompute,
    Residual,
    RNNCell,
    SelfAttention,
    Sequential,
    ShapeError,
    StateError,
    Tanh,
    TrainStep,
    Unroll,
    from_torch,
    parameter,
    watch,
)
from handgrad.memory import ONE_BY_ONE
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
    "attention": lambda wrap: Sequential(unsqueeze(), wrap(SelfAttention(6, 2, causal=True)), wrap(GRU(6, 6))),
}


class Lambda(Layer):
    """Two functions."""

    def __init__(self, there, back):
        self.there, self.back = there, back

    def forward(self, x):
        out = self.there(x)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return self.back(dout)


def unsqueeze():
    """A dimension more in front."""
    return Lambda(lambda x: x[None], lambda dout: dout[0])


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


# ---------------------------------------------------------------------- TrainStep(release_gradients=True)


def head_and_table():
    """The table of the embedding is the head's weight, too, so its gradient is complete last."""
    embedding, head = Embedding(6, 8), Linear(8, 6, bias=False)
    head.weight = embedding.weight
    return Sequential(embedding, Linear(8, 8), Tanh(), head)


def partly_frozen():
    model = Sequential(Embedding(6, 8), Linear(8, 8), Tanh(), Linear(8, 6))
    model[1].freeze()
    model.unused = Unused()
    return model


class Unused(Linear):
    """It has parameters, and nobody calls it."""

    def __init__(self):
        super().__init__(2, 2)


class HandTied(Layer):
    """A layer that reads a parameter of a layer inside, before or after that one's backward."""

    def __init__(self, inside_first):
        self.embedding, self.body, self.inside_first = Embedding(6, 8), Linear(8, 8), inside_first

    def forward(self, index):
        h = self.body(self.embedding(index))
        self.push(h, self.embedding.weight, out=(out := h @ self.embedding.weight.t()))
        return out

    def backward(self, dout):
        h, weight = self.pop(dout)
        dh = dout @ weight
        if not self.inside_first:
            self.add_grad(weight, dout.t() @ h)
        self.embedding.backward(self.body.backward(dh))
        if self.inside_first:
            self.add_grad(weight, dout.t() @ h)


class Late(Layer):
    """A layer with a parameter that it still reads after the layers inside had their backward."""

    weight = parameter("D")

    def __init__(self):
        self.weight, self.inside = torch.rand(8), Sequential(Linear(8, 8), Tanh())

    def forward(self, x):
        y = self.inside(x * self.weight)
        self.push(x, y, self.weight, out=(out := y * self.weight))
        return out

    def backward(self, dout):
        x, y, weight = self.pop(dout)
        self.add_grad(weight, (dout * y).sum(0))
        dy = self.inside.backward(dout * weight)
        self.add_grad(weight, (dy * x).sum(0))
        return dy * self.weight


RELEASED = {
    "batch norm": lambda: Sequential(Embedding(6, 8), BatchNorm1d(8), Tanh(), Linear(8, 6)),
    "dropout": lambda: Sequential(Embedding(6, 8), Dropout(0.5), Linear(8, 8), Dropout(0.5), Linear(8, 6)),
    "tied": head_and_table,
    "one layer thrice": lambda: Sequential(Embedding(6, 8), *[Linear(8, 8)] * 3, Linear(8, 6)),
    "one block twice": lambda: Sequential(Embedding(6, 8), *[Sequential(Linear(8, 8), Tanh())] * 2, Linear(8, 6)),
    "nested": lambda: Sequential(Embedding(6, 8), Residual(Sequential(Linear(8, 8), Residual(Linear(8, 8)))), Late()),
    "frozen and unused": partly_frozen,
    "recomputed": lambda: Sequential(
        Embedding(6, 8), *[Recompute(Sequential(Linear(8, 8), BatchNorm1d(8), Dropout(0.1)))] * 2, Recompute(Late())
    ),
    "tied by hand": lambda: HandTied(False),
    "tied by hand, the layer inside first": lambda: HandTied(True),
    "graph": lambda: Graph(
        "x", "out", e=(Embedding(6, 8), "x"), a=(Linear(8, 8), "e"), b=(Late(), "e"), out=(Multiply(), "a b")
    ),
    "recurrent": lambda: Sequential(Embedding(6, 8), unsqueeze(), GRU(8, 6, batch_first=True), first()),
    "unrolled": lambda: Sequential(Embedding(6, 8), unsqueeze(), Unroll(RNNCell(8, 6)), first()),
    "attention": lambda: Sequential(Embedding(6, 8), unsqueeze(), Residual(SelfAttention(8, 2)), first()),
    "torch inside": lambda: Sequential(Embedding(6, 8), from_torch(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)))),
}


def first():
    """Without the dimension that `unsqueeze` puts in front."""
    return Lambda(lambda x: x[0], lambda dout: dout[None])


def trained(make, optimizer, steps=4, **options):
    torch.manual_seed(2)
    model = make()
    opt = optimizer([p for _, p in model.named_parameters()])
    step = TrainStep(model, CrossEntropy(), opt, **options)
    x, y = torch.randint(6, (steps, 7)), torch.randint(6, (steps, 7))
    losses = step.many(x, y)
    assert model.pending == 0
    assert not any(layer._watchers for _, layer in model.named_layers())
    state = opt.state_dict()
    return (
        model,
        [
            losses,
            *model.state_dict().values(),
            torch.get_rng_state(),
            *tensors_in(dict(sorted(state["state"].items()))),
        ],
        state,
    )


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", RELEASED)
def test_releasing_gradients_changes_no_number(name, optimizer):
    _, plain, state = trained(RELEASED[name], OPTIMIZERS[optimizer])
    model, released, other = trained(RELEASED[name], OPTIMIZERS[optimizer], release_gradients=True)
    assert equal(plain, released)
    assert state["param_groups"] == other["param_groups"]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", sorted(ONE_BY_ONE, key=repr), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_releasing_with_every_optimizer(kind):
    """Two groups with options of their own, one of them changed by a scheduler."""

    def make():
        return Sequential(Embedding(6, 8), Linear(8, 8, bias=False), Tanh(), Linear(8, 6, bias=False))

    def optimizer(params):
        opt = kind([{"params": params[1:], "lr": 0.02}, {"params": params[:1], "weight_decay": 0.1}], lr=0.01)
        schedulers.append(torch.optim.lr_scheduler.StepLR(opt, 1))
        return opt

    schedulers: list = []
    assert equal(trained(make, optimizer)[1], trained(make, optimizer, release_gradients=True)[1])
    for scheduler in schedulers:
        scheduler.step()  # warns unless the optimizer had a step


def test_options_of_the_optimizers_work_with_released_gradients():
    for options in ({"amsgrad": True}, {"foreach": True, "weight_decay": 0.1}, {"fused": True}, {"maximize": True}):
        make = lambda params, options=options: torch.optim.AdamW(params, lr=0.01, **options)  # noqa: E731
        plain, released = [trained(RELEASED["tied"], make, release_gradients=on)[1] for on in (False, True)]
        assert equal(plain, released), options


def test_few_gradients_are_there_at_once():
    """When a backward begins, those of the layer before it, and of no earlier one, are."""
    layers = [Linear(5, 5) for _ in range(6)]
    model = Sequential(*layers)
    step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1), release_gradients=True)
    most = []
    with watch(model, dout=lambda *_: most.append(sum(p.grad is not None for p in model.parameters()))):
        step(torch.randn(3, 5), torch.randn(3, 5))
    assert max(most) == 2
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_outside_the_optimizer_is_not_updated_and_its_gradient_is_freed():
    model = Sequential(Linear(3, 3), Linear(3, 3))
    before = model[0].weight.clone()
    step = TrainStep(model, MSE(), SGD(model[1].parameters(), lr=0.1), release_gradients=True)
    step(torch.randn(2, 3), torch.randn(2, 3))
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def test_parameters_of_the_loss_are_updated_too():
    def results(on):
        torch.manual_seed(0)
        embedding = Embedding(6, 8)
        model, loss = Sequential(embedding, Linear(8, 8)), LinearCrossEntropy(8, 6)
        loss.linear.weight = embedding.weight
        opt = SGD({id(p): p for p in [*model.parameters(), *loss.parameters()]}.values(), lr=0.1, momentum=0.9)
        step = TrainStep(model, loss, opt, release_gradients=on)
        losses = step.many(torch.randint(6, (3, 7)), torch.randint(6, (3, 7)))
        return [losses, *model.parameters(), *loss.parameters()]

    assert equal(results(False), results(True))


def test_a_gradient_after_the_update_is_an_error():
    """Which layer uses a parameter of another, nothing declares; that it adds to it too late, is seen."""

    class TooLate(Layer):
        def __init__(self):
            self.first, self.last = Linear(3, 3), Linear(3, 3)

        def forward(self, x):
            out = self.last(self.first(x))
            self.push(x, out=out)
            return out

        def backward(self, dout):
            (x,) = self.pop(dout)
            self.first.backward(self.last.backward(dout))
            self.add_grad(self.last.weight, dout.t() @ x)

    model = TooLate()
    step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1), release_gradients=True)
    problem = r"a gradient of .* comes after the parameter was updated, .*; leave out release_gradients"
    with pytest.raises(StateError, match=problem):
        step(torch.randn(2, 3), torch.randn(2, 3))


def test_a_failure_before_the_backward_changes_nothing():
    model = Sequential(BatchNorm1d(3), Linear(3, 4))
    step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1), release_gradients=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShapeError):
        step(torch.randn(2, 3), torch.randn(2, 3))
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert not any(layer._watchers for _, layer in model.named_layers())


def test_copies_and_pickles_of_a_releasing_step_train_their_own_model():
    model = Sequential(Linear(3, 3), Tanh(), Linear(3, 2))
    step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1, momentum=0.9), release_gradients=True)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    step(x, y)
    others = [copy.deepcopy(step), pickle.loads(pickle.dumps(step))]
    step(x, y)
    for other in others:
        assert not equal([*other.model.parameters()], [*model.parameters()])
        other(x, y)
        for ours, theirs in zip(other.model.parameters(), model.parameters()):
            torch.testing.assert_close(ours, theirs)  # memory at another address may be rounded another way


def test_what_cannot_be_released_is_refused():
    model = Linear(3, 2)

    def step(optimizer=None, **options):
        return TrainStep(model, MSE(), optimizer or SGD(model.parameters()), release_gradients=True, **options)

    with pytest.raises(ArgumentError, match="no max_norm, which needs the gradients of all parameters; choose one"):
        step(max_norm=1.0)
    with pytest.raises(ArgumentError, match="no accumulate, which adds to them in each minibatch; choose one"):
        step(accumulate=2)

    class Mine(SGD):
        pass

    known = "handgrad's SGD, or one of torch.optim but LBFGS and SparseAdam; got Mine"
    with pytest.raises(ArgumentError, match=f"must be known to update each parameter by itself: {known}"):
        step(Mine(model.parameters()))
    for what in ("compile", "export"):
        with pytest.raises(ArgumentError, match=rf"TrainStep.{what}: a program gives all gradients back at its end"):
            getattr(step(), what)(*[None] * 3 if what == "export" else [])
    optimizer = SGD(model.parameters())
    later = step(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    for run in (lambda: step(optimizer), lambda: later(torch.randn(1, 3), torch.randn(1, 2))):
        with pytest.raises(ArgumentError, match="must have no step hooks, for it makes many steps"):
            run()
    assert model.pending == 0


def test_all_frozen_is_an_error_also_when_releasing():
    model = Linear(3, 2).freeze()
    step = TrainStep(model, MSE(), SGD(model.parameters()), release_gradients=True)
    with pytest.raises(StateError, match="no parameter got a gradient, for all are frozen"):
        step(torch.randn(1, 3), torch.randn(1, 2))
