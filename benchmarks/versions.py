"""Two versions of handgrad in one process, taking turns: what a change did to the speed of layers and of whole steps.

``git worktree add ../before COMMIT; python benchmarks/versions.py --before ../before`` prints a table and, with --json,
writes it. A ratio above 1 says that the present version is the faster one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from handgrad.bench.environment import environment

HERE = Path(__file__).resolve().parent.parent
ROUND = 2e-3  # seconds, or one call
SIZES = ((32, 64), (256, 512), (4096, 1024))
Run = Callable[[], Any]


def load(root: Path) -> ModuleType:
    """The handgrad of a source tree, beside any other: its modules keep what they imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "handgrad"]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    try:
        return importlib.import_module("handgrad")
    finally:
        sys.path.remove(str(root))


def x_of(*shape: int) -> Tensor:
    """The same numbers for every version."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def labels(shape: tuple[int, ...], below: int) -> Tensor:
    """The same labels for every version."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(2))


def sequence(hg: ModuleType, kind: str, D: int, H: int) -> Any:
    """A recurrent layer over (N, T, D), by whatever means the version has."""
    return (
        getattr(hg, kind)(D, H, batch_first=True) if hasattr(hg, kind) else hg.Unroll(getattr(hg, f"{kind}Cell")(D, H))
    )


LAYERS: dict[str, Callable[[ModuleType, int, int], tuple[Any, tuple[Any, ...]]]] = {
    "Linear": lambda hg, N, D: (hg.Linear(D, D), (x_of(N, D),)),
    "BatchNorm1d": lambda hg, N, D: (hg.BatchNorm1d(D), (x_of(N, D),)),
    "Tanh": lambda hg, N, D: (hg.Tanh(), (x_of(N, D),)),
    "CrossEntropy": lambda hg, N, D: (hg.CrossEntropy(), (x_of(N, D), labels((N,), D))),
    "Embedding": lambda hg, N, D: (hg.Embedding(D, D), (labels((N,), D),)),
    "Flatten": lambda hg, N, D: (hg.Flatten(), (x_of(N, 4, D // 4),)),
    "Sigmoid": lambda hg, N, D: (hg.Sigmoid(), (x_of(N, D),)),
    "ReLU": lambda hg, N, D: (hg.ReLU(), (x_of(N, D),)),
    "LeakyReLU": lambda hg, N, D: (hg.LeakyReLU(), (x_of(N, D),)),
    "SiLU": lambda hg, N, D: (hg.SiLU(), (x_of(N, D),)),
    "GELU": lambda hg, N, D: (hg.GELU(), (x_of(N, D),)),
    "GELU tanh": lambda hg, N, D: (hg.GELU("tanh"), (x_of(N, D),)),
    "Softmax": lambda hg, N, D: (hg.Softmax(-1), (x_of(N, D),)),
    "LogSoftmax": lambda hg, N, D: (hg.LogSoftmax(-1), (x_of(N, D),)),
    "LayerNorm": lambda hg, N, D: (hg.LayerNorm(D), (x_of(N, D),)),
    "RMSNorm": lambda hg, N, D: (hg.RMSNorm(D), (x_of(N, D),)),
    "SelfAttention": lambda hg, N, D: (hg.SelfAttention(D, 4), (x_of(N // 16, 16, D),)),
    "RNNCell": lambda hg, N, D: (hg.RNNCell(D, D), (x_of(N, D), x_of(N, D))),
    "GRUCell": lambda hg, N, D: (hg.GRUCell(D, D), (x_of(N, D), x_of(N, D))),
    "LSTMCell": lambda hg, N, D: (hg.LSTMCell(D, D), (x_of(N, D), (x_of(N, D), x_of(N, D)))),
    "RNN": lambda hg, N, D: (sequence(hg, "RNN", D, D), (x_of(N // 16, 16, D),)),
    "GRU": lambda hg, N, D: (sequence(hg, "GRU", D, D), (x_of(N // 16, 16, D),)),
    "LSTM": lambda hg, N, D: (sequence(hg, "LSTM", D, D), (x_of(N // 16, 16, D),)),
    "MSE": lambda hg, N, D: (hg.MSE(), (x_of(N, D), x_of(N, D))),
    "BCEWithLogits": lambda hg, N, D: (hg.BCEWithLogits(), (x_of(N, D), x_of(N, D).sigmoid())),
    "LinearCrossEntropy": lambda hg, N, D: (hg.LinearCrossEntropy(D, D), (x_of(N, D), labels((N,), D))),
    "Residual": lambda hg, N, D: (hg.Residual(hg.Sequential(hg.Linear(D, D), hg.Tanh())), (x_of(N, D),)),
}
OVER_TIME = ("SelfAttention", "RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "LSTM")  # seconds each at the largest
CORE = ("Linear", "BatchNorm1d", "Tanh", "CrossEntropy", "Embedding", "Flatten")


def layer_run(hg: ModuleType, name: str, N: int, D: int) -> Run:
    """Forward and backward of one layer."""
    layer, inputs = LAYERS[name](hg, N, D)
    out = layer(*inputs)
    dout = tuple(map(torch.randn_like, out)) if isinstance(out, tuple) else torch.randn_like(out)
    given = () if isinstance(layer, hg.Loss) else (dout,)
    layer.drop_records()
    params = list(layer.parameters())

    def run() -> None:
        layer.forward(*inputs)
        layer.backward(*given)
        for p in params:
            p.grad = None

    return run


def mlp(hg: ModuleType, hidden: int = 64, batch: int = 32) -> tuple[Any, Any, Tensor, Tensor]:
    """The names MLP."""
    model = hg.Sequential(
        hg.Embedding(27, 10),
        hg.Flatten(),
        hg.Linear(30, hidden),
        hg.BatchNorm1d(hidden),
        hg.Tanh(),
        hg.Linear(hidden, 27),
    )
    return model, hg.SGD(model.parameters(), lr=0.01), labels((batch, 3), 27), labels((batch,), 27)


def wavenet(hg: ModuleType) -> tuple[Any, Any, Tensor, Tensor]:
    """The names WaveNet."""
    layers, width = [hg.Embedding(27, 24)], 24
    for _ in range(3):
        layers += [
            hg.FlattenConsecutive(2),
            hg.Linear(2 * width, 128, bias=False),
            hg.BatchNorm1d(128, channels_last=True),
            hg.Tanh(),
        ]
        width = 128
    model = hg.Sequential(*layers, hg.Linear(128, 27))
    return model, hg.SGD(model.parameters(), lr=0.01), labels((32, 8), 27), labels((32,), 27)


def gru(hg: ModuleType) -> tuple[Any, Any, Tensor, Tensor]:
    """The names GRU."""
    model = hg.Sequential(hg.Embedding(27, 32), sequence(hg, "GRU", 32, 128), hg.Flatten(0, 1), hg.Linear(128, 27))
    return model, hg.SGD(model.parameters(), lr=0.01), labels((32, 16), 27), labels((512,), 27)


def gpt(hg: ModuleType) -> tuple[Any, Any, Tensor, Tensor]:
    """The names GPT, without its positions, which are no public layer."""
    blocks = []
    for _ in range(3):
        blocks.append(
            hg.Residual(hg.Sequential(hg.LayerNorm(64), hg.SelfAttention(64, 4, causal=True), hg.Dropout(0.1)))
        )
        perceptron = (hg.LayerNorm(64), hg.Linear(64, 256), hg.GELU("tanh"), hg.Linear(256, 64), hg.Dropout(0.1))
        blocks.append(hg.Residual(hg.Sequential(*perceptron)))
    model = hg.Sequential(hg.Embedding(27, 64), *blocks, hg.LayerNorm(64), hg.Flatten(0, 1), hg.Linear(64, 27))
    return model, hg.SGD(model.parameters(), lr=0.01), labels((32, 16), 27), labels((512,), 27)


def deep(hg: ModuleType) -> tuple[Any, Any, Tensor, Tensor]:
    """Sixteen narrow blocks."""
    blocks = [layer for _ in range(16) for layer in (hg.Linear(64, 64), hg.BatchNorm1d(64), hg.Tanh())]
    model = hg.Sequential(*blocks)
    return model, hg.SGD(model.parameters(), lr=0.01), x_of(32, 64), labels((32,), 64)


STEPS: dict[str, Callable[[ModuleType], tuple[Any, Any, Tensor, Tensor]]] = {
    "names MLP": mlp,
    "names WaveNet": wavenet,
    "names GRU": gru,
    "names GPT": gpt,
    "16 x (Linear, BatchNorm1d, Tanh)": deep,
    "names MLP, 1024 x 1024": lambda hg: mlp(hg, 1024, 1024),
}


def step_run(hg: ModuleType, name: str) -> Run:
    """A TrainStep, on the same weights in every version."""
    torch.manual_seed(0)
    model, optimizer, x, y = STEPS[name](hg)
    step = hg.TrainStep(model, hg.CrossEntropy(), optimizer)
    return lambda: step(x, y)


def loop_run(hg: ModuleType) -> Run:
    """The loop that the README shows, on the names MLP."""
    model, optimizer, x, y = mlp(hg)
    loss = hg.CrossEntropy()

    def run() -> None:
        loss(model(x), y)
        optimizer.zero_grad()
        model.backward(loss.backward())
        optimizer.step()

    return run


def compare(before: Run, after: Run, seconds: float) -> dict[str, float]:
    """Medians of rounds taken in turns, in microseconds, and the median of the rounds' ratios.

    A round is short, so that whatever else the machine does slows both down alike.
    """
    for run in (before, after):
        for _ in range(3):
            run()
    t0 = time.perf_counter()
    before()
    once = time.perf_counter() - t0
    count = max(1, int(ROUND / max(once, 1e-7)))
    rounds = max(11, int(seconds / (2 * count * once)))
    times: list[list[float]] = [[], []]
    for k in range(rounds):
        for which in (0, 1) if k % 2 else (1, 0):
            run = (before, after)[which]
            t0 = time.perf_counter()
            for _ in range(count):
                run()
            times[which].append((time.perf_counter() - t0) / count * 1e6)
    ratios = [b / a for b, a in zip(*times)]
    return {
        "before": statistics.median(times[0]),
        "after": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="TREE", help="a checkout of the earlier version")
    parser.add_argument("--only", default="", metavar="A,B", help="rows whose names contain one of these")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row (default 1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--keep-memory", action="store_true", help="leave out what fresh memory costs, for both")
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = environment()
    old, new = load(given.before.resolve()), load(HERE)
    if given.keep_memory:
        new.keep_freed_memory()
    wanted = [part for part in given.only.split(",") if part]
    found: dict[str, dict[str, float]] = {}
    jobs: list[tuple[str, Callable[[ModuleType], Run]]] = [
        (f"{name} {N}x{D}", lambda hg, name=name, N=N, D=D: layer_run(hg, name, N, D))
        for name in LAYERS
        for N, D in (SIZES[:2] if name in OVER_TIME else SIZES)
    ]
    jobs += [(f"step: {name}", lambda hg, name=name: step_run(hg, name)) for name in STEPS]
    jobs.append(("the README's loop", loop_run))
    jobs = [job for job in jobs if not wanted or any(part in job[0] for part in wanted)]
    print(f"{'':<40}{'before':>12}{'after':>12}{'before/after':>14}")
    for name, make in tqdm(jobs, disable=None, leave=False):
        found[name] = compare(make(old), make(new), given.seconds)
        row = found[name]
        tqdm.write(f"{name:<40}{row['before']:>9.1f} us{row['after']:>9.1f} us{row['ratio']:>14.2f}")
    summary = {
        "six core layers": [r["ratio"] for n, r in found.items() if n.split(" ")[0] in CORE and "step" not in n],
        "names models": [r["ratio"] for n, r in found.items() if n.startswith("step: names") and "1024" not in n],
        "all": [r["ratio"] for r in found.values()],
    }
    means = {name: math.exp(statistics.mean(map(math.log, ratios))) for name, ratios in summary.items() if ratios}
    for name, mean in means.items():
        print(f"geometric mean, {name}: {mean:.3f}")
    if given.json:
        result = {"environment": where, "rows": found, "geometric_means": means}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
