"""How much of a difference rounding explains.

Every gradient is judged by its own size. That is no measure where large numbers cancel (equal rows under a batch norm,
a bias before one): such a gradient is all rounding noise. So there is a floor under each size; a failure that noise
may explain gets a second look, by the noise that the oracle itself has (`judged_by_noise`); and float32 is judged by
the error that the oracle makes in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import judge, subject
from handgrad.testing.errors import GradientMismatch
from handgrad.testing.oracle import Truth
from handgrad.testing.sample import Sample

F32 = torch.finfo(torch.float32).eps
FINER = torch.finfo(torch.float64).eps / F32  # 2^-29
SPARE = 16  # how often the noise that is expected a right backward may have, as in the rule for float32

Example = tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]  # a layer, its inputs and its douts


def may_be_noise(failure: GradientMismatch) -> bool:
    """Whether the difference may be the rounding of something large that cancelled.

    Rounding that a thousandfold scale explains (as the 1e-3 of `Sample.floor` allows), with a factor of 100 to spare. A
    larger difference is certainly a fault, and needs no second look.
    """
    got, want, allowed = (failure.details.get(key) for key in ("got", "want", "allowed"))
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or not isinstance(allowed, Tensor):
        return False
    return bool(torch.isfinite(got).all()) and judge.largest(got - want) < 1e5 * judge.largest(allowed)


def judged_by_noise(s: Sample) -> Sample:
    """The same example, its gradients judged by the scale that its rounding errors have.

    The oracle's error in float32 tells it: float64 is finer by a factor of 2^29, and so is its noise. Where the oracle
    adds up in float64 even for float32, its gradients for multiples of dout show the noise: they must be those
    multiples. Where nothing cancels these scales are far below the gradient's own.
    """
    noise: dict[str, float] = {}
    for example in in_float32(s, variants=3):
        with contextlib.suppress(Exception):  # what cannot run in float32 fails elsewhere, and tells nothing here
            noise |= {n: max(noise.get(n, 0.0), FINER * e) for n, e in oracle_error(s, example)[1].items()}
    for factor in (0.7, 1.1, 1.3):
        douts = tuple(factor * d for d in s.douts)
        grads = s.oracle.truth(s.layer, s.inputs, douts, s.seed).grads
        for n, g in s.truth.grads.items():
            other = grads.get(n)
            if g is not None and other is not None:
                noise[n] = max(noise.get(n, 0.0), judge.largest(other / factor - g))
    return replace(s, scales={n: SPARE * e / judge.SAME_CODE for n, e in noise.items()})


def in_float32(s: Sample, variants: int = 0) -> Iterator[Example]:
    """The example in float32; then variants of it, which have every number changed by about 0.001 or 0.1 %.

    That changes all rounding, of exact zeros too, and no scale: of dout, which may be tiny, only 0.1 % changes.
    """
    generator = torch.Generator().manual_seed(s.seed)

    def varied(t: Any, least: float = 1.0) -> Any:
        if not t.is_floating_point():
            return t
        return t + 1e-3 * (least + t.abs()) * torch.randn(t.shape, generator=generator, dtype=t.dtype)

    for k in range(1 + variants):
        layer = subject.cast(s.copy(), torch.float32)
        inputs, douts = _cast(s.inputs, torch.float32), _cast(s.douts, torch.float32)
        if k:
            for param in subject.parameters(layer).values():
                param.data = varied(param)
            inputs, douts = tuple(map(varied, inputs)), tuple(varied(d, 0) for d in douts)
        yield layer, inputs, douts


def oracle_error(s: Sample, example: Example) -> tuple[Truth, dict[str, float]]:
    """The float64 truth for an example in float32, and how far the oracle in float32 is from it, by tensor."""
    layer, inputs, douts = example
    exactly = subject.cast(subject.clone(layer), torch.float64)
    truth = s.oracle.truth(exactly, _cast(inputs, torch.float64), _cast(douts, torch.float64), s.seed)
    if truth.source == "finite differences":
        return truth, {}
    rounded = s.oracle.truth(layer, inputs, douts, s.seed)
    exact = {**truth.outs, **truth.grads}
    errors = {n: (t, exact[n]) for n, t in {**rounded.outs, **rounded.grads}.items() if t is not None}
    floating = {n: (t, w) for n, (t, w) in errors.items() if w is not None and w.is_floating_point()}
    return truth, {n: judge.largest(t.to(w) - w) for n, (t, w) in floating.items()}


def float32_limit(error: dict[str, float], floor: judge.Floor, eps: float = F32) -> judge.Limit:
    """Four times the oracle's own error and 16 eps of the scale; 1e-3 of it where finite differences judge.

    eps is that of the precision in which forward computes, which may be lower.
    """

    def limit(name: str, got: Tensor, want: Tensor) -> Tensor:
        scale = max(judge.largest(want), floor(name))
        allowed = 4 * error[name] + SPARE * eps * scale + F32 * F32 if name in error else 1e-3 * scale
        return torch.full_like(want, allowed)

    return limit


def _cast(tensors: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)
