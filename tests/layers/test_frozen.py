"""Frozen parameters, in every layer that has some: no gradient for them, and all other gradients as ever."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from handgrad import Graph, Linear, Loss, Sequential, Tanh
from handgrad.layer import is_frozen
from handgrad.twins import TWINS


def names_of(make):
    return [name for name, _ in make.named_parameters()]


WITH_PARAMETERS = [name for name, twin in TWINS.items() if names_of(twin.layer(16))]
ONE_BY_ONE = [(name, param) for name in WITH_PARAMETERS for param in [*names_of(TWINS[name].layer(16)), "all"]]


def ran(layer, inputs, douts=None):
    """Output, dx and every parameter's gradient after one forward and backward; and the douts."""
    torch.manual_seed(1)  # of what draws
    out = layer(*inputs)
    if isinstance(layer, Loss):
        dx = layer.backward()
    else:
        torch.manual_seed(2)
        douts = tree_map(torch.randn_like, out)
        dx = layer.backward(douts)
    return tree_leaves((out, dx)), {name: p.grad for name, p in layer.named_parameters()}


def freeze(layer, name):
    """Freeze one parameter, as `freeze()` of a layer that has no other does."""
    for key, param in layer.named_parameters():
        if name in (key, "all"):
            param.frozen = True


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(("name", "param"), ONE_BY_ONE)
def test_a_frozen_parameter_has_no_gradient_and_the_others_have_theirs(name, param):
    """Bit for bit, and so has the input."""
    torch.manual_seed(0)
    layer, inputs = TWINS[name].layer(16), TWINS[name].inputs(16, 16, torch.float32)
    twin = copy.deepcopy(layer)
    freeze(twin, param)
    results, grads = ran(layer, inputs)
    frozen_results, frozen_grads = ran(twin, inputs)
    same(frozen_results, results)
    for key, p in twin.named_parameters():
        if is_frozen(p):
            assert p.grad is None
        else:
            same([frozen_grads[key]], [grads[key]])
    assert twin.pending == 0


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_each_layer_inside_frozen_alone(name):
    """By its own freeze(); then unfreeze() gives it its gradients back."""
    torch.manual_seed(0)
    layer, inputs = TWINS[name].layer(16), TWINS[name].inputs(16, 16, torch.float32)
    results, grads = ran(copy.deepcopy(layer), inputs)
    for path, _ in layer.named_layers():
        twin = copy.deepcopy(layer)
        inner = dict(twin.named_layers())[path].freeze()
        frozen_results, frozen_grads = ran(twin, inputs)
        same(frozen_results, results)
        inside = {id(p) for p in inner.parameters()}
        for key, p in twin.named_parameters():
            same([frozen_grads[key]], [None if id(p) in inside else grads[key]])
        inner.unfreeze()
        twin.zero_grad()
        same(ran(twin, inputs)[1].values(), grads.values())


def in_the_middle(layer):
    return Graph(
        "x",
        "out",
        before=(Linear(16, 16), "x"),
        middle=(Sequential(Tanh(), layer), "before"),
        out=(Sequential(Tanh(), Linear(16, 16)), "middle"),
    )


KEEP = [n for n in WITH_PARAMETERS if n in ("BatchNorm1d", "LayerNorm", "RMSNorm", "RNNCell", "GRUCell", "Sequential")]
KEEP += ["Linear", "Residual", "Sum", "Product", "Graph", "from_torch"]


@pytest.mark.parametrize("name", KEEP)
def test_in_the_middle_of_a_graph(name):
    """What lies below gets its gradients through it."""
    torch.manual_seed(0)
    graph, x = in_the_middle(TWINS[name].layer(16)), torch.randn(5, 16)
    twin = copy.deepcopy(graph)
    twin["middle"].freeze()
    results, grads = ran(graph, (x,))
    frozen_results, frozen_grads = ran(twin, (x,))
    same(frozen_results, results)
    for key in grads:
        same([frozen_grads[key]], [None if key.startswith("middle.") else grads[key]])
    assert grads["before.weight"].any()


SEQUENCES = ["RNN", "GRU", "LSTM", "Unroll", "SelfAttention"]
IMAGES = ["Conv1d", "Conv2d"]


@pytest.mark.parametrize("name", [*SEQUENCES, *IMAGES, "LSTMCell", "Embedding"])
def test_in_the_middle_of_a_sequence(name):
    """Of sequences, images and states, whose shape a Linear in front and Tanh behind keep; of indices, behind alone."""
    torch.manual_seed(0)
    layer, (x,) = TWINS[name].layer(16), TWINS[name].inputs(16, 16, torch.float32)
    before = [Linear(x.shape[-1], x.shape[-1])] if x.is_floating_point() else []
    behind = [] if name == "LSTMCell" else [Tanh()]
    model = Sequential(*before, layer, *behind)
    twin = copy.deepcopy(model)
    twin[len(before)].freeze()
    results, grads = ran(model, (x,))
    frozen_results, frozen_grads = ran(twin, (x,))
    same(frozen_results, results)
    for key in grads:
        same([frozen_grads[key]], [None if key.startswith(f"{len(before)}.") else grads[key]])
