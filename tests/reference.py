"""Compare a layer with an independent one: torch.nn's module, or a plain function, under autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from handgrad import Layer


def close(ours: Any, theirs: Any, name: str) -> None:
    """Equal to float64 noise, in shape and dtype exactly."""
    assert ours.shape == theirs.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, expected {theirs.dtype}"
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, equal_nan=True, msg=lambda m: f"{name}: {m}")


def flat(value: Any) -> list[Any]:
    """A tensor, or the tensors of a nested tuple, as a list."""
    return [item for part in value for item in flat(part)] if isinstance(value, (tuple, list)) else [value]


def strided(x: Tensor) -> Tensor:
    """The same values as the even columns of a wider tensor, dimensions stored in reverse order."""
    if x.dim() == 0:
        return x
    wide = torch.full((*reversed(x.shape[1:]), 2 * x.shape[0]), 7).to(x.dtype)
    view = wide[..., ::2].permute(*range(x.dim() - 1, -1, -1))
    return view.copy_(x)


def randomize(layer: Layer) -> None:
    """No parameter at its default: a weight of 1 and a bias of 0 hide errors."""
    for param in layer.parameters():
        param.copy_(torch.randn_like(param) * 0.7 + 0.1)


def compare(
    layer: Layer,
    reference: Callable[..., Any],
    batches: Sequence[tuple[Any, ...]],
    rename: Callable[[str], str] = lambda key: key,
) -> None:
    """Forward every batch of inputs, then backward them in reverse with random dout, twice over; all must agree.

    `reference` is a torch.nn.Module, loaded with the layer's weights, or a function without parameters.
    """
    layer.to(torch.float64)
    module = reference if isinstance(reference, torch.nn.Module) else None
    if module is not None:
        module.double()
        with torch.no_grad():
            randomize(layer)
        module.load_state_dict({rename(key): value for key, value in layer.state_dict().items()})
    layer.zero_grad()
    for _ in range(2):  # gradients add up
        expected = []
        for inputs in batches:
            ours = [strided(x) if isinstance(x, Tensor) else x for x in inputs]
            before = [(x._version, x.clone()) for x in flat(ours) if isinstance(x, Tensor)]
            out = layer(*ours)
            leaves = [leaf(x) for x in inputs]
            truth = reference(*leaves)
            for i, (a, b) in enumerate(zip(flat(out), flat(truth))):
                close(a, b.detach(), f"out {i}")
            for x, (version, value) in zip(flat(ours), before):
                assert x._version == version, "x was written to"
                assert torch.equal(x, value), "x was written to"
            expected.append((leaves, truth))
        for leaves, truth in reversed(expected):
            douts = [strided(torch.randn(t.shape, dtype=t.dtype)) for t in flat(truth)]
            torch.autograd.backward(flat(truth), [d.clone() for d in douts])
            versions = [d._version for d in douts]
            dx = flat(layer.backward(nest(truth, iter(douts))))
            assert versions == [d._version for d in douts], "dout was written to"
            wanted = flat(leaves)
            assert len(dx) == len(wanted), f"{len(dx)} dx for {len(wanted)} inputs"
            for i, (a, x) in enumerate(zip(dx, wanted)):
                if x.requires_grad:
                    close(a, x.grad if x.grad is not None else torch.zeros_like(x), f"dx {i}")
                else:
                    assert a is None
    assert layer.pending == 0
    if module is not None:
        named = dict(module.named_parameters())
        for name, param in layer.named_parameters():
            assert param.grad is not None, name
            close(param.grad, named[rename(name)].grad, name)
        for name, buf in layer.named_buffers():
            close(buf, dict(module.named_buffers())[rename(name)], name)


def leaf(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple([leaf(item) for item in x])
    return x.clone().requires_grad_(x.is_floating_point())


def nest(form: Any, items: Any) -> Any:
    return tuple([nest(part, items) for part in form]) if isinstance(form, tuple) else next(items)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)
