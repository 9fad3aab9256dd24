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
    layer = unwrap(layer)
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
    layer = unwrap(layer)
    if hasattr(layer, "named_buffers"):
        return dict(layer.named_buffers())
    listed = {id(p) for p in parameters(layer).values()}
    return {name: value for name, value in tensors(layer).items() if id(value) not in listed}


def tensors(layer: Any) -> dict[str, Tensor]:
    """Every tensor in the attributes of the layer and of the objects with a backward inside it, listed or not."""
    return dict(_tensors(unwrap(layer), "", set()))


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or name.split(".")[-1] == "_records":
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not isinstance(item, Tensor):  # tensors in lists are records, not parameters
                yield from _tensors(item, f"{name}.{key}" if name else str(key), seen)
    elif hasattr(value, "backward") or hasattr(value, "parameters"):
        for key, item in getattr(value, "__dict__", {}).items():
            yield from _tensors(item, f"{name}.{key}" if name else key, seen)


def clone(layer: Any) -> Any:
    """A copy that shares nothing with the layer, has no gradients, and repeats its random draws."""
    own = tensors(layer).values()
    memory = {t.untyped_storage().data_ptr() for t in own if _stands_alone(t)}
    if len(memory) == len(own):  # deepcopy takes what it is given; its own way to copy a tensor costs ten times as much
        return copy.deepcopy(layer, {id(t): t.clone() for t in own})
    twin = copy.deepcopy(layer)
    zero_grad(twin)
    return twin


def _stands_alone(t: Tensor) -> bool:
    """Whether a clone is all that a copy of the tensor must be: it is a tensor and no more, with memory of its own."""
    plain = type(t) is Tensor and not t.requires_grad and not vars(t)
    return plain and t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size()


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


def unwrap(layer: Any) -> Any:
    """The layer itself, inside whatever stands in for it (a planted fault, a Packed)."""
    while hasattr(layer, "wrapped_layer"):
        layer = layer.wrapped_layer
    return layer


def honest(layer: Any) -> Any:
    """The layer without the fault planted into it."""
    return layer.wrapped_layer if getattr(layer, "fault", "") else layer


class StandIn:
    """Stands in for a layer and passes everything on; subclasses change one thing."""

    def __init__(self, layer: Any) -> None:
        self.wrapped_layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "wrapped_layer":
            raise AttributeError(name)
        return getattr(self.wrapped_layer, name)

    def __repr__(self) -> str:
        return repr(self.wrapped_layer)

    @property
    def training(self) -> bool:
        """The layer's own mode."""
        return bool(getattr(self.wrapped_layer, "training", True))

    @training.setter
    def training(self, mode: bool) -> None:
        self.wrapped_layer.training = mode

    def forward(self, *inputs: Any) -> Any:
        """The layer's forward."""
        return self.wrapped_layer.forward(*inputs)

    def backward(self, dout: Any, **keywords: Any) -> Any:
        """The layer's backward."""
        return self.wrapped_layer.backward(dout, **keywords)


class Packed(StandIn):
    """A layer with tuples among its inputs and outputs, as one with only tensors: an LSTM cell's (h, c)."""

    def __init__(self, layer: Any, form: Any) -> None:
        super().__init__(layer)
        self.form = form  # nested tuples of None, one None a tensor
        self.out_form: Any = None

    def pack(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs as the layer takes them."""
        packed: tuple[Any, ...] = nest(self.form, list(inputs))
        return packed

    def forward(self, *inputs: Any) -> Any:
        """The layer's forward, all its outputs in one tuple."""
        outs = super().forward(*self.pack(inputs))
        self.out_form = form_of(outs)
        return flatten(outs) if isinstance(outs, tuple) else outs

    def backward(self, dout: Any, **keywords: Any) -> Any:
        """The layer's backward, all its dx in one tuple."""
        dx = super().backward(nest(self.out_form, list(as_tuple(dout))), **keywords)
        return flatten(dx) if isinstance(dx, tuple) else dx


def pack(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs as a reference for this layer takes them."""
    packed: tuple[Any, ...] = layer.pack(inputs) if hasattr(layer, "pack") else inputs
    return packed


def form_of(value: Any) -> Any:
    """The nesting of tuples in a value, with None for everything else."""
    return tuple(form_of(v) for v in value) if isinstance(value, tuple) else None


def nest(form: Any, flat: list[Any]) -> Any:
    """The values, taken from the front of `flat`, in that nesting."""
    return tuple(nest(f, flat) for f in form) if isinstance(form, tuple) else flat.pop(0)


def flatten(value: Any) -> tuple[Any, ...]:
    """All that the nested tuples hold, in order."""
    return tuple(v for item in value for v in flatten(item)) if isinstance(value, tuple) else (value,)


def has_modes(layer: Any) -> bool:
    """Whether the layer can be switched between training and evaluation."""
    return hasattr(layer, "train") or hasattr(layer, "training")


def cast(layer: Any, dtype: torch.dtype) -> Any:
    """Convert every floating tensor of the layer to `dtype`, in place, keeping each tensor object."""
    for tensor in tensors(layer).values():
        if tensor.is_floating_point():
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)
    return layer
