"""The cells: initial weights, and what they refuse. Their gradients are in the cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handgrad import ArgumentError, DtypeError, GRUCell, LSTMCell, RNNCell, ShapeError

CELLS = [
    (RNNCell, nn.RNNCell, {}),
    (RNNCell, nn.RNNCell, {"bias": False, "nonlinearity": "relu"}),
    (GRUCell, nn.GRUCell, {}),
    (GRUCell, nn.GRUCell, {"bias": False}),
    (LSTMCell, nn.LSTMCell, {}),
    (LSTMCell, nn.LSTMCell, {"bias": False}),
]


@pytest.mark.parametrize(("kind", "reference", "flags"), CELLS)
def test_the_same_seed_gives_torchs_weights(kind, reference, flags):
    torch.manual_seed(5)
    layer = kind(3, 5, **flags)
    torch.manual_seed(5)
    state = reference(3, 5, **flags).state_dict()
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("kind", [RNNCell, GRUCell, LSTMCell])
def test_a_step_without_a_state_starts_from_zeros(kind):
    cell, x = kind(3, 4), torch.randn(2, 3)
    zeros = (torch.zeros(2, 4),) * 2 if kind is LSTMCell else torch.zeros(2, 4)
    torch.testing.assert_close(cell(x), cell(x, zeros), rtol=0, atol=0)
    dout = torch.ones(2, 4)
    dx, _ = cell.backward((dout, dout) if kind is LSTMCell else dout)
    assert torch.equal(cell.backward((dout, dout) if kind is LSTMCell else dout), dx)


def test_errors_and_repr():
    with pytest.raises(ShapeError, match=r"GRUCell\(3 -> 4\)\.forward: last dimension of x must be 3, got shape"):
        GRUCell(3, 4)(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"h must have shape \(2, 4\) for x of shape \(2, 3\), got \(4,\)"):
        RNNCell(3, 4)(torch.zeros(2, 3), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"c must have shape \(2, 4\) for x of shape \(2, 3\), got \(2, 3\)"):
        LSTMCell(3, 4)(torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(2, 3)))
    with pytest.raises(ShapeError, match=r"state must be the tuple \(h, c\), got Tensor"):
        LSTMCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(DtypeError, match=r"must have torch\.float32, the dtype of the parameters"):
        GRUCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(DtypeError, match=r"x must be a torch\.Tensor, got list"):
        LSTMCell(3, 4)([1.0])
    with pytest.raises(ArgumentError, match="RNNCell: nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        RNNCell(3, 4, nonlinearity="gelu")
    with pytest.raises(ArgumentError, match="GRUCell: hidden_size must be an int of at least 1, got 0"):
        GRUCell(3, 0)
    assert repr(RNNCell(3, 4, False, "relu")) == "RNNCell(3 -> 4, bias=False, nonlinearity='relu')"
