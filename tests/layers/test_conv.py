"""What convolutions refuse."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, Conv1d, Conv2d, ConvTranspose2d, DtypeError, ShapeError


def test_errors_and_repr():
    with pytest.raises(ShapeError, match=r"x must be \(N, 2, L\) or \(2, L\), got shape \(5, 3, 8\)"):
        Conv1d(2, 3, 4)(torch.zeros(5, 3, 8))
    with pytest.raises(ShapeError, match=r"x must be \(N, 2, H, W\) or \(2, H, W\), got shape \(5, 2\)"):
        Conv2d(2, 3, 4)(torch.zeros(5, 2))
    with pytest.raises(ShapeError, match=r"x must have sizes of at least \(5,\) for one step of the kernel, got shape"):
        Conv1d(2, 3, 4, padding=1, dilation=2)(torch.zeros(5, 2, 4))
    with pytest.raises(DtypeError, match=r"x must have torch\.float32, the dtype of the parameters"):
        Conv1d(2, 3, 4)(torch.zeros(5, 2, 8).double())
    with pytest.raises(ArgumentError, match="Conv1d: groups must divide the channels, got 2 for 3 -> 4"):
        Conv1d(3, 4, 1, groups=2)
    with pytest.raises(ArgumentError, match="Conv2d: stride must be an int of at least 1, or 2 of them, got 0"):
        Conv2d(2, 3, 4, stride=0)
    with pytest.raises(
        ArgumentError, match=r"Conv2d: kernel_size must be an int of at least 1, or 2 of them, got \(3,\)"
    ):
        Conv2d(2, 3, (3,))
    with pytest.raises(ArgumentError, match=r"Conv1d: padding='same' needs stride 1, got \(2,\)"):
        Conv1d(2, 3, 4, stride=2, padding="same")
    with pytest.raises(ArgumentError, match="Conv1d: padding must be numbers, 'same' or 'valid', got 'full'"):
        Conv1d(2, 3, 4, padding="full")
    assert repr(Conv2d(2, 4, 3, 2, 1, groups=2, bias=False)) == (
        "Conv2d(2 -> 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False)"
    )


def test_errors_and_repr_of_transposed_ones():
    with pytest.raises(ShapeError, match=r"x must be \(N, 2, H, W\) or \(2, H, W\), got shape \(5, 2\)"):
        ConvTranspose2d(2, 3, 4)(torch.zeros(5, 2))
    wanted = r"x must be large enough for something to be left without the padding, got shape \(2, "
    for layer, shape in ((ConvTranspose2d(2, 3, 2, padding=1), (2, 1, 4)), (ConvTranspose2d(2, 3, 4), (2, 4, 0))):
        with pytest.raises(ShapeError, match=wanted):
            layer(torch.zeros(shape))
    with pytest.raises(DtypeError, match=r"x must have torch\.float32, the dtype of the parameters"):
        ConvTranspose2d(2, 3, 4)(torch.zeros(5, 2, 8, 8).double())
    with pytest.raises(ArgumentError, match="ConvTranspose2d: groups must divide the channels, got 2 for 3 -> 4"):
        ConvTranspose2d(3, 4, 1, groups=2)
    wanted = r"output_padding must be below stride or dilation, got \(1, 2\) for \(2, 2\) and \(1, 1\)"
    with pytest.raises(ArgumentError, match="ConvTranspose2d: " + wanted):
        ConvTranspose2d(3, 4, 3, 2, output_padding=(1, 2))
    with pytest.raises(TypeError, match="padding_mode"):
        ConvTranspose2d(3, 4, 3, padding_mode="zeros")
    assert repr(ConvTranspose2d(2, 4, 3, 2, 1, 1, 2, False)) == (
        "ConvTranspose2d(2 -> 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), groups=2, "
        "bias=False)"
    )
