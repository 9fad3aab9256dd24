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


def test_the_command_says_what_to_install():
    """Before any work, in one line; its help needs nothing."""
    code = (
        "import sys; sys.modules['hypothesis'] = None; from handgrad.testing.__main__ import main; sys.exit(main({}))"
    )
    for arguments, status in ((["handgrad:Tanh", "--x", "*N"], 2), (["--help"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stderr
    code = code.format(["nowhere:Nothing", "--x", "*N"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        done.stderr == 'ImportError: handgrad.testing.check_layer needs hypothesis: pip install "handgrad[testing]"\n'
    )
