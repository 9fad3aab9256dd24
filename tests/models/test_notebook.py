"""The notebook of the MLP's backward pass."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

from tests.models.running import MODELS, script

ROUNDING = re.compile(r"exact: \w+|max difference: .*")  # differs from machine to machine


def cells(path: Path) -> list[tuple[str, str, str]]:
    """Kind, source and output of each cell, the output up to rounding."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        outputs = cell.get("outputs", [])
        assert all(output.get("name") == "stdout" for output in outputs)  # no warning, no error
        found.append((cell.cell_type, cell.source, ROUNDING.sub("", "".join(output.text for output in outputs))))
    return found


def test_the_notebook_is_what_the_command_makes_of_the_script(tmp_path: Path) -> None:
    """It runs from top to bottom, and the committed one has the same cells with the same outputs."""
    result = script("notebook.py", tmp_path / "new.ipynb")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    new = cells(tmp_path / "new.ipynb")
    assert new[-1][2] == "Every gradient agrees.\n"
    remedy = "run `python models/notebook.py`, and commit what it writes"
    assert cells(MODELS / "names_mlp_by_hand.ipynb") == new, remedy
