"""Guesses at what a wrong gradient lacks: cheap tests of candidate mistakes, tried on failing examples.

Each guess is a function registered with `guess` under the kind of failure that it is about. It is given a Finding (one
wrong gradient in one example) and yields a Hint for whatever it finds there. What one example shows may be an accident,
of small sizes, of zeros and ones; so a guess is said only if the other failing examples show it, too (`agreed`).
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer
from handgrad.testing import judge, subject
from handgrad.testing.errors import CheckFailure
from handgrad.testing.operations import FirstNotFinite
from handgrad.testing.sample import Sample

SAID = 3  # hints at most
AGAINST_TRUTH = ("gradients", "edges", "special")  # the properties whose `want` is the right gradient of the example
ANYWHERE = " in every example"  # of a number that comes from none of the example's own
FEW = 64  # elements of an x that the diagonal of a Jacobian is computed for


@dataclass(frozen=True)
class Hint:
    """A guess at the mistake, made of one example. Guesses of one kind say the same of two examples."""

    text: str
    kind: str = ""  # where the text names numbers of its example
    meanings: tuple[str, ...] | None = None  # what the number in the text may be; without one left it says nothing

    @property
    def key(self) -> str:
        """What is the same in another example."""
        return self.kind or self.text

    def also(self, other: Hint) -> Hint:
        """The same hint with only the meanings that the other one has, too."""
        if self.meanings is None or other.meanings is None:
            return self
        return replace(self, meanings=tuple(m for m in self.meanings if m in other.meanings))

    def __str__(self) -> str:
        return f"{self.text}, which is {' or '.join(self.meanings[:3])}" if self.meanings else self.text


def agreed(shown: Sequence[Hint], others: Sequence[tuple[str, Sequence[Hint]]]) -> list[str]:
    """What to say of the example shown, which is the smallest, after a look at richer ones that fail as well.

    A hint is said if at least half of the richer ones give it, with the meanings that it has in all of them. Where only
    they give it, and its text is about numbers of one example, that one is named. Without richer ones, whatever the
    example shown gives is said.
    """
    if not others:
        alone = [
            replace(h, meanings=tuple(m for m in h.meanings if ANYWHERE not in m)) if h.meanings else h for h in shown
        ]
        return [str(hint) for hint in alone if hint.meanings != ()]
    support = Counter(key for _, found in others for key in {hint.key for hint in found})
    own = {hint.key: hint for hint in shown}
    known: dict[str, tuple[str, Hint]] = {}
    for name, found in others:
        for hint in found:
            where, so_far = known.get(hint.key) or (("", own[hint.key]) if hint.key in own else (name, hint))
            known[hint.key] = where, so_far.also(hint)
    said = [(where, h) for key, (where, h) in known.items() if 2 * support[key] >= len(others) and h.meanings != ()]
    return [f"on another example, {where}: {hint}" if where and hint.kind else str(hint) for where, hint in said]


@dataclass(frozen=True)
class Finding:
    """A wrong gradient in one example; or a backward that crashed, which has no name."""

    sample: Sample
    name: str  # of the gradient: dx, dx[1], or a parameter
    got: Any
    want: Any
    prop: str = "gradients"  # which property it fails

    @cached_property
    def kind(self) -> str:
        """What is wrong with it: which guesses there are."""
        got, want = self.got, self.want
        if not self.name:
            return "crash"
        if not isinstance(got, Tensor):
            return "missing" if self.name in subject.parameters(self.sample.layer) else ""
        if not isinstance(want, Tensor):
            return "unwanted"
        if got.shape != want.shape:
            return "shape"
        if got.dtype is not want.dtype:
            return "dtype"
        if not torch.isfinite(got).all():
            return "not finite" if torch.isfinite(want).all() else ""
        if self.prop == "accumulation":
            return "accumulation"
        if self.prop not in AGAINST_TRUTH or self.sample.truth.source == "finite differences":  # nothing equals those
            return ""
        return "" if not torch.isfinite(want).all() or _close(got, want) else "value"

    @property
    def accidental(self) -> bool:
        """Whether so many numbers of the example are 0 or 1 that what it shows means nothing."""
        s = self.sample
        numbers = [t for t in (*s.inputs, *subject.parameters(s.layer).values()) if t.is_floating_point()]
        plain = bool(numbers) and all(bool(((t == 0) | (t == 1)).all()) for t in numbers)
        return plain or (self.kind == "value" and judge.largest(self.want) == 0)

    @cached_property
    def off(self) -> Tensor:
        """How far off it is."""
        off: Tensor = self.got - self.want
        return off

    @cached_property
    def at_hand(self) -> dict[str, Tensor]:
        """The floating tensors that a formula may have used: inputs, outputs and parameters."""
        s = self.sample
        found = {**subject.named("x", s.inputs), **s.truth.outs, **subject.parameters(s.layer)}
        return {name: t for name, t in found.items() if t.is_floating_point() and t.numel()}

    @cached_property
    def dout(self) -> Tensor | None:
        """The dout, if there is one alone."""
        return self.sample.douts[0] if len(self.sample.douts) == 1 else None

    def truth_with(self, layer: Any = None, douts: tuple[Tensor, ...] | None = None) -> Tensor | None:
        """The right gradient of another layer object, or for other douts."""
        s = self.sample
        return s.oracle.truth(layer or s.layer, s.inputs, douts or s.douts, s.seed).grads.get(self.name)

    def is_right_in(self, layer: Any) -> bool:
        """Whether the gradient of this other layer object is right, and tells something."""
        other = self.sample.with_layer(layer)
        got, want = other.result.grads.get(self.name), other.truth.grads.get(self.name)
        if got is None or want is None or not any(_various(out) for out in other.truth.outs.values()):
            return False
        return judge.largest(want) > 0 and _close(got, want)


Guess = Callable[[Finding], Iterator[Hint]]
GUESSES: dict[str, list[Guess]] = {}
"""The guesses, by the kind of failure, the most telling first."""


def guess(kind: str) -> Callable[[Guess], Guess]:
    """Register a guess about failures of this kind."""

    def register(function: Guess) -> Guess:
        GUESSES.setdefault(kind, []).append(function)
        return function

    return register


def hints(finding: Finding) -> list[Hint]:
    """What the guesses say of it; the most telling first. A guess that fails says nothing.

    Where no guess explains the whole gradient, those may speak that say something about a part of it.
    """
    found: list[Hint] = []
    for kind in (finding.kind, f"{finding.kind} in part"):
        for function in GUESSES.get(kind, ()) if not found else ():
            with contextlib.suppress(Exception):
                found += function(finding)
    return found


# ---------------------------------------------------------------- no gradient, or of another shape or dtype


@guess("missing")
def _never_added(f: Finding) -> Iterator[Hint]:
    yield Hint("backward never adds to it: add_grad(parameter, gradient)")


@guess("unwanted")
def _frozen(f: Finding) -> Iterator[Hint]:
    if f.name in subject.frozen(f.sample.layer):
        yield Hint("it is frozen: add_grad(parameter, gradient) passes it over, writing to .grad does not")


@guess("dtype")
def _another_dtype(f: Finding) -> Iterator[Hint]:
    wanted = str(f.want.dtype).removeprefix("torch.")
    made = str(f.got.dtype).removeprefix("torch.")
    yield Hint(f"backward computes in {made}: convert what it returns and adds to {wanted}, with .to(dout.dtype)")


@guess("shape")
def _same_numbers_in_another_shape(f: Finding) -> Iterator[Hint]:
    shape = tuple(f.want.shape)
    if f.got.numel() != f.want.numel():
        return
    if f.got.dim() == 2 and _close(f.got.t(), f.want):
        yield Hint("it is transposed")
    elif _close(f.got.reshape(shape), f.want):
        yield Hint(f"its numbers are right: a reshape to {shape} is missing", "reshape")


@guess("shape")
def _not_summed(f: Finding) -> Iterator[Hint]:
    shape = tuple(f.want.shape)
    if f.got.numel() > f.want.numel() and _close(f.got.sum_to_size(shape), f.want):
        x = f.name.removeprefix("d")
        yield Hint(f"{x} was broadcast on the way to out, so its gradient must be summed back to {shape}", "broadcast")


@guess("shape")
def _summed_too_far(f: Finding) -> Iterator[Hint]:
    for dim in range(f.want.dim()):
        for keep in (True, False):
            summed = f.want.sum(dim, keepdim=keep)
            if summed.shape == f.got.shape and _close(f.got, summed):
                yield Hint(f"it is summed over dimension {dim}, which it must keep", "summed")
                return


# ---------------------------------------------------------------- not finite


@guess("not finite")
def _first_not_finite(f: Finding) -> Iterator[Hint]:
    """Nothing else can be said of NaN, which compares with nothing."""
    s, twin = f.sample, f.sample.copy()
    with subject.recording(s.seed), FirstNotFinite(nan=bool(torch.isnan(f.got).any())) as first:
        subject.forward(twin, s.inputs)
        subject.backward(twin, s.inputs, s.douts)
    if first.where:
        yield Hint(first.where)


# ---------------------------------------------------------------- added, or not


@guess("accumulation")
def _latest_alone(f: Finding) -> Iterator[Hint]:
    alone = f.sample.result.grads.get(f.name)
    if alone is not None and _close(f.got, alone):
        yield Hint("it holds the latest gradient alone: backward assigns .grad where it must add (add_grad does)")


# ---------------------------------------------------------------- wrong values: another gradient than the right one


@guess("crash")
@guess("shape")
@guess("value")
def _order_of_uses(f: Finding) -> Iterator[Hint]:
    """All is right once the layers that forward uses several times give their records in the other order."""
    s, twin = f.sample, f.sample.copy()
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
        inside = [(path, layer) for path, layer in subject.named_layers(twin) if isinstance(layer, Layer)]
        several = [(path, layer, len(layer._records)) for path, layer in inside if len(layer._records) > 1]
        for _, layer, _ in several:
            layer._records.reverse()
        got = {**subject.backward(twin, s.inputs, s.douts), **subject.gradients(twin)} if several else {}
    wanted = [(got.get(n), g) for n, g in s.truth.grads.items() if g is not None]
    if several and all(mine is not None and _close(mine, g) for mine, g in wanted):
        path, layer, uses = several[0]
        yield Hint(
            f"forward uses {path} ({type(layer).__name__}) {uses} times, and it is right when the first backward takes "
            "the first of its records: run the backwards in reverse, that of the last use first"
        )


@guess("value")
def _zeros(f: Finding) -> Iterator[Hint]:
    if judge.largest(f.got) == 0:
        yield Hint("backward gives zeros everywhere")


@guess("value")
def _transposed(f: Finding) -> Iterator[Hint]:
    if f.got.dim() == 2 and f.got.shape[0] == f.got.shape[1] and _close(f.got.t(), f.want):
        yield Hint("it is the transpose of the right one")


@guess("value")
def _through_a_transpose(f: Finding) -> Iterator[Hint]:
    """It is the gradient by another layer, whose square matrix is turned round."""
    for name, p in subject.parameters(f.sample.layer).items():
        if p.dim() == 2 and p.shape[0] == p.shape[1] and not _close(p.t(), p):
            twin = f.sample.copy()
            subject.parameters(twin)[name].copy_(p.t())
            other = f.truth_with(twin)
            if other is not None and _close(f.got, other):
                yield Hint(f"it is right with {name} transposed: backward goes through it the wrong way")


@guess("value")
def _another_dout(f: Finding) -> Iterator[Hint]:
    changed = f.sample.run(douts=tuple(1.5 * d + 0.7 for d in f.sample.douts)).grads.get(f.name)
    if changed is not None and judge.largest(f.got) > 0 and _close(changed, f.got):
        yield Hint("it is the same for another dout: dout is forgotten")


@guess("value")
def _lower_precision(f: Finding) -> Iterator[Hint]:
    if judge.largest(f.off) < 1e-5 * judge.largest(f.want):
        yield Hint("it is right but for rounding, which is not that of float64: backward computes in float32 somewhere")


@guess("value")
def _exchanged(f: Finding) -> Iterator[Hint]:
    parameters = subject.parameters(f.sample.layer)
    for other, grad in f.sample.truth.grads.items():
        alike = other != f.name and (other in parameters) == (f.name in parameters)
        if alike and grad is not None and judge.largest(grad) > 0 and _close(f.got, grad):
            yield Hint(f"it is the right one of {other}: are the two exchanged?")


@guess("value")
def _factor(f: Finding) -> Iterator[Hint]:
    """A constant factor, if it is a number of the example, or the same in every one."""
    clear = f.want.abs() > 1e-6 * max(judge.largest(f.want), 1e-12)
    if not clear.any() or not _close(f.got[~clear], f.want[~clear]):
        return
    ratios = f.got[clear] / f.want[clear]
    ratio = float(ratios.mean())
    if abs(ratio) < 1e-9 or abs(ratio - 1) < 1e-5 or judge.largest(ratios - ratio) > 1e-6 * abs(ratio):
        return
    if abs(ratio + 1) < 1e-9:
        yield Hint("the sign is wrong")
    else:
        meanings = [name for name, value in _numbers(f.sample).items() if abs(ratio - value) < 1e-6 * abs(value)]
        yield Hint(f"it is {ratio:.6g} times the right one", "ratio", (*meanings, f"{ratio:.6g}{ANYWHERE}"))


def _numbers(s: Sample) -> dict[str, float]:
    """Numbers of the example that a factor may stem from: sizes, n - 1, their inverses, lone parameters, options."""
    found: dict[str, float] = {}
    inputs, outs = subject.named("x", s.inputs), subject.named("out", s.douts)
    shapes = {x.shape for x in inputs.values()}
    for name, t in [*inputs.items(), *((name, t) for name, t in outs.items() if t.shape not in shapes)]:
        sizes = {f"{name}.shape[{i}]": n for i, n in enumerate(t.shape)}
        if t.dim() > 1:
            sizes |= {f"{name}.shape[:-1].numel()": t.shape[:-1].numel()}
        sizes[f"{name}.numel()"] = t.numel()
        for text, n in sizes.items():
            if n > 1:
                found |= {text: n, f"1/({text})": 1 / n, f"{text} - 1": n - 1, f"1/({text} - 1)": 1 / (n - 1)}
                found |= {f"n/(n - 1) for n = {text}": n / (n - 1), f"(n - 1)/n for n = {text}": (n - 1) / n}
    lone = {name: float(p) for name, p in subject.parameters(s.layer).items() if p.numel() == 1}
    for name, value in {**lone, **_options(s.layer, float)}.items():
        if value:
            found |= {name: value, f"1/{name}": 1 / value, f"{name}^2": value**2, f"sqrt({name})": abs(value) ** 0.5}
    return {name: value for name, value in found.items() if value not in (0, 1)}


def _options(layer: Any, *kinds: type) -> dict[str, Any]:
    """The attributes of the layer itself that are of one of these types, exactly."""
    attributes = getattr(subject.unwrap(layer), "__dict__", {})
    return {name: value for name, value in attributes.items() if type(value) in kinds and not name.startswith("_")}


# ---------------------------------------------------------------- wrong values: the right gradient of something else


@guess("value")
def _one_row(f: Finding) -> Iterator[Hint]:
    """Only one row's share of the dout arrived."""
    dout = f.dout
    for dim in range(0 if dout is None else dout.dim()):
        size = f.sample.douts[0].shape[dim]
        for word, index in (("first", 0), ("last", size - 1)):
            mask = torch.zeros_like(f.sample.douts[0])
            mask.select(dim, index).fill_(1)
            share = f.truth_with(douts=(f.sample.douts[0] * mask,)) if size > 2 else None
            if share is not None and judge.largest(share) > 0 and _close(f.got, share):
                yield Hint(f"it has the share of the {word} index of dout's dimension {dim} alone: add up all of them")
                return


@guess("value")
def _last_use(f: Finding) -> Iterator[Hint]:
    """Of equal indices, only the last use arrived."""
    s, dout = f.sample, f.dout
    integers = [x for x in s.inputs if not x.is_floating_point() and x.dtype is not torch.bool]
    if not integers or dout is None or dout.shape[: integers[0].dim()] != integers[0].shape:
        return
    flat, rows = integers[0].flatten(), dout.reshape(integers[0].numel(), -1)
    last = torch.tensor([bool((flat[i + 1 :] != flat[i]).all()) for i in range(len(flat))])
    share = f.truth_with(douts=((rows * last.unsqueeze(1)).view(dout.shape),))
    if share is not None and _close(f.got, share):
        yield Hint("of equal indices only the last one arrived: add them up (index_add_), do not assign")


@guess("value")
def _another_option(f: Finding) -> Iterator[Hint]:
    """It is the right gradient for another value of an attribute."""
    layer = f.sample.layer
    tried: list[tuple[str, Any]] = [(name, not value) for name, value in _options(layer, bool).items()]
    tried += [(name, new) for name, v in _options(layer, float).items() for new in (0.0, 1.0, -v) if new != v]
    tried += [(name, new) for name, v in _options(layer, int).items() for new in range(-3, 4) if new != v]
    for name, value in tried:
        twin = f.sample.copy()
        _set(twin, name, value)
        with contextlib.suppress(Exception):  # no such option
            other = f.truth_with(twin)
            if other is not None and _close(f.got, other) and not _close(f.want, other):
                mode = "in training" if value else "in evaluation"
                what = mode if name == "training" else f"for {name} = {value}"
                yield Hint(f"it is the right one {what}: backward does not go by {name}, as forward does", f"by {name}")
                return


@guess("value")
def _another_record(f: Finding) -> Iterator[Hint]:
    """It is right once another tensor stands where forward recorded one."""
    s = f.sample
    names = _names_of_records(s.layer)
    layer = subject.unwrap(s.layer)
    if not isinstance(layer, Layer):
        return
    saved = _recorded(s)
    labels = [names[i] if i < len(names) else f"recorded tensor {i}" for i in range(len(saved))]
    others = {**{n: t for n, t in zip(labels, saved) if isinstance(t, Tensor)}, **f.at_hand}
    for i, old in enumerate(saved):
        if not isinstance(old, Tensor):
            continue
        changed = {
            f"{n} in place of {labels[i]}": t for n, t in others.items() if t.shape == old.shape and n != labels[i]
        }
        if old.dtype is torch.bool:
            changed = {f"{labels[i]} turned round (~{labels[i]})": ~old}
        elif old.dim() == 2 and old.shape[0] == old.shape[1]:
            changed[f"{labels[i]} transposed"] = old.t()
        for text, new in changed.items():
            if new.dtype is old.dtype and not judge.identical(new, old) and _right_with(f, i, new):
                yield Hint(f"it is right with {text} in what backward reads")
                return


def _recorded(s: Sample) -> tuple[Any, ...]:
    """What the layer's own forward saves."""
    twin = s.copy()
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
    records = subject.unwrap(twin)._records
    return tuple(records[-1][0]) if records else ()


def _right_with(f: Finding, i: int, new: Tensor) -> bool:
    """Whether the gradient is right where backward finds `new` as the i-th thing that was saved."""
    s, twin = f.sample, f.sample.copy()
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
        records = subject.unwrap(twin)._records
        saved, _, *rest = records[-1]
        records[-1] = ((*saved[:i], new.clone(), *saved[i + 1 :]), [], *rest)
        try:
            grads = {**subject.backward(twin, s.inputs, s.douts), **subject.gradients(twin)}
        except CheckFailure:
            return False
    got = grads.get(f.name)
    return got is not None and _close(got, f.want)


def _names_of_records(layer: Any) -> list[str]:
    """What backward calls the things that it pops, as its source has them: ``x, mask = self.pop(dout)``."""
    try:
        source = inspect.getsource(type(subject.unwrap(layer)).backward)
    except (OSError, TypeError):
        return []
    match = re.search(r"\(?([\w, ]+?),?\)? = self\.pop\(", source)
    return [name.strip() for name in match[1].split(",")] if match else []


@guess("value")
def _own_element_alone(f: Finding) -> Iterator[Hint]:
    """It has the diagonal of the Jacobian only."""
    x = dict(zip(subject.input_names(f.sample.layer, f.sample.inputs), f.sample.inputs)).get(f.name)
    dout = f.dout
    if x is None or dout is None or x.shape != dout.shape or not 1 < x.numel() <= FEW:
        return
    diagonal = torch.zeros_like(x)
    for i in range(x.numel()):
        one = torch.zeros_like(dout)
        one.view(-1)[i] = dout.flatten()[i]
        share = f.truth_with(douts=(one,))
        if share is None:
            return
        diagonal.view(-1)[i] = share.flatten()[i]
    if _close(f.got, diagonal) and _various(diagonal):
        yield Hint("it has what each x does to its own out; what it does to the others is missing, a sum over them")


# ---------------------------------------------------------------- wrong values: what would make it right


@guess("value")
def _times(f: Finding) -> Iterator[Hint]:
    """A tensor at hand is missing as a factor, or one too many."""
    for name, t in _formulas(f):
        if _broadcast(t, f.want) is None or not _various(t):
            continue
        if _close(f.got * t, f.want):
            yield Hint(f"times {name} it is right: that factor is missing")
            return
        if _close(f.want * t, f.got):
            yield Hint(f"divided by {name} it is right: that factor is one too many")
            return


@guess("value")
def _plus(f: Finding) -> Iterator[Hint]:
    """A term made of dout and a tensor at hand is missing, or one too many."""
    dout = f.dout
    if dout is None or dout.shape != f.want.shape:
        return
    for name, t in [("dout", torch.ones(())), *((f"dout * {name}", t) for name, t in _formulas(f))]:
        if _broadcast(t, f.want) is None or judge.largest(dout * t) == 0:
            continue
        for verb, sign in (("plus", -1), ("minus", 1)):
            if _close(f.off, sign * dout * t, judge.largest(f.want)) and not _close(f.off, 0 * f.off):
                yield Hint(f"{verb} {name} it is right")
                return


def _formulas(f: Finding) -> Iterator[tuple[str, Tensor]]:
    """Tensors at hand, and what is often made of one."""
    for name, t in f.at_hand.items():
        yield name, t
        yield f"(1 - {name})", 1 - t
        yield f"{name}^2", t * t
        yield f"(1 - {name}^2)", 1 - t * t
        yield f"{name} (1 - {name})", t * (1 - t)


@guess("value")
def _right_when(f: Finding) -> Iterator[Hint]:
    """The failure goes away for a plain value of a parameter or option: then backward gets that one wrong."""
    layer = f.sample.layer
    tried: list[tuple[str, Any]] = [(name, v) for name in subject.parameters(layer) for v in (1.0, 0.0)]
    tried += [(name, v) for name in _options(layer, float) for v in (0.0, 1.0)]
    tried += [(name, not value) for name, value in _options(layer, bool).items() if name != "training"]
    done: set[str] = set()
    for name, value in tried:
        twin = f.sample.copy()
        if name in done or not _set(twin, name, value):
            continue
        with contextlib.suppress(CheckFailure):
            if f.is_right_in(twin):
                done.add(name)
                text = f"it is right when {name} = {value if isinstance(value, bool) else f'{value:g}'}"
                yield Hint(f"{text}: look for the mistake where {name} is used, or should be")


# ---------------------------------------------------------------- wrong values: where, and along which dimension


@guess("value in part")
def _same_along_a_dimension(f: Finding) -> Iterator[Hint]:
    """The mark of a wrong sum: along a dimension it is off by one number, or by one times x or out."""
    one = torch.ones_like(f.off)
    alike = {name: t for name, t in f.at_hand.items() if t.shape == f.off.shape}
    candidates = [("the same amount", [one]), *((f"a multiple of {name}", [t]) for name, t in alike.items())]
    candidates += [(f"a constant and a multiple of {name}", [one, t]) for name, t in alike.items()]
    for what, bases in candidates:
        # any two numbers are multiples of any other two, and any three with a constant added
        long = [dim for dim, size in enumerate(f.off.shape) if size > len(bases) + 1]
        dims = [str(dim) for dim in long if _close(f.off, _fitted(f.off, bases, dim), judge.largest(f.off))]
        if dims:
            text = (
                f"it is off by {what} all along dimension {' and '.join(dims)}: a sum or mean over it is missing, or "
            )
            yield Hint(f"{text}not right{', or two: those of a mean and a variance' if len(bases) > 1 else ''}", what)
            return


def _fitted(off: Tensor, bases: list[Tensor], dim: int) -> Tensor:
    """The combination of the bases that is nearest to `off`, with factors of its own along each line of `dim`."""
    lines = off.movedim(dim, -1).reshape(-1, off.shape[dim], 1)
    columns = torch.stack([b.movedim(dim, -1).reshape(-1, off.shape[dim]) for b in bases], -1)
    fitted: Tensor = columns @ torch.linalg.pinv(columns) @ lines
    return fitted.view(off.movedim(dim, -1).shape).movedim(-1, dim)


@guess("value in part")
def _sum_over_another_dimension(f: Finding) -> Iterator[Hint]:
    """Off by a number per row and one per column: one sum is there too often, and another one is missing."""
    if f.off.dim() != 2 or min(f.off.shape) < 3:
        return
    for base in (torch.ones_like(f.off), *f.at_hand.values()):
        if base.shape == f.off.shape and bool((base.abs() > 1e-3).all()):
            share = f.off / base
            rows, columns = share - share.mean(0), share - share.mean(1, keepdim=True)
            rest, size = rows + columns - share + share.mean(), judge.largest(share)
            if (
                _close(rest, 0 * rest, size)
                and not _close(rows, 0 * rows, size)
                and not _close(columns, 0 * rest, size)
            ):
                yield Hint("a sum or mean in it runs over the wrong dimension", "wrong dimension")
                return


@guess("value in part")
def _identity(f: Finding) -> Iterator[Hint]:
    for name, dout in subject.named("dout", f.sample.douts).items():
        if f.got.shape == dout.shape and _various(dout) and _close(f.got, dout):
            yield Hint(f"it equals {name}: as if the layer were the identity")


@guess("value in part")
def _only_where(f: Finding) -> Iterator[Hint]:
    """Exactly the elements are wrong of which something at hand is positive, negative or zero."""
    bad = f.off.abs() > 1e-9 * max(judge.largest(f.want), 1e-3)
    matters = (f.want != 0) | bad  # where dout is 0, every gradient is right
    for name, t in f.at_hand.items():
        if t.shape != bad.shape:
            continue
        for word, where in (("> 0", t > 0), ("< 0", t < 0), ("= 0", t == 0)):
            if judge.identical(bad & matters, where & matters) and where.any() and not (where | ~matters).all():
                yield Hint(f"it is wrong where {name} {word}, everywhere there and only there")
                return


@guess("value in part")
def _only_some_indices(f: Finding) -> Iterator[Hint]:
    """It is wrong at one index of a dimension, or from one on."""
    bad = f.off.abs() > 1e-9 * max(judge.largest(f.want), 1e-3)
    for dim in range(bad.dim()):
        size = bad.shape[dim]
        hit = bad.movedim(dim, 0).reshape(size, -1).any(1)
        first, last = (int(hit.nonzero()[k]) for k in (0, -1))
        if first == last and size > 2 and (bad.dim() == 1 or bad.sum() > 1):
            where = "the last index" if last == size - 1 else f"index {first}"
            yield Hint(f"it is wrong only at {where} of dimension {dim}", f"only at one of {dim}")
        elif size > FEW and first > 1 and hit[first:].all():
            yield Hint(
                f"it is right up to index {first - 1} of dimension {dim}, and wrong from there on", "from one on"
            )


# ---------------------------------------------------------------- what all of them share


def _close(a: Tensor, b: Tensor, scale: float = 0.0) -> bool:
    """Whether two tensors agree; not where one of them is not finite, which compares with nothing."""
    if a.shape != b.shape or not torch.isfinite(a).all() or not torch.isfinite(b).all():
        return False
    return judge.largest(a - b) <= 1e-9 * max(judge.largest(b), scale, 1e-3)


def _various(t: Tensor) -> bool:
    """Whether it has two different numbers beside 0 and 1, so that what it agrees with is no accident."""
    numbers = t[(t != 0) & (t != 1)].abs()
    return numbers.numel() > 1 and bool((numbers != numbers[0]).any())


def _broadcast(t: Tensor, like: Tensor) -> Tensor | None:
    try:
        return t.expand_as(like)
    except RuntimeError:
        return None


def _set(layer: Any, name: str, value: Any) -> bool:
    """Give a parameter or an attribute another value; whether it is another one."""
    params = subject.parameters(layer)
    if name in params:
        if params[name].numel() == 0 or bool((params[name] == value).all()):
            return False
        params[name].fill_(value)
    elif name == "training":
        subject.set_mode(layer, value)
    elif getattr(subject.unwrap(layer), name) == value:
        return False
    else:
        setattr(subject.unwrap(layer), name, value)
    return True
