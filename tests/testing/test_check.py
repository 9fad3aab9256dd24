"""The call: checks that are empty are refused, a failure can be repeated, a skip needs a reason."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import settings
from torch import nn

import handgrad
from handgrad import ArgumentError, Tanh
from handgrad.testing import GradientMismatch, LayerCrash, Sample, VacuousCheck, check_layer, compare
from tests.testing.strangers import Double


def test_a_layer_that_refuses_everything_is_not_passed():
    """Nothing was checked then."""

    class Never(Double):
        def forward(self, x):
            raise handgrad.ShapeError(f"Never: no shape is right, got {tuple(x.shape)}")

    with pytest.raises((VacuousCheck, LayerCrash)):
        check_layer(Never, x="N", sizes={"N": (1, 1)})


def test_examples_that_are_all_alike_are_refused(monkeypatch):
    """As when something reseeds."""
    monkeypatch.setattr(Sample, "key", lambda self: 0)
    with pytest.raises(VacuousCheck, match="examples were different ones"):
        check_layer(Double, x="*N")


def test_the_global_generator_is_left_alone():
    """By everything."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_layer(lambda: handgrad.Dropout(0.5), x="*N")
    compare(Tanh(), nn.Tanh(), torch.ones(3))
    assert torch.equal(before, torch.get_rng_state())


def test_a_failure_is_reproduced_from_its_line():
    """The very example, and only it."""

    class Wrong(Double):
        def backward(self, dout):
            return super().backward(dout) * (1 + 1e-6)

    with pytest.raises(GradientMismatch) as caught:
        check_layer(Wrong, x="*N")
    text = str(caught.value)
    line = text[text.index("reproduce=") :].split('"')[1]
    with pytest.raises(GradientMismatch) as again:
        check_layer(Wrong, x="*N", reproduce=line)
    example = lambda t: t.partition("the smallest example")[2].partition("property")[0]  # noqa: E731
    assert example(str(again.value)) == example(text)


def test_a_skipped_property_needs_a_reason_and_shows_it():
    """In the report."""
    with pytest.raises(ArgumentError, match="needs a reason"):
        check_layer(Double, x="*N", skip={"reuse": " "})
    with pytest.raises(ArgumentError, match="no property 'speed'"):
        check_layer(Double, x="*N", skip={"speed": "slow"})
    assert "skipped: shown elsewhere" in str(check_layer(Double, x="*N", skip={"plumbing": "shown elsewhere"}))


def test_hypothesis_profiles_are_registered():
    """Ci, dev and thorough."""
    assert settings.get_profile("ci").derandomize
    assert settings.get_profile("thorough").max_examples > settings.get_profile("dev").max_examples
    assert hypothesis.settings().deadline is None
