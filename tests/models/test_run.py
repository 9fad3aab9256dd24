"""What a run is: its configuration, how far it has come, and at which learning rates."""

from __future__ import annotations

import re
from dataclasses import replace

import names_gpt
import names_mlp
import names_wavenet
import pytest
import torch

from names.data import Vocabulary
from names.errors import InputError
from names.run import Config, Run


def new_run(steps: int) -> Run:
    return Run.new(names_mlp.RECIPE, Config(steps=steps), Vocabulary(".abc"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("block_size", 0, "block_size must be from 1 to 1,024, got 0"),
        ("batch_size", 1, "batch_size must be from 2 to 1,048,576, got 1"),
        ("steps", -1, "steps must be from 0 to 1,000,000,000, got -1"),
        ("hidden_dim", 2.0, "hidden_dim must be of type int, got 2.0"),
        ("tied", 1, "tied must be of type bool, got 1"),
        ("lr", "x", "lr must be of type float, got 'x'"),
        ("lr", 0.0, "lr must be a number above 0, up to 1e+37, got 0.0"),
        ("lr", float("nan"), "lr must be a number above 0, up to 1e+37, got nan"),
        ("lr", float("inf"), "lr must be a number above 0, up to 1e+37, got inf"),
        ("dropout", 1.0, "dropout must be a number from 0 up to 1, got 1.0"),
    ],
)
def test_a_configuration_that_no_run_can_have(field: str, value: object, problem: str) -> None:
    """The field, what was expected, what came."""
    with pytest.raises(ValueError, match=rf"^{re.escape(problem)}$"):
        replace(Config(), **{field: value})


def test_settings_are_those_that_the_model_has() -> None:
    """The sizes and the training are common to all; of the options each model has its own."""
    options = {"unbiased", "tied", "dropout"}
    common = {"block_size", "embedding_dim", "hidden_dim", "batch_size", "steps", "lr", "seed"}
    for recipe in (names_mlp.RECIPE, names_wavenet.RECIPE, names_gpt.RECIPE):
        assert set(recipe.settings(recipe.defaults)) == common | (set(recipe.options) & options)
    assert names_gpt.RECIPE.settings(names_gpt.DEFAULTS)["dropout"] == 0.1


def test_more_steps_keep_what_was_done() -> None:
    """Fewer than were taken is refused."""
    run = new_run(4)
    run.step, run.losses[:] = 3, torch.tensor([3.0, 2.0, 1.0, 0.0])
    run.set_steps(6)
    assert run.config.steps == 6
    assert run.losses.tolist() == [3, 2, 1, 0, 0, 0]
    with pytest.raises(InputError, match="the run has already taken 3 steps, more than --steps 2"):
        run.set_steps(2)


def test_rates_are_noted_where_they_change() -> None:
    """Of a step that was not taken after all, the last note counts."""
    run = new_run(10)
    for step, rate in [(0, 0.1), (2, 0.1), (5, 0.01), (5, 0.02), (7, 0.02), (8, 0.1), (8, 0.02)]:
        run.step = step
        run.note_rate(rate)
    assert run.rates == [(0, 0.1), (5, 0.02)]


@pytest.mark.parametrize(
    ("step", "steps", "expected"),
    [
        (0, 100, "0.1, after step 50 0.01"),
        (40, 150, "0.1, after step 75 0.01"),
        (60, 400, "0.1, after step 50 0.01, after step 60 0.1, after step 200 0.01"),
        (100, 150, "0.1, after step 50 0.01"),
        (40, 60, "0.1, after step 40 0.01"),
        (100, 100, "0.1, after step 50 0.01"),
        (0, 0, ""),
    ],
)
def test_the_schedule_is_what_was_used_and_what_is_to_come(step: int, steps: int, expected: str) -> None:
    """Of a run of 100 steps that goes on with other steps."""
    run = new_run(100)
    for run.step in range(0, step, 10):
        run.note_rate(run.config.lr_at(run.step))
    run.step = step
    run.set_steps(steps)
    assert run.schedule() == expected


def test_a_run_diverged_at_its_first_loss_that_is_not_finite() -> None:
    """Of the steps that were taken."""
    run = new_run(5)
    run.losses[:] = torch.tensor([3.0, 2.0, float("inf"), 2.0, float("nan")])
    found = []
    for run.step in range(6):
        found.append(run.diverged_at)
    assert found == [None, None, None, 3, 3, 3]
