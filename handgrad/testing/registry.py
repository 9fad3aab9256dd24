"""The registry of properties: one decorated function says all that there is to know about a property."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from handgrad.errors import ArgumentError
from handgrad.testing import rounding
from handgrad.testing.errors import GradientMismatch
from handgrad.testing.sample import Sample, sample_of


class NotApplicable(Exception):  # noqa: N818  # a finding about the layer, not an error
    """The property says nothing about this layer; the text says why."""


@dataclass(frozen=True)
class Property:
    """A property that every right layer has, as `prop` registers it."""

    number: int
    name: str
    says: str  # in one sentence
    check: Callable[[Sample], None]
    public: Callable[..., None]  # `check` of a Sample, or of a layer and its input
    examples: int
    first: bool
    draws: str


PROPERTIES: dict[str, Property] = {}
"""All properties by name. `del PROPERTIES["name"]` takes one out again."""


def prop(
    number: int,
    name: str,
    *,
    examples: int = 15,
    first: bool = False,
    draws: Literal["ordinary", "edges", "special"] = "ordinary",
) -> Callable[[Callable[[Sample], None]], Callable[..., None]]:
    """Register a function of a Sample as a property, which `check_layer` then checks of every layer.

    number      how reports call it, and its place in the order: P15 and more are free.
    name        what `skip=` and `--reproduce` call it; `handgrad.testing.assert_<name>` finds it.
    examples    how many, at hypothesis' default of max_examples=100; profiles scale it.
    first       whether it is checked before the others, because their verdicts mean nothing where it fails.
    draws       "ordinary" sizes and values; "edges" for sizes of 0 and 1; "special" for zeros, kinks, values far out.

    The function compares with `judge.judge`, which raises GradientMismatch or OutputMismatch. Or it raises one of them
    or ContractError itself, and tells `judge.compared` how many numbers it has looked at: a check that compared
    nothing is refused. It raises NotApplicable where it says nothing about the layer. The first line of its docstring
    is in the text of a failure. What the decorator returns can also be called with a layer and its input.

    >>> import torch
    >>> from handgrad import Tanh
    >>> from handgrad.testing import PROPERTIES, check_layer, judge, prop
    >>> @prop(15, "odd")
    ... def assert_odd(s):
    ...     "The gradients at -x are those at x."
    ...     judge.judge(s.run(inputs=tuple(-x for x in s.inputs)).grads, s.result.grads, s.same_code, " at -x")
    >>> assert_odd(Tanh(), torch.ones(3, dtype=torch.float64))
    >>> check_layer(Tanh, x="*N").properties[-1].name
    'odd'
    >>> del PROPERTIES["odd"]
    """

    def register(function: Callable[[Sample], None]) -> Callable[..., None]:
        def check(s: Sample) -> None:
            try:
                function(s)
            except GradientMismatch as failure:
                if not rounding.may_be_noise(failure):
                    raise
                function(rounding.judged_by_noise(s))

        @functools.wraps(function)
        def public(layer: Any, *args: Any, **keywords: Any) -> None:
            check(layer if isinstance(layer, Sample) and not args else sample_of(layer, *args, **keywords))

        for old in list(PROPERTIES.values()):
            if (old.public.__module__, old.public.__qualname__) == (function.__module__, function.__qualname__):
                del PROPERTIES[old.name]  # the same function, defined anew
            elif name == old.name or number == old.number:
                raise ArgumentError(
                    f"prop: {number} {name!r} is taken by P{old.number} {old.name}; choose another number and name, "
                    f"or take that one out first: del PROPERTIES[{old.name!r}]"
                )
        says = (function.__doc__ or "").strip().split("\n")[0]
        PROPERTIES[name] = Property(number, name, says, check, public, examples, first, draws)
        return public

    if not name.isidentifier() or name in ("sensitivity", "differences"):
        raise ArgumentError(f"prop: the name must be a word of its own, got {name!r}")
    return register


def in_order() -> list[Property]:
    """All properties, in the order in which a check runs them."""
    return sorted(PROPERTIES.values(), key=lambda p: (not p.first, p.number))
