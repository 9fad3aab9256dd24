"""What a model holds for its backwards, layer by layer."""

from __future__ import annotations

import torch

from handgrad import Embedding, Flatten, Graph, GRUCell, Layer, Linear, Sequential, Tanh, parameter
from handgrad.bench import recorded_bytes
from handgrad.records import tensors_in


def found(model):
    return {row.path: (row.forwards, row.dtypes, row.bytes) for row in model.records().rows}


def test_a_row_says_how_many_forwards_wait_and_what_they_hold():
    model = Sequential(Embedding(7, 2), Flatten(), Linear(6, 5), Tanh()).to(torch.float64)
    assert model.records().rows == ()
    model(torch.zeros(4, 3, dtype=torch.int64))
    model(torch.zeros(2, 3, dtype=torch.int64))
    model[3](torch.ones(1, 5, dtype=torch.float64))
    assert found(model) == {
        "": (2, (), 0),
        "0": (2, (torch.int64,), 6 * 3 * 8),
        "1": (2, (), 0),
        "2": (2, (torch.float64,), 6 * 6 * 8),
        "3": (3, (torch.float64,), 7 * 5 * 8),
    }
    assert (model.records().forwards, model.records().bytes) == (11, 144 + 288 + 280)
    assert model.records().forwards == model.pending
    model.drop_records()
    assert model.records().rows == ()


def test_each_memory_counts_once_and_no_parameter():
    class Keeps(Layer):
        """All kinds of things."""

        weight = parameter("D")

        def __init__(self):
            self.weight = torch.ones(3)

        def forward(self, x):
            out = x + self.weight
            self.push(x[:1], [x.t(), {"weight": self.weight[None]}], (out, None, 3), out=out)
            return out

    model, x = Sequential(Keeps(), Keeps()), torch.ones(4, 3)
    model(x)
    assert {path: size for path, (_, _, size) in found(model).items()} == {"": 0, "0": 48 + 48, "1": 48}
    assert recorded_bytes(model) == model.records().bytes == 144
    assert [row.recorded for row in model.summary(x).rows] == [0, 96, 48]


def test_layers_inside_a_graph_have_their_paths_and_those_without_a_forward_no_row():
    model = Graph("x h", "out", cell=(GRUCell(3, 3), "x h"), out=(Sequential(Tanh()), "cell"))
    model.nodes["cell"][0](torch.ones(2, 3), torch.ones(2, 3))
    assert list(found(model)) == ["cell"]
    assert found(model)["cell"][0] == 1


def test_under_no_grad_nothing_is_held():
    model = Linear(3, 2)
    with torch.no_grad():
        model(torch.ones(1, 3))
    assert str(model.records()) == "no forward waits for its backward"
    assert model.records()._repr_html_() == "<p>no forward waits for its backward</p>"


def test_it_is_a_table_on_a_terminal_and_in_a_notebook():
    model = Sequential(Linear(3, 2), Tanh())
    model(torch.ones(1, 3))
    assert str(model.records()).splitlines()[-1].split() == ["total", "3", "20", "B"]
    assert "<td" in model.records()._repr_html_()
    assert "Linear(3 -&gt; 2)" in model.records()._repr_html_()


def test_tensors_are_found_in_nested_tuples_lists_and_dicts():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [id(t) for t in tensors_in((a, [{"k": b}, None], 3, {"l": (c,)}))] == [id(a), id(b), id(c)]
