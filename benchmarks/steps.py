"""What the benchmarks of a whole training step share: contenders for any model, the turns, the first result, the table.

Every contender starts from the same weights. Before any is timed, it takes the same steps on the same minibatches, and
its weights must be those of handgrad's TrainStep. Then they take turns, and ratios are medians over the turns.
Sampling the minibatch is part of a step.

The first result is timed from making the contender until its first call is done, in new processes, the libraries
imported. What compiles does it three times, by what the caches hold: nothing (empty); what torch makes once a machine,
its probes of the processor and its precompiled header (cold); and all that the cold process has left (warm).
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

import handgrad as hg
from handgrad import twins
from handgrad.bench import environment, interleave, ratio
from handgrad.bench.report import new_figure, write_json
from handgrad.bench.timing import timed
from handgrad.tables import seconds_text, text_table

EPS, MOMENTUM = 1e-5, 0.1
FIRST = ("empty", "cold", "warm")  # the states of the caches
PROBES = "from torch._inductor.cpu_vec_isa import pick_vec_isa; pick_vec_isa()"

Weights = dict[str, np.ndarray]


@dataclass
class Task:
    """The model, the data and the weights to begin with."""

    title: str
    build: Callable[[Any], Any]  # the model, of the layers in `handgrad` or in `handgrad.twins`, which are torch.nn's
    formula: Callable[[Any, Any], tuple[Any, list[Any]]]  # for JAX: of weights and x, logits and norms' (mean, var)
    norms: Sequence[str]  # the places of the norms, in the formula's order
    x: np.ndarray
    y: np.ndarray
    weights: Weights
    batch: int
    lr: float

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The data as torch wants it."""
        return torch.from_numpy(self.x), torch.from_numpy(self.y)

    def model(self, lib: Any) -> Any:
        """The model with the task's weights."""
        model = self.build(lib)
        model.load_state_dict({k: torch.from_numpy(v) for k, v in self.weights.items()}, strict=False)
        return model


@dataclass
class Contender:
    """`follow(rows)` takes a step for each line of rows and returns the weights; `run()` draws its own minibatches."""

    follow: Callable[[np.ndarray], Weights]
    run: Callable[[], Any]
    steps: int = 1  # in one run()
    clock: Callable[[int], tuple[float]] | None = None  # the seconds of n runs, for a program that times itself


@dataclass
class Row:
    """A contender by name, made when it is its turn."""

    name: str
    make: Callable[[], Contender]
    compiles: bool = False
    needs: str = "torch"  # the library, imported before any clock runs
    program: str = ""  # that must be installed


def drawing(task: Task, step: Callable[[Tensor, Tensor], Any], many: int = 1) -> Callable[[], Any]:
    """One call of a step, or of a step that takes many minibatches at once, on rows drawn for it."""
    (x, y), generator = task.tensors(), torch.Generator().manual_seed(0)
    shape, size = (task.batch,) if many == 1 else (many, task.batch), len(x)

    def run() -> None:
        rows = torch.randint(size, shape, generator=generator)
        step(x[rows], y[rows])

    return run


def following(task: Task, step: Callable[[Tensor, Tensor], Any], weights: Callable[[], Any]) -> Any:
    """Steps on given rows, and the weights after them."""
    x, y = task.tensors()

    def follow(rows: np.ndarray) -> Weights:
        for row in torch.from_numpy(rows):
            step(x[row], y[row])
        return {name: p.detach().numpy().copy() for name, p in weights()}

    return follow


def handgrad_loop(task: Task) -> Contender:
    """The loop that the README shows."""
    model, loss = task.model(hg), hg.CrossEntropy()
    optimizer = hg.SGD(model.parameters(), lr=task.lr)

    def step(xb: Tensor, yb: Tensor) -> None:
        loss(model(xb), yb)
        optimizer.zero_grad()
        model.backward(loss.backward())
        optimizer.step()

    return Contender(following(task, step, model.named_parameters), drawing(task, step))


def train_step(task: Task, compiled: bool = False, many: int = 1) -> Contender:
    """Handgrad's TrainStep: eager or compiled, one step a call or many."""
    model = task.model(hg)
    step = hg.TrainStep(model, hg.CrossEntropy(), hg.SGD(model.parameters(), lr=task.lr))
    step = step.compile() if compiled else step
    if many == 1:
        return Contender(following(task, step, model.named_parameters), drawing(task, step))
    x, y = task.tensors()

    def follow(rows: np.ndarray) -> Weights:
        step.many(x[torch.from_numpy(rows)], y[torch.from_numpy(rows)])
        return {name: p.numpy().copy() for name, p in model.named_parameters()}

    return Contender(follow, drawing(task, step.many, many), many)


def export(task: Task) -> Path:
    """The step as a program, with the data, in a folder that goes with this process."""
    from safetensors.torch import save_file

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path, (x, y), model = Path(folder) / "step.pt2", task.tensors(), task.model(hg)
    step = hg.TrainStep(model, hg.CrossEntropy(), hg.SGD(model.parameters(), lr=task.lr))
    step.export(path, x[: task.batch], y[: task.batch])
    save_file({"x": x, "target": y}, path.with_suffix(".data.safetensors"))
    return path


def exported(task: Task, many: int) -> Contender:
    """The exported program, run by Python without a layer."""
    from safetensors.torch import load_file

    path, (x, y) = export(task), task.tensors()
    program = torch._inductor.aoti_load_package(str(path))
    names = json.loads(program.get_metadata()["inputs"])
    model = load_file(path.with_suffix(".safetensors"))
    tensors = {**load_file(path.with_suffix(".training.safetensors")), **model, "first": torch.tensor(0)}

    def step(xs: Tensor, ys: Tensor) -> None:
        inputs = {**tensors, "x": xs, "target": ys, "last": torch.tensor(len(xs))}
        program.loader.run([inputs[name] for name in names])

    def follow(rows: np.ndarray) -> Weights:
        step(x[torch.from_numpy(rows)], y[torch.from_numpy(rows)])
        return {name: model[name].numpy().copy() for name in task.weights}

    return Contender(follow, drawing(task, step, many), many)


def exported_cpp(task: Task, many: int) -> Contender:
    """The exported program, run by models/cpp, which draws the minibatches and times itself."""
    from safetensors.torch import load_file, save_file

    path = export(task)
    source, build = Path(__file__).parents[1] / "models" / "cpp", path.parent / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", str(source), "-B", str(build), prefix], ["cmake", "--build", str(build)]):
        subprocess.run(command, check=True, capture_output=True)

    def train(*options: object) -> str:
        command = [str(build / "train"), str(path), "--steps-per-call", str(many), *map(str, options)]
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout

    def follow(rows: np.ndarray) -> Weights:
        given, trained = path.with_name("rows.safetensors"), path.with_name("trained.safetensors")
        save_file({"rows": torch.from_numpy(rows)}, given)
        train("--rows", given, "--save", trained)
        return {name: t.numpy() for name, t in load_file(trained).items() if name in task.weights}

    def clock(n: int) -> tuple[float]:
        line = next(line for line in train("--steps", max(200, n) * many).splitlines() if "us a step" in line)
        return (float(line.split()[0]) * 1e-6 * many * n,)

    return Contender(follow, lambda: train("--steps", many), many, clock)


def autograd(task: Task, compiled: bool = False, **options: Any) -> Contender:
    """torch.nn, cross_entropy and torch.optim.SGD, as most people would write it."""
    model = task.model(twins)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, **options)

    def loss_of(xb: Tensor, yb: Tensor) -> Tensor:
        return F.cross_entropy(model(xb), yb)

    call = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of

    def step(xb: Tensor, yb: Tensor) -> None:
        loss = call(xb, yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Contender(following(task, step, model.named_parameters), drawing(task, step))


def jax_batch_norm(h: Any, gain: Any, shift: Any) -> tuple[Any, tuple[Any, Any]]:
    """For a formula: batch norm over the rows, with the statistics."""
    import jax

    mean = h.mean(0)
    diff = h - mean
    var = (diff * diff).mean(0)
    return gain * diff * jax.lax.rsqrt(var + EPS) + shift, (mean, var)


def by_jax(task: Task, many: int = 1) -> Contender:
    """JAX: grad under jit, a step a call or many of them in a lax.scan; sampling inside, buffers donated."""
    import jax
    import jax.numpy as jnp

    x, y, n = jnp.asarray(task.x), jnp.asarray(task.y), task.batch

    def loss_of(weights: Any, xb: Any, yb: Any) -> Any:
        logits, norms = task.formula(weights, xb)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), yb[:, None], 1).mean(), norms

    def update(state: Any, rows: Any) -> tuple[Any, Any]:
        weights, running = state
        (loss, norms), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, x[rows], y[rows])
        weights = {name: w - task.lr * grads[name] for name, w in weights.items()}
        running = [
            (m + MOMENTUM * (mean - m), v + MOMENTUM * (var * (n / (n - 1)) - v))
            for (m, v), (mean, var) in zip(running, norms)
        ]
        return (weights, running), loss

    def drawn(state: Any, key: Any) -> tuple[Any, Any, Any]:
        key, now = jax.random.split(key)
        rows = jax.random.randint(now, (n,) if many == 1 else (many, n), 0, len(task.x))
        state, loss = update(state, rows) if many == 1 else jax.lax.scan(update, state, rows)
        return state, key, loss

    one, call = jax.jit(update, donate_argnums=0), jax.jit(drawn, donate_argnums=(0, 1))

    def new() -> Any:
        gains = [task.weights[f"{place}.weight"] for place in task.norms]
        running = [(jnp.asarray(np.zeros_like(g)), jnp.asarray(np.ones_like(g))) for g in gains]
        return {name: jnp.array(w) for name, w in task.weights.items()}, running

    held = [new(), jax.random.key(0)]

    def follow(rows: np.ndarray) -> Weights:
        state = new()
        if many == 1:
            for row in rows:
                state, _ = one(state, jnp.asarray(row))
        else:
            state, _ = jax.jit(lambda s, r: jax.lax.scan(update, s, r))(state, jnp.asarray(rows))
        return {name: np.asarray(w) for name, w in state[0].items()}

    def run() -> None:
        held[0], held[1], loss = call(*held)
        loss.block_until_ready()

    return Contender(follow, run, many)


def first_result(row: Row) -> float:
    """The seconds until a contender's first call is done, in this process."""
    importlib.import_module(row.needs)
    begun = time.perf_counter()
    row.make().run()
    return time.perf_counter() - begun


def first_results(command: Sequence[str], row: Row, folder: Path) -> dict[str, float]:
    """The seconds to the first result by the state of the caches, each from a new process: `command` with `--first`.

    torch keeps its probes of the processor in TORCHINDUCTOR_CACHE_DIR, its precompiled header in a folder of TMPDIR.
    """
    if not row.compiles:
        return dict.fromkeys(FIRST, _first([*command, "--first", row.name], {}))
    probes, cache, found = folder / "probes", folder / "cache", {}
    env = {
        "TMPDIR": tempfile.mkdtemp(dir=folder),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if not probes.exists():
        probed = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(probes)}
        subprocess.run([sys.executable, "-c", PROBES], check=True, env=probed)
    for state in FIRST:
        if state != "warm":
            shutil.rmtree(cache, ignore_errors=True)
        if state == "cold":
            shutil.copytree(probes, cache)
        found[state] = _first([*command, "--first", row.name], env)
    return found


def _first(command: Sequence[str], env: dict[str, str]) -> float:
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **env})
    return float(json.loads(out.stdout.splitlines()[-1]))


def compare(task: Task, rows: Sequence[Row]) -> dict[str, Contender]:
    """Make everybody, let each take the same steps, and refuse one whose weights are not the first one's."""
    taken = np.random.default_rng(1).integers(len(task.x), size=(min(32, 4096 // task.batch), task.batch))
    expected: Weights | None = None
    found: dict[str, Contender] = {}
    for row in rows:
        contender = row.make()
        weights = contender.follow(taken)
        expected = expected or weights
        worst = max(float(np.abs(weights[k] - expected[k]).max()) for k in expected)
        print(f"  {row.name}: the same weights after {len(taken)} steps to within {worst:.1e}", flush=True)
        if not worst < 2e-3:
            raise SystemExit(f"{row.name}: wrong result, weights differ by {worst:.2g}")
        found[row.name] = contender
    return found


def take_turns(found: dict[str, Contender], seconds: float) -> list[dict[str, Any]]:
    """Time everybody; a result each, beside the best autograd."""
    times = interleave(
        {name: c.clock or timed(c.run) for name, c in found.items()}, seconds, rounds=15, precision=0.005
    )
    per_step = {name: [t / c.steps for t in times[name].rounds()] for name, c in found.items()}
    medians = {name: float(np.median(rounds)) for name, rounds in per_step.items()}
    best = min((name for name in found if "autograd" in name), key=medians.__getitem__)
    return [
        {
            "contender": name,
            "seconds": medians[name],
            "spread": times[name].spread(),
            "autograd_over_this": list(ratio(rounds, per_step[best])),
            "best_autograd": name == best,
        }
        for name, rounds in per_step.items()
    ]


def table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each contender, the fastest first, under a head; the first results where they were measured."""
    states = FIRST if all(r["first_result_seconds"] for r in results) else ()
    lines = [["contender", "a step", "autograd / this", *(f"first, {state}" for state in states)]]
    for r in sorted(results, key=lambda r: r["seconds"]):
        name = r["contender"] + (" *" if r["best_autograd"] else "")
        value, low, high = r["autograd_over_this"]
        first = [seconds_text(r["first_result_seconds"][state]) for state in states]
        lines.append([name, seconds_text(r["seconds"]), f"{value:.2f} ({low:.2f} to {high:.2f})", *first])
    return lines


def chart(path: Path, data: dict[str, Any]) -> None:
    """A bar for each contender: how many times as fast as autograd it is."""
    rows = sorted(data["results"], key=lambda r: r["seconds"])
    figure = new_figure(10, 1.6 + 0.32 * len(rows))
    axes = figure.subplots()
    colours = ["tab:orange" if r["contender"].startswith("handgrad") else "silver" for r in rows]
    speeds = [r["autograd_over_this"][0] for r in rows]
    bars = axes.barh([r["contender"] for r in rows], speeds, color=colours)
    texts = [f"{speed:.2f}x   {seconds_text(r['seconds'])}" for speed, r in zip(speeds, rows)]
    axes.bar_label(bars, texts, padding=4)
    axes.axvline(1, color="black", lw=1, ls="--")
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("times the speed of torch.nn under autograd (the dashed line);\nbeside it, the time of a step")
    axes.set_title(f"One training step, {data['environment']['threads']} thread(s)\n{data['task']}")
    figure.savefig(path, dpi=120)


def main(doc: str, task_of: Callable[[bool], Task], rows_of: Callable[[Task, bool], list[Row]], wide: str) -> None:
    """The command of a benchmark; `wide` says what --wide means."""
    p = argparse.ArgumentParser(description=doc.split("\n")[0])
    p.add_argument("--wide", action="store_true", help=wide)
    p.add_argument("--threads", type=int, default=1, help="for everybody (default: 1)")
    p.add_argument("--keep-memory", action="store_true", help="keep freed memory in the process, for everybody")
    p.add_argument("--allocator", default="", metavar="LIBRARY", help="of memory, preloaded for everybody (on Linux)")
    p.add_argument("--seconds", type=float, default=60.0, help="to take turns for (default: 60)")
    p.add_argument("--only", default="", metavar="A;B", help="beside autograd, contenders whose names contain A or B")
    p.add_argument("--no-first", action="store_true", help="without the time to the first result, which takes minutes")
    p.add_argument("--json", type=Path, help="write the results to this file")
    p.add_argument("--first", help=argparse.SUPPRESS)
    args = p.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(args.threads):  # read once, when NumPy and JAX are imported
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        flags = f"--xla_cpu_multi_thread_eigen={'true' if args.threads > 1 else 'false'}"
        settings = {**dict.fromkeys(names, str(args.threads)), "XLA_FLAGS": flags}
        if args.allocator:
            settings["LD_PRELOAD"] = args.allocator
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    if args.keep_memory:
        hg.keep_freed_memory()
    torch.set_num_threads(args.threads)
    task = task_of(args.wide)
    rows = rows_of(task, args.wide)
    if args.first:
        print(first_result(next(row for row in rows if row.name == args.first)))
        return
    wanted = [part for part in args.only.split(";") if part]
    rows = [row for row in rows if not wanted or any(part in row.name for part in ("autograd", *wanted))]
    for row in list(rows):
        missing = [row.needs] if importlib.util.find_spec(row.needs) is None else []
        missing += [row.program] if row.program and shutil.which(row.program) is None else []
        if missing:
            print(f"{row.name}: left out, for {missing[0]} is not installed")
            rows.remove(row)
    env = environment()
    where = f"{env['machine']}, torch {env['torch']}: {task.title}, {args.threads} thread(s)"
    print(f"{where}, {args.allocator}" if args.allocator else where, flush=True)
    first: dict[str, dict[str, float]] = {}
    if not args.no_first:
        given = [*(["--wide"] if args.wide else []), *(["--keep-memory"] if args.keep_memory else [])]
        command = [sys.executable, sys.argv[0], *given, "--threads", str(args.threads)]
        with tempfile.TemporaryDirectory() as folder:
            for row in rows:
                first[row.name] = first_results(command, row, Path(folder))
                texts = [f"{state} {seconds_text(s)}" for state, s in first[row.name].items()]
                print(f"  {row.name}: first result {', '.join(texts)}", flush=True)
    found = compare(task, rows)
    print(f"  taking turns for {args.seconds:.0f} s ...", flush=True)
    results = [{**r, "first_result_seconds": first.get(r["contender"])} for r in take_turns(found, args.seconds)]
    lines = table(results)
    print("* is the autograd compared with; first is the time to the first result, by what the compilers' caches hold")
    print(text_table(lines, "l" + "r" * (len(lines[0]) - 1)), flush=True)
    if args.json:
        write_json(args.json, results, task=task.title, keep_memory=args.keep_memory, allocator=args.allocator)
