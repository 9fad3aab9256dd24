"""Run a function in several processes that are one group of torch.distributed, and get what each returns."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def together(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60, limit: float = 300
) -> list[Any]:
    """What `function(rank, world, *args)` returns in each process; a process's error comes as its text.

    Messages wait for `timeout` seconds, all together for `limit`. A process that ended in another way returns None.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, context = Path(name), multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_run, args=(rank, world, folder, timeout, function, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + limit
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hanging:
            processes[rank].kill()
            processes[rank].join()
        assert not hanging, f"processes {hanging} hang"
        files = [folder / f"{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def results(world: int, function: Callable[..., Any], *args: Any, **limits: float) -> list[Any]:
    """The same, where nothing may fail."""
    found = together(world, function, *args, **limits)
    for result in found:
        assert not isinstance(result, str), result
        assert result is not None, "a process has ended"
    return found


def _run(rank: int, world: int, folder: Path, timeout: float, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        result = function(rank, world, *args)
    except Exception as error:
        result = f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"
    torch.save(result, folder / f"{rank}.part")
    (folder / f"{rank}.part").rename(folder / f"{rank}.pt")
    dist.destroy_process_group()
