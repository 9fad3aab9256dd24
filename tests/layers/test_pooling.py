"""What pools refuse, and that windows side by side are a case of those that overlap."""

from __future__ import annotations

import itertools

import pytest
import torch

from handgrad import AdaptiveAvgPool2d, ArgumentError, AvgPool2d, MaxPool2d, ShapeError


def test_errors_and_repr():
    with pytest.raises(
        ShapeError, match=r"x must be \(N, C, H, W\) or \(C, H, W\) with C at least 1, got shape \(4, 4\)"
    ):
        MaxPool2d(2)(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match=r"x must be at least 3 by 3 for one window, got shape \(1, 2, 4\)"):
        AvgPool2d(3)(torch.zeros(1, 2, 4))
    with pytest.raises(ArgumentError, match="padding must be at most half of kernel_size"):
        MaxPool2d(2, padding=2)
    with pytest.raises(ArgumentError, match="MaxPool2d: kernel_size must be an int of at least 1, or 2 of them, got 0"):
        MaxPool2d(0)
    with pytest.raises(ArgumentError, match="AvgPool2d: divisor_override must not be 0"):
        AvgPool2d(2, divisor_override=0)
    with pytest.raises(
        ShapeError, match=r"AdaptiveAvgPool2d\(output_size=\(1, 1\)\)\.forward: x must be \(N, C, H, W\)"
    ):
        AdaptiveAvgPool2d(1)(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match=r"x must be at least 1 by 1 for one window, got shape \(1, 0, 4\)"):
        AdaptiveAvgPool2d(1)(torch.zeros(1, 0, 4))
    for size in (0, None, (1, 0), (None, 0), (1, 2, 3)):
        with pytest.raises(ArgumentError, match="AdaptiveAvgPool2d: output_size must be an int"):
            AdaptiveAvgPool2d(size)
    assert repr(AdaptiveAvgPool2d((None, 7))) == "AdaptiveAvgPool2d(output_size=(None, 7))"
    assert repr(MaxPool2d(3, 2, 1, 2, ceil_mode=True)) == (
        "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(2, 2), ceil_mode=True)"
    )
    assert repr(AvgPool2d(2, count_include_pad=False)) == (
        "AvgPool2d(kernel_size=(2, 2), stride=(2, 2), count_include_pad=False)"
    )


@pytest.mark.parametrize("shape", [(1, 1, 3, 1), (1, 1, 1, 3)])
def test_a_window_that_lies_in_the_padding_alone_is_refused(shape):
    """Torch gives -inf there, and an index of no element of x."""
    with pytest.raises(ShapeError, match=r"every window must have a place inside x, got shape \(1, 1, "):
        MaxPool2d(2, 1, 1, 2)(torch.zeros(shape))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_no_other_dilated_window_is_refused(ceil_mode):
    """Of images that hold a window, what torch pools to finite maxima is taken, and nothing else."""
    for size, kernel, stride, dilation in itertools.product(range(1, 7), (2, 3), (1, 2), (2, 3)):
        if dilation * (kernel - 1) + 1 > size + 2:
            continue
        x, options = torch.zeros(1, 1, size, 5), ((kernel, 1), stride, (1, 0), (dilation, 1))
        expected = torch.nn.functional.max_pool2d(x, *options, ceil_mode)
        if expected.isfinite().all():
            assert MaxPool2d(*options, ceil_mode=ceil_mode)(x).shape == expected.shape
        else:
            with pytest.raises(ShapeError, match="every window must have a place inside x"):
                MaxPool2d(*options, ceil_mode=ceil_mode)(x)


@pytest.mark.parametrize("kernel_size", [1, 2, (3, 2)])
def test_windows_side_by_side_are_spread_as_those_that_overlap(kernel_size):
    pool, share = AvgPool2d(kernel_size), torch.randn(2, 3, 4, 5)
    assert torch.equal(pool._side_by_side(share), pool._overlapping(share))
    assert torch.equal(pool._side_by_side(share[0]), pool._overlapping(share[0]))
