"""Cheap tests that guess what a wrong gradient lacks. Each is tried on a failing example, and may be silent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer
from handgrad.testing import judge, subject
from handgrad.testing.errors import CheckFailure
from handgrad.testing.sample import Sample


@dataclass(frozen=True)
class Hint:
    """A guess at the mistake, made of one example. Guesses of one kind say the same of two examples."""

    text: str
    kind: str = ""  # where the text names numbers of its example
    meanings: tuple[str, ...] = ()  # what the number in the text may stem from
    weak: bool = False  # a small example can show it by accident: said only where all richer ones show it, too

    @property
    def key(self) -> str:
        """What is the same in another example."""
        return self.kind or self.text

    def also(self, other: Hint) -> Hint:
        """The same hint with only the meanings that the other one has, too."""
        return replace(self, meanings=tuple(m for m in self.meanings if m in other.meanings))

    def __str__(self) -> str:
        return f"{self.text}, which is {' or '.join(self.meanings[:3])}" if self.meanings else self.text


def agreed(shown: Sequence[Hint], others: Mapping[str, Sequence[Hint]]) -> list[str]:
    """What to say of the example shown, which is the smallest, after a look at richer ones that fail as well.

    A hint that the richer ones give, too, is said with the meanings that hold in all of them. A hint that only they
    give is said with the name of the first. A hint that only the smallest gives may come from its being so small: it
    is said where there is no other, and never if it is weak.
    """
    known: dict[str, tuple[str, Hint]] = {}
    for name, found in others.items():
        for hint in found:
            first, same = known.get(hint.key, (name, hint))
            known[hint.key] = (first, same.also(hint))
    everywhere = [{hint.key for hint in found} for found in others.values()]
    known = {k: (n, h) for k, (n, h) in known.items() if not h.weak or all(k in keys for keys in everywhere)}
    lines = [str(hint.also(known.pop(hint.key)[1])) for hint in shown if hint.key in known]
    lines += [f"on another example, {name}: {hint}" for name, hint in known.values()]
    return lines or [str(hint) for hint in shown if not hint.weak]


def hints(s: Sample, details: dict[str, Any]) -> list[Hint]:
    """Guesses at what a failure with these details lacks; the most telling first."""
    got, want = details.get("got"), details.get("want")
    found: list[Hint] = []
    if isinstance(got, Tensor) and isinstance(want, Tensor) and got.is_floating_point():
        if got.shape == want.shape:
            if details.get("property") == "accumulation":
                found += _latest_alone(s, details)
            else:
                found += [*_special(s, got, want), *_exchanged(s, details["tensor"], got, want)]
                found += [*_ratio(s, got, want), *_last_use(s, details)]
                found += [*_difference(got, want), *_proportional(s, got, want)]
        else:
            found += _shape(s, details["tensor"], got, want)
    elif isinstance(want, Tensor) and got is None and details.get("tensor") in subject.parameters(s.layer):
        found.append(Hint("backward never adds to it: add_grad(parameter, gradient)"))
    elif isinstance(got, Tensor) and want is None and details.get("tensor") in subject.frozen(s.layer):
        found.append(Hint("it is frozen: add_grad(parameter, gradient) passes it over, writing to .grad does not"))
    if details.get("property") == "gradients":
        found = [*_order_of_uses(s), *found, *_passes_when(s, details)]
    return found


def _special(s: Sample, got: Tensor, want: Tensor) -> Iterator[Hint]:
    if not torch.isfinite(got).all() and torch.isfinite(want).all():
        yield Hint("not finite where the right gradient is")
    elif judge.largest(got) == 0 and judge.largest(want) > 0:
        yield Hint("backward gives zeros everywhere", weak=True)
    elif got.dim() == 2 and got.shape[0] == got.shape[1] and got.shape[0] > 1 and _close(got.t(), want):
        yield Hint("it is the transpose of the right one")
    for name, dout in subject.named("dout", s.douts).items():
        if dout.shape == got.shape and _close(got, dout) and not _close(want, dout):
            yield Hint(f"it equals {name}: as if the layer were the identity")
        elif dout.shape == got.shape[: dout.dim()] and not _close(got, want):
            factor = dout.reshape(*dout.shape, *[1] * (got.dim() - dout.dim()))
            if _close(got * factor, want):
                yield Hint(f"times {name} it is right: {name} is forgotten")


def _exchanged(s: Sample, name: str, got: Tensor, want: Tensor) -> Iterator[Hint]:
    """Whether it is another tensor's gradient."""
    for other, grad in s.truth.grads.items():
        if other == name or grad is None or judge.largest(grad) == 0:
            continue
        if _close(got, grad) and not _close(want, grad):
            yield Hint(f"it is the right one of {other}: are the two exchanged?")


def _ratio(s: Sample, got: Tensor, want: Tensor) -> Iterator[Hint]:
    """A constant factor between the two, and what it equals."""
    clear = want.abs() > 1e-6 * max(judge.largest(want), 1e-12)
    if not clear.any() or not _close(got[~clear], want[~clear]):
        return
    ratios = got[clear] / want[clear]
    ratio = float(ratios.mean())
    if (
        not torch.isfinite(ratios).all()
        or judge.largest(ratios - ratio) > 1e-6 * abs(ratio)
        or ratio == 0
        or abs(ratio - 1) < 1e-9
    ):
        return
    if abs(ratio + 1) < 1e-9:
        yield Hint("the sign is wrong")
        return
    meanings = tuple(name for name, value in _numbers(s).items() if abs(ratio - value) < 1e-6 * abs(value))
    if meanings or int(clear.sum()) > 1:  # any two numbers have some ratio
        yield Hint(f"it is {ratio:.6g} times the right one", "ratio", meanings)


def _numbers(s: Sample) -> dict[str, float]:
    """Numbers of the example that a factor may stem from: sizes, n - 1, their inverses, lone parameters."""
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
    for name, p in subject.parameters(s.layer).items():
        if p.numel() == 1 and float(p) != 0:
            found |= {name: float(p), f"1/{name}": 1 / float(p), f"{name}^2": float(p) ** 2}
    return {name: value for name, value in found.items() if value not in (0, 1)} | {"a factor 2": 2.0, "1/2": 0.5}


def _difference(got: Tensor, want: Tensor) -> Iterator[Hint]:
    """Where the two differ, and whether a mean or a sum is missing."""
    off = got - want
    bad = off.abs() > 1e-9 * max(judge.largest(want), 1e-3)
    for dim in range(got.dim()):
        size = got.shape[dim]
        if size < 2 or not bad.any():
            continue
        flat = bad.movedim(dim, 0).reshape(size, -1)
        spread = off - off.mean(dim, keepdim=True)
        if judge.largest(spread) < 1e-9 * judge.largest(off):
            text = f"it is off by the same amount all along dimension {dim}: a sum or mean over it is missing"
            yield Hint(text, "missing sum")
        hit = flat.any(1)
        if int(hit.sum()) == 1 and size > 2:
            text = f"it is wrong only at index {int(hit.nonzero()[0])} of dimension {dim}"
            yield Hint(text, "one index")


def _proportional(s: Sample, got: Tensor, want: Tensor) -> Iterator[Hint]:
    """Whether the error is x or out, times one factor per row: the mark of a forgotten path through a reduction."""
    off = got - want
    for name, base in {**s.result.outs, **subject.named("x", s.inputs)}.items():
        if base.shape != off.shape or not base.is_floating_point() or not off.dim() or judge.largest(off) == 0:
            continue
        for dim in range(off.dim()):
            if off.shape[dim] < 2:
                continue
            squares = (base * base).sum(dim, keepdim=True).clamp(min=1e-300)
            factor = (off * base).sum(dim, keepdim=True) / squares
            if judge.largest(off - factor * base) < 1e-9 * judge.largest(off):
                text = f"it is off by a multiple of {name} along dimension {dim}: a path through a sum is missing"
                yield Hint(text, f"multiple of {name}")


def _latest_alone(s: Sample, details: dict[str, Any]) -> Iterator[Hint]:
    """Whether only one backward's gradient is there."""
    alone = s.result.grads.get(details["tensor"])
    if alone is not None and _close(details["got"], alone):
        yield Hint("it holds the latest gradient alone: backward assigns .grad where it must add (add_grad does)")


def _last_use(s: Sample, details: dict[str, Any]) -> Iterator[Hint]:
    """With equal indices, whether only their last use arrived."""
    integers = [x for x in s.inputs if not x.is_floating_point() and x.dtype is not torch.bool]
    name, got = details["tensor"], details["got"]
    if not integers or len(s.douts) != 1 or name not in s.truth.grads:
        return
    x, dout = integers[0], s.douts[0]
    if dout.shape[: x.dim()] != x.shape:
        return
    flat, rows = x.flatten(), dout.reshape(x.numel(), -1)
    last = torch.tensor([bool((flat[i + 1 :] != flat[i]).all()) for i in range(len(flat))])
    only_last = (rows * last.unsqueeze(1)).view(dout.shape)
    truth = s.oracle.truth(s.layer, s.inputs, (only_last,), s.seed).grads[name]
    if truth is not None and _close(got, truth):
        yield Hint("of equal indices only the last one arrived: add them up (index_add_), do not assign")


def _order_of_uses(s: Sample) -> Iterator[Hint]:
    """Whether all is right once the layers that forward uses several times give their records in the other order."""
    twin = s.copy()
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
        inside = [(path, layer) for path, layer in subject.named_layers(twin) if isinstance(layer, Layer)]
        several = [(path, layer, len(layer._records)) for path, layer in inside if len(layer._records) > 1]
        if not several:
            return
        for _, layer, _ in several:
            layer._records.reverse()
        try:
            got = {**subject.backward(twin, s.inputs, s.douts), **subject.gradients(twin)}
        except CheckFailure:
            return
    pairs = [(got[n], g) for n, g in s.truth.grads.items()]
    if all(mine is not None and _close(mine, g) for mine, g in pairs if g is not None):
        path, layer, uses = several[0]
        yield Hint(
            f"forward uses {path} ({type(layer).__name__}) {uses} times, and it is right when the first backward takes "
            "the first of its records: run the backwards in reverse, that of the last use first"
        )


def _shape(s: Sample, name: str, got: Tensor, want: Tensor) -> Iterator[Hint]:
    if got.dim() == want.dim() == 2 and got.shape == want.t().shape:
        yield Hint("it is transposed")
    elif got.numel() == want.numel():
        yield Hint(f"the elements are as many: a reshape to {tuple(want.shape)} is missing", "reshape")
    elif got.dim() >= want.dim() and got.shape in {dout.shape for dout in s.douts}:
        shape, x = tuple(want.shape), name.removeprefix("d")
        text = f"{x} was broadcast on the way to out, so its gradient must be summed back to {shape}"
        yield Hint(text, "broadcast")


def _passes_when(s: Sample, details: dict[str, Any]) -> Iterator[Hint]:
    """Whether the failure goes away for plain parameters: then backward forgets that parameter."""
    for name, param in subject.parameters(s.layer).items():
        for value in (1.0, 0.0):
            if param.numel() == 0 or bool((param == value).all()):
                continue
            twin = s.copy()
            subject.parameters(twin)[name].fill_(value)
            try:
                other = s.with_layer(twin)
                got, want = other.result.grads[details["tensor"]], other.truth.grads[details["tensor"]]
            except (CheckFailure, KeyError):
                continue
            if got is not None and want is not None and judge.largest(want) > 0 and _close(got, want):
                text = f"it is right when {name} = {value:g}: look for the mistake where {name} is used, or should be"
                yield Hint(text, weak=True)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and judge.largest(a - b) <= 1e-9 * max(judge.largest(b), 1e-3)
