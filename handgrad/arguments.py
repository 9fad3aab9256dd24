"""The checks of arguments that constructors share, each an error that says what must hold and what came."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from handgrad.errors import ArgumentError, DtypeError


def refused(layer: Any, problem: str) -> ArgumentError:
    """The error of a constructor: the layer's class, and the problem."""
    return ArgumentError(f"{type(layer).__name__}: {problem}")


def integer(layer: Any, name: str, value: Any, least: int | None = 1) -> int:
    """The value as an int, by default a size: at least 1. Any integer type will do, numpy's too, but no bool.

    >>> from handgrad import Linear
    >>> Linear(5.0, 2)
    Traceback (most recent call last):
    handgrad.errors.ArgumentError: Linear: in_features must be an int of at least 1, got 5.0
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        wanted = "an int" if least is None else f"an int of at least {least}"
        raise refused(layer, f"{name} must be {wanted}, got {value!r}")
    return number


def integers(layer: Any, name: str, value: Any, count: int | None, least: int = 1) -> tuple[int, ...]:
    """The value as a tuple of `count` ints, or as many as there are; a single int stands for all of them.

    >>> integers(None, "stride", 2, 2), integers(None, "stride", [2, 1], 2)
    ((2, 2), (2, 1))
    """
    given = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * (count or 1)
    try:
        numbers = tuple([integer(layer, name, each, least) for each in given])
    except ArgumentError:
        numbers = ()
    if not numbers or len(numbers) != (count or len(numbers)):
        several = "several" if count is None else count
        wanted = f"an int of at least {least}" + ("" if count == 1 else f", or {several} of them")
        raise refused(layer, f"{name} must be {wanted}, got {value!r}")
    return numbers


def number(layer: Any, name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> Any:
    """The value, which must be a number from `least` to `most`, and no NaN.

    >>> number(None, "p", 0.5, 0, 1)
    0.5
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) <= most:
        wanted = (
            "a number" if least == -math.inf else f"at least {least}" if most == math.inf else f"in {least}..{most}"
        )
        raise refused(layer, f"{name} must be {wanted}, got {value!r}")
    return value


def floating(layer: Any, name: str, value: Any) -> Tensor | None:
    """The value, which must be a tensor of a floating dtype, or None."""
    if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DtypeError(f"{type(layer).__name__}: {name} must be a tensor of a floating dtype, got {came}")
    return value
