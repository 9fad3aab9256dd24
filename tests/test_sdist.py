"""The source distribution: it holds what a clone has, and its own tests pass after it was unpacked and installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SHIPPED = {".gitignore"}
SOME = ["tests/models/test_models.py", "tests/test_readme.py", "tests/test_package.py", "tests/test_tables.py"]


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.mark.slow
def test_the_sdist_holds_what_its_tests_need(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("only a clone knows which files belong to it")
    if importlib.util.find_spec("build") is None:
        pytest.skip("the package build, which makes it, is not installed")
    clone, files = tmp_path / "clone", run("git", "ls-files", cwd=ROOT).split()
    for name in files:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    run(sys.executable, "-m", "build", "--sdist", "-o", tmp_path, cwd=clone)
    with tarfile.open(next(tmp_path.glob("handgrad-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.glob("handgrad-*") if path.is_dir())
    assert {name for name in files if not (unpacked / name).exists()} == NOT_SHIPPED

    run(sys.executable, "-m", "venv", ".venv", cwd=unpacked)
    python = unpacked / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "-q", ".[dev]", cwd=unpacked)
    assert " passed" in run(python, "-m", "pytest", "-q", *SOME, cwd=unpacked)
