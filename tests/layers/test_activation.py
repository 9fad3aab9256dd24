"""The activations against torch.nn: ordinary values, kinks, extremes, errors."""

from __future__ import annotations

import pytest
import torch

from handgrad import GELU, ArgumentError, DtypeError, LeakyReLU, LogSoftmax, ReLU, ShapeError, Sigmoid, SiLU, Softmax
from tests.reference import compare, draw

PAIRS = [
    (Sigmoid(), torch.nn.Sigmoid()),
    (ReLU(), torch.nn.ReLU()),
    (LeakyReLU(), torch.nn.LeakyReLU()),
    (LeakyReLU(0.3), torch.nn.LeakyReLU(0.3)),
    (LeakyReLU(-0.3), torch.nn.LeakyReLU(-0.3)),
    (SiLU(), torch.nn.SiLU()),
    (GELU(), torch.nn.GELU()),
    (GELU("tanh"), torch.nn.GELU(approximate="tanh")),
    (Softmax(0), torch.nn.Softmax(0)),
    (Softmax(-1), torch.nn.Softmax(-1)),
    (LogSoftmax(0), torch.nn.LogSoftmax(0)),
    (LogSoftmax(-1), torch.nn.LogSoftmax(-1)),
]


@pytest.mark.parametrize(("layer", "reference"), PAIRS, ids=repr)
def test_activations_agree_with_torch(layer, reference):
    compare(layer, reference, [(draw(4, 3),), (draw(2, 5, 3) * 3,), (draw(6),), (draw(),), (draw(0, 3),)])


@pytest.mark.parametrize(("layer", "reference"), PAIRS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kinks_and_extremes_agree_with_torch(layer, reference, dtype):
    """The slope at 0, saturation without NaN, infinities and NaN where torch has them."""
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30], [30.0, -30.0, 800.0, -800.0], [8.0, -8.0, 1e4, -1e4]], dtype=dtype)
    rows = [x] if isinstance(layer, (Softmax, LogSoftmax)) else [x, torch.tensor([torch.nan], dtype=dtype)]
    for row in rows:
        leaf = row.clone().requires_grad_()
        out = reference(leaf)
        dout = torch.linspace(-2, 3, row.numel(), dtype=dtype).reshape(row.shape)
        out.backward(dout)
        torch.testing.assert_close(layer(row), out.detach(), equal_nan=True)
        close = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 2e-6}}[dtype]
        torch.testing.assert_close(layer.backward(dout), leaf.grad, equal_nan=True, **close)


def test_errors():
    with pytest.raises(ArgumentError, match="GELU: approximate must be 'none' or 'tanh', got 'erf'"):
        GELU("erf")
    with pytest.raises(ShapeError, match=r"Softmax\(dim=2\)\.forward: x must have dimension 2, got shape \(2, 3\)"):
        Softmax(2)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"LogSoftmax\(dim=-2\)\.forward: x must have dimension -2"):
        LogSoftmax(-2)(torch.zeros(3))
    for layer, _ in PAIRS:
        with pytest.raises(DtypeError, match=r"x must have a floating dtype, got torch\.int64"):
            layer(torch.arange(3))


def test_repr():
    assert [repr(layer) for layer, _ in PAIRS][3:9] == [
        "LeakyReLU(0.3)",
        "LeakyReLU(-0.3)",
        "SiLU()",
        "GELU()",
        "GELU(approximate='tanh')",
        "Softmax(dim=0)",
    ]
