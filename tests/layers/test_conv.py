"""Convolutions and pooling against torch.nn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handgrad import ArgumentError, AvgPool2d, Conv1d, Conv2d, DtypeError, MaxPool2d, ShapeError
from tests.reference import compare, draw

CONV1D = [
    {},
    {"kernel_size": 1},
    {"stride": 2},
    {"stride": 3, "padding": 1},
    {"dilation": 2},
    {"stride": 2, "padding": 3, "dilation": 3},
    {"groups": 2},
    {"groups": 2, "stride": 2, "dilation": 2, "padding": 2, "bias": False},
    {"padding": "same"},
    {"padding": "same", "kernel_size": 4},
    {"padding": "same", "kernel_size": 4, "dilation": 3, "groups": 2},
    {"padding": "valid", "kernel_size": 2},
    {"padding": 5, "kernel_size": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("flags", CONV1D, ids=str)
def test_conv1d_agrees_with_torch(flags):
    flags = {"kernel_size": 3, **flags}
    batches = [(draw(3, 4, 7),), (draw(4, 9),), (draw(1, 4, 8),), (draw(2, 4, 11),)]
    compare(Conv1d(4, 6, **flags), nn.Conv1d(4, 6, **flags), batches)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"kernel_size": (1, 3)},
        {"stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": (3, 2), "stride": (3, 2), "padding": (2, 1), "dilation": (1, 2)},
        {"groups": 2},
        {"groups": 4, "stride": 2, "padding": 1, "bias": False},
        {"padding": "same"},
        {"padding": "same", "kernel_size": (4, 3)},
        {"padding": "same", "kernel_size": (3, 2)},
        {"padding": "same", "kernel_size": (2, 4), "dilation": (3, 1), "groups": 2},
    ],
    ids=str,
)
def test_conv2d_agrees_with_torch(flags):
    flags = {"kernel_size": 3, **flags}
    batches = [(draw(3, 4, 6, 5),), (draw(4, 7, 8),), (draw(1, 4, 5, 5),)]
    compare(Conv2d(4, 8, **flags), nn.Conv2d(4, 8, **flags), batches)


@pytest.mark.parametrize(("kind", "reference"), [(Conv1d, nn.Conv1d), (Conv2d, nn.Conv2d)])
@pytest.mark.parametrize("flags", [{}, {"groups": 2, "bias": False}])
def test_the_same_seed_gives_torchs_weights(kind, reference, flags):
    torch.manual_seed(5)
    layer = kind(4, 6, 3, **flags)
    torch.manual_seed(5)
    state = reference(4, 6, 3, **flags).state_dict()
    assert list(layer.state_dict()) == list(state)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_no_rows():
    layer = Conv2d(2, 3, 3)
    assert layer(torch.zeros(0, 2, 5, 5)).shape == (0, 3, 3, 3)
    assert layer.backward(torch.zeros(0, 3, 3, 3)).shape == (0, 2, 5, 5)
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()


@pytest.mark.parametrize(
    "flags",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 1, "padding": 1},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 1, "stride": 2},
    ],
    ids=str,
)
def test_pools_agree_with_torch(flags):
    batches = [(torch.randperm(140).double().view(2, 2, 7, 5),), (draw(3, 6, 6),), (draw(1, 1, 4, 9),)]
    compare(MaxPool2d(**flags), nn.MaxPool2d(**flags), batches)
    compare(AvgPool2d(**flags), nn.AvgPool2d(**flags), batches)
    compare(AvgPool2d(**flags, count_include_pad=False), nn.AvgPool2d(**flags, count_include_pad=False), batches)
    compare(AvgPool2d(**flags, divisor_override=-7), nn.AvgPool2d(**flags, divisor_override=-7), batches)


def test_max_pool_with_dilation_and_ties():
    batches = [(torch.randint(3, (2, 3, 8, 8)).double(),), (torch.zeros(1, 1, 5, 5).double(),)]
    compare(MaxPool2d(2, 1, 1, dilation=3), nn.MaxPool2d(2, 1, 1, dilation=3), batches)
    compare(MaxPool2d(3), nn.MaxPool2d(3), batches)


def test_pools_of_no_rows():
    for layer in (MaxPool2d(2), AvgPool2d(2)):
        assert layer(torch.zeros(0, 2, 4, 4)).shape == (0, 2, 2, 2)
        assert layer.backward(torch.zeros(0, 2, 2, 2)).shape == (0, 2, 4, 4)


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
    with pytest.raises(ArgumentError, match=r"Conv2d: stride must be 2 number\(s\) of at least 1, got 0"):
        Conv2d(2, 3, 4, stride=0)
    with pytest.raises(ArgumentError, match=r"Conv2d: kernel_size must be 2 number\(s\) of at least 1, got \(3,\)"):
        Conv2d(2, 3, (3,))
    with pytest.raises(ArgumentError, match=r"Conv1d: padding='same' needs stride 1, got \(2,\)"):
        Conv1d(2, 3, 4, stride=2, padding="same")
    with pytest.raises(ArgumentError, match="Conv1d: padding must be numbers, 'same' or 'valid', got 'full'"):
        Conv1d(2, 3, 4, padding="full")
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
    assert repr(Conv2d(2, 4, 3, 2, 1, groups=2, bias=False)) == (
        "Conv2d(2 -> 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False)"
    )
    assert repr(MaxPool2d(3, 2, 1, 2, True)) == (
        "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=True, dilation=(2, 2))"
    )
    assert repr(AvgPool2d(2, count_include_pad=False)) == "AvgPool2d(kernel_size=(2, 2), count_include_pad=False)"
