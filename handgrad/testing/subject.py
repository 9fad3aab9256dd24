"""What the checks need to know about a layer: its tensors, its copies, its calls.

Everything here works on any object that has `forward` and `backward(dout)`. The object says what its tensors are by
`named_parameters()` and `named_buffers()`, as a Layer or a torch.nn.Module does; an object that has neither counts
every floating tensor among its attributes as a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def parameters(layer: Any) -> dict[str, Tensor]:
    """The layer's trainable tensors by name, each tensor once."""
    if hasattr(layer, "named_parameters"):
        return dict(layer.named_parameters())
    attributes = {name: value for name, value in tensors(layer).items() if value.is_floating_point()}
    if not hasattr(layer, "parameters"):
        return attributes
    listed = {id(p): p for p in layer.parameters()}
    names = {id(value): name for name, value in reversed(attributes.items())}
    return {names.get(key, f"parameters()[{i}]"): p for i, (key, p) in enumerate(listed.items())}


def buffers(layer: Any) -> dict[str, Tensor]:
    """The layer's other lasting tensors by name: running statistics, counters."""
    if hasattr(layer, "named_buffers"):
        return dict(layer.named_buffers())
    listed = {id(p) for p in parameters(layer).values()}
    return {name: value for name, value in tensors(layer).items() if id(value) not in listed}


def tensors(layer: Any) -> dict[str, Tensor]:
    """Every tensor in the attributes of the layer and of the objects with a backward inside it, listed or not."""
    return dict(_tensors(layer, "", set()))


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or name.split(".")[-1] == "_records":
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key), seen)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}.{i}" if name else str(i), seen)
    elif hasattr(value, "backward") or hasattr(value, "parameters"):
        for key, item in getattr(value, "__dict__", {}).items():
            yield from _tensors(item, f"{name}.{key}" if name else key, seen)


def clone(layer: Any) -> Any:
    """A copy that shares nothing with the layer, has no gradients, and repeats its random draws."""
    twin = copy.deepcopy(layer)
    zero_grad(twin)
    return twin


def zero_grad(layer: Any) -> None:
    """Set every gradient to None."""
    for tensor in parameters(layer).values():
        tensor.grad = None


def set_mode(layer: Any, training: bool) -> None:
    """Switch the layer to training or evaluation, by its `train()`, or by its attribute `training`."""
    if hasattr(layer, "train"):
        layer.train(training)
    elif hasattr(layer, "training"):
        layer.training = training


@contextmanager
def private_rng(seed: int | None = None) -> Iterator[None]:
    """Leave torch's global generator as it was; inside, it starts from `seed`, or from where it is."""
    state = torch.get_rng_state()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several outputs or inputs as a tuple, one as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)
