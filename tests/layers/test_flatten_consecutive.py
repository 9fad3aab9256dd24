"""FlattenConsecutive against the view of the lecture."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, FlattenConsecutive, ShapeError
from tests.reference import compare, draw


@pytest.mark.parametrize(("size", "steps"), [(1, 1), (1, 3), (2, 2), (2, 8), (3, 6), (4, 4)])
def test_it_is_the_view_of_the_lecture(size, steps):
    def reference(x):
        out = x.reshape(x.shape[0], x.shape[1] // size, x.shape[2] * size)
        return out.squeeze(1) if out.shape[1] == 1 else out

    compare(FlattenConsecutive(size), reference, [(draw(4, steps, 3),), (draw(1, steps, 2),), (draw(0, steps, 2),)])


def test_errors():
    for shape in ((2, 3, 4), (2, 4), (2, 0, 4)):
        with pytest.raises(ShapeError, match=r"x must be \(N, T, C\) with T a multiple of 2, got shape"):
            FlattenConsecutive(2)(torch.zeros(shape))
    with pytest.raises(ArgumentError, match="FlattenConsecutive: size must be at least 1, got 0"):
        FlattenConsecutive(0)
