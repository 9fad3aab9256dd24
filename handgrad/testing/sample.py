"""One example to check: a layer, its inputs, a dout for each output; and the registry of properties over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import calls, subject
from handgrad.testing.oracle import Oracle, Truth


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
    kinks: Mapping[float, float] = field(default_factory=dict)
    seed: int = 0
    policed: bool = True
    made_by: str = ""  # how the layer was made, for the failure text

    @cached_property
    def truth(self) -> Truth:
        """What the oracle says."""
        return self.oracle.truth(self.layer, self.inputs, self.douts, self.seed)

    @cached_property
    def result(self) -> calls.Result:
        """What the layer says, in one ordinary forward and backward."""
        return calls.run(self.layer, self.inputs, self.douts, self.seed)

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

    def key(self) -> int:
        """A hash of everything in the example, to count distinct ones."""
        everything = [*self.inputs, *self.douts, *subject.tensors(self.layer).values()]
        return hash((repr(self.layer), *((tuple(t.shape), t.detach().cpu().numpy().tobytes()) for t in everything)))


def sample_of(
    layer: Any,
    x: Any,
    dout: Any = None,
    *,
    other: Any = None,
    reference: Callable[..., Any] | None = None,
    module: Callable[[], torch.nn.Module] | None = None,
    kinks: Mapping[float, float] | None = None,
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
        PROPERTIES[name] = Property(number, name, (check.__doc__ or "").split("\n")[0], check)

        @functools.wraps(check)
        def public(layer: Any, *args: Any, **keywords: Any) -> None:
            check(layer if isinstance(layer, Sample) and not args else sample_of(layer, *args, **keywords))

        return public

    return register
