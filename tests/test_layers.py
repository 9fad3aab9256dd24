"""Every public layer and loss has all fourteen properties; nothing public goes unchecked."""

from __future__ import annotations

import inspect

import pytest
import torch

import handgrad
from handgrad.bridge import ModuleLayer
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


def test_every_public_layer_and_loss_has_a_case():
    """A new layer must come with its line in cases.py. What from_torch makes of a module is a layer, too."""
    base = {handgrad.Layer, handgrad.Loss}
    public = [getattr(handgrad, name) for name in handgrad.__all__]
    layers = {c for c in public if inspect.isclass(c) and issubclass(c, handgrad.Layer)} - base
    assert layers | {ModuleLayer} == {case.covers for case in CASES.values()}


def test_every_public_optimizer_is_checked():
    """What is public and steps must be in the optimizers' own checks."""
    public = [getattr(handgrad, name) for name in handgrad.__all__]
    optimizers = {c for c in public if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert optimizers == {case.covers for case in OPTIMIZERS.values()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_of(name):
    """An optimizer goes where its reference goes."""
    assert OPTIMIZERS[name].run() > 5
