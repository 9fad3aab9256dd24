"""The properties that compare values with an oracle."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from handgrad.errors import HandgradError
from handgrad.losses.loss import Loss
from handgrad.testing import calls, judge, subject
from handgrad.testing.errors import ContractError, GradientMismatch, LayerCrash, OutputMismatch
from handgrad.testing.sample import NotApplicable, Sample, prop

F32 = torch.finfo(torch.float32).eps


@prop(1, "gradients")
def assert_gradients(s: Sample) -> None:
    """The gradients of x and of every parameter: there, of the exact shape and dtype, and right.

    The values are judged in float64, within 1e-9 of the tensor's scale. A backward that takes `need_dx` must give the
    parameters the same gradients when dx is declined.
    """
    try:
        judge.judge(s.result.grads, s.truth.result.grads, s.truth.limit(judge.AGAINST_ORACLE, s.floor))
    except GradientMismatch:
        if s.suspects_oracle:  # a wrong oracle must not be laid at backward's door
            s.oracle.police(s.layer, s.inputs, s.douts, s.truth, s.seed)
        raise
    if s.policed:
        s.oracle.police(s.layer, s.inputs, s.douts, s.truth, s.seed)
    if isinstance(s.layer, Loss) and s.douts[0].dim() == 0:
        twin = s.copy()
        with subject.private_rng(s.seed), torch.enable_grad():
            calls.forward(twin, s.inputs)
            dx = twin.backward()
        want = calls.run(s.layer, s.inputs, (torch.ones_like(s.douts[0]),), s.seed).grads
        got = {**calls.structure(twin, s.inputs, dx), **calls.gradients(twin)}
        judge.judge(got, want, judge.within(judge.SAME_CODE, s.floor), " for backward() without dout, which means 1")
    if getattr(subject.unwrap(s.layer), "takes_need_dx", False):
        twin = s.copy()
        with subject.private_rng(s.seed), torch.enable_grad():
            calls.forward(twin, s.inputs)
            calls.backward(twin, s.inputs, s.douts, need_dx=False)
        own = {name: s.result.grads[name] for name in subject.parameters(twin)}
        limit = judge.within(judge.SAME_CODE, s.floor)
        judge.judge(calls.gradients(twin), own, limit, " when dx is declined (need_dx=False)")


@prop(6, "linearity")
def assert_linearity(s: Sample) -> None:
    """The backward is linear in dout: it scales, it adds, and it sends an exact zero back as an exact zero."""
    limit = judge.within(judge.AGAINST_ORACLE, s.floor)
    base = s.result.grads
    scaled = calls.run(s.layer, s.inputs, tuple(-2.5 * d for d in s.douts), s.seed).grads
    judge.judge(scaled, _map(lambda g: -2.5 * g, base), limit, " for -2.5 dout (it must be -2.5 times that for dout)")
    generator = torch.Generator().manual_seed(s.seed)
    more = tuple(torch.randn(d.shape, dtype=d.dtype, generator=generator) for d in s.douts)
    second = calls.run(s.layer, s.inputs, more, s.seed).grads
    both = calls.run(s.layer, s.inputs, tuple(d + m for d, m in zip(s.douts, more)), s.seed).grads
    sums = {name: _plus(g, second[name]) for name, g in base.items()}
    judge.judge(both, sums, limit, " for the sum of two douts (it must be the sum of both)")
    nothing = calls.run(s.layer, s.inputs, tuple(torch.zeros_like(d) for d in s.douts), s.seed).grads
    zeros = _map(torch.zeros_like, base)
    judge.judge(nothing, zeros, lambda name, got, want: torch.zeros_like(want), " for a dout of zeros (it must be 0)")


@prop(8, "edges")
def assert_edges(s: Sample) -> None:
    """Sizes 0 and 1 work, with zero gradients where there is nothing; or are refused by name and shape."""
    try:
        result = s.result
    except LayerCrash as crash:
        if is_refusal(s.layer, s.inputs, crash):
            judge.note(1)
            return
        raise
    if all(d.numel() == 0 for d in s.douts):
        zeros = {n: torch.zeros_like(t) for n, t in (calls.differentiable(s.layer, s.inputs) | _params(s)).items()}
        exactly = " for an output without elements (it must be exact zeros)"
        judge.judge(result.grads, zeros, lambda name, got, want: torch.zeros_like(want), exactly)
    else:
        judge.judge(result.grads, s.truth.result.grads, s.truth.limit(judge.AGAINST_ORACLE, s.floor))
    for name, value in result.buffers.items():
        if not torch.isfinite(value.double()).all():
            raise OutputMismatch(f"buffer {name} is not finite after forward: {judge.describe(value)}", tensor=name)
    judge.note(1)


def is_refusal(layer: Any, inputs: tuple[Any, ...], crash: LayerCrash) -> bool:
    """Whether forward refused a size of 0 or 1 as it should: a ValueError that names the layer and the shape."""
    cause, tensors = crash.__cause__, [x for x in inputs if isinstance(x, Tensor)]
    if crash.details["method"] != "forward" or not isinstance(cause, (HandgradError, ValueError)):
        return False
    if min((d for x in tensors for d in x.shape), default=2) > 1:
        return False
    layer = subject.unwrap(layer)
    layers = [inner for _, inner in layer.named_layers()] if hasattr(layer, "named_layers") else [layer]
    named = any(type(inner).__name__ in str(cause) for inner in layers)
    return named and re.search(r"\((\d+,|\d+(, \d+)+)?\)", str(cause)) is not None  # a shape


SATURATED = 64  # floors are 1e-3 of what is summed up; in float32 a saturated slope makes errors of a few percent of it


@prop(9, "dtypes")
def assert_dtypes(s: Sample) -> None:
    """In float32 everything stays float32, and is as near to the float64 truth as autograd's float32 is.

    err32(by hand) may be 4 err32(autograd) + 16 eps32 S, both against the oracle in float64; 1e-3 S where finite
    differences judge.
    """
    ((layer, inputs, douts),) = s.in_float32()
    got = calls.run(layer, inputs, douts, s.seed)
    for name, tensor in {**got.outs, **got.buffers, **got.grads}.items():
        before = dict(subject.buffers(layer)).get(name)
        wanted = torch.float32 if before is None else before.dtype
        if tensor is not None and tensor.is_floating_point() and tensor.dtype is not wanted:
            raise ContractError(f"{name} is {tensor.dtype} in a layer of {wanted}", tensor=name)
    truth, noise = s.rounding(layer, inputs, douts)
    want = {**truth.result.outs, **truth.result.grads}
    ours = {n: None if t is None else t.to(torch.float64) for n, t in {**got.outs, **got.grads}.items()}
    text = " in float32 (allowed: 4 times autograd's own float32 error + 16 eps)"
    # An out may be what is left of larger numbers, which the oracle may have added up in another, luckier order; and a
    # saturated slope is what 1 - out leaves, with the rounding of 1, which the oracle may have from the exponential.
    size = max((judge.largest(t) for t in (*inputs, *subject.parameters(layer).values())), default=0.0)

    def floor(name: str) -> float:
        return size if name in truth.result.outs else SATURATED * s.floor(name)

    try:
        judge.judge(ours, want, _float32_limit(noise, floor), text)
    except GradientMismatch:
        # err32 of one run is one draw of a random quantity, and can be 0 by luck where the backward's, no larger in
        # general, is not. So before a failure is one, the yardstick becomes the worst of nine draws. The 16 eps stay.
        for near in s.in_float32(neighbours=8):
            noise = {n: max(noise[n], error) for n, error in s.rounding(*near)[1].items()}
        judge.judge(ours, want, _float32_limit(noise, floor), text)


def _float32_limit(noise: dict[str, float], floor: judge.Floor) -> judge.Limit:
    def limit(name: str, got: Tensor, want: Tensor) -> Tensor:
        scale = max(judge.largest(want), floor(name))
        allowed = 4 * noise[name] + 16 * F32 * scale + F32 * F32 if name in noise else 1e-3 * scale
        return torch.full_like(want, allowed)

    return limit


@prop(10, "state")
def assert_state(s: Sample) -> None:
    """Outputs and buffers, step after step, are the reference's; without one, the same calls give the same."""
    call, owner = s.oracle.bind(s.layer)
    twin = s.copy()
    sizes = [judge.largest(t) for t in (*s.inputs, *s.other_inputs, *subject.parameters(s.layer).values())]
    limit = judge.within(judge.AGAINST_ORACLE, 1e-3 * max(sizes, default=0.0))
    with subject.private_rng(s.seed), torch.no_grad():
        states = []
        for inputs in (s.inputs, s.other_inputs, s.inputs):
            states.append((calls.named("out", calls.forward(twin, inputs)), calls.copies(subject.buffers(twin))))
    with subject.private_rng(s.seed), torch.no_grad():
        for step, (inputs, (outs, buffers)) in enumerate(zip((s.inputs, s.other_inputs, s.inputs), states), 1):
            theirs = call(*inputs)
            if [o.shape for o in theirs] != [o.shape for o in outs.values()]:
                raise OutputMismatch(
                    f"out has the wrong shape: {[tuple(o.shape) for o in outs.values()]}, the reference gives "
                    f"{[tuple(o.shape) for o in theirs]}",
                    tensor="out",
                )
            judge.judge(outs, calls.named("out", theirs), limit, f" in forward number {step}", OutputMismatch)
            if s.oracle.keeps_buffers or not s.oracle.independent:
                known = {name: b for name, b in subject.buffers(owner).items() if name in buffers}
                judge.judge(buffers, known, limit, f" after forward number {step}", OutputMismatch)


@prop(11, "special")
def assert_special(s: Sample) -> None:
    """At 0, at kinks, far out, in constant columns, at extreme indices: finite where the oracle is, and as precise.

    Judged element by element: 1e-9 of the element, plus 1e-12 of the tensor's scale for cancellation.
    """
    want = {n: None if g is None else g.clone() for n, g in s.truth.result.grads.items()}
    if s.kinks:
        x, dout, dx = s.inputs[0], s.douts[0], want.get("dx")  # one of several inputs has another name
        if dx is None or x.shape != dout.shape:
            raise NotApplicable("kinks= describes an elementwise layer of one input")
        for place, slope in s.kinks.items():
            if slope is not None:
                dx[x == place] = slope * dout[x == place]
    scale = judge.within(judge.SAME_CODE, s.floor)

    def limit(name: str, got: Tensor, want: Tensor) -> Tensor:
        if s.truth.source == "finite differences":
            return s.truth.limit(1, s.floor)(name, got, want)
        return scale(name, got, want) + 1e-9 * want.abs()

    ours = dict(s.result.grads)
    for name, reference in want.items():
        mine = ours.get(name)
        if reference is not None and mine is not None and mine.shape == reference.shape:
            ours[name] = torch.where(torch.isfinite(reference), mine, reference)
    judge.judge(ours, want, limit, " at special values", GradientMismatch)


def _params(s: Sample) -> dict[str, Tensor]:
    return subject.parameters(s.layer)


def _map(function: Any, grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if g is None else function(g) for name, g in grads.items()}


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b
