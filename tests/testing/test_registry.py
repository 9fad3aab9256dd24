"""Properties: alone, and one of your own."""

from __future__ import annotations

import re

import pytest
import torch

import handgrad
from handgrad import ArgumentError, Tanh
from handgrad.testing import (
    PROPERTIES,
    ContractError,
    GradientMismatch,
    NotApplicable,
    OutputMismatch,
    assert_gradients,
    check_layer,
    judge,
    prop,
)
from tests.testing.strangers import Double


def test_a_property_serves_alone():
    """With a layer and an x."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_gradients(Tanh(), x)
    with pytest.raises(GradientMismatch):
        assert_gradients(Tanh(), x, reference=torch.sin)


@pytest.fixture
def prop_for_a_test():
    """`prop`, all of whose properties are gone after the test."""
    before = dict(PROPERTIES)
    yield prop
    PROPERTIES.clear()
    PROPERTIES.update(before)


def test_a_property_of_your_own_is_one_decorated_function(prop_for_a_test):
    """`check_layer` checks it in its place, on what it asked to be drawn; it can be skipped, and called alone."""
    rows = []

    @prop_for_a_test(15, "finite", examples=100, draws="edges")  # of which some are empty
    def assert_finite(s):
        """No output is infinite."""
        rows.append(min((size for x in s.inputs for size in x.shape), default=1))
        if not all(out.isfinite().all() for out in s.result.outs.values()):
            raise OutputMismatch("out is infinite")
        judge.compared(1)

    report = check_layer(Double, x="*N", skip={"sensitivity": "elsewhere"})
    assert [p.name for p in report.properties[-2:]] == ["plumbing", "finite"]
    assert "\nP15  finite " in str(report)
    assert 10 <= report.properties[-1].examples <= 100  # fewer where a profile draws none twice
    assert 0 in rows
    assert "skipped: not mine" in str(check_layer(Double, x="*N", skip={"finite": "not mine", "sensitivity": "too"}))
    assert handgrad.testing.assert_finite is assert_finite
    with pytest.raises(OutputMismatch, match="out is infinite"):
        assert_finite(Double(), torch.tensor([float("inf")]))


def test_a_failure_of_your_own_property_is_told_like_any_other(prop_for_a_test):
    """With its number, its sentence, and how to run it again."""

    @prop_for_a_test(16, "small", first=True)
    def assert_small(s):
        """No gradient is larger than dout."""
        judge.judge({}, {"dx": s.douts[0]}, s.same_code, " here")

    with pytest.raises(GradientMismatch, match="dx is wrong here: None after backward") as caught:
        check_layer(Double, x="*N")
    assert "property P16 small: No gradient is larger than dout." in str(caught.value)
    again = re.search(r'reproduce="(small \S+)"', str(caught.value))[1]
    with pytest.raises(GradientMismatch, match="dx is wrong here"):
        check_layer(Double, x="*N", reproduce=again)


def test_a_property_taken_out_is_checked_no_more(prop_for_a_test):
    """And nothing of it is left."""

    @prop_for_a_test(15, "never")
    def assert_never(s):
        raise ContractError("never")

    with pytest.raises(ContractError, match="never"):
        check_layer(Double, x="*N")
    del PROPERTIES["never"]
    assert "never" not in str(check_layer(Double, x="*N", skip={"sensitivity": "elsewhere"}))
    assert not hasattr(handgrad.testing, "assert_never")


def test_nothing_leaks_from_one_test_into_the_next():
    """The fourteen, and no more."""
    assert sorted(p.number for p in PROPERTIES.values()) == list(range(1, 15))
    assert {f"assert_{name}" for name in PROPERTIES} <= set(handgrad.testing.__all__)


def test_a_number_or_name_that_is_taken_is_refused(prop_for_a_test):
    """And so is what could not be written in skip=; to define a property anew is no offence."""
    with pytest.raises(ArgumentError, match="15 'reuse' is taken by P3 reuse; choose another number and name"):
        prop_for_a_test(15, "reuse")(lambda s: None)
    with pytest.raises(ArgumentError, match="3 'mine' is taken by P3 reuse"):
        prop_for_a_test(3, "mine")(lambda s: None)
    with pytest.raises(ArgumentError, match="the name must be a word of its own, got 'two words'"):
        prop_for_a_test(15, "two words")

    def define(text):
        @prop_for_a_test(15, "mine")
        def assert_mine(s):
            raise NotApplicable(text)

    define("first")
    define("second")
    assert [p.name for p in PROPERTIES.values() if p.number > 14] == ["mine"]
    report = check_layer(Double, x="*N", skip={"sensitivity": "elsewhere"})
    assert report.properties[-1].note == "does not apply: second"
