"""Every public layer and loss has all fourteen properties, and torch's weights; nothing public goes unchecked."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import handgrad
from handgrad import twins
from handgrad.bridge import ModuleLayer
from handgrad.twins import TWINS, WITHOUT_TWIN
from tests.cases import CASES, OPTIMIZERS


@pytest.mark.parametrize("name", CASES)
def test_every_property_of(name):
    """All properties, and no planted fault goes unnoticed."""
    report = CASES[name].run()
    assert report.properties[0].examples > 0


def takes_another_way_when_large(layer):
    return {"blockwise", "exp"} & vars(inspect.getmodule(layer)).keys()


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if takes_another_way_when_large(c.covers)])
def test_every_property_as_if_large_of(name, monkeypatch):
    """What goes through memory in pieces does so rightly: here a piece is no more than four numbers, if not one row."""
    monkeypatch.setattr(handgrad.pieces, "FEW", 0)
    monkeypatch.setattr(handgrad.pieces, "WHOLE", 4)
    monkeypatch.setattr(handgrad.pieces, "PIECE", 4)
    report = CASES[name].run(skip={"sensitivity": "as above", **CASES[name].keywords.get("skip", {})}, examples=25)
    assert report.properties[0].examples > 0


def public_names(kind):
    return {n for n in handgrad.__all__ if inspect.isclass(c := getattr(handgrad, n)) and issubclass(c, kind)}


def test_every_public_layer_and_loss_has_a_case():
    """A new layer must come with its line in cases.py. What from_torch makes of a module is a layer, too."""
    layers = {getattr(handgrad, name) for name in public_names(handgrad.Layer)} - {handgrad.Layer, handgrad.Loss}
    assert layers | {ModuleLayer} == {case.covers for case in CASES.values()}


def test_every_public_layer_loss_and_bridge_has_a_twin_or_a_reason():
    bridges = {n for n in handgrad.__all__ if inspect.getmodule(getattr(handgrad, n)) is handgrad.bridge}
    assert public_names(handgrad.Layer) | bridges == TWINS.keys() | WITHOUT_TWIN.keys()
    assert not TWINS.keys() & WITHOUT_TWIN.keys()
    assert all(WITHOUT_TWIN.values())


OPTIONS = {
    "Linear": lambda lib: lib.Linear(3, 5, bias=False),
    "Embedding": lambda lib: lib.Embedding(5, 3, padding_idx=1),
    "MultiheadAttention": lambda lib: lib.MultiheadAttention(6, 2, bias=False),
    "SelfAttention": lambda lib: lib.SelfAttention(6, 2, bias=False),
    "Conv1d": lambda lib: lib.Conv1d(4, 6, 3, groups=2, bias=False),
    "Conv2d": lambda lib: lib.Conv2d(4, 6, (2, 3), groups=2),
    "ConvTranspose2d": lambda lib: lib.ConvTranspose2d(4, 6, (2, 3), groups=2),
    "RNNCell": lambda lib: lib.RNNCell(3, 5, bias=False),
    "GRUCell": lambda lib: lib.GRUCell(3, 5, bias=False),
    "LSTMCell": lambda lib: lib.LSTMCell(3, 5, bias=False),
    "LinearCrossEntropy": lambda lib: lib.LinearCrossEntropy(3, 5, bias=True),
}


def both_with_seed(make_ours, make_theirs):
    torch.manual_seed(5)
    ours = make_ours()
    torch.manual_seed(5)
    return ours, make_theirs()


@pytest.mark.parametrize("name", [*TWINS, *(f"{name} with options" for name in OPTIONS)])
def test_the_same_seed_gives_torchs_weights_to(name):
    """And to its keys, in torch's order."""
    if name in TWINS:
        layer, module = both_with_seed(lambda: TWINS[name].layer(16), lambda: TWINS[name].module(16))
    else:
        make = OPTIONS[name.split()[0]]
        layer, module = both_with_seed(lambda: make(handgrad), lambda: make(twins))
    ours, theirs = layer.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", TWINS)
def test_no_rows_are_taken_as_torch_takes_them_by(name):
    """The same output and buffers, dx without elements, and gradients of zero."""
    twin = TWINS[name]
    layer, module = both_with_seed(lambda: twin.layer(16), lambda: twin.module(16))
    inputs = tree_map(lambda x: x[:0], twin.inputs(16, 16, torch.float32))
    out = layer(*inputs)
    torch.testing.assert_close(out, tree_map(torch.Tensor.detach, module(*inputs)), equal_nan=True)
    buffers = dict(module.named_buffers())
    torch.testing.assert_close(dict(layer.named_buffers()), buffers, rtol=0, atol=0)
    dx = layer.backward() if isinstance(layer, handgrad.Loss) else layer.backward(out)
    for x, d in zip(tree_leaves(inputs), tree_leaves(dx)):
        assert d.shape == x.shape if x.is_floating_point() else d is None
    assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_every_public_optimizer_is_checked():
    """What is public and steps must be in the optimizers' own checks."""
    optimizers = {getattr(handgrad, name) for name in public_names(torch.optim.Optimizer)}
    assert optimizers == {case.covers for case in OPTIMIZERS.values()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_of(name):
    """An optimizer goes where its reference goes."""
    assert OPTIMIZERS[name].run() > 5
