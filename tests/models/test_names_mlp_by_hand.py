"""The MLP's backward pass in atomic steps, as a script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.running import ENVIRONMENT, MODELS, script

SCRIPT = MODELS / "names_mlp_by_hand.py"


def test_every_gradient_agrees_with_autograd() -> None:
    """Of every value but the loss, and of the formulas and the layers in place of the steps."""
    result = script(SCRIPT.name)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("approximate: True") == 26 + 2 + 13
    assert result.stdout.endswith("Every gradient agrees.\n")


@pytest.mark.parametrize(
    ("line", "slip", "row"),
    [
        ("dprobs = dlogprobs / probs", "dprobs = dlogprobs / probs * (1 + 1e-7)", "probs"),
        ("dcounts = dcounts + dcounts_sum", "dcounts = dcounts_sum", "counts"),
        ("dshift = dnormed.sum(0)", "dshift = dnormed.sum(0, keepdim=True)", "shift"),
        ("dmean = -ddiff.sum(0, keepdim=True)", "dmean = ddiff.sum(0, keepdim=True) * float('nan')", "mean"),
        ("- xhat * (g * xhat).sum(0) / (N - 1)", "- xhat * (g * xhat).sum(0) / N", "pre, at once"),
    ],
)
def test_a_wrong_gradient_is_noticed(line: str, slip: str, row: str, tmp_path: Path) -> None:
    """A slip in one step: its row says so, and the exit code is 1."""
    text = SCRIPT.read_text()
    assert text.count(line) == 1
    (tmp_path / "slip.py").write_text(f"import sys; sys.path.insert(0, {str(MODELS)!r})\n" + text.replace(line, slip))
    command = [sys.executable, str(tmp_path / "slip.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 1, result.stderr
    assert result.stderr == "A gradient is wrong: see the rows marked False.\n"
    (shown,) = (line for line in result.stdout.splitlines() if line.startswith(f"{row:<24} "))
    assert "exact: False  approximate: False" in shown


def test_flags(tmp_path: Path) -> None:
    """Another context and batch; one line and exit code 2 for a file that cannot be read."""
    result = script(SCRIPT.name, "--block-size", 5, "--batch-size", 7, "--seed", 1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "emb                      7x5x10" in result.stdout
    result = script(SCRIPT.name, "--data", tmp_path / "absent")
    assert result.returncode == 2
    assert result.stderr.startswith(f"names_mlp_by_hand: error: cannot read the data file {tmp_path / 'absent'}: ")
    assert result.stderr.count("\n") == 1
