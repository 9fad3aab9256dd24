"""The table of all gradients of one step."""

from __future__ import annotations

import pytest
import torch

from handgrad import (
    MSE,
    Add,
    BatchNorm1d,
    Constant,
    CrossEntropy,
    Embedding,
    Graph,
    GRUCell,
    Layer,
    Linear,
    Loss,
    Losses,
    Multiply,
    Parallel,
    Sequential,
    Tanh,
    Unroll,
)
from handgrad.testing import gradient_table
from tests.testing.unusual import Softmax32


def test_the_table_shows_a_wrong_row_and_touches_nothing():
    """The wrong layer's rows, and those before it on the way back, are right or wrong as they are."""

    class Wrong(Tanh):
        def backward(self, dout):
            return super().backward(dout) * 1.01

    generator = torch.Generator().manual_seed(1)
    layers = [Linear(3, 4, generator=generator), BatchNorm1d(4), Wrong(), Linear(4, 3, generator=generator)]
    model = Sequential(*layers).to(torch.float64)
    x, target = torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    table = gradient_table(model, CrossEntropy(), x, target)
    approximate = {row.name: row.approximate for row in table.rows}
    assert not table.ok
    assert approximate["loss"]
    assert approximate["3.weight"]
    assert not approximate["2.dx (Wrong)"]
    assert not approximate["0.weight"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.pending == 0


class Unbind(Layer):
    """A tuple of what lies along the last dimension."""

    def forward(self, x):
        out = x.unbind(-1)
        self.push(out=out)
        return out

    def backward(self, dout):
        self.pop(dout)
        return torch.stack(dout, -1)


class Distance(Layer):
    """Of two inputs."""

    def forward(self, a, b):
        out = (a - b) ** 2
        self.push(a - b, out=out)
        return out

    def backward(self, dout):
        (d,) = self.pop(dout)
        return 2 * d * dout, -2 * d * dout


class DistanceOfPair(Distance):
    """Of one input, which is a tuple."""

    def forward(self, pair):
        return super().forward(*pair)


def names(table):
    return [row.name for row in table.rows]


def notes(table):
    return {row.name: row.note for row in table.rows if row.note}


@pytest.mark.parametrize("last", [Distance, DistanceOfPair])
def test_a_layer_of_several_inputs_has_a_row_for_each(last):
    """Whether they come one by one or as a tuple."""
    table = gradient_table(Sequential(Linear(3, 2), Unbind(), last()), MSE(), torch.randn(5, 3), torch.randn(5))
    head = ["loss", "dx of the loss", f"2.dx[0] ({last.__name__})", f"2.dx[1] ({last.__name__})"]
    assert names(table) == [*head, "1.dx (Unbind)", "0.dx (Linear)", "0.weight", "0.bias"]
    assert table.ok


def test_one_wrong_dx_of_several_is_shown():
    class Wrong(Distance):
        def backward(self, dout):
            da, db = super().backward(dout)
            return da, 1.01 * db

    table = gradient_table(Sequential(Linear(3, 2), Unbind(), Wrong()), MSE(), torch.randn(5, 3), torch.randn(5))
    right = {row.name: row.approximate for row in table.rows}
    assert not table.ok
    assert right["2.dx[0] (Wrong)"]
    assert not right["2.dx[1] (Wrong)"]
    assert not right["0.weight"]


def test_tuples_go_in_and_out():
    """And into a loss of several outputs."""

    class Both(Loss):
        def forward(self, x, target):
            a, b = x
            out = ((a - target[0]) ** 2).sum() + (b * target[1]).sum()
            self.push(a - target[0], target[1], out=out)
            return out

        def backward(self, dout=None):
            diff, factor = self.pop(dout)
            return 2 * diff, factor.clone()

    model = Parallel(Linear(3, 2), Tanh())
    x, target = (torch.randn(5, 3), torch.randn(4)), (torch.randn(5, 2), torch.randn(4))
    for loss in (Both(), Losses(MSE(), MSE(), weights=(1, 0.5))):
        table = gradient_table(model, loss, x, target)
        head = ["loss", "dx[0] of the loss", "dx[1] of the loss"]
        assert names(table) == [*head, "1.dx (Tanh)", "0.dx (Linear)", "0.weight", "0.bias"]
        assert table.ok
    assert not any(t.requires_grad for t in x)


def test_a_graph_with_shared_frozen_and_constant_layers():
    """Each use has its rows; what is frozen, or constant, says so."""
    tower = Linear(4, 4)
    model = Graph(
        "x t",
        "out",
        h=(Linear(3, 4).freeze(), "x"),
        e=(Embedding(10, 4), "t"),
        c=(Constant(Linear(4, 4)), "h"),
        s=(Multiply(), "c e"),
        l=(tower, "s"),
        r=(tower, "l"),
        out=(Add(), "r h"),
    )
    table = gradient_table(model, MSE(), (torch.randn(5, 3), torch.randint(10, (5,))), torch.randn(5, 4))
    assert table.ok
    assert {"l.dx (Linear, use 1)", "l.dx (Linear, use 2)", "s.dx[0] (Multiply)", "s.dx[1] (Multiply)"} <= {
        *names(table)
    }
    constant = {"c.body.weight": "no gradient", "c.body.bias": "no gradient"}
    assert notes(table) == {"h.weight": "frozen", "h.bias": "frozen", **constant}


def test_a_gradient_of_a_frozen_parameter_is_wrong():
    class Writes(Linear):
        def backward(self, dout, need_dx=True):
            self.bias.grad = dout.sum(0)
            return super().backward(dout, need_dx)

    table = gradient_table(Writes(3, 2).freeze(), MSE(), torch.randn(5, 3), torch.randn(5, 2))
    assert not table.ok
    assert notes(table) == {"weight": "frozen", "bias": "frozen, yet there is one by hand"}


def test_a_dx_that_nobody_wants_has_no_row():
    """The layer above a constant is not asked for its dx."""
    model = Sequential(Constant(Linear(3, 3)), Linear(3, 2))
    table = gradient_table(model, MSE(), torch.randn(5, 3), torch.randn(5, 2))
    assert table.ok
    assert names(table) == ["loss", "dx of the loss", "1.weight", "1.bias", "0.body.weight", "0.body.bias"]


def test_a_recurrent_cell_has_rows_for_every_step():
    table = gradient_table(Unroll(GRUCell(3, 4)), MSE(), torch.randn(2, 3, 3), torch.randn(2, 3, 4))
    assert table.ok
    assert {"cell.dx[1] (GRUCell, use 3)", "cell.dx (GRUCell, use 1)"} <= {*names(table)}


def test_it_reads_well_on_a_terminal_and_in_a_notebook():
    class Wrong(Tanh):
        def backward(self, dout):
            return super().backward(dout)[:, :1]

    class Slightly(Tanh):
        def backward(self, dout):
            return super().backward(dout) * 1.01

    model = Sequential(Slightly(), Tanh(), Linear(3, 2).freeze())
    table = gradient_table(model, MSE(), torch.randn(5, 3), torch.randn(5, 2))
    lines = str(table).splitlines()
    assert repr(table) == str(table)
    assert lines[0].split() == ["exact", "approximate", "max", "difference"]
    assert [line.split()[-1] for line in lines if line.startswith(("0.dx", "2.weight"))] == ["frozen", "wrong"]
    assert table._repr_html_().startswith("<table><tr><th ")
    assert table._repr_html_().count("<tr>") == 1 + len(table.rows)
    name = "a_node_with_a_long_name_" * 3
    wide = gradient_table(Graph("x", name, **{name: (Wrong(), "x")}), MSE(), torch.randn(5, 3), torch.randn(5, 3))
    assert max(map(len, str(wide).splitlines())) <= 100
    assert "instead of" in str(wide)


def test_a_model_in_float64_with_a_layer_in_float32():
    """It is right up to the rounding of float32; and a wrong one is not."""
    model = Sequential(Linear(3, 4), Softmax32()).to(torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    assert gradient_table(model, CrossEntropy(), x, y).ok

    class Wrong(Softmax32):
        def backward(self, dout):
            return super().backward(dout) * (1 + 1e-6)

    model = Sequential(Linear(3, 4), Wrong()).to(torch.float64)
    assert not gradient_table(model, CrossEntropy(), x, y).ok
