"""What a check tells: the table of a passed one, and the text of a failed one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from handgrad.tables import WIDTH, Shown, Table
from handgrad.testing import judge, subject
from handgrad.testing.errors import CheckError, CheckFailure, LayerCrash
from handgrad.testing.hints import SAID, Finding, agreed, hints
from handgrad.testing.properties.values import how_to_refuse
from handgrad.testing.registry import PROPERTIES
from handgrad.testing.sample import Sample

SHOWN = 24  # elements of a tensor that the text of a failure prints


@dataclass
class PropertyReport:
    """How one property went: examples run, how many of them were different, the worst error over its limit."""

    name: str
    examples: int = 0
    distinct: int = 0
    elements: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    note: str = ""  # why it does not apply or was skipped
    remark: str = ""  # what in it could not be compared

    @property
    def number(self) -> str:
        """How texts call the property, such as "P3"; "" for one that is no longer registered."""
        return f"P{PROPERTIES[self.name].number}" if self.name in PROPERTIES else ""


@dataclass(repr=False)
class Report(Shown):
    """What `check_layer` found about a right layer: printed as text, in a notebook as HTML."""

    subject: str
    oracle: str = ""
    properties: list[PropertyReport] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)  # planted fault: the property that killed it, or why not
    never_varied: dict[str, Any] = field(default_factory=dict)  # the constructor's options that had one value only

    @property
    def seconds(self) -> float:
        """The time of all properties together."""
        return sum(p.seconds for p in self.properties)

    def parts(self) -> list[str | Table]:
        """What was judged by what; how each property went; which planted faults were noticed."""
        head = ["", "property", "examples", "distinct", "elements", "worst/limit", "seconds", ""]
        body = [
            [p.number, p.name, *[""] * 5, p.note]
            if p.note
            else [
                p.number,
                p.name,
                *map(str, (p.examples, p.distinct, p.elements)),
                f"{p.worst:.2g}",
                f"{p.seconds:.2f}",
                p.remark,
            ]
            for p in self.properties
        ]
        parts: list[str | Table] = [f"{self.subject}: right, by {self.oracle}", "", Table([head, *body], "llrrrrrl")]
        if self.never_varied:
            values = ", ".join(f"{name}={value!r}" for name, value in self.never_varied.items())
            parts += ["", *textwrap.wrap(f"never varied, so nothing is said about other values: {values}", WIDTH)]
        if self.faults:
            parts += ["", Table([["planted fault", "can this check notice it"], *self.faults.items()], "ll")]
        return parts


def failure_text(error: CheckFailure, name: str, s: Sample | None, rich: Sequence[Sample], again: str) -> str:
    """Everything that helps to find the mistake: what is wrong, a guess why, the smallest example, how to repeat it."""
    lines = [error.message]
    if isinstance(error, LayerCrash) and s is not None and all(_has_few(other) for other in rich):
        lines += how_to_refuse(s.layer, error)
    if s is not None:
        lines += [f"  hint: {guess}" for guess in _guesses(error, name, s, rich)]
        lines += ["", *example(s)]
    number = f"P{PROPERTIES[name].number} " if name in PROPERTIES else ""
    lines += ["", f"property {number}{name}: {PROPERTIES[name].says}" if number else "", again]
    layer = "" if s is None else f"{subject.name_of(s.layer)}"
    mode = "" if s is None or not subject.has_modes(s.layer) else f" ({_mode(s.layer)})"
    return (f"{layer}{mode}: " if layer else "") + "\n".join(lines).rstrip()


def _guesses(error: CheckFailure, name: str, s: Sample, rich: Sequence[Sample]) -> list[str]:
    """The hints. The example shown is the smallest, and may be too small for a pattern that richer ones have."""
    own, others = _finding(error, name, s), []
    for other in rich:
        finding = _finding(error, name, other) if other.richness() > s.richness() else None
        if finding is not None and not finding.accidental and own is not None and finding.kind == own.kind:
            shapes = ", ".join(f"{x} {tuple(t.shape)}" for x, t in subject.named("x", other.inputs).items())
            others.append((shapes, hints(finding)))
    shown = [] if own is None or (own.accidental and not others) else hints(own)
    return agreed(shown, others)[:SAID]


def _finding(error: CheckFailure, name: str, s: Sample) -> Finding | None:
    """What is wrong in an example, if it is the same tensor as in `error`."""
    try:
        PROPERTIES[name].check(s)
    except LayerCrash as crash:
        return (
            Finding(s, "", None, None, name)
            if isinstance(error, LayerCrash) and crash.details["method"] == "backward"
            else None
        )
    except CheckFailure as first:
        for failure in (first, *first.details.get("also", ())):
            tensor = failure.details.get("tensor")
            if tensor is not None and tensor == error.details.get("tensor"):
                return Finding(s, tensor, failure.details.get("got"), failure.details.get("want"), name)
    except CheckError:
        pass
    return None


def _has_few(s: Sample) -> bool:
    """Whether a size is 0 or 1."""
    return any(size <= 1 for x in s.inputs for size in x.shape)


def example(s: Sample) -> list[str]:
    """An example in words, to be printed line by line."""
    rows: dict[str, Any] = {}
    if s.made_by:
        rows["layer"] = s.made_by
    rows.update(subject.named("x", s.inputs))
    rows.update(subject.named("dout", s.douts))
    rows.update(subject.parameters(s.layer))
    rows.update(subject.buffers(s.layer))
    width = max(map(len, rows), default=0)
    return ["the smallest example found:", *(f"  {name:<{width}} = {_shown(value)}" for name, value in rows.items())]


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    text = f"torch.tensor({judge.literal(value)})" if 0 < value.numel() <= SHOWN else ""
    shape = f"shape {tuple(value.shape)}"
    return f"{text}  # {shape}" if text and value.dim() > 1 else text or shape


def _mode(layer: Any) -> str:
    return "training" if getattr(layer, "training", True) else "evaluation"
