"""What MSE refuses."""

from __future__ import annotations

import pytest
import torch

from handgrad import MSE, DtypeError, ShapeError


def test_errors_and_repr():
    loss = MSE()
    with pytest.raises(ShapeError, match=r"target must have x's shape, \(4, 1\), got \(4,\)"):
        loss(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(DtypeError, match=r"target must be a tensor of x's dtype, torch\.float32, got torch\.int64"):
        loss(torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DtypeError, match="x must have a floating dtype"):
        loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4))
    assert repr(MSE(reduction="sum")) == "MSE(reduction='sum')"
