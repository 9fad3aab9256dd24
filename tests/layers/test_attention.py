"""SelfAttention against torch.nn.MultiheadAttention."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, SelfAttention, ShapeError
from tests.reference import compare, draw


class Reference(torch.nn.MultiheadAttention):
    """Query, key and value are all x; any leading dimensions."""

    def __init__(self, *args, causal=False, **kwargs):
        super().__init__(*args, batch_first=True, **kwargs)
        self.causal = causal

    def forward(self, x):
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1) if self.causal else None
        rows = x.reshape(-1, *x.shape[-2:])
        return super().forward(rows, rows, rows, need_weights=True, attn_mask=mask)[0].reshape(x.shape)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "heads"), [(6, 1), (6, 2), (6, 6), (1, 1)])
def test_it_agrees_with_torch(size, heads, bias, causal):
    layer = SelfAttention(size, heads, bias, causal=causal)
    reference = Reference(size, heads, bias=bias, causal=causal)
    compare(layer, reference, [(draw(4, 5, size),), (draw(3, size),), (draw(2, 3, 1, size),), (draw(1, 4, size) * 9,)])


@pytest.mark.parametrize("bias", [False, True])
def test_the_same_seed_gives_torchs_weights(bias):
    torch.manual_seed(5)
    layer = SelfAttention(6, 2, bias)
    torch.manual_seed(5)
    reference = torch.nn.MultiheadAttention(6, 2, bias=bias)
    state = reference.state_dict()
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name


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
    assert repr(SelfAttention(6, 2, False, causal=True)) == "SelfAttention(6, num_heads=2, causal=True, bias=False)"
