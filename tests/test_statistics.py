"""Statistics of a model in training: the numbers against plain torch, the words, the table and the pictures."""

from __future__ import annotations

import builtins
import copy
import json
import math
import pickle

import pytest
import torch
from torch import Tensor

from handgrad import (
    GRU,
    MSE,
    SGD,
    Add,
    ArgumentError,
    BatchNorm1d,
    Constant,
    Conv1d,
    CrossEntropy,
    Embedding,
    Flatten,
    Graph,
    GRUCell,
    Layer,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    StateError,
    Statistics,
    Tanh,
    TrainStep,
)

STEPS = 4


def lecture_mlp(gain: float = 5 / 3, depth: int = 5, seed: int = 1) -> Sequential:
    """The six-layer MLP of makemore 3: block 3, 27 characters."""
    generator = torch.Generator().manual_seed(seed)
    hidden: list[Layer] = []
    for i in range(depth):
        hidden += [Linear(30 if i == 0 else 100, 100, gain=gain, generator=generator), Tanh()]
    last = Linear(100, 27, gain=0.1, generator=generator)
    return Sequential(Embedding(27, 10, generator=generator), Flatten(), *hidden, last)


def minibatches(count: int = STEPS, rows: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(27, (rows, 4), generator=generator) for _ in range(count)]
    return [(rows[:, :3], rows[:, 3]) for rows in draw]


def by_hand(model: Sequential, step) -> dict[str, dict[str, list[Tensor]]]:
    """Every value of the lecture's quantities, from a loop over the layers: `step(model)` updates."""
    found: dict[str, dict[str, list[Tensor]]] = {key: {} for key in ("out", "dout", "grad", "data", "update")}

    def note(key: str, name: str, t: Tensor) -> None:
        found[key].setdefault(name, []).append(t.clone())

    loss = CrossEntropy()
    for x, y in minibatches():
        for i, layer in enumerate(model):
            x = layer(x)
            note("out", str(i), x)
        loss(x, y)
        model.zero_grad()
        dout = loss.backward()
        for i in reversed(range(len(model))):
            note("dout", str(i), dout)
            dout = model[i].backward(dout)
        model.drop_records()
        before = {name: p.clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            note("grad", name, p.grad)
            note("data", name, p)
        step()
        for name, p in model.named_parameters():
            note("update", name, (p - before[name]).std() / before[name].std())
    return found


def close(value: float | None, expected: Tensor, rtol: float = 1e-4) -> bool:
    return value is not None and math.isclose(value, float(expected), rel_tol=rtol, abs_tol=1e-8)


def adamw(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params) -> torch.optim.Optimizer:
    return SGD(params, lr=0.1)


def run_train_step(model: Layer, optimizer: torch.optim.Optimizer, stats: Statistics) -> None:
    step = TrainStep(model, CrossEntropy(), optimizer)
    with stats:
        for x, y in minibatches():
            step(x, y)


def run_by_hand(model: Layer, optimizer: torch.optim.Optimizer, stats: Statistics) -> None:
    loss = CrossEntropy()
    for x, y in minibatches():
        with stats:
            optimizer.zero_grad()
            loss(model(x), y)
            model.backward(loss.backward())
            optimizer.step()


def run_lecture(model: Layer, optimizer: torch.optim.Optimizer, stats: Statistics) -> None:
    """With p.data, which leaves no trace in the count of changes; gradients cleared to zero in place."""
    loss = CrossEntropy()
    with stats:
        for x, y in minibatches():
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            for layer in model:
                x = layer(x)
            loss(x, y)
            dout = loss.backward()
            for layer in reversed(list(model)):
                dout = layer.backward(dout)
            for p in model.parameters():
                p.data += -0.1 * p.grad


@pytest.mark.parametrize(
    ("run", "make"), [(run_train_step, sgd), (run_train_step, adamw), (run_by_hand, adamw), (run_lecture, sgd)]
)
def test_numbers_of_the_lecture(run, make) -> None:
    twin = lecture_mlp().to(torch.float64)
    expected = by_hand(twin, make(twin.parameters()).step)
    model = lecture_mlp().to(torch.float64)
    optimizer = make(model.parameters())
    stats = Statistics(model, optimizer)
    run(model, optimizer, stats)
    found = stats.to_dict()
    assert found["steps"] == STEPS
    for path in map(str, range(len(model))):
        row = found["layers"][path]
        for key in ("out", "dout"):
            values = torch.cat([t.flatten() for t in expected[key][path]])
            assert close(row[f"{key}_mean"], values.mean()), (path, key)
            assert close(row[f"{key}_std"], values.std()), (path, key)
        if isinstance(model[int(path)], Tanh):
            values = torch.cat(expected["out"][path])
            assert close(row["saturated"], (values.abs() > 0.97).double().mean())
        else:
            assert row["saturated"] is None
    assert list(found["parameters"]) == list(expected["grad"])
    for name, row in found["parameters"].items():
        grad, data = (torch.cat([t.flatten() for t in expected[key][name]]) for key in ("grad", "data"))
        assert close(row["grad_std"], grad.std()), name
        assert close(row["std"], data.std()), name
        assert close(row["grad_to_data"], grad.std() / data.std()), name
        ratios = torch.stack(expected["update"][name])
        ratios = ratios[ratios.isfinite()].sort().values  # a bias starts at 0
        assert close(row["update_to_data"], (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2), name


def test_single_precision_and_plain_sgd_is_lr_times_grad() -> None:
    model = lecture_mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1))
    with Statistics(model) as stats:
        step(*minibatches(1)[0])
    for name, p in model.named_parameters():
        row = stats.to_dict()["parameters"][name]
        if before[name].std() == 0:
            assert row["update_to_data"] is None
        else:
            assert close(row["update_to_data"], (0.1 * p.grad).std() / before[name].std(), 1e-3)


def test_entries_accumulate() -> None:
    found = []
    for every in (False, True):
        model = lecture_mlp()
        step = TrainStep(model, CrossEntropy(), sgd(model.parameters()))
        stats = Statistics(model)
        if every:
            for x, y in minibatches():
                with stats:
                    step(x, y)
        else:
            with stats:
                step.many(*map(list, zip(*minibatches())))
        found.append(stats.to_dict())
    assert found[0]["steps"] == found[1]["steps"] == STEPS
    for kind in ("layers", "parameters"):
        for name, row in found[0][kind].items():
            for key, value in row.items():
                other = found[1][kind][name][key]
                assert other == (pytest.approx(value, rel=1e-4, abs=1e-7) if isinstance(value, float) else value)


def test_several_minibatches_per_update() -> None:
    """The gradient is the sum that the update reads; an evaluation between does not count."""
    model, loss = lecture_mlp(depth=1), CrossEntropy()
    optimizer = sgd(model.parameters())
    grads = []
    with Statistics(model) as stats:
        for _ in range(2):
            for x, y in minibatches(3):
                loss(model(x), y)
                model.backward(loss.backward())
                with torch.no_grad():
                    model(x)
            grads.append(model[2].weight.grad.clone())
            optimizer.step()
            optimizer.zero_grad()
    found = stats.to_dict()
    assert found["steps"] == 2
    assert close(found["parameters"]["2.weight"]["grad_std"], torch.cat(grads).std())
    assert stats._layers["3"].out.count == 2 * 3 * 32 * 100


def test_gradients_without_any_update() -> None:
    model, loss, grads = lecture_mlp(depth=1), CrossEntropy(), []
    with Statistics(model) as stats:
        for x, y in minibatches():
            model.zero_grad()
            loss(model(x), y)
            model.backward(loss.backward())
            grads.append(model[2].weight.grad.clone())
    row = stats.to_dict()["parameters"]["2.weight"]
    assert stats.steps == 0
    assert close(row["grad_std"], torch.cat(grads).std())
    assert close(row["std"], model[2].weight.std())
    assert row["update_to_data"] is None


def test_dead_units() -> None:
    """A quarter of the units never fires, another only in the second step; two of three channels."""
    model = Sequential(Linear(2, 8), ReLU())
    model[0].weight.fill_(0.1)
    model[0].bias.copy_(torch.tensor([1.0, 1, 1, 1, -1, -1, -100, -100]))
    stats = Statistics(model)
    for x, dead in ((torch.ones(4, 2), 0.5), (20 * torch.ones(4, 2), 0.25)):
        with stats:
            model(x)
        assert stats.to_dict()["layers"]["1"]["dead"] == dead
    assert "! 25 % dead" in str(stats)

    def of(model: Layer, x: Tensor) -> float:
        with Statistics(model) as stats:
            model(x)
        return stats.to_dict()["layers"]["1"]["dead"]

    convolution = Sequential(Conv1d(2, 3, 3), ReLU())
    convolution[0].bias.copy_(torch.tensor([9.0, -9, -9]))
    assert of(convolution, torch.rand(4, 2, 9)) == pytest.approx(2 / 3)
    assert of(model, torch.ones(4, 3, 2)) == 0.5  # (N, T, D)
    assert of(Sequential(Flatten(0), ReLU()), -torch.ones(2, 2)) == 1


def test_saturated_sigmoid_and_nonlinearities_of_ones_own(monkeypatch) -> None:
    class MyTanh(Tanh):
        pass

    class Clip(Layer):
        def forward(self, x: Tensor) -> Tensor:
            out = x.clamp(-1, 1)
            self.push(x, out=out)
            return out

        def backward(self, dout: Tensor) -> Tensor:
            (x,) = self.pop(dout)
            return dout * (x.abs() < 1)

    monkeypatch.setitem(Statistics.nonlinearities, Clip, (-0.99, 0.99))
    x = torch.linspace(-8, 8, 999)
    for layer, flat in ((MyTanh(), x.tanh().abs() > 0.97), (Clip(), x.abs() > 0.99), (Sigmoid(), None)):
        with Statistics(layer) as stats:
            out = layer(x)
        flat = (out < 0.015) | (out > 0.985) if flat is None else flat
        row = stats.to_dict()["layers"][""]
        assert row["saturated"] == pytest.approx(float(flat.float().mean()))
        assert row["remarks"] == [f"{100 * row['saturated']:.0f} % saturated"]


def test_words_on_parameters() -> None:
    frozen, trained, unused, left_out = Linear(3, 3).freeze(), Linear(3, 3), Constant(Linear(3, 3)), Linear(3, 27)
    join = Add()
    model = Graph("x", "out", a=(frozen, "x"), b=(trained, "a"), c=(unused, "x"), d=(join, "b c"), out=(left_out, "d"))
    optimizer = SGD([*trained.parameters(), *unused.parameters(), *frozen.parameters()], lr=0.01)
    stats = Statistics(model, optimizer)
    step = TrainStep(model, CrossEntropy(), optimizer)
    with stats:
        for _ in range(2):
            step(torch.randn(32, 3), torch.randint(27, (32,)))
    params = stats.to_dict()["parameters"]
    found = {name: (row["frozen"], row["remarks"]) for name, row in params.items() if name.endswith("weight")}
    assert found == {
        "a.weight": (True, []),
        "b.weight": (False, []),
        "c.body.weight": (False, ["no gradient"]),
        "out.weight": (False, ["not in the optimizer"]),
    }
    rows = {line.split()[0]: line for line in str(stats).splitlines() if ".weight" in line}
    assert rows["a.weight"].endswith("  frozen")
    assert rows["out.weight"].endswith("! not in the optimizer")
    assert params["out.weight"]["update_to_data"] is None
    assert params["out.weight"]["grad_std"] > 0
    assert close(params["a.weight"]["std"], frozen.weight.std())


def test_marked_gradients_and_updates() -> None:
    model = lecture_mlp(gain=0.1)
    optimizer = SGD(model.parameters(), lr=1e-7)
    stats = Statistics(model, optimizer)
    run_train_step(model, optimizer, stats)
    found = stats.to_dict()
    deviations = [found["layers"][path]["dout_std"] for path in ("3", "11")]
    ratio = deviations[0] / deviations[1]
    assert found["layers"]["11"]["remarks"] == []
    digit, power = f"{ratio:.0e}".split("e")
    assert found["layers"]["3"]["remarks"] == [f"gradient vanishes: {digit}e{int(power)} of the last layer's"]
    assert "too small" in found["parameters"]["12.weight"]["remarks"][0]
    assert found["parameters"]["12.bias"]["remarks"] == []  # judged is what has two dimensions
    assert "! gradient vanishes" in str(stats)
    large = lecture_mlp(gain=20)
    stats = Statistics(large)
    run_train_step(large, SGD(large.parameters(), lr=50.0), stats)
    assert any("too large" in text for row in stats.to_dict()["parameters"].values() for text in row["remarks"])


def test_values_that_are_not_finite() -> None:
    model = Sequential(Linear(2, 3), Tanh())
    model[0].bias.fill_(math.nan)
    with Statistics(model) as stats:
        model(torch.ones(4, 2))
        model.backward(torch.ones(4, 3))
    found = stats.to_dict()
    assert found["layers"]["1"]["out_mean"] is None
    assert "out not finite" in found["layers"]["1"]["remarks"]
    assert "gradient not finite" in found["parameters"]["0.weight"]["remarks"]
    pytest.importorskip("matplotlib")
    assert len(stats.figure().axes[0].get_lines()) == 1


def test_recurrent_nets_cells_and_layers_that_are_shared() -> None:
    cell, head = GRUCell(3, 4), Linear(4, 27)

    class Twice(Layer):
        def __init__(self) -> None:
            self.cell, self.head, self.act = cell, head, Tanh()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 4)
            for _ in range(2):
                h = self.act.forward_at("act", self.cell.forward_at("cell", (x, h)))
            out = self.head.forward_at("head", h)
            self.push(out=out)
            return out

        def backward(self, dout: Tensor) -> None:
            self.pop(dout)
            dh = self.head.backward_at("head", dout)
            for _ in range(2):
                _, dh = self.cell.backward_at("cell", self.act.backward_at("act", dh))

    model = Twice()
    step = TrainStep(model, CrossEntropy(), sgd(model.parameters()))
    weight = cell.weight_hh.clone()
    with Statistics(model) as stats:
        step(torch.randn(32, 3), torch.randint(27, (32,)))
    row = stats.to_dict()["parameters"]["cell.weight_hh"]
    assert close(row["grad_std"], cell.weight_hh.grad.std())  # the sum of both uses
    assert close(row["update_to_data"], (0.1 * cell.weight_hh.grad).std() / weight.std(), 1e-3)
    assert stats._layers["act"].out.count == 2 * 32 * 4

    model = Sequential(GRU(3, 4), Linear(4, 1))
    step = TrainStep(model, MSE(), sgd(model.parameters()))
    with Statistics(model) as stats:
        step(torch.randn(5, 6, 3), torch.randn(5, 6, 1))
    assert stats.to_dict()["parameters"]["0.weight_ih_l0"]["update_to_data"] > 0
    pytest.importorskip("matplotlib")
    assert len(stats.figure().axes[0].get_lines()) == 1  # that of the GRU


def test_copies_and_pickles_meanwhile_are_plain() -> None:
    model = lecture_mlp(depth=1)
    step = TrainStep(model, CrossEntropy(), sgd(model.parameters()))
    with Statistics(model) as stats:
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        step(*minibatches(1)[0])
        for twin in twins:
            twin(minibatches(1)[0][0])
    assert stats._layers["3"].out.count == 32 * 100
    assert not any(layer._watchers for _, layer in model.named_layers())


def test_wrong_arguments_and_calls() -> None:
    model, other = Linear(2, 3), Linear(2, 3)
    with pytest.raises(ArgumentError, match=r"^Statistics: the model must be a Layer, got int$"):
        Statistics(3)
    with pytest.raises(ArgumentError, match=r"^Statistics: the optimizer must be a torch.optim.Optimizer, got float$"):
        Statistics(model, 0.1)
    with pytest.raises(ArgumentError, match="the optimizer updates none of the parameters of the model; make it of"):
        Statistics(model, SGD(other.parameters()))
    stats = Statistics(model)
    assert repr(stats) == "no step was seen yet"
    for ask in (Statistics.to_dict, Statistics.figure):
        with pytest.raises(StateError, match=r"^Statistics: nothing was seen yet; run steps inside `with stats:`"):
            ask(stats)
    with stats:
        with pytest.raises(StateError, match=r"^Statistics: already inside its `with`; leave it before entering again"):
            stats.__enter__()
        model(torch.ones(1, 2))
    with pytest.raises(ArgumentError, match=r"^Statistics.figure: titles must be 1, one per column, got 2$"):
        stats.figure(titles=["a", "b"])
    with pytest.raises(ArgumentError, match=r"^Statistics.figure: what stands beside it must be Statistics, got str$"):
        stats.figure("b")
    with pytest.raises(RuntimeError, match="stop"), stats:
        raise RuntimeError("stop")
    assert not model._watchers


def test_the_table_has_at_most_100_columns_and_html_is_escaped() -> None:
    inside = Sequential(BatchNorm1d(100, momentum=0.123456, eps=1e-7), Tanh())
    model = Sequential(Linear(30, 100, gain=1e-3), Sequential(Sequential(inside)), Linear(100, 27))
    long = Graph("x", "out", a_very_long_name_of_a_node=(model, "x"), out=(Tanh(), "a_very_long_name_of_a_node"))
    optimizer = SGD(long.parameters(), lr=1e-9)
    stats = Statistics(long, optimizer)
    step = TrainStep(long, CrossEntropy(), optimizer)
    with stats:
        step(torch.randn(32, 30), torch.randint(27, (32,)))
    lines = str(stats).splitlines()
    assert lines[0] == "1 update; SGD, lr 1e-09"
    assert max(map(len, lines)) <= 100
    assert any("Linear(30 -> 100)" in line for line in lines)
    html = stats._repr_html_()
    assert html.count("<table>") == 2
    assert "Linear(30 -&gt; 100)" in html
    assert "Linear(30 -> 100)" not in html
    assert "a_very_long_name_of_a_node.1.0.0.0.weight" in html


def test_to_dict_goes_through_json() -> None:
    model = lecture_mlp()
    stats = Statistics(model)
    run_train_step(model, sgd(model.parameters()), stats)
    found = stats.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    numbers = "out_mean out_std dout_mean dout_std saturated dead"
    assert list(found["layers"]["3"]) == ["layer", *numbers.split(), "remarks"]
    numbers = "std grad_std grad_to_data update_to_data"
    assert list(found["parameters"]["0.weight"]) == [*numbers.split(), "frozen", "remarks"]


def test_a_forward_alone() -> None:
    model = lecture_mlp(depth=1)
    with Statistics(model) as stats:
        out = model(minibatches(1)[0][0])
    row = stats.to_dict()["layers"]["4"]
    assert close(row["out_std"], out.std())
    assert row["dout_std"] is None
    assert all(row["remarks"] == [] for row in stats.to_dict()["parameters"].values())


def test_a_weight_that_is_all_but_constant_and_half_precision() -> None:
    norm = BatchNorm1d(100)
    norm.weight.add_(1e-5 * torch.randn(100))
    before = norm.weight.clone()
    step = TrainStep(Sequential(norm), MSE(), SGD(norm.parameters(), lr=1e-3))
    with Statistics(step.model) as stats:
        step(torch.randn(32, 100), torch.randn(32, 100))
    row = stats.to_dict()["parameters"]["0.weight"]
    assert close(row["std"], before.double().std())
    assert close(row["update_to_data"], (norm.weight - before).double().std() / before.double().std())

    model = Sequential(Linear(8, 300), Tanh()).to(torch.bfloat16)
    with Statistics(model) as stats:
        out = model(torch.randn(300, 8, dtype=torch.bfloat16))
    row = stats.to_dict()["layers"]["1"]
    assert close(row["out_std"], out.float().std())
    assert close(row["saturated"], (out.abs() > 0.97).float().mean())


def test_long_runs_keep_little(monkeypatch) -> None:
    monkeypatch.setattr("handgrad.seen.KEPT", 1000)
    model = lecture_mlp(depth=1)
    step = TrainStep(model, CrossEntropy(), sgd(model.parameters()))
    with Statistics(model) as stats:
        for _ in range(20):
            step(*minibatches(1)[0])
            assert len(stats._later) < 1000
    kept = [k for seen in stats._layers.values() for k in (seen.outs, seen.douts)]
    kept += [seen.grads for seen in stats._params.values()]
    sizes = [k.count for k in kept]
    assert sizes == [len(k.values()) if k.count else 0 for k in kept]
    assert max(sizes) < 2000
    assert sum(size > 0 for size in sizes) == 5  # of one Tanh, two; three weights
    assert len(stats._params["2.weight"].updates) == 20


# ------------------------------------------------------------------ pictures


def legends_outside(figure) -> bool:
    figure.draw_without_rendering()
    boxes = [(ax.get_window_extent(), ax.get_legend().get_window_extent()) for ax in figure.axes if ax.get_legend()]
    return len(boxes) > 0 and all(legend.x0 >= ax.x1 for ax, legend in boxes)


def test_pictures_of_two_side_by_side(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    both = []
    for gain in (3, 5 / 3):
        model = lecture_mlp(gain)
        both.append(Statistics(model))
        run_train_step(model, sgd(model.parameters()), both[-1])
    figure = both[0].figure(both[1], titles=["gain 3", "gain 5/3"])
    axes = [figure.axes[i : i + 2] for i in range(0, 8, 2)]
    names = ["activations", "gradients of activations", "gradients of weights", "update:data of weights"]
    assert [[ax.get_title("left") for ax in row] for row in axes] == [[name] * 2 for name in names]
    assert [ax.get_title().strip() for ax in axes[0]] == ["gain 3", "gain 5/3"]
    assert [[len(ax.get_lines()) for ax in row] for row in axes[:3]] == [[5, 5], [5, 5], [7, 7]]
    for row in axes:
        assert row[0].get_xlim() == row[1].get_xlim()
        assert row[0].get_ylim() == row[1].get_ylim()
    share = both[0].to_dict()["layers"]["3"]["saturated"]
    texts = axes[0][0].get_legend().get_texts()
    assert texts[0].get_text() == f" 3 Tanh  {100 * share:.0f} % saturated"
    assert texts[0].get_color() != axes[0][1].get_legend().get_texts()[-1].get_color()
    weight = next(line for line in axes[3][0].get_lines() if line.get_label().startswith(" 4.weight"))
    assert weight.get_ydata() == pytest.approx([math.log10(r) for r in both[0]._params["4.weight"].updates], abs=1e-5)
    assert any(list(line.get_ydata()) == [-3, -3] for line in axes[3][0].get_lines())
    middles, density = axes[0][0].get_lines()[0].get_data()
    assert sum(density) * (middles[1] - middles[0]) == pytest.approx(1, abs=0.02)
    assert legends_outside(figure)
    for name in ("picture.png", "picture.svg"):
        both[0].plot(tmp_path / name, both[1])
        assert (tmp_path / name).stat().st_size > 1000


def test_pictures_of_thirty_layers() -> None:
    pytest.importorskip("matplotlib")
    model = lecture_mlp(depth=30)
    stats = Statistics(model)
    run_train_step(model, sgd(model.parameters()), stats)
    figure = stats.figure()
    assert len(figure.axes[0].get_lines()) == 30
    assert len({tuple(line.get_color()) for line in figure.axes[0].get_lines()}) == 30
    assert len(figure.axes[0].get_legend().get_texts()) == 30
    assert legends_outside(figure)
    heights = [ax.get_legend().get_window_extent().height / ax.get_window_extent().height for ax in figure.axes]
    assert max(heights) <= 1.05
    assert min(ax.get_window_extent().width for ax in figure.axes) > figure.bbox.width / 3


def test_pictures_without_nonlinearities_or_updates_say_so() -> None:
    pytest.importorskip("matplotlib")
    model = Linear(2, 3)
    with Statistics(model) as stats:
        model(torch.ones(4, 2))
    texts = [ax.texts[0].get_text() for ax in stats.figure().axes]
    assert texts == [
        "no nonlinearity was seen",
        "no gradient of a nonlinearity was seen",
        "no gradient of a weight was seen",
        "no update of a weight was seen",
    ]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch) -> None:
    model = Linear(2, 3)
    with Statistics(model) as stats:
        model(torch.ones(4, 2))
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'need matplotlib: pip install "handgrad\[models\]"'):
        stats.figure()
