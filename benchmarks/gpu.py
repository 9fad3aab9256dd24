"""Layers, and a step, on a GPU against torch.nn under autograd: ``python benchmarks/gpu.py --json gpu.json``.

Each layer alone, one forward and one backward; and a step of an MLP, TrainStep against autograd and torch.optim.SGD,
eager, in float32 and bfloat16. Before anything is timed the two must agree. The contenders take turns; on a GPU the
time is what lies between two CUDA events around a block of calls, all before them done. Small layers wait there for
Python, which has to ask for each kernel: that is part of their time. Where there is no GPU this says so and ends with
1; `--device cpu` shows that it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import handgrad
from handgrad import SGD, Sequential, TrainStep, twins
from handgrad.bench import interleave, ratio
from handgrad.bench.report import write_json
from handgrad.bench.timing import Contender
from handgrad.tables import seconds_text, text_table
from handgrad.twins import TWINS

LAYERS = "Linear,LayerNorm,GELU,BatchNorm1d,Tanh,SelfAttention,Conv2d,CrossEntropy"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest value; sums are in another order
HEAD = ["", "rows x columns", "dtype", "handgrad", "autograd", "autograd / handgrad"]
DEPTH = 8


def timed_on(device: torch.device, call: Callable[[], object]) -> Contender:
    """A contender of one part: calls one after the other, from when the device is free until the last one is done."""

    def on_gpu(n: int) -> tuple[float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        return (begin.elapsed_time(end) / 1e3,)

    def on_cpu(n: int) -> tuple[float]:
        begun = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - begun,)

    return on_gpu if device.type == "cuda" else on_cpu


def layer_calls(
    name: str, N: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], object]], list[tuple[Tensor, Tensor]]]:
    """Forward and backward of a layer and of its twin; and what both gave, pair by pair."""
    twin = TWINS[name]
    layer, module = twin.layer(D).to(device, dtype), twin.module(D).to(device, dtype)
    module.load_state_dict(layer.state_dict())
    inputs = tuple(t.to(device) for t in twin.inputs(N, D, dtype))
    leaves = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in inputs)
    layer.train(not twin.random)
    module.train(not twin.random)
    out = module(*leaves)
    if not isinstance(out, Tensor):
        raise SystemExit(f"{name}: only layers of one output are timed here")
    dout, params = torch.randn_like(out), list(layer.parameters())
    wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]

    def by_hand() -> Any:
        for p in params:
            p.grad = None
        return layer(*inputs), layer.backward(dout)

    def by_autograd() -> Any:
        out = module(*leaves)
        return out, torch.autograd.grad(out, wanted, dout)

    (ours, dx), (theirs, grads) = by_hand(), by_autograd()
    dxs = [d for d in (dx if isinstance(dx, tuple) else (dx,)) if d is not None]
    pairs = [(ours, theirs.detach()), *zip([*dxs, *(p.grad for p in params)], grads)]
    return {"handgrad": by_hand, "autograd": by_autograd}, pairs


def step_calls(
    N: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Callable[[], object]], list[tuple[Tensor, Tensor]]]:
    """A step of DEPTH x (Linear, LayerNorm, GELU) on both sides; and the parameters of both after one."""

    def build(lib: Any) -> Any:
        return lib.Sequential(
            *(f() for _ in range(DEPTH) for f in (lambda: lib.Linear(D, D), lambda: lib.LayerNorm(D), lib.GELU))
        )

    model: Sequential = build(handgrad).to(device, dtype)
    module = build(twins).to(device, dtype)
    module.load_state_dict(model.state_dict())
    x, y = torch.randn(N, D).to(device, dtype), torch.randint(D, (N,)).to(device)
    train, loss = TrainStep(model, handgrad.CrossEntropy(), SGD(model.parameters(), lr=0.1)), twins.CrossEntropy()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def by_autograd() -> None:
        optimizer.zero_grad()
        loss(module(x), y).backward()
        optimizer.step()

    train(x, y)
    by_autograd()
    pairs = [(ours.clone(), theirs.detach().clone()) for ours, theirs in zip(model.parameters(), module.parameters())]
    return {"handgrad": lambda: train(x, y), "autograd": by_autograd}, pairs


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference, as a share of the largest value of its tensor."""
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs)


def compare(what: str, size: tuple[int, int], dtype: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """One result: both sides agree, and take so long."""
    torch.manual_seed(0)
    where = (*size, DTYPES[dtype], device)
    calls, pairs = step_calls(*where) if what == "step" else layer_calls(what, *where)
    difference = worst(pairs)
    if not difference < TOLERANCE[DTYPES[dtype]]:
        raise SystemExit(f"{what}, {dtype}: handgrad and torch.nn differ by {difference:.1e}")
    times = interleave({by: timed_on(device, call) for by, call in calls.items()}, seconds)
    return {
        "what": what,
        "size": list(size),
        "dtype": dtype,
        "difference": difference,
        "seconds": {by: t.median() for by, t in times.items()},
        "ratio": list(ratio(times["handgrad"].rounds(), times["autograd"].rounds())),
    }


def row(r: dict[str, Any]) -> list[str]:
    """A result as the cells of a table."""
    times = [seconds_text(r["seconds"][by]) for by in ("handgrad", "autograd")]
    value, low, high = r["ratio"]
    return [r["what"], "x".join(map(str, r["size"])), r["dtype"], *times, f"{value:.2f} ({low:.2f} to {high:.2f})"]


def size(text: str) -> tuple[int, int]:
    """An argparse type: rows x columns."""
    try:
        N, D = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected rows x columns, such as 256x512, got {text!r}") from None
    return N, D


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default cuda); cpu to see that it runs")
    p.add_argument("--layers", default=LAYERS, help=f"(default: {LAYERS})")
    p.add_argument("--sizes", type=size, nargs="+", default=[(256, 512), (4096, 1024)], metavar="NxD", help="of each")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="(default: both)")
    p.add_argument("--seconds", type=float, default=2.0, help="for each line of the table (default 2)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    return p


def main() -> int:
    """Measure, print, write."""
    p = parser()
    args = p.parse_args()
    names = args.layers.split(",")
    if unknown := [name for name in names if name not in TWINS]:
        p.error(f"--layers: handgrad has no layer {', '.join(unknown)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu.py: there is no CUDA device here; --device cpu shows that the script runs", file=sys.stderr)
        return 1
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream the events are recorded on
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"{name}, torch {torch.__version__}, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}")
    cases = [(what, n_d, dtype) for what in (*names, "step") for n_d in args.sizes for dtype in args.dtypes]
    results = []
    for what, n_d, dtype in cases:
        if what == "step" or TWINS[what].fits(*n_d):
            results.append(compare(what, n_d, dtype, device, args.seconds))
    print(text_table([HEAD, *map(row, results)], "lllrrr"))
    if args.json:
        write_json(args.json, results, device=name, cuda=torch.version.cuda)
    return 0


if __name__ == "__main__":
    sys.exit(main())
