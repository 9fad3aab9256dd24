"""The backward of every layer is made of forward operations: no kernel of torch's own derivatives runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import handgrad as hg


class Kernels(TorchDispatchMode):
    """Notes the name of every kernel that runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def draw(*shape):
    return torch.randn(shape)


LAYERS = [
    (hg.Identity(), (draw(2, 3),)),
    (hg.Residual(hg.Linear(3, 3)), (draw(2, 3),)),
    (hg.Sum(hg.Linear(3, 3), hg.Tanh()), (draw(2, 3),)),
    (hg.Product(hg.Linear(3, 3), hg.Sigmoid()), (draw(2, 3),)),
    (hg.Concat(hg.Linear(3, 3), hg.ReLU(), dim=1), (draw(2, 3),)),
    (hg.Parallel(hg.LeakyReLU(), hg.SiLU()), ((draw(2), draw(3)),)),
    (hg.GELU(), (draw(2, 3),)),
    (hg.GELU("tanh"), (draw(2, 3),)),
    (hg.Softmax(1), (draw(2, 3),)),
    (hg.LogSoftmax(1), (draw(2, 3),)),
    (hg.LayerNorm(3), (draw(2, 3),)),
    (hg.RMSNorm(3), (draw(2, 3),)),
    (hg.BatchNorm1d(3), (draw(2, 3),)),
    (hg.Dropout(0.5), (draw(2, 3),)),
    (hg.FlattenConsecutive(2), (draw(2, 4, 3),)),
    (hg.Flatten(), (draw(2, 4, 3),)),
    (hg.Embedding(5, 3), (torch.tensor([1, 4]),)),
    (hg.SelfAttention(4, 2, causal=True), (draw(2, 3, 4),)),
    (hg.Unroll(hg.RNNCell(3, 4)), (draw(2, 3, 3),)),
    (hg.Unroll(hg.GRUCell(3, 4)), (draw(2, 3, 3),)),
    (hg.Unroll(hg.LSTMCell(3, 4)), (draw(2, 3, 3),)),
    (hg.Conv1d(2, 4, 3, 2, 1, groups=2), (draw(2, 2, 7),)),
    (hg.Conv2d(2, 4, 3, padding="same"), (draw(2, 2, 5, 5),)),
    (hg.MaxPool2d(2), (draw(2, 2, 5, 5),)),
    (hg.AvgPool2d(2), (draw(2, 2, 5, 5),)),
    (hg.CrossEntropy(), (draw(2, 3), torch.tensor([0, 2]))),
    (hg.MSE(), (draw(2, 3), draw(2, 3))),
    (hg.BCEWithLogits(), (draw(2, 3), torch.rand(2, 3))),
    (hg.LinearCrossEntropy(3, 5), (draw(2, 3), torch.tensor([0, 4]))),
]


@pytest.mark.parametrize(("layer", "inputs"), LAYERS, ids=lambda value: type(value).__name__)
def test_no_kernel_of_a_derivative_runs(layer, inputs):
    with Kernels() as kernels:
        out = layer(*inputs)
        layer.backward(tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out))
    assert kernels.names
    assert not [name for name in kernels.names if "backward" in name]
