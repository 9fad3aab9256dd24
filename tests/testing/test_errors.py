"""What a check can say."""

from __future__ import annotations

from handgrad.testing import CheckError, CheckFailure, GradientMismatch, VacuousCheck


def test_errors_are_of_two_kinds():
    """One speaks of the layer, the other of the check."""
    assert issubclass(GradientMismatch, CheckFailure)
    assert issubclass(CheckFailure, AssertionError)
    assert issubclass(VacuousCheck, CheckError)
    assert not issubclass(CheckError, AssertionError)
