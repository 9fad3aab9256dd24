"""LayerNorm, RMSNorm and GroupNorm on constant and extreme rows; errors."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, DtypeError, GroupNorm, LayerNorm, RMSNorm, ShapeError


@pytest.mark.parametrize("layer", [LayerNorm(4), RMSNorm(4), GroupNorm(1, 4)], ids=repr)
def test_constant_and_extreme_rows_stay_finite(layer):
    x = torch.tensor([[0.0] * 4, [7.0] * 4, [1e4, -1e4, 0.0, 1e-4], [800.0] * 4])
    sizes = (1, 4) if isinstance(layer, GroupNorm) else (4,)
    reference = getattr(torch.nn, type(layer).__name__)(*sizes)
    leaf = x.clone().requires_grad_()
    dout = torch.randn(4, 4)
    reference(leaf).backward(dout)
    torch.testing.assert_close(layer(x), reference(x).detach(), rtol=1e-4, atol=1e-5)
    scale = float(leaf.grad.abs().max())  # a constant row has rstd = 316 and nothing but rounding for xhat
    torch.testing.assert_close(layer.backward(dout), leaf.grad, rtol=1e-3, atol=1e-3 * scale)


def test_errors_and_repr():
    with pytest.raises(ShapeError, match=r"LayerNorm\(5\)\.forward: last dimension of x must be 5, got shape \(2, 4\)"):
        LayerNorm(5)(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"last 2 dimensions of x must be \(3, 5\), got shape \(5,\)"):
        RMSNorm((3, 5))(torch.zeros(5))
    with pytest.raises(DtypeError, match=r"x must have torch\.float32, the dtype of the parameters"):
        LayerNorm(5)(torch.zeros(2, 5, dtype=torch.float64))
    with pytest.raises(
        ArgumentError, match=r"LayerNorm: normalized_shape must be an int of at least 1, or several of them, got"
    ):
        LayerNorm(())
    with pytest.raises(
        ArgumentError, match=r"RMSNorm: normalized_shape must be an int of at least 1, or several of them, got"
    ):
        RMSNorm((3, 0))
    assert repr(LayerNorm((3, 5), eps=0.1, bias=False)) == "LayerNorm((3, 5), eps=0.1, bias=False)"
    assert repr(LayerNorm(3, elementwise_affine=False)) == "LayerNorm(3, elementwise_affine=False, bias=False)"
    assert repr(RMSNorm(3, eps=0.1, elementwise_affine=False)) == "RMSNorm(3, eps=0.1, elementwise_affine=False)"
    with pytest.raises(
        ShapeError, match=r"GroupNorm\(num_groups=2, num_channels=4\)\.forward: x must be \(N, 4, \.\.\.\)"
    ):
        GroupNorm(2, 4)(torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"x must be \(N, 4, \.\.\.\), got shape \(4,\)"):
        GroupNorm(2, 4)(torch.zeros(4))
    with pytest.raises(ShapeError, match=r"the variance of a group needs more than one value, got shape \(1, 4\)"):
        GroupNorm(4, 4)(torch.zeros(1, 4))
    with pytest.raises(ArgumentError, match="GroupNorm: num_groups must divide num_channels, got 3 and 4"):
        GroupNorm(3, 4)
    assert repr(GroupNorm(2, 4, 0.1, False)) == "GroupNorm(num_groups=2, num_channels=4, eps=0.1, affine=False)"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_a_backward_under_autocast_is_refused(kind, affine):
    """It would round the means that dx is made of, which no dtype shows."""
    layer = kind(4, elementwise_affine=affine)
    out = layer(torch.randn(3, 4))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DtypeError, match=r"torch\.autocast must be off"):
        layer.backward(torch.randn_like(out))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_without_a_weight_it_is_as_with_ones(kind):
    plain, ones, x = kind((2, 3), elementwise_affine=False), kind((2, 3)), torch.randn(5, 2, 3)
    assert torch.equal(plain(x), ones(x))
    dout = torch.randn_like(x)
    torch.testing.assert_close(plain.backward(dout), ones.backward(dout), rtol=0, atol=0)
