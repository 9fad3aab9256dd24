"""Peak memory of a training step: handgrad's TrainStep against torch.nn under autograd.

python benchmarks/memory.py           a deep and wide MLP, and what fresh memory costs
python benchmarks/memory.py --deep    deep models, without and with Recompute and release_gradients

Each contender runs in a process of its own; what counts is how far its resident memory rises above what it was when
model, optimizer and data were there, at the highest moment of five steps. Beside it, of the MLP, what fresh memory
costs: the page faults and the time of a step, without and with `handgrad.keep_freed_memory()`. Of the deep models, the
most bytes that tensors have at one moment, beside the bare minimum of a step that keeps everything: parameters,
gradients, the optimizer's state and what backward needs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

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

TASKS = {
    "mlp64": "16 x (Linear(512, 512), Tanh), 64 rows, SGD",
    "mlp1024": "16 x (Linear(512, 512), Tanh), 1,024 rows, SGD",
    "gpt": "the GPT of the names with 12 blocks, 256 sequences of 16, AdamW",
}
SEGMENTS = (5, 4, 3, 2, 1, 1)  # of the MLP's 16 pairs: shorter where the inputs of more segments are there
BLOCKS = 12
DEEP_CONTENDERS = (
    "handgrad",
    "handgrad, release_gradients",
    "handgrad, Recompute",
    "handgrad, Recompute and release_gradients",
    "torch.nn, autograd",
    "torch.nn, checkpoint",
    "torch.nn, checkpoint, update in hooks",
)

HEAD = ["contender", "resident memory rises by", "tensors at the most", "page faults a step", "fastest step"]


DEEP_HEAD = ["contender", "tensors at the most", "made in the step", "resident memory rises by", "fastest step"]


def deep_rows(results: list[dict[str, Any]], task: str) -> list[list[str]]:
    """The results of one of the deep models as the cells of a table, and the bare minimum."""
    found = [r for r in results if r["task"] == task]
    rows = [
        [
            r["contender"],
            *(bytes_text(n) for n in (r["held"] + r["tensor_peak"], r["tensor_peak"], r["resident_rise"])),
            seconds_text(r["seconds"]),
        ]
        for r in found
    ]
    plain = found[0]
    return [*rows, ["the bare minimum", bytes_text(plain["held"] + plain["bare"]), bytes_text(plain["bare"]), "", ""]]


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


class Checkpoint(nn.Module):
    """torch.utils.checkpoint as a module."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


def deep_model(task: str, lib: Any, segment: Callable[..., Any]) -> tuple[Any, Tensor, Tensor]:
    """The model from handgrad or torch.nn, its segments made by `segment`; x and targets."""
    if task != "gpt":
        rows = int(task.removeprefix("mlp"))
        pairs = iter([(lib.Linear(512, 512), lib.Tanh()) for _ in range(sum(SEGMENTS))])
        segments = [[layer for _ in range(count) for layer in next(pairs)] for count in SEGMENTS]
        return lib.Sequential(*(segment(*s) for s in segments)), torch.randn(rows, 512), torch.randn(rows, 512)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
    import names_gpt
    import names_twins

    names_gpt.BLOCKS = BLOCKS
    config = replace(names_gpt.DEFAULTS, tied=True)
    if lib is hg:
        layers = list(names_gpt.build(config, CLASSES, torch.Generator().manual_seed(0)))
    else:
        layers = list(names_twins.gpt(config, CLASSES))
    blocks = [segment(*layers[i : i + 2]) for i in range(2, 2 + 2 * BLOCKS, 2)]
    x, y = torch.randint(CLASSES, (256, config.block_size)), torch.randint(CLASSES, (256 * config.block_size,))
    return lib.Sequential(*layers[:2], *blocks, *layers[2 + 2 * BLOCKS :]), x, y


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of all."""
    return sum(t.nbytes for t in tensors)


def deep_step(task: str, name: str) -> tuple[list[Tensor], Callable[[], Any], Callable[[], dict[str, int]]]:
    """The parameters of a deep model, what does a step, and what then tells the bytes it has to hold."""
    optimizer_of = torch.optim.AdamW if task == "gpt" else hg.SGD
    if name.startswith("handgrad"):
        wrap = hg.Recompute if "Recompute" in name else (lambda body: body)
        model, x, y = deep_model(task, hg, lambda *body: wrap(hg.Sequential(*body)))
        loss = hg.CrossEntropy() if task == "gpt" else hg.MSE()
        optimizers = [optimizer_of(model.parameters(), lr=0.01)]
        run = hg.TrainStep(model, loss, optimizers[0], release_gradients="release" in name)
        params = list(model.parameters())

        def step() -> None:
            run(x, y)

        def recorded() -> int:
            loss(model(x), y)
            found = model.records().bytes + loss.records().bytes
            model.drop_records()
            loss.drop_records()
            return found

    else:
        model, x, y = deep_model(task, nn, Checkpoint if "checkpoint" in name else nn.Sequential)
        loss_of = F.cross_entropy if task == "gpt" else F.mse_loss
        params = list(model.parameters())
        optimizers = (
            [optimizer_of([p], lr=0.01) for p in params] if "hooks" in name else [optimizer_of(params, lr=0.01)]
        )
        own = dict(zip(params, optimizers))

        def update(p: Tensor) -> None:
            own[p].step()
            own[p].zero_grad()

        for p in params if "hooks" in name else ():
            p.register_post_accumulate_grad_hook(update)

        def step() -> None:
            if "hooks" in name:
                loss_of(model(x), y).backward()
            else:
                optimizers[0].zero_grad()
                loss_of(model(x), y).backward()
                optimizers[0].step()

        def recorded() -> int:
            return 0

    def held() -> dict[str, int]:
        state = [t for opt in optimizers for own in opt.state.values() for t in own.values() if isinstance(t, Tensor)]
        return {"held": bytes_of(params) + bytes_of(state), "bare": bytes_of(params) + recorded()}

    return params, step, held


def one_deep(task: str, name: str) -> None:
    """Measure one contender of a deep model in this process; print the result as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    params, step, held = deep_step(task, name)
    step()  # makes the optimizer's state
    for p in params:
        p.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    times = []
    for _ in range(4 * STEPS):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    result = {"task": task, "contender": name, "resident_rise": resident("VmHWM") - before, "seconds": min(times)}
    for p in params:
        p.grad = None
    peak = peak_bytes(lambda: (step(), step()))  # gradients of the first may still be there in the second
    print(json.dumps({**result, **held(), "tensor_peak": peak}))


def measured(*arguments: str, **environment: str) -> dict[str, Any]:
    """What this script finds in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    env = {**os.environ, **environment}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def deep() -> list[dict[str, Any]]:
    """Measure everybody on the deep models."""
    results = []
    for task, title in TASKS.items():
        print(f"{environment()['machine']}: {title}", flush=True)
        found = [measured("--deep", "--one", name, "--task", task) for name in DEEP_CONTENDERS]
        print(text_table([DEEP_HEAD, *deep_rows(found, task)], "lrrrr"), flush=True)
        results += found
    return results


def main() -> None:
    """Measure everybody, each in a fresh process."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--one", help=argparse.SUPPRESS)
    p.add_argument("--task", help=argparse.SUPPRESS)
    p.add_argument("--deep", action="store_true", help="the deep models, with what saves memory")
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    if args.one:
        one_deep(args.task, args.one) if args.deep else one(args.one)
        return
    if args.deep:
        results = deep()
        if args.json:
            write_json(args.json, results, tasks=TASKS)
        return
    print(
        f"{environment()['machine']}: {DEPTH} x (Linear, BatchNorm1d, Tanh), width {WIDTH}, batch {BATCH}", flush=True
    )
    results = []
    for name in (*CONTENDERS, *(name + KEPT for name in CONTENDERS)):
        environ = KEEPING if name == CONTENDERS[-1] + KEPT else {}
        results.append({**measured("--one", name, **environ), "contender": name})
    print(text_table([HEAD, *(row(r) for r in results)], "lrrrr"))
    if args.json:
        write_json(args.json, results, depth=DEPTH, width=WIDTH, batch=BATCH)


if __name__ == "__main__":
    main()
