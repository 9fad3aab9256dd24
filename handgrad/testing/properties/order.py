"""The properties about calls in other orders: accumulation, reuse, modes, random numbers."""

from __future__ import annotations

from typing import Any

import torch

from handgrad.errors import StateError
from handgrad.layer import Layer
from handgrad.testing import calls, judge, subject
from handgrad.testing.errors import CheckFailure, ContractError, OutputMismatch
from handgrad.testing.sample import NotApplicable, Sample, prop


def _second_run(s: Sample) -> calls.Result:
    """Forward and backward of the other batch, on a layer that has seen the first batch already."""
    twin = s.copy()
    with subject.private_rng(s.seed), torch.enable_grad():
        with torch.no_grad():
            calls.forward(twin, s.inputs)
        outs = calls.forward(twin, s.other_inputs)
        dx = calls.backward(twin, s.other_inputs, s.other_douts)
    return calls.Result(calls.named("out", outs), {**dx, **calls.gradients(twin)})


@prop(2, "accumulation")
def assert_accumulation(s: Sample) -> None:
    """Two backwards add their gradients up, and add to a .grad that is already there."""
    first, second = s.result.grads, _second_run(s).grads
    twin = s.copy()
    params = subject.parameters(twin)
    if not params:
        raise NotApplicable("no parameters")
    start = {name: torch.linspace(-1, 2, p.numel(), dtype=p.dtype).view(p.shape) for name, p in params.items()}
    for name, p in params.items():
        p.grad = start[name].clone()
    with subject.private_rng(s.seed), torch.enable_grad():
        calls.forward(twin, s.inputs)
        calls.backward(twin, s.inputs, s.douts)
        after_one = {n: None if g is None else g.clone() for n, g in calls.gradients(twin).items()}
        calls.forward(twin, s.other_inputs)
        calls.backward(twin, s.other_inputs, s.other_douts)
    limit = judge.within(judge.SAME_CODE, s.floor)
    one = {name: g + _or_zero(first[name], g) for name, g in start.items()}
    two = {name: g + _or_zero(second[name], g) for name, g in one.items()}
    judge.judge(after_one, one, limit, " where .grad was not empty (backward must add to it)")
    judge.judge(calls.gradients(twin), two, limit, " after two backwards (their gradients must add up)")


@prop(3, "reuse")
def assert_reuse(s: Sample) -> None:
    """Two forwards, then their two backwards, last first, equal separate runs; one backward more is refused.

    A forward under torch.no_grad() records nothing, so it does not come between.
    """
    twin = s.copy()
    try:
        _two_forwards_two_backwards(s, twin)
    except CheckFailure as failure:
        _explain_attributes(s, failure)
        raise
    _assert_refused(twin, s)


def _two_forwards_two_backwards(s: Sample, twin: Any, put_back: bool = False) -> list[str]:
    """Compare them with separate runs; returns the attributes that the second forward has replaced.

    With `put_back` each backward finds the attributes as its own forward left them.
    """
    first, second = s.result, _second_run(s)
    with subject.private_rng(s.seed), torch.enable_grad():
        calls.forward(twin, s.inputs)
        after_first = _Attributes(twin)
        calls.forward(twin, s.other_inputs)
        after_second = _Attributes(twin)
        with torch.no_grad():
            calls.forward(twin, s.inputs)
        if put_back:
            after_second.put_back()
        dx2 = calls.backward(twin, s.other_inputs, s.other_douts)
        if put_back:
            after_first.put_back()
        dx1 = calls.backward(twin, s.inputs, s.douts)
    limit = judge.within(judge.SAME_CODE, s.floor)
    text = " after forward(x1), forward(x2), backward(d2), backward(d1)"
    judge.judge(dx2, {name: second.grads[name] for name in dx2}, limit, f" of the second forward{text}")
    judge.judge(dx1, {name: first.grads[name] for name in dx1}, limit, f" of the first forward{text}")
    params = subject.parameters(twin)
    both = {name: _sum(first.grads[name], second.grads[name]) for name in params}
    judge.judge(calls.gradients(twin), both, limit, text)
    return after_second.replaced(after_first)


class _Attributes:
    """What the attributes of a layer, and of those inside it, hold now."""

    def __init__(self, layer: Any) -> None:
        layer = subject.unwrap(layer)
        layers = [inner for _, inner in layer.named_layers()] if hasattr(layer, "named_layers") else [layer]
        self.live: list[dict[str, Any]] = [getattr(inner, "__dict__", {}) for inner in layers]
        self.held = [dict(live) for live in self.live]

    def replaced(self, before: _Attributes) -> list[str]:
        """The names of those that held something else before."""
        pairs = zip(before.held, self.held)
        return [name for old, new in pairs for name, value in new.items() if old.get(name) is not value]

    def put_back(self) -> None:
        """Let them hold it again."""
        for live, held in zip(self.live, self.held):
            live.clear()
            live.update(held)


def _explain_attributes(s: Sample, failure: CheckFailure) -> None:
    """Raise ContractError where all is right once each backward finds the attributes of its own forward."""
    try:
        names = _two_forwards_two_backwards(s, s.copy(), put_back=True)
    except CheckFailure:
        return
    kept = ", ".join(names)
    raise ContractError(
        f"forward keeps {kept} in attributes, where the next forward overwrites what the backward of this one needs:\n"
        f"  {failure.message.splitlines()[0]}\n"
        f"It is right once each backward finds {kept} as its own forward left it, so keep a record instead: "
        f"self.push({kept}, out=out)\nin forward, ({kept}{',' if len(names) == 1 else ''}) = self.pop(dout) in "
        f"backward.\n{calls.CONTRACT}"
    ) from failure


def _assert_refused(twin: Any, s: Sample) -> None:
    layer = subject.unwrap(twin)
    if isinstance(layer, Layer) and layer.pending:
        raise ContractError(
            f"after two forwards and two backwards {layer.pending} record(s) still wait: each backward must take its "
            "own off the stack (`pop`)"
        )
    try:
        twin.backward(s.douts if len(s.douts) > 1 else s.douts[0])
    except Exception as error:
        if isinstance(subject.unwrap(twin), Layer) and not isinstance(error, StateError):
            raise ContractError(
                f"a backward without a forward must raise StateError, got {type(error).__name__}: {error}; "
                "pop() raises it"
            ) from error
        judge.note(1)
    else:
        raise ContractError(
            "a third backward after two forwards was accepted: the record outlives its backward. A backward takes "
            "its record off the stack (`pop`), and without one raises StateError"
        )


@prop(7, "modes")
def assert_modes(s: Sample) -> None:
    """Evaluation is right in the midst of training: it changes no buffer, repeats itself, and has its own backward."""
    if not subject.has_modes(s.layer):
        raise NotApplicable("no training and evaluation modes")
    start = s.mode(True)
    twin = start.copy()
    with subject.private_rng(s.seed), torch.enable_grad():
        calls.forward(twin, s.inputs)
        trained = subject.clone(twin)  # copies carry buffers, not records
        subject.set_mode(trained, False)
        before = calls.copies(subject.buffers(twin))
        subject.set_mode(twin, False)
        outs = calls.forward(twin, s.other_inputs)
        with torch.no_grad():
            again = calls.forward(twin, s.other_inputs)
        judge.judge(
            calls.copies(subject.buffers(twin)), before, judge.within(0), " after a forward in eval()", OutputMismatch
        )
        text = " when eval() is called twice on one input"
        judge.judge(calls.named("out", again), calls.named("out", outs), judge.within(0), text, OutputMismatch)
        subject.zero_grad(twin)
        dx = calls.backward(twin, s.other_inputs, s.other_douts)
    truth = s.oracle.truth(trained, s.other_inputs, s.other_douts, s.seed)
    limit = truth.limit(judge.AGAINST_ORACLE, s.floor)
    text = " in eval(), with a training forward still waiting"
    judge.judge(calls.named("out", outs), truth.result.outs, limit, text, OutputMismatch)
    judge.judge({**dx, **calls.gradients(twin)}, truth.result.grads, limit, text)
    subject.zero_grad(twin)
    dx = calls.backward(twin, s.inputs, s.douts)
    text = " of a training forward whose backward comes in eval()"
    judge.judge({**dx, **calls.gradients(twin)}, start.result.grads, judge.within(judge.SAME_CODE, s.floor), text)


@prop(12, "rng")
def assert_rng(s: Sample) -> None:
    """Random numbers drawn elsewhere between forward and backward change nothing."""
    twin = s.copy()
    with subject.private_rng(s.seed), torch.enable_grad():
        outs = calls.forward(twin, s.inputs)
        torch.rand(5)
        generator = getattr(subject.unwrap(twin), "generator", None)
        if isinstance(generator, torch.Generator):
            torch.rand(5, generator=generator)
        dx = calls.backward(twin, s.inputs, s.douts)
    text = " when somebody draws random numbers between forward and backward"
    limit = judge.within(judge.SAME_CODE, s.floor)
    judge.judge(calls.named("out", outs), s.result.outs, limit, " in a second run from the same seed", OutputMismatch)
    judge.judge({**dx, **calls.gradients(twin)}, s.result.grads, limit, text)


def _or_zero(t: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if t is None else t


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a + b
