"""BCEWithLogits at extreme logits, in float32 too; errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from handgrad import BCEWithLogits, DtypeError, ShapeError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pos_weight", [None, 2.5])
def test_extremes_agree_with_torch(dtype, pos_weight):
    x = torch.tensor([0.0, -0.0, 30.0, -30.0, 800.0, -800.0, 1e4, -1e4], dtype=dtype)
    pos_weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=dtype)
    for y in (0.0, 0.25, 1.0):
        target = torch.full_like(x, y)
        leaf = x.clone().requires_grad_()
        truth = binary_cross_entropy_with_logits(leaf, target, reduction="none", pos_weight=pos_weight)
        dout = torch.linspace(-1, 2, len(x), dtype=dtype)
        truth.backward(dout)
        loss = BCEWithLogits(reduction="none", pos_weight=pos_weight)
        torch.testing.assert_close(loss(x, target), truth.detach())
        torch.testing.assert_close(loss.backward(dout), leaf.grad, rtol=1e-6, atol=1e-7)


def test_errors_and_repr():
    loss = BCEWithLogits()
    with pytest.raises(ShapeError, match=r"target must have x's shape, \(4, 1\), got \(4,\)"):
        loss(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(DtypeError, match=r"target must be a tensor of x's dtype, torch\.float32, got torch\.int64"):
        loss(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DtypeError, match="x must have a floating dtype"):
        loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    with pytest.raises(ShapeError, match=r"pos_weight of shape \(2,\) must broadcast to x, got shape \(4, 3\)"):
        BCEWithLogits(pos_weight=torch.ones(2))(torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(DtypeError, match=r"x must have the dtype of weight, torch\.float64, got torch\.float32"):
        BCEWithLogits(torch.ones(3).double())(torch.zeros(4, 3), torch.zeros(4, 3))
    assert repr(BCEWithLogits(torch.ones(3), reduction="sum")) == "BCEWithLogits(weight of shape (3,), reduction='sum')"
