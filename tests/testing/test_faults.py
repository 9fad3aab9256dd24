"""The checks notice every planted fault, by the property that is there for it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.testing import planted


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda f: f"{f.layer.__name__}: {f.name}")
def test_a_planted_fault_is_noticed(fault):
    """Each by the property named beside it."""
    assert planted.noticed_by(fault) == fault.noticed_by


def test_every_layer_of_the_names_model_has_six_faults():
    """Six ways to get it wrong that people really write."""
    counts = Counter(fault.layer.__name__ for fault in planted.FAULTS)
    assert set(counts) == {
        "Linear", "Embedding", "Flatten", "Tanh", "BatchNorm1d", "CrossEntropy", "Sequential", "SGD"
    }  # fmt: skip
    assert min(counts.values()) >= 6


def test_one_random_dout_misses_what_the_properties_find():
    """The table's other columns mean something: an ordinary check misses a fault of reuse and finds one of value."""
    by_name = {fault.name: fault for fault in planted.FAULTS}

    assert not planted.one_pass(by_name["looks at the record without taking it"], torch.randn_like)
    assert planted.one_pass(by_name["dbias averaged"], torch.randn_like)
    assert planted.gradcheck(by_name["1 - out"])
    assert not planted.gradcheck(by_name["gradient assigned, not added"])
