"""One example to check: a layer, its inputs, a dout for each output; and the registry of properties over it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import calls, judge, subject
from handgrad.testing.errors import GradientMismatch
from handgrad.testing.oracle import Oracle, Truth

FINER = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps  # 2^-29
SPARE = 16  # how often the noise that is expected a right backward may have, as in the rule for float32


class NotApplicable(Exception):  # noqa: N818  # a finding about the layer, not an error
    """The property says nothing about this layer; the text says why."""


@dataclass(frozen=True)
class Sample:
    """A layer in float64, its inputs and the douts to send back, and a second batch for it.

    The layer is never used itself: every property works on copies.
    """

    layer: Any
    inputs: tuple[Any, ...]
    douts: tuple[Tensor, ...]
    other_inputs: tuple[Any, ...]
    other_douts: tuple[Tensor, ...]
    oracle: Oracle = field(default_factory=Oracle)
    kinks: Mapping[float, float | None] = field(default_factory=dict)
    seed: int = 0
    policed: bool = True  # whether finite differences look at the oracle in this example
    suspects_oracle: bool = True  # whether they may do so at all
    made_by: str = ""  # how the layer was made, for the failure text
    scales: Mapping[str, float] = field(default_factory=dict)  # of gradients, where the example's own are no measure

    def floor(self, name: str) -> float:
        """The least scale that a gradient is judged by: that of the rounding where it cancels out."""
        to_input, to_parameter = self._rounded
        return max(self.scales.get(name, 0.0), to_parameter if name in self._parameters else to_input)

    @cached_property
    def _rounded(self) -> tuple[float, float]:
        """1e-3 of what the gradients of inputs and of parameters are sums of, before anything cancels.

        That is the largest dout times the largest parameter, with which it is multiplied on its way to an input; and
        times the largest input at the end of its way to a parameter.
        """
        dout = max((judge.largest(d) for d in self.douts + self.other_douts), default=0.0)
        to_input = 1e-3 * dout * max([1.0, *map(judge.largest, self._parameters.values())])
        return to_input, to_input * max([1.0, *(judge.largest(x) for x in self.inputs if x.is_floating_point())])

    @cached_property
    def _parameters(self) -> dict[str, Tensor]:
        return subject.parameters(self.layer)

    @cached_property
    def truth(self) -> Truth:
        """What the oracle says."""
        return self.oracle.truth(self.layer, self.inputs, self.douts, self.seed)

    @cached_property
    def result(self) -> calls.Result:
        """What the layer says, in one ordinary forward and backward."""
        return calls.run(self.layer, self.inputs, self.douts, self.seed)

    def in_float32(self, neighbours: int = 0) -> Iterator[tuple[Any, tuple[Any, ...], tuple[Tensor, ...]]]:
        """Layer, inputs and douts in float32; then neighbours, which have every number changed by about 0.001 or 0.1 %.

        That changes all rounding, of exact zeros too, and no scale: of dout, which may be tiny, only 0.1 % changes.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for k in range(1 + neighbours):
            layer = subject.cast(self.copy(), torch.float32)
            inputs, douts = (tuple(_cast(t, torch.float32) for t in each) for each in (self.inputs, self.douts))
            if k:
                for param in subject.parameters(layer).values():
                    param.data = _near(param, generator)
                inputs, douts = tuple(_near(x, generator) for x in inputs), tuple(_near(d, generator, 0) for d in douts)
            yield layer, inputs, douts

    def rounding(
        self, layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...]
    ) -> tuple[Truth, dict[str, float]]:
        """The float64 truth for float32 tensors, and how far the oracle in float32 is from it, by tensor."""
        exactly = subject.cast(subject.clone(layer), torch.float64)
        up, douts_up = (tuple(_cast(t, torch.float64) for t in each) for each in (inputs, douts))
        truth = self.oracle.truth(exactly, up, douts_up, self.seed)
        if truth.source == "finite differences":
            return truth, {}
        rounded = self.oracle.truth(layer, inputs, douts, self.seed).result
        exact = {**truth.result.outs, **truth.result.grads}
        errors = {n: (t, exact[n]) for n, t in {**rounded.outs, **rounded.grads}.items()}
        return truth, {n: judge.largest(t.to(w) - w) for n, (t, w) in errors.items() if t is not None and w is not None}

    def scaled_by_rounding(self) -> Sample:
        """The same example, with the scale that its rounding errors have.

        Where large numbers cancel (equal rows under a batch norm, a bias before one), the gradients are all noise, and
        their own size does not say how large that noise may be. The oracle's error in float32 does: float64 is finer by
        a factor of 2^29, and so is its noise. Where the oracle adds up in float64 even for float32, its gradients for
        multiples of dout show the noise: they must be those multiples. Where nothing cancels these scales are far below
        the gradient's own.
        """
        noise: dict[str, float] = {}
        for example in self.in_float32(neighbours=3):
            with contextlib.suppress(Exception):  # what cannot run in float32 fails elsewhere, and tells nothing here
                noise |= {n: max(noise.get(n, 0.0), FINER * e) for n, e in self.rounding(*example)[1].items()}
        for factor in (0.7, 1.1, 1.3):
            douts = tuple(factor * d for d in self.douts)
            grads = self.oracle.truth(self.layer, self.inputs, douts, self.seed).result.grads
            for n, g in self.truth.result.grads.items():
                other = grads.get(n)
                if g is not None and other is not None:
                    noise[n] = max(noise.get(n, 0.0), judge.largest(other / factor - g))
        return replace(self, scales={n: SPARE * e / judge.SAME_CODE for n, e in noise.items()})

    def copy(self) -> Any:
        """A copy of the layer, free to be used."""
        return subject.clone(self.layer)

    def with_layer(self, layer: Any) -> Sample:
        """The same example for another layer object."""
        return replace(self, layer=layer)

    def with_inputs(self, inputs: tuple[Any, ...], douts: tuple[Tensor, ...]) -> Sample:
        """The same layer with other inputs."""
        return replace(self, inputs=inputs, douts=douts)

    def mode(self, training: bool) -> Sample:
        """The same example with the layer in training or in evaluation."""
        twin = self.copy()
        subject.set_mode(twin, training)
        return replace(self, layer=twin)

    def tensors(self) -> list[Tensor]:
        """Everything that was drawn: inputs, douts, and what is in the layer."""
        return [*self.inputs, *self.douts, *subject.tensors(self.layer).values()]

    def richness(self) -> int:
        """How many numbers in the example are not zero."""
        return sum(int(t.count_nonzero()) for t in self.tensors())

    def key(self) -> int:
        """A hash of everything in the example, to count distinct ones."""
        everything = self.tensors()
        return hash((repr(self.layer), *((tuple(t.shape), t.detach().cpu().numpy().tobytes()) for t in everything)))


def sample_of(
    layer: Any,
    x: Any,
    dout: Any = None,
    *,
    other: Any = None,
    reference: Callable[..., Any] | None = None,
    module: Callable[[], torch.nn.Module] | None = None,
    kinks: Mapping[float, float | None] | None = None,
    seed: int = 0,
) -> Sample:
    """Make a Sample of what a user has at hand; douts that are not given are drawn from a normal."""
    calls.check_contract(layer)
    inputs = subject.as_tuple(x)
    others = tuple(t.flip(0) if t.dim() else t for t in inputs) if other is None else subject.as_tuple(other)
    douts = draw_douts(layer, inputs, seed) if dout is None else subject.as_tuple(dout)
    oracle = Oracle(reference, module)
    return Sample(layer, inputs, douts, others, draw_douts(layer, others, seed + 1), oracle, kinks or {}, seed)


def draw_douts(layer: Any, inputs: tuple[Any, ...], seed: int) -> tuple[Tensor, ...]:
    """Normal douts for the outputs that these inputs give."""
    with subject.private_rng(seed), torch.no_grad():
        outs = calls.forward(subject.clone(layer), inputs)
        return tuple(torch.randn_like(out) for out in outs)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if t.is_floating_point() else t


def _near(t: Any, generator: torch.Generator, least: float = 1.0) -> Any:
    if not t.is_floating_point():
        return t
    return t + 1e-3 * (least + t.abs()) * torch.randn(t.shape, generator=generator, dtype=t.dtype)


def _may_be_noise(failure: GradientMismatch) -> bool:
    """Whether the difference is small enough to be the rounding of something large that cancelled.

    Rounding that a thousandfold scale explains (the 1e-3 of `Sample.floor` turned round), with as much again to spare;
    a larger difference is none, and stays a failure without a second look.
    """
    got, want, allowed = (failure.details.get(key) for key in ("got", "want", "allowed"))
    if not isinstance(got, Tensor) or not isinstance(want, Tensor) or not isinstance(allowed, Tensor):
        return False
    return bool(torch.isfinite(got).all()) and judge.largest(got - want) < 1e5 * judge.largest(allowed)


@dataclass(frozen=True)
class Property:
    """A property that every right layer has."""

    number: int
    name: str
    says: str
    check: Callable[[Sample], None]


PROPERTIES: dict[str, Property] = {}


def prop(number: int, name: str) -> Callable[[Callable[[Sample], None]], Callable[..., None]]:
    """Register a function of a Sample as a property, and make it callable with a layer and its input, too."""

    def register(check: Callable[[Sample], None]) -> Callable[..., None]:
        def twice(s: Sample) -> None:
            try:
                check(s)
            except GradientMismatch as failure:
                if not _may_be_noise(failure):
                    raise
                check(s.scaled_by_rounding())

        PROPERTIES[name] = Property(number, name, (check.__doc__ or "").split("\n")[0], twice)

        @functools.wraps(check)
        def public(layer: Any, *args: Any, **keywords: Any) -> None:
            twice(layer if isinstance(layer, Sample) and not args else sample_of(layer, *args, **keywords))

        return public

    return register
