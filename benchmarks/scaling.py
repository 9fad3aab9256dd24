"""The step of a model that several processes train together: measured in one and two, and on paper for up to 512.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

Measured here, over gloo, one thread a process: the step of names_gpt by its recipe and of an MLP of 8 x 256, eager,
sampling not included, without messages, by TrainStep(process_group=), and by DDP, which is DistributedDataParallel
around to_torch(model, layer_by_layer=True); and all_reduce of messages of several sizes. All processes take turns
together, and the time is that of the slowest. Modelled, by the formulas of scaling_model.py: the same steps in up to
512 processes, and those of a GPT that nobody here has trained. The model begins with the steps without messages in two
processes at once, which share one machine: a process alone may be faster than its line says. Nothing was measured on
a GPU or on several machines.

The defaults of what is stated come from public figures:

- latency 4.7 us: NCCL's own tuning table for a ring (src/graph/tuning.cc, hwLat, protocol Simple) has 3.4 us per hop
  over NVLink and 14 us over a network; a ring over machines of eight GPUs has one hop of eight over the network;
- bandwidth 25 GB/s: a port of InfiniBand HDR, 200 Gb/s, of which a DGX A100 has one per GPU (NVIDIA's data sheet);
- speed 137 TFLOP/s: what Narayanan et al. 2021 (Efficient Large-Scale Language Model Training on GPU Clusters, table 1)
  report per A100 for a GPT of 1.7 billion parameters, 44 % of the 312 TFLOP/s of the data sheet;
- minibatch 512 rows of 1,024 tokens: the half million tokens of Brown et al. 2020 (GPT-3, table 2.1) for 125 million
  parameters; a token costs 6 FLOP per parameter (Kaplan et al. 2020); gradients in bfloat16, 2 bytes each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from scaling_model import (
    ALONE,
    DDP,
    HEAD,
    HERE,
    STATED,
    TOGETHER,
    Link,
    Task,
    beside_measured,
    chart,
    fitted_link,
    line,
    modelled,
    row,
)
from torch import Tensor, nn

from handgrad import SGD, CrossEntropy, Layer, Linear, Sequential, Tanh, TrainStep, to_torch
from handgrad.bench.report import write_json
from handgrad.bench.timing import SECONDS_PER_BLOCK, Times
from handgrad.tables import text_table

SIZES = (1 << 8, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22)  # bytes of the messages
WORLDS = (1, 2)


class Subject(NamedTuple):
    """What is trained: makes a model with its optimizer, and draws a minibatch of so many rows."""

    name: str
    make: Callable[[], tuple[Layer, Callable[[Any], torch.optim.Optimizer]]]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


def names_gpt() -> Subject:
    """The model, data and optimizer of models/names_gpt.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from names_gpt import RECIPE

    from names.data import DATA, Vocabulary, minibatch, read_names

    config, people = RECIPE.defaults, read_names(DATA)
    vocabulary, generator = Vocabulary.of(people), torch.Generator().manual_seed(1)
    split = RECIPE.split(people, vocabulary, config.block_size, torch.device("cpu"))
    return Subject(
        "names_gpt",
        lambda: (RECIPE.build(config, len(vocabulary), generator), lambda ps: RECIPE.optimizer(ps, config.lr)),
        lambda rows: minibatch(split, rows, generator),
        config.batch_size,
    )


def mlp() -> Subject:
    """Eight times Linear(256, 256) and tanh, 256 rows."""
    D = 256
    return Subject(
        "MLP 8 x 256",
        lambda: (Sequential(*(f() for _ in range(8) for f in (lambda: Linear(D, D), Tanh))), lambda ps: SGD(ps, 0.01)),
        lambda rows: (torch.randn(rows, D), torch.randint(D, (rows,))),
        256,
    )


SUBJECTS = (names_gpt, mlp)


def caller(subject: Subject, by: str, rows: int) -> Callable[[], object]:
    """A call that takes one step on so many rows, with a model of its own."""
    torch.manual_seed(0)
    model, optimizer_of = subject.make()
    x, y = subject.draw(rows)
    if by != DDP:
        group = True if by == TOGETHER else None
        train = TrainStep(model, CrossEntropy(), optimizer_of(model.parameters()), process_group=group)
        return lambda: train(x, y)
    module, loss = nn.parallel.DistributedDataParallel(to_torch(model, layer_by_layer=True)), to_torch(CrossEntropy())
    optimizer = optimizer_of(module.parameters())

    def call() -> None:
        optimizer.zero_grad()
        loss(module(x), y).backward()
        optimizer.step()

    return call


def slowest(seconds: float) -> float:
    """The largest of the processes' times."""
    most = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def block(call: Callable[[], object], n: int) -> float:
    """The seconds of n calls in the slowest process, all of which begin together."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(n):
        call()
    return slowest(time.perf_counter() - begun)


def in_turns(calls: dict[Any, Callable[[], object]], seconds: float, rounds: int = 5) -> dict[Any, Times]:
    """Let the calls take turns, in all processes alike; `rounds` rounds at least, then on until the seconds are over.

    As `handgrad.bench.interleave`, whose processes would each decide alone how often to call, and wait for each other.
    """
    loops = {}
    for key, call in calls.items():
        block(call, 2)
        loops[key] = max(1, math.ceil(2 * SECONDS_PER_BLOCK / block(call, 2)))
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    begun, done = time.perf_counter(), 0
    while slowest(float(done < rounds or time.perf_counter() - begun < seconds)):
        for key in list(calls) if done % 2 == 0 else list(calls)[::-1]:
            taken[key].append(block(calls[key], loops[key]) / loops[key])
        done += 1
    return {key: Times([rounds]) for key, rounds in taken.items()}


def contenders(subject: Subject, world: int) -> list[tuple[str, int]]:
    """Who takes turns: whose step, on how many rows."""
    B = subject.batch
    if world == 1:
        return [(by, B) for by in (ALONE, TOGETHER, DDP)]
    alone = [(ALONE, rows) for rows in sorted({B // 4, B // world, B, 2 * B})]
    return [*alone, *((by, rows) for rows in (B // world, B) for by in (TOGETHER, DDP))]


def measure(rank: int, world: int, folder: str, seconds: float, names: Sequence[str]) -> None:
    """What each of the processes runs; the first one writes what was measured."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", f"file://{folder}/store{world}", rank=rank, world_size=world, timeout=limit)
    found: list[dict[str, Any]] = []
    for subject in (make() for make in SUBJECTS if make.__name__ in names):
        calls = {who: caller(subject, *who) for who in contenders(subject, world)}
        for (by, rows), times in in_turns(calls, seconds).items():
            told = {"seconds": times.median(), "spread": times.spread(), "rounds": len(times.rounds())}
            found.append(result("step", task=subject.name, by=by, processes=world, rows=rows, **told))
    if world > 1:
        messages = {size: torch.zeros(size // 4) for size in SIZES}
        sends = {size: lambda message=message: dist.all_reduce(message) for size, message in messages.items()}
        for size, times in in_turns(sends, seconds / 2).items():
            found.append(result("all_reduce", bytes=size, seconds=times.median(), spread=times.spread()))
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def result(what: str, **values: Any) -> dict[str, Any]:
    """What was measured."""
    return {"kind": "measured", "what": what, **values}


def fitted(measured: Sequence[dict[str, Any]], subjects: Sequence[Subject]) -> tuple[Link, list[Task]]:
    """The link and the steps that the model begins with: of the steps, those without communication in two processes."""
    sent = [r for r in measured if r["what"] == "all_reduce"]
    tasks = []
    for subject in subjects:
        alone = [
            r
            for r in measured
            if r["what"] == "step" and (r["task"], r["by"], r["processes"]) == (subject.name, ALONE, WORLDS[-1])
        ]
        params = list(subject.make()[0].parameters())
        line_of = line([r["rows"] for r in alone], [r["seconds"] for r in alone])
        sizes = len(params), sum(p.nbytes for p in params)
        tasks.append(Task(subject.name, *line_of, *sizes, minibatch=subject.batch, rows=subject.batch))
    return fitted_link([r["bytes"] for r in sent], [r["seconds"] for r in sent]), tasks


def gpt(args: argparse.Namespace) -> Task:
    """The stated model. It has twelve layers of twelve tensors, two tables, and the last norm's weight and bias."""
    per_row = 6 * args.parameters * args.tokens / args.speed
    name = f"GPT of {args.parameters / 1e6:.0f} million parameters"
    return Task(name, 0.0, per_row, 12 * 12 + 4, round(2 * args.parameters), args.minibatch, args.rows)


def number(text: str) -> float:
    """An argparse type: a number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def count(text: str) -> int:
    """An argparse type: a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=20.0, help="for each subject and number of processes (default 20)")
    p.add_argument("--only", choices=[make.__name__ for make in SUBJECTS], help="one subject (default: both)")
    p.add_argument("--latency", type=number, default=4.7e-6, help="stated: seconds per hop (default 4.7e-6)")
    p.add_argument("--bandwidth", type=number, default=25e9, help="stated: bytes per second (default 25e9)")
    p.add_argument("--speed", type=number, default=137e12, help="stated: FLOP per second (default 137e12)")
    p.add_argument("--parameters", type=number, default=100e6, help="stated: of the GPT (default 100e6)")
    p.add_argument("--tokens", type=count, default=1024, help="stated: of a row of the GPT (default 1024)")
    p.add_argument("--minibatch", type=count, default=512, help="stated: rows, strong scaling (default 512)")
    p.add_argument("--rows", type=count, default=8, help="stated: rows of a process, weak scaling (default 8)")
    p.add_argument("--overlap", type=share, default=2 / 3, help="beside 0, of DistributedDataParallel (default 2/3)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, and the picture beside it")
    return p


def main() -> None:
    """Measure, fit, work out, print, write."""
    args = parser().parse_args()
    torch.set_num_threads(1)
    makers = [make for make in SUBJECTS if args.only in (None, make.__name__)]
    names, load = [make.__name__ for make in makers], os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in WORLDS:
            torch.multiprocessing.spawn(measure, (world, folder, args.seconds, names), nprocs=world)
            results += json.loads(Path(folder, f"{world}.json").read_text())
    here, tasks = fitted(results, [make() for make in makers])
    stated = Link(args.latency, args.bandwidth)
    for task in tasks:
        line_of = {"fixed": task.fixed, "per_row": task.per_row}
        results.append({"kind": "fitted", "what": "compute", "task": task.name, **line_of})
    for kind, name, link in (("fitted", HERE, here), ("stated", STATED, stated)):
        speed = link.bandwidth if link.bandwidth < math.inf else None
        results.append({"kind": kind, "what": "link", "links": name, "latency": link.latency, "bandwidth": speed})
    model = gpt(args)
    results.append({"kind": "stated", "what": "compute", "task": model.name, "fixed": 0.0, "per_row": model.per_row})
    for task in tasks:
        results += modelled(task, HERE, here, [0.0])
    for task in tasks[:1]:
        results += modelled(task, STATED, stated, [0.0])
    results += modelled(model, STATED, stated, [0.0, args.overlap])
    print(f"{os.cpu_count()} cores, load {load:.1f} before the first measurement")
    print(text_table([HEAD, *map(row, results)], "lllrrrr"))
    print("\nTrainStep in two processes, " + "\n  ".join(["weak and strong:", *beside_measured(results)]))
    if args.json:
        write_json(args.json, results, load=load, flags={k: v for k, v in vars(args).items() if k != "json"})
        chart(args.json.with_suffix(".png"), json.loads(args.json.read_text()))


if __name__ == "__main__":
    main()
