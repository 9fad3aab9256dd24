"""The checks notice every planted fault, by the property that is there for it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections import Counter
from pathlib import Path

import pytest

import handgrad as hg
from handgrad.testing import CheckFailure
from handgrad.testing.mutate import patched, quick


def load(path: Path):
    """A file of the tests as a module, once."""
    name = f"handgrad_tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


HERE = Path(__file__).parent
FAULTS = load(HERE / "further_faults.py").FAULTS
CASES = load(HERE.parent / "cases.py").CASES


def noticed_by(fault) -> str:
    """The first property that fails; empty for none."""
    owner = next(c for c in fault.layer.__mro__ if fault.method in vars(c))
    with patched(owner, fault.method, fault.function()), quick():
        for case in CASES.values():
            if case.covers is fault.layer:
                try:
                    case.run(skip={"sensitivity": "planted faults are what is tested", **case.keywords.get("skip", {})})
                except CheckFailure as failure:
                    return str(failure.details["property"])
    return ""


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
