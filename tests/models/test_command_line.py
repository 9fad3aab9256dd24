"""From the command line to the exit code: what a run prints and writes, what it refuses, and how it is interrupted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import names_gpt
import names_gru
import names_mlp
import pytest

from names import command_line, files
from names.errors import InputError
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
    assert not {"tied", "dropout"} & set(report["config"])  # this model has neither
    *_, heading = (line for line in result.stdout.splitlines() if line == "samples:")
    shown = result.stdout.partition(f"{heading}\n")[2].splitlines()
    assert shown[:20] == [f"  {name or '(empty)'}" for name in report["samples"]]
    assert shown[20:] == [f"report: {tmp_path / 'r.json'}", f"plot: {tmp_path / 'p.png'}"]
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
    (tmp_path / "dot.training.safetensors").write_text("")
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
        (["--report", tmp_path], "it is a directory; give the path of a file"),
        (["--save", tmp_path / "z", "--plot", tmp_path / "z"], "--save and --plot are the same file"),
        (["--overwrite"], "--overwrite is about the files of --save and --export"),
        (["--export", tmp_path / "step"], "--export: the path must end in .pt2, got"),
        (["--export", tmp_path / "no" / "step.pt2"], "there is no directory"),
        (["--export", tmp_path / "dot.pt2"], "--export would replace"),
        (["--export", tmp_path / "z.pt2", "--save", tmp_path / "z.safetensors"], "--save and --export are the same"),
        (
            ["--export", tmp_path / "z.pt2", "--plot", tmp_path / "z.data.safetensors"],
            "--plot and --export are the same",
        ),
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


def test_a_name_of_ten_thousand_characters(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains as any other; what is wrong with one is said in a short line."""
    path = tmp_path / "long"
    path.write_text("xy" * 5000 + "\nab\ncd\nef\n")
    for recipe in (names_mlp.RECIPE, names_gru.RECIPE):
        assert run("--data", path, "--steps", 2, "--samples", 2, recipe=recipe) == 0
    path.write_text("ab\ncd\n" + "y.z" * 5000)
    capsys.readouterr()
    assert run("--data", path) == 2
    assert len(capsys.readouterr().err) < 200 + len(str(path))


@pytest.mark.parametrize(
    ("flag", "missing"), [("--plot", "matplotlib"), ("--watch", "matplotlib"), ("--save", "safetensors"), ("", "tqdm")]
)
def test_a_package_that_is_missing_is_named_before_training(
    flag: str,
    missing: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the command that installs it."""
    for name in (missing, *(name for name in sys.modules if name.startswith(f"{missing}."))):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--data", data, *([flag, tmp_path / "x"] if flag else [])) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(rf"names_mlp: error: this needs {missing}[.\w]*: pip install 'handgrad\[models\]'\n", error)


def test_a_disk_that_fills_up_costs_neither_the_run_nor_the_other_files(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that there was is kept; the run says so at once and at its end, in its exit code too."""
    write, saves = files.write_atomically, 0

    def fills_up(path: Path, content: bytes) -> None:
        nonlocal saves
        saves += path.name == "c"
        if path.name == "c" and saves > 2:
            raise InputError(f"cannot write {path}: No space left on device")
        write(path, content)

    monkeypatch.setattr(files, "write_atomically", fills_up)
    monkeypatch.setattr(command_line, "SAVE_EVERY", 0.0)
    outputs = ["--save", tmp_path / "c", "--report", tmp_path / "r.json"]
    assert run("--data", data, "--steps", 200, "--samples", 1, *outputs) == 1
    output, error = capsys.readouterr()
    assert saves > 4
    problem = f"cannot write {tmp_path / 'c'}: No space left on device"
    assert error == f"names_mlp: {problem}; the run goes on\nnames_mlp: error: {problem}\n"
    assert output.endswith(f"report: {tmp_path / 'r.json'}\n")
    assert json.loads((tmp_path / "r.json").read_text())["steps"] == 200
    assert checkpoint_step(tmp_path / "c") < 200


@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_diverges_ends_in_good_order(
    last: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its losses, files and one line of where and what to try; so where only the last update went wrong."""
    outputs = ["--report", tmp_path / "r.json", "--plot", tmp_path / "p.png", "--watch", tmp_path / "w.png"]
    flags = ["--data", data, "--steps", 1 if last else 50, "--lr", 1e37]
    recipe = names_gpt.RECIPE if last else names_gru.RECIPE
    assert run(*flags, *outputs, recipe=recipe) == 1
    output, error = capsys.readouterr()
    first = r"after step 1 the train loss, (nan|inf)," if last else r"step \d+ is the first whose loss, (nan|inf),"
    remedy = r"try a smaller --lr than 1e\+37, or --tripwire, which says in which layer it begins"
    assert re.fullmatch(rf"{recipe.name}: error: the run diverged: {first} is not finite; {remedy}\n", error)
    assert "samples: none, the output is not finite\n" in output
    found = json.loads((tmp_path / "r.json").read_text())
    assert [found[f"{name}_loss"] for name in ("train", "val", "test")] == [None] * 3
    assert found["samples"] == []
    for name in ("p.png", "w.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in output


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_is_one_line(
    error: Exception, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the batches are too large; any other error of a layer is shown as what it is."""

    def forward(*_: object) -> None:
        raise error

    monkeypatch.setattr(names_mlp.Tanh, "forward", forward)
    assert run("--data", data, "--steps", 1) == 2
    assert capsys.readouterr().err.startswith("names_mlp: error: out of memory; a smaller --batch-size")
    error = RuntimeError("a mistake in a layer")
    with pytest.raises(RuntimeError, match="a mistake in a layer"):
        run("--data", data, "--steps", 1)


def test_a_second_ctrl_c_ends_at_once_and_an_ignored_one_stays_ignored() -> None:
    """The first one only asks."""
    with command_line.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with command_line.Stop() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


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
