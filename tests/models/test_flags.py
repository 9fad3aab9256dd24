"""What the flags accept."""

from __future__ import annotations

import re

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import pytest

from names.run import Recipe
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


@pytest.mark.parametrize(
    "recipe", [names_mlp.RECIPE, names_wavenet.RECIPE, names_gru.RECIPE, names_gpt.RECIPE], ids=lambda r: r.name
)
def test_help_says_what_each_flag_does(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In at most 100 columns, however wide the terminal."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as exit_:
        run("--help", recipe=recipe)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert 90 < max(map(len, text.splitlines())) <= 100
    usage, _, rest = text.partition("\n\n")
    for flag in re.findall(r"--[\w-]+", usage):
        assert re.search(rf"^  {flag}( [A-Z]+)?\s+\w", rest, re.MULTILINE), flag
