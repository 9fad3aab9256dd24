"""TrainStep: the same result as the steps written out, eager, many at once, and compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.torch_version import TorchVersion

import handgrad as hg
from handgrad import (
    MSE,
    SGD,
    Add,
    ArgumentError,
    BatchNorm1d,
    CompileError,
    CrossEntropy,
    DtypeError,
    Embedding,
    Flatten,
    Graph,
    IndexRangeError,
    Layer,
    Linear,
    Losses,
    Sequential,
    ShapeError,
    StateError,
    Tanh,
    TrainStep,
)
from handgrad.program import Program, Stage, Traced, _Loop
from tests.versions import COMPILES

STEPS, BATCH, VOCABULARY = 7, 6, 5


def make_model(seed: int = 0) -> Sequential:
    g = torch.Generator().manual_seed(seed)
    layers = Embedding(VOCABULARY, 3, generator=g), Flatten(), Linear(6, 8, generator=g), BatchNorm1d(8), Tanh()
    return Sequential(*layers, Linear(8, VOCABULARY, generator=g)).to(torch.float64)


def make_images() -> Sequential:
    layers = [hg.Conv2d(2, 4, 3, padding=1), hg.BatchNorm2d(4), hg.Upsample(scale_factor=2), hg.GroupNorm(2, 4)]
    layers += [hg.ConvTranspose2d(4, 3, 4, 2, 1), hg.AdaptiveAvgPool2d(1), Flatten(), Linear(3, VOCABULARY)]
    return Sequential(*layers)


class Padded(Layer):
    """Attention of x to itself, whose last step is padding; in the first row, all are."""

    def __init__(self) -> None:
        self.attention = hg.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[:, -1] = padded[0] = True
        out = self.attention(x, x, x, key_padding_mask=padded)
        self.push(out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        self.pop(dout)
        dquery, dkey, dvalue = self.attention.backward(dout)
        return dquery + dkey + dvalue


def make_data(steps: int = STEPS, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    xs = torch.randint(VOCABULARY, (steps, batch, 2), generator=g)
    return xs, torch.randint(VOCABULARY, (steps, batch), generator=g)


def make_step(model: Layer, make_optimizer: Callable[..., torch.optim.Optimizer] = SGD, **options: Any) -> TrainStep:
    return TrainStep(model, CrossEntropy(), make_optimizer(model.parameters(), **{"lr": 0.1, **options}))


def assert_same_state(a: Layer, b: Layer, exact: bool = False) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **tolerance)


def test_a_step_is_forward_loss_backward_and_update():
    a, b = make_model(), make_model()
    xs, targets = make_data()
    step, loss = make_step(a, momentum=0.9), CrossEntropy()
    optimizer = SGD(b.parameters(), lr=0.1, momentum=0.9)
    for x, target in zip(xs, targets):
        value = step(x, target)
        expected = loss(b(x), target)
        b.zero_grad()
        b.backward(loss.backward())
        optimizer.step()
        assert value == expected
    assert_same_state(a, b, exact=True)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p.grad, q.grad)  # they stay after the update


def test_many_is_the_steps_in_a_row_exactly():
    a, b = make_model(), make_model()
    xs, targets = make_data()
    one, many = make_step(a), make_step(b)
    expected = [one(x, target) for x, target in zip(xs, targets)]
    assert torch.equal(torch.stack(expected), many.many(xs, targets))
    assert_same_state(a, b, exact=True)


@pytest.mark.parametrize("counts", [(2, 3), (0, 0)])
def test_many_refuses_unequal_or_no_minibatches(counts):
    xs, targets = make_data()
    with pytest.raises(ShapeError, match="xs and targets must hold K minibatches each"):
        make_step(make_model()).many(xs[: counts[0]], targets[: counts[1]])


def make_pair_step():
    """A model of two inputs with two outputs, and a loss for each."""
    torch.manual_seed(2)
    model = Graph(
        "x t", "a b", h=(Linear(3, 4), "x"), e=(Embedding(5, 4), "t"), a=(Add(), "h e"), b=(Linear(4, 2), "a")
    )
    model.to(torch.float64)
    return TrainStep(model, Losses(MSE(), CrossEntropy()), SGD(model.parameters(), lr=0.1, momentum=0.9))


def make_pairs():
    """Four minibatches of them, each part with the four in front."""
    xs = torch.randn(4, 6, 3, dtype=torch.float64), torch.randint(5, (4, 6))
    return xs, (torch.randn(4, 6, 4, dtype=torch.float64), torch.randint(2, (4, 6)))


def test_a_tuple_is_several_inputs_and_a_list_several_minibatches():
    (x, t), (y, label) = xs, targets = make_pairs()
    one, many, listed = make_pair_step(), make_pair_step(), make_pair_step()
    expected = torch.stack([one((x[k], t[k]), (y[k], label[k])) for k in range(4)])
    assert torch.equal(many.many(xs, targets), expected)
    pairs = [(x[k], t[k]) for k in range(4)], [(y[k], label[k]) for k in range(4)]
    assert torch.equal(listed.many(*pairs), expected)
    for step in (many, listed):
        assert_same_state(step.model, one.model, exact=True)
    with pytest.raises(ShapeError, match=r"got 4 and 4 and 3 and 4 \(a tuple stands for several inputs, a list for K"):
        many.many(xs, (y[:3], label))
    with pytest.raises(ShapeError, match=r"takes 2 inputs, x, t, one by one or as a tuple, got 3"):
        one((x[0], t[0], t[0]), (y[0], label[0]))


def test_a_wholly_frozen_model_is_refused():
    model = make_model().freeze()
    xs, targets = make_data()
    with pytest.raises(
        StateError, match=r"no parameter got a gradient, for all are frozen; unfreeze\(\) what is to be"
    ):
        make_step(model)(xs[0], targets[0])
    assert model.pending == 0


def test_a_loss_without_reduction_is_refused():
    model = make_model()
    with pytest.raises(ArgumentError, match="the loss must be one number"):
        TrainStep(model, CrossEntropy(reduction="none"), SGD(model.parameters()))


def test_leftover_records_are_refused_and_the_message_says_what_to_do():
    model = make_model()
    step, (xs, targets) = make_step(model), make_data()
    model(xs[0])
    with pytest.raises(StateError, match=r"1 earlier forward.* evaluate under torch.no_grad"):
        step(xs[0], targets[0])
    model.drop_records()
    step(xs[0], targets[0])


def test_an_error_leaves_no_record_behind():
    model = make_model()
    step, (xs, targets) = make_step(model), make_data()
    with pytest.raises(ShapeError):
        step(xs[0], targets[0, 1:])
    assert model.pending == 0
    step(xs[0], targets[0])


class Refuses(Layer):
    """Raises in its forward or its backward, if told to."""

    when = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "forward":
            raise KeyboardInterrupt
        self.push(out=x)
        return x

    def backward(self, dout: Tensor) -> Tensor:
        if self.when == "backward":
            raise RuntimeError("told to")
        self.pop(dout)
        return dout


def make_fragile() -> Sequential:
    """With running statistics before what may refuse, of handgrad and of torch, and in a part that is constant."""
    torch.manual_seed(0)
    inner = hg.from_torch(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)))
    body = hg.Constant(Sequential(Linear(3, 8), BatchNorm1d(8, momentum=None)))
    return Sequential(body, inner, Refuses(), BatchNorm1d(8), Linear(8, VOCABULARY))


def full_state(step: TrainStep) -> list[Tensor]:
    momentum = [t for state in step.optimizer.state.values() for t in state.values()]
    return [t.clone() for t in (*step.model.state_dict().values(), *momentum)]


def spoil_label(step: TrainStep, x: Tensor, target: Tensor) -> Any:
    target = target.clone()
    target[-1] = VOCABULARY
    return step(x, target)


def spoil_shape(step: TrainStep, x: Tensor, target: Tensor) -> Any:
    return step(x, target[1:])


def spoil_layer(step: TrainStep, x: Tensor, target: Tensor) -> Any:
    step.model.layers[4], kept = Linear(7, VOCABULARY).to(x.dtype), step.model.layers[4]
    try:
        return step(x, target)
    finally:
        step.model.layers[4] = kept


def spoil_run(when: str) -> Callable[[TrainStep, Tensor, Tensor], Any]:
    def spoil(step: TrainStep, x: Tensor, target: Tensor) -> Any:
        step.model.layers[2].when = when
        try:
            return step(x, target)
        finally:
            step.model.layers[2].when = ""

    return spoil


SPOILS: dict[str, tuple[Callable[[TrainStep, Tensor, Tensor], Any], type[BaseException]]] = {
    "label": (spoil_label, IndexRangeError),
    "target": (spoil_shape, ShapeError),
    "layer": (spoil_layer, ShapeError),
    "interruption": (spoil_run("forward"), KeyboardInterrupt),
    "backward": (spoil_run("backward"), RuntimeError),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_step_that_fails_changes_no_parameter_buffer_or_momentum(name):
    spoil, error = SPOILS[name]
    step = make_step(make_fragile(), momentum=0.9)
    x, target = torch.randn(BATCH, 3), torch.randint(VOCABULARY, (BATCH,))
    for dtype in (torch.float32, torch.float64):  # the step follows a conversion
        step.model.to(dtype)
        for t in step.optimizer.state.values():
            t["momentum_buffer"] = t["momentum_buffer"].to(dtype)
        step(x.to(dtype), target)
        before, mean = full_state(step), step.model[3].running_mean.clone()
        assert sum(b.is_floating_point() for b in step.buffers.tensors) == 6
        with pytest.raises(error):
            spoil(step, x.to(dtype), target)
        torch.testing.assert_close(full_state(step), before, rtol=0, atol=0)
        assert step.model.pending == step.loss.pending == 0
        step(x.to(dtype), target)
        assert not torch.equal(step.model[3].running_mean, mean)


def test_buffers_that_nothing_changes_are_not_copied():
    module = torch.nn.Linear(3, 2)
    module.weight.requires_grad_(False)
    layer = hg.from_torch(module)
    step = TrainStep(layer, MSE(), SGD(layer.parameters()))
    assert [name for name, _ in layer.named_buffers()] == ["weight"]
    assert step.buffers.tensors == []


@pytest.mark.parametrize("make", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["copy", "pickle"])
def test_a_copy_of_a_step_trains_the_copy(make):
    step, (xs, targets) = make_step(make_model(), momentum=0.9), make_data()
    step(xs[0], targets[0])
    before = full_state(step)
    twin = make(step)
    assert_trains_alone(step, twin, before)


def assert_trains_alone(step: TrainStep, twin: TrainStep, before: list[Tensor]) -> None:
    xs, targets = make_data()
    losses = twin.many(xs, targets)
    torch.testing.assert_close(full_state(step), before, rtol=0, atol=0)
    torch.testing.assert_close(step.many(xs, targets), losses)
    torch.testing.assert_close(full_state(step), full_state(twin))


@pytest.mark.parametrize("together", [True, False], ids=["one step", "two steps"])
def test_steps_of_one_model_in_several_threads_follow_each_other_or_are_refused(together):
    model, (xs, targets) = make_model(), make_data()
    steps = [make_step(model, lr=0.01)] * 2 if together else [make_step(model, lr=0.01) for _ in range(2)]
    done, refused = [], []

    def work(step):
        for _ in range(400):
            try:
                done.append(step(xs[0], targets[0]))
            except StateError as error:
                refused.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, step) for step in steps]:
            future.result()
    assert len(done) + len(refused) == 800
    assert all("another step of this model is under way; one model belongs" in text for text in refused)
    alone = make_step(make_model(), lr=0.01)
    expected = torch.stack([alone(xs[0], targets[0]) for _ in done])
    torch.testing.assert_close(torch.stack(done).sort().values, expected.sort().values, rtol=0, atol=0)
    assert_same_state(model, alone.model, exact=True)


def test_a_step_within_a_step_is_refused():
    step, (xs, targets) = make_step(make_model()), make_data()
    step.optimizer.register_step_pre_hook(lambda *_: step(xs[0], targets[0]))
    for _ in range(2):
        with pytest.raises(StateError, match="another step of this model is under way"):
            step(xs[0], targets[0])


def test_a_step_under_no_grad_is_refused():
    step, (xs, targets) = make_step(make_model()), make_data()
    with torch.no_grad(), pytest.raises(StateError, match=r"outside torch.no_grad"):
        step(xs[0], targets[0])


def test_hooks_of_the_optimizer_run():
    model = make_model()
    step, (xs, targets), seen = make_step(model), make_data(), []
    step.optimizer.register_step_post_hook(lambda *_: seen.append("own"))
    step(xs[0], targets[0])
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("global"))
    step(xs[1], targets[1])
    handle.remove()
    assert seen == ["own", "own", "global"]


def test_a_subclass_of_sgd_keeps_its_own_step():
    class Loud(SGD):
        def step(self, closure=None):
            seen.append(1)
            return super().step(closure)

    seen: list[int] = []
    step, (xs, targets) = make_step(make_model(), Loud), make_data()
    step(xs[0], targets[0])
    assert seen == [1]


def test_an_lr_scheduler_sees_the_steps():
    model = make_model()
    step, (xs, targets) = make_step(model), make_data()
    scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, gamma=0.5)
    step(xs[0], targets[0])
    scheduler.step()  # warns, and so fails, unless it knows of the step
    assert step.optimizer.param_groups[0]["lr"] == 0.05


def test_what_cannot_train_is_refused():
    model = Linear(3, 2)
    with pytest.raises(ArgumentError, match="the optimizer updates none of the parameters of model and loss"):
        TrainStep(model, MSE(), SGD(Linear(3, 2).parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match=r"the loss must be a loss of handgrad, .*, got MSELoss"):
        TrainStep(model, torch.nn.MSELoss(), SGD(model.parameters(), lr=0.1))
    with pytest.raises(ArgumentError, match="LBFGS takes several steps of its own through a closure"):
        TrainStep(model, MSE(), torch.optim.LBFGS(model.parameters()))


def test_an_older_torch_does_not_compile(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))
    with pytest.raises(
        CompileError, match=r"torch must be 2.13 or newer, .*; upgrade it, or use .*; got 2\.12\.1\+cpu"
    ):
        make_step(make_model()).compile()


LINEAR = Linear(3, 3)


class Options:
    """A plain object that a layer holds."""

    def __init__(self) -> None:
        self.factor = 1.0


class Changeable(Layer):
    """out = x scale[0] factor * options.factor, where all of these may be changed."""

    def __init__(self) -> None:
        self.factor, self.options, self.scale = 2.0, Options(), [torch.tensor(1.0, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        out = x * (self.scale[0] * self.factor * self.options.factor)
        self.push(self.scale[0], out=out)
        return out

    def backward(self, dout: Tensor) -> Tensor:
        (scale,) = self.pop(dout)
        return dout * (scale * self.factor * self.options.factor)


def make_changeable(seed: int) -> TrainStep:
    model = make_model(seed)
    model.layers.insert(2, Changeable())
    return make_step(model, momentum=0.9)


def new_storage(step: TrainStep) -> None:
    step.model[-1].weight.data = step.model[-1].weight.data * 2


def new_tensor(step: TrainStep) -> None:
    step.model[2].scale[0] = torch.tensor(1.0, dtype=torch.float64)
    step.model[2].scale[0].fill_(3.0)


CHANGES: dict[str, Callable[[TrainStep], Any]] = {
    "eval": lambda step: step.model.eval(),
    "an attribute": lambda step: setattr(step.model[2], "factor", 3.0),
    "an attribute of an attribute": lambda step: setattr(step.model[2].options, "factor", 3.0),
    "another object": lambda step: setattr(step.model[2], "options", Options()),
    "another tensor": new_tensor,
    "frozen": lambda step: step.model[0].freeze(),
    "a storage": new_storage,
    "an option": lambda step: step.optimizer.param_groups[0].update(weight_decay=0.1),
    "no momentum": lambda step: step.optimizer.param_groups[0].update(momentum=0.0),
    "a layer in a list": lambda step: step.model.layers.insert(5, hg.ReLU()),
    "the optimizer's state": lambda step: step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict())),
    "dtype and back": lambda step: step.model.to(torch.float32).to(torch.float64),
}


def interpreted(traced: Traced, stage: Stage, tell: Callable[[str], None]) -> Program:
    """The program of a traced step, run by Python instead of compiled: the same graph, in no time."""

    def repeat(goes_on: Any, body: Any, carried: Any, given: Any) -> Any:
        while goes_on(*carried, *given):
            carried = body(*carried, *given)
        return carried

    def run(inputs: list[Tensor]) -> list[Tensor]:
        loop = _Loop(traced, stage)
        loop.repeat = repeat
        counts = [len(traced.state), len(traced.numbers), len(traced.parts), int(traced.seeded)]
        rest = iter(inputs)
        losses, wrong, grads = loop(*[[next(rest) for _ in range(n)] for n in counts], *rest)
        return [losses, wrong, *grads]

    return Program(traced, stage, run)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.slow)])
def programs(request, monkeypatch):
    """Both ways to run a program: traced graphs alone, fast, and compiled ones, which take seconds each."""
    if request.param == "interpreted":
        monkeypatch.setattr("handgrad.train.compiled", interpreted)


@COMPILES
@pytest.mark.usefixtures("programs")
class TestCompiled:
    """The programs of `compile()`."""

    @pytest.mark.parametrize(
        "options",
        [{}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}],
        ids=["plain", "momentum", "nesterov"],
    )
    def test_many_equals_eager_with_a_remainder_and_an_lr_change(self, options):
        a, b = make_model(), make_model()
        xs, targets = make_data()
        eager, compiled = make_step(a, **options), make_step(b, **options).compile()
        for lr, part in ((0.1, slice(0, 5)), (0.01, slice(5, 7))):
            for step in (eager, compiled):
                step.optimizer.param_groups[0]["lr"] = lr
            expected, got = (step.many(xs[part], targets[part]) for step in (eager, compiled))
            torch.testing.assert_close(got, expected)
        assert_same_state(b, a)
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(q.grad, p.grad)

    def test_several_inputs_and_outputs(self):
        xs, targets = make_pairs()
        eager, compiled = make_pair_step(), make_pair_step().compile()
        torch.testing.assert_close(compiled.many(xs, targets), eager.many(xs, targets))
        assert_same_state(compiled.model, eager.model)

    @pytest.mark.parametrize("options", [pytest.param({}, id="plain", marks=pytest.mark.slow), {"momentum": 0.9}])
    def test_groups_and_parameters_without_a_gradient_stay_in_the_graph(self, options):
        """A frozen group with an lr of its own, and a layer that nobody calls; then the group is unfrozen."""

        def make() -> TrainStep:
            model = make_model()
            model.layers[4].unused = Embedding(3, 2, generator=torch.Generator().manual_seed(3))
            groups = [{"params": list(model[0].freeze().parameters()), "lr": 0.05}]
            groups.append({"params": [p for p in model.parameters() if p is not model[0].weight]})
            return TrainStep(model, CrossEntropy(), SGD(groups, lr=0.1, **options))

        xs, targets = make_data()
        eager, compiled = make(), make().compile()
        for k in range(STEPS):
            if k == 3:
                eager.model[0].unfreeze(), compiled.model[0].unfreeze()
            torch.testing.assert_close(compiled(xs[k], targets[k]), eager(xs[k], targets[k]))
        torch.testing.assert_close(full_state(compiled), full_state(eager))
        assert len(compiled.optimizer.state) == (7 if options else 0)  # all but the layer that nobody calls

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
    def test_a_copy_trains_the_copy(self, make):
        step, (xs, targets) = make_step(make_model(), momentum=0.9).compile(), make_data()
        for k in range(2):
            step(xs[k], targets[k])
        twin = make(step)
        assert_trains_alone(step, twin, full_state(step))

    def test_a_deep_copy_trains_the_copy(self):
        step = TrainStep(model := Linear(3, 2), MSE(), SGD(model.parameters())).compile()
        x, y = torch.randn(4, 3), torch.randn(4, 2)
        step(x, y)
        before, twin = full_state(step), copy.deepcopy(step)
        twin(x, y)
        torch.testing.assert_close(full_state(step), before, rtol=0, atol=0)
        assert not torch.equal(twin.model.weight, model.weight)

    @pytest.mark.slow
    def test_a_refused_input_changes_nothing(self):
        torch.manual_seed(0)
        model = Sequential(*make_model()[:-1], Linear(8, 8), BatchNorm1d(8), hg.ReLU(), Linear(8, VOCABULARY))
        step = make_step(model.to(torch.float64), momentum=0.9).compile()
        xs, targets = make_data(3)
        step(xs[0], targets[0]), step(xs[0], targets[0]), step.many(xs, targets)
        bad = targets.clone()
        bad[1, 0] = VOCABULARY
        before = full_state(step)
        for call in (lambda: step(xs[1], bad[1]), lambda: step.many(xs, bad), lambda: step(xs[0], targets[0, 1:])):
            with pytest.raises((IndexRangeError, ShapeError)):
                call()
            torch.testing.assert_close(full_state(step), before, rtol=0, atol=0)
        step(xs[0], targets[0])

    def test_a_wholly_frozen_model(self):
        model, (x, y) = Linear(3, 2), (torch.ones(4, 3), torch.ones(4, 2))
        step = TrainStep(model.freeze(), MSE(), SGD(model.parameters(), momentum=0.9)).compile()
        with pytest.raises(StateError, match="no parameter got a gradient, for all are frozen"):
            step(x, y)
        assert not step.optimizer.state
        model.unfreeze()
        assert step(x, y) > 0

    def test_what_no_graph_can_hold(self):
        class Reads(Tanh):
            def forward(self, x: Tensor) -> Tensor:
                if x.sum() > 100:
                    return x
                return super().forward(x)

        class Unlike(Linear):
            def add_grad(self, param: Tensor | None, grad: Tensor) -> None:
                super().add_grad(param, grad[:1])

        x, y = torch.ones(4, 3), torch.ones(4, 2)
        step = TrainStep(model := Unlike(3, 2), MSE(), SGD(model.parameters())).compile()
        with pytest.raises(ShapeError, match=r"the gradient of weight must be \(2, 3\) .*, got \(1, 3\)"):
            step(x, y)
        model = Sequential(Linear(3, 2), Reads())
        step = TrainStep(model, MSE(), SGD(model.parameters(), momentum=0.9)).compile()
        with pytest.raises(
            CompileError, match=r"not one graph of tensors \(a layer may read a value, by .item\(\) or if"
        ):
            step(x, y)
        assert model.pending == 0
        assert not step.optimizer.state

    def test_tensors_that_share_memory_are_refused(self):
        model = Sequential(Linear(3, 3), Linear(3, 3))
        model[1].weight = model[0].weight[:]
        step = TrainStep(model, MSE(), SGD(model.parameters())).compile()
        with pytest.raises(
            CompileError, match=r"of shapes \(3, 3\) and \(3, 3\), share memory; .* the very same tensor"
        ):
            step(torch.ones(2, 3), torch.ones(2, 3))
        model[1].weight = model[0].weight
        assert TrainStep(model, MSE(), SGD(model.parameters())).compile()(torch.ones(2, 3), torch.ones(2, 3)) > 0

    @pytest.mark.slow
    def test_in_several_threads_steps_follow_each_other_or_are_refused(self):
        step, (xs, targets) = make_step(make_model(), lr=0.01).compile(), make_data()
        step(xs[0], targets[0])
        done, refused = [], []

        def work():
            for _ in range(300):
                try:
                    done.append(step(xs[0], targets[0]))
                except StateError:
                    refused.append(1)

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(work) for _ in range(2)]:
                future.result()
        alone = make_step(make_model(), lr=0.01)
        assert len(done) + len(refused) == 600
        for _ in range(len(done) + 1):
            alone(xs[0], targets[0])
        assert_same_state(step.model, alone.model)

    def test_freezing_after_compile_is_seen(self):
        model = make_model()
        xs, targets = make_data()
        step = make_step(model).compile()
        step(xs[0], targets[0])
        held = [p.clone() for p in model.freeze().parameters()]
        model[-1].unfreeze()
        step(xs[0], targets[0])
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), held)]
        assert moved == [False] * (len(held) - 2) + [True, True]

    def test_one_graph_serves_every_lr_and_evaluation_in_between(self):
        a, b = make_model(), make_model()
        xs, targets = make_data()
        eager, compiled = make_step(a), make_step(b).compile()
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(s.optimizer, 0.7) for s in (eager, compiled)]
        for x, target in zip(xs, targets):
            torch.testing.assert_close(compiled(x, target), eager(x, target))
            for scheduler in schedulers:
                scheduler.step()
            for model in (a, b):
                model.eval()
                with torch.no_grad():
                    model(xs[0])
                model.train()
        assert_same_state(b, a)
        assert len(compiled._made) == len(compiled._made[0][1]) == 1

    def test_another_batch_size_works(self):
        a, b = make_model(), make_model()
        eager, compiled = make_step(a), make_step(b).compile()
        for batch in (6, 4, 6):
            xs, targets = make_data(1, batch)
            torch.testing.assert_close(compiled(xs[0], targets[0]), eager(xs[0], targets[0]))
        assert_same_state(b, a)

    def test_an_optimizer_of_torch_does_its_own_update(self):
        a, b = make_model(), make_model()
        xs, targets = make_data(3)
        options = {
            "make_optimizer": torch.optim.RMSprop,
            "eps": 1e-3,
        }  # or it would magnify the noise of a zero gradient
        eager, compiled = make_step(a, **options), make_step(b, **options).compile()
        torch.testing.assert_close(compiled.many(xs, targets), eager.many(xs, targets))
        assert_same_state(b, a)

    @pytest.mark.parametrize(("where", "index"), [("x", -1), ("x", VOCABULARY), ("target", -1), ("target", VOCABULARY)])
    def test_an_index_out_of_range_is_an_error(self, where, index):
        model = make_model()
        step, (xs, targets) = make_step(model).compile(), make_data(2)
        step.many(xs, targets)
        step(xs[0], targets[0])
        (xs if where == "x" else targets)[1].view(-1)[0] = index
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(IndexRangeError, match=rf"must be in 0\.\.4.*, got {index}"):
            step(xs[1], targets[1])
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        with pytest.raises(IndexRangeError, match=rf"must be in 0\.\.4.*, got {index}"):
            step.many(xs, targets)
        assert model.pending == 0
        assert step(xs[0], targets[0]) > 0

    @pytest.mark.parametrize("make", [make_images, lambda: Sequential(Padded(), Flatten(), Linear(16, VOCABULARY))])
    def test_layers_of_images_and_masked_attention_with_soft_targets(self, make):
        torch.manual_seed(0)
        a = make().to(torch.float64)
        b, x = copy.deepcopy(a), torch.randn(BATCH, 2, 2, 4, dtype=torch.float64)
        x = x if make is make_images else x.flatten(1, 2)
        target = torch.rand(BATCH, VOCABULARY, dtype=torch.float64)
        eager, compiled = make_step(a), make_step(b).compile()
        for _ in range(2):
            torch.testing.assert_close(compiled(x, target), eager(x, target))
        assert_same_state(b, a)

    def test_an_error_is_the_one_that_the_layers_raise(self):
        model = Linear(3, 2)
        step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1)).compile()
        with pytest.raises(ShapeError, match=r"Linear\(3 -> 2\).forward: last dimension of x must be 3, got "):
            step(torch.ones(4, 5), torch.ones(4, 2))
        with pytest.raises(DtypeError, match=r"MSE\(\).forward: target must be a tensor of x's dtype"):
            step(torch.ones(4, 3), torch.ones(4, 2).double())
        assert step(torch.ones(4, 3), torch.ones(4, 2)) > 0

    def test_one_graph_serves_a_schedule_of_momentum(self):
        a, b = make_model(), make_model()
        xs, targets = make_data()
        eager, compiled = make_step(a, momentum=0.9, nesterov=True), make_step(b, momentum=0.9, nesterov=True).compile()
        cycles = [
            torch.optim.lr_scheduler.OneCycleLR(s.optimizer, 0.2, total_steps=STEPS + 1) for s in (eager, compiled)
        ]
        for x, target in zip(xs, targets):
            torch.testing.assert_close(compiled(x, target), eager(x, target))
            for cycle in cycles:
                cycle.step()
        assert_same_state(b, a)
        assert len(compiled._made) == len(compiled._made[0][1]) == 1

    def test_leftover_records_are_refused(self):
        model = make_model()
        step, (xs, targets) = make_step(model).compile(), make_data()
        step(xs[0], targets[0])
        model(xs[0])
        with pytest.raises(StateError, match=r"1 earlier forward"):
            step(xs[0], targets[0])

    def test_no_grad_is_refused(self):
        step, (xs, targets) = make_step(make_model()).compile(), make_data()
        with torch.no_grad(), pytest.raises(StateError, match=r"outside torch.no_grad"):
            step(xs[0], targets[0])

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_whatever_is_changed_afterwards_is_seen(self, change):
        """After each change the compiled step does as the eager one; and where nothing changed it traces nothing."""
        eager, compiled = (make_changeable(seed=3) for _ in range(2))
        compiled = compiled.compile()
        xs, targets = make_data(3)
        for k in range(3):
            if k == 1:
                for step in (eager, compiled):
                    change(step)
            torch.testing.assert_close(compiled(xs[k], targets[k]), eager(xs[k], targets[k]))
        assert_same_state(compiled.model, eager.model)
        assert len(compiled._made) == 2

    def test_a_change_undone_finds_the_program_again(self):
        compiled = make_changeable(seed=3).compile()
        xs, targets = make_data(6)
        for k in range(6):
            compiled.model.train(k % 2 == 0)
            compiled(xs[k], targets[k])
        assert len(compiled._made) == 2

    def test_minibatches_of_several_shapes_in_one_list(self):
        eager, compiled = make_step(make_model()), make_step(make_model()).compile()
        xs, targets = make_data(5)
        xs, targets = [*xs[:3], xs[3][:4], xs[4]], [*targets[:3], targets[3][:4], targets[4]]
        torch.testing.assert_close(compiled.many(xs, targets), eager.many(xs, targets))
        assert_same_state(compiled.model, eager.model)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("options", [{}, {"momentum": 0.9}])
    def test_accumulated_and_clipped(self, reduction, options):
        xs, targets = make_data(6)
        limits = {"accumulate": 3, "max_norm": 0.05}
        steps = []
        for _ in range(2):
            model = make_model()
            optimizer = SGD(model.parameters(), lr=0.1, **options)
            steps.append(TrainStep(model, CrossEntropy(reduction=reduction), optimizer, **limits))
        eager, compiled = steps[0], steps[1].compile()
        xs, targets = xs.view(2, 3, *xs.shape[1:]), targets.view(2, 3, -1)
        torch.testing.assert_close(compiled.many(xs, targets), eager.many(xs, targets))
        torch.testing.assert_close(compiled(xs[0], list(targets[0])), eager(list(xs[0]), targets[0]))
        assert_same_state(compiled.model, eager.model)
        for p, q in zip(eager.params, compiled.params):
            torch.testing.assert_close(q.grad, p.grad)
        with pytest.raises(ShapeError, match="a step takes 3 minibatches, got 2"):
            compiled(xs[0, :2], targets[0, :2])

    @pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
    @pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}])
    def test_adam_is_in_the_program(self, kind, options):
        eager, compiled = (make_step(make_model(), make_optimizer=kind, eps=1e-3, **options) for _ in range(2))
        compiled = compiled.compile()
        xs, targets = make_data(4)
        cycles = [torch.optim.lr_scheduler.OneCycleLR(s.optimizer, 0.2, total_steps=6) for s in (eager, compiled)]
        for part in (slice(0, 1), slice(1, 4)):
            torch.testing.assert_close(compiled.many(xs[part], targets[part]), eager.many(xs[part], targets[part]))
            for cycle in cycles:
                cycle.step()
        torch.testing.assert_close(full_state(compiled), full_state(eager))
        assert len(compiled._made) == 1
        twin = torch.optim.AdamW(compiled.model.parameters())
        twin.load_state_dict(compiled.optimizer.state_dict())

    def test_dropout_is_repeatable_by_its_generator_and_fresh_in_each_step(self, request):
        if "interpreted" in request.node.callspec.id:
            pytest.skip("the random numbers of a seed are the compiler's")

        def losses(seed: int, p: float = 0.5) -> Tensor:
            model = Sequential(hg.Dropout(p, generator=torch.Generator().manual_seed(seed)), Linear(64, 1, bias=False))
            model[1].weight.fill_(1.0)
            step = TrainStep(model, MSE(), SGD(model.parameters(), lr=0.0)).compile()
            return step.many(torch.ones(4, 8, 64), torch.zeros(4, 8, 1))

        first, again, other = losses(1), losses(1), losses(2)
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        assert len(first.unique()) == 4
        assert not torch.equal(first, other)

    def test_dropout_drops_its_share_and_scales_the_rest(self):
        model = Sequential(Linear(1, 1, bias=False), hg.Dropout(0.25))
        model[0].weight.fill_(1.0)
        step = TrainStep(model, MSE(reduction="sum"), SGD(model.parameters(), lr=0.0)).compile()
        rows = 40_000
        step.model.to(torch.float64)
        one = torch.ones(rows, 1, dtype=torch.float64)
        loss = step(one, torch.zeros_like(one))  # each row is 0 or 16/9
        assert 0.74 < float(loss) / rows / (16 / 9) < 0.76
        torch.testing.assert_close(model[0].weight.grad.sum(), 2 * loss)

    def test_many_that_fails_has_done_nothing_and_says_so(self):
        step, (xs, targets) = make_step(make_model()).compile(), make_data(4)
        step.many(xs, targets)
        before = full_state(step)
        targets[2, 0] = 99
        with pytest.raises(IndexRangeError) as caught:
            step.many(xs, targets)
        if hasattr(caught.value, "add_note"):  # of Python 3.11 and newer
            assert caught.value.__notes__ == ["0 of the 4 steps of TrainStep.many are done"]
        torch.testing.assert_close(full_state(step), before, rtol=0, atol=0)

    def test_tensors_that_a_layer_makes_or_holds_undeclared(self):
        class Scaled(Tanh):
            def __init__(self) -> None:
                self.scale = [torch.tensor(2.0)]

            def forward(self, x: Tensor) -> Tensor:
                self.scale[0].add_(1.0)
                return super().forward(x * self.scale[0] * torch.tensor([0.5, 2.0]).sum())

        eager, compiled = (
            TrainStep(model, MSE(), SGD(model.parameters(), lr=0.1))
            for model in (Sequential(copy.deepcopy(LINEAR), Scaled()) for _ in range(2))
        )
        compiled = compiled.compile()
        for _ in range(3):
            pair = compiled(torch.ones(2, 3), torch.ones(2, 3)), eager(torch.ones(2, 3), torch.ones(2, 3))
            torch.testing.assert_close(*pair)
        assert compiled.model[1].scale[0] == 5

    def test_progress_is_told(self, capsys):
        step = TrainStep(model := Linear(3, 2), MSE(), SGD(model.parameters())).compile(progress=True)
        step(torch.ones(4, 3), torch.ones(4, 2))
        assert "tracing the step ... " in capsys.readouterr().err

    def test_without_a_compiler_the_error_says_what_to_do(self, monkeypatch):
        from torch._inductor import cpp_builder

        def missing():
            raise RuntimeError("no compiler")

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
        with pytest.raises(CompileError, match=r"C\+\+ compiler must be installed.*or use the step without compile"):
            make_step(make_model()).compile()
