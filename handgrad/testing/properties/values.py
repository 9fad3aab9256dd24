"""The properties that compare values with an oracle."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from handgrad.errors import HandgradError
from handgrad.layer import Layer
from handgrad.losses.loss import Loss
from handgrad.testing import judge, rounding, subject
from handgrad.testing.errors import ContractError, GradientMismatch, LayerCrash, OutputMismatch
from handgrad.testing.registry import NotApplicable, prop
from handgrad.testing.sample import Sample


@prop(1, "gradients", examples=60, first=True)
def assert_gradients(s: Sample) -> None:
    """The gradients of x and of every parameter: there, of the exact shape and dtype, and right.

    The values are judged in float64, within 1e-9 of the tensor's scale. A backward that takes `need_dx` must give the
    parameters the same gradients when dx is declined. A forward that computes in float32 on purpose does so in float64
    here; in the precision that it asks for itself, shapes and dtypes must be right, too.
    """
    try:
        _assert_true(s)
    except GradientMismatch:
        if s.suspects_oracle:  # a wrong oracle must not be laid at backward's door
            s.oracle.police(s.layer, s.inputs, s.douts, s.truth, s.seed)
        raise
    if s.policed:
        s.oracle.police(s.layer, s.inputs, s.douts, s.truth, s.seed)
    if getattr(s.layer, "lowers", None):
        _assert_right_as_it_is(s)
    if isinstance(subject.unwrap(s.layer), Loss) and s.douts[0].dim() == 0:
        twin = s.copy()
        with subject.recording(s.seed):
            subject.forward(twin, s.inputs)
            dx = twin.unpack(subject.unwrap(twin).backward())
        got = {**subject.named_dx(twin, s.inputs, dx), **subject.gradients(twin)}
        want = s.run(douts=(torch.ones_like(s.douts[0]),)).grads
        judge.judge(got, want, s.same_code, " for backward() without dout, which means 1")
    if getattr(subject.unwrap(s.layer), "takes_need_dx", False):
        twin = s.copy()
        with subject.recording(s.seed):
            subject.forward(twin, s.inputs)
            subject.raw_backward(twin, s.inputs, s.douts, need_dx=False)
        own = {name: s.result.grads[name] for name in subject.parameters(twin)}
        judge.judge(subject.gradients(twin), own, s.same_code, " when dx is declined (need_dx=False)")


def _assert_true(s: Sample) -> None:
    judge.judge(s.result.grads, s.truth.grads, s.truth.limit(judge.AGAINST_ORACLE, s.floor))


def _assert_right_as_it_is(s: Sample) -> None:
    """In its own lower precision, gradients have the shape and dtype they have in float64; `dtypes` judges values."""
    lower = str(s.layer.lowers).removeprefix("torch.")
    judge.remark(f"forward computes in {lower} inside: here in float64, where rounding hides nothing; P9 has {lower}")
    got = subject.run(subject.as_it_is(s.layer), s.inputs, s.douts, s.seed).grads
    text = f" computed in {lower}, as forward asks for (only shape and dtype count)"
    judge.judge(got, s.result.grads, lambda name, got, want: torch.full_like(want, torch.inf), text)


@prop(6, "linearity")
def assert_linearity(s: Sample) -> None:
    """The backward is linear in dout: it scales, it adds, and it sends an exact zero back as an exact zero."""
    limit = judge.within(judge.AGAINST_ORACLE, s.floor)
    base = s.result.grads
    scaled = s.run(douts=tuple(-2.5 * d for d in s.douts)).grads
    want = _each(lambda g: -2.5 * g, base)
    judge.judge(scaled, want, limit, " for -2.5 dout (it must be -2.5 times that for dout)")
    generator = torch.Generator().manual_seed(s.seed)
    more = tuple(torch.randn(d.shape, dtype=d.dtype, generator=generator) for d in s.douts)
    second = s.run(douts=more).grads
    both = s.run(douts=tuple(d + m for d, m in zip(s.douts, more))).grads
    sums = {name: judge.plus(g, second[name]) for name, g in base.items()}
    judge.judge(both, sums, limit, " for the sum of two douts (it must be the sum of both)")
    nothing = s.run(douts=tuple(torch.zeros_like(d) for d in s.douts)).grads
    judge.judge(nothing, _each(torch.zeros_like, base), judge.exactly, " for a dout of zeros (it must be 0)")


@prop(8, "edges", examples=25, draws="edges")
def assert_edges(s: Sample) -> None:
    """Sizes 0 and 1 work, with zero gradients where there is nothing; or are refused by name and shape."""
    try:
        result = s.result
    except LayerCrash as crash:
        if is_refusal(s.layer, s.inputs, crash):
            judge.compared(1)
            return
        raise
    if all(d.numel() == 0 for d in s.douts):
        have_gradients = {**subject.differentiable(s.layer, s.inputs), **subject.parameters(s.layer)}
        zeros = {n: None if s.truth.grads.get(n) is None else torch.zeros_like(t) for n, t in have_gradients.items()}
        judge.judge(result.grads, zeros, judge.exactly, " for an output without elements (it must be exact zeros)")
    else:
        _assert_true(s)
    for name, value in result.buffers.items():
        if not torch.isfinite(value.double()).all():
            raise OutputMismatch(f"buffer {name} is not finite after forward: {judge.describe(value)}", tensor=name)
    judge.compared(1)


def is_refusal(layer: Any, inputs: tuple[Any, ...], crash: LayerCrash) -> bool:
    """Whether forward refused a size of 0 or 1 as it should: a ValueError that names the layer and the shape."""
    cause = crash.__cause__
    if crash.details["method"] != "forward" or not isinstance(cause, (HandgradError, ValueError)):
        return False
    if min((size for x in inputs if isinstance(x, Tensor) for size in x.shape), default=2) > 1:
        return False
    named = any(type(inner).__name__ in str(cause) for _, inner in subject.named_layers(layer))
    return named and re.search(r"\((\d+,|\d+(, \d+)+)?\)", str(cause)) is not None  # a shape


def how_to_refuse(layer: Any, crash: LayerCrash) -> list[str]:
    """What to tell the author of a layer that crashed on an input with a size of 0 or 1."""
    shapes = [tuple(x.shape) for x in crash.details["inputs"] if isinstance(x, Tensor)]
    few = min((size for shape in shapes for size in shape), default=2)
    if few > 1:
        return []
    shape = next(shape for shape in shapes if few in shape)
    rows = "1 row" if few == 0 else "2 rows"
    begin = (
        'self.error(ShapeError, "forward", f"' if isinstance(subject.unwrap(layer), Layer) else 'ValueError(f"Mine: '
    )
    return [
        f"  If the layer cannot take a size of {few}, as in this input of shape {shape}, its forward must refuse it by "
        "name and shape,",
        f'  before anything is recorded: raise {begin}x must have at least {rows}, got {{tuple(x.shape)}}")',
        f'  If such inputs never come: sizes={{"N": ({few + 1}, 4)}}, or skip={{"edges": "why they never come"}}.',
    ]


SATURATED = 64  # floors are 1e-3 of what is summed up; in float32 a saturated slope makes errors of a few percent of it


@prop(9, "dtypes", examples=25)
def assert_dtypes(s: Sample) -> None:
    """In float32 everything stays float32, and is as near to the float64 truth as autograd's float32 is.

    err32(by hand) may be 4 err32(autograd) + 16 eps32 S, both against the oracle in float64; 1e-3 S where finite
    differences judge.
    """
    (example,) = rounding.in_float32(s)
    layer, inputs, douts = example
    got = subject.run(layer, inputs, douts, s.seed)
    kept = subject.buffers(layer)
    for name, tensor in {**got.outs, **got.buffers, **got.grads}.items():
        wanted = kept[name].dtype if name in kept else torch.float32
        if tensor is not None and tensor.is_floating_point() and tensor.dtype is not wanted:
            raise ContractError(f"{name} is {tensor.dtype} in a layer of {wanted}", tensor=name)
    truth, error = rounding.oracle_error(s, example)
    eps = torch.finfo(getattr(s.layer, "lowers", None) or torch.float32).eps
    want = {**truth.outs, **truth.grads}
    ours = _each(lambda t: t.to(torch.float64) if t.is_floating_point() else t, {**got.outs, **got.grads})
    text = " in float32 (allowed: 4 times autograd's own float32 error + 16 eps)"
    # An out may be what is left of larger numbers, which the oracle may have added up in another, luckier order; and a
    # saturated slope is what 1 - out leaves, with the rounding of 1, which the oracle may have from the exponential.
    size = max(map(judge.largest, (*inputs, *subject.parameters(layer).values())), default=0.0)

    def floor(name: str) -> float:
        return size if name in truth.outs else SATURATED * s.floor(name)

    try:
        judge.judge(ours, want, rounding.float32_limit(error, floor, eps), text)
    except GradientMismatch:
        # err32 of one run is one draw of a random quantity, and can be 0 by luck where the backward's, no larger in
        # general, is not. So before a failure is one, the yardstick becomes the worst of nine draws. The 16 eps stay.
        for variant in rounding.in_float32(s, variants=8):
            error = {n: max(error[n], e) for n, e in rounding.oracle_error(s, variant)[1].items()}
        judge.judge(ours, want, rounding.float32_limit(error, floor, eps), text)


@prop(10, "state")
def assert_state(s: Sample) -> None:
    """Outputs and buffers, step after step, are the reference's; without one, the same calls give the same."""
    call, owner = s.oracle.bind(s.layer)
    twin = s.copy()
    sizes = map(judge.largest, (*s.inputs, *s.other_inputs, *subject.parameters(s.layer).values()))
    limit = judge.within(judge.AGAINST_ORACLE, 1e-3 * max(sizes, default=0.0))
    batches = (s.inputs, s.other_inputs, s.inputs)
    with subject.private_rng(s.seed), torch.no_grad():
        states = []
        for inputs in batches:
            outs = subject.forward(twin, inputs)
            states.append((subject.named("out", outs), subject.copies(subject.buffers(twin))))
    with subject.private_rng(s.seed), torch.no_grad():
        for number, (inputs, (ours, buffers)) in enumerate(zip(batches, states), 1):
            theirs = call(*inputs)
            if [o.shape for o in theirs] != [o.shape for o in ours.values()]:
                raise OutputMismatch(
                    f"out has the wrong shape: {[tuple(o.shape) for o in ours.values()]}, the reference gives "
                    f"{[tuple(o.shape) for o in theirs]}",
                    tensor="out",
                )
            where = f" in forward number {number}"
            judge.judge(ours, subject.named("out", theirs), limit, where, OutputMismatch)
            if s.oracle.keeps_buffers or not s.oracle.independent:
                known = {name: b for name, b in subject.buffers(owner).items() if name in buffers}
                judge.judge(buffers, known, limit, f" after forward number {number}", OutputMismatch)


@prop(11, "special", examples=30, draws="special")
def assert_special(s: Sample) -> None:
    """At 0, at kinks, far out, in constant columns, at extreme indices: finite where the oracle is, and as precise.

    Judged element by element: 1e-9 of the element, plus 1e-12 of the tensor's scale for cancellation.
    """
    want = _each(Tensor.clone, s.truth.grads)
    if s.kinks:
        x, dout, dx = s.inputs[0], s.douts[0], want.get("dx")  # one of several inputs has another name
        if dx is None or x.shape != dout.shape:
            raise NotApplicable("kinks= describes an elementwise layer of one input")
        for place, slope in s.kinks.items():
            if slope is not None:
                dx[x == place] = slope * dout[x == place]

    def limit(name: str, got: Tensor, want: Tensor) -> Tensor:
        if s.truth.source == "finite differences":
            return s.truth.limit(1, s.floor)(name, got, want)
        return s.same_code(name, got, want) + 1e-9 * want.abs()

    ours = dict(s.result.grads)
    for name, reference in want.items():
        mine = ours.get(name)
        if reference is not None and mine is not None and mine.shape == reference.shape:
            ours[name] = torch.where(torch.isfinite(reference), mine, reference)
    judge.judge(ours, want, limit, " at special values")


def _each(function: Callable[[Tensor], Tensor], grads: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if g is None else function(g) for name, g in grads.items()}
