"""One layer against the equal torch module: first the same results, then the times and the memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handgrad.bench.memory import peak_bytes, recorded_bytes, saved_bytes
from handgrad.bench.timing import Contender, Ratio, Times, interleave, ratio
from handgrad.errors import HandgradError
from handgrad.layer import Layer
from handgrad.losses.loss import Loss
from handgrad.twins import Inputs, Twin

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""By how much two results may differ, as a share of the largest number in them."""


class WrongResultError(HandgradError, AssertionError):
    """A contender's result is not the other's: there is nothing to time."""


@dataclass
class Entry:
    """What was measured of one contender. `ratio` is its time over that of handgrad, None for handgrad itself."""

    times: Times
    recorded: int | None
    peak: int | None
    ratio: Ratio | None = None
    ratios: tuple[Ratio, ...] = ()  # forward, backward


@dataclass
class Measurement:
    """The contenders of one twin at one size, handgrad first."""

    name: str
    size: tuple[int, int]
    entries: dict[str, Entry]


def measure(
    twin: Twin,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    compiled: bool = False,
    seconds: float = 1.0,
    rounds: int = 9,
) -> Measurement:
    """Measure both sides of a twin at a size: that the results are the same, times (`seconds` in all), and memory.

    Raises WrongResultError where the two sides differ. With `compiled` a third contender is the torch module under
    torch.compile.

    >>> from handgrad.twins import TWINS
    >>> list(measure(TWINS["Tanh"], (8, 4), seconds=0.01).entries)
    ['handgrad', 'autograd']
    """
    layer, module = twin.layer(size[1]).to(dtype), twin.module(size[1]).to(dtype)
    _share_weights(layer, module)
    inputs = twin.inputs(*size, dtype)
    _check(twin, layer, module, inputs, dtype)
    dout = _dout(module(*inputs))
    contenders: dict[str, Contender] = {
        "handgrad": _by_hand(layer, inputs, dout),
        "autograd": _by_autograd(module, module, _leaves(layer, inputs), dout),
    }
    if compiled:
        contenders["compiled"] = _by_autograd(module, torch.compile(module), _leaves(layer, inputs), dout)
    times = interleave(contenders, seconds, rounds)
    ours = times["handgrad"]
    entries = {"handgrad": Entry(ours, _recorded(layer, inputs), peak_bytes(lambda: contenders["handgrad"](1)))}
    for name in list(contenders)[1:]:
        t = times[name]
        parts = tuple(ratio(ours.rounds(i), t.rounds(i)) for i in range(2))
        entries[name] = Entry(t, None, None, ratio(ours.rounds(), t.rounds()), parts)
    held = [*module.parameters(), *module.buffers()]
    entries["autograd"].recorded = saved_bytes(lambda: module(*_leaves(layer, inputs)), held)
    entries["autograd"].peak = peak_bytes(lambda: contenders["autograd"](1))
    return Measurement(twin.name, size, entries)


def _by_hand(layer: Layer, inputs: Inputs, dout: Any) -> Contender:
    params, args = list(layer.parameters()), () if isinstance(layer, Loss) else (dout,)
    clock = time.perf_counter

    def run(n: int) -> tuple[float, float]:
        forward = backward = 0.0
        for _ in range(n):
            t0 = clock()
            out = layer.forward(*inputs)
            t1 = clock()
            dx = layer.backward(*args)
            t2 = clock()
            forward += t1 - t0
            backward += t2 - t1
            for p in params:
                p.grad = None
            del out, dx
        return forward, backward

    return run


def _by_autograd(module: nn.Module, call: Callable[..., Any], leaves: Inputs, dout: Any) -> Contender:
    cleared = [t for t in (*module.parameters(), *_flat(leaves)) if t.requires_grad]
    clock = time.perf_counter

    def run(n: int) -> tuple[float, float]:
        forward = backward = 0.0
        for _ in range(n):
            t0 = clock()
            out = call(*leaves)
            t1 = clock()
            if isinstance(out, tuple):
                torch.autograd.backward(out, dout)
            else:
                out.backward(dout)
            t2 = clock()
            forward += t1 - t0
            backward += t2 - t1
            for t in cleared:
                t.grad = None
            del out
        return forward, backward

    return run


def _check(twin: Twin, layer: Layer, module: nn.Module, inputs: Inputs, dtype: torch.dtype) -> None:
    if twin.random:
        layer.eval()
        module.eval()
    leaves = _leaves(layer, inputs)
    expected = module(*leaves)
    dout = _dout(expected)
    out = layer.forward(*inputs)
    dx = layer.backward() if isinstance(layer, Loss) else layer.backward(dout)
    torch.autograd.backward(_flat(expected), _flat(dout))
    pairs = [("out", a, b.detach()) for a, b in zip(_flat(out), _flat(expected))]
    pairs += [("dx", a, leaf.grad) for a, leaf in zip(_flat(dx), _flat(leaves))]
    grads = {name: p.grad for name, p in module.named_parameters()}
    pairs += [(f"d{name}", p.grad, grads[name]) for name, p in layer.named_parameters()]
    for name, got, want in pairs:
        if (got is None) != (want is None) or (got is not None and not _close(got, want, TOLERANCE[dtype])):
            raise WrongResultError(f"{twin.name}: {name} differs from that of {type(module).__name__}")
    layer.zero_grad()
    module.zero_grad()
    layer.train()
    module.train()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = max(float(b.abs().max()), tolerance) if b.numel() else 1.0
    return a.shape == b.shape and bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= tolerance * scale


def _share_weights(layer: Layer, module: nn.Module) -> None:
    ours, theirs = layer.state_dict(), module.state_dict()
    if set(ours) != set(theirs):
        raise WrongResultError(
            f"{layer!r} and {module!r} must have the same names for their weights: {sorted(ours)} and {sorted(theirs)}"
        )
    layer.load_state_dict(theirs)


def _recorded(layer: Layer, inputs: Inputs) -> int:
    layer.forward(*inputs)
    try:
        return recorded_bytes(layer)
    finally:
        layer.drop_records()


def _leaves(layer: Layer, inputs: Inputs) -> Inputs:
    """The inputs as autograd's leaves: all that are floating want a gradient; a loss's target does not."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_(t.is_floating_point())

    return (_each(leaf, inputs[0]), *inputs[1:]) if isinstance(layer, Loss) else _each(leaf, inputs)


def _dout(out: Any) -> Any:
    """A random dout for each output; for a scalar, a loss, its own gradient 1."""
    return _each(lambda t: torch.randn_like(t) if t.dim() else torch.ones_like(t), _each(Tensor.detach, out))


def _each(function: Callable[[Tensor], Tensor], thing: Any) -> Any:
    return tuple([_each(function, part) for part in thing]) if isinstance(thing, tuple) else function(thing)


def _flat(thing: Any) -> list[Any]:
    return [t for part in thing for t in _flat(part)] if isinstance(thing, tuple) else [thing]
