"""Peak memory of the training step of a deep and wide MLP: handgrad's TrainStep against torch.nn under autograd.

    python benchmarks/memory.py

Each contender runs in a process of its own; what counts is how far its resident memory rises above what it was when
model, optimizer and data were there, at the highest moment of five steps. Beside it, what fresh memory costs: the page
faults and the time of a step, without and with `handgrad.keep_freed_memory()`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import handgrad as hg
from handgrad.bench import environment, peak_bytes
from handgrad.bench.report import write_json
from handgrad.tables import bytes_text, seconds_text, text_table

DEPTH, WIDTH, BATCH, CLASSES, STEPS = 12, 1024, 4096, 27, 5
CONTENDERS = ("handgrad, eager", "handgrad, compiled", "torch.nn, autograd, SGD")
KEPT = ", freed memory kept"
KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}  # keep_freed_memory's settings


HEAD = ["contender", "resident memory rises by", "tensors at the most", "page faults a step", "fastest step"]


def row(r: dict[str, Any]) -> list[str]:
    """A result as the cells of a table."""
    sizes = [bytes_text(r["resident_rise"]), bytes_text(r["tensor_peak"])]
    return [r["contender"], *sizes, f"{r['page_faults']:,}", seconds_text(r["seconds"])]


def resident(mark: str) -> int:
    """The bytes that this process has in memory: VmRSS now, VmHWM at the most. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(mark))


def one(name: str) -> None:
    """Measure one contender in this process; print the result as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    if name.startswith("handgrad"):
        if KEPT in name:
            hg.keep_freed_memory()
        hidden = [
            f() for _ in range(DEPTH) for f in (lambda: hg.Linear(WIDTH, WIDTH), lambda: hg.BatchNorm1d(WIDTH), hg.Tanh)
        ]
        model = hg.Sequential(*hidden, hg.Linear(WIDTH, CLASSES))
        step = hg.TrainStep(model, hg.CrossEntropy(), hg.SGD(model.parameters(), lr=0.1))
        if "compiled" in name:
            step = step.compile()

        def run() -> None:
            step(x, y)
    else:
        parts = [
            f() for _ in range(DEPTH) for f in (lambda: nn.Linear(WIDTH, WIDTH), lambda: nn.BatchNorm1d(WIDTH), nn.Tanh)
        ]
        module = nn.Sequential(*parts, nn.Linear(WIDTH, CLASSES))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

        def run() -> None:
            loss = F.cross_entropy(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if "compiled" in name:
        run()  # compiling has a peak of its own
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    for _ in range(STEPS):
        run()
    rise = resident("VmHWM") - before
    faults, times = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(STEPS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    result = {"contender": name, "resident_rise": rise, "page_faults": faults // STEPS, "seconds": min(times)}
    print(json.dumps({**result, "tensor_peak": None if "compiled" in name else peak_bytes(run)}))


def main() -> None:
    """Measure everybody, each in a fresh process."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    if args.one:
        one(args.one)
        return
    print(
        f"{environment()['machine']}: {DEPTH} x (Linear, BatchNorm1d, Tanh), width {WIDTH}, batch {BATCH}", flush=True
    )
    results = []
    for name in (*CONTENDERS, *(name + KEPT for name in CONTENDERS)):
        command = [sys.executable, __file__, "--one", name]
        env = {**os.environ, **(KEEPING if name == CONTENDERS[-1] + KEPT else {})}
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
        results.append({**json.loads(out.stdout.splitlines()[-1]), "contender": name})
    print(text_table([HEAD, *(row(r) for r in results)], "lrrrr"))
    if args.json:
        write_json(args.json, results, depth=DEPTH, width=WIDTH, batch=BATCH)


if __name__ == "__main__":
    main()
