"""How the process handles memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys


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
