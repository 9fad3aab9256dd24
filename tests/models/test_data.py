"""From a file of names to rows of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from names.data import IGNORED, Vocabulary, read_names, sequences, split_names, windows
from tests.models.running import run


def test_names_as_people_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blank lines, CRLF and a byte order mark do not count; upper case and non-ASCII letters are vocabulary."""
    path = tmp_path / "names"
    path.write_bytes("\ufeffÅsa\r\n\r\nJosé\r\n  Zoë  \r\nÅsa\r\nMia\r\n".encode())
    assert read_names(path) == ["Åsa", "José", "Zoë", "Åsa", "Mia"]
    assert Vocabulary.of(read_names(path)).characters == ".JMZaiosÅéë"
    assert run("--data", path, "--steps", 30, "--samples", 2) == 0
    assert "5 names, 11 characters" in capsys.readouterr().out


def test_the_split_loses_no_name() -> None:
    """80 / 10 / 10, and at least one name in each part."""
    everyone = [f"n{i}" for i in range(103)]
    parts = split_names(everyone, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 82, "val": 10, "test": 11}
    assert sorted(name for part in parts.values() for name in part) == sorted(everyone)
    assert [len(part) for part in split_names(["a", "b", "c"], seed=1).values()] == [1, 1, 1]


def test_a_window_holds_the_characters_before_its_target() -> None:
    """One row per character, and one for the boundary."""
    split = windows(["ab"], Vocabulary(".ab"), 3)
    assert split.x.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert split.y.tolist() == [1, 2, 0]
    assert split.targets == 3


def test_a_sequence_holds_a_name_and_what_follows_each_place() -> None:
    """After the boundary comes the name; nothing follows the padding; a long name is cut off."""
    split = sequences(["ab", "c"], Vocabulary(".abc"), 16)
    assert split.x.tolist() == [[0, 1, 2], [0, 3, 0]]
    assert split.y.tolist() == [[1, 2, 0], [3, 0, IGNORED]]
    assert split.targets == 5
    assert sequences(["abc"], Vocabulary(".abc"), 2).y.tolist() == [[1, 2]]
