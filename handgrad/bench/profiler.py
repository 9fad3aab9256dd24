"""Where the time and the memory of a model go, layer by layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from handgrad.errors import StateError
from handgrad.layer import Layer
from handgrad.losses.cross_entropy import CrossEntropy
from handgrad.losses.loss import Loss
from handgrad.losses.mse import MSE
from handgrad.losses.several import Losses
from handgrad.memory import Snapshot
from handgrad.pictures import new_figure
from handgrad.records import recorded_by_layer, tensors_in
from handgrad.tables import BYTES, SECONDS, Shown, Table, bytes_text, seconds_text, unit_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("forward", "backward")
REST = 0  # stands for the id of a layer: what is around them all
LONG = 36  # characters of a layer's text; a longer one leaves its arguments out of the picture


@dataclass
class Row:
    """One layer: its path and text, seconds per pass, bytes recorded per step, parameters, share of the step's time."""

    path: str
    layer: str
    forward: float
    backward: float
    recorded: int
    parameters: int
    share: float


@dataclass(repr=False)
class Profile(Shown):
    """What `profile` returns: printed as a table, in a notebook as HTML; `plot` makes a picture of it."""

    rows: list[Row]

    @property
    def seconds(self) -> float:
        """Those of the whole step: forward, loss and backward."""
        return sum(row.forward + row.backward for row in self.rows)

    def parts(self) -> list[str | Table]:
        """The table, with a last row for the whole step."""
        head = ["", "layer", "forward", "backward", "recorded", "parameters", "share"]
        names = ("forward", "backward", "recorded", "parameters", "share")
        total = Row("total", "", *(sum(getattr(row, name) for row in self.rows) for name in names))
        body = [
            [
                row.path,
                row.layer,
                seconds_text(row.forward),
                seconds_text(row.backward),
                bytes_text(row.recorded) if row.recorded else "",
                f"{row.parameters:,}" if row.parameters else "",
                f"{row.share:.0%}",
            ]
            for row in (*self.rows, total)
        ]
        return [Table([head, *body], "llrrrrr")]

    def plot(self, path: str | Path) -> None:
        """Write the picture to a file, of the kind that its name ends in: .png, .svg, .pdf. Needs matplotlib."""
        self.figure().savefig(path, dpi=120)

    def figure(self) -> Figure:
        """A bar for each layer's forward and backward, in the model's order, and beside it one for what it records.

        Needs matplotlib. A notebook shows the figure after `%matplotlib inline`.
        """
        labels = [_label(row) for row in self.rows]
        places = range(len(self.rows))
        figure = new_figure(7.5 + 0.08 * max(map(len, labels)), 1.5 + 0.28 * len(labels))
        times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1), gridspec_kw={"wspace": 0.08})
        unit, size = unit_of(max(row.forward + row.backward for row in self.rows), SECONDS)
        forward = [row.forward / size for row in self.rows]
        backward = [row.backward / size for row in self.rows]
        times.barh(places, forward, label="forward", color="tab:blue")
        ends = times.barh(places, backward, left=forward, label="backward", color="tab:orange")
        times.bar_label(ends, [f"{row.share:.0%}" if row.share >= 0.005 else "" for row in self.rows], padding=3)
        times.set_xlabel(f"{unit} per step; % of the {seconds_text(self.seconds)} of forward, loss and backward")
        times.set_yticks(places, labels)
        times.set_ylim(len(labels) - 0.4, -0.6)  # the first layer at the top
        unit, size = unit_of(max(row.recorded for row in self.rows), BYTES)
        bars = memory.barh(places, [row.recorded / size for row in self.rows], label="recorded", color="tab:green")
        memory.bar_label(bars, [bytes_text(row.recorded) if row.recorded else "" for row in self.rows], padding=3)
        memory.set_xlabel(f"{unit} recorded; {bytes_text(sum(row.recorded for row in self.rows))} in all")
        memory.tick_params(axis="y", length=0)
        for axes, room in ((times, 0.12), (memory, 0.35)):
            axes.margins(x=room)
            axes.set_xlim(left=0)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def profile(model: Layer, x: Any, y: Any, loss: Loss | None = None, *, seconds: float = 1.0) -> Profile:
    """Time forward, loss and backward of a model on one minibatch: one row per layer, the loss, and the rest.

    x and y, the target, may be tuples. Without a loss it is CrossEntropy for integer targets, MSE for others, and
    Losses of these for a tuple.

    A row has what the layer itself does, all its uses together. A layer around others has one where it has tensors or
    records of its own, without what those inside it take; the rest is what all others around layers do. Memory that
    several layers record counts where it is first. On a GPU every call is waited for.

    The model is left as it was: no update, gradients and running statistics put back. Whoever watches it goes on
    watching, and the time of that is in the figures. Raises StateError where a forward of it waits for its backward.

    >>> from handgrad import Linear, Sequential, Tanh
    >>> p = profile(Sequential(Linear(3, 4), Tanh()), torch.randn(8, 3), torch.randint(4, (8,)), seconds=0.01)
    >>> [(row.path, row.recorded, row.parameters) for row in p.rows]
    [('0', 96, 16), ('1', 128, 0), ('loss', 192, 0), ('rest', 0, 0)]
    """
    loss = loss or _usual_loss(y)
    if model.pending or loss.pending:
        problem = "a forward still waits for its backward; run it, or drop_records()"
        raise StateError(f"profile: {problem}")
    on_cpu = all(t.device.type == "cpu" for t in (*model.parameters(), *tensors_in(x)))
    clock = _Clock(wait=None if on_cpu else torch.accelerator.synchronize)
    forward = clock.around(lambda: loss.forward(model.forward_at(None, x), y), REST, "forward")
    backward = clock.around(lambda: model.backward_at(None, loss.backward(), need_dx=False), REST, "backward")
    rounds: list[dict[tuple[int, str], float]] = []
    with _unchanged(model, loss), torch.enable_grad(), _clocked(clock, model, loss):
        begun = time.perf_counter()
        while len(rounds) < 6 or time.perf_counter() - begun < seconds:
            for owner in (model, loss):
                owner.zero_grad()
            clock.taken.clear()
            forward()
            if not rounds:
                recorded = recorded_by_layer(model, loss)
            backward()
            rounds.append(dict(clock.taken))
    return _profile(model, loss, recorded, rounds[1:])  # without the first, which finds everything cold


def _usual_loss(y: Any) -> Loss:
    if isinstance(y, tuple):
        return Losses(*map(_usual_loss, y))
    return MSE() if y.is_floating_point() else CrossEntropy()


class _Clock:
    """Adds up what every call takes itself, without the calls inside it that have a clock, too."""

    def __init__(self, wait: Callable[[], None] | None) -> None:
        self.wait = wait
        self.taken: dict[tuple[int, str], float] = defaultdict(float)
        self.inside = [0.0]  # for each call that runs, the seconds of those inside it

    def around(self, call: Callable[..., Any], who: int, way: str) -> Callable[..., Any]:
        """The call, whose seconds are added under (who, way)."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            begun = time.perf_counter()
            try:
                out = call(*args, **kwargs)
                if self.wait is not None:
                    self.wait()
                return out
            finally:
                seconds = time.perf_counter() - begun
                self.taken[who, way] += seconds - self.inside.pop()
                self.inside[-1] += seconds

        return run


@contextmanager
def _clocked(clock: _Clock, model: Layer, loss: Loss) -> Iterator[None]:
    """Inside, the clock is around forward and backward of the loss and of every layer; then what was there before."""
    layers = {id(layer): layer for layer in (loss, *(layer for _, layer in model.named_layers()))}
    found = {who: {way: vars(layer)[way] for way in WAYS if way in vars(layer)} for who, layer in layers.items()}
    try:
        for who, layer in layers.items():
            vars(layer).update({way: clock.around(getattr(layer, way), who, way) for way in WAYS})
        yield
    finally:
        for who, layer in layers.items():
            for way in WAYS:
                vars(layer).pop(way, None)
            vars(layer).update(found[who])


@contextmanager
def _unchanged(*owners: Layer) -> Iterator[None]:
    grads = [(p, p.grad) for owner in owners for p in owner.parameters()]
    buffers = Snapshot(b for owner in owners for _, b in owner.named_buffers())
    buffers.take()
    try:
        yield
    finally:
        for owner in owners:
            owner.drop_records()
        for p, grad in grads:
            p.grad = grad
        buffers.put_back()


def _profile(model: Layer, loss: Loss, recorded: dict[int, int], rounds: list[dict[tuple[int, str], float]]) -> Profile:
    called = {who for who, _ in rounds[0]}
    listed: list[tuple[str, str, set[int], int, int]] = []
    counted: set[int] = set()  # parameters

    def add(path: str, text: str, whose: set[int], size: int, params: Iterable[Tensor]) -> None:
        fresh = {id(p): p.numel() for p in params if id(p) not in counted}
        counted.update(fresh)
        listed.append((path, text, whose, size, sum(fresh.values())))

    for path, layer in model.named_layers():
        has_rows = any(id(inner) in called for _, inner in layer.named_layers() if inner is not layer)
        if id(layer) in called and (layer._declared or recorded[id(layer)] or not has_rows):
            params = (p for _, p in layer._own("parameter")) if has_rows else layer.parameters()
            add(path or "model", layer._head(), {id(layer)}, recorded[id(layer)], params)
    size = sum(recorded[id(inner)] for _, inner in loss.named_layers())
    add("loss", loss._head(), {id(loss)}, size, loss.parameters())
    rest = called.difference(*(whose for _, _, whose, _, _ in listed))
    size = sum(recorded.values()) - sum(size for *_, size, _ in listed)
    add("rest", "", rest, size, model.parameters())

    def seconds(whose: set[int], way: str) -> float:
        return median(sum(one.get((who, way), 0.0) for who in whose) for one in rounds)

    times = [(seconds(whose, "forward"), seconds(whose, "backward")) for _, _, whose, _, _ in listed]
    total = sum(map(sum, times))
    return Profile(
        [
            Row(path, text, forward, backward, size, count, (forward + backward) / total)
            for (path, text, _, size, count), (forward, backward) in zip(listed, times)
        ]
    )


def _label(row: Row) -> str:
    """How the picture calls a row: its path, and its text or, of a long one, the class."""
    return f"{row.path}  {row.layer if len(row.layer) <= LONG else row.layer.split('(')[0]}".rstrip()
