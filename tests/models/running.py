"""Run the scripts as a user runs them, and read the checkpoints that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import names_mlp
import safetensors
from safetensors.torch import load_file

from names.command_line import main
from names.run import Recipe

MODELS = Path(__file__).parents[2] / "models"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(MODELS.parent)}


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of models/ to its end."""
    command = [sys.executable, str(MODELS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def run(*arguments: object, recipe: Recipe = names_mlp.RECIPE) -> int:
    """Run a recipe in this process, without a subprocess; the exit code."""
    return main(recipe, [str(argument) for argument in arguments])


def equal_checkpoints(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors to the bit."""
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint was made at."""
    with safetensors.safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])
