"""Statistics of a model in training: activations, gradients, and how far each update moves each parameter."""

from __future__ import annotations

import html
import math
import os
import statistics
import textwrap
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, StateError
from handgrad.layer import Layer, is_frozen
from handgrad.layers.activation import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from handgrad.layers.cells import Cell
from handgrad.layers.recurrent import Recurrent
from handgrad.pictures import Column, Curve, draw
from handgrad.tables import Rows, html_table, text_table
from handgrad.watch import watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SATURATED = 0.30  # the share of values on a flat part from which a row is marked
DEAD = 0.10  # the share of units
VANISHES, EXPLODES = 1e-2, 1e2  # dout's deviation, of that of the last nonlinearity
SMALL, LARGE = 1e-4, 1e-2  # update:data of a weight
KEPT = 1 << 15  # values that a curve of the pictures is made of, at least, where there are as many
EXACT = torch.float32, torch.float64  # dtypes in which the sums are exact enough
BATCH = 256  # looks whose numbers wait on their device until they are read, all at once
WHOLE = 1000  # characters of a name that a notebook shows
PATH, LAYER, NAME = 12, 31, 23  # characters of a path at most, of path and layer together, of a parameter's name
REMARK = 24, 30  # characters of a line of a remark on a layer, or on a parameter

Sums: TypeAlias = tuple[Tensor, ...]
"""The sum and the norm of some values, and perhaps a number that was first taken from each: still on their device."""


class Statistics:
    """What happens inside a model while it trains: ``with stats: step(x, y)``, then ``print(stats)``, ``stats.plot``.

    It may be entered again and again, and adds up all it sees, in any training loop: a TrainStep that is not compiled,
    or one written by hand. Forwards under torch.no_grad() are no part of a step and do not count.

    ==============  ==================================================================================================
    out, dout       mean and deviation of every value that a layer gave, and of every gradient that came back to it
    saturated       share of the values that lie on a flat part of a Tanh or Sigmoid: beyond 0.97 of a Tanh, outside
                    0.015 to 0.985 of a Sigmoid. At both, the slope is 6 % of the steepest
    dead            share of the units of a ReLU that were 0 for every sample of every step: the last dimension has
                    them, or dimension 1 if it has more of them dead, or there are four or more
    std, grad       deviation of a parameter, and of its gradient as an update read it (or as it was cleared, or left)
    update:data     deviation of what an update added to a parameter by that of the parameter before, the median of all
                    updates. A parameter whose values are all the same has none
    ==============  ==================================================================================================

    A row is marked, and says why, beyond these bounds:

    ==================  ==============================================================================================
    30 % saturated      the lecture's good start (gain 5/3) has 5 to 20 %, its bad one (gain 3) 40 to 48 %
    10 % dead           a dead unit learns nothing; with too high a rate it can be 40 % of a net (cs231n.github.io)
    gradient vanishes,  dout of a nonlinearity deviates by less than 1/100, or more than 100 times, what that of the
    explodes            last nonlinearity does; in the lecture all are alike
    update:data         below 1e-4 or above 1e-2, for parameters of two or more dimensions: a power of ten on either
                        side of the lecture's 1e-3
    no gradient         none came, though the parameter is not frozen and others got one
    not finite          NaN or infinity was among the values
    ==================  ==============================================================================================

    The lecture is "Building makemore 3: Activations & Gradients, BatchNorm" by A. Karpathy. With an `optimizer`, its lr
    is shown, and parameters that it does not have are said.

    `Statistics.nonlinearities` says which layers are in the pictures of activations, with their subclasses, and between
    which values they are not flat: ``Statistics.nonlinearities[HardTanh] = (-0.99, 0.99)`` for one of your own. An
    infinite upper end makes it one like ReLU, whose units can be dead; None has no flat part.

    Updates are found by comparing the parameters with a copy (the one memory that grows with the model) at the first
    forward after a backward, and on leaving. Entering costs about two steps of a small model, so that a `with`
    around many steps is better. A step takes 4 bytes per parameter tensor for its update:data, so that
    200,000 steps of seven take 6 MB; the pictures keep at most 2^16 values per curve, of the latest steps (256 KB).

    Raises ArgumentError for a model that is no Layer, and for an optimizer that is none, or has none of its parameters;
    StateError when entered while inside, or asked for results before anything was seen.

    >>> from handgrad import SGD, CrossEntropy, Linear, Sequential, Tanh, TrainStep
    >>> model = Sequential(Linear(2, 8), Tanh(), Linear(8, 3))
    >>> _ = model[0].weight.fill_(50.0)
    >>> step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1))
    >>> stats = Statistics(model, step.optimizer)
    >>> for _ in range(3):
    ...     with stats:
    ...         _ = step(torch.eye(2), torch.tensor([0, 2]))
    >>> found = stats.to_dict()
    >>> found["steps"], found["layers"]["1"]["saturated"], found["layers"]["1"]["remarks"]
    (3, 1.0, ['100 % saturated'])
    """

    nonlinearities: ClassVar[dict[type[Layer], tuple[float, float] | None]] = {
        Tanh: (-0.97, 0.97),
        Sigmoid: (0.015, 0.985),
        ReLU: (0.0, math.inf),
        **dict.fromkeys((LeakyReLU, GELU, SiLU, Cell, Recurrent)),
    }

    def __init__(self, model: Layer, optimizer: torch.optim.Optimizer | None = None) -> None:
        if not isinstance(model, Layer):
            raise ArgumentError(f"Statistics: the model must be a Layer, got {type(model).__name__}")
        if optimizer is not None:
            if not isinstance(optimizer, torch.optim.Optimizer):
                kind = type(optimizer).__name__
                raise ArgumentError(f"Statistics: the optimizer must be a torch.optim.Optimizer, got {kind}")
            if not {id(p) for p in model.parameters()} & _held(optimizer):
                problem = "none of the parameters of the model; make it of model.parameters()"
                raise ArgumentError(f"Statistics: the optimizer updates {problem}")
        self.model, self.optimizer, self.steps = model, optimizer, 0
        self._layers: dict[str, _LayerSeen] = {}
        self._params: dict[str, _ParameterSeen] = {}
        self._later: list[tuple[Callable[..., None], int, Sums]] = []
        self._watching: AbstractContextManager[None] | None = None

    # ------------------------------------------------------------------ looking

    def __enter__(self) -> Statistics:
        if self._watching is not None:
            raise StateError("Statistics: already inside its `with`; leave it before entering again")
        for path, layer in self.model.named_layers():
            self._layers.setdefault(path, _LayerSeen(layer))
        named = {name: p for name, p in self.model.named_parameters() if p.numel()}
        for name, param in named.items():
            self._params.setdefault(name, _ParameterSeen(param))
        self._names, self._now = {name: i for i, name in enumerate(named)}, list(named.values())
        self._before = [p.clone() for p in self._now]
        self._versions = [p._version for p in self._now]
        self._means = [p.mean() for p in self._now]
        self._data = [self._data_sums(i) for i in range(len(named))]
        self._grads: dict[str, tuple[Sums, Tensor | None]] = {}  # so far, of the backward at work
        self._last: tuple[Tensor | None, Sums] = None, ()
        self._after_backward = False
        self._watching = watch(self.model, out=self._saw_out, dout=self._saw_dout, grad=self._saw_grad)
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        watching, self._watching = self._watching, None
        assert watching is not None
        watching.__exit__(None, None, None)
        self._find_update()
        self._end_gradients()
        self._read()
        del self._before, self._data, self._last

    def _saw_out(self, path: str, layer: Layer, out: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if self._after_backward:
            self._after_backward = False
            self._find_update()
            if len(self._later) > BATCH:
                self._read()
        if out.is_floating_point() and out.numel():
            seen = self._layers[path]
            self._later.append((seen.out.add, out.numel(), self._sums(out)))
            if seen.is_nonlinear:
                self._saw_activation(seen, out)

    def _saw_activation(self, seen: _LayerSeen, out: Tensor) -> None:
        seen.outs.add(_sample(out))
        if seen.sound is not None:
            low, high = seen.sound
            if high < math.inf:
                beyond = out.clamp(low, high).ne(out).count_nonzero()
                self._later.append((seen.add_flat, out.numel(), (beyond.to(torch.float32),)))
            elif out.dim():
                seen.see_units(out.amax((0, *range(2, out.dim())) if out.dim() > 3 else 0))

    def _saw_dout(self, path: str, layer: Layer, dout: Tensor) -> None:
        self._after_backward = True
        if dout.is_floating_point() and dout.numel():
            seen = self._layers[path]
            self._later.append((seen.dout.add, dout.numel(), self._sums(dout)))
            if seen.is_nonlinear:
                seen.douts.add(_sample(dout))

    def _saw_grad(self, name: str, layer: Layer, grad: Tensor) -> None:
        if (i := self._names.get(name)) is None or not grad.numel():
            return
        if (so_far := self._now[i].grad) is not None:
            grad = so_far + grad
        elif name in self._grads:  # an earlier one, cleared before any update
            self._end_gradient(name)
        self._grads[name] = _sums(grad), _sample(grad) if grad.dim() > 1 else None

    def _end_gradients(self) -> None:
        for name in list(self._grads):
            self._end_gradient(name)

    def _end_gradient(self, name: str) -> None:
        sums, sample = self._grads.pop(name)
        seen = self._params[name]
        self._later.append((seen.grad.add, seen.size, sums))
        if sample is not None:
            seen.grads.add(sample)

    def _find_update(self) -> None:
        """Note what has changed since the copy was made, if anything has, and renew the copy."""
        now, before = self._now, self._before
        moved = [i for i, version in enumerate(self._versions) if now[i]._version != version]
        if not moved:  # unless in a way that does not count: p.data += ...
            moved = [i for i, p in enumerate(now) if not torch.equal(p, before[i])]
        if not moved:
            return
        self._end_gradients()
        new, old, names = [now[i] for i in moved], [before[i] for i in moved], list(self._names)
        torch._foreach_sub_(old, new)
        for i, p, change in zip(moved, new, old):
            self._later.append((self._params[names[i]].add_update, self.steps, (*_sums(change), *self._data[i])))
            self._data[i], self._versions[i] = self._data_sums(i), p._version
        torch._foreach_copy_(old, new)
        self.steps += 1

    def _data_sums(self, i: int) -> Sums:
        """Those of a parameter, less its mean on entering: a weight may be all but constant, as a BatchNorm's is."""
        return *_sums(torch.sub(self._now[i], self._means[i])), self._means[i]

    def _sums(self, t: Tensor) -> Sums:
        """Those of t, which a container may just have shown."""
        last, sums = self._last
        if last is not t:
            sums = _sums(t)
            self._last = t, sums
        return sums

    def _read(self) -> None:
        """Add up the numbers that wait on their device."""
        later, self._later = self._later, []
        if later:
            values = iter(torch.stack([t for _, _, numbers in later for t in numbers]).tolist())
            for take, context, numbers in later:
                take(context, *islice(values, len(numbers)))

    # ------------------------------------------------------------------ results

    def to_dict(self) -> dict[str, Any]:
        """All the numbers of the table, plain and ready for json or a logger; None where there is none, or not finite.

        - "steps": the number of updates seen
        - "layers": by path, each with "layer" (its text), "out_mean", "out_std", "dout_mean", "dout_std", "saturated"
          and "dead" (shares from 0 to 1) and "remarks" (a list of texts)
        - "parameters": by name, each with "std", "grad_std", "grad_to_data", "update_to_data", "frozen" and "remarks"
        """
        self._read()
        if not any(seen.out.count for seen in self._layers.values()):
            problem = "nothing was seen yet; run steps inside `with stats:`, outside torch.no_grad()"
            raise StateError(f"Statistics: {problem}")
        layers = {path: layer for path, layer in self.model.named_layers() if path in self._layers}
        seen = {path: self._layers[path] for path in layers}
        came = [s.dout.std for s in seen.values() if s.is_nonlinear and s.dout.count]
        last = came[-1] if came else None
        params = {name: p for name, p in self.model.named_parameters() if name in self._params}
        held = {id(p) for p in params.values()} if self.optimizer is None else _held(self.optimizer)
        went_back = any(self._params[name].grad.count for name in params)
        return {
            "steps": self.steps,
            "layers": {path: {"layer": layer._head(), **seen[path].row(last)} for path, layer in layers.items()},
            "parameters": {name: self._params[name].row(p, id(p) in held, went_back) for name, p in params.items()},
        }

    def _head(self) -> str:
        text = f"{self.steps:,} update{'' if self.steps == 1 else 's'}"
        if self.optimizer is not None:
            rates = dict.fromkeys(f"{float(group['lr']):g}" for group in self.optimizer.param_groups)
            text += f"; {type(self.optimizer).__name__}, lr {', '.join(rates)}"
        return text

    def _tables(self, cut: bool) -> tuple[Rows, Rows]:
        """The rows of the layers and of the parameters, cut and wrapped to at most 100 columns or whole."""
        found = self.to_dict()
        path_width = min(PATH, max(map(len, found["layers"]))) if cut else WHOLE
        text_width = LAYER - path_width if cut else WHOLE
        layers = [["", "layer", "out mean", "std", "dout mean", "std", ""]]
        for path, row in found["layers"].items():
            numbers = [_number(row[key]) for key in ("out_mean", "out_std", "dout_mean", "dout_std")]
            notes = [_percent(row[word], word) for word in ("saturated", "dead") if row[word] is not None]
            cells = [_end(path, path_width), _start(row["layer"], text_width), *numbers]
            layers += _rows(cells, row["remarks"], notes, REMARK[0] if cut else None)
        params = [["parameter", "std", "grad std", "grad:data", "update:data", ""]]
        for name, row in found["parameters"].items():
            numbers = [_number(row[key]) for key in ("std", "grad_std", "grad_to_data")]
            cells = [_end(name, NAME if cut else WHOLE), *numbers, _ten_to(row["update_to_data"])]
            params += _rows(cells, row["remarks"], ["frozen"] * row["frozen"], REMARK[1] if cut else None)
        return layers, params

    def __str__(self) -> str:
        layers, params = self._tables(cut=True)
        return "\n".join([self._head(), "", text_table(layers, "llrrrrl"), "", text_table(params, "lrrrrl")])

    def _repr_html_(self) -> str:
        layers, params = self._tables(cut=False)
        head = html.escape(self._head())
        return f"<p>{head}</p>" + html_table(layers, "llrrrrl") + html_table(params, "lrrrrl")

    def figure(self, *others: Statistics, titles: list[str] | None = None) -> Figure:
        """The lecture's four pictures as a matplotlib Figure, one column for this and for each of the others.

        Needs matplotlib.
        """
        every = (self, *others)
        for other in others:
            if not isinstance(other, Statistics):
                problem = f"what stands beside it must be Statistics, got {type(other).__name__}"
                raise ArgumentError(f"Statistics.figure: {problem}")
        if titles is not None and len(titles) != len(every):
            raise ArgumentError(f"Statistics.figure: titles must be {len(every)}, one per column, got {len(titles)}")
        return draw([stats._column(title) for stats, title in zip(every, titles or [""] * len(every))])

    def plot(self, path: str | os.PathLike[str], *others: Statistics, titles: list[str] | None = None) -> None:
        """Write the pictures of `figure` to a file: PNG, SVG, PDF, ..., as its name ends. Needs matplotlib.

        Over each other, by depth: the distribution of every nonlinearity's activations, that of their gradients, that
        of the gradients of every weight (of two or more dimensions), and log10 of update:data of each, step by step.
        """
        self.figure(*others, titles=titles).savefig(path, dpi=130)

    def _column(self, title: str) -> Column:
        found, column = self.to_dict(), Column(title, [], [], [], [])
        for path, row in found["layers"].items():
            seen, label = self._layers[path], f"{path} {row['layer'].partition('(')[0]}".strip()
            share = [_percent(row[word], word) for word in ("saturated", "dead") if row[word] is not None]
            if seen.outs.count:
                marked = any(word in remark for remark in row["remarks"] for word in ("%", "out not"))
                column.outs.append(Curve(label, "".join(share), seen.outs.values(), marked))
            if seen.douts.count:
                marked = any(word in remark for remark in row["remarks"] for word in ("gradient", "dout not"))
                column.douts.append(Curve(label, f"std {_number(row['dout_std'])}", seen.douts.values(), marked))
        for name, row in found["parameters"].items():
            param = self._params[name]
            if param.grads.count:
                marked = "gradient not finite" in row["remarks"]
                column.grads.append(Curve(name, f"std {_number(row['grad_std'])}", param.grads.values(), marked))
            if param.is_weight and row["update_to_data"]:
                marked = any("update:data" in remark for remark in row["remarks"])
                column.updates.append(Curve(name, _ten_to(row["update_to_data"]), torch.tensor(param.updates), marked))
        return column


class _Moments:
    """Mean and deviation of all the values added so far."""

    def __init__(self) -> None:
        self.count, self.center = 0, 0.0
        self.squares = 0.0  # of the values less their mean

    def add(self, count: int, total: float, norm: float, shift: float = 0.0) -> None:
        """Add `count` values by the sum and the norm of what is left of them after `shift` is taken from each."""
        before, further = self.count, total / count + shift - self.center
        self.count += count
        self.squares += _squares(count, total, norm) + further * further * before * count / self.count
        self.center += further * count / self.count

    @property
    def mean(self) -> float:
        return self.center if self.count else math.nan

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


def _squares(count: int, total: float, norm: float) -> float:
    """The sum of the squares of values less their mean, by their sum and norm. (max would lose a NaN.)"""
    squares = norm * norm - total * total / count
    return 0.0 if squares < 0 else squares


class _Kept:
    """The latest values: those of the fewest latest looks that make KEPT values together, or of all."""

    def __init__(self) -> None:
        self.samples: deque[Tensor] = deque()
        self.count = 0

    def add(self, sample: Tensor) -> None:
        self.samples.append(sample)
        self.count += sample.numel()
        while self.count - self.samples[0].numel() >= KEPT:
            self.count -= self.samples.popleft().numel()

    def values(self) -> Tensor:
        return torch.cat([sample.float() for sample in self.samples]).cpu()


class _LayerSeen:
    """What one layer gave and was given."""

    def __init__(self, layer: Layer) -> None:
        kinds = [kind for kind in type(layer).__mro__ if kind in Statistics.nonlinearities]
        self.is_nonlinear = bool(kinds)
        self.sound = Statistics.nonlinearities[kinds[0]] if kinds else None
        self.out, self.dout = _Moments(), _Moments()
        self.outs, self.douts = _Kept(), _Kept()
        self.judged, self.flat = 0, 0.0  # values, and how many of them are on a flat part
        self.tops: dict[torch.Size, Tensor] = {}  # the greatest value of each unit, by how many there are

    def add_flat(self, judged: int, flat: float) -> None:
        self.judged += judged
        self.flat += flat

    def see_units(self, top: Tensor) -> None:
        before = self.tops.get(top.shape)
        self.tops[top.shape] = top if before is None else torch.maximum(before, top)

    def dead(self) -> float | None:
        """The share of units that never rose above the flat part."""
        if not self.tops or self.sound is None:
            return None
        units = []
        for top in self.tops.values():
            flat = top <= self.sound[0]
            if top.dim() > 1:  # of an out (N, T, D) the columns are the units, of one (N, C, T) the rows
                flat = max(flat.all(0), flat.all(1), key=lambda units: float(units.float().mean()))
            units.append(flat)
        return float(torch.cat([flat.flatten() for flat in units]).float().mean())

    def row(self, last: float | None) -> dict[str, Any]:
        saturated, dead = self.flat / self.judged if self.judged else None, self.dead()
        remarks = []
        if saturated is not None and saturated > SATURATED:
            remarks.append(_percent(saturated, "saturated"))
        if dead is not None and dead > DEAD:
            remarks.append(_percent(dead, "dead"))
        if self.is_nonlinear and self.dout.count and last and math.isfinite(ratio := self.dout.std / last):
            for beyond, word in ((ratio < VANISHES, "vanishes"), (ratio > EXPLODES, "explodes")):
                if beyond:
                    remarks.append(f"gradient {word}: {_power(ratio)} of the last layer's")
        for seen, word in ((self.out, "out"), (self.dout, "dout")):
            if seen.count and not math.isfinite(seen.mean):
                remarks.append(f"{word} not finite")
        return {
            "out_mean": _plain(self.out.mean),
            "out_std": _plain(self.out.std),
            "dout_mean": _plain(self.dout.mean),
            "dout_std": _plain(self.dout.std),
            "saturated": saturated,
            "dead": dead,
            "remarks": remarks,
        }


class _ParameterSeen:
    """One parameter's values, gradients and updates."""

    def __init__(self, param: Tensor) -> None:
        self.size, self.is_weight = param.numel(), param.dim() > 1
        self.data, self.grad, self.grads = _Moments(), _Moments(), _Kept()
        self.updates = array("f")  # update:data of each update of the model; NaN where there is none

    def add_update(self, number: int, total: float, norm: float, *data: float) -> None:
        """Add update:data of an update: a quotient of deviations; NaN where the parameter's values are all the same."""
        self.data.add(self.size, *data)
        moved, spread = _squares(self.size, total, norm), _squares(self.size, *data[:2])
        flat = spread <= 1e-12 * self.size * data[2] ** 2  # but for rounding
        self.updates.extend([math.nan] * (number - len(self.updates)))
        self.updates.append(math.nan if flat else math.sqrt(moved / spread))

    def row(self, param: Tensor, is_held: bool, went_back: bool) -> dict[str, Any]:
        frozen, std, grad = is_frozen(param), self.data.std, self.grad.std
        if not self.data.count and self.size > 1:
            std = float(param.double().std())
        ratios = [ratio for ratio in self.updates if math.isfinite(ratio)]
        ratio = statistics.median(ratios) if ratios else None
        remarks = [] if is_held else ["not in the optimizer"]
        if went_back and not frozen and not self.grad.count:
            remarks.append("no gradient")
        if self.grad.count and not math.isfinite(self.grad.mean):
            remarks.append("gradient not finite")
        if ratio is not None and self.is_weight:
            for beyond, word in ((ratio < SMALL, "small"), (ratio > LARGE, "large")):
                if beyond:
                    remarks.append(f"update:data {_power(ratio)}, too {word}")
        return {
            "std": _plain(std),
            "grad_std": _plain(grad),
            "grad_to_data": _plain(grad / std) if std else None,
            "update_to_data": ratio,
            "frozen": frozen,
            "remarks": remarks,
        }


def _sums(t: Tensor) -> tuple[Tensor, Tensor]:
    # The fastest way to a mean and a deviation: on a CPU, var_mean takes 4 times as long, of many numbers 40 times.
    t = t if t.dtype in EXACT else t.float()
    return t.sum(), torch.linalg.vector_norm(t)


def _sample(t: Tensor) -> Tensor:
    """A copy of at most KEPT values, at distances that have no common divisor with the last dimension."""
    every = -(-t.numel() // KEPT)
    while every > 1 and math.gcd(every, t.shape[-1]) > 1:
        every += 1
    return t.flatten()[::every].clone()


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _percent(share: float, word: str) -> str:
    return f"{100 * share:.0f} % {word}"


def _ten_to(ratio: float | None) -> str:
    return "" if ratio is None else f"10^{math.log10(ratio):.1f}" if ratio else "0"


def _power(value: float) -> str:
    """One digit and a power of ten: 4e-5."""
    digit, power = f"{value:.0e}".split("e")
    return f"{digit}e{int(power)}"


def _start(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _end(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]


def _rows(cells: list[str], remarks: list[str], notes: list[str], width: int | None) -> list[list[str]]:
    """The cells and, as the last, remarks and notes, where there is a remark after a mark; wrapped in further rows."""
    text = "; ".join([*remarks, *[note for note in notes if note not in remarks]])
    lines = [text] if width is None else textwrap.wrap(text, width) or [""]
    first, *rest = [f"{'!' if remarks and i == 0 else ' '} {line}" for i, line in enumerate(lines)]
    return [[*cells, first], *[[""] * len(cells) + [line] for line in rest]]
