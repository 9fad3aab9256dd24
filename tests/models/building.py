"""Build the program of models/cpp, and run it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.models.running import MODELS


def build_train(folder: Path) -> Path:
    """The path of the program `train`, built in a folder; the test is skipped where that cannot be."""
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", MODELS / "cpp", "-B", folder, prefix], ["cmake", "--build", folder]):
        result = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "train"


def train(program: Path, *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run it; what it says on stdout and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def lines_of(output: str) -> list[tuple[int, float, float]]:
    """Of the table that it prints: the steps, the mean loss of those since the line before, resident megabytes."""
    rows = [line.split() for line in output.splitlines()[1:]]
    return [(int(row[0]), float(row[1]), float(row[2])) for row in rows if len(row) == 3]
