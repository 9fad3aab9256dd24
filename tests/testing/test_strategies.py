"""The strategies serve a test of your own."""

from __future__ import annotations

from hypothesis import given, settings

from handgrad import Linear
from handgrad.testing import assert_gradients, assert_reuse, strategies


@settings(max_examples=10, database=None, deadline=None)
@given(strategies.samples_of(lambda D, H: Linear(D, H), x="*N D"))
def test_a_sample_serves_an_own_test(sample):
    """The strategies are public."""
    assert_gradients(sample)
    assert_reuse(sample)
