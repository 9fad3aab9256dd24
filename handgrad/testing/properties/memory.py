"""The properties about tensors as memory: who writes where, layouts, aliases, copies."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer
from handgrad.testing import calls, judge, subject
from handgrad.testing.errors import ContractError, OutputMismatch
from handgrad.testing.sample import Sample, prop


@prop(4, "ownership")
def assert_ownership(s: Sample) -> None:
    """x, dout, out and the parameters stay as they are, in every bit and never written to in place."""
    twin = s.copy()
    inputs, douts = _clones(s.inputs), _clones(s.douts)
    params = subject.parameters(twin)
    with subject.private_rng(s.seed), torch.enable_grad():
        held = _Held({**calls.named("x", inputs), **params})
        outs = calls.forward(twin, inputs)
        held.verify("forward")
        buffers = subject.buffers(twin)
        held = _Held({**calls.named("x", inputs), **params, **calls.named("dout", douts), **buffers})
        values = calls.named("out", tuple(o.detach().clone() for o in outs))
        calls.backward(twin, inputs, douts)
        held.verify("backward")
    for name, out in calls.named("out", outs).items():
        if not judge.identical(out, values[name]):
            raise ContractError(f"backward wrote to {name}, which belongs to the caller since forward returned it")


class _Held:
    """Tensors of the caller, with their bits and how often each had been written to."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.bits = calls.copies(tensors)
        self.versions = {name: t._version for name, t in tensors.items()}

    def verify(self, method: str) -> None:
        for name, tensor in self.tensors.items():
            judge.note(tensor.numel())
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


@prop(5, "layouts")
def assert_layouts(s: Sample) -> None:
    """Strided, transposed, rotated, shifted and expanded x and dout give what contiguous ones give."""
    limit = judge.within(judge.SAME_CODE, s.floor)
    for i, x in enumerate(s.inputs):
        for name, twin in _layouts(x).items():
            inputs = (*s.inputs[:i], twin, *s.inputs[i + 1 :])
            _same(
                calls.run(s.layer, inputs, s.douts, s.seed), s.result, limit, f" for x {name}, strides {_strides(twin)}"
            )
        if x.dim() and x.shape[0] > 1:
            rows = x[:1].expand(x.shape)
            one, other = ((*s.inputs[:i], t, *s.inputs[i + 1 :]) for t in (rows, rows.contiguous()))
            want = calls.run(s.layer, other, s.douts, s.seed)
            text = f" for x expanded from one row, strides {_strides(rows)}"
            _same(calls.run(s.layer, one, s.douts, s.seed), want, limit, text)
    for i, dout in enumerate(s.douts):
        for name, twin in _layouts(dout).items():
            douts = (*s.douts[:i], twin, *s.douts[i + 1 :])
            got = calls.run(s.layer, s.inputs, douts, s.seed)
            _same(got, s.result, limit, f" for dout {name}, strides {_strides(twin)}")
        if dout.numel():
            flat = dout.flatten()[0].expand(dout.shape)
            one, other = ((*s.douts[:i], t, *s.douts[i + 1 :]) for t in (flat, flat.contiguous()))
            want = calls.run(s.layer, s.inputs, other, s.seed)
            text = f" for dout expanded from one number, strides {_strides(flat)}"
            _same(calls.run(s.layer, s.inputs, one, s.seed), want, limit, text)


def _layouts(t: Tensor) -> dict[str, Tensor]:
    """Tensors of equal values whose memory is laid out otherwise."""
    other = float("nan") if t.is_floating_point() else 0  # what whoever reads the wrong places will find
    wide = torch.full((*t.shape, 2), other, dtype=t.dtype)
    wide[..., 0] = t
    shifted = torch.full((t.numel() + 3,), other, dtype=t.dtype)[3:].view(t.shape)
    found = {"strided": wide[..., 0], "shifted": shifted.copy_(t)}
    if t.dim() >= 2:
        found["transposed"] = t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if t.dim() >= 3:
        there, back = [*range(1, t.dim()), 0], [t.dim() - 1, *range(t.dim() - 1)]
        found["rotated"] = t.permute(there).contiguous().permute(back)
    return found


def _same(got: calls.Result, want: calls.Result, limit: judge.Limit, text: str) -> None:
    judge.judge(got.outs, want.outs, limit, text, OutputMismatch)
    judge.judge(got.grads, want.grads, limit, text)


@prop(13, "aliasing")
def assert_aliasing(s: Sample) -> None:
    """Writing into out before backward, or into dx after it, spoils no gradient; gradients share memory with nothing.

    A backward that needs what was overwritten may refuse with a StateError (or any RuntimeError) instead.
    """
    twin = s.copy()
    limit = judge.within(judge.SAME_CODE, s.floor)
    inputs, douts = _clones(s.inputs), _clones(s.douts)
    with subject.private_rng(s.seed), torch.enable_grad():
        outs = calls.forward(twin, inputs)
        dx = calls.backward(twin, inputs, douts)
    grads = calls.gradients(twin)
    known: dict[str, Tensor] = {**calls.named("x", inputs), **calls.named("out", outs), **calls.named("dout", douts)}
    _assert_own_memory(grads, {**known, **dx, **subject.tensors(twin)})
    for value in dx.values():
        if value.numel():
            value.view_as(value).fill_(float("nan")) if _writable(value) else None
    own = {name: s.result.grads[name] for name in grads}
    judge.judge(grads, own, limit, " after somebody wrote into the dx that backward returned")
    _overwritten(s, "out", limit)
    if isinstance(subject.unwrap(s.layer), Layer):
        _overwritten(s, "a parameter", limit)
        _overwritten(s, "x", limit)


def _assert_own_memory(grads: dict[str, Tensor | None], others: dict[str, Tensor]) -> None:
    owners: dict[int, str] = {}
    for name, tensor in others.items():
        if tensor.numel():
            owners[tensor.untyped_storage().data_ptr()] = name
    for name, grad in grads.items():
        if grad is None or not grad.numel():
            continue
        judge.note(1)
        where = grad.untyped_storage().data_ptr()
        if where in owners:
            raise ContractError(
                f"the gradient of {name} shares its memory with {owners[where]}: whoever writes to one spoils the "
                "other; make it a tensor of its own (clone())",
                tensor=name,
            )
        if not _writable(grad):
            raise ContractError(
                f"the gradient of {name} is expanded (strides {_strides(grad)}): several elements share one place in "
                "memory, and the next gradient cannot be added to it; use contiguous()",
                tensor=name,
            )
        owners[where] = f"the gradient of {name}"


def _overwritten(s: Sample, what: str, limit: judge.Limit) -> None:
    """Write into `what` between forward and backward: the gradients must not change, or backward must refuse."""
    twin = s.copy()
    inputs = _clones(s.inputs)
    with subject.private_rng(s.seed), torch.enable_grad():
        outs = calls.forward(twin, inputs)
        targets = {"out": outs, "x": inputs, "a parameter": tuple(subject.parameters(twin).values())}[what]
        for target in targets:
            if target.numel() and _writable(target):
                target.fill_(17 if target.is_floating_point() else 0)
        try:
            dx = twin.backward(s.douts if len(s.douts) > 1 else s.douts[0])
        except RuntimeError:
            judge.note(1)
            return
    text = f" when {what} is overwritten between forward and backward (keep what backward needs with push)"
    got = {**calls.structure(twin, inputs, dx), **calls.gradients(twin)}
    judge.judge(got, s.result.grads, limit, text)


def _writable(t: Tensor) -> bool:
    return all(stride or size <= 1 for size, stride in zip(t.shape, t.stride()))


@prop(14, "plumbing")
def assert_plumbing(s: Sample) -> None:
    """A repr works; a copy, a pickle and a state_dict each carry the layer over, and it then works the same."""
    layer = s.copy()
    if not isinstance(repr(layer), str) or not repr(layer):
        raise ContractError("repr must give a text")
    with subject.private_rng(s.seed), torch.enable_grad():
        calls.forward(layer, s.inputs)  # a record that waits
    start = s.copy()
    twins = {"copied": copy.deepcopy(layer)}
    if _importable(subject.unwrap(layer)):
        twins["pickled"] = pickle.loads(pickle.dumps(layer))
    if hasattr(layer, "state_dict") and hasattr(layer, "load_state_dict"):
        stranger = s.copy()
        for tensor in {**subject.parameters(stranger), **subject.buffers(stranger)}.values():
            tensor.zero_()
        stranger.load_state_dict({name: t.clone() for name, t in start.state_dict().items()})
        twins["loaded by state_dict"] = stranger
    for how, twin in twins.items():
        if isinstance(subject.unwrap(twin), Layer) and twin.pending:
            raise ContractError(f"a {how} layer must not bring its records along: {twin.pending} wait in it")
        if "state_dict" not in how:
            _restore_buffers(twin, start)
        limit = judge.within(judge.SAME_CODE, s.floor)
        _same(calls.run(twin, s.inputs, s.douts, s.seed), s.result, limit, f" in a {how} layer")


def _restore_buffers(twin: Any, start: Any) -> None:
    """Take back what the waiting forward did to the buffers."""
    theirs = subject.buffers(start)
    for name, b in subject.buffers(twin).items():
        if name in theirs and b.shape == theirs[name].shape:
            b.copy_(theirs[name])


def _importable(layer: Any) -> bool:
    """Whether pickle can find the class again: not one defined inside a function."""
    module: Any = sys.modules.get(type(layer).__module__)
    return getattr(module, type(layer).__qualname__, None) is type(layer)


def _clones(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.clone() for t in tensors)


def _strides(t: Tensor) -> tuple[int, ...]:
    return t.stride()
