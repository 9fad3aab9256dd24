"""What a forward keeps for its backward, and how much memory the two need at the most."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from handgrad.layer import Layer
from handgrad.records import fresh_bytes, tensors_in


def recorded_bytes(model: Layer) -> int:
    """The bytes that the forwards waiting for their backward hold; `model.records()` says which layers do."""
    return model.records().bytes


def saved_bytes(forward: Callable[[], Any], apart: Iterable[Tensor]) -> int:
    """The bytes that autograd saves in `forward`: each memory once, that of the tensors `apart` not counted."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    counted: set[int] = set()
    fresh_bytes(apart, counted)
    total = fresh_bytes(saved, counted)
    del out
    return total


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors made within `run` held at one moment, as seen between any two operations.

    What a kernel takes for itself meanwhile is not seen.
    """
    watch = _Watch()
    with watch:
        run()
    return watch.peak


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow every memory from the operation that makes it until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in tensors_in(out):
            storage = t.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in given and address not in self.known:
                self.known.add(address)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, address, size)
        return out

    def _freed(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size
