"""The names models beyond the MLP: the same flags, checks and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import names
import names_gpt
import names_gru
import names_wavenet
import pytest
import torch
from safetensors.torch import load_file

RECIPES = [names_wavenet.RECIPE, names_gru.RECIPE, names_gpt.RECIPE]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred of the shipped names."""
    path = tmp_path_factory.mktemp("data") / "names.txt"
    path.write_text("\n".join(names.DATA.read_text().splitlines()[::80]))
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_short_run_with_all_flags(
    recipe: names.Recipe, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exact gradients of the whole model, a loss below that of a guess, samples, a picture, a report."""
    paths = ["--save", tmp_path / "c", "--plot", tmp_path / "p.png", "--report", tmp_path / "r.json"]
    flags = ["--data", data, "--steps", 60, "--batch-size", 16, "--samples", 4, "--check", *paths]
    assert names.main(recipe, [str(flag) for flag in flags]) == 0
    table = capsys.readouterr().out
    assert "False        False" not in table
    assert "0.weight" in table
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["steps"] == 60
    assert len(report["samples"]) == 4
    assert report["val_loss"] < 3.0  # log 27 is 3.3
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_an_interrupted_run_goes_on_bit_for_bit(
    recipe: names.Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AdamW's state, the generator and the losses."""
    flags = ["--data", str(data), "--steps", "40", "--batch-size", "8", "--samples", "0"]
    assert names.main(recipe, [*flags, "--save", str(tmp_path / "whole")]) == 0

    class StopSoon(names.Stop):
        """As if Ctrl-C came after a while."""

        looks = 0

        @property
        def asked(self) -> bool:
            self.looks += 1
            return self.looks > 7

    with monkeypatch.context() as patch:
        patch.setattr(names, "Stop", StopSoon)
        assert names.main(recipe, [*flags, "--save", str(tmp_path / "part")]) == 130
    part = str(tmp_path / "part")
    assert 0 < len(load_file(part)["losses"]) < 40
    assert names.main(recipe, [*flags, "--resume", part, "--save", part]) == 0
    whole, resumed = load_file(tmp_path / "whole"), load_file(part)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_sizes_that_a_model_cannot_have(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2."""
    assert names.main(names_wavenet.RECIPE, ["--data", str(data), "--block-size", "6"]) == 2
    assert "--block-size must be a power of two, at least 2, got 6" in capsys.readouterr().err
    assert names.main(names_gpt.RECIPE, ["--data", str(data), "--embedding-dim", "30"]) == 2
    assert "--embedding-dim must be a multiple of the 4 heads, got 30" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name."""
    path = str(tmp_path / "c")
    assert names.main(names_gru.RECIPE, ["--data", str(data), "--steps", "1", "--save", path]) == 0
    assert names.main(names_gpt.RECIPE, ["--data", str(data), "--resume", path]) == 2
    assert "is a checkpoint of names_gru, not of names_gpt" in capsys.readouterr().err


def test_rows_of_names() -> None:
    """The boundary, the name, at each place what follows; nothing follows a padding."""
    split = names.sequences(["ab", "c"], names.Vocabulary(".abc"), 16)
    assert split.x.tolist() == [[0, 1, 2], [0, 3, 0]]
    assert split.y.tolist() == [[1, 2, 0], [3, 0, names.IGNORED]]
    assert names.sequences(["abc"], names.Vocabulary(".abc"), 2).y.tolist() == [[1, 2]]
