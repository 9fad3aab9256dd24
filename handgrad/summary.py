"""What `Layer.summary` returns: one row per layer, as text and as HTML."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.records import recorded_by_layer
from handgrad.tables import Shown, Table, bytes_text


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


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """The rows of `Layer.summary`; printed as a table, in a notebook as HTML."""

    rows: tuple[SummaryRow, ...]

    def parts(self) -> list[str | Table]:
        """The table: a head, the rows, and the totals."""
        head = ["", "layer", "output", "parameters", "recorded"]
        body = [
            [
                row.path,
                row.layer,
                "; ".join(dict.fromkeys(row.outputs)),
                _count(row.parameters, row.frozen) if row.parameters else "",
                bytes_text(row.recorded) if row.recorded else "",
            ]
            for row in self.rows
        ]
        parameters, frozen, recorded = (
            sum(getattr(row, name) for row in self.rows) for name in ("parameters", "frozen", "recorded")
        )
        total = ["total", "", "", _count(parameters, frozen), bytes_text(recorded)]
        return [Table([head, *body, total], "lllrr")]


class _Outputs:
    """A watcher that notes the shapes of every layer's outputs, by the layer's id."""

    def __init__(self) -> None:
        self.shapes: dict[int, list[str]] = defaultdict(list)

    def saw_out(self, layer: Any, out: Any) -> None:
        self.shapes[id(layer)].append(_shapes(out))

    def saw_dout(self, layer: Any, dout: Any) -> None:
        pass

    def saw_grad(self, layer: Any, param: Tensor, grad: Tensor) -> None:
        pass


def summarize(model: Any, inputs: tuple[Any, ...]) -> Summary:
    """Run one forward of a copy, and note what each layer gives and keeps."""
    twin = copy.deepcopy(model)
    outputs = _Outputs()
    for _, layer in twin.named_layers():
        layer._watchers = (outputs,)
    state = torch.get_rng_state()
    with torch.enable_grad():
        twin.forward(*inputs)
    torch.set_rng_state(state)
    recorded = recorded_by_layer(twin)
    counted: set[int] = set()
    rows = []
    for path, layer in twin.named_layers():
        params = [p for _, p in layer._own("parameter") if id(p) not in counted]
        counted |= {id(p) for p in params}
        frozen = sum(p.numel() for p in params if getattr(p, "frozen", False))
        shapes = tuple(outputs.shapes[id(layer)])
        size = sum(p.numel() for p in params)
        rows.append(SummaryRow(path, layer._head(), shapes, size, frozen, recorded[id(layer)]))
    return Summary(tuple(rows))


def _shapes(out: Any) -> str:
    return ", ".join(map(_shapes, out)) if isinstance(out, (tuple, list)) else str(tuple(out.shape))


def _count(parameters: int, frozen: int) -> str:
    mark = "" if not frozen else " frozen" if frozen == parameters else f" ({frozen:,} frozen)"
    return f"{parameters:,}{mark}"
