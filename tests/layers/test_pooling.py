"""What pools refuse."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, AvgPool2d, MaxPool2d, ShapeError


def test_errors_and_repr():
    with pytest.raises(
        ShapeError, match=r"x must be \(N, C, H, W\) or \(C, H, W\) with C at least 1, got shape \(4, 4\)"
    ):
        MaxPool2d(2)(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match=r"x must be at least 3 by 3 for one window, got shape \(1, 2, 4\)"):
        AvgPool2d(3)(torch.zeros(1, 2, 4))
    with pytest.raises(ArgumentError, match="padding must be at most half of kernel_size"):
        MaxPool2d(2, padding=2)
    with pytest.raises(ArgumentError, match="MaxPool2d: kernel_size must be one or two numbers of at least 1, got 0"):
        MaxPool2d(0)
    with pytest.raises(ArgumentError, match="AvgPool2d: divisor_override must not be 0"):
        AvgPool2d(2, divisor_override=0)
    assert repr(MaxPool2d(3, 2, 1, 2, True)) == (
        "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=True, dilation=(2, 2))"
    )
    assert repr(AvgPool2d(2, count_include_pad=False)) == "AvgPool2d(kernel_size=(2, 2), count_include_pad=False)"
