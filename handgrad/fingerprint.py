"""Whether a program still fits: everything that was decided when the step was traced, looked at again in each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, eq
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer

QUESTIONS: tuple[Callable[[Tensor], Any], ...] = (Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"))
"""Where a tensor lies, and what it is like."""


class Fingerprint:
    """The layers' modes and plain attributes, which tensors they hold and where these lie, and the optimizer's options.

    It is taken when a step is traced; `fits()` says whether all is as it was. That is asked before each step, so it
    compares lists that were made beforehand: a few microseconds for a small model. Attributes of attributes count, too,
    in lists, tuples, dicts and objects; what a closure or a global variable holds is not seen. Of no optimizer, nothing
    counts.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        params: Sequence[Tensor],
        state: Sequence[Tensor],
        optimizer: torch.optim.Optimizer | None,
        scheduled: Sequence[str],
    ) -> None:
        self._owners: list[Any] = []  # each dict and list as it is now,
        self._copies: list[Any] = []  # and as it was
        self._held: list[tuple[Any, Any, Any]] = []  # owner, name or place there, and the very object that was held
        seen: set[int] = set()
        for layer in layers:
            self._note(vars(layer), seen)
        for param in params:  # whether it is frozen
            self._note(vars(param), seen)
        self._optimizer, self._options = optimizer, list[str]()
        if optimizer is not None:
            self._held += [(vars(optimizer), name, getattr(optimizer, name)) for name in ("state", "param_groups")]
            self._note(optimizer.state, seen)
            self._options = [name for name in optimizer.defaults if name not in scheduled]
        self._groups = self._of_groups()
        self._state = state
        self._specs = [list(map(question, state)) for question in QUESTIONS]

    def fits(self) -> bool:
        """Whether all is as it was."""
        try:
            return (
                all(map(eq, self._owners, self._copies))
                and all([owner[name] is value for owner, name, value in self._held])  # noqa: C419  # a list is faster
                and all(
                    list(map(question, self._state)) == answers for question, answers in zip(QUESTIONS, self._specs)
                )
                and self._of_groups() == self._groups
            )
        except (LookupError, RuntimeError, ValueError):  # it is gone; or a tensor stands beside another one
            return False

    def _note(self, owner: Any, seen: set[int]) -> None:
        """Note a dict or list, and what is inside: of objects that are neither layers nor tensors, their attributes."""
        if id(owner) in seen:
            return
        seen.add(id(owner))
        self._owners.append(owner)
        self._copies.append(owner.copy())
        for name, value in owner.items() if isinstance(owner, dict) else enumerate(owner):
            for part in _parts(value):
                inside = part if isinstance(part, (dict, list)) else _attributes(part)
                if inside is not None and not (isinstance(name, str) and name == "_records"):
                    self._note(inside, seen)
                if inside is not None or isinstance(part, Tensor):
                    self._held.append((owner, name, value))

    def _of_groups(self) -> list[Any]:
        """Of each parameter group: its parameters, its options, and whether it has a momentum at all."""
        return [
            (list(map(id, group["params"])), list(map(group.get, self._options)), group.get("momentum", 0) != 0)
            for group in (() if self._optimizer is None else self._optimizer.param_groups)
        ]


def _parts(value: Any) -> list[Any]:
    """The value, or the parts of a tuple and of the tuples in it."""
    return [part for item in value for part in _parts(item)] if isinstance(value, tuple) else [value]


def _attributes(value: Any) -> dict[str, Any] | None:
    found = getattr(value, "__dict__", None)
    return found if isinstance(found, dict) and not isinstance(value, (Layer, Tensor)) else None
