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

from handgrad.errors import ArgumentError
from handgrad.layer import Layer
from handgrad.records import tensors_in


class Recompute(Layer):
    """A body that keeps its input alone, and runs its forward a second time when backward needs the rest.

    Forward:   out = body(x), recording nothing in body
    Shapes:    those of body
    Backward:  out = body(x) once more, now recording, hence dx = body.backward(dout)
    Recorded:  x, and how body was: its modes and options, copies of its buffers, where its random generators stood
    Raises:    what body raises, with the place "in body (...)"; StateError where x or a parameter changed meanwhile.
    Source:    Chen et al. 2016, arXiv:1604.06174

    It costs a second forward, and saves all that body would record from forward to backward: of a deep model of such
    blocks only the inputs are there at once, and the records of one block. All results are those of body alone, bit by
    bit: the second forward draws the same random numbers, from generators that the layers hold and from torch's global
    ones, works on the buffers as they were, and leaves everything as it was before; nobody who watches sees it.
    (Python's and NumPy's generators, and what else is no attribute of a layer, are not put back.)

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
