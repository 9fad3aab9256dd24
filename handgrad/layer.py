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
import warnings
from collections.abc import Callable, Iterator, Mapping
from threading import get_ident
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from handgrad.errors import DtypeError, HandgradError, ShapeError, StateDictError, StateError
from handgrad.pieces import HALF
from handgrad.records import Records, records_of
from handgrad.state import convert, copy_all, misfits
from handgrad.summary import Summary, summarize
from handgrad.tables import bytes_text
from handgrad.tracked import refuse_tracked

L = TypeVar("L", bound="Layer")
T = TypeVar("T")
is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # of any device; the public one is asked per device
MANY = float("inf")  # inputs: as many as a forward of *inputs is given
PILE = 256  # forwards of one layer that wait for their backward: so many calls from outside are warned of
ONE_THREAD = (
    "one model belongs to one thread at a time; give each thread a copy (copy.deepcopy), or a lock around forward and "
    "backward. To evaluate in threads, enter torch.no_grad() in each: around a thread pool it does not reach them"
)


class _Declaration(NamedTuple):
    """What a class says about one of its tensors: what it is for, and its shape in the names of the field."""

    kind: str
    shape: tuple[str, ...]
    persistent: bool = True  # whether state_dict() has it


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


def buffer(*shape: str, persistent: bool = True) -> Any:
    """Declare a tensor that belongs to the layer but is not trained, such as a running mean.

    A buffer that is not persistent moves with `to()`, but `state_dict()` leaves it out: the constructor makes it anew.
    """
    return _Declaration("buffer", shape, persistent)


Spec: TypeAlias = tuple[torch.Size, torch.dtype, torch.device] | list[Any]
"""What dout must be like: shape, dtype and device, or a list of specs where it is a tuple."""

Record: TypeAlias = tuple[tuple[Any, ...], list[tuple[Tensor, int]], Spec, int]
"""What one forward left for its backward: what it saved, the tensors among it, each with how often it had been changed
in place by then, what dout must be like, and the thread it ran in (0: any may take it). Plain tuples: every step makes
one per layer."""


class Watcher(Protocol):
    """Who looks at what passes through a layer: `handgrad.watch` makes them."""

    def saw_out(self, layer: Layer, out: Any) -> None:
        """What a forward gives."""

    def saw_dout(self, layer: Layer, dout: Any) -> None:
        """What a backward was given."""

    def saw_grad(self, layer: Layer, param: Tensor, grad: Tensor) -> None:
        """What a backward adds to a parameter's gradient."""


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

    A layer that calls layers inside it does so through their `forward_at` and `backward_at`.

    What the two must do:

    - `forward` checks first, never modifies its input, and pushes exactly one record.
    - `backward` pops exactly one record, *adds* to each parameter's gradient a tensor that nobody else holds, never
      modifies dout, and returns dx with the shape and dtype of x: None for an integer x, a tuple for several inputs.
    - A `backward(dout, need_dx=True)` that takes the keyword is told when nobody wants dx, of the first input where
      there are several, and may then return None for it.
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
    shown: ClassVar[tuple[str, ...]] = ()  # the arguments that repr shows without their names: "3 -> 4"
    _declared: ClassVar[dict[str, _Declaration]] = {}
    takes_apart: ClassVar[bool] = True  # False where forward(a, b) and forward((a, b)) are the same
    hands_on: ClassVar[bool] = False  # whether a dout of None goes on to layers inside as it came
    stops_dout: ClassVar[bool] = False  # whether nothing goes back through it, so that nobody need make its dout
    _arity: tuple[int, float] = (1, 1)
    _records: list[Record]
    _watchers: tuple[Watcher, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, _Declaration)}
        for name in own:
            delattr(cls, name)  # an attribute that __init__ forgot is an AttributeError, not a declaration
        cls._declared = {**cls._declared, **own}
        cls.takes_need_dx = "need_dx" in inspect.signature(cls.backward).parameters
        cls._arity = arity(cls.forward, given=1) if cls.takes_apart else (1, 1)

    def __new__(cls: type[L], *args: Any, **kwargs: Any) -> L:
        if (args or kwargs) and cls.__init__ is object.__init__:  # which would swallow them
            raise TypeError(f"{cls.__name__}() takes no arguments")
        dtype, declared = kwargs.get("dtype"), cls._declared.values()
        if dtype is not None and any(d.kind == "parameter" for d in declared) and not _is_floating_dtype(dtype):
            raise DtypeError(f"{cls.__name__}: dtype must be a floating torch.dtype, got {dtype!r}")
        self = super().__new__(cls)
        self._records, self._watchers = [], ()
        self.training = True
        return self

    # ------------------------------------------------------------------ what a subclass defines

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute dx from dout and add to the parameters' gradients. Subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define backward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call forward; warn where the calls pile up, 256 of them without a backward.

        A recurrent loop written by hand may be as long without a word; `Unroll` and the layers in a model always may.
        """
        out = self.forward(*args, **kwargs)
        if len(self._records) == PILE and is_grad_enabled():
            self._warn_of_pile()
        return out

    # ------------------------------------------------------------------ a layer inside a layer

    def forward_at(self, place: str | int | None, x: Any) -> Any:
        """Call forward as the layer around this one does, which knows it as `place`: a name that errors then mention.

        A tuple is spread over a forward of several inputs: one with two or more positional parameters, or `*inputs`. A
        forward of one input gets the tuple itself. Without a place, the caller is no layer.

        >>> from handgrad import GRUCell, Linear
        >>> GRUCell(3, 4).forward_at("cell", (torch.ones(2, 3), torch.zeros(2, 4))).shape
        torch.Size([2, 4])
        >>> Linear(3, 4).forward_at("head", torch.ones(2, 5))
        Traceback (most recent call last):
        handgrad.errors.ShapeError: in head (Linear(3 -> 4)): Linear(3 -> 4).forward: last dimension of x must be 3, ...
        """
        try:
            if isinstance(x, tuple) and self._arity[1] > 1:
                least, most = self._arity
                if not least <= len(x) <= most:
                    raise self._wrong_count(len(x))
                return self.forward(*x)
            return self.forward(x)
        except Exception as error:
            self._locate(error, place)
            raise

    def backward_at(self, place: str | int | None, dout: Any, need_dx: bool = True) -> Any:
        """Call backward as the layer around this one does: the counterpart of `forward_at`.

        With need_dx=False nobody wants dx: a backward that takes the keyword is told, and what any other one returns
        is of no use. A dout of None, also inside a tuple, is that of an output that nobody used: the backward gets
        zeros for it, or None where the output is no floating one.
        """
        try:
            if (dout is None or isinstance(dout, tuple)) and not self.hands_on:
                for _, _, spec, _ in self._records[-1:]:
                    dout = with_zeros(dout, spec)
            if need_dx or not self.takes_need_dx:
                return self.backward(dout)
            return self.backward(dout, need_dx=False)
        except Exception as error:
            self._locate(error, place)
            raise

    def _locate(self, error: Exception, place: str | int | None) -> None:
        """Add `place` to what the error says of where it happened.

        An error of handgrad carries the place in its text. Any other error keeps its type and text and gets the place
        as a note (Python 3.11 and newer print it below the message).
        """
        if place is None:
            return
        if isinstance(error, HandgradError):
            error.path.insert(0, str(place))
            error.place = error.place or self._head()
        elif hasattr(error, "add_note"):
            error.add_note(f"in {place} ({self._head()})")

    def _wrong_count(self, count: int) -> HandgradError:
        least, most = self._arity
        wanted = f"{least}" if least == most else f"{least} to {most}" if most < MANY else f"at least {least}"
        return self.error(ShapeError, "forward", f"takes {wanted} inputs, got a tuple of {count}")

    # ------------------------------------------------------------------ what forward and backward use

    def error(self, kind: type[HandgradError], where: str, problem: str) -> HandgradError:
        """Make an error whose text begins with this layer, its sizes and options, and the method it happened in."""
        return kind(f"{self._head()}.{where}: {problem}")

    def check_input(self, x: Tensor, dtype: torch.dtype | None = None, name: str = "x") -> None:
        """Raise DtypeError unless x is a tensor of `dtype`, or of any floating dtype where none is given.

        `name` is that of the input, where it is not x. Under torch.autocast any x is refused.
        """
        if is_any_autocast_enabled():
            self._refuse_autocast("forward")
        if not isinstance(x, Tensor):
            raise self.error(DtypeError, "forward", f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype is not dtype and (dtype is not None or not x.is_floating_point()):
            wanted = "a floating dtype" if dtype is None else f"{dtype}, the dtype of the parameters"
            problem = f"{name} must have {wanted}, got {x.dtype}; convert {name} or use layer.to(dtype)"
            raise self.error(DtypeError, "forward", problem)

    def push(self, *saved: Any, out: Any) -> None:
        """Record what the backward of this forward needs; a no-op under `torch.no_grad()`.

        `out` is a tensor, or a tuple for several outputs. `saved` may hold tensors and anything else. A saved tensor is
        kept, not copied: changed in place before the backward, it makes that backward a StateError. Save a parameter
        that backward reads, too.
        """
        for watcher in self._watchers:
            watcher.saw_out(self, out)
        if not is_grad_enabled():
            return
        if isinstance(out, Tensor):
            if not out.is_leaf:  # or autograd would be at work
                refuse_tracked(self, out)
            spec: Spec = (out.shape, out.dtype, out.device)
        else:
            refuse_tracked(self, out)
            spec = spec_of(out)
        records, versions, thread = self._records, [], 0
        if type(out) is Tensor or not is_compiling():  # where a graph is made, there is no count of changes, no thread
            thread = get_ident()
            if records:
                self._refuse_earlier(thread)
            try:
                for t in saved:
                    if isinstance(t, Tensor):
                        versions.append((t, t._version))
            except RuntimeError:  # nor has a tensor made under torch.inference_mode()
                versions = [(t, t._version) for t in saved if isinstance(t, Tensor) and not t.is_inference()]
        records.append((saved, versions, spec, thread))
        if len(records) > 1:  # another thread may have come between: of two, the later one sees it
            self._refuse_earlier(thread)

    def pop(self, dout: Any) -> tuple[Any, ...]:
        """Check dout against the latest forward that has had no backward, and hand back what that forward saved.

        Raises StateError without such a forward, where it ran in another thread, or where a saved tensor was changed
        since; ShapeError and DtypeError where dout does not match the output. After an error the record is still there.
        """
        try:
            saved, versions, spec, thread = self._records[-1]
        except IndexError:
            problem = "no forward is waiting for a backward; call forward first, outside torch.no_grad(), "
            raise self.error(StateError, "backward", problem + "and backward once for each forward") from None
        if thread and thread != get_ident():
            raise self.error(StateError, "backward", f"the latest forward ran in another thread; {ONE_THREAD}")
        if not isinstance(dout, Tensor) or dout.shape != spec[0] or dout.dtype is not spec[1]:
            self._check_dout(dout, spec)
        for tensor, version in versions:
            if tensor._version != version:
                problem = f"{self._name_of(tensor)} was changed in place after the forward that recorded it; "
                problem += "run backward before an optimizer step or any in-place change"
                raise self.error(StateError, "backward", problem)
        for watcher in self._watchers:
            watcher.saw_dout(self, dout)
        del self._records[-1:]
        return saved

    def add_grad(self, param: Tensor | None, grad: Tensor) -> None:
        """Add `grad`, which must have param's shape and dtype and share memory with nothing, to `param.grad`.

        Of a parameter in half precision it may also be in float32, and is rounded.
        """
        if param is None:
            return
        if getattr(param, "frozen", False):
            self._refuse_autocast("backward")
            return
        earlier = param.grad
        if earlier is not None or self._watchers:
            grad = self._fitting(param, grad)
            for watcher in self._watchers:
                watcher.saw_grad(self, param, grad)
        if earlier is not None:
            earlier.add_(grad)
            return
        try:
            param.grad = grad  # torch compares the two faster than Python can
        except (RuntimeError, TypeError):
            param.grad = self._fitting(param, grad)

    def _fitting(self, param: Tensor, grad: Tensor) -> Tensor:
        """The gradient in the parameter's dtype, rounded where it is float32 for half precision; else an error."""
        if grad.shape == param.shape and grad.dtype is param.dtype:
            return grad
        if grad.shape == param.shape and grad.dtype is torch.float32 and param.dtype in HALF:
            return grad.to(param.dtype)
        self._refuse_autocast("backward")
        raise self.error(
            ShapeError if grad.shape != param.shape else DtypeError,
            "backward",
            f"the gradient of {self._name_of(param)} must be {tuple(param.shape)} {param.dtype} like the "
            f"parameter, got {tuple(grad.shape)} {grad.dtype}",
        )

    def _refuse_autocast(self, where: str) -> None:
        """Raise under torch.autocast, where an operation may give another dtype than its inputs have.

        `check_input` asks in every forward; a backward is refused where the dtypes show it, at a loss, and where a
        parameter is frozen, whose gradient would show it.
        """
        if is_any_autocast_enabled():
            problem = "torch.autocast must be off, for a layer computes in the dtype of its parameters; leave it, and "
            raise self.error(DtypeError, where, problem + "convert model and inputs by .to(torch.bfloat16)")

    # ------------------------------------------------------------------ records

    @property
    def pending(self) -> int:
        """How many forwards in this layer and the layers inside it still wait for their backward."""
        return sum(len(layer._records) for _, layer in self.named_layers())

    def records(self) -> Records:
        """What waits for a backward right now: per layer its forwards and the bytes that they recorded.

        Each memory counts once, where it is first; parameters and buffers do not count. Python objects that are no
        tensors are not seen, nor what a torch module behind `from_torch` keeps.

        >>> from handgrad import Linear, Sequential, Tanh
        >>> model = Sequential(Linear(3, 8), Tanh(), Linear(8, 2))
        >>> _ = model(torch.ones(5, 3))
        >>> print(model.records())
               layer           forwards  dtypes   recorded
               Sequential()           1
        0      Linear(3 -> 8)         1  float32      60 B
        1      Tanh()                 1  float32     160 B
        2      Linear(8 -> 2)         1  float32
        total                         4              220 B
        >>> _ = model.backward(torch.ones(5, 2))
        >>> print(model.records())
        no forward waits for its backward
        """
        return records_of(self)

    def drop_records(self) -> None:
        """Forget every forward that still waits for its backward, here and in the layers inside."""
        for _, layer in self.named_layers():
            layer._records.clear()

    def _check_dout(self, dout: Any, spec: Spec) -> None:
        self._refuse_autocast("backward")
        if dout is None and (self.hands_on or not _is_floating(spec)):
            return  # nobody used this output, or it has no gradient
        if isinstance(spec, list):
            if not isinstance(dout, tuple) or len(dout) != len(spec):
                came = f"a tuple of {len(dout)}" if isinstance(dout, tuple) else type(dout).__name__
                raise self.error(
                    ShapeError, "backward", f"dout must be a tuple of {len(spec)} tensors, one per output, got {came}"
                )
            for d, s in zip(dout, spec):
                self._check_dout(d, s)
            return
        shape, dtype, _ = spec
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

    def _refuse_earlier(self, thread: int) -> None:
        """Raise where the first record is another thread's, or has tensors that have changed, so that it was left."""
        for _, versions, _, other in self._records[:1]:
            if other not in (0, thread):
                raise self.error(StateError, "forward", f"a forward of another thread is under way; {ONE_THREAD}")
            for tensor, version in versions:
                if tensor._version != version:
                    problem = f"{len(self._records)} earlier forward(s) never had a backward, and "
                    problem += f"{self._name_of(tensor)} has changed since; "
                    problem += "evaluate under torch.no_grad(), or discard them with drop_records()"
                    raise self.error(StateError, "forward", problem)

    def _warn_of_pile(self) -> None:
        problem = f"{PILE} forwards wait for their backward, and hold {bytes_text(self.records().bytes)}; to evaluate, "
        problem += "enter torch.no_grad() (in each thread of a pool: around it, it does not reach them); to train, run "
        warnings.warn(f"{self._head()}: {problem}backward after each forward, or drop_records()", stacklevel=3)

    def _name_of(self, tensor: Tensor) -> str:
        named = ((name, getattr(self, name, None)) for name in self._declared)
        return next((name for name, t in named if t is tensor), f"a recorded tensor of shape {tuple(tensor.shape)}")

    # ------------------------------------------------------------------ the tree of layers and its tensors

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        """The layers held in attributes, or in dicts, lists and tuples there, nested or not, with their names."""
        for name, value in vars(self).items():
            if type(value) not in _HOLD_NOTHING and name not in _OF_A_RUN:
                yield from held(Layer, name, value)

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
            for wanted in ("parameter", "buffer") if kind == "" else (kind,):
                for name, tensor in layer._own(wanted):
                    yield (f"{path}.{name}" if path else name), tensor

    def _own(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the kind that this layer itself has, by name."""
        for name, declaration in self._declared.items():
            if declaration.kind == kind and (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its path. A tensor shared by several layers is one parameter, under its first name."""
        return _distinct(self._tensors("parameter"))

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter, each tensor once: what an optimizer takes."""
        return (tensor for _, tensor in self.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Every buffer with its path, each tensor once."""
        return _distinct(self._tensors("buffer"))

    def freeze(self: L) -> L:
        """Give the parameters of this layer and of those inside no gradient any more, until `unfreeze()`.

        It marks the tensors: a parameter that another layer shares is frozen there, too. Their `.grad` is cleared, so
        optimizers pass them over; `parameters()` still lists them. Recording, dx and modes stay as they are (a batch
        norm in training still updates its running statistics). What nothing below needs is better kept out by
        `Constant(body)`. (That a parameter does not require grad freezes nothing: none does.)

        >>> from handgrad import Linear
        >>> layer = Linear(3, 4).freeze()
        >>> out, dx = layer(torch.ones(2, 3)), layer.backward(torch.ones(2, 4))
        >>> layer, dx.shape, layer.weight.grad
        (Linear(3 -> 4, frozen), torch.Size([2, 3]), None)
        """
        for param in self.parameters():
            param.frozen, param.grad = True, None  # type: ignore[attr-defined]
        return self

    def unfreeze(self: L) -> L:
        """Undo `freeze()`: the parameters get gradients again."""
        for param in self.parameters():
            if hasattr(param, "frozen"):
                del param.frozen
        return self

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
        Raises StateError while a forward waits for its backward; DtypeError for a dtype that is no floating one. After
        an error, torch's own included (there is no such device, or it is full), nothing has changed.
        """
        for target in targets:
            if isinstance(target, torch.dtype) and not target.is_floating_point:
                raise self.error(DtypeError, "to", f"the dtype must be a floating one, got {target}")
        if self.pending:
            raise self.error(StateError, "to", "a forward still waits for its backward; run it, or drop_records()")
        convert([tensor for _, tensor in _distinct(self._tensors(""))], targets)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer under its path; keys, shapes and layouts are those of the equal torch.nn model."""
        return {
            f"{path}.{name}" if path else name: tensor
            for path, layer in self._walk()
            for kind in ("parameter", "buffer")
            for name, tensor in layer._own(kind)
            if layer._declared[name].persistent
        }

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
        """Copy `state` into this model's own tensors: all of it, or nothing.

        Other dtypes are converted, as by torch.nn, but not where more than rounding would be lost: floats to integers,
        complex numbers to real ones, finite values to infinite ones.

        Raises StateDictError, with nothing copied, that lists every key whose value does not fit and, if `strict`,
        every missing and unexpected one.
        """
        if not isinstance(state, Mapping):
            wanted = "a state_dict, a mapping from names to tensors; of a file, first load it"
            raise self.error(StateDictError, "load_state_dict", f"state must be {wanted}; got {type(state).__name__}")
        own = self.state_dict()
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        given = {key: state[key] for key in own if key in state}
        problems = misfits(own, given)
        if strict:
            problems += [f"{key}: missing" for key in missing] + [f"{key}: unexpected" for key in unexpected]
        problems = problems or copy_all(own, given)
        if problems:
            raise self.error(StateDictError, "load_state_dict", "\n  " + "\n  ".join(problems))
        return LoadResult(missing, unexpected)

    def summary(self, *inputs: Any) -> Summary:
        """One row per layer: the shape of its output for these inputs, its parameters, and the bytes it records.

        Runs a forward on a copy. Frozen parameters are said.

        >>> from handgrad import Linear, Sequential, Tanh
        >>> print(Sequential(Linear(3, 8).freeze(), Tanh(), Linear(8, 2)).summary(torch.ones(5, 3)))
               layer                   output      parameters  recorded
               Sequential()            (5, 2)
        0      Linear(3 -> 8, frozen)  (5, 8)       32 frozen      60 B
        1      Tanh()                  (5, 8)                     160 B
        2      Linear(8 -> 2)          (5, 2)              18
        total                                  50 (32 frozen)     220 B
        """
        return summarize(self, inputs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the layer, not the forwards that wait for their backward, nor who watches."""
        return {name: value for name, value in vars(self).items() if name not in _OF_A_RUN}

    def extra_repr(self) -> str:
        """What stands between the parentheses of `repr`: the arguments in `shown`, and those that are not the defaults.

        An argument of `__init__` is shown by the attribute of its name, where there is one.
        """
        first = [
            str(value[0] if isinstance(value := getattr(self, name), tuple) and len(value) == 1 else value)
            for name in self.shown
        ]
        parts = [" -> ".join(first)] if first else []
        for name, argument in inspect.signature(type(self).__init__).parameters.items():
            value = _UNSHOWN if argument.kind is argument.VAR_POSITIONAL else vars(self).get(name, _UNSHOWN)
            if name in self._declared and isinstance(argument.default, bool):
                value = value is not None  # bias=True, and the parameter `bias`
            if isinstance(value, Tensor):
                parts.append(f"{name} of shape {tuple(value.shape)}")
            elif name not in self.shown and isinstance(value, _SHOWN) and not _is(value, argument.default):
                parts.append(f"{name}={value!r}")
        params = [vars(self).get(name) for name, declared in self._declared.items() if declared.kind == "parameter"]
        if any(p is not None for p in params) and all(p is None or is_frozen(p) for p in params):
            parts.append("frozen")
        return ", ".join(parts)

    def _head(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def __repr__(self) -> str:
        """One line; and one for each layer inside, unless this one has tensors of its own."""
        inside = [] if self._declared else list(self.named_children())
        if not inside:
            return self._head()
        rows = [f"  ({name}): " + repr(layer).replace("\n", "\n  ") for name, layer in inside]
        return "\n".join([self._head()[:-1], *rows, ")"])


_OF_A_RUN = ("_records", "_watchers", "forward", "backward")  # the last two where somebody watches the class's own
_HOLD_NOTHING = {Tensor, int, float, bool, str, type(None)}  # what most attributes are
_UNSHOWN = object()
_SHOWN = (bool, int, float, str, tuple, list, type(None))


def _is(value: Any, default: Any) -> bool:
    """Whether an argument has its default, which for a pair may be the number that stands for both."""
    return bool(value == default) or (isinstance(value, tuple) and value == (default,) * len(value))


def is_frozen(param: Tensor) -> bool:
    """Whether `freeze()` has marked the parameter."""
    return getattr(param, "frozen", False)


def arity(forward: Callable[..., Any], given: int = 0) -> tuple[int, float]:
    """How many inputs a forward takes, at least and at the most, beside the first `given` ones (self)."""
    parameters = list(inspect.signature(forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][given:]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return len(positional), MANY
    return len([p for p in positional if p.default is p.empty]), len(positional)


def held(kind: type[T], name: str, value: Any) -> Iterator[tuple[str, T]]:
    """What is of the kind in an attribute's value, which may be a nested list, tuple or dict, each with its path."""
    if isinstance(value, kind):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from held(kind, f"{name}.{key}", item)


def spec_of(out: Any) -> Spec:
    """What the gradient of a tensor, or of a tuple of them, must be like."""
    return (out.shape, out.dtype, out.device) if isinstance(out, Tensor) else [spec_of(o) for o in out]


def _is_floating_dtype(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_floating(spec: Spec) -> bool:
    """Whether a gradient belongs to it, or to one of its parts."""
    return any(map(_is_floating, spec)) if isinstance(spec, list) else spec[1].is_floating_point


def with_zeros(dout: Any, spec: Spec) -> Any:
    """The dout with zeros in the place of every None that a gradient belongs to; a wrong one as it is."""
    if isinstance(spec, list):
        parts = [None] * len(spec) if dout is None else dout
        return tuple([with_zeros(d, s) for d, s in zip(parts, spec)]) if len(parts) == len(spec) else dout
    shape, dtype, device = spec
    return torch.zeros(shape, dtype=dtype, device=device) if dout is None and dtype.is_floating_point else dout


def _distinct(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
