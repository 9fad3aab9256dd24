"""Where the time and the memory of a model go, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from handgrad.bench.memory import recorded_bytes
from handgrad.bench.report import bytes_text, seconds_text, table
from handgrad.errors import StateError
from handgrad.layer import Layer
from handgrad.losses.cross_entropy import CrossEntropy
from handgrad.losses.loss import Loss
from handgrad.losses.mse import MSE


@dataclass
class Row:
    """One layer: its path and repr, seconds per pass, bytes recorded per step, parameters, share of the step's time."""

    path: str
    layer: str
    forward: float
    backward: float
    recorded: int
    parameters: int
    share: float


@dataclass
class Profile:
    """What `profile` returns; `print` shows it as a table."""

    rows: list[Row]
    seconds: float

    def __str__(self) -> str:
        head = ["", "layer", "forward", "backward", "recorded", "parameters", "share"]
        body = [
            [
                row.path,
                row.layer if len(row.layer) <= 34 else row.layer[:31] + "...",
                seconds_text(row.forward),
                seconds_text(row.backward),
                bytes_text(row.recorded),
                f"{row.parameters:,}",
                f"{row.share:.0%}",
            ]
            for row in self.rows
        ]
        return table([head, *body], "llrrrrr") + f"\nforward, loss and backward: {seconds_text(self.seconds)}"


def profile(model: Layer, x: Any, y: Tensor, loss: Loss | None = None, *, seconds: float = 1.0) -> Profile:
    """Time forward, loss and backward of a model on one minibatch: one row per layer, the loss, and the rest.

    y is the target. Without a loss it is CrossEntropy for integer targets, and MSE for others. The rest is what
    containers do between the layers. Bytes that two layers both record are counted in each. The model is left as it
    was: no update, gradients and running statistics put back. Raises StateError where a forward of it waits for its
    backward.

    >>> from handgrad import Linear, Sequential, Tanh
    >>> p = profile(Sequential(Linear(3, 4), Tanh()), torch.randn(8, 3), torch.randint(4, (8,)), seconds=0.01)
    >>> [(row.path, row.parameters) for row in p.rows]
    [('0', 16), ('1', 0), ('loss', 0), ('rest', 0)]
    """
    loss = loss or (MSE() if y.is_floating_point() else CrossEntropy())
    if model.pending or loss.pending:
        problem = "a forward still waits for its backward; run it, or drop_records()"
        raise StateError(f"profile: {problem}")
    named = [(path or "model", layer) for path, layer in model.named_layers() if not _inside(layer)]
    named.append(("loss", loss))
    with _unchanged(model), torch.enable_grad():
        recorded = _records(model, loss, named, x, y)
        rounds: list[list[float]] = []
        begun = time.perf_counter()
        with _clocked([layer for _, layer in named]) as clock:
            while len(rounds) < 5 or time.perf_counter() - begun < seconds:
                clock.clear()
                t0 = time.perf_counter()
                _step(model, loss, x, y)
                total = time.perf_counter() - t0
                rounds.append([total, *(clock.get((id(at), way), 0.0) for _, at in named for way in (0, 1))])
    total, *parts = (median(column) for column in zip(*rounds))
    rows = [
        Row(
            path,
            repr(layer),
            parts[2 * i],
            parts[2 * i + 1],
            recorded[i],
            sum(p.numel() for p in layer.parameters()),
            (parts[2 * i] + parts[2 * i + 1]) / total,
        )
        for i, (path, layer) in enumerate(named)
    ]
    rest = max(total - sum(parts), 0.0)
    rows.append(Row("rest", "", rest, 0.0, 0, 0, rest / total))
    return Profile(rows, total)


def _step(model: Layer, loss: Loss, x: Any, y: Tensor) -> None:
    loss.forward(model.forward_at(None, x), y)
    model.zero_grad()
    model.backward_at(None, loss.backward(), need_dx=False)


def _records(model: Layer, loss: Loss, named: list[tuple[str, Layer]], x: Any, y: Tensor) -> list[int]:
    try:
        loss.forward(model.forward_at(None, x), y)
        return [recorded_bytes(layer) for _, layer in named]
    finally:
        model.drop_records()
        loss.drop_records()


def _inside(layer: Layer) -> bool:
    """Whether the layer only holds others."""
    return any(True for _ in layer.named_children()) and not layer._declared


@contextmanager
def _clocked(layers: list[Layer]) -> Iterator[dict[tuple[int, int], float]]:
    """Let every call of the layers' forward and backward add its seconds up under (id of the layer, 0 or 1)."""
    taken: dict[tuple[int, int], float] = {}

    def clock(call: Callable[..., Any], key: tuple[int, int]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            t0 = time.perf_counter()
            out = call(*args, **kwargs)
            taken[key] = taken.get(key, 0.0) + time.perf_counter() - t0
            return out

        return run

    for layer in layers:
        vars(layer)["forward"] = clock(layer.forward, (id(layer), 0))
        vars(layer)["backward"] = clock(layer.backward, (id(layer), 1))
    try:
        yield taken
    finally:
        for layer in layers:
            del vars(layer)["forward"], vars(layer)["backward"]


@contextmanager
def _unchanged(model: Layer) -> Iterator[None]:
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for _, b in model.named_buffers()]
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for b, value in buffers:
                b.copy_(value)
