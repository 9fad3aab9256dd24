"""Attention without rows or steps, with saturated scores, and with nothing to read; its masks, its dropout; errors."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, DtypeError, MultiheadAttention, SelfAttention, ShapeError, twins
from handgrad.testing import compare


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
    assert (
        repr(SelfAttention(6, 2, bias=False, causal=True)) == "SelfAttention(6, num_heads=2, bias=False, causal=True)"
    )


def test_all_of_one_input_is_self_attention():
    """One tensor for query, key and value: the same output, and the gradients of the three add up to dx."""
    one, three = SelfAttention(6, 2), MultiheadAttention(6, 2, batch_first=True)
    three.load_state_dict(one.state_dict())
    x, dout = torch.randn(2, 4, 5, 6)[:, 0]
    torch.testing.assert_close(three(x, x, x), one(x))
    torch.testing.assert_close(sum(three.backward(dout)), one.backward(dout))
    torch.testing.assert_close(three.in_proj_weight.grad, one.in_proj_weight.grad)


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_query_that_may_read_nothing_gets_zeros_and_sends_nothing(name, kind):
    """As in torch: before out_proj; so with dropout, and in a backward that meets infinite numbers nowhere."""
    hidden = torch.ones(2, 5, dtype=torch.bool) if name == "key_padding_mask" else torch.ones(3, 5, dtype=torch.bool)
    mask = hidden if kind is torch.bool else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    layer = MultiheadAttention(6, 2, 0.5, batch_first=True)
    layer.out_proj.bias.normal_()
    out = layer(torch.randn(2, 3, 6), torch.randn(2, 5, 6), torch.randn(2, 5, 6), **{name: mask})
    assert torch.equal(out, layer.out_proj.bias.expand(2, 3, 6))
    assert not any(d.any() for d in layer.backward(torch.randn(2, 3, 6)))
    assert not layer.in_proj_weight.grad.any()
    assert not layer.out_proj.weight.grad.any()


def test_no_keys_is_nothing_to_read():
    layer = MultiheadAttention(6, 2)
    query, none = torch.randn(3, 2, 6), torch.zeros(0, 2, 6)
    module = twins.MultiheadAttention(6, 2)
    compare(layer, module, (query, none, none))
    out = layer(query, none, none, key_padding_mask=torch.zeros(2, 0, dtype=torch.bool))
    assert not out.any()
    assert [d.shape for d in layer.backward(out)] == [query.shape, none.shape, none.shape]


def test_dropout_draws_from_the_generator_and_in_training_alone():
    """Every probability is zero or doubled, in half of the places; the same seed draws the same."""
    x = torch.randn(1, 20, 4)
    layer = MultiheadAttention(4, 2, 0.5, batch_first=True, generator=torch.Generator().manual_seed(1))
    layer(x, x, x)
    p, a = layer._records[0][0][3:5]
    assert set((a / p).unique().round(decimals=3).tolist()) == {0.0, 2.0}
    assert 0.4 < (a == 0).to(torch.float32).mean() < 0.6
    again = MultiheadAttention(4, 2, 0.5, batch_first=True, generator=torch.Generator().manual_seed(1))
    again(x, x, x)
    assert torch.equal(again._records[0][0][4], a)
    layer.eval()(x, x, x)
    assert layer._records[1][0][3] is layer._records[1][0][4]


def test_errors_and_repr_of_several_inputs():
    layer, x = MultiheadAttention(6, 2, batch_first=True), torch.zeros(2, 3, 6)
    shapes = r"query must be \(N, T, 6\) or \(T, 6\), key and value the same with S for T, got shapes \(2, 3, 6\), "
    with pytest.raises(ShapeError, match=r"MultiheadAttention\(6, num_heads=2, batch_first=True\)\.forward: " + shapes):
        layer(x, x[:1], x[:1])
    for key, value in ((x, x[:, :2]), (x[0], x[0]), (x[..., :5], x[..., :5])):
        with pytest.raises(ShapeError, match=shapes):
            layer(x, key, value)
    with pytest.raises(ShapeError, match=r"query must be \(T, N, 6\) or \(T, 6\), .* got shapes \(2, 3, 5\), "):
        MultiheadAttention(6, 2)(x[..., :5], x, x)
    with pytest.raises(ShapeError, match=r"key_padding_mask must have shape \(2, 3\), got \(3, 2\)"):
        layer(x, x, x, key_padding_mask=torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"key_padding_mask must have shape \(3,\), got \(1, 3\)"):
        layer(x[0], x[0], x[0], key_padding_mask=torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"attn_mask must have shape \(3, 3\) or \(4, 3, 3\), got \(2, 3, 3\)"):
        layer(x, x, x, attn_mask=torch.zeros(2, 3, 3))
    wanted = r"attn_mask must be a tensor of bools, True for what may not be read, or of torch\.float32, got "
    for mask, came in ((torch.zeros(3, 3, dtype=torch.int64), r"torch\.int64"), ([[True]], "list")):
        with pytest.raises(DtypeError, match=wanted + came):
            layer(x, x, x, attn_mask=mask)
    with pytest.raises(ArgumentError, match=r"MultiheadAttention: dropout must be in 0\.\.1, got 1\.5"):
        MultiheadAttention(6, 2, 1.5)
    with pytest.raises(ArgumentError, match="MultiheadAttention: num_heads must divide embed_dim, got 4 and 6"):
        MultiheadAttention(6, 4)
    with pytest.raises(TypeError, match="kdim"):
        MultiheadAttention(6, 2, kdim=3)
    assert repr(MultiheadAttention(6, 2, 0.1, False)) == "MultiheadAttention(6, num_heads=2, dropout=0.1, bias=False)"
