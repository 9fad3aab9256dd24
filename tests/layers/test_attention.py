"""SelfAttention without rows or steps, with saturated scores; errors."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, SelfAttention, ShapeError


@pytest.mark.parametrize("causal", [False, True])
def test_no_rows_and_no_steps(causal):
    layer = SelfAttention(6, 2, causal=causal)
    for shape in ((0, 3, 6), (2, 0, 6), (0, 6)):
        assert layer(torch.zeros(shape)).shape == shape
        assert layer.backward(torch.zeros(shape)).shape == shape
    assert not layer.in_proj_weight.grad.any()


def test_saturated_scores_stay_finite():
    layer = SelfAttention(4, 2, causal=True)
    for scale in (1e2, 1e4):
        layer(torch.randn(2, 5, 4) * scale)
        assert layer.backward(torch.randn(2, 5, 4)).isfinite().all()


def test_errors_and_repr():
    with pytest.raises(ArgumentError, match="SelfAttention: num_heads must divide embed_dim, got 4 and 6"):
        SelfAttention(6, 4)
    with pytest.raises(ShapeError, match=r"SelfAttention\(6, num_heads=2\)\.forward: x must be \(\.\.\., T, 6\), got"):
        SelfAttention(6, 2)(torch.zeros(2, 3, 5))
    with pytest.raises(ShapeError, match=r"got shape \(6,\)"):
        SelfAttention(6, 2)(torch.zeros(6))
    assert repr(SelfAttention(6, 2, False, causal=True)) == "SelfAttention(6, num_heads=2, bias=False, causal=True)"
