"""What FlattenConsecutive refuses."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, FlattenConsecutive, ShapeError


def test_errors():
    for shape in ((2, 3, 4), (2, 4), (2, 0, 4)):
        with pytest.raises(ShapeError, match=r"x must be \(N, T, C\) with T a multiple of 2, got shape"):
            FlattenConsecutive(2)(torch.zeros(shape))
    with pytest.raises(ArgumentError, match="FlattenConsecutive: size must be an int of at least 1, got 0"):
        FlattenConsecutive(0)
