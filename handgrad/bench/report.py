"""Results as a table for people, JSON for machines, and a chart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from handgrad.bench.environment import environment
from handgrad.bench.measure import Measurement
from handgrad.bench.timing import Ratio
from handgrad.pictures import new_figure
from handgrad.tables import bytes_text, seconds_text

WIDTHS = (18, 8, 8, 13, 8, 8, 13, 6, 6)
ALIGN = "llrlrrlrr"
HEAD = (
    ("", "", "inside a", "model", "alone:", "", "", "", ""),
    ("layer", "by", "a pass", "handgrad is", "forward", "backward", "handgrad is", "record", "peak"),
)


def head() -> str:
    """The three top lines of the measurements' table."""
    return "\n".join([*map(_line, HEAD), "-" * (sum(WIDTHS) + len(WIDTHS) - 1)])


def lines(result: Measurement) -> str:
    """The lines of one measurement, the size under the name; under 100 columns wide."""
    rows: list[str] = []
    names = [result.name, f"  {result.size[0]}x{result.size[1]}"]
    for i, (by, entry) in enumerate(result.entries.items()):
        inside = inside_text(None if entry.inside is None else entry.inside.median())
        alone = [seconds_text(entry.times.median(part)) for part in (0, 1)]
        verdicts = [r.verdict if r else "" for r in (entry.inside_ratio, entry.ratio)]
        cells = [inside, verdicts[0], *alone, verdicts[1], bytes_text(entry.recorded), bytes_text(entry.peak)]
        close = [text if at in (1, 4) else text.replace(" ", "") for at, text in enumerate(cells)]
        rows.append(_line([names[i] if i < len(names) else "", by, *close]))
    return "\n".join(rows)


def inside_text(seconds: float | None) -> str:
    """The time inside a model, a difference of two that were measured: one that is not above zero is lost in noise.

    >>> inside_text(2e-6), inside_text(-1e-6), inside_text(None)
    ('2.0 us', 'in noise', '-')
    """
    if seconds is None:
        return "-"
    return seconds_text(seconds) if seconds > 0 else "in noise"


def as_dict(result: Measurement) -> dict[str, Any]:
    """One measurement as JSON keeps it: seconds and bytes, of the layer alone, and inside a model where that is known.

    A ratio is its value and its interval; None stands for an end that noise has swallowed.
    """
    entries = {}
    for by, entry in result.entries.items():
        t = entry.times
        values: dict[str, Any] = {
            "inside": None if entry.inside is None else entry.inside.median(),
            "forward": t.median(0),
            "backward": t.median(1),
            "both": t.median(),
            "spread": t.spread(),
            "rounds": len(t.rounds()),
            "recorded_bytes": entry.recorded,
            "peak_bytes": entry.peak,
        }
        if entry.ratio:
            names = ("inside", "both", "forward", "backward")
            ratios = (entry.inside_ratio, entry.ratio, *entry.ratios)
            values["ratio"] = {
                name: None if r is None else [v if math.isfinite(v) else None for v in r]
                for name, r in zip(names, ratios)
            }
        entries[by] = values
    return {"layer": result.name, "size": list(result.size), "inside": result.how, "by": entries}


def write_json(path: Path, results: Iterable[Any], **more: Any) -> None:
    """Write results with what they were measured on."""
    path.write_text(json.dumps({"environment": environment(), **more, "results": list(results)}, indent=1) + "\n")


def plot(path: Path, results: Sequence[Measurement], title: str) -> None:
    """A panel for each size, a bar for each layer: who is ahead inside a model, and how many times.

    The bar goes to the side of who is faster, in its colour; = stands where there is no difference beyond the noise.
    Layers that were not measured inside a model are left out. Needs matplotlib.
    """
    found = [(r.name, r.size, ratio) for r in results if (ratio := r.entries["autograd"].inside_ratio)]
    names = list(dict.fromkeys(name for name, _, _ in found))
    sizes = list(dict.fromkeys(size for _, size, _ in found))
    figure = new_figure(3 + 3.5 * max(1, len(sizes)), 1.8 + 0.24 * len(names))
    panels: Any = figure.subplots(1, max(1, len(sizes)), sharex=True, sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes):
        bars = [(names.index(name), ratio) for name, at, ratio in found if at == size]
        lengths = [0.0 if ratio.unclear else math.log2(ratio.value) for _, ratio in bars]
        drawn = axes.barh(
            [at for at, _ in bars], lengths, color=["tab:orange" if at > 0 else "tab:blue" for at in lengths]
        )
        axes.bar_label(drawn, [_times(ratio) for _, ratio in bars], padding=3, fontsize=8)
        axes.axvline(0, color="black", lw=1)
        axes.set_title(f"{size[0]} x {size[1]}")
        axes.set_xlabel("autograd faster  <   > handgrad faster")
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    widest = max([1.0, *(abs(math.log2(ratio.value)) for _, _, ratio in found if not ratio.unclear)])
    ticks = range(-math.ceil(widest), math.ceil(widest) + 1)
    panels[0].set_xticks(ticks, [f"{2.0 ** abs(tick):g}x" for tick in ticks])
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)  # the first layer at the top
    figure.suptitle(
        f"Who is faster inside a model, forward and backward, and how many times (= no difference)\n{title}",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _times(ratio: Ratio) -> str:
    return "=" if ratio.unclear else f"{max(ratio.value, 1 / ratio.value):.2f}x"


def _line(row: Sequence[str]) -> str:
    cells = [cell.ljust(width) if a == "l" else cell.rjust(width) for cell, width, a in zip(row, WIDTHS, ALIGN)]
    return " ".join(cells).rstrip()
