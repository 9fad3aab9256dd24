"""What a run shows: a progress bar while it trains, a plot of its losses, and a report."""

from __future__ import annotations

import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

import handgrad
from names.errors import require
from names.run import Run


def show(loss: float) -> str:
    """A loss in four decimals, or a huge one in four digits."""
    return f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.4g}"


@contextmanager
def progress_bar(run: Run, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A bar with losses and steps per second, on a terminal only; yields the function that moves it to `run.step`."""
    tqdm = require("tqdm").tqdm
    with tqdm(
        total=run.config.steps, initial=run.step, unit="step", disable=None if shown else True, dynamic_ncols=True
    ) as bar:

        def move() -> None:
            if run.step > bar.n and not bar.disable:
                loss = float(run.losses[max(0, run.step - 1000) : run.step].mean())
                val = show(run.validations[-1][1]) if run.validations else "..."
                bar.set_postfix(loss=show(loss), val=val)
                bar.update(run.step - bar.n)

        yield move
        move()


def require_pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing into files, whatever window system the machine has or was set to."""
    os.environ["MPLBACKEND"] = "agg"
    require("matplotlib").use("agg")
    return require("matplotlib.pyplot")


def plot(run: Run, title: str) -> bytes:
    """A PNG picture of the losses: of each step, faint; their running mean; on validation; and where the lr changes."""
    pyplot = require_pyplot()
    losses, window = run.losses[: run.step], min(4000, max(1, run.step // 20))
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    raw = {"color": "tab:blue", "alpha": max(0.03, min(0.3, 600 / (run.step + 1))), "markersize": 1.5}
    axes.plot(range(1, run.step + 1), losses.numpy(), "o", markeredgewidth=0, label="minibatch", **raw)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), losses.double().cumsum(0)])
    means = ((sums[window:] - sums[:-window]) / window).tolist()
    middles = [first + (window + 1) / 2 for first in range(len(means))]  # of the steps that each is the mean of
    axes.plot(middles, means, color="tab:blue", linewidth=1.8, label=f"mean over {window:,} steps")
    axes.plot(*zip(*run.validations or [(None, None)]), "o-", color="tab:orange", markersize=4, label="validation")
    curves = [loss for loss in (*means, *(loss for _, loss in run.validations)) if math.isfinite(loss)]
    if curves:  # minibatches beyond are cut off
        margin = 0.3 * (max(curves) - min(curves)) + max(0.01, 0.001 * max(map(abs, curves)))
        axes.set_ylim(min(curves) - margin, max(curves) + margin)
    for number, ((_, before), (change, after)) in enumerate(zip(run.rates, run.rates[1:])):
        axes.axvline(change, color="gray", linestyle="--", linewidth=1)
        text = f" lr {before:g} to {after:g}"
        height = 0.98 - 0.05 * (number % 4)  # changes may be close together
        axes.text(change, height, text, transform=axes.get_xaxis_transform(), va="top", color="gray")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats a character)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.2)
    for line in figure.legend(loc="outside lower center", ncols=3).get_lines():
        line.set(alpha=1, markersize=4)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    pyplot.close(figure)
    return image.getvalue()


def report(run: Run, losses: dict[str, float], samples: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a run, ready for JSON; a loss that is infinite or not a number is null."""
    return {
        "parameters": run.parameters,
        "steps": run.step,
        **{f"{name}_loss": loss if math.isfinite(loss) else None for name, loss in losses.items()},
        "steps_per_second": run.steps_per_second,
        "samples": samples,
        "config": run.recipe.settings(run.config) | settings,
        "versions": {
            "handgrad": handgrad.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
    }


def to_json(result: dict[str, Any]) -> bytes:
    """The content of a JSON file, letters as they are; a path that is not UTF-8 has its bytes as escapes."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"
