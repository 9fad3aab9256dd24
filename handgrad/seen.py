"""What `Statistics` remembers of one layer and of one parameter, and when it finds them out of range."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import deque
from typing import Any, TypeAlias

import torch
from torch import Tensor

from handgrad.layer import is_frozen

SATURATED = 0.30  # the share of values on a flat part from which a row is marked
DEAD = 0.10  # the share of units
VANISHES, EXPLODES = 1e-2, 1e2  # dout's deviation, of that of the last nonlinearity
SMALL, LARGE = 1e-4, 1e-2  # update:data of a weight
KEPT = 1 << 15  # values that a curve of the pictures is made of, at least, where there are as many
EXACT = torch.float32, torch.float64  # dtypes in which the sums are exact enough

Sums: TypeAlias = tuple[Tensor, ...]
"""The sum and the norm of some values, and perhaps a number that was first taken from each: still on their device."""


class Moments:
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


class Kept:
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


class LayerSeen:
    """What one layer gave and was given."""

    def __init__(self, is_nonlinear: bool, sound: tuple[float, float] | None) -> None:
        self.is_nonlinear, self.sound = is_nonlinear, sound
        self.out, self.dout = Moments(), Moments()
        self.outs, self.douts = Kept(), Kept()
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
            remarks.append(percent(saturated, "saturated"))
        if dead is not None and dead > DEAD:
            remarks.append(percent(dead, "dead"))
        if self.is_nonlinear and self.dout.count and last and math.isfinite(ratio := self.dout.std / last):
            for beyond, word in ((ratio < VANISHES, "vanishes"), (ratio > EXPLODES, "explodes")):
                if beyond:
                    remarks.append(f"gradient {word}: {power(ratio)} of the last layer's")
        for seen, word in ((self.out, "out"), (self.dout, "dout")):
            if seen.count and not math.isfinite(seen.mean):
                remarks.append(f"{word} not finite")
        return {
            "out_mean": plain(self.out.mean),
            "out_std": plain(self.out.std),
            "dout_mean": plain(self.dout.mean),
            "dout_std": plain(self.dout.std),
            "saturated": saturated,
            "dead": dead,
            "remarks": remarks,
        }


class ParameterSeen:
    """One parameter's values, gradients and updates."""

    def __init__(self, param: Tensor) -> None:
        self.size, self.is_weight = param.numel(), param.dim() > 1
        self.data, self.grad, self.grads = Moments(), Moments(), Kept()
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
                    remarks.append(f"update:data {power(ratio)}, too {word}")
        return {
            "std": plain(std),
            "grad_std": plain(grad),
            "grad_to_data": plain(grad / std) if std else None,
            "update_to_data": ratio,
            "frozen": frozen,
            "remarks": remarks,
        }


def sums_of(t: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the norm."""
    # The fastest way to a mean and a deviation: on a CPU, var_mean takes 4 times as long, of many numbers 40 times.
    t = t if t.dtype in EXACT else t.float()
    return t.sum(), torch.linalg.vector_norm(t)


def sample_of(t: Tensor) -> Tensor:
    """A copy of at most KEPT values, at distances that have no common divisor with the last dimension."""
    every = -(-t.numel() // KEPT)
    while every > 1 and math.gcd(every, t.shape[-1]) > 1:
        every += 1
    return t.flatten()[::every].clone()


def plain(value: float) -> float | None:
    """The value, or None where it is not finite."""
    return value if math.isfinite(value) else None


def percent(share: float, word: str) -> str:
    """The share as a text: 41 % saturated."""
    return f"{100 * share:.0f} % {word}"


def power(value: float) -> str:
    """One digit and a power of ten: 4e-5."""
    digit, power = f"{value:.0e}".split("e")
    return f"{digit}e{int(power)}"
