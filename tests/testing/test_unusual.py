"""Right layers that are not like most pass, whatever examples are drawn."""

from __future__ import annotations

import hypothesis.core
import pytest

from handgrad.testing import check_layer
from tests.testing.unusual import UNUSUAL

QUICK = ("noise in every mode", "normalised in float32", "tied maxima", "chosen by a bool input", "nested inputs")


def passes(name, seed, monkeypatch):
    """The check of one of them, with the examples of a seed."""
    monkeypatch.setattr(hypothesis.core, "global_force_seed", seed)
    layer = UNUSUAL[name]
    return check_layer(layer.make, layer.x, **layer.more)


def test_there_are_at_least_twenty():
    assert len(UNUSUAL) >= 20
    assert set(QUICK) <= set(UNUSUAL)


@pytest.mark.parametrize("name", QUICK)
def test_an_unusual_layer_passes(name, monkeypatch):
    report = passes(name, 0, monkeypatch)
    assert report.properties[0].examples >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_layer_passes_with_twenty_seeds(name, monkeypatch):
    for seed in range(20):
        report = passes(name, seed, monkeypatch)
        assert report.properties[0].examples >= 10


@pytest.mark.parametrize(
    ("name", "lower"), [("softmax in float32", "float32"), ("squares in bfloat16", "bfloat16"), ("a loop", None)]
)
def test_the_report_says_what_computes_in_a_lower_precision(name, lower, monkeypatch):
    (gradients,) = [p for p in passes(name, 0, monkeypatch).properties if p.name == "gradients"]
    text = f"forward computes in {lower} inside: here in float64, where rounding hides nothing; P9 has {lower}"
    assert (text in gradients.remark) == (lower is not None)
    assert ("forward computes in" in gradients.remark) == (lower is not None)
