"""Where the right gradients come from: a reference, autograd through the layer's own forward, or differences.

Finite differences are the one oracle that no bug in a backward or in a detach can fool, and the least precise. So
they police the two others, and judge alone where a forward leaves autograd nothing to follow (numpy inside, detach).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from handgrad.testing import judge, subject
from handgrad.testing.errors import LayerCrash, OracleError, OutputMismatch
from handgrad.tracked import tracked_by_autograd

DIRECTIONS = 3
NEIGHBOURS = 3  # points looked at beside one that may be a kink
STEP = 1e-5  # times max(1, |x|): the rounding of f / h and the error h^2 f''' are then about equal in float64

Call = Callable[..., tuple[Tensor, ...]]


@dataclass
class Truth(subject.Result):
    """The right outputs, gradients and buffers, and who says so."""

    source: str = ""
    uncertainty: dict[str, Tensor] = field(default_factory=dict)  # of finite differences, by gradient

    def limit(self, share: float, floor: judge.Floor) -> judge.Limit:
        """`judge.within`, widened to what the oracle itself can tell."""
        exact = judge.within(share if self.source != "finite differences" else judge.AGAINST_DIFFERENCES, floor)
        return lambda name, got, want: exact(name, got, want) + self.uncertainty.get(name, 0)


@dataclass(frozen=True)
class Oracle:
    """How to find the right gradients of one layer object.

    `reference` is a function of the inputs, or of the layer and the inputs if its first argument is called `layer`;
    `module` makes an equal torch.nn.Module, which is given the layer's parameters, buffers and mode. With neither, the
    layer's own forward serves, and a wrong forward goes unnoticed. `differences=True` asks for finite differences.
    """

    reference: Callable[..., Any] | None = None
    module: Callable[[], torch.nn.Module] | None = None
    differences: bool = False

    @property
    def independent(self) -> bool:
        """Whether it can also notice a wrong forward."""
        return self.reference is not None or self.module is not None

    @property
    def keeps_buffers(self) -> bool:
        """Whether it says what the buffers must be."""
        return self.module is not None

    def truth(self, layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...], seed: int = 0) -> Truth:
        """The right result for these inputs and this dout."""
        return _Point(self, layer, inputs, douts, seed).truth()

    def police(self, layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...], truth: Truth, seed: int) -> None:
        """Raise OracleError where finite differences in random directions contradict the gradients in `truth`.

        A kink (a slope that jumps, as at 0 or where a norm is 0) is no fault of the oracle's: there, differences have
        nothing to say. It is known by the points around it, at which the two agree.
        """
        if truth.source == "finite differences":
            return
        point = _Point(self, layer, inputs, douts, seed)
        contradiction = point.contradiction(truth)
        if not contradiction:
            return
        for k in range(NEIGHBOURS):
            near = point.neighbour(k)
            there = near.truth()
            if there.source == truth.source and not near.contradiction(there):
                return
        raise OracleError(contradiction)

    def bind(self, layer: Any) -> tuple[Call, Any]:
        """The oracle's forward as a function of the inputs, and the object that holds its parameters and buffers."""
        layer = subject.honest(layer)
        if self.module is not None:
            module: Any = self._module(layer)
            function, owner = module, module
        elif self.reference is None:
            twin = subject.clone(layer)
            return lambda *inputs: subject.forward(twin, inputs), twin
        else:
            function, owner = self.reference, subject.clone(layer)
            if next(iter(_argument_names(self.reference)), "") == "layer":
                function = partial(self.reference, subject.unwrap(owner))

        def call(*inputs: Any) -> tuple[Tensor, ...]:
            with subject.comparable(layer, inputs):
                return subject.flatten(function(*subject.packed(layer, inputs)))

        return call, owner

    def _module(self, layer: Any) -> torch.nn.Module:
        assert self.module is not None
        module = self.module()
        state = subject.state(layer)
        for dtype in {t.dtype for t in state.values() if t.is_floating_point()}:
            module = module.to(dtype)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise OracleError(f"module= must have the layer's parameters and buffers under the same names: {error}")  # noqa: B904
        return module.train(getattr(layer, "training", True))


@dataclass(frozen=True)
class _Point:
    """A layer at given parameters and inputs, with the douts to send back."""

    oracle: Oracle
    layer: Any
    inputs: tuple[Any, ...]
    douts: tuple[Tensor, ...]
    seed: int

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by its name."""
        return {**subject.differentiable(self.layer, self.inputs), **self.trained(self.layer)}

    def trained(self, owner: Any) -> dict[str, Tensor]:
        """The owner's parameters that have a gradient: those that are floating, and not frozen in the layer."""
        frozen = subject.frozen(self.layer)
        return {n: p for n, p in subject.parameters(owner).items() if p.is_floating_point() and n not in frozen}

    def truth(self) -> Truth:
        """What autograd says, or else finite differences."""
        found = None if self.oracle.differences else self.autograd()
        return self.differences() if found is None else found

    def autograd(self) -> Truth | None:
        """What autograd says, or None where forward leaves it nothing to follow."""
        independent = self.oracle.independent
        inputs = subject.differentiable(self.layer, self.inputs)
        leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
        call, owner = self.oracle.bind(self.layer)
        params = {name: p.requires_grad_() for name, p in self.trained(owner).items()}
        wanted = {**leaves, **params}
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        with subject.recording(self.seed), tracked_by_autograd():
            try:
                outs = call(*self._inputs_with(leaves))
                self._check_shapes(outs)
                tracked = [(o, d) for o, d in zip(outs, self.douts) if o.requires_grad]
                if wanted and not tracked and not independent:
                    return None
                if wanted and tracked:
                    tops, douts = zip(*tracked)
                    grads = torch.autograd.grad(tops, list(wanted.values()), douts, allow_unused=True)
            except (RuntimeError, TypeError, LayerCrash):
                if independent:
                    raise
                return None
        found = dict(zip(wanted, grads))
        if not independent and self._moves_unseen([name for name, grad in found.items() if grad is None]):
            return None
        for name, leaf in leaves.items():
            found[name] = torch.zeros_like(leaf) if found[name] is None else found[name]
        kept = {n: found.get(n) for n in [*leaves, *subject.parameters(self.layer)]}
        named = subject.named("out", tuple(o.detach() for o in outs))
        source = "reference" if independent else "autograd through forward"
        return Truth(named, kept, subject.copies(subject.buffers(owner)), source)

    def _check_shapes(self, outs: tuple[Tensor, ...]) -> None:
        theirs, ours = [tuple(o.shape) for o in outs], [tuple(d.shape) for d in self.douts]
        if theirs != ours:
            raise OutputMismatch(f"forward gives outputs of shapes {ours}, the reference {theirs}")

    def _moves_unseen(self, silent: list[str]) -> bool:
        """Whether one of the tensors that autograd found no path to does move the outputs."""
        moved = {k: torch.where(v >= 0, 1.0, -1.0).to(v) for k, v in self.leaves.items() if k in silent}
        slope, uncertainty = self.slope(moved) if moved else (0.0, 0.0)
        return abs(slope) > uncertainty + 1e-9

    def differences(self) -> Truth:
        """What finite differences say, one number after the other."""
        grads: dict[str, Tensor | None] = dict.fromkeys(subject.frozen(self.layer))
        uncertain: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            grad, doubt = torch.zeros_like(leaf).flatten(), torch.zeros_like(leaf).flatten()
            for i in range(leaf.numel()):
                step = torch.zeros_like(grad)
                step[i] = leaf.flatten()[i].abs().clamp(min=1)
                slope, uncertainty = self.slope({name: step.view(leaf.shape)})
                grad[i], doubt[i] = slope / step[i], uncertainty / float(step[i])
            grads[name], uncertain[name] = grad.view(leaf.shape), doubt.view(leaf.shape)
        call, owner = self.oracle.bind(self.layer)
        with subject.private_rng(self.seed), torch.no_grad():
            outs = subject.named("out", call(*self.inputs))
        return Truth(outs, grads, subject.copies(subject.buffers(owner)), "finite differences", uncertain)

    def contradiction(self, truth: Truth) -> str:
        """What finite differences say against the truth; nothing where they agree."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        grads = {k: g for k, g in truth.grads.items() if g is not None}
        for _ in range(DIRECTIONS):
            direction = {
                k: torch.randn(v.shape, generator=generator, dtype=v.dtype) * v.abs().clamp(min=1)
                for k, v in self.leaves.items()
            }
            slope, uncertainty = self.slope(direction)
            if not math.isfinite(slope):  # a loss of NaN (every row ignored) has no slope to compare
                continue
            told = sum((float((grads[k] * direction[k]).sum()) for k in grads), 0.0)
            size = sum((float((grads[k] * direction[k]).abs().sum()) for k in grads), 1e-3)
            if not abs(slope - told) <= judge.AGAINST_DIFFERENCES * size + uncertainty:
                return (
                    f"{truth.source} contradicts finite differences of the same function, here and nearby: the slope "
                    f"in a random direction is {slope:.9g}, the gradients say {told:.9g} (uncertain by "
                    f"{uncertainty:.2g}). Nothing is said about backward. Either part of forward is hidden from "
                    "autograd (detach, .data, numpy: check with oracle='differences'), or the reference is wrong, or "
                    "the gradient is by definition not the slope (skip={'differences': why})"
                )
        return ""

    def slope(self, direction: dict[str, Tensor]) -> tuple[float, float]:
        """The derivative of sum(dout * out) along `direction`, and how uncertain it is.

        Half the step must give the same slope, and half the difference between the two sides. How far it does not
        (curvature, a kink between the points) is the uncertainty.
        """
        f0, slopes, jumps = self._objective({}, 0), [], []
        for h in (STEP, STEP / 2):
            ahead, behind = self._objective(direction, h), self._objective(direction, -h)
            slopes.append((ahead - behind) / (2 * h))
            jumps.append((ahead - 2 * f0 + behind) / h)
        noise = 1e-15 * (abs(f0) + 1) / STEP
        uncertainty = 8 * abs(slopes[0] - slopes[1]) + 2 * abs(2 * jumps[1] - jumps[0]) + 100 * noise
        return slopes[1], uncertainty

    def _objective(self, direction: dict[str, Tensor], h: float) -> float:
        """sum(dout * out), a step of h along `direction` away."""
        layer = subject.clone(self.layer)
        params = subject.parameters(layer)
        for name in direction.keys() & params.keys():
            params[name].data = params[name].data + h * direction[name]
        inputs = subject.differentiable(self.layer, self.inputs)
        call, _ = self.oracle.bind(layer)
        with subject.private_rng(self.seed), torch.no_grad():
            outs = call(*self._inputs_with({n: x + h * direction[n] for n, x in inputs.items() if n in direction}))
            return sum(float((out * dout).sum()) for out, dout in zip(outs, self.douts) if out.is_floating_point())

    def _inputs_with(self, new: dict[str, Tensor]) -> tuple[Any, ...]:
        names = subject.input_names(self.layer, self.inputs)
        return tuple(new.get(name, x) for name, x in zip(names, self.inputs))

    def neighbour(self, k: int) -> _Point:
        """The k-th point beside this one: every number moved by up to a tenth, towards 0, or up where it is 0.

        So no number leaves the range it was drawn from, equal ones become unequal, and none stays on a kink.
        """
        generator = torch.Generator().manual_seed(self.seed + k + 2)

        def moved(t: Any) -> Any:
            if not t.is_floating_point():
                return t
            share = 0.05 + 0.05 * torch.rand(t.shape, generator=generator, dtype=t.dtype)
            return torch.where(t == 0, share, t * (1 - share))

        layer = subject.clone(self.layer)
        for param in subject.parameters(layer).values():
            param.data = moved(param)
        return replace(self, layer=layer, inputs=tuple(map(moved, self.inputs)))


def _argument_names(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return []
