"""Running a layer by hand: one forward and backward on a copy, with everything they produced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from handgrad.losses.loss import Loss
from handgrad.testing import subject
from handgrad.testing.errors import ContractError, LayerCrash

CONTRACT = """The contract of a layer:
  forward(x) returns out, leaves x as it is, and records what backward needs on a stack.
  backward(dout) takes the latest record, adds to the .grad of every tensor that parameters() lists, leaves dout as it
  is, and returns dx with the shape and dtype of x: None for an integer x, a tuple with one entry an input if forward
  takes several."""


@dataclass
class Result:
    """What one forward and backward gave: tensors by name, ready to compare."""

    outs: dict[str, Tensor]
    grads: dict[str, Tensor | None] = field(default_factory=dict)  # of inputs ("dx", "dx[1]") and of parameters
    buffers: dict[str, Tensor] = field(default_factory=dict)


def _own(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, so that a layer that writes into them spoils no example; a layout that a copy would lose stays."""
    return tuple(t.clone() if t.is_contiguous() else t for t in tensors)


def check_contract(layer: Any) -> None:
    """Raise ContractError unless the object has a forward and a backward of its own."""
    for method in ("forward", "backward"):
        if not callable(getattr(layer, method, None)) or getattr(type(layer), method, None) is _inherited(method):
            raise ContractError(f"{name_of(layer)} has no {method}.\n{CONTRACT}")


def run(layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...], seed: int = 0) -> Result:
    """Forward and backward on a copy of the layer, with the random draws of `seed`."""
    twin = subject.clone(layer)
    inputs, douts = _own(inputs), _own(douts)
    with subject.private_rng(seed), torch.enable_grad():
        outs = forward(twin, inputs)
        dx = backward(twin, inputs, douts)
    return Result(named("out", outs), {**dx, **gradients(twin)}, copies(subject.buffers(twin)))


def forward(layer: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Call forward; the outputs as a tuple. Whatever it raises becomes a LayerCrash."""
    try:
        outs = layer.forward(*inputs)
    except Exception as error:
        raise LayerCrash(f"forward raised {type(error).__name__}: {error}", inputs=inputs, method="forward") from error
    for i, out in enumerate(subject.as_tuple(outs)):
        if not isinstance(out, Tensor):
            which = "" if len(subject.as_tuple(outs)) == 1 else f" number {i}"
            raise ContractError(f"forward must return a tensor or a tuple of them; output{which} is {_kind(out)}")
    return subject.as_tuple(outs)


def backward(layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...], **keywords: Any) -> dict[str, Tensor]:
    """Call backward; dx by name, one for every floating input. Whatever it raises becomes a LayerCrash."""
    try:
        dx = layer.backward(douts if len(douts) > 1 else douts[0], **keywords)
    except Exception as error:
        raise LayerCrash(
            f"backward raised {type(error).__name__}: {error}", inputs=inputs, method="backward"
        ) from error
    return {} if keywords else structure(layer, inputs, dx)


def input_names(layer: Any, inputs: tuple[Any, ...]) -> list[str]:
    """How the gradients of the inputs are called: dx, or dx[0], dx[1], ...; a loss has one for its first input only."""
    if isinstance(subject.unwrap(layer), Loss):
        return ["dx", "target", *(f"input {i}" for i in range(2, len(inputs)))]
    return list(named("dx", inputs))


def differentiable(layer: Any, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The inputs that have a gradient, under its name."""
    pairs = zip(input_names(layer, inputs), inputs)
    return {n: x for n, x in pairs if n.startswith("dx") and isinstance(x, Tensor) and x.is_floating_point()}


def structure(layer: Any, inputs: tuple[Any, ...], dx: Any) -> dict[str, Tensor]:
    """Check that backward returned a gradient for every floating input and nothing else; they come back by name."""
    several = len(inputs) > 1 and not isinstance(subject.unwrap(layer), Loss)
    if several and not (isinstance(dx, tuple) and len(dx) == len(inputs)):
        came = f"a tuple of {len(dx)}" if isinstance(dx, tuple) else _kind(dx)
        raise ContractError(
            f"backward must return a tuple of {len(inputs)}, one entry an input of forward, got {came}\n{CONTRACT}"
        )
    wanted = differentiable(layer, inputs)
    returned = named("dx", dx if several else (dx,))
    for name, value in returned.items():
        if name in wanted and not isinstance(value, Tensor):
            raise ContractError(f"backward must return {name} as a tensor like x, got {_kind(value)}\n{CONTRACT}")
        if name not in wanted and value is not None:
            raise ContractError(
                f"{name} must be None, for the input is not floating point, got {_kind(value)}\n{CONTRACT}"
            )
    return {name: returned[name] for name in wanted}


def gradients(layer: Any) -> dict[str, Tensor | None]:
    """Every parameter's gradient. A gradient on a tensor that is no parameter is a ContractError."""
    listed = subject.parameters(layer)
    ids = {id(p) for p in listed.values()}
    for name, tensor in subject.tensors(layer).items():
        if id(tensor) not in ids and tensor.is_leaf and tensor.grad is not None:
            raise ContractError(
                f"backward wrote a gradient to {name}, which parameters() does not list, so no optimizer will ever "
                f"see it; declare it: `{name}: Tensor = parameter(...)`\n{CONTRACT}"
            )
    return {name: p.grad for name, p in listed.items()}


def named(name: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """`{"dx": value}` for one value, `{"dx[0]": ..., "dx[1]": ...}` for several."""
    return {name: values[0]} if len(values) == 1 else {f"{name}[{i}]": value for i, value in enumerate(values)}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies."""
    return {name: t.detach().clone() for name, t in tensors.items()}


def name_of(layer: Any) -> str:
    """The layer's repr, without the memory address that a class without a repr of its own would show."""
    return (
        type(layer).__name__
        if "__repr__" not in {k for c in type(layer).__mro__[:-1] for k in vars(c)}
        else repr(layer)
    )


def _inherited(method: str) -> Any:
    from handgrad.layer import Layer

    return getattr(Layer, method)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
