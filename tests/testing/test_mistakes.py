"""What the checks say of wrong backwards: every hint is one that a person has judged, and none misleads."""

from __future__ import annotations

import re

import pytest

from handgrad.testing import CheckFailure, check_loss
from tests.testing.mistakes import MISTAKES

pytestmark = pytest.mark.usefixtures("_the_same_examples")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.what)
def test_the_hints_are_those_that_were_judged(mistake):
    """No more, and in that order; where nothing can be said, nothing is."""
    inputs = mistake.x if mistake.check is check_loss else [mistake.x]
    with pytest.raises(CheckFailure) as caught:
        mistake.check(mistake.make, *inputs, **mistake.more)
    text = str(caught.value)
    said = re.findall(r"  hint: (.*)", text)
    if mistake.verdict == "told":
        assert mistake.hint in text.splitlines()[0]
        assert not said
    else:
        judged = [hint for hint in (mistake.hint, *mistake.also) if hint]
        assert len(said) == len(judged), said
        assert all(hint in line for hint, line in zip(judged, said)), said
    assert "must refuse it" not in text


def test_most_hints_lead_to_the_mistake():
    """Of at least 28 mistakes two thirds; the others are silent, and one verdict is said of each."""
    verdicts = [mistake.verdict for mistake in MISTAKES]
    assert set(verdicts) == {"leads", "near", "told", "silent"}
    assert len(verdicts) >= 28
    assert verdicts.count("leads") + verdicts.count("told") >= 2 * len(verdicts) / 3
    assert all(bool(mistake.hint) == (mistake.verdict != "silent") for mistake in MISTAKES)
