"""The backward of every layer is made of forward operations: no kernel of torch's own derivatives runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import handgrad as hg
from handgrad.twins import TWINS


class Kernels(TorchDispatchMode):
    """Notes the name of every kernel that runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def kernels_of(layer, inputs):
    with Kernels() as kernels:
        out = layer(*inputs)
        layer.backward(tree_map(torch.randn_like, out))
    assert kernels.names
    return kernels.names


def of_derivatives(names):
    return [name for name in names if "backward" in name]


def ordinary(name):
    return TWINS[name].layer(16), TWINS[name].inputs(16, 16, torch.float32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in TWINS if name != "from_torch"])
def test_no_kernel_of_a_derivative_runs_in(name, training):
    layer, inputs = ordinary(name)
    assert not of_derivatives(kernels_of(layer.train(training), inputs))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (hg.GELU("tanh"), (2, 3)),
        (hg.SelfAttention(4, 2, causal=True), (2, 3, 4)),
        (hg.Unroll(hg.GRUCell(3, 4)), (2, 3, 3)),
        (hg.Unroll(hg.LSTMCell(3, 4)), (2, 3, 3)),
        (hg.Conv1d(2, 4, 3, 2, 1, groups=2), (2, 2, 7)),
        (hg.Conv2d(2, 4, 3, padding="same"), (2, 2, 5, 5)),
        (hg.ConvTranspose2d(2, 4, 3, 1, 0, 1, groups=2, dilation=2), (2, 2, 5, 5)),
    ],
    ids=lambda value: repr(value).split("\n")[0],
)
def test_nor_with_options_that_take_another_way(layer, shape):
    assert not of_derivatives(kernels_of(layer, (torch.randn(shape),)))


def test_a_kernel_of_a_derivative_would_be_seen():
    """A module inside a layer differentiates itself by autograd."""
    assert of_derivatives(kernels_of(hg.from_torch(torch.nn.GELU()), (torch.randn(2, 3),)))
