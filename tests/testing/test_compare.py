"""A layer beside a torch module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from handgrad import Tanh
from handgrad.testing import GradientMismatch, compare


def test_compare_finds_a_wrong_backward():
    """In the first step."""

    class Wrong(Tanh):
        def backward(self, dout):
            return super().backward(dout) * 1.001

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    compare(Tanh(), nn.Tanh(), x)
    with pytest.raises(GradientMismatch, match="dx is wrong in training step 1"):
        compare(Wrong(), nn.Tanh(), x)
