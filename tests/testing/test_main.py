"""The command line."""

from __future__ import annotations

import subprocess
import sys


def command(*arguments):
    """Run `python -m handgrad.testing`."""
    return subprocess.run(
        [sys.executable, "-m", "handgrad.testing", *arguments], capture_output=True, text=True, timeout=120
    )


def test_the_command_prints_the_report():
    """And exits with 0."""
    done = command("handgrad:Tanh", "--x", "*N", "--module", "torch.nn:Tanh")
    assert done.returncode == 0, done.stderr
    assert "P14  plumbing" in done.stdout
    assert "Tanh: right, by reference" in done.stdout


def test_the_command_exits_with_2_for_what_it_cannot_check():
    """In one line."""
    done = command("handgrad:Linear", "--x", "N D")
    assert done.returncode == 2
    assert "do not know what to give" in done.stderr
