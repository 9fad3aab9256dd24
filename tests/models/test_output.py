"""What a run shows of itself."""

from __future__ import annotations

import io
import json
import sys

import names_mlp
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from names.data import Vocabulary
from names.output import plot, progress_bar, report, show, to_json
from names.run import Config, Run


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def new_run(steps: int) -> Run:
    return Run.new(names_mlp.RECIPE, Config(steps=steps), Vocabulary(".abc"), torch.device("cpu"))


@pytest.mark.parametrize(("stream", "shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_the_bar_shows_progress_on_a_terminal_only(
    stream: io.StringIO, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends where the run ends, with the mean loss and the last validation loss."""
    monkeypatch.setattr(sys, "stderr", stream)
    run = new_run(steps=4)
    with progress_bar(run) as show_progress:
        show_progress()
        run.losses[:], run.step = 2.5, 4
        run.validations.append((4, 2.25))
    text = stream.getvalue()
    assert ("4/4" in text and "loss=2.5000, val=2.2500" in text) if shown else text == ""


def test_a_loss_that_is_no_number_is_null_in_the_report() -> None:
    """JSON has no NaN and no infinity."""
    losses = {"train": 2.5, "val": float("nan"), "test": float("inf")}
    result = report(new_run(steps=3), losses, ["ada"], {"threads": 1})
    assert [result[f"{name}_loss"] for name in losses] == [2.5, None, None]
    assert result["config"]["steps"] == 3
    assert result["config"]["threads"] == 1
    assert json.loads(to_json(result)) == result


def test_a_report_is_utf_8() -> None:
    """Letters as they are; the bytes of a path that is not UTF-8 as escapes, which JSON reads back."""
    result = {"samples": ["Анна"], "data": "caf\udce9"}
    content = to_json(result)
    assert "Анна" in content.decode()
    assert json.loads(content) == result


def test_the_learning_rate_is_drawn_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where half of the steps of the configuration is."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run = new_run(steps=200)
    run.step, run.losses[:], run.rates = 120, 2.0, [(0, 0.1), (40, 0.01), (60, 0.1)]
    plot(run, "a title")
    (axes,) = drawn[0].axes
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"] == [40, 60]
    assert [text.get_text() for text in axes.texts] == [" lr 0.1 to 0.01", " lr 0.01 to 0.1"]
    first, second = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)


def test_the_curves_lie_inside_the_plot_and_the_legend_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running mean and the validations, though a minibatch far off was among the losses."""
    drawn: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run = new_run(steps=200)
    run.step, run.losses[:] = 200, torch.linspace(3, 2, 200)
    run.losses[70] = 50
    run.validations = [(step, 3.1 - step / 200) for step in range(20, 201, 20)]
    plot(run, "a title")
    ((axes,), (legend,)) = drawn[0].axes, drawn[0].legends
    _, mean, validation = axes.get_lines()
    assert (mean.get_label(), validation.get_label()) == ("mean over 10 steps", "validation")
    assert (validation.get_marker(), validation.get_linestyle()) == ("o", "-")
    steps, means = mean.get_data()
    assert (steps[0], steps[-1]) == (5.5, 195.5)  # the middles of the first and the last ten
    assert means[-1] == pytest.approx(float(run.losses[190:].mean()))
    low, high = axes.get_ylim()
    assert low < min(means)
    assert max(means) < high < 50
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_huge_loss_is_shown_and_drawn() -> None:
    """As a run that diverges has."""
    assert [show(loss) for loss in (2.5, -2.5, 123456.7, 1.5e30, float("nan"), float("inf"))] == [
        *("2.5000", "-2.5000", "123456.7000", "1.5e+30", "nan", "inf")
    ]
    for losses in ([1.5e30], [3e38, 3e38], [1e-40], [2.5, 1e30, float("inf")]):
        run = new_run(steps=3)
        run.step, run.losses[: len(losses)] = len(losses), torch.tensor(losses)
        run.validations = [(1, losses[0])]
        assert plot(run, "a title").startswith(b"\x89PNG")


@pytest.mark.parametrize("step", [0, 1, 30])
def test_a_run_is_drawn_at_any_step(step: int) -> None:
    """Before the first step, after one, and at the end, a loss that is not a number among them."""
    run = new_run(steps=30)
    run.step, run.losses[:step] = step, torch.linspace(3, 2, step)
    run.losses[step // 2] = float("nan")
    assert plot(run, "a title").startswith(b"\x89PNG")
