"""The properties about tensors as memory: who writes where, layouts, aliases, copies."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer
from handgrad.testing import judge, subject
from handgrad.testing.errors import ContractError, OutputMismatch
from handgrad.testing.registry import prop
from handgrad.testing.sample import Sample


@prop(4, "ownership", first=True)
def assert_ownership(s: Sample) -> None:
    """x, dout, out and the parameters stay as they are, in every bit and never written to in place."""
    twin = s.copy()
    inputs, douts = _clones(s.inputs), _clones(s.douts)
    with subject.recording(s.seed):
        theirs = {**subject.named("x", inputs), **subject.parameters(twin)}
        held = _Held(theirs)
        outs = subject.forward(twin, inputs)
        held.verify("forward")
        held = _Held({**theirs, **subject.named("dout", douts), **subject.buffers(twin)})
        values = _clones(outs)
        subject.backward(twin, inputs, douts)
        held.verify("backward")
    for (name, out), value in zip(subject.named("out", outs).items(), values):
        if not judge.identical(out, value):
            raise ContractError(f"backward wrote to {name}, which belongs to the caller since forward returned it")


class _Held:
    """Tensors of the caller, with their bits and how often each had been written to."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.bits = subject.copies(tensors)
        self.versions = {name: t._version for name, t in tensors.items()}

    def verify(self, method: str) -> None:
        for name, tensor in self.tensors.items():
            judge.compared(tensor.numel())
            if not judge.identical(tensor, self.bits[name]):
                raise ContractError(
                    f"{method} changed {name}, which is not its own: before {judge.describe(self.bits[name])}, "
                    f"after {judge.describe(tensor)}; write into a new tensor (an operation without the trailing _)",
                    tensor=name,
                )
            if tensor._version != self.versions[name]:
                raise ContractError(
                    f"{method} wrote to {name} in place, with the values it had: a version counter went from "
                    f"{self.versions[name]} to {tensor._version}, so whoever recorded the tensor sees it as spoilt",
                    tensor=name,
                )


@prop(5, "layouts", examples=6)
def assert_layouts(s: Sample) -> None:
    """Strided, transposed, rotated, shifted and expanded x and dout give what contiguous ones give."""
    for i, x in enumerate(s.inputs):
        row = {"one row": x[:1].expand(x.shape)} if x.dim() and x.shape[0] > 1 else {}
        _assert_any_layout(s, "x", i, row)
    for i, dout in enumerate(s.douts):
        number = {"one number": dout.flatten()[0].expand(dout.shape)} if dout.numel() else {}
        _assert_any_layout(s, "dout", i, number)


def _assert_any_layout(s: Sample, what: str, i: int, expanded: dict[str, Tensor]) -> None:
    """One x or dout in every layout beside a contiguous one; and each of `expanded` beside its contiguous copy."""
    given = s.inputs if what == "x" else s.douts

    def run(t: Tensor) -> subject.Result:
        changed = (*given[:i], t, *given[i + 1 :])
        return s.run(inputs=changed) if what == "x" else s.run(douts=changed)

    for layout, t in _layouts(given[i]):
        _same(run(t), s.result, s, f" for {what} {layout}, strides {t.stride()}")
    for source, t in expanded.items():
        want = run(t.contiguous())
        _same(run(t), want, s, f" for {what} expanded from {source}, strides {t.stride()}")


def _layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of equal values whose memory is laid out otherwise."""
    other = float("nan") if t.is_floating_point() else 0  # what whoever reads the wrong places will find
    wide = torch.full((*t.shape, 2), other, dtype=t.dtype)
    wide[..., 0] = t
    yield "strided", wide[..., 0]
    yield "shifted", torch.full((t.numel() + 3,), other, dtype=t.dtype)[3:].view(t.shape).copy_(t)
    if t.dim() >= 2:
        yield "transposed", t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if t.dim() >= 3:
        yield "rotated", t.movedim(0, -1).contiguous().movedim(-1, 0)


def _same(got: subject.Result, want: subject.Result, s: Sample, text: str) -> None:
    judge.judge(got.outs, want.outs, s.same_code, text, OutputMismatch)
    judge.judge(got.grads, want.grads, s.same_code, text)


@prop(13, "aliasing")
def assert_aliasing(s: Sample) -> None:
    """Writing into out before backward, or into dx after it, spoils no gradient; gradients share memory with nothing.

    A backward that needs what was overwritten may refuse with a StateError (or any RuntimeError) instead.
    """
    twin = s.copy()
    inputs, douts = _clones(s.inputs), _clones(s.douts)
    with subject.recording(s.seed):
        outs = subject.forward(twin, inputs)
        dx = subject.backward(twin, inputs, douts)
    grads = subject.gradients(twin)
    theirs = {**subject.named("x", inputs), **subject.named("out", outs), **subject.named("dout", douts)}
    _assert_own_memory(grads, {**theirs, **dx, **subject.tensors(twin)})
    for value in dx.values():
        if value.numel() and _writable(value):
            value.fill_(float("nan"))
    own = {name: s.result.grads[name] for name in grads}
    judge.judge(grads, own, s.same_code, " after somebody wrote into the dx that backward returned")
    _assert_survives_overwriting("out", s)
    if isinstance(subject.unwrap(s.layer), Layer):
        _assert_survives_overwriting("a parameter", s)
        _assert_survives_overwriting("x", s)


def _assert_own_memory(grads: dict[str, Tensor | None], others: dict[str, Tensor]) -> None:
    owners = {t.untyped_storage().data_ptr(): name for name, t in others.items() if t.numel()}
    for name, grad in grads.items():
        if grad is None or not grad.numel():
            continue
        judge.compared(1)
        where = grad.untyped_storage().data_ptr()
        if where in owners:
            raise ContractError(
                f"the gradient of {name} shares its memory with {owners[where]}: whoever writes to one spoils the "
                "other; make it a tensor of its own (clone())",
                tensor=name,
            )
        if not _writable(grad):
            raise ContractError(
                f"the gradient of {name} is expanded (strides {grad.stride()}): several elements share one place in "
                "memory, and the next gradient cannot be added to it; use contiguous()",
                tensor=name,
            )
        owners[where] = f"the gradient of {name}"


def _assert_survives_overwriting(what: str, s: Sample) -> None:
    """Write into `what` between forward and backward: the gradients must not change, or backward must refuse."""
    twin = s.copy()
    inputs = _clones(s.inputs)
    with subject.recording(s.seed):
        outs = subject.forward(twin, inputs)
        targets = {"out": outs, "x": inputs, "a parameter": tuple(subject.parameters(twin).values())}[what]
        for target in targets:
            if target.numel() and _writable(target):
                target.fill_(17 if target.is_floating_point() else 0)
        try:
            dx = twin.backward(s.douts if len(s.douts) > 1 else s.douts[0])
        except RuntimeError:
            judge.compared(1)
            return
    text = f" when {what} is overwritten between forward and backward (keep what backward needs with push)"
    got = {**subject.named_dx(twin, inputs, dx), **subject.gradients(twin)}
    judge.judge(got, s.result.grads, s.same_code, text)


def _writable(t: Tensor) -> bool:
    return all(stride or size <= 1 for size, stride in zip(t.shape, t.stride()))


@prop(14, "plumbing", examples=5)
def assert_plumbing(s: Sample) -> None:
    """A repr works; a copy, a pickle and a state_dict each carry the layer over, and it then works the same."""
    layer = s.copy()
    if not isinstance(repr(layer), str) or not repr(layer):
        raise ContractError("repr must give a text")
    with subject.recording(s.seed):
        subject.forward(layer, s.inputs)  # a record that waits
    start = s.copy()
    twins = {"copied": copy.deepcopy(layer)}
    if _importable(subject.unwrap(layer)):
        twins["pickled"] = pickle.loads(pickle.dumps(layer))
    if hasattr(layer, "state_dict") and hasattr(layer, "load_state_dict"):
        stranger, state = s.copy(), {name: t.clone() for name, t in start.state_dict().items()}
        carried = {name: b for name, b in subject.buffers(stranger).items() if name in state}  # those that persist
        for tensor in {**subject.parameters(stranger), **carried}.values():
            tensor.zero_()
        stranger.load_state_dict(state)
        twins["loaded by state_dict"] = stranger
    for how, twin in twins.items():
        if isinstance(subject.unwrap(twin), Layer) and twin.pending:
            raise ContractError(f"a {how} layer must not bring its records along: {twin.pending} wait in it")
        if "state_dict" not in how:
            _restore(twin, start)
        _same(subject.run(twin, s.inputs, s.douts, s.seed), s.result, s, f" in a {how} layer")


def _restore(twin: Any, start: Any) -> None:
    """Take back what the waiting forward did to buffers and generators."""
    theirs = subject.buffers(start)
    for name, b in subject.buffers(twin).items():
        if name in theirs and b.shape == theirs[name].shape:
            b.copy_(theirs[name])
    for ours, generator in zip(subject.generators(twin), subject.generators(start)):
        ours.set_state(generator.get_state())


def _importable(layer: Any) -> bool:
    """Whether pickle can find the class again: not one defined inside a function."""
    module: Any = sys.modules.get(type(layer).__module__)
    return getattr(module, type(layer).__qualname__, None) is type(layer)


def _clones(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.detach().clone() for t in tensors)
