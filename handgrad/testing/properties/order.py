"""The properties about calls in other orders: accumulation, reuse, modes, random numbers."""

from __future__ import annotations

from typing import Any

import torch

from handgrad.errors import StateError
from handgrad.layer import Layer
from handgrad.testing import judge, subject
from handgrad.testing.errors import CheckFailure, ContractError, OutputMismatch
from handgrad.testing.registry import NotApplicable, prop
from handgrad.testing.sample import Sample


def _second_run(s: Sample) -> subject.Result:
    """Forward and backward of the other batch, on a layer that has seen the first batch already."""
    twin = s.copy()
    with subject.recording(s.seed):
        with torch.no_grad():
            subject.forward(twin, s.inputs)
        return subject.forward_backward(twin, s.other_inputs, s.other_douts)


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
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
        subject.backward(twin, s.inputs, s.douts)
        after_one = {n: None if g is None else g.clone() for n, g in subject.gradients(twin).items()}
        subject.forward(twin, s.other_inputs)
        subject.backward(twin, s.other_inputs, s.other_douts)
    one = {name: judge.plus(g, first[name]) for name, g in start.items()}
    two = {name: judge.plus(g, second[name]) for name, g in one.items()}
    judge.judge(after_one, one, s.same_code, " where .grad was not empty (backward must add to it)")
    text = " after two backwards (their gradients must add up)"
    judge.judge(subject.gradients(twin), two, s.same_code, text)


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
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
        after_first = _Attributes(twin)
        subject.forward(twin, s.other_inputs)
        after_second = _Attributes(twin)
        with torch.no_grad():
            subject.forward(twin, s.inputs)
        if put_back:
            after_second.put_back()
        dx2 = subject.backward(twin, s.other_inputs, s.other_douts)
        if put_back:
            after_first.put_back()
        dx1 = subject.backward(twin, s.inputs, s.douts)
    text = " after forward(x1), forward(x2), backward(d2), backward(d1)"
    for dx, alone, which in ((dx2, second, "second"), (dx1, first, "first")):
        want = {name: alone.grads[name] for name in dx}
        judge.judge(dx, want, s.same_code, f" of the {which} forward{text}")
    both = {name: judge.plus(first.grads[name], second.grads[name]) for name in subject.parameters(twin)}
    judge.judge(subject.gradients(twin), both, s.same_code, text)
    return after_second.replaced(after_first)


class _Attributes:
    """What the attributes of a layer, and of those inside it, hold now."""

    def __init__(self, layer: Any) -> None:
        self.live = [getattr(inner, "__dict__", {}) for _, inner in subject.named_layers(layer)]
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
        f"backward.\n{subject.CONTRACT}"
    ) from failure


def _assert_refused(twin: Any, s: Sample) -> None:
    """One backward more than there were forwards must raise, a Layer's a StateError."""
    layer = subject.unwrap(twin)
    if isinstance(layer, Layer) and layer.pending:
        raise ContractError(
            f"after two forwards and two backwards {layer.pending} record(s) still wait: each backward must take its "
            "own off the stack (`pop`)"
        )
    try:
        twin.backward(s.douts if len(s.douts) > 1 else s.douts[0])
    except Exception as error:
        if isinstance(layer, Layer) and not isinstance(error, StateError):
            raise ContractError(
                f"a backward without a forward must raise StateError, got {type(error).__name__}: {error}; "
                "pop() raises it"
            ) from error
        judge.compared(1)
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
    with subject.recording(s.seed):
        subject.forward(twin, s.inputs)
        trained = subject.clone(twin)  # copies carry buffers, not records
        subject.set_mode(trained, False)
        before = subject.copies(subject.buffers(twin))
        subject.set_mode(twin, False)
        with subject.private_rng(s.seed):  # as the oracle below
            outs = subject.forward(twin, s.other_inputs)
        with torch.no_grad():
            again = subject.forward(twin, s.other_inputs)
        after = subject.copies(subject.buffers(twin))
        judge.judge(after, before, judge.within(0), " after a forward in eval()", OutputMismatch)
        ours = subject.named("out", outs)
        if twin.drew:
            judge.remark("draws random numbers in evaluation, too: whether it repeats itself is not compared")
        else:
            text = " when eval() is called twice on one input"
            judge.judge(subject.named("out", again), ours, judge.within(0), text, OutputMismatch)
        subject.zero_grad(twin)
        dx = subject.backward(twin, s.other_inputs, s.other_douts)
    truth = s.oracle.truth(trained, s.other_inputs, s.other_douts, s.seed)
    limit = truth.limit(judge.AGAINST_ORACLE, s.floor)
    text = " in eval(), with a training forward still waiting"
    judge.judge(ours, truth.outs, limit, text, OutputMismatch)
    judge.judge({**dx, **subject.gradients(twin)}, truth.grads, limit, text)
    subject.zero_grad(twin)
    dx = subject.backward(twin, s.inputs, s.douts)
    text = " of a training forward whose backward comes in eval()"
    judge.judge({**dx, **subject.gradients(twin)}, start.result.grads, s.same_code, text)


@prop(12, "rng")
def assert_rng(s: Sample) -> None:
    """Random numbers drawn elsewhere between forward and backward change nothing."""
    twin = s.copy()
    with subject.recording(s.seed):
        outs = subject.forward(twin, s.inputs)
        torch.rand(5)
        for generator in subject.generators(twin):
            torch.rand(5, generator=generator)
        dx = subject.backward(twin, s.inputs, s.douts)
    text = " in a second run from the same seed"
    judge.judge(subject.named("out", outs), s.result.outs, s.same_code, text, OutputMismatch)
    text = " when somebody draws random numbers between forward and backward"
    judge.judge({**dx, **subject.gradients(twin)}, s.result.grads, s.same_code, text)
