"""What batch norms refuse."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, BatchNorm1d, BatchNorm2d, ShapeError


def test_errors_and_repr():
    with pytest.raises(ShapeError, match=r"BatchNorm2d\(5\)\.forward: x must be \(N, 5, H, W\), got shape \(2, 5, 3\)"):
        BatchNorm2d(5)(torch.zeros(2, 5, 3))
    with pytest.raises(ShapeError, match=r"x must be \(N, 5, H, W\), got shape \(2, 4, 3, 3\)"):
        BatchNorm2d(5)(torch.zeros(2, 4, 3, 3))
    with pytest.raises(ShapeError, match=r"x must be \(\.\.\., 5\), got shape \(2, 5, 3, 3\)"):
        BatchNorm2d(5, channels_last=True)(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ShapeError, match=r"x must be \(\.\.\., 5\), got shape \(5,\)"):
        BatchNorm1d(5, channels_last=True)(torch.zeros(5))
    with pytest.raises(
        ShapeError, match=r"more than one value per channel, got shape \(1, 5, 1, 1\); evaluate a single"
    ):
        BatchNorm2d(5)(torch.zeros(1, 5, 1, 1))
    with pytest.raises(ArgumentError, match="BatchNorm2d: num_features must be an int of at least 1, got 0"):
        BatchNorm2d(0)
    assert repr(BatchNorm2d(5, 0.1, None, False)) == "BatchNorm2d(5, eps=0.1, momentum=None, affine=False)"
    assert (
        repr(BatchNorm1d(5, unbiased=True, channels_last=True)) == "BatchNorm1d(5, unbiased=True, channels_last=True)"
    )
