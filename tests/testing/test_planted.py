"""The checks notice every planted fault, by the property that is there for it."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch

import handgrad as hg
from tests.testing import planted


@pytest.mark.parametrize("fault", planted.PLANTED, ids=lambda f: f"{f.layer.__name__}: {f.name}")
def test_a_planted_fault_is_noticed(fault):
    """Each by the property named beside it."""
    assert planted.noticed_by(fault) == fault.noticed_by


def test_everything_public_has_six_faults():
    """Every layer, loss and optimizer; six ways to get it wrong that people really write."""
    classes = [c for c in map(hg.__dict__.get, hg.__all__) if inspect.isclass(c)]
    wanted = {c for c in classes if issubclass(c, (hg.Layer, torch.optim.Optimizer))} - {hg.Layer, hg.Loss}
    counts = Counter(fault.layer for fault in planted.PLANTED)
    assert set(counts) == wanted
    assert min(counts.values()) >= 6


def test_an_edit_that_does_not_find_its_text_is_an_error():
    """The source has changed, and the fault must follow."""
    with pytest.raises(AssertionError, match=r"Tanh\.backward no longer has 'cosh'"):
        planted.Fault(hg.Tanh, "stale", "gradients", "backward", "cosh", "sinh").planted()


def test_one_random_dout_misses_what_the_properties_find():
    """The table's other columns mean something: an ordinary check misses a fault of reuse and finds one of value."""
    by_name = {(fault.layer, fault.name): fault for fault in planted.PLANTED}

    assert not planted.one_pass(by_name[hg.Linear, "looks at the record without taking it"], torch.randn_like)
    assert planted.one_pass(by_name[hg.BatchNorm1d, "dbias averaged"], torch.randn_like)
    assert planted.gradcheck(by_name[hg.Tanh, "1 - out"])
    assert not planted.gradcheck(by_name[hg.Embedding, "gradient assigned, not added"])
