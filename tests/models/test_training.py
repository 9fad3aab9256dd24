"""The training loop: the same again for the same seed, in the same stretches of steps; and the loss on a split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import names_gpt
import names_gru
import names_mlp
import names_wavenet
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from handgrad import CrossEntropy, Layer, TrainStep
from names import training
from names.data import IGNORED, Vocabulary, read_names
from names.run import Recipe, Run
from tests.models.running import equal_checkpoints, script
from tests.test_device import DEVICE, moved


def test_two_runs_with_one_seed_are_identical(tmp_path: Path, data: Path) -> None:
    """Bit for bit: every parameter, buffer, loss and sample."""
    outputs = []
    for name in ("a", "b"):
        result = script("names_mlp.py", "--data", data, "--steps", 200, "--save", tmp_path / name)
        outputs.append(result.stdout.replace(str(tmp_path / name), "").split("(200 steps")[0])
    assert outputs[0] == outputs[1]
    assert equal_checkpoints(tmp_path / "a", tmp_path / "b")
    script("names_mlp.py", "--data", data, "--steps", 200, "--seed", 43, "--save", tmp_path / "c")
    assert not equal_checkpoints(tmp_path / "a", tmp_path / "c")


def test_where_a_stretch_ends_depends_on_the_step_alone() -> None:
    """From any step inside it; it ends at a look, at a validation, half-way and at last."""
    ends = {step: training.end_of_stretch(step, steps=130, validate_every=50) for step in range(130)}
    assert sorted(set(ends.values())) == [40, 50, 65, 80, 100, 120, 130]
    assert all(end == min(e for e in ends.values() if e > step) for step, end in ends.items())


def test_the_loss_on_a_split_is_the_mean_over_its_targets(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are evaluated at once; padding does not count; the model is in training mode again."""
    names = read_names(data)[:50]
    vocabulary, recipe = Vocabulary.of(names), names_gru.RECIPE
    split = recipe.split(names, vocabulary, 16, torch.device("cpu"))
    model = recipe.build(recipe.defaults, len(vocabulary), torch.Generator().manual_seed(0)).to(torch.float64)
    with torch.no_grad():
        expected = float(cross_entropy(model(split.x), split.y.flatten(), ignore_index=IGNORED))
    for rows in (7, 8192):
        monkeypatch.setattr(training, "ROWS_AT_ONCE", rows)
        assert training.evaluate(model, split) == pytest.approx(expected, rel=1e-12)
    assert model.training


@pytest.mark.parametrize(
    "recipe", [m.RECIPE for m in (names_mlp, names_wavenet, names_gru, names_gpt)], ids=lambda r: r.name
)
def test_a_run_on_another_device_has_all_of_it_there(
    recipe: Recipe, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, data and optimizer; minibatches and masks are drawn on the CPU, and losses kept there. No GPU need be."""
    names = read_names(data)[:50]
    vocabulary, config = Vocabulary.of(names), replace(recipe.defaults, steps=1000)
    monkeypatch.setattr(Layer, "to", lambda layer, device: moved(layer))  # as a tensor in place, none can become a fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        run = Run.new(recipe, config, vocabulary, DEVICE)
        split = recipe.split(names, vocabulary, config.block_size, DEVICE)
        step = TrainStep(run.model, CrossEntropy(), run.optimizer)
        training.train(run, step, split, split, lambda: run.step == 0)
    assert run.step == training.STEPS_PER_LOOK
    params = list(run.model.parameters())
    state = [t for p in params for name, t in run.optimizer.state[p].items() if name != "step"]
    grads = [p.grad for p in params if p.grad is not None]
    there = [split.x, split.y, *params, *grads, *(b for _, b in run.model.named_buffers()), *state]
    assert len(grads) == len(params)
    assert {t.device.type for t in there} == {DEVICE.type}
    assert (run.losses.device.type, run.generator.device.type) == ("cpu", "cpu")
