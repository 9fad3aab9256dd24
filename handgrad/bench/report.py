"""Results as a table for people, JSON for machines, and a chart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from handgrad.bench.environment import environment
from handgrad.bench.measure import Measurement
from handgrad.pictures import new_figure
from handgrad.tables import bytes_text, seconds_text

WIDTHS = (18, 9, 8, 7, 8, 7, 6, 13, 7, 7)
HEAD = ("layer", "size", "by", "forward", "backward", "both", "spread", "handgrad is", "record", "peak")


def head() -> str:
    """The two top lines of the measurements' table."""
    return _line(HEAD, WIDTHS, "lllrrrrlrr") + "\n" + "-" * (sum(WIDTHS) + len(WIDTHS) - 1)


def lines(result: Measurement) -> str:
    """The lines of one measurement; under 100 columns wide."""
    rows: list[str] = []
    name, size = result.name, f"{result.size[0]}x{result.size[1]}"
    for by, entry in result.entries.items():
        t = entry.times
        numbers = (seconds_text(t.median(0)), seconds_text(t.median(1)), seconds_text(t.median()))
        verdict = entry.ratio.verdict if entry.ratio else ""
        memory = (bytes_text(entry.recorded), bytes_text(entry.peak))
        texts = (name, size, by, *numbers, f"{t.spread():.0%}", verdict, *memory)
        rows.append(_line([text.replace(" ", "") if 3 <= i <= 5 or i >= 8 else text for i, text in enumerate(texts)]))
        name = size = ""
    return "\n".join(rows)


def as_dict(result: Measurement) -> dict[str, Any]:
    """One measurement as JSON keeps it: seconds and bytes."""
    entries = {}
    for by, entry in result.entries.items():
        t = entry.times
        values: dict[str, Any] = {
            "forward": t.median(0),
            "backward": t.median(1),
            "both": t.median(),
            "spread": t.spread(),
            "rounds": len(t.rounds()),
            "recorded_bytes": entry.recorded,
            "peak_bytes": entry.peak,
        }
        if entry.ratio:
            names = ("both", "forward", "backward")
            values["ratio"] = {n: list(r) for n, r in zip(names, (entry.ratio, *entry.ratios))}
        entries[by] = values
    return {"layer": result.name, "size": list(result.size), "by": entries}


def write_json(path: Path, results: Iterable[Any], **more: Any) -> None:
    """Write results with what they were measured on."""
    path.write_text(json.dumps({"environment": environment(), **more, "results": list(results)}, indent=1) + "\n")


def plot(path: Path, results: Sequence[Measurement], title: str) -> None:
    """A bar per layer and size: how many times the time of handgrad autograd takes, forward and backward together.

    Needs matplotlib.
    """
    names = list(dict.fromkeys(r.name for r in results))
    sizes = list(dict.fromkeys(r.size for r in results))
    figure = new_figure(9, 1.2 + 0.2 * len(sizes) * len(names))
    axes = figure.subplots()
    height = 0.8 / len(sizes)
    for i, size in enumerate(sizes):
        found = [(names.index(r.name), r.entries["autograd"].ratio) for r in results if r.size == size]
        bars = [(at, r) for at, r in found if r is not None]
        axes.barh(
            [at + (i - (len(sizes) - 1) / 2) * height for at, _ in bars],
            [r.value for _, r in bars],
            height,
            xerr=[[r.value - r.low for _, r in bars], [r.high - r.value for _, r in bars]],
            label=f"{size[0]} x {size[1]}",
            error_kw={"lw": 0.8},
        )
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("time of autograd / time of handgrad, forward and backward (right of 1: handgrad is faster)")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)


def _line(row: Sequence[str], widths: Sequence[int] = WIDTHS, align: str = "lllrrrrlrr") -> str:
    cells = [cell.ljust(width) if a == "l" else cell.rjust(width) for cell, width, a in zip(row, widths, align)]
    return " ".join(cells).rstrip()
