"""One training step of the names MLP, sampling the minibatch included, by everybody who can do it.

    python benchmarks/names_mlp.py            the step of the lecture: hidden 64, batch 32
    python benchmarks/names_mlp.py --wide     hidden 1024, batch 1024

Every contender starts from the same weights. Before any is timed, it takes the same steps on the same minibatches, and
its weights must be those of handgrad's eager step. Then they take turns, and ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from handgrad import (
    SGD,
    BatchNorm1d,
    CrossEntropy,
    Embedding,
    Flatten,
    Linear,
    Sequential,
    Tanh,
    TrainStep,
    keep_freed_memory,
)
from handgrad.bench import environment, interleave, ratio
from handgrad.bench.report import new_figure, write_json
from handgrad.bench.timing import timed
from handgrad.tables import seconds_text, text_table

VOCABULARY, CONTEXT, EMBEDDING, LR, EPS, MOMENTUM = 27, 3, 10, 0.1, 1e-5, 0.1
ROWS = 182_000  # as many contexts as the names have for training
STEPS = 32  # what one call of a contender that does many steps does

Weights = dict[str, np.ndarray]


@dataclass
class Task:
    """The sizes, the data and the weights to begin with."""

    hidden: int
    batch: int
    x: np.ndarray
    y: np.ndarray
    weights: Weights

    @classmethod
    def make(cls, hidden: int, batch: int) -> Task:
        """Random contexts: what is timed does not depend on the letters."""
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

        weights = {
            "0.weight": normal(VOCABULARY, EMBEDDING),
            "2.weight": normal(hidden, CONTEXT * EMBEDDING),
            "2.bias": normal(hidden),
            "3.weight": 1 + 0.1 * normal(hidden),
            "3.bias": 0.1 * normal(hidden),
            "5.weight": normal(VOCABULARY, hidden),
            "5.bias": normal(VOCABULARY),
        }
        x, y = rng.integers(VOCABULARY, size=(ROWS, CONTEXT)), rng.integers(VOCABULARY, size=ROWS)
        return cls(hidden, batch, x, y, weights)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The data as torch wants it."""
        return torch.from_numpy(self.x), torch.from_numpy(self.y)


@dataclass
class Contender:
    """`follow(rows)` takes a step for each line of rows and returns the weights; `run()` draws its own minibatches."""

    follow: Callable[[np.ndarray], Weights]
    run: Callable[[], Any]
    steps: int = 1  # in one run()


def handgrad_model(task: Task) -> Sequential:
    """The model with the task's weights."""
    h = task.hidden
    model = Sequential(
        Embedding(VOCABULARY, EMBEDDING),
        Flatten(),
        Linear(CONTEXT * EMBEDDING, h),
        BatchNorm1d(h),
        Tanh(),
        Linear(h, 27),
    )
    model.load_state_dict({k: torch.from_numpy(v) for k, v in task.weights.items()}, strict=False)
    return model


def handgrad(task: Task, compiled: bool = False, many: bool = False, chunk: int = 8) -> Contender:
    """Handgrad's TrainStep: eager, compiled step by step, or many steps per call, `chunk` of them per graph."""
    model, (x, y), generator = handgrad_model(task), task.tensors(), torch.Generator().manual_seed(0)
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=LR))
    if compiled:
        step = step.compile(chunk)
    shape = (STEPS, task.batch) if many else (task.batch,)

    def follow(rows: np.ndarray) -> Weights:
        if many:
            step.many(x[torch.from_numpy(rows)], y[torch.from_numpy(rows)])
        else:
            for row in torch.from_numpy(rows):
                step(x[row], y[row])
        return {name: p.numpy().copy() for name, p in model.named_parameters()}

    def run() -> None:
        rows = torch.randint(ROWS, shape, generator=generator)
        if many:
            step.many(x[rows], y[rows])
        else:
            step(x[rows], y[rows])

    return Contender(follow, run, STEPS if many else 1)


def one_function(task: Task) -> Contender:
    """The operations of handgrad's eager step in one function: what remains without layers, records and checks."""
    (x, y), generator, n = task.tensors(), torch.Generator().manual_seed(0), task.batch
    E, W1, b1, gain, shift, W2, b2 = parameters = [torch.from_numpy(w.copy()) for w in task.weights.values()]
    running_mean, running_var, count = torch.zeros(task.hidden), torch.ones(task.hidden), torch.tensor(0)

    def step(rows: Tensor) -> None:
        xb, yb = x[rows], y[rows]
        e = F.embedding(xb, E).flatten(1)
        h = F.linear(e, W1, b1)
        count.add_(1)
        bn, mean, rstd = torch.native_batch_norm(h, gain, shift, running_mean, running_var, True, MOMENTUM, EPS)
        t = torch.tanh(bn)
        logits = F.linear(t, W2, b2)
        low, high = (limit.item() for limit in yb.aminmax())
        if low < 0 or high >= VOCABULARY:
            raise IndexError("a target that is no class")
        logp = torch.log_softmax(logits, 1)
        F.nll_loss(logp, yb)

        dlogits = logp.exp()
        dlogits.scatter_(1, yb.unsqueeze(1), -1, reduce="add").mul_(1 / n)
        dW2, db2, dt = dlogits.t().mm(t), dlogits.sum(0), dlogits.mm(W2)
        dbn = torch.addcmul(dt, dt, t * t, value=-1)
        diff = h - mean
        dshift, dgain = dbn.sum(0), (dbn * diff).sum(0).mul_(rstd)
        through_both = torch.addcmul(dshift, diff, dgain * rstd, out=diff)
        dh = torch.sub(dbn, through_both, alpha=1 / n, out=diff).mul_(rstd * gain)
        dW1, db1, de = dh.t().mm(e), dh.sum(0), dh.mm(W1)
        dE = torch.zeros_like(E)
        dE.index_add_(0, xb.view(-1), de.view(-1, EMBEDDING))
        torch._foreach_add_(parameters, [dE, dW1, db1, dgain, dshift, dW2, db2], alpha=-LR)

    def follow(rows: np.ndarray) -> Weights:
        for row in torch.from_numpy(rows):
            step(row)
        return {name: p.numpy().copy() for name, p in zip(task.weights, parameters)}

    return Contender(follow, lambda: step(torch.randint(ROWS, (n,), generator=generator)))


def autograd(task: Task, compiled: bool = False, **options: Any) -> Contender:
    """torch.nn, cross_entropy and torch.optim.SGD, as most people would write it."""
    h = task.hidden
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, EMBEDDING),
        nn.Flatten(),
        nn.Linear(CONTEXT * EMBEDDING, h),
        nn.BatchNorm1d(h),
        nn.Tanh(),
        nn.Linear(h, VOCABULARY),
    )
    model.load_state_dict({k: torch.from_numpy(v) for k, v in task.weights.items()}, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, **options)
    (x, y), generator = task.tensors(), torch.Generator().manual_seed(0)

    def loss_of(xb: Tensor, yb: Tensor) -> Tensor:
        return F.cross_entropy(model(xb), yb)

    call = torch.compile(loss_of, fullgraph=True, dynamic=False) if compiled else loss_of

    def step(rows: Tensor) -> None:
        loss = call(x[rows], y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def follow(rows: np.ndarray) -> Weights:
        for row in torch.from_numpy(rows):
            step(row)
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}

    return Contender(follow, lambda: step(torch.randint(ROWS, (task.batch,), generator=generator)))


def notebook(task: Task) -> Contender:
    """The literal loop of the lecture's notebook: raw tensors, a gradient for every intermediate, by hand.

    Its normaliser divides by n - 1, which is the one difference to the others; here it is n, so that they compare.
    """
    (x, y), generator = task.tensors(), torch.Generator().manual_seed(0)
    C, W1, b1, bngain, bnbias, W2, b2 = (torch.from_numpy(w.copy()) for w in task.weights.values())
    W1, W2 = W1.t().contiguous(), W2.t().contiguous()  # the notebook keeps weights the other way round
    bngain, bnbias, b1, b2 = (t.unsqueeze(0) for t in (bngain, bnbias, b1, b2))
    parameters = [C, W1, b1, W2, b2, bngain, bnbias]
    mean_running, var_running = torch.zeros(1, task.hidden), torch.ones(1, task.hidden)
    n = task.batch

    def step(rows: Tensor) -> None:
        nonlocal mean_running, var_running
        Xb, Yb = x[rows], y[rows]
        emb = C[Xb]
        embcat = emb.view(emb.shape[0], -1)
        hprebn = embcat @ W1 + b1
        bnmeani = 1 / n * hprebn.sum(0, keepdim=True)
        bndiff = hprebn - bnmeani
        bndiff2 = bndiff**2
        bnvar = 1 / n * bndiff2.sum(0, keepdim=True)
        bnvar_inv = (bnvar + EPS) ** -0.5
        bnraw = bndiff * bnvar_inv
        hpreact = bngain * bnraw + bnbias
        h = torch.tanh(hpreact)
        logits = h @ W2 + b2
        logit_maxes = logits.max(1, keepdim=True).values
        norm_logits = logits - logit_maxes
        counts = norm_logits.exp()
        counts_sum = counts.sum(1, keepdims=True)
        counts_sum_inv = counts_sum**-1
        probs = counts * counts_sum_inv
        logprobs = probs.log()
        loss = -logprobs[range(n), Yb].mean()

        dlogprobs = torch.zeros_like(logprobs)
        dlogprobs[range(n), Yb] = -1.0 / n
        dprobs = (1.0 / probs) * dlogprobs
        dcounts_sum_inv = (counts * dprobs).sum(1, keepdim=True)
        dcounts = counts_sum_inv * dprobs
        dcounts_sum = (-(counts_sum**-2)) * dcounts_sum_inv
        dcounts += torch.ones_like(counts) * dcounts_sum
        dnorm_logits = counts * dcounts
        dlogits = dnorm_logits.clone()
        dlogit_maxes = (-dnorm_logits).sum(1, keepdim=True)
        dlogits += F.one_hot(logits.max(1).indices, num_classes=logits.shape[1]) * dlogit_maxes
        dh = dlogits @ W2.T
        dW2 = h.T @ dlogits
        db2 = dlogits.sum(0)
        dhpreact = (1.0 - h**2) * dh
        dbngain = (bnraw * dhpreact).sum(0, keepdim=True)
        dbnraw = bngain * dhpreact
        dbnbias = dhpreact.sum(0, keepdim=True)
        dbndiff = bnvar_inv * dbnraw
        dbnvar_inv = (bndiff * dbnraw).sum(0, keepdim=True)
        dbnvar = (-0.5 * (bnvar + EPS) ** -1.5) * dbnvar_inv
        dbndiff2 = (1.0 / n) * torch.ones_like(bndiff2) * dbnvar
        dbndiff += (2 * bndiff) * dbndiff2
        dhprebn = dbndiff.clone()
        dbnmeani = (-dbndiff).sum(0)
        dhprebn += 1.0 / n * (torch.ones_like(hprebn) * dbnmeani)
        dembcat = dhprebn @ W1.T
        dW1 = embcat.T @ dhprebn
        db1 = dhprebn.sum(0)
        demb = dembcat.view(emb.shape)
        dC = torch.zeros_like(C)
        for k in range(Xb.shape[0]):
            for j in range(Xb.shape[1]):
                ix = Xb[k, j]
                dC[ix] += demb[k, j]

        mean_running = (1 - MOMENTUM) * mean_running + MOMENTUM * bnmeani
        var_running = (1 - MOMENTUM) * var_running + MOMENTUM * bnvar
        for p, grad in zip(parameters, [dC, dW1, db1, dW2, db2, dbngain, dbnbias]):
            p.data += -LR * grad
        del loss

    def follow(rows: np.ndarray) -> Weights:
        for row in torch.from_numpy(rows):
            step(row)
        tensors = [C, W1.t(), b1[0], bngain[0], bnbias[0], W2.t(), b2[0]]
        return {name: t.numpy().copy() for name, t in zip(task.weights, tensors)}

    return Contender(follow, lambda: step(torch.randint(ROWS, (task.batch,), generator=generator)))


def by_numpy(task: Task) -> Contender:
    """The same formulas as handgrad's layers, in NumPy."""
    E, W1, b1, gain, shift, W2, b2 = (w.copy() for w in task.weights.values())
    mean_running, var_running = np.zeros(task.hidden, np.float32), np.ones(task.hidden, np.float32)
    x, y, n, rng = task.x, task.y, task.batch, np.random.default_rng(0)
    lr, all_rows = np.float32(LR), np.arange(task.batch)

    def step(rows: np.ndarray) -> None:
        xb, yb = x[rows], y[rows]
        e = E[xb].reshape(n, -1)
        h = e @ W1.T + b1
        mean = h.mean(0)
        diff = h - mean
        var = (diff * diff).mean(0)
        np.add(mean_running, MOMENTUM * (mean - mean_running), out=mean_running)
        np.add(var_running, MOMENTUM * (var * (n / (n - 1)) - var_running), out=var_running)
        rstd = 1 / np.sqrt(var + np.float32(EPS))
        scale = gain * rstd
        t = np.tanh(diff * scale + shift)
        logits = t @ W2.T + b2
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        p[all_rows, yb] -= 1
        p /= n
        dW2, db2, dt = p.T @ t, p.sum(0), p @ W2
        dt *= 1 - t * t
        dshift, dgain = dt.sum(0), (dt * diff).sum(0) * rstd
        dh = scale * (dt - dshift / n - diff * (rstd * dgain / n))
        dW1, db1, de = dh.T @ e, dh.sum(0), dh @ W1
        dE = np.zeros_like(E)
        np.add.at(dE, xb.reshape(-1), de.reshape(-1, EMBEDDING))
        for w, dw in ((E, dE), (W1, dW1), (b1, db1), (gain, dgain), (shift, dshift), (W2, dW2), (b2, db2)):
            w -= lr * dw

    def follow(rows: np.ndarray) -> Weights:
        for row in rows:
            step(row)
        return dict(zip(task.weights, (w.copy() for w in (E, W1, b1, gain, shift, W2, b2))))

    return Contender(follow, lambda: step(rng.integers(ROWS, size=n)))


def by_jax(task: Task, scan: bool) -> Contender:
    """JAX: grad under jit, a step a call or STEPS of them in a lax.scan; sampling inside, buffers donated."""
    import jax
    import jax.numpy as jnp

    x, y = jnp.asarray(task.x), jnp.asarray(task.y)

    def loss_of(weights: Any, xb: Any, yb: Any) -> Any:
        E, W1, b1, gain, shift, W2, b2 = weights
        h = E[xb].reshape(xb.shape[0], -1) @ W1.T + b1
        mean = h.mean(0)
        diff = h - mean
        var = (diff * diff).mean(0)
        t = jnp.tanh(gain * diff * jax.lax.rsqrt(var + EPS) + shift)
        logp = jax.nn.log_softmax(t @ W2.T + b2)
        return -jnp.take_along_axis(logp, yb[:, None], 1).mean(), (mean, var)

    def update(state: Any, rows: Any) -> tuple[Any, Any]:
        weights, (mean_running, var_running) = state
        (loss, (mean, var)), grads = jax.value_and_grad(loss_of, has_aux=True)(weights, x[rows], y[rows])
        weights = [w - LR * g for w, g in zip(weights, grads)]
        n = task.batch
        mean_running = mean_running + MOMENTUM * (mean - mean_running)
        var_running = var_running + MOMENTUM * (var * (n / (n - 1)) - var_running)
        return (weights, (mean_running, var_running)), loss

    def drawn(state: Any, key: Any) -> tuple[Any, Any, Any]:
        key, now = jax.random.split(key)
        shape = (STEPS, task.batch) if scan else (task.batch,)
        rows = jax.random.randint(now, shape, 0, ROWS)
        state, loss = jax.lax.scan(update, state, rows) if scan else update(state, rows)
        return state, key, loss

    one = jax.jit(update, donate_argnums=0)
    call = jax.jit(drawn, donate_argnums=(0, 1))

    def new() -> Any:
        state = [jnp.array(w) for w in task.weights.values()]
        return state, (jnp.zeros(task.hidden), jnp.ones(task.hidden))

    held = [new(), jax.random.key(0)]

    def follow(rows: np.ndarray) -> Weights:
        state = new()
        if scan:
            state, _ = jax.jit(lambda s, r: jax.lax.scan(update, s, r))(state, jnp.asarray(rows))
        else:
            for row in rows:
                state, _ = one(state, jnp.asarray(row))
        return {name: np.asarray(w) for name, w in zip(task.weights, state[0])}

    def run() -> None:
        held[0], held[1], loss = call(*held)
        loss.block_until_ready()

    return Contender(follow, run, STEPS if scan else 1)


def contenders(task: Task, wide: bool) -> dict[str, Callable[[], Contender]]:
    """Everybody by name, handgrad eager first; the wide step leaves the slow ones out."""
    makers: dict[str, Callable[[], Contender]] = {
        "handgrad, eager": lambda: handgrad(task),
        "handgrad, compiled": lambda: handgrad(task, compiled=True),
        f"handgrad, compiled, {STEPS} steps a call": lambda: handgrad(task, compiled=True, many=True),
        f"handgrad, compiled, {STEPS} steps a graph": lambda: handgrad(task, compiled=True, many=True, chunk=STEPS),
        "the same operations, no layers": lambda: one_function(task),
        "torch.nn, autograd, SGD": lambda: autograd(task),
        "torch.nn, autograd, SGD(foreach=True)": lambda: autograd(task, foreach=True),
        "torch.nn, autograd, SGD(fused=True)": lambda: autograd(task, fused=True),
        "torch.nn under torch.compile, SGD": lambda: autograd(task, compiled=True),
        "NumPy by hand": lambda: by_numpy(task),
        "JAX, jit of a step": lambda: by_jax(task, scan=False),
        f"JAX, lax.scan of {STEPS} steps": lambda: by_jax(task, scan=True),
        "the notebook's literal loop": lambda: notebook(task),
    }
    if wide:
        makers = {name: make for name, make in makers.items() if "steps" not in name and "notebook" not in name}
    return makers


def measure(hidden: int, batch: int, threads: int, seconds: float, wide: bool) -> list[dict[str, Any]]:
    """Compare, then time, everybody; a row each."""
    torch.set_num_threads(threads)
    task = Task.make(hidden, batch)
    rows = np.random.default_rng(1).integers(ROWS, size=(STEPS if not wide else 4, batch))
    expected: Weights | None = None
    found: dict[str, Contender] = {}
    first: dict[str, float] = {}
    for name, make in contenders(task, wide).items():
        print(f"  {name} ...", end="", flush=True)
        begun = time.perf_counter()
        try:
            contender = make()
        except ImportError as error:
            print(f" left out: {error}")
            continue
        weights = contender.follow(rows)
        contender.run()
        first[name] = time.perf_counter() - begun
        expected = expected or weights
        worst = max(float(np.abs(weights[k] - expected[k]).max()) for k in expected)
        print(f" same weights after {len(rows)} steps to within {worst:.1e}; {first[name]:.1f} s to the first result")
        if not worst < 2e-3:
            raise SystemExit(f"{name}: wrong result, weights differ by {worst:.2g}")
        found[name] = contender
    print(f"  taking turns for {seconds:.0f} s ...", flush=True)
    times = interleave({name: timed(c.run) for name, c in found.items()}, seconds, rounds=15, precision=0.005)
    per_step = {name: [t / found[name].steps for t in times[name].rounds()] for name in found}
    ours = per_step["handgrad, eager"]
    autograds = [name for name in found if "autograd" in name]
    best = min(autograds, key=lambda name: times[name].median() / found[name].steps)
    results = []
    for name, rounds in per_step.items():
        results.append(
            {
                "contender": name,
                "seconds": float(np.median(rounds)),
                "spread": times[name].spread(),
                "autograd_over_this": list(ratio(rounds, per_step[best])),
                "this_over_handgrad_eager": list(ratio(ours, rounds)),
                "first_result_seconds": first[name],
                "best_autograd": name == best,
                "hidden": hidden,
                "batch": batch,
                "threads": threads,
            }
        )
    rows_text = [["contender", "a step", "spread", "autograd's time / this", "first result"]]
    for r in sorted(results, key=lambda r: r["seconds"]):
        value, low, high = r["autograd_over_this"]
        texts = [
            r["contender"] + (" *" if r["best_autograd"] else ""),
            seconds_text(r["seconds"]),
            f"{r['spread']:.0%}",
        ]
        rows_text.append([*texts, f"{value:.2f} ({low:.2f} to {high:.2f})", seconds_text(r["first_result_seconds"])])
    print(f"hidden {hidden}, batch {batch}, {threads} thread(s); * is the autograd compared with")
    print(text_table(rows_text, "lrrrr"), flush=True)
    return results


def chart(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """A bar a contender: the time of one step, on a logarithmic axis."""
    rows = sorted((r for r in results if r["batch"] == 32), key=lambda r: r["seconds"])
    figure = new_figure(9, 4)
    axes = figure.subplots()
    colours = ["tab:orange" if r["contender"].startswith("handgrad") else "tab:gray" for r in rows]
    bars = axes.barh([r["contender"] for r in rows], [r["seconds"] * 1e6 for r in rows], color=colours)
    axes.bar_label(bars, [seconds_text(r["seconds"]) for r in rows], padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("microseconds a step, sampling included")
    axes.set_title("One training step of the names MLP: hidden 64, batch 32, one thread")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print; with --json write the results."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--wide", action="store_true", help="hidden 1024, batch 1024")
    p.add_argument("--threads", type=int, default=1, help="for everybody (default: 1)")
    p.add_argument("--keep-memory", action="store_true", help="keep freed memory in the process, for everybody")
    p.add_argument("--seconds", type=float, default=60.0, help="to take turns for (default: 60)")
    p.add_argument("--json", type=Path, help="write the results to this file")
    args = p.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(args.threads):  # read once, when NumPy and JAX are imported
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        flags = f"--xla_cpu_multi_thread_eigen={'true' if args.threads > 1 else 'false'}"
        settings = {**dict.fromkeys(names, str(args.threads)), "XLA_FLAGS": flags}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    if args.keep_memory:
        keep_freed_memory()
    env = environment()
    print(f"{env['machine']}, torch {env['torch']}", flush=True)
    hidden, batch = (1024, 1024) if args.wide else (64, 32)
    results = measure(hidden, batch, args.threads, args.seconds, args.wide)
    if args.json:
        write_json(args.json, results, keep_memory=args.keep_memory)


if __name__ == "__main__":
    main()
