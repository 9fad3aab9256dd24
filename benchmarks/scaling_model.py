"""A step in p processes on paper: what `scaling.py` fits to what it measured, and what that says for many processes.

    step          = compute + communication - hidden
    compute       = fixed + per_row * rows                              rows of one process
    communication = sum over messages of all_reduce(bytes)
    all_reduce    = 2 (p - 1)/p bytes/bandwidth + 2 (p - 1) latency     a ring: each of 2 (p - 1) hops sends bytes/p
    hidden        = min(overlap * compute, communication - that of the last message)

The messages are those of a TrainStep with a process group: two short ones, with which the processes agree on the joined
minibatch and on who has a gradient, then all gradients in buckets of 25 MiB. `overlap` is the share of the computing
during which messages can be under way: 0 for TrainStep, which sends after the backward. For DistributedDataParallel it
is at most 2/3, for the backward does about twice the work of the forward; the last bucket is full only after it.

Weak scaling: each process has the same number of rows, whatever p is; its efficiency is step(1)/step(p). Strong
scaling: one minibatch is divided, and the efficiency is step(1)/(p step(p)); a process has one row at the least, so
beyond as many processes as rows the others wait.

What it leaves out: that processes are unequally fast, and all wait for the slowest; links that others use, too; what
collecting gradients in buckets and putting them back costs; for a stated model, what a step costs beside its
arithmetic, the update included (`fixed` is zero); and trees, which NCCL prefers to a ring for short messages and many
processes, and whose latency grows as log p. So with many processes it is pessimistic about latency, and optimistic
about the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from handgrad.parallel import BUCKET
from handgrad.pictures import new_figure
from handgrad.tables import bytes_text, seconds_text

PROCESSES = (1, 2, 8, 64, 512)
HERE, STATED = "measured links", "stated links"
ALONE, TOGETHER, DDP = "no messages", "TrainStep", "DDP"
HEAD = ["", "task", "how", "processes", "rows each", "a step", "efficiency"]


@dataclass(frozen=True)
class Link:
    """What lies between two processes: seconds per message, bytes per second."""

    latency: float
    bandwidth: float

    def all_reduce(self, size: float, processes: int) -> float:
        """The seconds that a ring takes for a message of so many bytes."""
        hops = 2 * (processes - 1)
        return hops / processes * size / self.bandwidth + hops * self.latency


@dataclass(frozen=True)
class Task:
    """What is trained: its step without communication, and its gradients."""

    name: str
    fixed: float  # seconds
    per_row: float  # seconds
    tensors: int  # parameters, each a tensor
    gradient_bytes: int
    minibatch: int  # rows that strong scaling divides
    rows: int  # of each process in weak scaling

    @property
    def messages(self) -> list[int]:
        """The bytes of each message of a step."""
        full, rest = divmod(self.gradient_bytes, BUCKET)
        return [2 * 8, (self.tensors + 2) * 8, *[BUCKET] * full, *([rest] if rest else [])]


class Step(NamedTuple):
    """A step on paper, in seconds."""

    seconds: float
    compute: float
    communication: float


def step(task: Task, link: Link, rows: int, processes: int, overlap: float) -> Step:
    """The time of a step with so many rows in each process."""
    compute = task.fixed + task.per_row * rows
    parts = [link.all_reduce(size, processes) for size in task.messages]
    hidden = min(overlap * compute, sum(parts[:-1]))
    return Step(compute + sum(parts) - hidden, compute, sum(parts))


def line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """The (fixed, slope) of seconds = fixed + slope * size with the least squares of the relative errors.

    Neither is below zero: what noise would make so is zero, and the other one fitted alone.
    """
    ones, slopes = [1 / t for t in seconds], [s / t for s, t in zip(sizes, seconds)]
    aa, ab, bb = (sum(x * y for x, y in zip(*two)) for two in ((ones, ones), (ones, slopes), (slopes, slopes)))
    a, b, det = sum(ones), sum(slopes), aa * bb - ab * ab
    if det <= 0:
        raise ValueError(f"a line needs two sizes or more, got {sorted(set(sizes))}")
    fixed, slope = (a * bb - b * ab) / det, (b * aa - a * ab) / det
    if fixed < 0:
        return 0.0, b / bb
    return (a / aa, 0.0) if slope < 0 else (fixed, slope)


def fitted_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The link that all_reduce of two processes, measured for several sizes, is like."""
    fixed, per_byte = line(sizes, seconds)  # 2 latency + size / bandwidth
    return Link(fixed / 2, 1 / per_byte if per_byte else math.inf)


def modelled(task: Task, links: str, link: Link, overlaps: Iterable[float]) -> list[dict[str, Any]]:
    """Weak and strong scaling on paper, a result for each number of processes."""
    found = []
    for overlap in overlaps:
        for scaling in ("weak", "strong"):
            alone = 0.0
            for p in PROCESSES:
                rows = task.rows if scaling == "weak" else math.ceil(task.minibatch / p)
                s = step(task, link, rows, p, overlap)
                alone = alone or s.seconds
                found.append(
                    {
                        "kind": "modelled",
                        "what": "step",
                        "task": task.name,
                        "links": links,
                        "scaling": scaling,
                        "overlap": overlap,
                        "processes": p,
                        "rows": rows,
                        **s._asdict(),
                        "efficiency": alone / s.seconds / (p if scaling == "strong" else 1),
                    }
                )
    return found


def beside_measured(results: Sequence[dict[str, Any]]) -> list[str]:
    """How the model does: each step that was both measured, by TrainStep in two processes, and modelled."""
    found = []
    for r in results:
        if r["kind"] == "modelled" and (r["links"], r["processes"]) == (HERE, 2):
            same = {
                "kind": "measured",
                "what": "step",
                "task": r["task"],
                "by": TOGETHER,
                "processes": 2,
                "rows": r["rows"],
            }
            for m in results:
                if m.items() >= same.items():
                    times = f"{seconds_text(m['seconds'])} measured, {seconds_text(r['seconds'])} modelled"
                    found.append(f"{r['task']}, {r['scaling']}: {times}")
    return found


def row(r: dict[str, Any]) -> list[str]:
    """A result as the cells of a table; the first says whether it was measured, fitted or modelled."""
    empty = [""] * 4
    if r["what"] == "link":
        speed = "without limit" if r["bandwidth"] is None else f"{r['bandwidth'] / 1e9:.2f} GB/s"
        return [r["kind"], r["links"], f"latency {seconds_text(r['latency'])}, {speed}", *empty]
    if r["what"] == "compute":
        how = f"compute = {seconds_text(r['fixed'])} + {seconds_text(r['per_row'])} a row"
        return [r["kind"], r["task"], how, *empty]
    if r["what"] == "all_reduce":
        return [r["kind"], f"all_reduce, {bytes_text(r['bytes'])}", "", "2", "", seconds_text(r["seconds"]), ""]
    if r["kind"] == "measured":
        how, efficiency = r["by"], ""
    else:
        how = f"{r['scaling']}, {r['links']}" + (f", overlap {r['overlap']:.2f}" if r["overlap"] else "")
        efficiency = f"{100 * r['efficiency']:.3g} %"
    return [r["kind"], r["task"], how, str(r["processes"]), str(r["rows"]), seconds_text(r["seconds"]), efficiency]


def chart(path: Path, data: dict[str, Any]) -> None:
    """A panel for each task: the step by the number of processes; points were measured, lines are the model's."""
    steps = [r for r in data["results"] if r["what"] == "step"]
    tasks = list(dict.fromkeys(r["task"] for r in steps))
    figure = new_figure(5.2 * len(tasks), 5.6)
    panels: Any = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        of_task = [r for r in steps if r["task"] == task]
        curves: dict[str, list[dict[str, Any]]] = {}
        for r in of_task:
            if r["kind"] == "modelled":
                curves.setdefault(row(r)[2], []).append(r)
        for label, curve in curves.items():
            dash = "-" if curve[0]["scaling"] == "weak" else "--"
            x, y = [r["processes"] for r in curve], [1e3 * r["seconds"] for r in curve]
            axes.plot(x, y, dash, lw=1.3, label=f"modelled: {label}")
        points = [r for r in of_task if r["kind"] == "measured" and r["by"] != ALONE]
        for by, mark in zip(dict.fromkeys(r["by"] for r in points), "ox"):
            x, y = zip(*((r["processes"], 1e3 * r["seconds"]) for r in points if r["by"] == by))
            axes.plot(x, y, mark, color="black", label=f"measured: {by}")
        axes.set(xscale="log", yscale="log", xlabel="processes", ylabel="a step (ms)")
        axes.set_title(f"{task}: " + ("measured and modelled" if points else "modelled alone"))
        axes.set_xticks(PROCESSES, [str(p) for p in PROCESSES])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.legend(fontsize=7, loc="upper left")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    figure.savefig(path, dpi=120)
