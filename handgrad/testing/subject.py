"""The layer under test: its tensors, its copies, its calls.

Everything here works on any object that has `forward` and `backward(dout)`. The object says what its tensors are by
`named_parameters()` and `named_buffers()`, as a Layer or a torch.nn.Module does; an object that has neither counts
every floating tensor among its attributes as a parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from handgrad.layer import Layer, held, is_frozen
from handgrad.losses.loss import Loss
from handgrad.testing.errors import CheckFailure, ContractError, LayerCrash
from handgrad.testing.operations import InFloat64, Lowers, SameNumbers, read_in

CONTRACT = """The contract of a layer:
  forward(x) returns out, leaves x as it is, and records what backward needs on a stack.
  backward(dout) takes the latest record, adds to the .grad of every tensor that parameters() lists, leaves dout as it
  is, and returns dx with the shape and dtype of x: None for an integer x, a tuple with one entry per input if forward
  takes several.
  A tuple of outputs, or of inputs, may hold tuples; its dout, or dx, is nested as it is."""

# ---------------------------------------------------------------- its tensors


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


def frozen(layer: Any) -> set[str]:
    """The names of the parameters that get no gradient, because `freeze()` says so."""
    return {name for name, p in parameters(layer).items() if is_frozen(p)}


def buffers(layer: Any) -> dict[str, Tensor]:
    """The layer's other lasting tensors by name: running statistics, counters."""
    layer = unwrap(layer)
    if hasattr(layer, "named_buffers"):
        return dict(layer.named_buffers())
    listed = {id(p) for p in parameters(layer).values()}
    return {name: value for name, value in tensors(layer).items() if id(value) not in listed}


def state(layer: Any) -> dict[str, Tensor]:
    """All of them as an equal module's `load_state_dict` wants them: a tensor with several names under each of them."""
    layer = unwrap(layer)
    return dict(layer.state_dict()) if hasattr(layer, "state_dict") else {**parameters(layer), **buffers(layer)}


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


def refuse_undeclared(layer: Any, inputs: tuple[Any, ...]) -> None:
    """Raise ContractError where forward reads a tensor that a Layer made for itself and did not declare.

    The layer must be new: what a forward keeps in attributes is none of its tensors.
    """
    if not _undeclared(layer):
        return
    twin = clone(layer)
    found = _undeclared(twin)
    with private_rng():
        read = read_in(lambda: twin.forward(*inputs), [(f"{path}.{name}", t) for path, _, name, t in found])
    for path, inner, name, t in found:
        if f"{path}.{name}" in read:
            shape = ", ".join(f'"D{i}"' for i in range(t.dim())) if t.dim() > 1 else '"D"' * t.dim()
            attribute = name.replace(".", "_")
            alone = "; a tensor in a list or dict needs an attribute of its own for that" if "." in name else ""
            raise ContractError(
                f"forward of {name_of(inner)} reads {name}, a tensor that the layer does not declare, so to() leaves "
                f"it behind on the old device and in the old dtype, and state_dict() without it; declare it at the top "
                f"of the class: `{attribute}: Tensor = buffer({shape})` (or parameter, where it is trained; "
                f"buffer(..., persistent=False) where state_dict() need not have it){alone}\n{CONTRACT}"
            )


def _undeclared(layer: Any) -> list[tuple[str, Layer, str, Tensor]]:
    """The tensors in attributes that a Layer does not declare: the layer's path, itself, the attribute, the tensor."""
    return [
        (path, inner, name, t)
        for path, inner in named_layers(layer)
        if isinstance(inner, Layer)
        for attribute, value in vars(inner).items()
        if attribute != "_records" and attribute not in inner._declared
        for name, t in held(Tensor, attribute, value)
    ]


def generators(layer: Any) -> list[torch.Generator]:
    """The generators of random numbers among the attributes of the layer and of those inside it."""
    attributes = [value for _, inner in named_layers(layer) for value in getattr(inner, "__dict__", {}).values()]
    return [value for value in attributes if isinstance(value, torch.Generator)]


def gradients(layer: Any) -> dict[str, Tensor | None]:
    """Every parameter's gradient. A gradient on a tensor that is no parameter is a ContractError."""
    listed = parameters(layer)
    ids = {id(p) for p in listed.values()}
    for name, tensor in tensors(layer).items():
        if id(tensor) not in ids and tensor.is_leaf and tensor.grad is not None:
            raise ContractError(
                f"backward wrote a gradient to {name}, which parameters() does not list, so no optimizer will ever "
                f"see it; declare it: `{name}: Tensor = parameter(...)`\n{CONTRACT}"
            )
    return {name: p.grad for name, p in listed.items()}


def zero_grad(layer: Any) -> None:
    """Set every gradient to None."""
    for tensor in parameters(layer).values():
        tensor.grad = None


def cast(layer: Any, dtype: torch.dtype) -> Any:
    """Convert every floating tensor of the layer to `dtype`, in place, keeping each tensor object."""
    for tensor in tensors(layer).values():
        if tensor.is_floating_point():
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)
    return layer


def named(name: str, values: tuple[Any, ...]) -> dict[str, Any]:
    """`{"dx": value}` for one value, `{"dx[0]": ..., "dx[1]": ...}` for several."""
    return {name: values[0]} if len(values) == 1 else {f"{name}[{i}]": value for i, value in enumerate(values)}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies."""
    return {name: t.detach().clone() for name, t in tensors.items()}


# ---------------------------------------------------------------- its copies, its mode, its name


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


def has_modes(layer: Any) -> bool:
    """Whether the layer can be switched between training and evaluation."""
    layer = unwrap(layer)
    return hasattr(layer, "train") or hasattr(layer, "training")


def set_mode(layer: Any, training: bool) -> None:
    """Switch the layer to training or evaluation, by its `train()`, or by its attribute `training`."""
    layer = unwrap(layer)
    if hasattr(layer, "train"):
        layer.train(training)
    elif hasattr(layer, "training"):
        layer.training = training


def name_of(layer: Any) -> str:
    """The layer's repr, without the memory address that a class without a repr of its own would show."""
    own = any("__repr__" in vars(cls) for cls in type(layer).__mro__[:-1])
    return repr(layer) if own else type(layer).__name__


def named_layers(layer: Any) -> list[tuple[str, Any]]:
    """The layer itself and all layers inside it, each with its path."""
    layer = unwrap(layer)
    return list(layer.named_layers()) if hasattr(layer, "named_layers") else [("", layer)]


# ---------------------------------------------------------------- its calls


@dataclass
class Result:
    """What one forward and backward gave: tensors by name, ready to compare."""

    outs: dict[str, Tensor]
    grads: dict[str, Tensor | None] = field(default_factory=dict)  # of inputs ("dx", "dx[1]") and of parameters
    buffers: dict[str, Tensor] = field(default_factory=dict)


def check_contract(layer: Any) -> None:
    """Raise ContractError unless the object has a forward and a backward of its own."""
    layer = unwrap(layer)
    for method in ("forward", "backward"):
        if not callable(getattr(layer, method, None)) or getattr(type(layer), method, None) is getattr(Layer, method):
            raise ContractError(f"{name_of(layer)} has no {method}.\n{CONTRACT}")


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


@contextmanager
def recording(seed: int) -> Iterator[None]:
    """Forwards record inside, whatever the caller's grad mode, with the random draws of `seed`."""
    with private_rng(seed), torch.enable_grad():
        yield


def run(layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...], seed: int = 0) -> Result:
    """Forward and backward on a copy of the layer, with the random draws of `seed`.

    The tensors are copied, too, so that a layer that writes into them spoils no example; all but those with a layout
    that a copy would lose.
    """
    inputs, douts = (tuple(t.clone() if t.is_contiguous() else t for t in each) for each in (inputs, douts))
    with recording(seed):
        return forward_backward(clone(layer), inputs, douts)


def forward_backward(layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...]) -> Result:
    """Forward and backward on this very object."""
    outs = forward(layer, inputs)
    dx = backward(layer, inputs, douts)
    return Result(named("out", outs), {**dx, **gradients(layer)}, copies(buffers(layer)))


def forward(layer: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Call forward; the outputs as a tuple. Whatever it raises becomes a LayerCrash."""
    try:
        outs = as_tuple(layer.forward(*inputs))
    except Exception as error:
        raise LayerCrash(f"forward raised {type(error).__name__}: {error}", inputs=inputs, method="forward") from error
    if not outs:
        raise ContractError("forward must return a tensor or a tuple of them; it returned a tuple of none")
    for i, out in enumerate(outs):
        if not isinstance(out, Tensor):
            which = "" if len(outs) == 1 else f" number {i}"
            raise ContractError(f"forward must return a tensor or a tuple of them; output{which} is {_kind(out)}")
    return outs


def backward(layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Call backward; dx by name, one for every floating input. Whatever it raises becomes a LayerCrash."""
    return named_dx(layer, inputs, raw_backward(layer, inputs, douts))


def raw_backward(layer: Any, inputs: tuple[Any, ...], douts: tuple[Tensor, ...], **keywords: Any) -> Any:
    """Call backward; whatever it returns."""
    try:
        return layer.backward(douts if len(douts) > 1 else douts[0], **keywords)
    except ContractError:
        raise
    except Exception as error:
        text = f"backward raised {type(error).__name__}: {error}"
        raise LayerCrash(text, inputs=inputs, method="backward") from error


def named_dx(layer: Any, inputs: tuple[Any, ...], dx: Any) -> dict[str, Tensor]:
    """Check that backward returned a gradient for every floating input and nothing else; they come back by name."""
    count = sum(name.startswith("dx") for name in input_names(layer, inputs))
    several = count > 1
    if several and not (isinstance(dx, tuple) and len(dx) == count):
        came = f"a tuple of {len(dx)}" if isinstance(dx, tuple) else _kind(dx)
        raise ContractError(
            f"backward must return a tuple of {count}, one entry per input of forward, got {came}\n{CONTRACT}"
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


def differentiable(layer: Any, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """The inputs that have a gradient, under its name."""
    pairs = zip(input_names(layer, inputs), inputs)
    return {n: x for n, x in pairs if n.startswith("dx") and isinstance(x, Tensor) and x.is_floating_point()}


def input_names(layer: Any, inputs: tuple[Any, ...]) -> list[str]:
    """How the gradients of the inputs are called: dx, or dx[0], dx[1], ...; a loss has none for its target."""
    count = len(inputs)
    if isinstance(unwrap(layer), Loss):
        inside = honest(layer)
        count = len(flatten(inside.form[0])) if isinstance(inside, Packed) else 1
    return [*named("dx", inputs[:count]), *named("target", inputs[count:])]


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


# ---------------------------------------------------------------- what stands in for it


class StandIn:
    """Stands in for a layer and passes everything on; subclasses change one thing."""

    fault: Any = None  # what is wrong on purpose: then an oracle uses the layer inside

    def __init__(self, layer: Any) -> None:
        self.wrapped_layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "wrapped_layer":
            raise AttributeError(name)
        return getattr(self.wrapped_layer, name)

    def __repr__(self) -> str:
        return name_of(self.wrapped_layer)

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


def unwrap(layer: Any) -> Any:
    """The layer itself, inside whatever stands in for it."""
    while hasattr(layer, "wrapped_layer"):
        layer = layer.wrapped_layer
    return layer


def honest(layer: Any) -> Any:
    """The layer without the fault planted into it."""
    return layer.wrapped_layer if isinstance(layer, StandIn) and layer.fault else layer


class Packed(StandIn):
    """A layer as the checks call it: tensors in, and a tuple of tensors out, however the layer itself nests them.

    An LSTM cell takes (x, (h, c)) and returns (h, c), for example. A dout for every output goes in: what has no
    gradient, such as indices, is given None.

    A layer that draws random numbers draws the same ones whatever the dtype and layout of its inputs. One that computes
    in a lower precision than that of its float64 inputs does so in float64.
    """

    def __init__(self, layer: Any, form: tuple[Any, ...]) -> None:
        super().__init__(layer)
        self.form = form  # of the inputs: nested tuples of None, one None per tensor
        self.out_form: Any = None
        self.floating: list[bool] = []  # by output
        self.random = False  # whether forward draws random numbers, in training or in evaluation
        self.lowers: torch.dtype | None = None  # the lower precision in which forward computes
        self.drew = False  # whether the latest forward did

    def pack(self, inputs: tuple[Any, ...]) -> Any:
        """The inputs as the layer takes them."""
        return nest(self.form, list(inputs))

    def forward(self, *inputs: Any) -> Any:
        """The layer's forward, all its outputs in one tuple."""
        with comparable(self, inputs) as numbers:
            outs = super().forward(*self.pack(inputs))
        self.drew = numbers is not None and numbers.drew
        self.out_form = form_of(outs)
        flat = flatten(outs)
        self.floating = [not isinstance(out, Tensor) or out.is_floating_point() for out in flat]
        return flat

    def backward(self, dout: Any, **keywords: Any) -> Any:
        """The layer's backward; where inputs are in tuples, all dx in one."""
        douts = [d if floating else None for d, floating in zip(as_tuple(dout), self.floating)]
        with comparable(self, as_tuple(dout)):
            dx = super().backward(nest(self.out_form, douts), **keywords)
        return dx if keywords else self.unpack(dx)

    def unpack(self, dx: Any) -> Any:
        """What backward returned, all dx in one tuple where inputs are in tuples."""
        given = self.form[:1] if isinstance(unwrap(self), Loss) else self.form  # a target has no dx
        if not any(isinstance(part, tuple) for part in given):
            return dx
        wanted = given if len(given) > 1 else given[0]
        if form_of(dx) != wanted:
            raise ContractError(f"backward must return {_shown(wanted)}, got {_shown(form_of(dx))}\n{CONTRACT}")
        flat = flatten(dx)
        return flat if len(flat) > 1 else flat[0]


@contextmanager
def comparable(layer: Any, given: tuple[Any, ...]) -> Iterator[SameNumbers | None]:
    """Inside, runs for this layer can be compared: one like the other, but for what is to be compared.

    A random layer draws numbers that depend on nothing but the seed and the shapes. A layer that computes in a lower
    precision does so in float64, where float64 is what it is `given`.
    """
    inside = honest(layer)
    with ExitStack() as stack:
        if not isinstance(inside, Packed):
            yield None
            return
        if inside.lowers and any(isinstance(t, Tensor) and t.dtype is torch.float64 for t in given):
            stack.enter_context(InFloat64())
        yield stack.enter_context(SameNumbers()) if inside.random else None


def study(layer: Packed, inputs: tuple[Any, ...]) -> None:
    """Note whether forward, in training or in evaluation, draws random numbers, and computes in a lower precision."""
    twin = clone(layer)
    sources = [torch.default_generator, *generators(twin)]
    for training in (True, False) if has_modes(twin) else (True,):
        set_mode(twin, training)
        with private_rng(), torch.no_grad(), suppress(CheckFailure), Lowers() as lowers:
            before = [source.get_state() for source in sources]
            forward(twin, inputs)
            layer.random |= not all(map(torch.equal, before, [source.get_state() for source in sources]))
        layer.lowers = layer.lowers or lowers.to


def as_it_is(layer: Any) -> Any:
    """A copy that computes in the precision that its own code asks for."""
    twin = clone(layer)
    inside = twin
    while not isinstance(inside, Packed):
        inside = inside.wrapped_layer
    inside.lowers = None
    return twin


def packed(layer: Any, inputs: tuple[Any, ...]) -> Any:
    """The inputs as a reference for this layer takes them."""
    return layer.pack(inputs) if isinstance(layer, Packed) else inputs


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Several outputs or inputs as a tuple, one as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def form_of(value: Any) -> Any:
    """The nesting of tuples in a value, with None for everything else."""
    return tuple(form_of(v) for v in value) if isinstance(value, tuple) else None


def _shown(form: Any) -> str:
    """The nesting in words: ``(dx, (dx, dx))``."""
    inside = [_shown(part) for part in form] if isinstance(form, tuple) else []
    return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})" if isinstance(form, tuple) else "dx"


def nest(form: Any, flat: list[Any]) -> Any:
    """The values, taken from the front of `flat`, in that nesting."""
    return tuple(nest(f, flat) for f in form) if isinstance(form, tuple) else flat.pop(0)


def flatten(value: Any) -> tuple[Any, ...]:
    """All that the nested tuples hold, in order."""
    return tuple(v for item in value for v in flatten(item)) if isinstance(value, tuple) else (value,)
