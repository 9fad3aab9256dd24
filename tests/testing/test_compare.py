"""A layer beside a torch module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import handgrad
from handgrad import LSTM, Layer, Linear, Sequential, Tanh, twins
from handgrad.testing import GradientMismatch, OracleError, compare
from tests.testing.unusual import Softmax32


def test_compare_finds_a_wrong_backward():
    """In the first step."""

    class Wrong(Tanh):
        def backward(self, dout):
            return super().backward(dout) * 1.001

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    compare(Tanh(), nn.Tanh(), x)
    with pytest.raises(GradientMismatch, match="dx is wrong in training step 1"):
        compare(Wrong(), nn.Tanh(), x)


def test_tied_weights_are_given_to_the_module_under_all_their_names():
    """And its gradient is that of both uses."""
    first, second, theirs = Linear(3, 3), Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    second.weight, theirs[1].weight = first.weight, theirs[0].weight
    layer = Sequential(first, second)
    assert [name for name, _ in layer.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    compare(layer, theirs, torch.randn(4, 3))
    untied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(GradientMismatch, match=r"0\.weight is wrong in training step 1"):
        compare(layer, untied, torch.randn(4, 3))


def test_a_layer_without_state_dict_gives_its_parameters_and_buffers():
    class Affine:
        def __init__(self):
            self.weight, self.bias, self.records = torch.randn(2, 3), torch.randn(2), []

        def forward(self, x):
            self.records.append(x)
            return x @ self.weight.t() + self.bias

        def backward(self, dout):
            x = self.records.pop()
            for p, grad in ((self.weight, dout.t() @ x), (self.bias, dout.sum(0))):
                p.grad = grad if p.grad is None else p.grad + grad
            return dout @ self.weight

    compare(Affine(), nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(OracleError, match="under the same names"):
        compare(Affine(), nn.Linear(3, 2, bias=False), torch.randn(4, 3))


def test_inputs_and_outputs_may_be_nested():
    """As a state is, in and out."""
    state = (torch.randn(2, 4), torch.randn(2, 4))
    compare(LSTM(3, 4, return_state=True), twins.LSTM(3, 4, return_state=True), torch.randn(5, 2, 3))
    compare(LSTM(3, 4, return_state=True), twins.LSTM(3, 4, return_state=True), (torch.randn(5, 2, 3), state))


def test_a_graph_and_its_twin():
    """Several inputs and outputs, indices, a shared layer; the same text makes both."""

    def model(lib):
        tower = lib.Linear(4, 4)
        return lib.Graph(
            "x t",
            "out enc.1",
            e=(lib.Embedding(5, 4), "t"),
            enc=(lib.GRU(3, 4, return_state=True), "x"),
            l=(tower, "e"),
            r=(tower, "enc.1"),
            out=(lib.Multiply(), "l r"),
        )

    compare(model(handgrad), model(twins), (torch.randn(6, 2, 3), torch.randint(5, (2,))))


def test_what_is_frozen_has_no_gradient_on_either_side():
    """Whether the module's parameters require grad or not."""
    layer, theirs = (
        Sequential(Linear(3, 3), Tanh(), Linear(3, 2)),
        nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    )
    layer[0].freeze()
    compare(layer, theirs, torch.randn(4, 3))
    theirs[0].requires_grad_(False)
    compare(layer, theirs, torch.randn(4, 3))

    class Writes(Linear):
        def backward(self, dout, need_dx=True):
            self.bias.grad = dout.sum(0)
            return super().backward(dout, need_dx)

    with pytest.raises(GradientMismatch, match="bias is wrong in training step 1: there is no gradient, yet"):
        compare(Writes(3, 2).freeze(), nn.Linear(3, 2), torch.randn(4, 3))


def test_a_constant_gets_nothing():
    compare(handgrad.Constant(Linear(3, 2)), twins.Constant(nn.Linear(3, 2)), torch.randn(4, 3))


def test_outputs_that_are_indices_are_compared():
    class Largest(Layer):
        def forward(self, x):
            out = tuple(x.max(-1))
            self.push(x, out[1], out=out)
            return out

        def backward(self, dout):
            x, where = self.pop(dout)
            return torch.zeros_like(x).scatter(-1, where.unsqueeze(-1), dout[0].unsqueeze(-1))

    class Module(nn.Module):
        def forward(self, x):
            return tuple(x.max(-1))

    compare(Largest(), Module(), torch.randn(4, 3))


def test_a_layer_in_float32_beside_a_module_in_float32():
    """Both compute in float64 then; a module that does so anyway is equal, too."""

    class Module(nn.Module):
        def forward(self, x):
            return nn.functional.softmax(x, -1, dtype=torch.float32).to(x.dtype)

    compare(Softmax32(), Module(), torch.randn(3, 4))
    compare(Softmax32(), nn.Softmax(-1), torch.randn(3, 4))
