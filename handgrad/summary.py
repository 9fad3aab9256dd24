"""What `Layer.summary` returns: one row per layer, as text and as HTML."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.tables import html_table, text_table

WIDTH = 44  # characters of a layer's text that the table shows


@dataclass(frozen=True)
class SummaryRow:
    """One layer: its path ("" for the whole model), its text, the shape of its output in each use.

    `parameters` are numbers, not tensors; one shared by several layers counts where it is first. `recorded` are the
    bytes that the layer keeps for its backward, each memory counted where it is first.
    """

    path: str
    layer: str
    outputs: tuple[str, ...]
    parameters: int
    frozen: int
    recorded: int


@dataclass(frozen=True)
class Summary:
    """The rows of `Layer.summary`; `print` shows them as a table, a notebook as HTML."""

    rows: tuple[SummaryRow, ...]

    def cells(self) -> list[list[str]]:
        """The table: a head, the rows, and the totals."""
        head = ["", "layer", "output", "parameters", "recorded"]
        body = [
            [row.path, _short(row.layer), "; ".join(dict.fromkeys(row.outputs)), _count(row), _bytes(row.recorded)]
            for row in self.rows
        ]
        total = SummaryRow(
            "", "", (), *(sum(getattr(row, name) for row in self.rows) for name in ("parameters", "frozen", "recorded"))
        )
        return [head, *body, ["total", "", "", _count(total) or "0", _bytes(total.recorded) or "0 bytes"]]

    def __str__(self) -> str:
        return text_table(self.cells(), "lllrr")

    def _repr_html_(self) -> str:
        return html_table(self.cells(), "lllrr")


def summarize(model: Any, inputs: tuple[Any, ...]) -> Summary:
    """Run one forward of a copy, and note what each layer gives and keeps."""
    twin = copy.deepcopy(model)
    named = list(twin.named_layers())
    outputs: dict[int, list[str]] = {id(layer): [] for _, layer in named}

    def noting(forward: Callable[..., Any], shapes: list[str]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            out = forward(*args, **options)
            shapes.append(_shapes(out))
            return out

        return run

    for _, layer in named:
        vars(layer)["forward"] = noting(layer.forward, outputs[id(layer)])
    state = torch.get_rng_state()
    with torch.enable_grad():
        twin.forward(*inputs)
    torch.set_rng_state(state)
    own = {t.untyped_storage().data_ptr() for layer in (twin,) for _, t in layer._tensors("")}
    counted: set[int] = set()  # tensors, then memory
    rows = []
    for path, layer in named:
        params = [p for _, p in layer._own("parameter") if id(p) not in counted]
        counted |= {id(p) for p in params}
        frozen = sum(p.numel() for p in params if getattr(p, "frozen", False))
        kept = [t.untyped_storage() for record in layer._records for t in _tensors(record[0])]
        fresh = {s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in own}
        own |= fresh.keys()
        shapes = tuple(outputs[id(layer)])
        rows.append(
            SummaryRow(path, layer._head(), shapes, sum(p.numel() for p in params), frozen, sum(fresh.values()))
        )
    return Summary(tuple(rows))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _shapes(out: Any) -> str:
    return ", ".join(map(_shapes, out)) if isinstance(out, (tuple, list)) else str(tuple(out.shape))


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _count(row: SummaryRow) -> str:
    if not row.parameters:
        return ""
    mark = "" if not row.frozen else " frozen" if row.frozen == row.parameters else f" ({row.frozen:,} frozen)"
    return f"{row.parameters:,}{mark}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes" if count else ""
