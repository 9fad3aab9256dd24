"""Hypothesis strategies: tensors, indices, and whole samples of a layer, for check_layer and for your own @given.

Values come in tiers. The first, to which an example shrinks, is a grid of eighths around 0 drawn byte by byte; then
normals at a scale of 0.1 to 3; `special` adds exact zeros, kinks, values far out and constant columns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from handgrad.testing import subject
from handgrad.testing.errors import CheckFailure, LayerCrash
from handgrad.testing.oracle import Oracle
from handgrad.testing.plan import LONG, Input, Plan, plan_of
from handgrad.testing.properties.values import is_refusal
from handgrad.testing.sample import Sample

SIZES = (1, 4)
RICH = (2, 5)  # of examples that must show more than an accident
FAR = (0.0, 30.0, -30.0, 800.0, -800.0, 1.0, -0.5, 1e-3)


@st.composite
def tensors(draw: DrawFn, shape: Sequence[int], special: bool = False, kinks: Sequence[float] = ()) -> Tensor:
    """A float64 tensor of the shape; away from `kinks`, unless it is special and may hit them exactly."""
    return _values(draw, _generator(draw), shape, special, kinks)


@st.composite
def distinct_tensors(draw: DrawFn, shape: Sequence[int]) -> Tensor:
    """A float64 tensor without two equal elements, for maxima and sorting."""
    return _distinct(_generator(draw), shape)


@st.composite
def indices(draw: DrawFn, shape: Sequence[int], below: int, special: bool = False) -> Tensor:
    """An int64 tensor of values from 0 to below - 1; half of the time with many equal ones. Special: the extremes."""
    raw = _bytes(draw, torch.Size(shape).numel())
    if special:
        values = torch.where(raw % 2 == 1, below - 1, 0)
    else:
        values = raw % (min(2, below) if draw(st.booleans()) else below)
    return values.to(torch.int64).view(tuple(shape))


@st.composite
def douts(draw: DrawFn, shape: Sequence[int]) -> Tensor:
    """A float64 tensor to send back: never constant where it need not be; of eighths, normal, sparse, large, small."""
    return _dout(draw, _generator(draw), shape)


@st.composite
def samples(draw: DrawFn, plan: Plan, edges: bool = False, special: bool = False) -> Sample:
    """A Sample: the layer with drawn sizes, options, parameters, buffers and mode; two batches; and douts for them.

    With `edges` some sizes are 0 or 1. An input that the layer refuses for a size of 0 or 1 is drawn again, unless it
    is an edge; and so are values of `plan.implied` that the constructor refuses.
    """
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    chance = random.Random(f"{plan.long} {seed}") if plan.rich else None  # for hypothesis begins with the least of all
    drawn: dict[str, Any] = {name: _option(draw, chance, values) for name, values in plan.options.items()}
    drawn.update(_sizes(draw, chance, plan, plan.names, edges))
    with subject.private_rng(seed):
        layer, arguments = _built(plan, drawn)
        module = plan.build_module(drawn)
    subject.check_contract(layer)
    each = None if plan.rich else draw  # so many numbers come from the generator
    for name, param in subject.parameters(layer).items():
        if param.is_floating_point():
            param.data = _within(_values(each, generator, param.shape), plan.ranges.get(name))
    others = {**drawn, **_sizes(draw, chance, plan, [name for name in plan.names if name not in plan.arguments], False)}
    inputs = tuple(_input(each, generator, plan, item, drawn, special) for item in plan.inputs)
    other_inputs = tuple(_input(None, generator, plan, item, others) for item in plan.inputs)
    if subject.has_modes(layer):
        if subject.buffers(layer):
            _warm_up(layer, other_inputs, draw(st.integers(0, 2)))
        subject.set_mode(layer, draw(st.integers(0, 2)) < 2)
    subject.refuse_undeclared(layer, inputs)
    probe = subject.clone(layer)
    mine, theirs = (_outs(probe, each, edges, seed) for each in (inputs, other_inputs))
    subject.study(layer, inputs)
    return Sample(
        layer,
        inputs,
        tuple(_dout(each, generator, out.shape) for out in mine),  # what has no gradient is not given its dout
        other_inputs,
        tuple(_dout(None, generator, out.shape) for out in theirs),
        Oracle(plan.reference_for(drawn), module, plan.differences),
        plan.kinks,
        seed,
        policed=not (special or edges or plan.long) and seed % 8 == 0,
        made_by=plan.title(drawn),
        arguments=arguments,
    )


def samples_of(make: Callable[..., Any], x: str | Sequence[Any], **what: Any) -> SearchStrategy[Sample]:
    """Samples by the arguments of `check_layer`, for a test of your own.

    >>> from hypothesis import given, settings
    >>> from handgrad import Tanh
    >>> from handgrad.testing import assert_gradients
    >>> @settings(max_examples=5, database=None)
    ... @given(samples_of(Tanh, x="*N"))
    ... def test_tanh(sample):
    ...     assert_gradients(sample)
    >>> test_tanh()
    """
    return samples(plan_of(make, x, **what))


def _built(plan: Plan, drawn: Mapping[str, Any]) -> tuple[subject.Packed, dict[str, Any]]:
    """The layer in float64, and its constructor's arguments."""
    try:
        layer, arguments = plan.build(drawn)
    except (ValueError, NotImplementedError):
        if any(drawn[name] != plan.default(name) for name in plan.implied):
            reject()  # nobody said that it takes this value; the report names those that were drawn
        raise
    return subject.cast(layer, torch.float64), arguments


def _generator(draw: DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**20)))


def _values(
    draw: DrawFn | None,
    generator: torch.Generator,
    shape: Sequence[int],
    special: bool = False,
    kinks: Sequence[float] = (),
) -> Tensor:
    """Values of the tier drawn; without `draw`, normals."""
    shape = tuple(shape)
    numel = torch.Size(shape).numel()
    tier = 1 if draw is None else draw(st.integers(0, 3))
    if special and tier and draw is not None:
        places = torch.tensor([*FAR, *kinks], dtype=torch.float64)
        values = places[_bytes(draw, numel) % len(places)].view(shape)
        return values[:1].expand(shape).clone() if tier == 3 and shape and shape[0] else values
    if tier or draw is None:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * (1.0, 3.0, 0.1)[tier - 1]
    else:
        raw = _bytes(draw, numel) % 65
        values = (torch.where(raw % 2 == 1, raw + 1, -raw) / 16.0).to(torch.float64).view(shape)
    for kink in [] if special else kinks:
        near = (values - kink).abs() < 0.01
        values = torch.where(near, kink + torch.where(values < kink, -0.125, 0.125), values)
    return values


def _distinct(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    numel = torch.Size(shape).numel()
    places = torch.randperm(numel, generator=generator).to(torch.float64)
    return ((places - numel // 2) / 8 + 1 / 16).view(tuple(shape))


def _dout(draw: DrawFn | None, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    shape = tuple(shape)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = 1 if draw is None else draw(st.integers(0, 4))
    if kind == 0:
        return (values * 8).round().clamp(-32, 32) / 8
    if kind == 4:
        return values * (torch.rand(shape, generator=generator) < 0.5)
    return values * (1.0, 100.0, 1e-3)[kind - 1]


def _bytes(draw: DrawFn, n: int) -> Tensor:
    return torch.tensor(list(draw(st.binary(min_size=n, max_size=n))), dtype=torch.int64)


def _option(draw: DrawFn, chance: random.Random | None, values: Any) -> Any:
    if isinstance(values, SearchStrategy):
        return draw(values)
    return draw(st.sampled_from(list(values))) if chance is None else chance.choice(list(values))


def _sizes(draw: DrawFn, chance: random.Random | None, plan: Plan, names: Sequence[str], edges: bool) -> dict[str, Any]:
    """Draw a size for each name, and a tuple of sizes for each star; by `chance` large ones."""
    if chance is not None:
        return {name: _large(chance, plan, name) for name in names}
    found: dict[str, Any] = {}
    forced = draw(st.sampled_from(list(names))) if edges and names else None
    for name in names:
        if name.startswith("*"):
            low, high = plan.sizes.get(name, (0, 3))
            rank = draw(st.integers(low, high))
            found[name] = tuple(draw(st.integers(1, 3)) for _ in range(rank))
            if name == forced and rank:
                found[name] = (draw(st.integers(0, 1)), *found[name][1:])
        else:
            low, high = plan.sizes.get(name, SIZES)
            found[name] = draw(st.integers(low, high))
            if name == forced and name not in plan.arguments and not any(i.below == name for i in plan.inputs):
                found[name] = draw(st.integers(0, 1))
            elif name == forced:
                found[name] = low
    return found


def _large(chance: random.Random, plan: Plan, name: str) -> Any:
    """A size, or a tuple of them for a star, in the upper half of its range; LONG where it is to be."""
    if name.startswith("*"):
        low, high = plan.sizes.get(name, (1, 2))
        rank = chance.randint(max(low, min(1, high)), high)
        return (LONG,) if name == plan.long else tuple(chance.randint(2, 4) for _ in range(rank))
    low, high = plan.sizes.get(name, RICH)
    return LONG if name == plan.long else chance.randint((low + high) // 2, high)


def _input(
    draw: DrawFn | None,
    generator: torch.Generator,
    plan: Plan,
    item: Input,
    drawn: Mapping[str, Any],
    special: bool = False,
) -> Tensor:
    """One input of forward; without `draw`, everything about it comes from the generator."""
    shape: list[int] = []
    for dim in item.dims:
        size = int(dim) if dim.isdigit() else drawn[dim]
        shape.extend(size if isinstance(size, tuple) else [size])
    if item.kind in ("index", "bool"):
        below = 2 if item.kind == "bool" else int(item.below) if item.below.isdigit() else drawn[item.below]
        if draw is None:
            values = torch.randint(below, shape, generator=generator)
        else:
            values = draw(indices(shape, below, special))
        return values.bool() if item.kind == "bool" else values
    if plan.distinct:
        return _distinct(generator, shape)
    values = _values(draw, generator, shape, special, tuple(plan.kinks))
    if item.kind == "positive":
        return values.abs() + 0.125
    return torch.sigmoid(values.clamp(-3, 3)) if item.kind == "unit" else values


def _within(values: Tensor, limits: tuple[float, float] | None) -> Tensor:
    if limits is None:
        return values
    return limits[0] + (limits[1] - limits[0]) * (values - values.floor())


def _warm_up(layer: Any, inputs: tuple[Any, ...], steps: int) -> None:
    """Let training forwards move the buffers away from their start."""
    subject.set_mode(layer, True)
    with subject.private_rng(steps), torch.no_grad():
        try:
            for step in range(steps):
                subject.forward(layer, tuple(x + step if x.is_floating_point() else x for x in inputs))
        except CheckFailure:
            return  # whatever it is, the properties will meet it


def _outs(layer: Any, inputs: tuple[Any, ...], edges: bool, seed: int) -> tuple[Tensor, ...]:
    """The outputs, to shape douts after; none where forward fails, which the property will then report."""
    try:
        with subject.private_rng(seed), torch.no_grad():
            return subject.forward(layer, inputs)
    except LayerCrash as crash:
        if not edges and is_refusal(layer, inputs, crash):
            reject()
    except CheckFailure:
        pass
    return ()
