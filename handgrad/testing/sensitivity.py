"""Faults planted into a layer that just passed: if one goes unnoticed, the check could not have failed either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import judge, subject
from handgrad.testing.errors import CheckError, CheckFailure, VacuousCheck
from handgrad.testing.registry import PROPERTIES, NotApplicable
from handgrad.testing.sample import Sample

Method = Callable[..., Any]


@dataclass(frozen=True)
class GenericFault:
    """One way to spoil any layer: a row of GENERIC_FAULTS.

    `forward` and `backward` replace the layer's own. They are called with the Faulty, whose `wrapped_layer` is the
    right one, and with what the method is called with.
    """

    text: str
    noticed_by: str  # the property that must fail
    not_where: tuple[str, ...]  # it cannot be planted where one of these holds: keys of NEEDS
    backward: Method | None = None
    forward: Method | None = None


class Faulty(subject.StandIn):
    """A layer with a fault planted into it; the oracle uses the layer inside."""

    def __init__(self, layer: Any, fault: GenericFault, size: float) -> None:
        super().__init__(layer)
        self.fault, self.size = fault, size  # size: of a fault that is slight

    def __repr__(self) -> str:
        return f"{self.wrapped_layer!r} with a fault: {self.fault.text}"

    def forward(self, *inputs: Any) -> Any:
        """The layer's forward, or what replaces it."""
        return self.fault.forward(self, *inputs) if self.fault.forward else super().forward(*inputs)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        """The layer's backward, or what replaces it."""
        wrong = self.fault.backward
        return wrong(self, dout, **keywords) if wrong else super().backward(dout, **keywords)


# ---------------------------------------------------------------- the ways to be wrong


def _each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """One tensor, or those of a tuple, changed."""
    changed = tuple(change(t) if isinstance(t, Tensor) else t for t in subject.as_tuple(value))
    return changed if isinstance(value, tuple) else changed[0]


def _new_dx(change: Callable[[Tensor, float], Tensor]) -> Method:
    """Change what backward returns; `change` is also told the size of a slight fault."""
    return lambda f, dout, **keywords: _each_tensor(
        lambda t: change(t, f.size), f.wrapped_layer.backward(dout, **keywords)
    )


def _new_dout(change: Callable[[Tensor], Tensor]) -> Method:
    """Change dout before backward sees it."""
    return lambda f, dout, **keywords: f.wrapped_layer.backward(_each_tensor(change, dout), **keywords)


def _afterwards(spoil: Callable[[Faulty, tuple[Tensor, ...]], None]) -> Method:
    """Spoil the gradients, or the douts, after backward."""

    def backward(f: Faulty, dout: Any, **keywords: Any) -> Any:
        dx = f.wrapped_layer.backward(dout, **keywords)
        spoil(f, subject.as_tuple(dout))
        return dx

    return backward


def _largest_zeroed(dx: Tensor, size: float) -> Tensor:
    dx = dx.clone()
    if dx.numel():
        dx.view(-1)[dx.abs().argmax()] = 0
    return dx


def _scale_grads(f: Faulty, douts: tuple[Tensor, ...]) -> None:
    for p in subject.parameters(f).values():
        if p.grad is not None:
            p.grad.mul_(1 + f.size)


def _trained(f: Faulty) -> list[Tensor]:
    """The parameters that this backward gave a gradient, or else all: a frozen one, or a constant's, gets none."""
    params = list(subject.parameters(f).values())
    return [p for p in params if p.grad is not None] or params


def _drop_last(f: Faulty, douts: tuple[Tensor, ...]) -> None:
    _trained(f)[-1].grad = None


def _share_last(f: Faulty, douts: tuple[Tensor, ...]) -> None:
    p = _trained(f)[-1]
    p.grad = douts[0].detach().reshape(-1)[:1].expand(p.numel()).view(p.shape)


def _write_douts(f: Faulty, douts: tuple[Tensor, ...]) -> None:
    for d in douts:
        d.mul_(1)


def _overwrite_gradients(f: Faulty, dout: Any, **keywords: Any) -> Any:
    subject.zero_grad(f)
    return f.wrapped_layer.backward(dout, **keywords)


def _misread(d: Tensor) -> Tensor:
    """The elements that a kernel would read that goes by data_ptr and shape alone."""
    storage = torch.tensor([], dtype=d.dtype).set_(d.untyped_storage())
    places: Tensor = torch.arange(d.numel()).add(d.storage_offset()).clamp(max=max(storage.numel() - 1, 0))
    return storage[places].view(d.shape) if d.numel() else d


def _write_x(f: Faulty, *inputs: Any) -> Any:
    out = f.wrapped_layer.forward(*inputs)
    for x in inputs:
        x.copy_(x.clone())
    return out


def _keep_latest(f: Any, *inputs: Any) -> Any:
    if torch.is_grad_enabled():
        f.latest = inputs
    return f.wrapped_layer.forward(*inputs)


def _of_latest(f: Any, dout: Any, **keywords: Any) -> Any:
    _without_learning(f, *f.latest)
    return f.wrapped_layer.backward(dout, **keywords)


def _without_learning(f: Faulty, *inputs: Any) -> Any:
    kept = subject.copies(subject.buffers(f))
    out = f.wrapped_layer.forward(*inputs)
    for name, b in subject.buffers(f).items():
        b.copy_(kept[name])
    return out


def _always_training(f: Faulty, *inputs: Any) -> Any:
    mode = f.training
    subject.set_mode(f.wrapped_layer, True)
    try:
        return f.wrapped_layer.forward(*inputs)
    finally:
        subject.set_mode(f.wrapped_layer, mode)


def _scaled_out(f: Faulty, *inputs: Any) -> Any:
    return _each_tensor(lambda out: out * (1 + 1e-6), f.wrapped_layer.forward(*inputs))


# ---------------------------------------------------------------- which layers can have them


def _two_behaviours(s: Sample) -> bool:
    outs = []
    for mode in (True, False):
        with subject.private_rng(s.seed), torch.no_grad():
            outs.append(subject.forward(s.mode(mode).layer, s.inputs))
    return any(not judge.identical(a, b) for a, b in zip(*outs))


def _learns(s: Sample) -> bool:
    twin = s.copy()
    before = subject.copies(subject.buffers(twin))
    with subject.private_rng(s.seed), torch.no_grad():
        subject.forward(twin, s.inputs)
    return any(not torch.equal(b, before[name]) for name, b in subject.buffers(twin).items())


# What a layer must have, by what the report says of one that does not.
NEEDS: dict[str, Callable[[Sample], Any]] = {
    "no dx": lambda s: subject.differentiable(s.layer, s.inputs),
    "no parameters": lambda s: any(s.result.grads.get(name) is not None for name in subject.parameters(s.layer)),
    "dout is a single number": lambda s: any(d.numel() > 1 for d in s.douts),
    "no modes": lambda s: subject.has_modes(s.layer),
    "training and evaluation do the same": _two_behaviours,
    "no buffers": lambda s: subject.buffers(s.layer),
    "only module= says what buffers must be": lambda s: s.oracle.keeps_buffers,
    "no forward changes a buffer": _learns,
    "only reference= or module= says what out must be": lambda s: s.oracle.independent,
}
NO_DX, NO_PARAMETERS, LONE_DOUT = ("no dx",), ("no parameters",), ("dout is a single number",)
NO_MODES = ("no modes", "training and evaluation do the same")
NO_LEARNING = ("no buffers", "only module= says what buffers must be", "no forward changes a buffer")
NO_REFERENCE = ("only reference= or module= says what out must be",)

# fmt: off
GENERIC_FAULTS = (
    GenericFault("dx slightly scaled", "gradients", NO_DX, _new_dx(lambda dx, size: dx * (1 + size))),
    GenericFault("the largest element of dx set to zero", "gradients", NO_DX, _new_dx(_largest_zeroed)),
    GenericFault("dx with one dimension more", "gradients", NO_DX, _new_dx(lambda dx, size: dx.unsqueeze(0))),
    GenericFault("dx in float32", "gradients", NO_DX, _new_dx(lambda dx, size: dx.to(torch.float32))),
    GenericFault("1e-6 added to dx", "linearity", NO_DX, _new_dx(lambda dx, size: dx + 1e-6)),
    GenericFault("parameter gradients slightly scaled", "gradients", NO_PARAMETERS, _afterwards(_scale_grads)),
    GenericFault("the last parameter's gradient not written", "gradients", NO_PARAMETERS, _afterwards(_drop_last)),
    GenericFault("gradients overwritten, not added to", "accumulation", NO_PARAMETERS, _overwrite_gradients),
    GenericFault("a gradient that shares memory with dout", "aliasing", NO_PARAMETERS, _afterwards(_share_last)),
    GenericFault("dout replaced by ones", "gradients", (), _new_dout(torch.ones_like)),
    GenericFault("dout multiplied in place", "ownership", (), _afterwards(_write_douts)),
    GenericFault("x written to in forward", "ownership", (), forward=_write_x),
    GenericFault("dout read as if it were contiguous", "layouts", LONE_DOUT, _new_dout(_misread)),
    GenericFault("a record of one slot: each forward overwrites it", "reuse", (), _of_latest, _keep_latest),
    GenericFault("random numbers drawn anew in backward", "rng", NO_DX, _new_dx(lambda dx, size: dx * torch.rand(()))),
    GenericFault("the training path taken in eval()", "modes", NO_MODES, forward=_always_training),
    GenericFault("buffers never updated", "state", NO_LEARNING, forward=_without_learning),
    GenericFault("out times 1 + 1e-6", "state", NO_REFERENCE, forward=_scaled_out),
)
# fmt: on


def plant(kept: Mapping[str, list[Sample]], skip: Mapping[str, str]) -> dict[str, str]:
    """Plant every fault into the layers of the samples that passed, and run the property that must notice it.

    Returns what became of each fault. Raises VacuousCheck for one that went unnoticed.
    """
    fates = {fault.text: _fate(fault, kept, skip) for fault in GENERIC_FAULTS}
    survivors = [text for text, fate in fates.items() if not fate]
    if survivors:
        raise VacuousCheck(
            f"these inputs cannot notice {'; nor '.join(survivors)}. The layer passed, but would also have passed with "
            "that fault. Let x, options, sizes or ranges vary more; or skip={'sensitivity': 'why'} if it cannot matter"
        )
    return fates


def _fate(fault: GenericFault, kept: Mapping[str, list[Sample]], skip: Mapping[str, str]) -> str:
    """What became of a fault; empty where it went unnoticed."""
    name = fault.noticed_by
    if name in skip:
        return f"not judged: {name} skipped"
    others = [other for other in kept if other != name and PROPERTIES[other].draws == "ordinary"]
    reason, tried = "no examples", False
    for sample in [s for each in (name, *others) for s in kept[each]] if name in kept else []:
        obstacle = next((text for text in fault.not_where if not NEEDS[text](sample)), "")
        if obstacle:
            reason = obstacle
            continue
        tried = True
        if noticed(fault, sample, name):
            return f"noticed by {name}"
    return "" if tried else f"does not apply: {reason}"


def noticed(fault: GenericFault, sample: Sample, name: str, size: float | None = None) -> bool:
    """Whether the property fails on this example once the fault, of that size, is planted."""
    try:
        if size is None:  # finite differences judge less sharply
            size = 1e-2 if sample.truth.source == "finite differences" else 1e-6
        PROPERTIES[name].check(sample.with_layer(Faulty(sample.copy(), fault, size)))
    except CheckFailure:
        return True
    except (CheckError, NotApplicable):
        return False
    return False
