"""Rounding is told from a fault, where large numbers cancel as well."""

from __future__ import annotations

import pytest
import torch

from handgrad import BatchNorm1d, Linear, Sequential
from handgrad.testing import GradientMismatch, assert_gradients, rounding


def model_of_small_differences(norm=BatchNorm1d):
    """Under a batch norm, the gradients of nearly equal rows are small differences of large numbers."""
    generator = torch.Generator().manual_seed(1)
    x = 0.1 + 1e-7 * torch.randn(5, 3, dtype=torch.float64, generator=generator)
    return Sequential(Linear(3, 4, generator=generator), norm(4, eps=1e-10)).to(torch.float64), x


def test_noise_is_no_fault(monkeypatch):
    """By the gradient's size the difference would be one; by the oracle's own noise it is not."""
    model, x = model_of_small_differences()
    assert_gradients(model, x)
    monkeypatch.setattr(rounding, "may_be_noise", lambda failure: False)
    with pytest.raises(GradientMismatch):
        assert_gradients(model, x)


def test_a_fault_is_no_noise():
    """A thousandth is more than any rounding."""

    class Wrong(BatchNorm1d):
        def backward(self, dout, need_dx=True):
            return super().backward(dout) * 1.001

    with pytest.raises(GradientMismatch):
        assert_gradients(*model_of_small_differences(Wrong))
