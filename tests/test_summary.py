"""The summary of a model: shapes, parameters, what is frozen, what is recorded; as text and as HTML."""

from __future__ import annotations

import torch

from handgrad import (
    GRU,
    MSE,
    Add,
    BatchNorm1d,
    Conv2d,
    Dropout,
    Embedding,
    Flatten,
    Graph,
    Linear,
    Sequential,
    Tanh,
    watch,
)
from handgrad.testing import gradient_table


def test_rows_say_shapes_parameters_and_recorded_bytes():
    model = Sequential(Embedding(7, 2), Flatten(), Linear(6, 5), Tanh(), Linear(5, 3, bias=False).freeze())
    summary = model.summary(torch.zeros(4, 3, dtype=torch.int64))
    found = {row.path: (row.outputs, row.parameters, row.frozen, row.recorded) for row in summary.rows}
    assert found == {
        "": (("(4, 3)",), 0, 0, 0),
        "0": (("(4, 3, 2)",), 14, 0, 4 * 3 * 8),  # the indices
        "1": (("(4, 6)",), 0, 0, 0),
        "2": (("(4, 5)",), 35, 0, 4 * 6 * 4),  # its input
        "3": (("(4, 5)",), 0, 0, 4 * 5 * 4),  # its output
        "4": (("(4, 3)",), 15, 15, 0),  # its input, which counts above
    }
    assert str(summary).splitlines()[-1].split() == ["total", "64", "(15", "frozen)", "272", "B"]


def test_a_layer_used_twice_and_a_shared_tensor_count_once():
    shared = Linear(3, 3)
    other = Linear(3, 3)
    other.weight = shared.weight
    rows = Graph("x", "out", a=(shared, "x"), b=(shared, "a"), c=(other, "b"), out=(Add(), "b c")).summary(
        torch.ones(2, 3)
    )
    by_path = {row.path: row for row in rows.rows}
    assert by_path["a"].outputs == ("(2, 3)", "(2, 3)")
    assert (by_path["a"].parameters, by_path["c"].parameters) == (12, 3)


def test_the_model_stays_as_it_was():
    model = Sequential(BatchNorm1d(3), Dropout(0.5), GRU(3, 2, return_state=True))
    state = {key: t.clone() for key, t in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert "(4, 2), (2,)" in str(model.summary(torch.randn(4, 3)))
    torch.manual_seed(1)
    model.summary(torch.zeros(4, 3))
    assert torch.equal(torch.rand(3), expected)  # the global generator, too
    assert model.pending == 0
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_html_is_escaped():
    html = Linear(3, 4).summary(torch.ones(2, 3))._repr_html_()
    assert ">Linear(3 -&gt; 4)</td>" in html
    assert html.startswith("<table><tr><th ")
    assert ">layer</th>" in html


def test_a_wide_layer_takes_several_lines_of_at_most_100_columns():
    layer = Conv2d(3, 4, 3, stride=2, padding=1, dilation=2, groups=1, bias=False).freeze()
    model = Graph("x", "out", a_name_that_is_rather_long=(layer, "x"), out=(Flatten(), "a_name_that_is_rather_long"))
    text = str(model.summary(torch.randn(2, 3, 9, 9)))
    assert max(map(len, text.splitlines())) <= 100
    lines = text.splitlines()
    start, end = lines[0].index("layer"), lines[0].index("output")
    words = [word for line in lines[2:-2] for word in line[start:end].split()]
    assert words == layer._head().split()


def test_who_watches_sees_nothing_of_it():
    model = Sequential(Linear(3, 2), Tanh())
    seen = []
    look = lambda path, layer, t: seen.append(path)  # noqa: E731
    with watch(model, x=look, out=look, dx=look):
        assert len(model.summary(torch.ones(4, 3)).rows) == 3
        assert gradient_table(model, MSE(), torch.ones(4, 3), torch.ones(4, 2)).ok
        assert seen == []
        model(torch.ones(4, 3))
    assert seen == ["", "0", "1", ""]
    assert not {"forward", "backward"} & vars(model).keys()
    assert not model._watchers
