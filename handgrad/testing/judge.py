"""The one place that decides whether two tensors agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from handgrad.testing.errors import CheckFailure, GradientMismatch

# Measured: float64 noise between a right backward and autograd is below 3.4e-13 S; the smallest real fault, 7e-8 S.
AGAINST_ORACLE = 1e-9  # two ways to compute the same
SAME_CODE = 1e-12  # the same code, its calls in another order
AGAINST_DIFFERENCES = 1e-6  # finite differences in float64, h = 1e-5
FLOOR = 1e-12


@dataclass
class Tally:
    """How much was compared, and how close to its limit the worst difference came."""

    elements: int = 0
    worst: float = 0.0
    remark: str = ""


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)


@contextmanager
def tallying() -> Iterator[Tally]:
    """Count what is compared inside."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


def compared(elements: int, ratio: float = 0.0) -> None:
    """Count numbers that were compared; `ratio` is the largest of their errors over its limit."""
    tally = _tally.get()
    if tally is not None:
        tally.elements += elements
        tally.worst = max(tally.worst, ratio)


def remark(text: str) -> None:
    """Say in the report what cannot be compared, and why."""
    tally = _tally.get()
    if tally is not None and text not in tally.remark:
        tally.remark += f"; {text}" if tally.remark else text


Limit = Callable[[str, Tensor, Tensor], Tensor]
Floor = Callable[[str], float]  # of a tensor's name


def within(share: float, floor: Floor | float = 0.0) -> Limit:
    """The limit ``share S + 1e-12``, S being the largest element of each tensor wanted, or its `floor` if larger."""
    least: Floor = floor if callable(floor) else lambda name: floor
    return lambda name, got, want: torch.full_like(want, share * max(largest(want), least(name)) + FLOOR)


def exactly(name: str, got: Tensor, want: Tensor) -> Tensor:
    """The limit 0."""
    return torch.zeros_like(want)


def judge(
    got: Mapping[str, Tensor | None],
    want: Mapping[str, Tensor | None],
    limit: Limit,
    what: str = "",
    kind: type[CheckFailure] = GradientMismatch,
) -> None:
    """Compare tensors by name: presence, shape, dtype, then values within `limit`; NaN and infinity must match.

    Raises `kind` for the first tensor that differs, naming those that agree.
    """
    fine = []
    failures: list[CheckFailure] = []
    for name, wanted in want.items():
        failure = _failure_of(name, got.get(name), wanted, limit, what, kind)
        if failure is None:
            fine.append(name)
        else:
            failures.append(failure)
    if failures:
        others = [failure.details["tensor"] for failure in failures[1:]]
        text = f"; also wrong: {', '.join(others)}" if others else ""
        failures[0].message += f"\n  the others: {', '.join(fine) or 'none'} right{text}" if len(want) > 1 else ""
        failures[0].details["also"] = failures[1:]
        raise failures[0]


def _failure_of(
    name: str, got: Tensor | None, want: Tensor | None, limit: Limit, what: str, kind: type[CheckFailure]
) -> CheckFailure | None:
    head = f"{name} is wrong{what}: "
    if want is None:
        if got is None or largest(got) == 0:  # nothing reaches this tensor, and backward said so
            return None
        return kind(head + "there is no gradient, yet backward made one", tensor=name, got=got)
    if got is None:
        missing = "None after backward" if kind is GradientMismatch else "missing"
        return kind(f"{head}{missing}, must be {describe(want)}", tensor=name, want=want)
    if got.shape != want.shape:
        return kind(head + f"shape {tuple(got.shape)}, must be {tuple(want.shape)}", tensor=name, got=got, want=want)
    if got.dtype is not want.dtype:
        return kind(head + f"dtype {got.dtype}, must be {want.dtype}", tensor=name, got=got, want=want)
    if got.is_floating_point():
        allowed = limit(name, got, want)
        error = (got - want).abs()
        finite = torch.isfinite(want)
        bad = ~torch.where(finite, error <= allowed, same(got, want))
    else:
        allowed, error = (
            torch.zeros_like(want, dtype=torch.float64),
            (got.double() - want.double()).abs(),
        )  # also of bool
        bad = got != want
    ratios = torch.where(torch.isfinite(want.double()), error / allowed.clamp(min=1e-300), 0)
    compared(want.numel(), float(ratios.max()) if want.numel() and not bad.any() else 0.0)
    if not bad.any():
        return None
    text = head + _where_they_differ(got, want, error, bad, allowed)
    return kind(text, tensor=name, got=got, want=want, bad=bad, allowed=allowed)


def _where_they_differ(got: Tensor, want: Tensor, error: Tensor, bad: Tensor, allowed: Tensor) -> str:
    shown = torch.where(torch.isnan(error.double()), torch.inf, error.double()).where(bad, -1)
    worst = int(shown.argmax()) if shown.dim() == 0 else int(shown.flatten().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)) if want.dim() else ()
    relative = float(error.flatten()[worst] / want.flatten()[worst].double().abs().clamp(min=1e-300))
    share = f", {relative:.2g} of it" if relative < 1e6 else ""  # of what is 0 but for rounding, it says nothing
    place = f"[{', '.join(map(str, index))}]" if index else ""
    return (
        f"{int(bad.sum())} of {want.numel()} elements differ\n"
        f"  worst at {place or 'the only element'}: got {_number(got.flatten()[worst])}, "
        f"must be {_number(want.flatten()[worst])}"
        f" (off by {float(error.flatten()[worst]):.3g}{share}; allowed {float(allowed.max()):.2g})\n"
        f"  got   {describe(got)}\n  want  {describe(want)}"
    )


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None means that there is none."""
    return a if b is None else b if a is None else a + b


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: equal, or both NaN."""
    return (a == b) | (torch.isnan(a) & torch.isnan(b))


def identical(a: Tensor, b: Tensor) -> bool:
    """The same shape, dtype and values, NaN equal to itself."""
    return a.shape == b.shape and a.dtype is b.dtype and bool(same(a, b).all() if a.is_floating_point() else a.equal(b))


def largest(t: Tensor) -> float:
    """The largest finite magnitude; 0 for none."""
    finite = t.detach().to(torch.float64).abs().nan_to_num(0, 0, 0)
    return float(finite.max()) if finite.numel() else 0.0


def describe(t: Tensor) -> str:
    """Shape, dtype and strides where they are unusual, and the values of a small tensor."""
    strides = "" if t.is_contiguous() else f", strides {t.stride()}"
    head = f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}{strides}"
    return f"{head}: {literal(t)}" if t.numel() <= 12 else head


def literal(t: Tensor, digits: int = 6) -> str:
    """The values as nested lists, as short as `digits` significant digits allow."""
    if t.dim() == 0:
        return _number(t, digits)
    return f"[{', '.join(literal(row, digits) for row in t)}]"


def _number(t: Tensor, digits: int = 6) -> str:
    return f"{float(t):.{digits}g}" if t.is_floating_point() else str(t.item())
