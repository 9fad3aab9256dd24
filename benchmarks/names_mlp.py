"""One training step of the names MLP by everybody who can do it; how is said in steps.py.

python benchmarks/names_mlp.py            the step of the lecture: hidden 64, batch 32
python benchmarks/names_mlp.py --wide     hidden 1024, batch 1024
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from steps import (
    EPS,
    MOMENTUM,
    Contender,
    Row,
    Task,
    Weights,
    autograd,
    by_jax,
    drawing,
    exported,
    exported_cpp,
    following,
    handgrad_loop,
    jax_batch_norm,
    main,
    train_step,
)
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

VOCABULARY, CONTEXT, EMBEDDING, LR = 27, 3, 10, 0.1
ROWS = 182_000  # as many contexts as the names have for training


def task_of(wide: bool) -> Task:
    """Random contexts: what is timed does not depend on the letters."""
    hidden, batch = (1024, 1024) if wide else (64, 32)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def build(lib: Any) -> Any:
        return lib.Sequential(
            lib.Embedding(VOCABULARY, EMBEDDING),
            lib.Flatten(),
            lib.Linear(CONTEXT * EMBEDDING, hidden),
            lib.BatchNorm1d(hidden),
            lib.Tanh(),
            lib.Linear(hidden, VOCABULARY),
        )

    def formula(w: Any, x: Any) -> tuple[Any, list[Any]]:
        from jax.numpy import tanh

        h = w["0.weight"][x].reshape(x.shape[0], -1) @ w["2.weight"].T + w["2.bias"]
        normed, norm = jax_batch_norm(h, w["3.weight"], w["3.bias"])
        return tanh(normed) @ w["5.weight"].T + w["5.bias"], [norm]

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
    return Task(f"names MLP, hidden {hidden}, batch {batch}", build, formula, ["3"], x, y, weights, batch, LR)


def one_function(task: Task) -> Contender:
    """The operations of handgrad's eager step in one function: what remains without layers, records and checks."""
    E, W1, b1, gain, shift, W2, b2 = parameters = [torch.from_numpy(w.copy()) for w in task.weights.values()]
    running_mean, running_var, count = torch.zeros_like(gain), torch.ones_like(gain), torch.tensor(0)
    n = task.batch

    def step(xb: Tensor, yb: Tensor) -> None:
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

    return Contender(following(task, step, lambda: zip(task.weights, parameters)), drawing(task, step))


def notebook(task: Task) -> Contender:
    """The literal loop of the lecture's notebook: raw tensors, a gradient for every intermediate, by hand.

    Its normaliser divides by n - 1, which is the one difference to the others; here it is n, so that they compare.
    """
    C, W1, b1, bngain, bnbias, W2, b2 = (torch.from_numpy(w.copy()) for w in task.weights.values())
    W1, W2 = W1.t().contiguous(), W2.t().contiguous()  # the notebook keeps weights the other way round
    bngain, bnbias, b1, b2 = (t.unsqueeze(0) for t in (bngain, bnbias, b1, b2))
    parameters = [C, W1, b1, W2, b2, bngain, bnbias]
    mean_running, var_running = torch.zeros_like(bngain), torch.ones_like(bngain)
    n = task.batch

    def step(Xb: Tensor, Yb: Tensor) -> None:
        nonlocal mean_running, var_running
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

    def weights() -> Any:
        return zip(task.weights, [C, W1.t(), b1[0], bngain[0], bnbias[0], W2.t(), b2[0]])

    return Contender(following(task, step, weights), drawing(task, step))


def by_numpy(task: Task) -> Contender:
    """The same formulas as handgrad's layers, in NumPy."""
    E, W1, b1, gain, shift, W2, b2 = (w.copy() for w in task.weights.values())
    mean_running, var_running = np.zeros_like(gain), np.ones_like(gain)
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


def rows_of(task: Task, wide: bool) -> list[Row]:
    """Everybody, handgrad's TrainStep first; the wide step leaves out who does many in a call, and the notebook."""
    rows = [
        Row("handgrad, TrainStep", lambda: train_step(task)),
        Row("handgrad, the README's loop", lambda: handgrad_loop(task)),
        Row("handgrad, compiled, one step a call", lambda: train_step(task, compiled=True), compiles=True),
        Row("the same operations, no layers", lambda: one_function(task)),
        Row("torch.nn, autograd, SGD", lambda: autograd(task)),
        Row("torch.nn, autograd, SGD(foreach=True)", lambda: autograd(task, foreach=True)),
        Row("torch.nn, autograd, SGD(fused=True)", lambda: autograd(task, fused=True)),
        Row("torch.nn under torch.compile, SGD", lambda: autograd(task, compiled=True), compiles=True),
        Row("NumPy by hand", lambda: by_numpy(task)),
        Row("JAX, jit of a step", lambda: by_jax(task), compiles=True, needs="jax"),
    ]
    if wide:
        return rows
    for many in (32, 1000):
        ours, jax = f"handgrad, compiled, .many of {many:,} steps", f"JAX, scan of {many:,} steps"
        rows.append(Row(ours, partial(train_step, task, compiled=True, many=many), compiles=True))
        rows.append(Row(jax, partial(by_jax, task, many), compiles=True, needs="jax"))
    ours = "handgrad, exported, 32 steps a call, run by"
    rows.append(Row(f"{ours} Python", lambda: exported(task, 32), compiles=True, needs="safetensors"))
    cpp = Row(f"{ours} C++", lambda: exported_cpp(task, 32), compiles=True, needs="safetensors", program="cmake")
    return [*rows, cpp, Row("the notebook's literal loop", lambda: notebook(task))]


if __name__ == "__main__":
    main(__doc__, task_of, rows_of, wide="hidden 1024, batch 1024")
