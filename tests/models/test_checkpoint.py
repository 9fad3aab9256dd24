"""A run that is interrupted goes on from its checkpoint, to the bit; a checkpoint that does not fit is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import pytest
import safetensors
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from handgrad import Layer
from names import checkpoint, command_line
from names.checkpoint import load_checkpoint
from names.errors import InputError
from names.run import Recipe
from tests.models.running import ENVIRONMENT, MODELS, checkpoint_step, equal_checkpoints, run

SMALL = ["--embedding-dim", 2, "--hidden-dim", 2, "--batch-size", 4]


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
    assert "the run has already taken 100 steps, more than --steps 50" in capsys.readouterr().err
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


@pytest.fixture(scope="module")
def small(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few kilobytes, after 6 steps and another 3."""
    path = tmp_path_factory.mktemp("small") / "c"
    assert run("--data", data, *SMALL, "--steps", 6, "--save", path) == 0
    assert run("--data", data, "--resume", path, "--steps", 9, "--save", path, "--samples", 0) == 0
    return path


def refused(path: Path) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_no_flipped_bit_goes_unnoticed(small: Path, tmp_path: Path) -> None:
    """A bit of each third byte of the header and of some after it, the bits in turn."""
    content, path = small.read_bytes(), tmp_path / "c"
    tensors = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, tensors, 3), *range(tensors, len(content), 31)]
    assert len(places) > 600
    load_checkpoint(small)
    seen = set()
    for number, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << number % 8
        path.write_bytes(damaged)
        seen.add(refused(path).split(str(path))[1].split(" (")[0].split(";")[0])
    assert seen == {
        " is not a whole checkpoint",
        " is a safetensors file, but not a checkpoint of a names model",
        " is damaged: it does not match its checksum",
    }


def test_no_truncation_goes_unnoticed(small: Path, tmp_path: Path) -> None:
    """To nothing, in the header, after it, by a byte; nor bytes in excess."""
    content, path = small.read_bytes(), tmp_path / "c"
    for size in (*range(64), *range(64, len(content), 37), len(content) - 1):
        path.write_bytes(content[:size])
        assert "is not a whole checkpoint" in refused(path)
    path.write_bytes(content + b"\0")
    assert "is not a whole checkpoint" in refused(path)


def changed(field: str, **values: object) -> Callable[[dict[str, str]], None]:
    """Changes a field of the metadata that is JSON itself; None takes the value out."""

    def change(metadata: dict[str, str]) -> None:
        inner = json.loads(metadata[field]) | values
        metadata[field] = json.dumps({key: value for key, value in inner.items() if value is not None})

    return change


FIELDS = ["kind", "data", "vocabulary", "config", "progress"]
WRONG: dict[str, Callable[[dict[str, str]], object]] = {
    **{f"no {name}": lambda metadata, name=name: metadata.pop(name) for name in FIELDS},
    **{f"{name} of another kind": lambda metadata, name=name: metadata.update({name: "[1]"}) for name in FIELDS},
    **{f"{name} not JSON": lambda metadata, name=name: metadata.update({name: "{"}) for name in FIELDS[3:]},
    **{f"no {name}": changed("config", **{name: None}) for name in ("block_size", "lr", "unbiased")},
    **{f"no {name}": changed("progress", **{name: None}) for name in ("step", "seconds", "validations", "rates")},
    "block size of 0": changed("config", block_size=0),
    "another block size": changed("config", block_size=4),
    "another hidden size": changed("config", hidden_dim=3),
    "text for a size": changed("config", hidden_dim="2"),
    "a fraction of a step": changed("config", steps=9.5),
    "fewer steps than taken": changed("config", steps=8),
    "a batch of one": changed("config", batch_size=1),
    "a negative seed": changed("config", seed=-1),
    "a rate of 0": changed("config", lr=0.0),
    "a rate that is no number": changed("config", lr=float("nan")),
    "an infinite rate": changed("config", lr=float("inf")),
    "a whole number for a truth": changed("config", unbiased=1),
    "an option that the model lacks": changed("config", tied=True),
    "dropout of a model without": changed("config", dropout=0.5),
    "an unknown field": changed("config", depth=3),
    "another step": changed("progress", step=5),
    "a negative step": changed("progress", step=-1),
    "a step beyond the end": changed("progress", step=10),
    "text for a step": changed("progress", step="6"),
    "more steps timed than taken": changed("progress", timed_steps=10),
    "negative seconds": changed("progress", seconds=-1.0),
    "text for seconds": changed("progress", seconds="1"),
    "a validation of a later step": changed("progress", validations=[[10, 2.0]]),
    "a validation of nothing": changed("progress", validations=[[5]]),
    "a validation in text": changed("progress", validations=[[5, "2"]]),
    "a rate of a later step": changed("progress", rates=[[10, 0.1]]),
    "no rate at all": changed("progress", rates=[]),
    "rates that are no list": changed("progress", rates=3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_metadata_is_refused(
    wrong: str, small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written by no script: with the right checksum, so that each field speaks for itself."""
    path = tmp_path / "c"
    rewrite(small, path, WRONG[wrong])
    assert run("--data", data, "--resume", path) == 2
    error = capsys.readouterr().err
    assert error.startswith("names_mlp: error: ")
    assert str(path) in error
    assert error.count("\n") == 1


def rewrite(source: Path, path: Path, change: Callable[[dict[str, str]], object]) -> None:
    """A checkpoint with other metadata, and the checksum of that."""
    tensors, metadata = load_checkpoint(source)
    metadata["checksum"] = checkpoint.NO_CHECKSUM
    change(metadata)
    content = save(tensors, metadata)
    path.write_bytes(content.replace(checkpoint.NO_CHECKSUM.encode(), checkpoint.checksum(content).encode(), 1))


def test_metadata_that_is_only_rewritten_is_accepted(small: Path, data: Path, tmp_path: Path) -> None:
    """The tests of wrong fields would show nothing otherwise."""
    rewrite(small, tmp_path / "c", lambda metadata: None)
    assert run("--data", data, "--resume", tmp_path / "c") == 0


def test_a_checkpoint_without_a_checksum_says_what_to_do(
    small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of an earlier version."""
    tensors, metadata = load_checkpoint(small)
    del metadata["checksum"]
    metadata["format"] = "handgrad names model 1"
    save_file(tensors, tmp_path / "c", metadata)
    assert run("--data", data, "--resume", tmp_path / "c") == 2
    expected = "is of an earlier version, which wrote no checksum; start again without --resume: one seed, one result\n"
    assert capsys.readouterr().err.endswith(expected)


def test_save_loses_no_other_run_and_no_progress(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks for --resume or --overwrite; where nothing is lost it asks for nothing."""
    path, flags = tmp_path / "c", ["--samples", 0, *SMALL]
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(data.read_text().splitlines())))
    assert run("--data", data, *flags, "--steps", 0, "--save", path) == 0
    assert run("--data", data, *flags, "--steps", 0, "--save", path) == 0  # no step would be lost
    assert run("--data", data, *flags, "--steps", 6, "--save", path, "--overwrite") == 0
    before = path.read_bytes()
    how = f"; go on from it with --resume {path}, save elsewhere, or replace it with --overwrite\n"
    for given, recipe, what in [
        (["--data", data, "--steps", 6], names_mlp.RECIPE, "this run"),
        (["--data", data, "--steps", 7], names_mlp.RECIPE, "another run (other flags)"),
        (["--data", data, "--steps", 6, "--seed", 1], names_mlp.RECIPE, "another run (other flags)"),
        (["--data", other, "--steps", 6], names_mlp.RECIPE, "another run (other data)"),
        (["--data", data, "--steps", 6], names_gru.RECIPE, "another run (other model, other flags)"),
    ]:
        capsys.readouterr()
        assert run(*flags, *given, "--save", path, recipe=recipe) == 2
        assert capsys.readouterr() == ("", f"{recipe.name}: error: {path} holds {what} after 6 steps{how}")
        assert path.read_bytes() == before
    # a resumed run asks too, where the file is not what it goes on from
    assert run("--data", data, *flags, "--steps", 6, "--save", tmp_path / "d") == 0
    assert run("--data", data, "--resume", tmp_path / "d", "--save", path) == 0  # as far
    assert run("--data", data, "--resume", tmp_path / "d", "--steps", 8, "--save", path) == 2
    assert run("--data", data, "--resume", path, "--steps", 8, "--save", path) == 0
    assert run("--data", data, "--resume", tmp_path / "d", "--save", path) == 2
    assert checkpoint_step(path) == 8
    assert run("--data", data, "--resume", tmp_path / "d", "--save", path, "--overwrite") == 0
    assert checkpoint_step(path) == 6
    # whatever else is there is replaced only where that is asked for
    path.write_text("my notes")
    capsys.readouterr()
    assert run("--data", data, *flags, "--steps", 6, "--save", path) == 2
    expected = (
        f"{path} exists, and is no checkpoint that could be resumed; save elsewhere, or replace it with --overwrite"
    )
    assert capsys.readouterr().err == f"names_mlp: error: {expected}\n"
    assert path.read_text() == "my notes"
    assert run("--data", data, *flags, "--steps", 6, "--save", path, "--overwrite") == 0
    assert equal_checkpoints(path, tmp_path / "d")


def test_more_steps_say_where_the_learning_rate_falls(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps that were taken keep the rates that they had; an unchanged run has nothing to say."""
    flags, path = ["--data", data, "--samples", 0], tmp_path / "c"
    assert run(*flags, *SMALL, "--steps", 100, "--save", path) == 0
    assert "learning rate" not in capsys.readouterr().out
    assert run(*flags, "--resume", path, "--save", path) == 0
    output = capsys.readouterr().out
    assert "going on after step 100 of 100\n" in output
    assert "learning rate" not in output
    assert run(*flags, "--resume", path, "--steps", 400, "--save", path) == 0
    moved = "not 100, which moves the half where the learning rate drops"
    rates = "0.1, after step 50 0.01, after step 100 0.1, after step 200 0.01"
    assert f"going on after step 100 of 400, {moved}: it is {rates}\n" in capsys.readouterr().out
    progress = json.loads(load_checkpoint(path)[1]["progress"])
    assert progress["rates"] == [[0, 0.1], [50, 0.01], [100, 0.1], [200, 0.01]]


def test_a_run_that_diverges_keeps_the_checkpoint_of_before(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that are not finite are no progress."""
    right, calls = names_mlp.Tanh.forward, 0

    def wrong_later(layer: Layer, x: Tensor) -> Tensor:
        nonlocal calls
        calls += layer.training
        return right(layer, x * float("nan") if calls > 50 else x)

    monkeypatch.setattr(command_line, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(names_mlp.Tanh, "forward", wrong_later)
    assert run("--data", data, *SMALL, "--steps", 100, "--save", tmp_path / "c") == 1
    output, error = capsys.readouterr()
    assert f"checkpoint: {tmp_path / 'c'} (after step 50)\n" in output
    assert (
        "the run diverged: step 51 is the first whose loss, nan, is not finite; try a smaller --lr than 0.1," in error
    )
    assert checkpoint_step(tmp_path / "c") == 50
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "c").values())


def test_a_checkpoint_of_another_model_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name."""
    path = tmp_path / "c"
    assert run("--data", data, "--steps", 1, "--save", path, recipe=names_gru.RECIPE) == 0
    assert run("--data", data, "--resume", path, recipe=names_gpt.RECIPE) == 2
    assert "is a checkpoint of names_gru, not of names_gpt" in capsys.readouterr().err
