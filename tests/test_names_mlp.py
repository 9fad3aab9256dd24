"""The scripts, run as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import names
import names_mlp
import pytest
import safetensors
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "models" / "names_mlp.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fortieth of the shipped names, so that a run starts at once; all letters of the alphabet occur."""
    path = tmp_path_factory.mktemp("data") / "names.txt"
    path.write_text("\n".join(names.DATA.read_text().splitlines()[::40]))
    return path


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run names_mlp.py to its end."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


def run(*arguments: object) -> int:
    """Run names_mlp in this process; the exit code."""
    return names.main(names_mlp.RECIPE, [str(argument) for argument in arguments])


def test_a_short_run_reports_everything_it_promises(tmp_path: Path) -> None:
    """The shipped data and the default model, from the command line."""
    result = script("--steps", 300, "--check", "--report", tmp_path / "r.json", "--plot", tmp_path / "p.png")
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


def test_two_runs_with_one_seed_are_identical(tmp_path: Path, data: Path) -> None:
    """Bit for bit: every parameter, buffer, loss and sample."""
    outputs = []
    for name in ("a", "b"):
        result = script("--data", data, "--steps", 200, "--save", tmp_path / name)
        outputs.append(result.stdout.replace(str(tmp_path / name), "").split("(200 steps")[0])
    assert outputs[0] == outputs[1]
    assert equal_checkpoints(tmp_path / "a", tmp_path / "b")
    script("--data", data, "--steps", 200, "--seed", 43, "--save", tmp_path / "c")
    assert not equal_checkpoints(tmp_path / "a", tmp_path / "c")


def equal_checkpoints(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors to the bit."""
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def checkpoint_step(path: Path) -> int:
    """The step a checkpoint was made at."""
    with safetensors.safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


def test_kill_and_resume_end_where_an_uninterrupted_run_ends(tmp_path: Path, data: Path) -> None:
    """`kill -9` at a moment of the machine's choice, several times; each time the file holds a whole checkpoint."""
    arguments = ["--data", str(data), "--steps", "4000", "--samples", "3"]
    assert run(*arguments, "--save", tmp_path / "whole") == 0
    eager_to_save = (
        "import sys, names, names_mlp; names.SAVE_EVERY = 0.0;sys.exit(names.main(names_mlp.RECIPE, sys.argv[1:]))"
    )
    path, step, kills = tmp_path / "killed", 0, 0
    while step < 4000 and kills < 4:
        more = ["--resume", str(path)] if path.exists() else []
        environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "models")])}
        process = subprocess.Popen(
            [sys.executable, "-c", eager_to_save, *arguments, "--save", str(path), *more],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and not (path.exists() and checkpoint_step(path) > step + 300):
            time.sleep(0.01)
        process.kill()
        process.wait()
        kills += 1
        assert checkpoint_step(path) > step
        step = checkpoint_step(path)
    assert kills >= 2
    assert run(*arguments, "--resume", path, "--save", path) == 0
    assert equal_checkpoints(tmp_path / "whole", path)


def test_ctrl_c_saves_and_reports(tmp_path: Path, data: Path) -> None:
    """One Ctrl-C ends a run in good order, with exit code 130."""
    arguments = ["--data", data, "--steps", 10**8, "--save", tmp_path / "c", "--report", tmp_path / "r.json"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
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


def test_more_steps_go_on_from_a_finished_run(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--steps` may grow on resuming; it may not fall below what was done; nothing else may change."""
    assert run("--data", data, "--steps", 100, "--save", tmp_path / "c") == 0
    assert run("--data", data, "--resume", tmp_path / "c", "--steps", 150, "--save", tmp_path / "d") == 0
    assert checkpoint_step(tmp_path / "d") == 150
    capsys.readouterr()
    assert run("--data", data, "--resume", tmp_path / "c", "--steps", 50) == 2
    assert "has already taken 100 steps" in capsys.readouterr().err
    assert run("--data", data, "--resume", tmp_path / "c", "--hidden-dim", 65) == 2
    assert "was made with --hidden-dim 64, got 65" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truncated, foreign, damaged, of another vocabulary, of other data: one line, exit code 2, file untouched."""
    good = tmp_path / "good"
    assert run("--data", data, "--steps", 20, "--save", good) == 0
    other = tmp_path / "other.txt"
    other.write_text("ada\nbob\ncid\n")
    reversed_data = tmp_path / "reversed.txt"
    reversed_data.write_text("\n".join(reversed(data.read_text().splitlines())))
    foreign, truncated, damaged = tmp_path / "foreign", tmp_path / "truncated", tmp_path / "damaged"
    tensors = load_file(good)
    save_file(tensors, foreign)
    truncated.write_bytes(good.read_bytes()[:-100])
    with safetensors.safe_open(good, "pt") as file:
        save_file({key: t for key, t in tensors.items() if "running_var" not in key}, damaged, file.metadata())
    (tmp_path / "text").write_text("not a checkpoint")
    cases = [
        (truncated, data, "is not a whole checkpoint"),
        (foreign, data, "is a safetensors file, but not a checkpoint of a names model"),
        (damaged, data, "is damaged"),
        (tmp_path / "text", data, "is not a whole checkpoint"),
        (tmp_path / "absent", data, "cannot read the checkpoint"),
        (good, other, "has the vocabulary"),
        (good, reversed_data, "was trained on other data"),
    ]
    for path, names_file, message in cases:
        before = path.read_bytes() if path.exists() else None
        capsys.readouterr()
        assert run("--data", names_file, "--resume", path, "--save", path, "--steps", 30) == 2
        error = capsys.readouterr().err
        assert error.startswith("names_mlp: error: ")
        assert message in error
        assert error.count("\n") == 1
        assert (path.read_bytes() if path.exists() else None) == before
    # nor does --save alone replace a file that is no checkpoint
    assert run("--data", data, "--save", tmp_path / "text", "--steps", 5) == 2
    assert (tmp_path / "text").read_text() == "not a checkpoint"


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
    ]
    for arguments, message in cases:
        assert run(*arguments, "--steps", 1) == 2
        error = capsys.readouterr().err
        assert error.startswith("names_mlp: error: ")
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--block-size", "0"),
        ("--embedding-dim", "-1"),
        ("--hidden-dim", "1e9"),
        ("--batch-size", "1"),
        ("--steps", "-5"),
        ("--lr", "nan"),
        ("--lr", "0"),
        ("--seed", "x"),
        ("--threads", "0"),
    ],
)
def test_impossible_values_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By argparse, which says which flag, what was expected and what came."""
    with pytest.raises(SystemExit) as exit_:
        run(flag, value)
    assert exit_.value.code == 2
    assert f"argument {flag}: expected" in capsys.readouterr().err


def test_names_as_people_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blank lines, CRLF and a byte order mark do not count; upper case and non-ASCII letters are vocabulary."""
    path = tmp_path / "names"
    path.write_bytes("\ufeffÅsa\r\n\r\nJosé\r\n  Zoë  \r\nÅsa\r\nMia\r\n".encode())
    assert names.read_names(path) == ["Åsa", "José", "Zoë", "Åsa", "Mia"]
    assert names.Vocabulary.of(names.read_names(path)).characters == ".JMZaiosÅéë"
    assert run("--data", path, "--steps", 30, "--samples", 2) == 0
    assert "5 names, 11 characters" in capsys.readouterr().out


def test_the_split_and_the_windows() -> None:
    """80 / 10 / 10 without a name lost; each window holds the characters before its target."""
    everyone = [f"n{i}" for i in range(103)]
    parts = names.split_names(everyone, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {"train": 82, "val": 10, "test": 11}
    assert sorted(name for part in parts.values() for name in part) == sorted(everyone)
    assert [len(part) for part in names.split_names(["a", "b", "c"], seed=1).values()] == [1, 1, 1]
    split = names.windows(["ab"], names.Vocabulary(".ab"), 3)
    assert split.x.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert split.y.tolist() == [1, 2, 0]


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


def test_by_hand_agrees_with_autograd() -> None:
    """The walk through the atomic steps."""
    command = [sys.executable, str(ROOT / "models" / "names_mlp_by_hand.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" True ") >= 39
    assert result.stdout.endswith("Every gradient agrees.\n")


def test_by_hand_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A slip in one step: exit code 1."""
    import names_mlp_by_hand as walk

    right = walk.batch_norm_at_once
    monkeypatch.setattr(walk, "batch_norm_at_once", lambda v, dnormed: right(v, dnormed) * (1 + 1e-7))
    monkeypatch.setattr(sys, "argv", ["names_mlp_by_hand"])
    assert walk.main() == 1
    assert "A gradient is wrong" in capsys.readouterr().out
