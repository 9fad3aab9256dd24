"""The checks notice every planted fault, by the property that is there for it."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest

import handgrad as hg
from tests.testing.further_faults import FAULTS
from tests.testing.planted import failing_property


def noticed_by(fault) -> str:
    """The first property that fails; empty for none."""
    owner = next(c for c in fault.layer.__mro__ if fault.method in vars(c))
    return failing_property(fault.layer, owner, fault.method, fault.function())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.layer.__name__}: {f.name}")
def test_a_planted_fault_is_noticed(fault):
    assert noticed_by(fault) == fault.noticed_by


def test_every_layer_has_six_faults():
    """Every public layer and loss beyond the names MLP's."""
    mlp = {hg.Linear, hg.Embedding, hg.Flatten, hg.Tanh, hg.BatchNorm1d, hg.CrossEntropy, hg.Sequential}
    classes = [c for c in map(hg.__dict__.get, hg.__all__) if inspect.isclass(c)]
    wanted = {c for c in classes if issubclass(c, hg.Layer)} - mlp - {hg.Layer, hg.Loss}
    counts = Counter(fault.layer for fault in FAULTS)
    assert set(counts) == wanted
    assert min(counts.values()) >= 6
