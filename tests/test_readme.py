"""The README's code runs, and its commands exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def test_the_code_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one reader would type them; a block that begins with a file name becomes that file.

    Tests among these are run, and what is called run_... is run where handgrad cannot be imported.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(BLOCKS) >= 4
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        named = FILE.match(block)
        if named is None:
            exec(compile(block, "README.md", "exec"), namespace)
            continue
        (tmp_path / named[1]).write_text(block)
        if named[1].startswith("run_"):
            blocked = "import runpy, sys; sys.modules['handgrad'] = None; runpy.run_path(sys.argv[1])"
            command = [sys.executable, "-W", "ignore", "-c", blocked, named[1]]
            result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
        if named[1].startswith("test_"):
            paths = os.pathsep.join([str(ROOT), str(tmp_path)])
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", named[1]]
            result = subprocess.run(
                command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_readme_points_to_exists() -> None:
    """Every relative link and picture, and every script of a command."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    scripts = re.findall(r"\b((?:models|benchmarks|tests|handgrad)/[\w/]+\.\w+)", README)
    assert links
    assert scripts
    for path in {*links, *scripts}:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", sorted((ROOT / "models" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_figures_are_those_of_the_reports(path: Path) -> None:
    """Each report in models/results has its row in the README, with its own numbers."""
    report = json.loads(path.read_text())
    losses = " | ".join(f"{report[f'{split}_loss']:.4f}" for split in ("train", "val", "test"))
    assert f"| {report['parameters']:,} | {report['steps']:,} | {losses} |" in README


def test_the_two_commands_are_one_line_each() -> None:
    """From a fresh clone: a virtual environment, the installation, the job."""
    for mark in ("main", "tests"):
        command = README.split(f"<!-- {mark} -->")[1].split("```sh\n")[1].split("```")[0]
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
