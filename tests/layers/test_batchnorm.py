"""What batch norms refuse."""

from __future__ import annotations

import pytest
import torch

from handgrad import ArgumentError, BatchNorm1d, BatchNorm2d, ShapeError


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_of_nothing_counts_but_moves_no_statistics(momentum):
    """So that in the plain average of all batches what comes after it weighs as in torch."""
    layer, module = BatchNorm1d(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    for n in (4, 0, 5, 0):
        x = torch.randn(n, 3)
        layer(x)
        module(x)
        torch.testing.assert_close(layer.state_dict(), dict(module.state_dict()))
    layer.eval()(torch.randn(0, 3))
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_plain_average_counts_further_than_half_precision_does(dtype):
    """Of 300 batches the last has its share: bfloat16 itself has no 257."""
    layer = BatchNorm1d(1, momentum=None, dtype=dtype)
    layer.num_batches_tracked.fill_(1 << 20)
    layer.running_mean.fill_(1.0)
    layer(torch.tensor([[1e4], [3e4]], dtype=dtype))
    assert 1 < float(layer.running_mean) < 1.05


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
