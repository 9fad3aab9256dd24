"""The table of all gradients of one step."""

from __future__ import annotations

import torch

from handgrad import BatchNorm1d, CrossEntropy, Linear, Sequential, Tanh
from handgrad.testing import gradient_table


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
