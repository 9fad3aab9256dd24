"""From the command line to the exit code: what a run prints and writes, what it refuses, and how it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import names_mlp
import pytest

from tests.models.running import ENVIRONMENT, MODELS, checkpoint_step, run, script


def test_a_short_run_reports_everything_it_promises(tmp_path: Path) -> None:
    """The shipped data and the default model, from the command line."""
    result = script(
        "names_mlp.py", "--steps", 300, "--check", "--report", tmp_path / "r.json", "--plot", tmp_path / "p.png"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar where nobody looks
    assert "4,137 parameters" in result.stdout
    assert "False        False" not in result.stdout  # no row of the gradient table is off
    report = json.loads((tmp_path / "r.json").read_text())
    keys = {"parameters", "steps", "train_loss", "val_loss", "test_loss", "steps_per_second", "samples", "config"}
    assert set(report) == keys | {"versions"}
    assert report["parameters"] == 4137
    assert report["steps"] == 300
    assert len(report["samples"]) == 20
    assert 2.4 < report["val_loss"] < 2.9
    assert report["config"]["block_size"] == 3
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_saves_and_reports(tmp_path: Path, data: Path) -> None:
    """One Ctrl-C ends a run in good order, with exit code 130."""
    arguments = ["--data", data, "--steps", 10**8, "--save", tmp_path / "c", "--report", tmp_path / "r.json"]
    command = [sys.executable, str(MODELS / "names_mlp.py"), *map(str, arguments)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    report = json.loads((tmp_path / "r.json").read_text())
    assert 0 < report["steps"] < 10**8
    assert report["steps"] == checkpoint_step(tmp_path / "c")
    assert f"stopped after {report['steps']:,} of 100,000,000 steps" in output


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user can get wrong in the data and the paths."""
    (tmp_path / "empty").write_text("")
    (tmp_path / "one").write_text("emma\n")
    (tmp_path / "blank").write_text("\n \n\t\n")
    (tmp_path / "nul").write_bytes(b"em\0ma\nava\nmia\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "dot").write_text("emma\nst.john\nava\n")
    cases = [
        (["--data", tmp_path / "absent"], "cannot read the data file"),
        (["--data", tmp_path], "cannot read the data file"),
        (["--data", tmp_path / "empty"], "has 0 name(s); at least 3 are needed"),
        (["--data", tmp_path / "one"], "has 1 name(s); at least 3 are needed"),
        (["--data", tmp_path / "blank"], "has 0 name(s)"),
        (["--data", tmp_path / "nul"], "is a binary file"),
        (["--data", tmp_path / "binary"], "is not a UTF-8 text file"),
        (["--data", tmp_path / "dot"], "line 2: '.' marks the end of a name"),
        (["--device", "nowhere"], "--device nowhere cannot be used here"),
        (["--save", tmp_path / "no" / "where"], "there is no directory"),
        (["--report", tmp_path / "no" / "where"], "there is no directory"),
        (["--watch", tmp_path / "no" / "where"], "there is no directory"),
        (["--watch", tmp_path / "w.png", "--compile"], "--watch looks inside the steps"),
        (["--tripwire", "--compile"], "--tripwire looks inside the steps"),
    ]
    for arguments, message in cases:
        assert run(*arguments, "--steps", 1) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("names_mlp: error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1


def test_check_fails_on_a_wrong_backward(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--check` exits with 1 before any training, and the row of the wrong gradient says so."""
    right = names_mlp.Tanh.backward
    monkeypatch.setattr(names_mlp.Tanh, "backward", lambda self, dout: right(self, dout) * 1.01)
    assert run("--data", data, "--steps", 10, "--check") == 1
    captured = capsys.readouterr()
    assert "a gradient differs from autograd's" in captured.err
    rows = {line.split()[0]: line for line in captured.out.splitlines() if line}
    assert "False        False" in rows["4.dx"]
    assert "True" in rows["5.weight"]
