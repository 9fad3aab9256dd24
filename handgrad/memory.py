"""Memory: what need not be kept (Recompute, Release), freed blocks that are, tensors whose bytes are put back."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from handgrad.errors import ArgumentError, StateError
from handgrad.layer import Layer
from handgrad.optim import SGD, hooked
from handgrad.records import tensors_in
from handgrad.watch import attach, detach


class Recompute(Layer):
    """A body that keeps its input alone, and runs its forward a second time when backward needs the rest.

    Forward:   out = body(x), recording nothing in body
    Shapes:    those of body
    Backward:  out = body(x) once more, now recording, hence dx = body.backward(dout)
    Recorded:  x, and how body was: its modes and options, copies of its buffers, where its random generators stood
    Raises:    what body raises, with the place "in body (...)"; StateError where x or a parameter changed meanwhile.
    Source:    Chen et al. 2016, arXiv:1604.06174

    It costs a second forward, and saves all that body would record from forward to backward: of a deep model of such
    blocks only the inputs are there at once, and the records of one block. Several layers make a good body: one that
    records little beside its input saves nothing.

    All results are those of body alone, bit by bit: the second forward draws the same random numbers, from generators
    that the layers hold and from torch's global ones for CPU and CUDA; it works on the buffers as they were, and leaves
    everything as it was before; nobody who watches sees it. (Python's and NumPy's generators, and what else is no
    attribute of a layer, are not put back.)

    In a compiled step it is body itself, which keeps what the compiler decides to keep.

    >>> from handgrad import Linear, Sequential, Tanh
    >>> model = Sequential(Recompute(Sequential(Linear(3, 50), Tanh(), Linear(50, 2))))
    >>> _ = model(torch.ones(5, 3))
    >>> model.records().bytes  # x: 5 rows of 3 floats
    60
    >>> model.backward(torch.ones(5, 2)).shape
    torch.Size([5, 3])
    """

    takes_apart, hands_on = False, True

    def __init__(self, body: Layer) -> None:
        if not isinstance(body, Layer):
            raise ArgumentError(f"Recompute: body must be a Layer, got {type(body).__name__}")
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 else inputs
        if is_compiling() or not torch.is_grad_enabled():
            out = self.body.forward_at("body", x)
            self.push(None, x, out=out)
            return out
        before = _Earlier(self.body)
        with torch.no_grad():
            out = self.body.forward_at("body", x)
        before.forget_unused()
        # of the tensors among them a change is an error, and the bytes are counted
        self.push(before, x, *tensors_in(x), *self.body.parameters(), *before.copies(), out=out)
        return out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        before, x, *_ = self.pop(dout)
        self._refuse_autocast("backward")  # in which the second forward would compute something else
        # out = body(x)
        if before is not None:
            with before.again(), torch.enable_grad():
                self.body.forward_at("body", x)
        return self.body.backward_at("body", dout, need_dx)


class _Earlier:
    """How a body was before a forward: what its layers hold, and where the random generators stand."""

    def __init__(self, body: Layer) -> None:
        self.held = [(layer, Layer.__getstate__(layer)) for _, layer in body.named_layers()]
        self.buffers: dict[int, Tensor] = {}  # a copy of each, by the id of the buffer
        for layer, attributes in self.held:
            for name, tensor in layer._own("buffer"):
                attributes[name] = self.buffers.setdefault(id(tensor), tensor.clone())
        values = [value for _, attributes in self.held for value in attributes.values()]
        generators = [torch.default_generator, *torch.cuda.default_generators]
        generators += [value for value in values if isinstance(value, torch.Generator)]
        self.generators = [(g, g.get_state()) for g in {id(g): g for g in generators}.values()]

    def forget_unused(self) -> None:
        """Keep the states of only those generators that have moved on since."""
        self.generators = [(g, state) for g, state in self.generators if _bytes(state) != _bytes(g.get_state())]

    def copies(self) -> list[Tensor]:
        """The copies that it holds."""
        return [*self.buffers.values(), *[state for _, state in self.generators]]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the body is as it was, with nobody watching; afterwards as it is now. Once only."""
        now = [(layer, dict(vars(layer))) for layer, _ in self.held]
        states = [(g, g.get_state()) for g, _ in self.generators]
        try:
            for layer, attributes in self.held:
                vars(layer).update(attributes, _watchers=())
            for g, state in self.generators:
                g.set_state(state)
            yield
        finally:
            for layer, attributes in now:
                vars(layer).clear()
                vars(layer).update(attributes)
            for g, state in states:
                g.set_state(state)


ONE_BY_ONE = {
    SGD,
    torch.optim.SGD,
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    getattr(torch.optim, "Muon", SGD),  # of torch 2.9 and newer
}
"""The optimizers that update each parameter by what they know of it alone: so some may be updated before others."""


class Release:
    """A backward inside which each parameter is updated, and its gradient freed, as soon as that is complete.

    A gradient is complete when no layer that holds the parameter has a record left, nor any layer around one of them:
    then nobody will add to it. The layer that added last may still read the parameter, until the backward of a layer
    that is not inside it begins: then the parameter is updated. What is left at the end is updated then.

    It is a watcher of the layers of model and loss. Raises ArgumentError for an optimizer that may look at all
    parameters at once, or whose step has hooks; StateError where a gradient comes after the update.
    """

    def __init__(self, model: Layer, loss: Layer, optimizer: torch.optim.Optimizer) -> None:
        if type(optimizer) not in ONE_BY_ONE:
            known = "handgrad's SGD, or one of torch.optim but LBFGS and SparseAdam"
            problem = f"the optimizer must be known to update each parameter by itself: {known}"
            self._refuse(f"{problem}; got {type(optimizer).__name__}")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self._refuse_hooks()
        self.layers = list({id(layer): layer for part in (model, loss) for _, layer in part.named_layers()}.values())
        self.inside = {id(layer): {id(inner) for _, inner in layer.named_layers()} for layer in self.layers}
        self.holders: dict[int, list[Layer]] = {}  # of each parameter: the layers with it, and those around them
        for layer in self.layers:
            for p in layer.parameters():
                self.holders.setdefault(id(p), []).append(layer)
        self.groups: dict[int, dict[str, Any]] = {}  # of each parameter: its group in the optimizer
        self.waiting: dict[int, tuple[Tensor, list[Layer]]] = {}  # with a gradient, and the layers that added to it
        self.updated: set[int] = set()

    def __reduce__(self) -> Any:
        """A copy is of the copied layers, none of which has the ids that this one knows."""
        return Release, (self.model, self.loss, self.optimizer)

    def __enter__(self) -> None:
        self._refuse_hooks()
        self.groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.waiting, self.updated = {}, set()
        attach(self, self.layers)

    def __exit__(self, kind: Any, *_: object) -> None:
        detach(self, self.layers)
        if kind is None:
            self._update([p for p, _ in self.waiting.values()])

    def saw_out(self, layer: Layer, out: Any) -> None:
        """Forwards, of Recompute, make no gradient complete."""

    def saw_dout(self, layer: Layer, dout: Any) -> None:
        """Another backward begins: those outside of it that are through are through with their parameters."""
        if self.waiting:
            self._update([p for p, adders in self.waiting.values() if self._is_complete(p, adders, layer)])

    def saw_grad(self, layer: Layer, param: Tensor, grad: Tensor) -> None:
        """The parameter has a gradient now, or more of it."""
        if id(param) in self.updated:
            problem = f"a gradient of {layer._name_of(param)} comes after the parameter was updated, for no layer that "
            problem += "holds it had a forward waiting; leave out release_gradients"
            raise layer.error(StateError, "backward", problem)
        self.waiting.setdefault(id(param), (param, []))[1].append(layer)

    def _is_complete(self, param: Tensor, adders: list[Layer], beginning: Layer) -> bool:
        if any(id(beginning) in self.inside[id(layer)] for layer in adders):
            return False
        return not any(layer._records for layer in self.holders[id(param)])

    def _update(self, params: list[Tensor]) -> None:
        """The optimizer's step, as if it had no other parameters."""
        parts: dict[int, dict[str, Any]] = {}
        for p in params:
            group = self.groups.get(id(p))
            if group is not None:
                parts.setdefault(id(group), {**group, "params": []})["params"].append(p)
        if parts:
            whole = self.optimizer.param_groups
            self.optimizer.param_groups = list(parts.values())
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = whole
        for p in params:
            p.grad = None
            del self.waiting[id(p)]
            self.updated.add(id(p))

    def _refuse_hooks(self) -> None:
        if hooked(self.optimizer):
            self._refuse("the optimizer must have no step hooks, for it makes many steps of some parameters each")

    def _refuse(self, problem: str) -> None:
        raise ArgumentError(f"TrainStep(release_gradients=True): {problem}")


def _bytes(t: Tensor) -> bytes:
    """The memory of a tensor on the CPU, without an operation of torch, which is slower, and may be traced."""
    return ctypes.string_at(t.data_ptr(), t.nbytes)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory in the process, for good; whether it will.

    A training step frees what the next one needs again. The C library gives large blocks back to the system, and each
    new one comes in fresh pages, whose first use costs more than the arithmetic on them. After this call it keeps them,
    as torch does on a GPU. Nothing is shared that way: each result is a new tensor. It concerns the whole process, so
    it is yours to call, once, before a large model is trained; small tensors do not need it.

    Without effect, and False, where the C library is not glibc.
    """
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        option = ctypes.CDLL(None).mallopt
        return bool(option(mmap_threshold, 1 << 30) and option(trim_threshold, -1))  # blocks up to 1 GB; never trim
    return False


class Snapshot:
    """Tensors, and their values as they were when last taken, to be put back after something failed.

    It is taken before every step, so it must cost a small one next to nothing: what lies in one piece on the CPU is
    copied as bytes, which takes a tenth of the time of an operation of torch.

    >>> import torch
    >>> x = torch.ones(2)
    >>> snapshot = Snapshot([x])
    >>> snapshot.take()
    >>> _ = x.fill_(7)
    >>> snapshot.put_back()
    >>> x
    tensor([1., 1.])
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._with_memory = [t for t in self.tensors if type(t) is Tensor]  # a fake one has none
        self._addresses: list[int] = []
        self._memory: list[Any] = []  # of each on the CPU: its bytes
        self._storages: list[Any] = []  # which keep them alive
        self._others: list[Tensor] = []
        self._bytes: list[bytes] = []
        self._copies: list[Tensor] = []

    def __reduce__(self) -> Any:
        """Copies and pickles are of the copied tensors, with nothing taken yet."""
        return Snapshot, (self.tensors,)

    def take(self) -> None:
        """Note the values as they are now."""
        addresses = list(map(Tensor.data_ptr, self._with_memory))
        if addresses != self._addresses or not addresses:  # the first time, or the model was converted or moved
            self._find(addresses)
        self._bytes = [memory.raw for memory in self._memory]
        if self._others:
            self._copies = [t.clone() for t in self._others]

    def put_back(self) -> None:
        """Give the tensors the values that they had."""
        for memory, old in zip(self._memory, self._bytes):
            memory.raw = old
        for tensor, copy in zip(self._others, self._copies):
            tensor.copy_(copy)

    def _find(self, addresses: list[int]) -> None:
        plain = [t for t in self._with_memory if t.device.type == "cpu" and t.is_contiguous()]
        self._memory = [(ctypes.c_char * t.nbytes).from_address(t.data_ptr()) for t in plain]
        self._storages = [t.untyped_storage() for t in plain]
        self._others = [t for t in self.tensors if not any(t is p for p in plain)]
        self._addresses = addresses
