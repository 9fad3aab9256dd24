"""One example to check: a layer, its inputs, a dout for each output, and what the layer and the oracle make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import judge, subject
from handgrad.testing.oracle import Oracle, Truth


@dataclass(frozen=True, repr=False)
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
    arguments: Mapping[str, Any] = field(default_factory=dict)  # what its constructor was called with
    scales: Mapping[str, float] = field(default_factory=dict)  # of gradients whose own size is no measure

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs)
        return f"Sample of {subject.name_of(self.layer)} for {shapes}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @cached_property
    def truth(self) -> Truth:
        """What the oracle says."""
        return self.oracle.truth(self.layer, self.inputs, self.douts, self.seed)

    @cached_property
    def result(self) -> subject.Result:
        """What the layer says, in one ordinary forward and backward."""
        return self.run()

    def run(self, inputs: tuple[Any, ...] | None = None, douts: tuple[Tensor, ...] | None = None) -> subject.Result:
        """One forward and backward of a copy; with other inputs or douts, where they are given."""
        return subject.run(self.layer, inputs or self.inputs, douts or self.douts, self.seed)

    @cached_property
    def floor(self) -> judge.Floor:
        """The least scale that a gradient is judged by: 1e-3 of what it is a sum of, before anything cancels.

        That is the largest dout times the largest parameter, with which it is multiplied on its way to an input; and
        times the largest input at the end of its way to a parameter.
        """
        parameters = subject.parameters(self.layer)
        dout = max(map(judge.largest, self.douts + self.other_douts), default=0.0)
        to_input = 1e-3 * dout * max([1.0, *map(judge.largest, parameters.values())])
        to_parameter = to_input * max([1.0, *(judge.largest(x) for x in self.inputs if x.is_floating_point())])
        return lambda name: max(self.scales.get(name, 0.0), to_parameter if name in parameters else to_input)

    @cached_property
    def same_code(self) -> judge.Limit:
        """How far the same code may be off when its calls come in another order."""
        return judge.within(judge.SAME_CODE, self.floor)

    def copy(self) -> Any:
        """A copy of the layer, free to be used."""
        return subject.clone(self.layer)

    def with_layer(self, layer: Any) -> Sample:
        """The same example for another layer object."""
        return replace(self, layer=layer)

    def mode(self, training: bool) -> Sample:
        """The same example with the layer in training or in evaluation."""
        twin = self.copy()
        subject.set_mode(twin, training)
        return self.with_layer(twin)

    def tensors(self) -> list[Tensor]:
        """Everything that was drawn: inputs, douts, and what is in the layer."""
        return [*self.inputs, *self.douts, *subject.tensors(self.layer).values()]

    def richness(self) -> int:
        """How many numbers in the example are not zero."""
        return sum(int(t.count_nonzero()) for t in self.tensors())

    def key(self) -> int:
        """A hash of everything in the example, to count distinct ones."""
        return hash((repr(self.layer), *((t.shape, *t.flatten().tolist()) for t in self.tensors())))


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
    subject.check_contract(layer)
    layer, inputs = subject.Packed(layer, subject.form_of(subject.as_tuple(x))), subject.flatten(x)
    others = tuple(t.flip(0) if t.dim() else t for t in inputs) if other is None else subject.flatten(other)
    subject.study(layer, inputs)
    douts = _normal_douts(layer, inputs, seed) if dout is None else subject.flatten(dout)
    oracle = Oracle(reference, module)
    return Sample(layer, inputs, douts, others, _normal_douts(layer, others, seed + 1), oracle, kinks or {}, seed)


def _normal_douts(layer: Any, inputs: tuple[Any, ...], seed: int) -> tuple[Tensor, ...]:
    """Normal douts for the outputs that these inputs give."""
    with subject.private_rng(seed), torch.no_grad():
        outs = subject.forward(subject.clone(layer), inputs)
        return tuple(torch.randn_like(out) if out.is_floating_point() else torch.zeros(out.shape) for out in outs)
