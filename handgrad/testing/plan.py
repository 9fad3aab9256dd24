"""What to draw: the sizes and inputs that ``check_layer(lambda V, D: Embedding(V, D), x="N T < V")`` names."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import FrameType
from typing import Any

import torch

from handgrad.errors import ArgumentError
from handgrad.losses.loss import REDUCTIONS, Loss
from handgrad.testing import subject

SYNTAX = """An input is described by its dimensions, in order. A name is a size: the same name is the same size
everywhere, and is given to the constructor if it has an argument of that name. A number is itself; *N stands for 0 to
3 dimensions. What may follow: "< V" integers from 0 to V-1; "> 0" positive numbers; "in 0 1" numbers from 0 to 1;
"bool". Examples: "*N D", "N T < V", "N C *L", "N D in 0 1"."""

LONG = 131  # beyond 64 and 128, and a multiple of no block; in one dimension at a time, so that it costs little


@dataclass(frozen=True)
class Input:
    """One input of forward: its dimensions and the kind of its values."""

    dims: tuple[str, ...]
    kind: str = "real"  # real, index, positive, unit, bool
    below: str = ""

    @staticmethod
    def parse(text: str) -> Input:
        """Read the small language of `SYNTAX`."""
        match = re.fullmatch(
            r"\s*(?P<dims>(\*?\w+\s*)*?)(?P<tail><\s*(?P<below>\w+)|>\s*0|in\s+0\s+1|\bbool)?\s*", text
        )
        if not match or {"in", "bool"} & set(match["dims"].split()):
            raise ArgumentError(f"cannot read the input {text!r}.\n{SYNTAX}")
        tail = match["tail"] or ""
        kinds = {"": "real", "<": "index", ">": "positive", "i": "unit", "b": "bool"}
        dims = tuple(match["dims"].split())
        if sum(d.startswith("*") for d in dims) > 1:
            raise ArgumentError(f"an input can have one *dimension, got {text!r}")
        return Input(dims, kinds[tail[:1]], match["below"] or "")


@dataclass(frozen=True)
class Plan:
    """Everything that `check_layer` was told about the layer and its inputs; `strategies.samples` draws from it."""

    make: Callable[..., Any]
    inputs: tuple[Input, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    kinks: Mapping[float, float | None] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    module: Callable[..., torch.nn.Module] | None = None
    differences: bool = False
    distinct: bool = False
    form: tuple[Any, ...] = ()  # the nesting of the inputs, where some are in tuples
    implied: Mapping[str, Any] = field(default_factory=dict)  # the options that nobody named, with all their values
    long: str = ""  # the size that is LONG
    rich: bool = False  # whether sizes are large ones, and all values normals

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names that the constructor is called with."""
        return _arguments(self.make, self)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every size that has to be drawn, stars included, in order of appearance."""
        named = [d for i in self.inputs for d in (*i.dims, i.below) if d and not d.isdigit()]
        made = [n for n in (*self.arguments, *self._module_arguments) if n not in self.options]
        return tuple(dict.fromkeys([*named, *made]))

    @cached_property
    def _module_arguments(self) -> tuple[str, ...]:
        return () if self.module is None else _arguments(self.module, self)

    def build(self, drawn: Mapping[str, Any]) -> tuple[subject.Packed, dict[str, Any]]:
        """Make the layer from drawn sizes and options; and what its own constructor was called with."""
        layer, arguments = _made(lambda: self.make(**{name: drawn[name] for name in self.arguments}))
        return subject.Packed(layer, self.form), arguments

    @cached_property
    def growing(self) -> tuple[str, ...]:
        """The sizes that may be LONG: the caller gave them no range."""
        return tuple(name for name in self.names if name not in self.sizes)

    def default(self, name: str) -> Any:
        """The constructor's own value of an option that nobody named."""
        return _default(self.make, name)

    def grown(self, name: str) -> Plan:
        """The same plan, with this size LONG, and the others large."""
        return replace(self, long=name, rich=True)

    def reference_for(self, drawn: Mapping[str, Any]) -> Callable[..., Any] | None:
        """The reference, told the options that nobody named."""
        told = {name: drawn[name] for name in self.implied}
        return partial(self.reference, **told) if self.reference and told else self.reference

    def build_module(self, drawn: Mapping[str, Any]) -> Callable[[], torch.nn.Module] | None:
        """How to make the equal module from the same values."""
        if self.module is None:
            return None
        module, arguments = self.module, {name: drawn[name] for name in self._module_arguments}
        return lambda: module(**arguments)

    def title(self, drawn: Mapping[str, Any]) -> str:
        """The constructor call in words: ``BatchNorm1d with C=3, affine=True``."""
        given = ", ".join(f"{name}={drawn[name]!r}" for name in self.arguments)
        return given and f"made with {given}"


def plan_of(make: Callable[..., Any], x: str | Sequence[Any], **what: Any) -> Plan:
    """A Plan of the arguments of `check_layer`."""
    texts = (x,) if isinstance(x, str) else _tuples(x)
    inputs = tuple(Input.parse(text) for text in subject.flatten(texts))
    plan = Plan(make, inputs, form=subject.form_of(texts), **what)
    implied = _implied(plan)
    plan = replace(plan, implied=implied, options={**plan.options, **implied})
    for name in plan.arguments:
        known = name in plan.options or name in {d for i in plan.inputs for d in (*i.dims, i.below)}
        if not known and not name[0].isupper():
            raise ArgumentError(
                f"do not know what to give the constructor's argument {name!r}: name a size in x after it, list its "
                f"values in options={{{name!r}: [...]}}, or pass a lambda that fills it in.\n{SYNTAX}"
            )
    return plan


def _implied(plan: Plan) -> dict[str, Any]:
    """The options that the constructor takes, that nobody named, and whose values are known: those of `reduction`.

    Whoever judges has to know them, too. A Loss that has no constructor of its own may ignore its reduction: then only
    its own forward can judge.
    """
    judges = [judge for judge in (plan.reference, plan.module) if judge is not None]
    own = getattr(plan.make, "__init__", None) is not Loss.__init__
    takes = all(_default(f, "reduction") in REDUCTIONS for f in (plan.make, *judges))
    unnamed = "reduction" not in {*plan.options, *plan.names}
    return {"reduction": REDUCTIONS} if takes and unnamed and (own or not judges) else {}


def _default(function: Callable[..., Any], argument: str) -> Any:
    """The default of an argument, None where there is none."""
    try:
        found = inspect.signature(function).parameters.get(argument)
    except (TypeError, ValueError):
        return None
    return None if found is None or found.default is found.empty else found.default


def _made(make: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What `make` makes, and the arguments of its constructor, however make came to call it.

    Python tells of each call while it makes the layer; not where a profiler listens already.
    """
    calls: list[dict[str, Any]] = []

    def listen(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == "__init__":
            code = frame.f_code
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            calls.append({name: frame.f_locals[name] for name in names})

    free = sys.getprofile() is None
    sys.setprofile(listen) if free else None
    try:
        layer = make()
    finally:
        sys.setprofile(None) if free else None
    for arguments in calls:
        itself, *names = arguments
        if arguments[itself] is layer:
            return layer, {name: arguments[name] for name in names}
    return layer, {}


def _tuples(x: Any) -> Any:
    """The lists in it as tuples."""
    return x if isinstance(x, str) else tuple(map(_tuples, x))


def _arguments(make: Callable[..., Any], plan: Plan) -> tuple[str, ...]:
    dims = {d for i in plan.inputs for d in (*i.dims, i.below)}
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        p.name
        for p in parameters
        if p.kind in positional and (p.default is p.empty or p.name in dims or p.name in plan.options)
    )
