"""Activations at kinks, at extremes and in float32; errors."""

from __future__ import annotations

import pytest
import torch

import handgrad
from handgrad import GELU, ArgumentError, DtypeError, LogSoftmax, ShapeError, Softmax, twins

MAKERS = {
    "Tanh()": lambda lib: lib.Tanh(),
    "Sigmoid()": lambda lib: lib.Sigmoid(),
    "ReLU()": lambda lib: lib.ReLU(),
    "LeakyReLU(0.01)": lambda lib: lib.LeakyReLU(),
    "LeakyReLU(0.3)": lambda lib: lib.LeakyReLU(0.3),
    "LeakyReLU(-0.3)": lambda lib: lib.LeakyReLU(-0.3),
    "SiLU()": lambda lib: lib.SiLU(),
    "GELU()": lambda lib: lib.GELU(),
    "GELU(approximate='tanh')": lambda lib: lib.GELU("tanh"),
    "Softmax(dim=0)": lambda lib: lib.Softmax(0),
    "Softmax(dim=-1)": lambda lib: lib.Softmax(-1),
    "LogSoftmax(dim=0)": lambda lib: lib.LogSoftmax(0),
    "LogSoftmax(dim=-1)": lambda lib: lib.LogSoftmax(-1),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kinks_and_extremes_agree_with_torch(name, dtype):
    """The slope at 0, saturation without NaN, infinities and NaN where torch has them; but ReLU's slope at NaN is 0."""
    layer, module = MAKERS[name](handgrad), MAKERS[name](twins)
    x = torch.tensor([[0.0, -0.0, 1e-30, -1e-30], [30.0, -30.0, 800.0, -800.0], [8.0, -8.0, 1e4, -1e4]], dtype=dtype)
    rows = [x] if "oftmax" in name else [x, torch.tensor([torch.nan], dtype=dtype)]
    for row in rows:
        leaf = row.clone().requires_grad_()
        out = module(leaf)
        dout = torch.linspace(-2, 3, row.numel(), dtype=dtype).reshape(row.shape)
        out.backward(dout)
        torch.testing.assert_close(layer(row), out.detach(), equal_nan=True)
        wanted = torch.where(row.isnan(), 0, leaf.grad) if name == "ReLU()" else leaf.grad
        close = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 2e-6}}[dtype]
        torch.testing.assert_close(layer.backward(dout), wanted, equal_nan=True, **close)


def test_errors():
    with pytest.raises(ArgumentError, match="GELU: approximate must be 'none' or 'tanh', got 'erf'"):
        GELU("erf")
    with pytest.raises(ShapeError, match=r"Softmax\(dim=2\)\.forward: x must have dimension 2, got shape \(2, 3\)"):
        Softmax(2)(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"LogSoftmax\(dim=-2\)\.forward: x must have dimension -2"):
        LogSoftmax(-2)(torch.zeros(3))
    for make in MAKERS.values():
        with pytest.raises(DtypeError, match=r"x must have a floating dtype, got torch\.int64"):
            make(handgrad)(torch.arange(3))


@pytest.mark.parametrize("name", MAKERS)
def test_repr(name):
    assert repr(MAKERS[name](handgrad)) == name
