"""One layer against the equal torch module: first the same results, then the times and the memory.

A layer is timed alone, and as it is inside a model. Alone, autograd pays for each call of backward, some 10 to 30
microseconds on a CPU before the first operation, what a model pays once a step. So only the time inside says what a
model gains. It is what a model takes longer for having the layer:

- a chain of many copies less a chain of few, over the difference in number, where the output is like the input;
- else another layer, `HOST`, with this one behind it less the host alone; for a layer of integers, this one goes first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from handgrad.bench.memory import peak_bytes, recorded_bytes, saved_bytes
from handgrad.bench.timing import Contender, Ratio, Times, difference, interleave, ratio
from handgrad.errors import HandgradError
from handgrad.layer import Layer
from handgrad.layers.activation import LeakyReLU
from handgrad.layers.containers import Sequential
from handgrad.losses.loss import Loss
from handgrad.twins import Inputs, Twin

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""By how much two results may differ, as a share of the largest number in them."""

HOST = LeakyReLU, nn.LeakyReLU
"""What stands before or behind a layer that makes no chain: cheap, and for any shape."""

CHAINS = (2, 10), (1, 3)
"""Few copies and many: of a layer, and of one that takes longer than `SLOW`, where a model's fixed cost is nothing."""

SLOW = 0.005  # seconds


class WrongResultError(HandgradError, AssertionError):
    """A contender's result is not the other's: there is nothing to time."""


@dataclass
class Entry:
    """What was measured of one contender. `ratio` is its time over that of handgrad, None for handgrad itself.

    `times` and `ratio` are those of the layer alone; `inside` and `inside_ratio` what it costs inside a model, None
    where that was not measured. Of a difference of noisy times, a round may be zero or less.
    """

    times: Times
    recorded: int | None
    peak: int | None
    ratio: Ratio | None = None
    ratios: tuple[Ratio, ...] = ()  # forward, backward
    inside: Times | None = None
    inside_ratio: Ratio | None = None


@dataclass
class Measurement:
    """The contenders of one twin at one size, handgrad first; and how the time inside a model was found."""

    name: str
    size: tuple[int, int]
    entries: dict[str, Entry]
    how: str


def measure(
    twin: Twin,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    *,
    compiled: bool = False,
    seconds: float = 1.0,
    rounds: int = 9,
) -> Measurement:
    """Measure both sides of a twin at a size: that the results are the same, times, and memory.

    The layer alone is timed for `seconds` and at least `rounds` turns, and inside a model as long again. With
    `compiled` a third contender, alone, is the torch module under torch.compile; inside a model it has no time of its
    own, for a compiler fuses what stands side by side. Raises WrongResultError where the two sides differ.

    >>> from handgrad.twins import TWINS
    >>> result = measure(TWINS["Tanh"], (8, 4), seconds=0.0, rounds=1)
    >>> list(result.entries), result.how
    (['handgrad', 'autograd'], '10 in a chain less 2')
    """
    layer, module = both_sides(twin, size[1], dtype)
    inputs = twin.inputs(*size, dtype)
    _check(twin, layer, module, inputs, dtype)
    out = module(*inputs)
    dout, leaves = _dout(out), _leaves(layer, inputs)
    contenders = contenders_of(layer, module, inputs, out)
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
    entries["autograd"].recorded = saved_bytes(lambda: module(*leaves), held)
    entries["autograd"].peak = peak_bytes(lambda: contenders["autograd"](1))

    inside = _inside(twin, size[1], (layer, module), inputs, out, CHAINS[ours.median() > SLOW])
    if inside.count:
        both = {(name, True): contender for name, contender in inside.more.items()}
        both |= {(name, False): contender for name, contender in inside.fewer.items()}
        taken = interleave(both, seconds, rounds)
        costs = {name: difference(taken[name, True], taken[name, False], inside.count) for name in inside.more}
        entries["handgrad"].inside, entries["autograd"].inside = costs["handgrad"], costs["autograd"]
        entries["autograd"].inside_ratio = ratio(costs["handgrad"].rounds(), costs["autograd"].rounds())
    return Measurement(twin.name, size, entries, inside.how)


def both_sides(twin: Twin, D: int, dtype: torch.dtype, chain: int = 0) -> tuple[Layer, nn.Module]:
    """The twin's two sides with the same weights; a chain of so many copies, if that is asked for."""
    layer: Layer = Sequential(*(twin.layer(D) for _ in range(chain))) if chain else twin.layer(D)
    module: nn.Module = nn.Sequential(*(twin.module(D) for _ in range(chain))) if chain else twin.module(D)
    layer, module = layer.to(dtype), module.to(dtype)
    _share_weights(layer, module)
    return layer, module


@dataclass
class _Inside:
    """Contenders of which `more` do what the `fewer` do and, beyond that, what `count` copies of a layer do."""

    how: str
    count: int = 0
    fewer: dict[str, Contender] = field(default_factory=dict)
    more: dict[str, Contender] = field(default_factory=dict)


class _Ended(Loss):
    """A body and its loss."""

    def __init__(self, body: Layer, loss: Layer) -> None:
        self.body, self.loss = body, loss

    def forward(self, x: Any, target: Any) -> Any:
        return self.loss.forward(self.body.forward(x), target)

    def backward(self, dout: Any = None) -> Any:
        return self.body.backward(self.loss.backward())


class _EndedModule(nn.Module):
    """The same in torch."""

    def __init__(self, body: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.body, self.loss = body, loss

    def forward(self, x: Any, target: Any) -> Any:
        return self.loss(self.body(x), target)


def _inside(
    twin: Twin, D: int, sides: tuple[Layer, nn.Module], inputs: Inputs, out: Any, chain: tuple[int, int]
) -> _Inside:
    """Who has more of the layer, and who has less; `sides` are the layer and the module alone."""
    (layer, module), x = sides, inputs[0]
    is_loss = isinstance(layer, Loss)
    if not isinstance(x, Tensor) or not isinstance(out, Tensor) or len(inputs) > 1 + is_loss:
        return _Inside("not measured: several inputs or outputs")
    if x.is_floating_point() and x.shape == out.shape:
        few, many = chain
        fewer, more = (contenders_of(*both_sides(twin, D, x.dtype, n), inputs, out) for n in chain)
        return _Inside(f"{many} in a chain less {few}", many - few, fewer, more)
    host, hosting = Sequential(HOST[0]()), nn.Sequential(HOST[1]())
    name = type(host[0]).__name__
    if not x.is_floating_point():
        fewer = contenders_of(host, hosting, (out.detach(),), out)
        more = contenders_of(Sequential(layer, host[0]), nn.Sequential(module, hosting[0]), inputs, out)
        return _Inside(f"with a {name} behind it, less that alone", 1, fewer, more)
    fewer = contenders_of(host, hosting, (x,), x)
    if is_loss:
        more = contenders_of(_Ended(host, layer), _EndedModule(hosting, module), inputs, out)
    else:
        more = contenders_of(Sequential(host[0], layer), nn.Sequential(hosting[0], module), inputs, out)
    return _Inside(f"behind a {name}, less that alone", 1, fewer, more)


def contenders_of(layer: Layer, module: nn.Module, inputs: Inputs, out: Any) -> dict[str, Contender]:
    """Both sides, whose output is one like `out`."""
    dout = _dout(out)
    return {
        "handgrad": _by_hand(layer, inputs, dout),
        "autograd": _by_autograd(module, module, _leaves(layer, inputs), dout),
    }


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
            for p in params:
                p.grad = None
            del out, dx
            t2 = clock()
            forward += t1 - t0
            backward += t2 - t1
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
            for t in cleared:
                t.grad = None
            del out
            t2 = clock()
            forward += t1 - t0
            backward += t2 - t1
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
