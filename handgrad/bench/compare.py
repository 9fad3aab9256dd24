"""One layer against the equal torch module: first the same results, then the times and the memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handgrad.bench.cases import Case, Inputs
from handgrad.bench.memory import peak_bytes, recorded_bytes, saved_bytes
from handgrad.bench.timing import Contender, Ratio, Times, interleave, ratio
from handgrad.errors import HandgradError
from handgrad.layer import Layer
from handgrad.losses.loss import Loss

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
class Comparison:
    """The contenders of one case at one size, handgrad first."""

    name: str
    size: tuple[int, int]
    entries: dict[str, Entry]


def compare(
    case: Case,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    compiled: bool = False,
    seconds: float = 1.0,
    rounds: int = 9,
) -> Comparison:
    """Compare the two sides of a case at a size: results, then times (`seconds` in all), then memory.

    Raises WrongResultError where the two sides differ. With `compiled` a third contender is the torch module under
    torch.compile.

    >>> from handgrad.bench import CASES
    >>> list(compare(CASES["Tanh"], (8, 4), seconds=0.01).entries)
    ['handgrad', 'autograd']
    """
    layer, module = case.ours(size[1]).to(dtype), case.theirs(size[1]).to(dtype)
    _share_weights(layer, module)
    inputs = case.inputs(*size, dtype)
    _check(case, layer, module, inputs, dtype)
    dout = _like(_detached(module(*inputs)))
    contenders: dict[str, Contender] = {
        "handgrad": _by_hand(layer, inputs, dout),
        "autograd": _by_autograd(module, module, inputs, dout),
    }
    if compiled:
        contenders["compiled"] = _by_autograd(module, torch.compile(module), inputs, dout)
    times = interleave(contenders, seconds, rounds)
    ours = times["handgrad"]
    entries = {"handgrad": Entry(ours, _recorded(layer, inputs), peak_bytes(lambda: contenders["handgrad"](1)))}
    for name in list(contenders)[1:]:
        t = times[name]
        parts = tuple(ratio(ours.rounds(i), t.rounds(i)) for i in range(2))
        entries[name] = Entry(t, None, None, ratio(ours.rounds(), t.rounds()), parts)
    held = [*module.parameters(), *module.buffers()]
    entries["autograd"].recorded = saved_bytes(lambda: module(*_leaves(inputs)), held)
    entries["autograd"].peak = peak_bytes(lambda: contenders["autograd"](1))
    return Comparison(case.name, size, entries)


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


def _by_autograd(module: nn.Module, call: Callable[..., Any], inputs: Inputs, dout: Any) -> Contender:
    leaves = _leaves(inputs)
    cleared = [t for t in (*module.parameters(), *leaves) if t.requires_grad]
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


def _check(case: Case, layer: Layer, module: nn.Module, inputs: Inputs, dtype: torch.dtype) -> None:
    if case.random:
        layer.eval()
        module.eval()
    leaves = _leaves(inputs)
    expected = module(*leaves)
    dout = _like(_detached(expected))
    out = layer.forward(*inputs)
    dx = layer.backward() if isinstance(layer, Loss) else layer.backward(dout)
    torch.autograd.backward(expected, torch.ones_like(expected) if isinstance(layer, Loss) else dout)
    pairs = [("out", out, _detached(expected)), ("dx", dx, leaves[0].grad)]
    grads = dict(module.named_parameters())
    names = {name.split(".", 1)[-1] if case.name == "SelfAttention" else name: name for name in grads}
    pairs += [(f"d{name}", p.grad, grads[names[name]].grad) for name, p in layer.named_parameters() if name in names]
    for name, got, want in pairs:
        for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
            if (a is None) != (b is None) or (a is not None and not _close(a, b, TOLERANCE[dtype])):
                raise WrongResultError(f"{case.name}: {name} differs from that of {type(module).__name__}")
    layer.zero_grad()
    module.zero_grad()
    layer.train()
    module.train()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = max(float(b.abs().max()), tolerance) if b.numel() else 1.0
    return a.shape == b.shape and bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= tolerance * scale


def _share_weights(layer: Layer, module: nn.Module) -> None:
    state = module.state_dict()
    if all("." in key for key in state) and not set(layer.state_dict()) <= set(state):
        state = {key.split(".", 1)[1]: t for key, t in state.items()}  # a module that only wraps the counterpart
    if set(layer.state_dict()) == set(state):
        layer.load_state_dict(state)
    elif layer.state_dict():
        raise WrongResultError(
            f"{layer!r} and {module!r} have no weights in common: "
            f"{sorted(layer.state_dict())} against {sorted(module.state_dict())}"
        )


def _recorded(layer: Layer, inputs: Inputs) -> int:
    layer.forward(*inputs)
    try:
        return recorded_bytes(layer)
    finally:
        layer.drop_records()


def _leaves(inputs: Inputs) -> Inputs:
    """The inputs as autograd's leaves: the first, if it is floating, wants a gradient; a target does not."""
    first = inputs[0].detach().clone()
    return (first.requires_grad_(first.is_floating_point()), *inputs[1:])


def _detached(out: Any) -> Any:
    return tuple(t.detach() for t in out) if isinstance(out, tuple) else out.detach()


def _like(out: Any) -> Any:
    """A random dout; for a scalar, a loss, its own gradient 1."""
    if isinstance(out, tuple):
        return tuple(torch.randn_like(t) for t in out)
    return torch.randn_like(out) if out.dim() else torch.ones_like(out)
