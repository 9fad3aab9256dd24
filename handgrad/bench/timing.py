"""Timing contenders against each other on a machine that does other things too.

A noisy machine is slow for a while, then fast again. So the contenders take turns in short blocks, and what is reported
is the median over the rounds of the *ratio* within a round: both halves of a ratio saw the same machine.

What one part of a whole costs is the time of the whole with more of them less that with fewer, round by round as well
(`difference`), so that a ratio of two such differences has an interval that knows how noisy they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, TypeVar

SECONDS_PER_BLOCK = 0.05  # or one call: long enough to work from warm caches, as a loop does
PATIENCE = 10.0  # seconds, after which three rounds are enough

Name = TypeVar("Name")

Contender = Callable[[int], tuple[float, ...]]
"""Do n calls; return the seconds that each part of them took, all calls together."""


class Times(NamedTuple):
    """Seconds per call, one number per round: `parts[i]` holds the rounds of part i."""

    parts: list[list[float]]

    def median(self, part: int | None = None) -> float:
        """The median seconds of one part, or of all parts together."""
        return median(self.rounds(part))

    def spread(self) -> float:
        """The middle half of the rounds, as a share of the median."""
        rounds = sorted(self.rounds())
        return (rounds[3 * len(rounds) // 4] - rounds[len(rounds) // 4]) / median(rounds)

    def rounds(self, part: int | None = None) -> list[float]:
        """The seconds of one part, or of all parts together, round by round."""
        return [sum(rounds) for rounds in zip(*self.parts)] if part is None else self.parts[part]


class Ratio(NamedTuple):
    """How often longer the other took: the median over the rounds, and a 95 % interval of that median."""

    value: float
    low: float
    high: float

    @property
    def unclear(self) -> bool:
        """Whether the interval holds 1: the noise swallows the difference."""
        return self.low <= 1 <= self.high

    @property
    def verdict(self) -> str:
        """The ratio as text, or "no difference" where the interval holds 1.

        >>> Ratio(1.5, 1.4, 1.6).verdict, Ratio(1.02, 0.97, 1.05).verdict
        ('1.50 faster', 'no difference')
        >>> Ratio(0.5, 0.4, 0.6).verdict
        '2.00 slower'
        """
        if self.unclear:
            return "no difference"
        return f"{self.value:.2f} faster" if self.value > 1 else f"{1 / self.value:.2f} slower"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio theirs / ours of the rounds' times.

    The interval is that of order statistics: it supposes nothing about how the times are spread. A round in which one
    of the two is not above zero, as a difference of times may be, says nothing: it counts as the lowest ratio and as
    the highest, so it can widen the interval only. The value is then the ratio of the medians, held to the interval.

    >>> ratio([1.0, 1.0, 2.0], [2.0, 3.0, 4.0])
    Ratio(value=2.0, low=2.0, high=3.0)
    >>> ratio([1.0, -1.0, 1.0], [2.0, 2.0, 2.0]).verdict
    'no difference'
    """
    known = sorted(b / a for a, b in zip(ours, theirs) if a > 0 and b > 0)
    unknown = len(ours) - len(known)
    rank = max(math.floor(len(ours) / 2 - 0.98 * math.sqrt(len(ours))), 0)
    low, high = ([0.0] * unknown + known)[rank], (known + [math.inf] * unknown)[-1 - rank]
    if not unknown:
        return Ratio(median(known), low, high)
    a, b = median(ours), median(theirs)
    return Ratio(min(max(b / a, low), high) if a > 0 and b > 0 else 1.0, low, high)


def difference(more: Times, fewer: Times, count: int) -> Times:
    """What each of the `count` things costs that `more` has beyond `fewer`, in every part, round by round.

    >>> difference(Times([[10.0, 12.0]]), Times([[2.0, 4.0]]), 8)
    Times(parts=[[1.0, 1.0]])
    """
    return Times([[(m - f) / count for m, f in zip(*both)] for both in zip(more.parts, fewer.parts)])


def interleave(
    contenders: Mapping[Name, Contender], seconds: float = 1.0, rounds: int = 9, precision: float = 0.01
) -> dict[Name, Times]:
    """Let the contenders take turns; at least `rounds` rounds, then on until `seconds` have passed.

    It ends earlier once every ratio to the first contender is known to within `precision`; and after three rounds
    where these take longer than `PATIENCE`.

    >>> times = interleave({"a": timed(lambda: sum(range(100))), "b": timed(lambda: sum(range(1000)))}, seconds=0.1)
    >>> ratio(times["a"].rounds(), times["b"].rounds()).value > 2
    True
    """
    loops = {name: _loops(contender) for name, contender in contenders.items()}
    taken: dict[Name, list[list[float]]] = {name: [] for name in contenders}
    first, begun, done = next(iter(contenders)), time.perf_counter(), 0

    def enough() -> bool:
        elapsed = time.perf_counter() - begun
        if done < (min(rounds, 3) if elapsed > PATIENCE else rounds):
            return False
        return elapsed >= seconds or _settled(taken, first, precision)

    while not enough():
        order = list(contenders) if done % 2 == 0 else list(contenders)[::-1]  # so that none is always the one after
        for name in order:
            n = loops[name]
            taken[name].append([part / n for part in contenders[name](n)])
        done += 1
    return {name: Times([list(part) for part in zip(*blocks)]) for name, blocks in taken.items()}


def timed(call: Callable[[], object]) -> Contender:
    """A contender of one part: the plain call."""

    def run(n: int) -> tuple[float]:
        begun = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - begun,)

    return run


def _loops(contender: Contender) -> int:
    """How many calls make a block; the calls that find it out warm the contender up."""
    n = 1
    contender(1)
    while True:
        begun = time.perf_counter()
        contender(n)
        taken = time.perf_counter() - begun
        if taken >= SECONDS_PER_BLOCK or n >= 1_000_000:
            return n
        n = max(2 * n, math.ceil(1.2 * n * SECONDS_PER_BLOCK / taken)) if taken > SECONDS_PER_BLOCK / 100 else 10 * n


def _settled(taken: Mapping[Name, list[list[float]]], first: Name, precision: float) -> bool:
    ours = [sum(block) for block in taken[first]]
    for name, blocks in taken.items():
        if name != first:
            r = ratio(ours, [sum(block) for block in blocks])
            if r.high - r.low > 2 * precision * r.value:
                return False
    return len(ours) >= 25
