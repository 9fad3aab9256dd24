"""What the flags accept."""

from __future__ import annotations

import pytest

from tests.models.running import run


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--block-size", "0"),
        ("--embedding-dim", "-1"),
        ("--hidden-dim", "1e9"),
        ("--batch-size", "1"),
        ("--steps", "-5"),
        ("--lr", "nan"),
        ("--lr", "0"),
        ("--seed", "x"),
        ("--threads", "0"),
    ],
)
def test_impossible_values_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By argparse, which says which flag, what was expected and what came."""
    with pytest.raises(SystemExit) as exit_:
        run(flag, value)
    assert exit_.value.code == 2
    assert f"argument {flag}: expected" in capsys.readouterr().err
