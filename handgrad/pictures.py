"""Figures, and the pictures of `Statistics.figure`: four, one over the other, a column for each that is compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 40, 80  # at least, and at the most
POINTS = 200  # of a curve over the steps: beyond, each is the median of several steps
LEGEND = 16, 32  # curves that a column of a legend names, and that a legend names in all
NAME = 22  # characters of a name that a legend shows
INK = "#b2182b"  # of what is not as it should be


class Curve(NamedTuple):
    """One curve: its name, a word on it, the values whose distribution it shows (or one a step), and if it is marked.

    What is marked is named in red.
    """

    name: str
    note: str
    values: Tensor
    marked: bool


class Column(NamedTuple):
    """What stands in one column: curves of activations, their gradients, the weights' gradients, and update:data."""

    title: str
    outs: list[Curve]
    douts: list[Curve]
    grads: list[Curve]
    updates: list[Curve]


PICTURES = {
    "outs": ("activations", "value", "no nonlinearity"),
    "douts": ("gradients of activations", "value", "no gradient of a nonlinearity"),
    "grads": ("gradients of weights", "value", "no gradient of a weight"),
    "updates": ("update:data of weights", "update", "no update of a weight"),
}


def new_figure(width: float, height: float, needs: str = "a picture needs") -> Figure:
    """An empty matplotlib Figure of so many inches. Raises ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{needs} matplotlib: pip install "handgrad[models]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def draw(columns: list[Column]) -> Figure:
    """Draw the columns side by side."""
    figure = new_figure(8.5 * len(columns), 12, "Statistics.figure: pictures need")
    grid: Any = figure.subplots(4, len(columns), squeeze=False, sharex="row", sharey="row")
    for axes, (key, (title, xlabel, missing)) in zip(grid, PICTURES.items()):
        every = [getattr(column, key) for column in columns]
        edges = None if key == "updates" else _edges([curve.values for curves in every for curve in curves])
        for ax, column, curves in zip(axes, columns, every):
            ax.set_title(title, loc="left", fontsize=10)
            if column.title and ax in grid[0]:
                ax.set_title(column.title + "\n", fontsize=14, fontweight="bold")
            if not curves:
                ax.text(0.5, 0.5, f"{missing} was seen", ha="center", va="center", transform=ax.transAxes)
                ax.set_axis_off()
                continue
            ax.set_xlabel(xlabel)
            if edges is None:
                _lines(ax, curves)
            else:
                _histograms(ax, curves, edges)
            _legend(ax, curves)
        if edges is not None:
            axes[0].set_ylim(bottom=0)
    return figure


def _histograms(ax: Axes, curves: list[Curve], edges: Tensor) -> None:
    middles = (edges[1:] + edges[:-1]) / 2
    for color, curve in zip(_colors(len(curves)), curves):
        values = curve.values[curve.values.isfinite()]
        density = torch.histogram(values, edges).hist / max(1, values.numel()) / (edges[1] - edges[0])
        ax.plot(middles.tolist(), density.tolist(), color=color, lw=1.3, label=_label(curve))
    ax.set_ylabel("density")


def _lines(ax: Axes, curves: list[Curve]) -> None:
    for color, curve in zip(_colors(len(curves)), curves):
        every = -(-curve.values.numel() // POINTS)
        steps = [1 + i * every + (every - 1) / 2 for i in range(-(-curve.values.numel() // every))]
        ratios = [float(part.nanmedian()) for part in torch.split(curve.values, every)]
        heights = [math.log10(r) if 0 < r < math.inf else math.nan for r in ratios]
        ax.plot(steps, heights, color=color, lw=1.3, label=_label(curve), marker="." if len(steps) == 1 else None)
    ax.axhline(-3, color="black", lw=1, ls="--")
    for edge in (-4, -2):
        ax.axhline(edge, color=INK, lw=0.8, ls=":")
    ax.set_ylabel("log10 update:data")


def _colors(count: int) -> list[Any]:
    """From the first layer, dark, to the last, light."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / max(1, count - 1)) for i in range(count)]


def _label(curve: Curve) -> str:
    name = curve.name if len(curve.name) <= NAME else "..." + curve.name[3 - NAME :]
    return f" {name}  {curve.note}".rstrip()  # for matplotlib, a label that begins with "_" is none


def _legend(ax: Axes, curves: list[Curve]) -> None:
    """To the right of the picture; of very many curves, every second, third, ... is named."""
    per_column, most = LEGEND
    shown = range(0, len(curves), -(-len(curves) // most))
    lines, labels = ax.get_legend_handles_labels()
    legend = ax.legend(
        [lines[i] for i in shown],
        [labels[i] for i in shown],
        ncols=-(-len(shown) // per_column),
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=7,
        labelspacing=0.4,
        frameon=False,
    )
    for i, text in zip(shown, legend.get_texts()):
        if curves[i].marked:
            text.set_color(INK)


def _edges(samples: list[Tensor]) -> Tensor:
    """Bins for all curves, from their 0.5 to their 99.5 per cent; their width after Freedman and Diaconis (1981)."""
    samples = [finite for values in samples if (finite := values[values.isfinite()]).numel()] or [torch.zeros(1)]
    share = torch.tensor([0.005, 0.25, 0.75, 0.995])
    low, first, third, high = torch.stack([values.quantile(share) for values in samples]).unbind(1)
    counts = torch.tensor([values.numel() for values in samples])
    width = float((2 * (third - first) / counts ** (1 / 3)).median())
    start, end = float(low.min()), float(high.max())
    if start == end:
        start, end = start - 0.5, end + 0.5
    fewest, most = BINS
    bins = min(most, max(fewest, math.ceil((end - start) / width))) if width else most
    return torch.linspace(start, end, bins + 1)
