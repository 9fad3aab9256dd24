"""A run that is interrupted goes on from its checkpoint, to the bit; a checkpoint that does not fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import names_gpt
import names_gru
import names_wavenet
import pytest
import safetensors
from safetensors.torch import load_file, save_file

from names import command_line
from names.run import Recipe
from tests.models.running import ENVIRONMENT, MODELS, checkpoint_step, equal_checkpoints, run


def test_kill_and_resume_end_where_an_uninterrupted_run_ends(tmp_path: Path, data: Path) -> None:
    """`kill -9` at a moment of the machine's choice, several times; each time the file holds a whole checkpoint."""
    arguments = ["--data", str(data), "--steps", "4000", "--samples", "3"]
    assert run(*arguments, "--save", tmp_path / "whole") == 0
    eager_to_save = (
        "import sys, names_mlp; from names import command_line; command_line.SAVE_EVERY = 0.0; "
        "sys.exit(command_line.main(names_mlp.RECIPE, sys.argv[1:]))"
    )
    path, step, kills = tmp_path / "killed", 0, 0
    while step < 4000 and kills < 4:
        more = ["--resume", str(path)] if path.exists() else []
        environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(MODELS.parent), str(MODELS)])}
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


@pytest.mark.parametrize("recipe", [names_wavenet.RECIPE, names_gru.RECIPE, names_gpt.RECIPE], ids=lambda r: r.name)
def test_an_interrupted_run_goes_on_bit_for_bit(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the optimizer's state, the generator and the losses."""
    flags = ["--data", data, "--steps", 40, "--batch-size", 8, "--samples", 0]
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run(*flags, "--save", whole, recipe=recipe) == 0

    class StopSoon(command_line.Stop):
        """As if Ctrl-C came after a while."""

        looks = 0

        @property
        def asked(self) -> bool:
            self.looks += 1
            return self.looks > 7

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "Stop", StopSoon)
        assert run(*flags, "--save", part, recipe=recipe) == 130
    assert 0 < len(load_file(part)["losses"]) < 40
    assert run(*flags, "--resume", part, "--save", part, recipe=recipe) == 0
    assert equal_checkpoints(whole, part)


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


def test_a_checkpoint_of_another_model_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name."""
    path = tmp_path / "c"
    assert run("--data", data, "--steps", 1, "--save", path, recipe=names_gru.RECIPE) == 0
    assert run("--data", data, "--resume", path, recipe=names_gpt.RECIPE) == 2
    assert "is a checkpoint of names_gru, not of names_gpt" in capsys.readouterr().err
