"""What batch norms refuse."""

from __future__ import annotations

import copy

import pytest
import torch

from handgrad import ArgumentError, BatchNorm1d, BatchNorm2d, Linear, Sequential, ShapeError, SyncBatchNorm


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


def test_sync_batch_norm_alone_is_a_batch_norm():
    """Made of one, it is the same object with the same tensors; in either mode it computes the same."""
    model = Sequential(Linear(3, 4), BatchNorm1d(4, momentum=None, unbiased=True))
    inner, weight, twin = model[1], model[1].weight, copy.deepcopy(model)
    assert SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert model[1] is inner
    assert type(inner) is SyncBatchNorm
    assert inner.weight is weight
    assert repr(inner) == "SyncBatchNorm(4, momentum=None, unbiased=True)"
    for train in (True, True, False):
        x, dout = torch.randn(5, 3), torch.randn(5, 4)
        for m in (model, twin):
            m.train(train)
        torch.testing.assert_close(model(x), twin(x))
        torch.testing.assert_close(model.backward(dout), twin.backward(dout))
        torch.testing.assert_close(model.state_dict(), twin.state_dict())
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p.grad, q.grad)


def test_what_sync_batch_norm_refuses():
    with pytest.raises(
        ShapeError, match=r"SyncBatchNorm\(5\)\.forward: x must be \(N, 5\) or \(N, 5, L\) or \(N, 5, H"
    ):
        SyncBatchNorm(5)(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"more than one value per channel, got shape \(1, 5\); evaluate a single row"):
        SyncBatchNorm(5)(torch.zeros(1, 5))
    with pytest.raises(ArgumentError, match="SyncBatchNorm: eps must be above 0, got 0"):
        SyncBatchNorm(5, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sync_batch_norm_in_half_precision(dtype):
    layer, twin = SyncBatchNorm(3, dtype=dtype), torch.nn.BatchNorm1d(3)
    x, dout = torch.randn(6, 3), torch.randn(6, 3)
    out = layer(x.to(dtype))
    leaf = x.to(dtype).float().requires_grad_()
    expected = twin(leaf)
    expected.backward(dout.to(dtype).float())
    dx = layer.backward(dout.to(dtype))
    assert out.dtype is dx.dtype is layer.weight.grad.dtype is layer.running_var.dtype is dtype
    for ours, theirs in ((out, expected), (dx, leaf.grad), (layer.weight.grad, twin.weight.grad)):
        torch.testing.assert_close(ours.float(), theirs.detach(), atol=0.05, rtol=0.02)
