"""The profile of a model: its rows, what it leaves behind, and its picture."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import nn

import handgrad as hg
from handgrad import bench
from handgrad.bench.profiler import Profile, Row


def test_profile_refuses_to_drop_what_waits_for_a_backward():
    model = hg.Linear(3, 4)
    model(torch.ones(2, 3))
    with pytest.raises(hg.StateError, match=r"profile: a forward still waits for its backward"):
        bench.profile(model, torch.ones(2, 3), torch.ones(2, 4))
    model.drop_records()
    with torch.no_grad():
        assert len(bench.profile(model, torch.ones(2, 3), torch.ones(2, 4), seconds=0.0).rows) == 3


def test_profile_has_one_row_per_layer_and_leaves_the_model_as_it_was():
    model = hg.Sequential(hg.Embedding(5, 3), hg.Flatten(), hg.Sequential(hg.Linear(6, 4), hg.BatchNorm1d(4)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model[0].weight.grad = grad = torch.ones(5, 3)
    p = bench.profile(model, torch.randint(5, (8, 2)), torch.randint(4, (8,)), seconds=0.0)
    assert [row.path for row in p.rows] == ["0", "1", "2.0", "2.1", "loss", "rest"]
    assert sum(row.share for row in p.rows) == pytest.approx(1, abs=0.3)
    assert p.rows[2].parameters == 28
    assert "Linear(6 -> 4)" in str(p)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[0].weight.grad is grad
    assert model.pending == 0
    assert "forward" not in vars(model[0])
    assert "backward" not in vars(model[2])


def rows_of(model, x, y, loss=None):
    return {row.path: row for row in bench.profile(model, x, y, loss, seconds=0.0).rows}


class Pause(hg.Tanh):
    """Takes its time."""

    def forward(self, x):
        time.sleep(0.004)
        return super().forward(x)

    def backward(self, dout):
        time.sleep(0.002)
        return super().backward(dout)


class Scaled(hg.Layer):
    """A composite with a parameter of its own."""

    weight = hg.parameter()

    def __init__(self, body):
        self.weight, self.body = torch.ones(()), body

    def forward(self, x):
        y = self.body.forward_at("body", x)
        out = self.weight * y
        self.push(y, out=out)
        return out

    def backward(self, dout):
        (y,) = self.pop(dout)
        self.add_grad(self.weight, (dout * y).sum())
        return self.body.backward_at("body", self.weight * dout)


def test_what_a_composite_takes_does_not_count_what_is_inside_it():
    rows = rows_of(hg.Sequential(Scaled(hg.Sequential(Pause(), hg.Linear(3, 2)))), torch.ones(4, 3), torch.ones(4, 2))
    assert list(rows) == ["0", "0.body.0", "0.body.1", "loss", "rest"]
    assert rows["0.body.0"].forward > 0.004 > rows["0"].forward > 0
    assert rows["0.body.0"].backward > 0.002 > rows["0"].backward > 0
    assert (rows["0"].parameters, rows["0.body.1"].parameters) == (1, 8)
    assert (rows["0"].recorded, rows["0.body.0"].recorded) == (4 * 4 * 2, 4 * 4 * 3)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)


def test_nodes_of_a_graph_have_their_names_and_a_layer_used_twice_one_row():
    twice = Pause()
    model = hg.Graph("x t", "out", a=(twice, "x"), b=(twice, "a"), e=(hg.Embedding(5, 3), "t"), out=(hg.Add(), "b e"))
    rows = rows_of(model, (torch.ones(4, 3), torch.arange(4)), torch.ones(4, 3))
    assert list(rows) == ["a", "e", "out", "loss", "rest"]
    assert rows["a"].forward > 0.008
    assert rows["a"].recorded == 2 * 4 * 4 * 3


def test_a_container_that_records_has_a_row_and_another_one_is_in_the_rest():
    gate = hg.Product(hg.Sigmoid(), hg.Residual(hg.Tanh()))
    rows = rows_of(hg.Sequential(gate), torch.ones(4, 3), torch.ones(4, 3))
    assert list(rows) == ["0", "0.0", "0.1.body", "loss", "rest"]
    assert rows["rest"].recorded == 0
    assert rows["rest"].backward > 0


def test_tuples_go_in_and_out():
    model = hg.Parallel(hg.Linear(3, 2), hg.Linear(3, 4))
    y = (torch.ones(5, 2), torch.arange(4).repeat(2)[:5])
    for loss in (None, hg.Losses(hg.MSE(), hg.CrossEntropy())):
        rows = rows_of(model, (torch.ones(5, 3), torch.zeros(5, 3)), y, loss)
        assert list(rows) == ["0", "1", "loss", "rest"]
        assert rows["loss"].layer.startswith("Losses(")
        assert rows["loss"].recorded > 4 * 5 * 4


def test_a_torch_module_is_one_layer():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    rows = rows_of(hg.Sequential(hg.from_torch(module), hg.Tanh()), torch.ones(5, 3), torch.ones(5, 2))
    assert list(rows) == ["0", "1", "loss", "rest"]
    assert rows["0"].parameters == 26


def test_every_memory_and_every_parameter_counts_once():
    first, second = hg.Linear(3, 3), hg.Linear(3, 3)
    second.weight = first.weight
    model, x, y = hg.Sequential(first, hg.Tanh(), second), torch.ones(4, 3), torch.ones(4, 3)
    p = bench.profile(model, x, y, seconds=0.0)
    assert sum(row.parameters for row in p.rows) == 9 + 3 + 3
    assert [(row.path, row.recorded) for row in p.rows][:3] == [("0", 48), ("1", 48), ("2", 0)]
    assert p.seconds == pytest.approx(sum(row.forward + row.backward for row in p.rows))


def test_watchers_are_put_back_and_go_on_watching():
    model = hg.Sequential(hg.Linear(3, 2), hg.Tanh())
    seen = []
    look = lambda path, layer, t: seen.append(path)  # noqa: E731
    with hg.watch(model, x=look, dx=look), hg.watch(model[1], x=look):
        before = [vars(layer)["forward"] for layer in (model, model[1])]
        bench.profile(model, torch.ones(4, 3), torch.ones(4, 2), seconds=0.0)
        assert [vars(layer)["forward"] for layer in (model, model[1])] == before
        assert "forward" not in vars(model[0])
        seen.clear()
        model(torch.ones(4, 3))
        assert seen == ["", ""]
    assert not {"forward", "backward"} & (vars(model).keys() | vars(model[1]).keys())


def test_an_error_leaves_nothing_behind():
    model = hg.Sequential(hg.Linear(3, 2), hg.Tanh(), hg.Linear(3, 2))
    model[0].bias.grad = grad = torch.ones(2)
    with pytest.raises(hg.ShapeError, match=r"in 2 \(Linear"):
        bench.profile(model, torch.ones(4, 3), torch.ones(4, 2))
    assert model.pending == 0
    assert not any("forward" in vars(layer) for _, layer in model.named_layers())
    assert model[0].bias.grad is grad


def test_on_a_device_every_call_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    model = hg.Sequential(hg.Linear(3, 2), hg.Tanh())
    bench.profile(model, torch.ones(4, 3), torch.ones(4, 2), seconds=0.0)
    assert not waits
    with torch.device("meta"):
        model, x, y = hg.Sequential(hg.Linear(3, 2), hg.Tanh()), torch.ones(4, 3), torch.ones(4, 2)
    bench.profile(model, x, y, seconds=0.0)
    assert len(waits) == 6 * 2 * 5  # rounds; ways; two layers, the model, the loss, and all of it


def test_the_table_is_at_most_100_columns_wide_and_there_is_one_for_notebooks():
    layer = hg.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, bias=False)
    names = {"a_name_that_is_rather_long_for_a_layer": (layer, "x")}
    model = hg.Sequential(hg.Graph("x", "out", **names, out=(hg.Flatten(), next(iter(names)))))
    p = bench.profile(model, torch.randn(2, 3, 9, 9), torch.randint(4, (2,)), seconds=0.0)
    assert max(map(len, str(p).splitlines())) <= 100
    assert str(p).splitlines()[-1].split()[0] == "total"
    assert "100%" in str(p).splitlines()[-1]
    assert p._repr_html_().startswith("<table><tr><th ")
    assert "3 -&gt; 4" in p._repr_html_()


def models():
    """A small one, and one of 40 layers with long names."""
    yield hg.Sequential(hg.Linear(3, 8), hg.BatchNorm1d(8), hg.Tanh(), hg.Linear(8, 8), hg.Tanh(), hg.Linear(8, 2))
    nodes, last = {}, "x"
    for i in range(20):
        name = f"the_linear_layer_number_{i}"
        nodes[name], nodes[f"act{i}"], last = (hg.Linear(3, 3), last), (hg.Tanh(), name), f"act{i}"
    yield hg.Graph("x", last, **nodes)


@pytest.mark.parametrize("model", list(models()), ids=["6 layers", "40 layers"])
def test_the_picture_has_a_row_for_every_layer_and_nothing_lies_over_anything(model):
    pytest.importorskip("matplotlib")
    y = torch.ones(5, 2) if isinstance(model, hg.Sequential) else torch.ones(5, 3)
    p = bench.profile(model, torch.ones(5, 3), y, seconds=0.0)
    figure = p.figure()
    figure.draw_without_rendering()
    times, memory = figure.axes
    labels = [f"{row.path}  {row.layer}".strip() for row in p.rows]
    assert [text.get_text() for text in times.get_yticklabels()] == labels
    forward, backward, recorded = *times.containers, *memory.containers
    size = forward[0].get_width() / p.rows[0].forward
    for i, row in enumerate(p.rows):
        assert forward[i].get_width() == pytest.approx(size * row.forward)
        assert backward[i].get_width() == pytest.approx(size * row.backward)
        assert backward[i].get_x() == pytest.approx(size * row.forward)
        middles = {round(bars[i].get_y() + bars[i].get_height() / 2, 6) for bars in (forward, backward, recorded)}
        assert middles == {i}
    assert times.get_ylim()[0] > times.get_ylim()[1]  # the first layer at the top
    assert [t.get_text() for t in times.get_legend().get_texts()] == ["forward", "backward"]
    bars = [bar.get_window_extent() for axes in (times, memory) for bar in axes.patches]
    texts = [*times.get_yticklabels(), *times.texts, *memory.texts, times.xaxis.label, memory.xaxis.label]
    for axes in (times, memory):
        left, right = axes.get_xlim()
        texts += [t for at, t in zip(axes.get_xticks(), axes.get_xticklabels()) if left <= at <= right]
    places = [t.get_window_extent() for t in texts if t.get_text()]
    places += [axes.get_legend().get_window_extent() for axes in (times, memory)]
    for i, place in enumerate(places):
        assert figure.bbox.x0 <= place.x0 < place.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= place.y0 < place.y1 <= figure.bbox.y1
        assert not any(place.overlaps(other) for other in places[i + 1 :])
        assert not any(place.overlaps(bar) for bar in bars if bar.width > 0)


def test_the_picture_is_written_as_its_name_says(tmp_path):
    pytest.importorskip("matplotlib")
    p = Profile([Row("0", "Linear(" + ", ".join("abcdefghijklmno") + ")", 1e-3, 2e-3, 0, 0, 1.0)])
    p.plot(tmp_path / "p.png")
    p.plot(str(tmp_path / "p.svg"))
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert [t.get_text() for t in p.figure().axes[0].get_yticklabels()] == ["0  Linear"]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'a picture needs matplotlib: pip install "handgrad\[models\]"'):
        Profile([Row("0", "Tanh()", 1e-3, 2e-3, 0, 0, 1.0)]).figure()
