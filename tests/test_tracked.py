"""Tensors that autograd tracks are refused, with the remedy; oracles and no_grad may use them."""

from __future__ import annotations

import pytest
import torch

from handgrad import GRU, BatchNorm1d, Linear, Sequential, StateError, Tanh, to_torch
from handgrad.testing import check_layer


@pytest.mark.parametrize("make", [lambda: Linear(3, 4), lambda: GRU(3, 4), lambda: BatchNorm1d(3)])
def test_a_parameter_that_requires_grad_is_refused_by_name(make):
    layer, x = make(), torch.randn(2, 3)
    name, param = next(iter(layer.named_parameters()))
    setattr(layer, name, torch.nn.Parameter(param))
    with pytest.raises(StateError, match=rf"{name} must be a plain tensor, not one that requires grad; assign"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape[0] == 2
    setattr(layer, name, param.detach())
    assert layer(x).shape[0] == 2


def test_an_input_that_requires_grad_is_refused_where_it_enters():
    model = Sequential(Tanh(), Linear(3, 4))
    with pytest.raises(StateError, match=r"^in 0 \(Tanh\(\)\): Tanh\(\)\.forward: x must be a plain tensor.*to_torch$"):
        model(torch.ones(2, 3, requires_grad=True))
    assert to_torch(model)(torch.ones(2, 3, requires_grad=True)).requires_grad


def test_oracles_may_differentiate_a_forward():
    assert check_layer(Tanh, x="*N").oracle == "autograd through forward"
