"""The contract that every layer keeps, and the little machinery that keeps it for them.

A layer has `forward(x) -> out` and `backward(dout) -> dx`. Between the two it remembers what the backward needs, in a
*record*. Records form a stack: each forward pushes one, each backward pops the latest. So one layer object may be
used several times before the first backward, as in a recurrent net, and each backward still finds its own forward.

Three conventions come from PyTorch. A parameter is a plain tensor and its gradient is that tensor's own `.grad`, so
`torch.optim` and `torch.nn.utils.clip_grad_norm_` work unchanged. Gradients add up until `zero_grad()`. And
`torch.no_grad()` means: record nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from handgrad.errors import DtypeError, HandgradError, ShapeError, StateDictError, StateError

L = TypeVar("L", bound="Layer")

LOG2_E = math.log2(math.e)
FEW = 1 << 12  # numbers below which a further call costs more than it can save
WHOLE = 1 << 20  # numbers that are not cut in pieces: up to there the calls cost more than the trips to memory
BLOCK = 1 << 17  # numbers in a piece: 512 KB of float32, so that three pieces are within a core's own cache


class _Declaration(NamedTuple):
    """What a class says about one of its tensors: what it is for, and its shape in the names of the field."""

    kind: str
    shape: tuple[str, ...]


def parameter(*shape: str) -> Any:
    """Declare a trainable tensor at the top of a layer class, by its symbolic shape.

    The declaration is all that makes a tensor a parameter: `__init__` assigns the tensor itself (or None for "does not
    have one"), and `parameters()`, `state_dict()`, `to()` and the gradient checks find it.

    >>> from handgrad import Layer, parameter
    >>> class Scale(Layer):
    ...     weight: Tensor = parameter("D")
    ...     def __init__(self, size: int) -> None:
    ...         self.weight = torch.ones(size)
    >>> [(name, tuple(p.shape)) for name, p in Scale(3).named_parameters()]
    [('weight', (3,))]
    """
    return _Declaration("parameter", shape)


def buffer(*shape: str) -> Any:
    """Declare a tensor that belongs to the layer's state but is not trained, such as a running mean."""
    return _Declaration("buffer", shape)


Spec: TypeAlias = tuple[torch.Size, torch.dtype] | list[Any]
"""What dout must be like: shape and dtype, or a list of specs where it is a tuple."""

Record: TypeAlias = tuple[tuple[Any, ...], list[tuple[Tensor, int]], Spec]
"""What one forward left for its backward: what it saved, the tensors among it, each with how often it had been changed
in place by then, and what dout must be like. Plain tuples: every step makes one a layer."""


def blockwise(formula: Callable[..., Tensor], *tensors: Tensor, out: Tensor | None = None, scratch: int = 0) -> Tensor:
    """``formula(*tensors, out, *scratch)``, computed on pieces along dimension 0 that the processor's cache can hold.

    Several passes over a piece cost one trip to memory, which for large tensors is what takes the time. The formula
    takes its pieces of the tensors, which are as long as each other, and then the memory to write to: `out`, for its
    result (like the first tensor where none is given), and `scratch` more for what comes between, the same for every
    piece, because fresh memory costs more than the arithmetic. It passes them on as `out=` and returns its result.

    Small tensors come whole, without that memory: None as `out=` means fresh memory, too. So do all tensors in a
    compiled graph, which makes one pass of several by itself.
    """
    first = tensors[0]
    count = first.numel()
    if count <= WHOLE or is_compiling():
        return formula(*tensors, out, *[None] * scratch)
    length = max(1, BLOCK * len(first) // count)
    whole = torch.empty_like(first) if out is None else out
    spare = [torch.empty_like(first[:length]) for _ in range(scratch)]
    for piece in zip(*[torch.split(t, length) for t in (*tensors, whole)]):
        formula(*piece, *[t[: len(piece[0])] for t in spare])
    return whole


def exp(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``e^x``; of many numbers as ``2^(LOG2_E x)``, for torch's exp2 is up to three times as fast as its exp.

    The product with LOG2_E is rounded, so that a relative error of eps becomes one of (1 + |x|) eps.
    """
    if x.numel() < FEW or is_compiling():
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2_E, out=out).exp2_()


def total(parts: list[Any]) -> Any:
    """Each piece gave a tuple of sums over its own rows: the tuple of those over all rows."""
    return parts[0] if len(parts) == 1 else tuple([torch.stack(sums).sum(0) for sums in zip(*parts)])


class LoadResult(NamedTuple):
    """The keys that `load_state_dict(strict=False)` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Layer:
    """The base of every layer, container and loss.

    A subclass declares its tensors, and defines `forward` and `backward` with the help of four methods:

    ======================  ============================================================================
    `check_input(x)`        x is a tensor of a floating dtype (or of the dtype given)
    `push(*saved, out=)`    at the end of forward: remember what backward needs
    `pop(dout)`             at the start of backward: get it back; dout is checked against that forward
    `add_grad(param, g)`    in backward: add g to param.grad
    ======================  ============================================================================

    What the two must do:

    - `forward` checks first, never modifies its input, and pushes exactly one record.
    - `backward` pops exactly one record, *adds* to each parameter's gradient a tensor that nobody else holds, never
      modifies dout, and returns dx with the shape and dtype of x: None for an integer x, a tuple for several inputs.
    - A `backward(dout, need_dx=True)` that takes the keyword is told when nobody wants dx, and may then return None.
    - Both are plain tensor arithmetic: no autograd.

    There is no `super().__init__()` to forget.

    >>> class Square(Layer):
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         self.check_input(x)
    ...         out = x * x
    ...         self.push(x, out=out)
    ...         return out
    ...     def backward(self, dout: Tensor) -> Tensor:
    ...         (x,) = self.pop(dout)
    ...         return 2 * x * dout
    >>> square = Square()
    >>> square(torch.tensor([3.0, -1.0]))
    tensor([9., 1.])
    >>> square.backward(torch.tensor([1.0, 10.0]))
    tensor([  6., -20.])
    """

    training: bool
    takes_need_dx: ClassVar[bool] = False
    _declared: ClassVar[dict[str, _Declaration]] = {}
    _records: list[Record]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, _Declaration)}
        for name in own:
            delattr(cls, name)  # an attribute that __init__ forgot is an AttributeError, not a declaration
        cls._declared = {**cls._declared, **own}
        cls.takes_need_dx = "need_dx" in inspect.signature(cls.backward).parameters

    def __new__(cls: type[L], *args: Any, **kwargs: Any) -> L:
        self = super().__new__(cls)
        self._records = []
        self.training = True
        return self

    # ------------------------------------------------------------------ what a subclass defines

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute dx from dout and add to the parameters' gradients. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define backward")

    def extra_repr(self) -> str:
        """What stands between the parentheses of `repr`: sizes, and whatever differs from the defaults."""
        return ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # ------------------------------------------------------------------ what forward and backward use

    def error(self, kind: type[HandgradError], where: str, problem: str) -> HandgradError:
        """Make an error whose text begins with this layer's repr and the method it happened in."""
        return kind(f"{self!r}.{where}: {problem}")

    def check_input(self, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """Raise DtypeError unless x is a tensor of `dtype`, or of any floating dtype where none is given."""
        if not isinstance(x, Tensor):
            raise self.error(DtypeError, "forward", f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype is not dtype and (dtype is not None or not x.is_floating_point()):
            wanted = "a floating dtype" if dtype is None else f"{dtype}, the dtype of the parameters"
            raise self.error(
                DtypeError, "forward", f"x must have {wanted}, got {x.dtype}; convert x or use layer.to(dtype)"
            )

    def push(self, *saved: Any, out: Any) -> None:
        """Record what the backward of this forward needs; a no-op under `torch.no_grad()`.

        `out` is a tensor, or a tuple for several outputs. `saved` may hold tensors and anything else. A saved tensor is
        kept, not copied: changed in place before the backward, it makes that backward a StateError. Save a parameter
        that backward reads, too.
        """
        if not is_grad_enabled():
            return
        records = self._records
        if records:
            self._refuse_stale(records[0])
        versions = []
        if not is_compiling():  # a compiled graph has no count of changes
            try:
                for t in saved:
                    if isinstance(t, Tensor):
                        versions.append((t, t._version))
            except RuntimeError:  # nor has a tensor made under torch.inference_mode()
                versions = [(t, t._version) for t in saved if isinstance(t, Tensor) and not t.is_inference()]
        spec = (out.shape, out.dtype) if isinstance(out, Tensor) else _spec(out)
        records.append((saved, versions, spec))

    def pop(self, dout: Any) -> tuple[Any, ...]:
        """Check dout against the latest forward that has had no backward, and hand back what that forward saved.

        Raises StateError without such a forward or where a saved tensor was changed since, ShapeError and DtypeError
        where dout does not match the output. After an error the record is still there.
        """
        if not self._records:
            raise self.error(
                StateError,
                "backward",
                "no forward is waiting for a backward; call forward first, outside torch.no_grad(), "
                "and backward once for each forward",
            )
        saved, versions, spec = self._records[-1]
        if not isinstance(dout, Tensor) or (dout.shape, dout.dtype) != spec:
            self._check_dout(dout, spec)
        for tensor, version in versions:
            if tensor._version != version:
                problem = f"{self._name_of(tensor)} was changed in place after the forward that recorded it; "
                problem += "run backward before an optimizer step or any in-place change"
                raise self.error(StateError, "backward", problem)
        self._records.pop()
        return saved

    def add_grad(self, param: Tensor | None, grad: Tensor) -> None:
        """Add `grad`, which must have param's shape and dtype and share memory with nothing, to `param.grad`."""
        if param is None:
            return
        if grad.shape != param.shape or grad.dtype is not param.dtype:
            raise self.error(
                ShapeError if grad.shape != param.shape else DtypeError,
                "backward",
                f"the gradient of {self._name_of(param)} must be {tuple(param.shape)} {param.dtype} like the "
                f"parameter, got {tuple(grad.shape)} {grad.dtype}",
            )
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.add_(grad)

    # ------------------------------------------------------------------ records

    @property
    def pending(self) -> int:
        """How many forwards in this layer and the layers inside it still wait for their backward."""
        return sum(len(layer._records) for _, layer in self.named_layers())

    def drop_records(self) -> None:
        """Forget every forward that still waits for its backward, here and in the layers inside."""
        for _, layer in self.named_layers():
            layer._records.clear()

    def _check_dout(self, dout: Any, spec: Spec) -> None:
        if isinstance(spec, list):
            if not isinstance(dout, tuple) or len(dout) != len(spec):
                came = f"a tuple of {len(dout)}" if isinstance(dout, tuple) else type(dout).__name__
                raise self.error(
                    ShapeError, "backward", f"dout must be a tuple of {len(spec)} tensors, one an output, got {came}"
                )
            for d, s in zip(dout, spec):
                self._check_dout(d, s)
            return
        shape, dtype = spec
        if not isinstance(dout, Tensor):
            raise self.error(DtypeError, "backward", f"dout must be a torch.Tensor, got {type(dout).__name__}")
        if dout.shape != shape:
            raise self.error(
                ShapeError,
                "backward",
                f"dout must have the shape of the output of the forward it belongs to, {tuple(shape)}, "
                f"got {tuple(dout.shape)}",
            )
        if dout.dtype is not dtype:
            problem = f"dout must have the dtype of the output, {dtype}, got {dout.dtype}"
            raise self.error(DtypeError, "backward", problem)

    def _refuse_stale(self, record: Record) -> None:
        """A record whose tensors have changed can never be used: it was left behind by an earlier step."""
        for tensor, version in record[1]:
            if tensor._version != version:
                problem = f"{len(self._records)} earlier forward(s) never had a backward, and {self._name_of(tensor)} "
                problem += "has changed since; evaluate under torch.no_grad(), or discard them with drop_records()"
                raise self.error(StateError, "forward", problem)

    def _name_of(self, tensor: Tensor) -> str:
        named = ((name, getattr(self, name, None)) for name in self._declared)
        return next((name for name, t in named if t is tensor), f"a recorded tensor of shape {tuple(tensor.shape)}")

    # ------------------------------------------------------------------ the tree of layers and its tensors

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        """The layers held directly in attributes, or in lists and tuples that are attributes, with their names."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Layer))

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """Yield this layer and every layer inside, each object once, with its path ("" for this one)."""
        seen: set[int] = set()
        for path, layer in self._walk(prefix):
            if id(layer) not in seen:
                seen.add(id(layer))
                yield path, layer

    def _walk(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        yield prefix, self
        for name, child in self.named_children():
            yield from child._walk(f"{prefix}.{name}" if prefix else name)

    def _tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every declared tensor of the kind ("" for all), under each of its names: a shared one comes several times."""
        for path, layer in self._walk():
            for wanted in ("parameter", "buffer"):
                for name, declaration in layer._declared.items():
                    tensor = getattr(layer, name)
                    if declaration.kind == wanted and kind in ("", wanted) and tensor is not None:
                        yield (f"{path}.{name}" if path else name), tensor

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its path. A tensor shared by several layers is one parameter, under its first name."""
        return _distinct(self._tensors("parameter"))

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter, each tensor once: what an optimizer takes."""
        return (tensor for _, tensor in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer with its path, each tensor once."""
        return _distinct(self._tensors("buffer"))

    def zero_grad(self) -> None:
        """Set every parameter's gradient to None."""
        for param in self.parameters():
            param.grad = None

    def train(self: L, mode: bool = True) -> L:
        """Switch this layer and those inside to training (or, with mode=False, evaluation) behaviour."""
        for _, layer in self.named_layers():
            layer.training = mode
        return self

    def eval(self: L) -> L:
        """Switch to evaluation behaviour. Recording does not depend on it: that is `torch.no_grad()`."""
        return self.train(False)

    def to(self: L, *targets: torch.dtype | torch.device | str) -> L:
        """Convert to a floating dtype or move to a device, in place: ``to(torch.float64)``, ``to("cuda")``.

        Tensors keep their identity, so an optimizer made before stays valid. Integer buffers keep their dtype.
        Raises StateError while a forward waits for its backward; DtypeError for a dtype that is no floating one.
        """
        for target in targets:
            if isinstance(target, torch.dtype) and not target.is_floating_point:
                raise self.error(DtypeError, "to", f"the dtype must be a floating one, got {target}")
        if self.pending:
            raise self.error(StateError, "to", "a forward still waits for its backward; run it, or drop_records()")
        for _, tensor in _distinct(self._tensors("")):
            grad, tensor.grad = tensor.grad, None
            for target in targets:
                if not isinstance(target, torch.dtype) or tensor.is_floating_point():
                    tensor.data = tensor.data.to(target)
            if grad is not None:
                tensor.grad = grad.to(tensor.device, tensor.dtype)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer under its path; keys, shapes and layouts are those of the equal torch.nn model."""
        return dict(self._tensors(""))

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
        """Copy `state` into this model's own tensors.

        Raises StateDictError, with nothing copied, that lists every misshaped key and, if `strict`, every missing and
        unexpected one.
        """
        if not isinstance(state, Mapping):
            wanted = "a state_dict, a mapping from names to tensors; of a file, first load it"
            raise self.error(StateDictError, "load_state_dict", f"state must be {wanted}; got {type(state).__name__}")
        own = self.state_dict()
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        misshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
        problems = [
            f"{key}: expected shape {tuple(own[key].shape)}, got {tuple(state[key].shape)}" for key in misshaped
        ]
        if strict:
            problems += [f"{key}: missing" for key in missing] + [f"{key}: unexpected" for key in unexpected]
        if problems:
            raise self.error(StateDictError, "load_state_dict", "\n  " + "\n  ".join(problems))
        with torch.no_grad():
            for key, tensor in own.items():
                if key in state:
                    tensor.copy_(state[key])
        return LoadResult(missing, unexpected)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the layer, not the forwards that wait for their backward."""
        return {name: value for name, value in vars(self).items() if name != "_records"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _spec(out: Any) -> Spec:
    return (out.shape, out.dtype) if isinstance(out, Tensor) else [_spec(o) for o in out]


def _distinct(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
