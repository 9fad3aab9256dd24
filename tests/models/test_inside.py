"""--tripwire and --watch: what they say and draw, and that the run is the same with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import pytest
from safetensors.torch import load_file
from torch import Tensor

from handgrad import Layer
from names import command_line
from names.run import Recipe
from tests.models.running import checkpoint_step, equal_checkpoints, run

RECIPES = [names_mlp.RECIPE, names_wavenet.RECIPE, names_gru.RECIPE, names_gpt.RECIPE]
SMALL = ["--batch-size", 8, "--samples", 0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_run_that_is_looked_into_is_the_same(
    recipe: Recipe, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, in losses, parameters, buffers and generator; and the pictures are of its first and last steps."""
    flags, picture = ["--data", data, "--steps", 90, *SMALL], tmp_path / "w.png"
    assert run(*flags, "--save", tmp_path / "plain", recipe=recipe) == 0
    assert run(*flags, "--save", tmp_path / "tripwire", "--tripwire", recipe=recipe) == 0
    assert equal_checkpoints(tmp_path / "plain", tmp_path / "tripwire")
    capsys.readouterr()
    assert run(*flags, "--save", tmp_path / "watched", "--watch", picture, recipe=recipe) == 0
    assert equal_checkpoints(tmp_path / "plain", tmp_path / "watched")
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "\nsteps 69 to 90: 22 updates; " in output  # validations come every 4 steps
    assert "update:data" in output
    assert output.endswith(f"pictures: {picture} (steps 1 to 20 and steps 69 to 90)\n")


@pytest.mark.parametrize(
    ("recipe", "step", "where"),
    list(zip(RECIPES, (2, 2, 3, 2), ("2 (Linear", "2 (Linear", "0 (Embedding", "2.body.0 (LayerNorm"))),
    ids=[recipe.name for recipe in RECIPES],
)
def test_the_first_value_that_is_not_finite_ends_the_run(
    recipe: Recipe, step: int, where: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line with the layer and the step, exit code 1; what there is until then is kept, as on Ctrl-C."""
    kept = {name: tmp_path / name for name in ("save", "report", "plot", "watch")}
    paths = [part for name, path in kept.items() for part in (f"--{name}", path)]
    assert run("--data", data, "--steps", 90, "--lr", 1e30, "--tripwire", *SMALL, *paths, recipe=recipe) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{recipe.name}: error: step {step}: out of {where}")
    assert re.search(r"(is|of its) -?(inf|nan) at \[", captured.err)
    names = "checkpoint {save}, report {report}, plot {plot}, pictures {watch}".format(**kept)
    assert captured.err.endswith(f"; kept, up to this step: losses, {names}\n")
    assert captured.err.count("\n") == 1
    assert f"(stopped after {step - 1} of 90 steps)" in captured.out
    assert f"pictures: {kept['watch']} ({'step 1' if step == 2 else 'steps 1 to 2'})" in captured.out
    assert len(load_file(kept["save"])["losses"]) == json.loads(kept["report"].read_text())["steps"] == step - 1
    assert kept["plot"].read_bytes().startswith(b"\x89PNG")
    assert kept["watch"].read_bytes().startswith(b"\x89PNG")
    # resumed, the run takes the same step, and ends in the same way
    assert run("--data", data, "--resume", kept["save"], "--tripwire", "--samples", 0, recipe=recipe) == 1
    assert capsys.readouterr().err.split("; kept")[0] == captured.err.split("; kept")[0]


def test_without_the_tripwire_a_run_goes_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To its end, where it has no samples to show, and says where it diverged."""
    assert run("--data", data, "--steps", 50, "--lr", 1e30) == 1
    output = capsys.readouterr().out
    assert "train nan  val nan  test nan   (50 steps, " in output
    assert "samples: none, the output is not finite\n" in output


def test_ctrl_c_draws_what_there_is(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps; a run that goes on from there draws its own first steps, and the last."""

    class StopAfterLooks(command_line.Stop):
        """As if Ctrl-C came after a while."""

        looks = 0

        @property
        def asked(self) -> bool:
            self.looks += 1
            return self.looks > looks

    flags = ["--data", data, "--save", tmp_path / "c", "--watch", tmp_path / "w.png", "--samples", 0]
    monkeypatch.setattr(command_line, "Stop", StopAfterLooks)
    looks = 0
    assert run(*flags, "--steps", 800) == 130
    assert capsys.readouterr().out.endswith("pictures: none, no step was taken\n")
    assert not (tmp_path / "w.png").exists()
    looks = 3
    assert run(*flags, "--steps", 800) == 130
    assert checkpoint_step(tmp_path / "c") == 120
    assert capsys.readouterr().out.endswith(f"pictures: {tmp_path / 'w.png'} (steps 1 to 40)\n")
    monkeypatch.undo()
    assert run(*flags, "--resume", tmp_path / "c") == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'w.png'} (steps 121 to 160 and steps 761 to 800)\n")


@pytest.mark.parametrize("failing", [1, 30])
def test_a_run_goes_on_from_before_the_step_that_failed(
    failing: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same minibatch: what it would have come to without the failure, to the bit."""
    flags, right, calls = ["--data", data, "--steps", 60, *SMALL], names_gru.GRU.forward, 0

    def wrong_once(layer: Layer, x: Tensor) -> Tensor:
        nonlocal calls
        calls += layer.training
        return right(layer, x * float("nan") if calls == failing else x)

    assert run(*flags, "--save", tmp_path / "whole", recipe=names_gru.RECIPE) == 0
    with monkeypatch.context() as patch:
        patch.setattr(names_gru.GRU, "forward", wrong_once)
        looking = ["--tripwire", "--watch", tmp_path / "w.png"]
        assert run(*flags, "--save", tmp_path / "part", *looking, recipe=names_gru.RECIPE) == 1
    assert checkpoint_step(tmp_path / "part") == failing - 1
    pictures = failing > 1  # of no step there are none
    assert (tmp_path / "w.png").exists() == pictures
    assert (f"pictures {tmp_path / 'w.png'}\n" in capsys.readouterr().err) == pictures
    assert run(*flags, "--resume", tmp_path / "part", "--save", tmp_path / "part", recipe=names_gru.RECIPE) == 0
    assert equal_checkpoints(tmp_path / "whole", tmp_path / "part")
