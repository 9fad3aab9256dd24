"""Each names model: its gradients, its training beside torch.nn's, the sizes that it cannot have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import names_gpt
import names_gru
import names_wavenet
import pytest
import torch
from torch import nn

from benchmarks.names_twins import TWINS, load
from handgrad import CrossEntropy, TrainStep
from names.data import DATA, IGNORED, Vocabulary, minibatch, read_names
from names.run import Recipe
from tests.models.running import run

SMALL = {"embedding_dim": 8, "hidden_dim": 12, "batch_size": 6}
MODELS = [(name, {}) for name in TWINS] + [("gpt", {"tied": True})]


@pytest.mark.parametrize("recipe", [names_wavenet.RECIPE, names_gru.RECIPE, names_gpt.RECIPE], ids=lambda r: r.name)
def test_a_short_run_with_all_flags(
    recipe: Recipe, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exact gradients of the whole model, a loss below that of a guess, samples, a picture, a report."""
    paths = ["--save", tmp_path / "c", "--plot", tmp_path / "p.png", "--report", tmp_path / "r.json"]
    flags = ["--data", data, "--steps", 60, "--batch-size", 16, "--samples", 4, "--check", *paths]
    assert run(*flags, recipe=recipe) == 0
    table = capsys.readouterr().out
    assert "False        False" not in table
    assert "0.weight" in table
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["steps"] == 60
    assert len(report["samples"]) == 4
    assert report["val_loss"] < 3.0  # log 27 is 3.3
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "options"), MODELS, ids=["mlp", "wavenet", "gru", "gpt", "gpt tied"])
def test_training_equals_that_of_the_twin(name: str, options: dict[str, bool]) -> None:
    """Twelve steps on real names with the model's own optimizer, in float64: every parameter and buffer."""
    recipe, make_twin = TWINS[name]
    config = replace(recipe.defaults, **SMALL, **options, dropout=0.0)
    generator = torch.Generator().manual_seed(3)
    people = read_names(DATA)[::400]
    vocabulary = Vocabulary.of(people)
    data = recipe.split(people, vocabulary, config.block_size, torch.device("cpu"))
    model = recipe.build(config, len(vocabulary), generator).to(torch.float64)
    twin = make_twin(config, len(vocabulary)).double()
    load(twin, model)
    kind = torch.optim.SGD if name in ("mlp", "wavenet") else torch.optim.AdamW
    twin_optimizer = kind(twin.parameters(), lr=config.lr)
    step = TrainStep(model, CrossEntropy(), recipe.optimizer(model.parameters(), config.lr))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(12):
        x, y = minibatch(data, config.batch_size, generator)
        value = step(x, y)
        twin_value = nn.functional.cross_entropy(twin(x), y)
        twin_optimizer.zero_grad()
        twin_value.backward()
        twin_optimizer.step()
        torch.testing.assert_close(value, twin_value.detach(), rtol=1e-9, atol=0)
    assert bool((y == IGNORED).any()) == recipe.sequences  # names of unequal length were among them
    theirs = list(twin.state_dict().values())
    for (key, tensor), expected in zip(model.state_dict().items(), theirs):
        torch.testing.assert_close(tensor, expected, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
        assert not torch.equal(tensor, before[key]), key
    model.eval()
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-7, atol=1e-9)


def test_sizes_that_a_model_cannot_have(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 2."""
    assert run("--data", data, "--block-size", 6, recipe=names_wavenet.RECIPE) == 2
    assert "--block-size must be a power of two, at least 2, got 6" in capsys.readouterr().err
    assert run("--data", data, "--embedding-dim", 30, recipe=names_gpt.RECIPE) == 2
    assert "--embedding-dim must be a multiple of the 4 heads, got 30" in capsys.readouterr().err
