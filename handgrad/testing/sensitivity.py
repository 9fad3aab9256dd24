"""Faults planted into a layer that just passed: if one goes unnoticed, the check could not have failed either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import calls, judge, subject
from handgrad.testing.errors import CheckError, CheckFailure, VacuousCheck
from handgrad.testing.sample import PROPERTIES, NotApplicable, Sample


class Faulty(subject.StandIn):
    """A layer with a fault planted into it. Subclasses do one thing wrong; the oracle uses the layer inside."""

    fault = "none"
    noticed_by: tuple[str, ...] = ("gradients",)
    size = 1e-6  # of what is slight

    def __repr__(self) -> str:
        return f"{self.wrapped_layer!r} with a fault: {self.fault}"

    @classmethod
    def why_not(cls, s: Sample) -> str:
        """Why this fault cannot be planted into the layer of this sample; empty where it can."""
        return ""


class _InDx(Faulty):
    """A fault in what backward returns."""

    def change(self, dx: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, dout: Any, **keywords: Any) -> Any:
        dx = super().backward(dout, **keywords)
        changed = tuple(self.change(t) if isinstance(t, Tensor) else t for t in subject.as_tuple(dx))
        return changed if isinstance(dx, tuple) else changed[0]

    @classmethod
    def why_not(cls, s: Sample) -> str:
        return "" if calls.differentiable(s.layer, s.inputs) else "no dx"


class _InGrads(Faulty):
    """A fault in what backward does to the parameters' gradients."""

    @classmethod
    def why_not(cls, s: Sample) -> str:
        return "" if subject.parameters(s.layer) else "no parameters"

    def params(self) -> list[Tensor]:
        return list(subject.parameters(self).values())


class DxScaled(_InDx):  # noqa: D101  # the faults say what they are in `fault`
    fault = "dx slightly scaled"

    def change(self, dx: Tensor) -> Tensor:
        return dx * (1 + self.size)


class DxElement(_InDx):  # noqa: D101
    fault = "the largest element of dx set to zero"

    def change(self, dx: Tensor) -> Tensor:
        dx = dx.clone()
        if dx.numel():
            dx.view(-1)[dx.abs().argmax()] = 0
        return dx


class DxShape(_InDx):  # noqa: D101
    fault = "dx with one dimension more"

    def change(self, dx: Tensor) -> Tensor:
        return dx.unsqueeze(0)


class DxDtype(_InDx):  # noqa: D101
    fault = "dx in float32"

    def change(self, dx: Tensor) -> Tensor:
        return dx.to(torch.float32)


class DxOffset(_InDx):  # noqa: D101
    fault = "1e-6 added to dx"
    noticed_by = ("linearity",)

    def change(self, dx: Tensor) -> Tensor:
        return dx + 1e-6


class GradScaled(_InGrads):  # noqa: D101
    fault = "parameter gradients slightly scaled"

    def backward(self, dout: Any, **keywords: Any) -> Any:
        dx = super().backward(dout, **keywords)
        for p in self.params():
            if p.grad is not None:
                p.grad.mul_(1 + self.size)
        return dx


class GradMissing(_InGrads):  # noqa: D101
    fault = "the last parameter's gradient not written"

    def backward(self, dout: Any, **keywords: Any) -> Any:
        dx = super().backward(dout, **keywords)
        self.params()[-1].grad = None
        return dx


class GradOverwritten(_InGrads):  # noqa: D101
    fault = "gradients overwritten, not added to"
    noticed_by = ("accumulation",)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        for p in self.params():
            p.grad = None
        return super().backward(dout, **keywords)


class GradShared(_InGrads):  # noqa: D101
    fault = "a gradient that shares memory with dout"
    noticed_by = ("aliasing",)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        dx = super().backward(dout, **keywords)
        p, flat = self.params()[-1], subject.as_tuple(dout)[0].detach().reshape(-1)
        p.grad = flat[:1].expand(p.numel()).view(p.shape)
        return dx


class DoutOnes(Faulty):  # noqa: D101
    fault = "dout replaced by ones"

    def backward(self, dout: Any, **keywords: Any) -> Any:
        ones = tuple(torch.ones_like(d) for d in subject.as_tuple(dout))
        return super().backward(ones if isinstance(dout, tuple) else ones[0], **keywords)


class DoutWritten(Faulty):  # noqa: D101
    fault = "dout multiplied in place"
    noticed_by = ("ownership",)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        dx = super().backward(dout, **keywords)
        for d in subject.as_tuple(dout):
            d.mul_(1)
        return dx


class XWritten(Faulty):  # noqa: D101
    fault = "x written to in forward"
    noticed_by = ("ownership",)

    def forward(self, *inputs: Any) -> Any:
        out = super().forward(*inputs)
        for x in inputs:
            x.copy_(x.clone())
        return out


class DoutContiguous(Faulty):  # noqa: D101
    fault = "dout read as if it were contiguous"
    noticed_by = ("layouts",)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        flat = tuple(_misread(d) for d in subject.as_tuple(dout))
        return super().backward(flat if isinstance(dout, tuple) else flat[0], **keywords)

    @classmethod
    def why_not(cls, s: Sample) -> str:
        return "" if any(d.numel() > 1 for d in s.douts) else "dout is a single number"


def _misread(d: Tensor) -> Tensor:
    """The elements that a kernel would read that goes by data_ptr and shape alone."""
    storage = torch.tensor([], dtype=d.dtype).set_(d.untyped_storage())
    places: Tensor = torch.arange(d.numel()).add(d.storage_offset()).clamp(max=max(storage.numel() - 1, 0))
    return storage[places].view(d.shape) if d.numel() else d


class OneSlot(Faulty):  # noqa: D101
    fault = "a record of one slot: each forward overwrites it"
    noticed_by = ("reuse",)

    def forward(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled():
            self.latest = inputs
        return super().forward(*inputs)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        kept = calls.copies(subject.buffers(self))
        super().forward(*self.latest)
        for name, b in subject.buffers(self).items():
            b.copy_(kept[name])
        return super().backward(dout, **keywords)


class DrawsInBackward(_InDx):  # noqa: D101
    fault = "random numbers drawn anew in backward"
    noticed_by = ("rng",)

    def change(self, dx: Tensor) -> Tensor:
        return dx * torch.rand(())


class _InModes(Faulty):
    """A fault that only a layer with two behaviours can have."""

    @classmethod
    def why_not(cls, s: Sample) -> str:
        if not subject.has_modes(s.layer):
            return "no modes"
        with subject.private_rng(s.seed), torch.no_grad():
            train, evaluation = s.mode(True), s.mode(False)
            a = calls.forward(train.copy(), s.inputs)
            b = calls.forward(evaluation.copy(), s.inputs)
        return "" if any(not judge.identical(x, y) for x, y in zip(a, b)) else "training and evaluation do the same"


class TrainsInEval(_InModes):  # noqa: D101
    fault = "the training path taken in eval()"
    noticed_by = ("modes",)

    def forward(self, *inputs: Any) -> Any:
        mode = self.training
        subject.set_mode(self.wrapped_layer, True)
        try:
            return super().forward(*inputs)
        finally:
            subject.set_mode(self.wrapped_layer, mode)


class BuffersStuck(Faulty):  # noqa: D101
    fault = "buffers never updated"
    noticed_by = ("state",)

    def forward(self, *inputs: Any) -> Any:
        kept = calls.copies(subject.buffers(self))
        out = super().forward(*inputs)
        for name, b in subject.buffers(self).items():
            b.copy_(kept[name])
        return out

    @classmethod
    def why_not(cls, s: Sample) -> str:
        if not subject.buffers(s.layer):
            return "no buffers"
        if not s.oracle.keeps_buffers:
            return "only module= says what buffers must be"
        twin = s.copy()
        before = calls.copies(subject.buffers(twin))
        with subject.private_rng(s.seed), torch.no_grad():
            calls.forward(twin, s.inputs)
        changed = any(not torch.equal(b, before[name]) for name, b in subject.buffers(twin).items())
        return "" if changed else "no forward changes a buffer"


class OutScaled(Faulty):  # noqa: D101
    fault = "out times 1 + 1e-6"
    noticed_by = ("state",)

    def forward(self, *inputs: Any) -> Any:
        out = super().forward(*inputs)
        scaled = tuple(o * (1 + 1e-6) for o in subject.as_tuple(out))
        return scaled if isinstance(out, tuple) else scaled[0]

    @classmethod
    def why_not(cls, s: Sample) -> str:
        return "" if s.oracle.independent else "only reference= or module= says what out must be"


FAULTS: tuple[type[Faulty], ...] = (
    DxScaled,
    DxElement,
    DxShape,
    DxDtype,
    DxOffset,
    GradScaled,
    GradMissing,
    GradOverwritten,
    GradShared,
    DoutOnes,
    DoutWritten,
    XWritten,
    DoutContiguous,
    OneSlot,
    DrawsInBackward,
    TrainsInEval,
    BuffersStuck,
    OutScaled,
)


@dataclass(frozen=True)
class _Fate:
    text: str
    survived: bool = False


def plant(kept: Mapping[str, list[Sample]], skip: Mapping[str, str]) -> dict[str, str]:
    """Plant every fault into the layers of the samples that passed, and run the property that must notice it.

    Returns what became of each fault. Raises VacuousCheck for one that went unnoticed.
    """
    fates = {fault.fault: _fate(fault, kept, skip) for fault in FAULTS}
    survivors = [name for name, fate in fates.items() if fate.survived]
    if survivors:
        raise VacuousCheck(
            f"these inputs cannot notice {'; nor '.join(survivors)}. The layer passed, but would also have passed with "
            "that fault. Let x, options, sizes or ranges vary more; or skip={'sensitivity': 'why'} if it cannot matter"
        )
    return {name: fate.text for name, fate in fates.items()}


def _fate(fault: type[Faulty], kept: Mapping[str, list[Sample]], skip: Mapping[str, str]) -> _Fate:
    names = [name for name in fault.noticed_by if name not in skip]
    if not names:
        return _Fate(f"not judged: {', '.join(fault.noticed_by)} skipped")
    reason = "no examples"
    tried = False
    for name in names:
        if name not in kept:
            continue
        others = [s for other, drawn in kept.items() if other not in (name, "edges", "special") for s in drawn]
        for sample in [*kept[name], *others]:
            why_not = fault.why_not(sample)
            if why_not:
                reason = why_not
                continue
            tried = True
            if _noticed(fault, sample, PROPERTIES[name].check):
                return _Fate(f"noticed by {name}")
    return _Fate("", survived=True) if tried else _Fate(f"does not apply: {reason}")


def _noticed(fault: type[Faulty], sample: Sample, check: Callable[[Sample], None]) -> bool:
    try:
        faulty = fault(sample.copy())
        if sample.truth.source == "finite differences":  # which judge less sharply
            faulty.size = 1e-2
        check(sample.with_layer(faulty))
    except CheckFailure:
        return True
    except (CheckError, NotApplicable):
        return False
    return False
