"""How the process handles memory: freed blocks that it keeps, tensors whose bytes are put back."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory in the process, for good; whether it will.

    A training step frees what the next one needs again. The C library gives large blocks back to the system, and each
    new one comes in fresh pages, whose first use costs more than the arithmetic on them. After this call it keeps them,
    as torch does on a GPU. Nothing is shared that way: each result is a new tensor. It concerns the whole process, so
    it is yours to call, once, before a large model is trained; small tensors do not need it.

    Without effect, and False, where the C library is not glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        option = ctypes.CDLL(None).mallopt
        return bool(option(mmap_threshold, 1 << 30) and option(trim_threshold, -1))  # blocks up to 1 GB; never trim
    return False


class Snapshot:
    """Tensors, and their values as they were when last taken, to be put back after something failed.

    It is taken before every step, so it must cost a small one next to nothing: what lies in one piece on the CPU is
    copied as bytes, which takes a tenth of the time of an operation of torch.

    >>> import torch
    >>> x = torch.ones(2)
    >>> snapshot = Snapshot([x])
    >>> snapshot.take()
    >>> _ = x.fill_(7)
    >>> snapshot.put_back()
    >>> x
    tensor([1., 1.])
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._with_memory = [t for t in self.tensors if type(t) is Tensor]  # a fake one has none
        self._addresses: list[int] = []
        self._memory: list[Any] = []  # of each on the CPU: its bytes
        self._storages: list[Any] = []  # which keep them alive
        self._others: list[Tensor] = []
        self._bytes: list[bytes] = []
        self._copies: list[Tensor] = []

    def __reduce__(self) -> Any:
        """Copies and pickles are of the copied tensors, with nothing taken yet."""
        return Snapshot, (self.tensors,)

    def take(self) -> None:
        """Note the values as they are now."""
        addresses = list(map(Tensor.data_ptr, self._with_memory))
        if addresses != self._addresses or not addresses:  # the first time, or the model was converted or moved
            self._find(addresses)
        self._bytes = [memory.raw for memory in self._memory]
        if self._others:
            self._copies = [t.clone() for t in self._others]

    def put_back(self) -> None:
        """Give the tensors the values that they had."""
        for memory, old in zip(self._memory, self._bytes):
            memory.raw = old
        for tensor, copy in zip(self._others, self._copies):
            tensor.copy_(copy)

    def _find(self, addresses: list[int]) -> None:
        plain = [t for t in self._with_memory if t.device.type == "cpu" and t.is_contiguous()]
        self._memory = [(ctypes.c_char * t.nbytes).from_address(t.data_ptr()) for t in plain]
        self._storages = [t.untyped_storage() for t in plain]
        self._others = [t for t in self.tensors if not any(t is p for p in plain)]
        self._addresses = addresses
