"""What forwards have left for their backwards: which layer holds how many bytes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.tables import Shown, Table, bytes_text


@dataclass(frozen=True)
class RecordsRow:
    """One layer: its path ("" for the model itself), its text, how many of its forwards wait, what they hold.

    `dtypes` are those of the recorded tensors. `bytes` are those of the memory that no layer above records, too.
    """

    path: str
    layer: str
    forwards: int
    dtypes: tuple[torch.dtype, ...]
    bytes: int


@dataclass(frozen=True, repr=False)
class Records(Shown):
    """What `Layer.records` returns; printed as a table, in a notebook as HTML."""

    rows: tuple[RecordsRow, ...]

    @property
    def forwards(self) -> int:
        """How many forwards wait, of all layers together."""
        return sum(row.forwards for row in self.rows)

    @property
    def bytes(self) -> int:
        """What they hold, of all layers together."""
        return sum(row.bytes for row in self.rows)

    def parts(self) -> list[str | Table]:
        """The table, or that there is nothing."""
        if not self.rows:
            return ["no forward waits for its backward"]
        head = ["", "layer", "forwards", "dtypes", "recorded"]
        body = [
            [
                row.path,
                row.layer,
                f"{row.forwards:,}",
                ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes),
                bytes_text(row.bytes) if row.bytes else "",
            ]
            for row in self.rows
        ]
        return [Table([head, *body, ["total", "", f"{self.forwards:,}", "", bytes_text(self.bytes)]], "llrlr")]


def records_of(model: Any) -> Records:
    """One row for each layer that has forwards waiting, in the order of the layers."""
    recorded = recorded_by_layer(model)
    rows = []
    for path, layer in model.named_layers():
        if layer._records:
            dtypes = tuple(dict.fromkeys(t.dtype for t in _recorded_in(layer)))
            rows.append(RecordsRow(path, layer._head(), len(layer._records), dtypes, recorded[id(layer)]))
    return Records(tuple(rows))


def recorded_by_layer(*models: Any) -> dict[int, int]:
    """The bytes that the records of each layer hold, by the layer's id.

    Each memory counts once, in the layer that is first. Parameters and buffers do not count.
    """
    counted: set[int] = set()
    fresh_bytes((t for model in models for _, t in model._tensors("")), counted)
    layers = (layer for model in models for _, layer in model.named_layers())
    return {id(layer): fresh_bytes(_recorded_in(layer), counted) for layer in layers}


def _recorded_in(layer: Any) -> Iterator[Tensor]:
    return tensors_in([record[0] for record in layer._records])


def fresh_bytes(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """The bytes of the memory that the tensors lie in, without that at the addresses `counted`, where it then is, too.

    >>> x, counted = torch.zeros(2, 3), set()
    >>> fresh_bytes([x, x.t(), x[0]], counted), fresh_bytes([x], counted)
    (24, 0)
    """
    total = 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value: itself, or those in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
