"""Statistics of a model in training: activations, gradients, and how far each update moves each parameter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from handgrad.errors import ArgumentError, StateError
from handgrad.layer import Layer
from handgrad.layers.activation import GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from handgrad.layers.cells import Cell
from handgrad.layers.recurrent import Recurrent
from handgrad.pictures import Column, Curve, draw
from handgrad.seen import LayerSeen, ParameterSeen, Sums, percent, sample_of, sums_of
from handgrad.tables import Shown, Table
from handgrad.watch import watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 256  # looks whose numbers wait on their device until they are read, all at once


class Statistics(Shown):
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
        self._layers: dict[str, LayerSeen] = {}
        self._params: dict[str, ParameterSeen] = {}
        self._later: list[tuple[Callable[..., None], int, Sums]] = []
        self._watching: AbstractContextManager[None] | None = None

    # ------------------------------------------------------------------ looking

    def __enter__(self) -> Statistics:
        if self._watching is not None:
            raise StateError("Statistics: already inside its `with`; leave it before entering again")
        for path, layer in self.model.named_layers():
            self._layers.setdefault(path, _layer_seen(layer))
        named = {name: p for name, p in self.model.named_parameters() if p.numel()}
        for name, param in named.items():
            self._params.setdefault(name, ParameterSeen(param))
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

    def _saw_activation(self, seen: LayerSeen, out: Tensor) -> None:
        seen.outs.add(sample_of(out))
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
                seen.douts.add(sample_of(dout))

    def _saw_grad(self, name: str, layer: Layer, grad: Tensor) -> None:
        if (i := self._names.get(name)) is None or not grad.numel():
            return
        if (so_far := self._now[i].grad) is not None:
            grad = so_far + grad
        elif name in self._grads:  # an earlier one, cleared before any update
            self._end_gradient(name)
        self._grads[name] = sums_of(grad), sample_of(grad) if grad.dim() > 1 else None

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
            self._later.append((self._params[names[i]].add_update, self.steps, (*sums_of(change), *self._data[i])))
            self._data[i], self._versions[i] = self._data_sums(i), p._version
        torch._foreach_copy_(old, new)
        self.steps += 1

    def _data_sums(self, i: int) -> Sums:
        """Those of a parameter, less its mean on entering: a weight may be all but constant, as a BatchNorm's is."""
        return *sums_of(torch.sub(self._now[i], self._means[i])), self._means[i]

    def _sums(self, t: Tensor) -> Sums:
        """Those of t, which a container may just have shown."""
        last, sums = self._last
        if last is not t:
            sums = sums_of(t)
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
        if not self._seen_any():
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

    def _seen_any(self) -> bool:
        self._read()
        return any(seen.out.count for seen in self._layers.values())

    def _head(self) -> str:
        text = f"{self.steps:,} update{'' if self.steps == 1 else 's'}"
        if self.optimizer is not None:
            rates = dict.fromkeys(f"{float(group['lr']):g}" for group in self.optimizer.param_groups)
            text += f"; {type(self.optimizer).__name__}, lr {', '.join(rates)}"
        return text

    def parts(self) -> list[str | Table]:
        """What was counted, and a table of the layers and one of the parameters."""
        if not self._seen_any():
            return ["no step was seen yet"]
        found = self.to_dict()
        layers = [["", "layer", "out mean", "std", "dout mean", "std", ""]]
        for path, row in found["layers"].items():
            numbers = [_number(row[key]) for key in ("out_mean", "out_std", "dout_mean", "dout_std")]
            notes = [percent(row[word], word) for word in ("saturated", "dead") if row[word] is not None]
            layers.append([path, row["layer"], *numbers, _marked(row["remarks"], notes)])
        params = [["parameter", "std", "grad std", "grad:data", "update:data", ""]]
        for name, row in found["parameters"].items():
            numbers = [_number(row[key]) for key in ("std", "grad_std", "grad_to_data")]
            notes = ["frozen"] * row["frozen"]
            params.append([name, *numbers, _ten_to(row["update_to_data"]), _marked(row["remarks"], notes)])
        return [self._head(), "", Table(layers, "llrrrrl"), "", Table(params, "lrrrrl")]

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
            share = [percent(row[word], word) for word in ("saturated", "dead") if row[word] is not None]
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


def _layer_seen(layer: Layer) -> LayerSeen:
    kinds = [kind for kind in type(layer).__mro__ if kind in Statistics.nonlinearities]
    return LayerSeen(bool(kinds), Statistics.nonlinearities[kinds[0]] if kinds else None)


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _ten_to(ratio: float | None) -> str:
    return "" if ratio is None else f"10^{math.log10(ratio):.1f}" if ratio else "0"


def _marked(remarks: list[str], notes: list[str]) -> str:
    """Remarks and notes in one text, after a mark where there is a remark."""
    return "! " * bool(remarks) + "; ".join([*remarks, *[note for note in notes if note not in remarks]])
