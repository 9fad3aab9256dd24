"""What the flags accept."""

from __future__ import annotations

import re

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import pytest

from names.flags import MODEL_FLAGS, new_parser, parse_flags
from names.run import OPTIONS, RANGES, Recipe
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
        ("--lr", "1e38"),
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
    assert re.search(r"\n\nexit code: 0; 1 where (.|\n)*; 2 for (.|\n)*; 130 after Ctrl-C\n$", text)


def test_each_option_of_a_model_has_its_flag() -> None:
    """And each flag is an option."""
    assert set(MODEL_FLAGS) == set(OPTIONS)


def test_the_range_of_a_flag_is_that_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    """The largest value is taken, the next is not."""
    for name, (_, high) in RANGES.items():
        flag = "--" + name.replace("_", "-")
        assert vars(parse_flags(names_mlp.RECIPE, [flag, str(high)]))[name] == high
        with pytest.raises(SystemExit):
            parse_flags(names_mlp.RECIPE, [flag, str(high + 1)])
        assert f"to {high:,}, got {high + 1}" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_help_fits(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal, and 100 columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = new_parser("names", "some words " * 30 + "\n\n" + "more words " * 30, "the end " * 30)
    parser.add_argument("--flag", help="what it does " * 20)
    parser.print_help()
    text = capsys.readouterr().out
    assert "words\n\nmore words" in text
    assert 0.8 * min(columns, 100) < max(map(len, text.splitlines())) <= min(columns - 2, 100)
