"""Which operations of torch a pass through a layer consists of, and what each of them takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

from handgrad.bench.measure import both_sides, contenders_of
from handgrad.tables import seconds_text, text_table
from handgrad.twins import Twin

SHOWN = 0.01  # of the time: an operation with a smaller share is added to the others


class Operation(NamedTuple):
    """An operation by torch's name: its calls in a forward and a backward, and the seconds of all of them together."""

    name: str
    calls: float
    seconds: float


def operations(work: Callable[[], Any], passes: int = 10) -> list[Operation]:
    """What torch's profiler sees in a call of `work`, the longest first; the mean of several calls, after one more.

    An operation's seconds are its own, without those of the operations that it calls. Fresh pages of memory belong to
    the operation that is the first to write there.

    >>> x = torch.ones(100, 100)
    >>> [op.name for op in operations(lambda: x.exp().sum())][:1]
    ['aten::exp']
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes lines of its own to stderr
    work()
    with profiler.profile(use_kineto=False) as profile:
        for _ in range(passes):
            work()
    found = [Operation(e.key, e.count / passes, e.self_cpu_time_total / 1e6 / passes) for e in profile.key_averages()]
    return sorted(found, key=lambda op: -op.seconds)


def operations_table(twin: Twin, size: tuple[int, int], dtype: torch.dtype) -> str:
    """The operations of both sides of a twin, side by side."""
    layer, module = both_sides(twin, size[1], dtype)
    inputs = twin.inputs(*size, dtype)
    sides = contenders_of(layer, module, inputs, module(*inputs))
    rows = [["", "operation", "calls", "time", "share"]]
    for name, contender in sides.items():
        found = operations(lambda contender=contender: contender(1))  # type: ignore[misc]
        total = sum(op.seconds for op in found)
        shown = [op for op in found if op.seconds >= SHOWN * total]
        others = found[len(shown) :]
        if others:
            calls, seconds = (sum(column) for column in list(zip(*others))[1:])
            shown.append(Operation(f"{len(others)} more", calls, seconds))
        for i, op in enumerate(shown):
            share = f"{op.seconds / total:.0%}"
            rows.append(["" if i else name, op.name, f"{op.calls:,.0f}", seconds_text(op.seconds), share])
    return text_table(rows, "llrrr")
