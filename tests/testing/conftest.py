"""What the tests of the checks share."""

from __future__ import annotations

import hypothesis
import pytest


@pytest.fixture
def _the_same_examples():
    """A hint is a guess: these tests are about the texts, not about luck."""
    before = hypothesis.settings()
    hypothesis.settings.register_profile("hints", parent=before, derandomize=True, max_examples=60)
    hypothesis.settings.register_profile("before", parent=before)
    hypothesis.settings.load_profile("hints")
    yield
    hypothesis.settings.load_profile("before")
