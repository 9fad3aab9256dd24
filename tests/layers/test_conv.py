"""What convolutions refuse, and that the two ways to dx are one."""

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


@pytest.mark.parametrize(
    "options", [(1, 0), (3, 1), (2, 0, 3), (3, 2, 2), (3, "same", 2, 2), (4, "same"), (3, 1, 1, 6)], ids=str
)
@pytest.mark.parametrize("kind", [Conv1d, Conv2d])
def test_dx_as_a_convolution_is_the_transposed_one(monkeypatch, kind, options):
    """Of stride 1, and padding within the kernel's reach: the two are (kernel_size, padding, dilation, groups)."""
    kernel_size, padding, *rest = options
    layer = kind(6, 6, kernel_size, 1, padding, *rest, dtype=torch.float64)
    x = torch.randn(5, 6, *[9, 7][: layer.dims], dtype=torch.float64)
    taken = []
    by_conv = layer._dx_by_conv
    monkeypatch.setattr(layer, "_dx_by_conv", lambda *args: taken.append(args) or by_conv(*args))
    dout = torch.randn_like(layer(x))
    dx = layer.backward(dout)
    assert len(taken) == 1
    shape = torch.nn.functional.pad(x, layer.extra).shape
    expected = torch.nn.functional.pad(layer._dx(dout, layer.weight, shape), [-n for n in layer.extra])
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-13)


def test_padding_beyond_the_kernels_reach_is_left_to_the_transposed_convolution(monkeypatch):
    layer = Conv1d(2, 3, 2, padding=2)
    monkeypatch.delattr(Conv1d, "_dx_by_conv")
    out = layer(torch.randn(4, 2, 5))
    assert layer.backward(torch.randn_like(out)).shape == (4, 2, 5)


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
