"""Looking inside: what is shown, with which path, to whom; and the tripwire that names the first value not finite."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from handgrad import (
    GRU,
    MSE,
    SGD,
    Add,
    ArgumentError,
    CrossEntropy,
    Graph,
    GRUCell,
    Layer,
    Linear,
    Loss,
    NonFiniteError,
    Sequential,
    StateError,
    Tanh,
    TrainStep,
    Unroll,
    tripwire,
    watch,
)
from handgrad.bench import profile
from handgrad.twins import TWINS
from tests.versions import COMPILES

NAN, INF = float("nan"), float("inf")


class Noted:
    """Everything that `watch` shows, in order: what, path, layer, tensor."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, what):
        return lambda path, layer, t: self.seen.append(
            (what, path, type(layer).__name__, t.clone() if what == "grad" else t)  # for later ones are added to it
        )

    def looks(self, *whats):
        return {what: self[what] for what in whats or ("x", "out", "dout", "grad", "dx")}

    @property
    def places(self):
        return [f"{what} {path or 'model'}" for what, path, _, _ in self.seen]


def ran(layer, inputs):
    out = layer(*inputs)
    return out, layer.backward() if isinstance(layer, Loss) else layer.backward(tree_map(torch.ones_like, out))


def small():
    torch.manual_seed(0)
    return Sequential(Linear(3, 4), Tanh(), Linear(4, 2))


def test_everything_is_shown_in_the_order_of_the_step():
    model, noted, x = small(), Noted(), torch.randn(5, 3)
    with watch(model, **noted.looks()):
        out, dx = ran(model, (x,))
    assert noted.places == [
        *("x model", "out 0", "out 1", "out 2", "out model"),
        *("dout model", "dout 2", "grad 2.weight", "grad 2.bias", "dout 1", "dout 0", "grad 0.weight", "grad 0.bias"),
        "dx model",
    ]
    seen = dict(zip(noted.places, (t for *_, t in noted.seen)))
    assert seen["x model"] is x
    assert seen["out model"] is out
    assert seen["dx model"] is dx
    assert seen["grad 0.weight"].equal(model[0].weight.grad)
    assert seen["out 1"].equal(model[1](model[0](x)))


def test_only_what_is_asked_for_is_shown_and_nothing_after():
    model, noted = small(), Noted()
    with watch(model, **noted.looks("dout")):
        ran(model, (torch.randn(5, 3),))
    ran(model, (torch.randn(5, 3),))
    assert noted.places == ["dout model", "dout 2", "dout 1", "dout 0"]
    assert not any(layer._watchers or "backward" in vars(layer) for _, layer in model.named_layers())


@pytest.mark.parametrize("name", TWINS)
def test_every_layer_shows_each_of_its_tensors(name):
    torch.manual_seed(0)
    layer, inputs = TWINS[name].layer(16), TWINS[name].inputs(16, 16, torch.float32)
    noted = Noted()
    with watch(layer, **noted.looks()):
        out, dx = ran(layer, inputs)
    own = [(what, t) for what, path, _, t in noted.seen if path == ""]

    def shown(what):
        return [t for w, t in own if w == what]

    def same(got, want):
        assert len(got) == len(want)
        assert all(a is b for a, b in zip(got, want))

    same(shown("x"), tree_leaves(inputs))
    same(shown("out"), tree_leaves(out))
    same(shown("dx"), [t for t in tree_leaves(dx) if t is not None])
    assert len(shown("dout")) == (0 if isinstance(layer, Loss) else len(tree_leaves(out)))
    for key, param in layer.named_parameters():  # what is added up is the gradient
        if param.grad is None:
            continue  # nothing goes back through a Constant
        total = sum(t for what, path, _, t in noted.seen if (what, path) == ("grad", key))
        torch.testing.assert_close(total, param.grad)


def test_under_no_grad_outputs_are_shown():
    noted = Noted()
    with watch(model := small(), **noted.looks("out")), torch.no_grad():
        model(torch.randn(5, 3))
    assert noted.places == ["out 0", "out 1", "out 2", "out model"]


def test_cells_graphs_and_layers_of_a_users_own_have_their_paths():
    class Twice(Layer):
        def __init__(self):
            self.body = {"in": [Linear(3, 3)]}

        def forward(self, x):
            out = self.body["in"][0].forward_at("body", self.body["in"][0].forward_at("body", x))
            self.push(out=out)
            return out

        def backward(self, dout):
            self.pop(dout)
            return self.body["in"][0].backward_at("body", self.body["in"][0].backward_at("body", dout))

    noted, x = Noted(), torch.randn(2, 4, 3)
    model = Graph("x", "s", seq=(Unroll(GRUCell(3, 3)), "x"), own=(Twice(), "x"), s=(Add(), "seq own"))
    with watch(model, **noted.looks("out", "grad")):
        ran(model, (x,))
    outs = [p for p in noted.places if p.startswith("out")]
    assert outs == [*["out seq.cell"] * 4, "out seq", *["out own.body.in.0"] * 2, "out own", "out s", "out model"]
    grads = {p for p in noted.places if p.startswith("grad")}
    assert {"grad own.body.in.0.weight", "grad seq.cell.weight_ih"} <= grads


def test_several_watch_at_once_and_stop_in_any_order():
    model, first, second = small(), Noted(), Noted()
    one, two = watch(model, **first.looks()), watch(model, **second.looks())
    one.__enter__()
    two.__enter__()
    ran(model, (torch.randn(5, 3),))
    one.__exit__(None, None, None)
    ran(model, (torch.randn(5, 3),))
    two.__exit__(None, None, None)
    ran(model, (torch.randn(5, 3),))
    assert len(first.seen) == 14
    assert second.places == first.places * 2


def test_copies_and_pickles_made_meanwhile_are_not_watched_and_work():
    model, noted, x = small(), Noted(), torch.randn(5, 3)
    with watch(model, **noted.looks()):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)]
        for twin in twins[:2]:
            ran(twin, (x,))
        assert noted.seen == []
        ran(model, (x,))
    for twin in twins[:2]:
        for p, q in zip(twin.parameters(), model.parameters()):
            assert p is not q
            assert p.grad.equal(q.grad)


def test_an_error_in_a_look_ends_the_watching():
    def refuse(path, layer, t):
        raise KeyError(path)

    model = small()
    with pytest.raises(KeyError), watch(model, out=refuse):
        model(torch.randn(5, 3))
    model.drop_records()
    ran(model, (torch.randn(5, 3),))


def test_a_profile_within_a_watch_leaves_it_as_it_was():
    model, noted = small(), Noted()
    x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))
    with watch(model, **noted.looks("x", "dx")):
        profile(model, x, y, seconds=0.01)
        noted.seen.clear()
        ran(model, (x,))
    assert noted.places == ["x model", "dx model"]


def test_the_gradients_are_those_of_a_run_that_nobody_watches():
    model, x = small(), torch.randn(5, 3)
    twin = copy.deepcopy(model)
    ran(twin, (x,))
    with watch(model, **Noted().looks()), tripwire(model, limit=100):
        ran(model, (x,))
    for p, q in zip(model.parameters(), twin.parameters()):
        assert p.grad.equal(q.grad)


@COMPILES
def test_a_compiled_step_refuses_while_somebody_watches():
    model, loss = small(), CrossEntropy()
    step = TrainStep(model, loss, SGD(model.parameters())).compile()
    for watched in (model, loss):
        with tripwire(watched), pytest.raises(StateError, match=r"a compiled step cannot be watched.* before compile"):
            step(torch.randn(5, 3), torch.randint(0, 2, (5,)))


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="watch: a model must be a Layer, got Linear"), watch(torch.nn.Linear(2, 2)):
        pass
    for limit in (0, -1.0, NAN):
        with pytest.raises(ArgumentError, match="tripwire: limit must be above 0"), tripwire(small(), limit=limit):
            pass


# ---------------------------------------------------------------------- the tripwire


def spoilt(value, wrong=NAN):
    """The same with one wrong element, the last of its last tensor."""
    leaves = [t for t in tree_leaves(value) if t is not None and t.is_floating_point()]
    last = leaves[-1]
    new = last.clone().contiguous()
    new.view(-1)[-1] = wrong
    return tree_map(lambda t: new if t is last else t, value)


PLANTED = {
    "out": ("push", lambda layer: lambda *saved, out: Layer.push(layer, *saved, out=spoilt(out))),
    "dout": ("pop", lambda layer: lambda dout: Layer.pop(layer, spoilt(dout))),
}


def what_trips(model, inputs):
    with pytest.raises(NonFiniteError) as caught, tripwire(model):
        ran(model, inputs)
    text = str(caught.value)
    assert re.search(r"is nan( at \[[\d, ]+\])?, and 1 of its \d+ values are not finite; ", text), text
    return text.split(" is nan")[0]


def plain_run(twin):
    torch.manual_seed(0)
    noted = Noted()
    with watch(model := twin.layer(16), **noted.looks()):
        ran(model, twin.inputs(16, 16, torch.float32))
    return model, noted.places


@pytest.mark.parametrize("what", PLANTED)
@pytest.mark.parametrize("name", TWINS)
def test_a_nan_planted_in_any_layer_is_named(name, what):
    """In the layer itself and in each inside it, wherever something of the kind passes (a loss's own dout is 1)."""
    twin, (method, plant) = TWINS[name], PLANTED[what]
    plain, places = plain_run(twin)
    assert f"{what} model" in places or what == "dout"
    for path, _ in plain.named_layers():
        if f"{what} {path or 'model'}" in places:
            model = twin.layer(16)
            layer = dict(model.named_layers())[path]
            setattr(layer, method, plant(layer))
            head = layer._head()
            assert what_trips(model, twin.inputs(16, 16, torch.float32)) == (
                f"{what} of {path} ({head})" if path else f"{what} of {head}"
            )


WITH_PARAMETERS = [name for name, twin in TWINS.items() if any(True for _ in twin.layer(16).parameters())]


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_a_nan_planted_in_any_gradient_is_named(name):
    twin = TWINS[name]
    plain, places = plain_run(twin)
    for key, _ in plain.named_parameters():
        if f"grad {key}" in places:
            model = twin.layer(16)
            target = dict(model.named_parameters())[key]
            for _, layer in model.named_layers():
                layer.add_grad = lambda param, grad, layer=layer, target=target: Layer.add_grad(
                    layer, param, spoilt(grad) if param is target else grad
                )
            assert what_trips(model, twin.inputs(16, 16, torch.float32)).startswith(f"the gradient of {key} (")


def fails(model, x, match, **options):
    with pytest.raises(NonFiniteError, match=match), tripwire(model, **options):
        ran(model, (x,))
    model.drop_records()


def test_it_says_where_the_value_is_and_where_it_comes_from():
    model, x = small(), torch.ones(2, 3)
    x[1, 2] = -INF
    fails(model, x, r"^x of Sequential\(\) is -inf at \[1, 2\], and 1 of its 6 values are .*; nothing came before it$")
    x = torch.ones(2, 3)
    model[2].weight[1, 3] = NAN
    fails(model, x, r"^out of 2 \(Linear\(4 -> 2\)\) is nan at \[0, 1\], and 2 of its 4 values .* its own weight$")
    model = small()
    model[1].backward = lambda dout: model[1].pop(dout)[0] / 0
    fails(
        model,
        x,
        r"^dout of 0 \(Linear\(3 -> 4\)\) is .* 8 of its 8 values are not finite; "
        r"before it came dout of 1 \(Tanh\(\)\), which was sound$",
    )


def test_the_loss_its_target_and_its_dx_are_looked_at():
    model, loss, x = Linear(2, 1), MSE(), torch.ones(3, 2)
    target = torch.tensor([[0.0], [NAN], [0.0]])
    with tripwire(model, loss), pytest.raises(NonFiniteError, match=r"^x of MSE\(\) is nan at \[1, 0\]"):
        loss(model(x), target)
    model.drop_records()
    model.weight.fill_(1e30)
    with tripwire(model, loss), pytest.raises(NonFiniteError, match=r"^out of MSE\(\) is inf, and 1 of its 1 values"):
        loss(model(x), torch.zeros(3, 1))


def test_values_beyond_a_limit_count_if_asked():
    model, x = small(), torch.ones(2, 3)
    with tripwire(model):
        ran(model, (x,))
    model[0].bias[2] = 1e4
    fails(
        model, x, r"^out of 0 .* is 1000.* at \[0, 2\], and 2 of its 8 values are not within 100; .* bias$", limit=100
    )


def test_a_sum_that_overflows_is_no_alarm():
    model = Sequential(Tanh())
    with tripwire(model):
        model(torch.full((4,), 2e38)), model(torch.full((999,), 300.0, dtype=torch.float16))
        model(torch.zeros(0, 3))


def test_a_step_that_trips_leaves_nothing_behind():
    model, loss = Sequential(Linear(3, 2), Linear(2, 2)), MSE()
    step = TrainStep(model, loss, SGD(model.parameters(), lr=1e10))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    with tripwire(model, loss), pytest.raises(NonFiniteError):
        step.many([x] * 5, [y] * 5)
    assert model.pending == loss.pending == 0


def test_a_sequence_of_many_steps():
    model, x = GRU(3, 4), torch.zeros(5, 2, 3)
    x[3, 1] = NAN
    fails(model, x, r"^x of GRU\(3 -> 4\) is nan at \[3, 1, 0\], and 3 of its 30")
