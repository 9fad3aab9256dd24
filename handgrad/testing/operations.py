"""What a forward does, operation by operation: the random numbers it draws, its precision, the tensors it reads.

Two right runs of a random layer can be compared only where they draw the same numbers in the same places. torch's draws
depend on the dtype (float32 takes other numbers from the generator than float64) and on the layout (a mask like a
transposed x is drawn in the order of its memory). `SameNumbers` makes them depend on the seed and the shape alone.

A layer may compute in float32 on purpose, whatever comes in (``x.float()``). Its rounding would hide what a float64
check looks for, so `InFloat64` has it compute the same in float64.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

RETURNED = "rand rand_like randn randn_like randint randint_like randperm multinomial normal poisson bernoulli"
WRITTEN = "uniform_ normal_ random_ bernoulli_ exponential_ geometric_ log_normal_ cauchy_"
DRAWS = frozenset([*RETURNED.split(), "native_dropout", *WRITTEN.split()])  # the operations that draw
MACHINERY = (str(Path(torch.__file__).parent), str(Path(__file__).parent))  # whose lines are not the layer's own
INTEGERS = ("randint", "randperm", "multinomial")  # what they draw is integer unless a dtype says otherwise


class SameNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, random numbers are drawn in float64, in the order of the indices, and then converted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in DRAWS:
            return func(*args, **kwargs)
        self.drew = True
        given = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        written = args[0] if name.endswith("_") else kwargs.get("out")
        if written is not None:
            return written.copy_(func(*tree_map(_plain, args), **tree_map(_plain, kwargs)))
        wanted = kwargs.get("dtype") or (given[0].dtype if given else torch.get_default_dtype())
        takes_dtype = any(argument.name == "dtype" for argument in func._schema.arguments)
        if takes_dtype and wanted.is_floating_point and (kwargs.get("dtype") or not name.startswith(INTEGERS)):
            kwargs = {**kwargs, "dtype": torch.float64}
        return tree_map(lambda t: _converted(t, wanted), func(*tree_map(_plain, args), **kwargs))


def _plain(value: Any) -> Any:
    """A contiguous copy, of a floating tensor in float64."""
    if not isinstance(value, Tensor):
        return value
    dtype = torch.float64 if value.is_floating_point() else value.dtype
    return value.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


LOWER = (torch.float32, torch.float16, torch.bfloat16)  # than float64, in which layers are checked


class Lowers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, notes which lower precision an operation gives to numbers that it takes in float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.to: torch.dtype | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        made = next((t.dtype for t in outs if isinstance(t, Tensor) and t.dtype in LOWER), None)
        if made is not None and any(isinstance(t, Tensor) and t.dtype is torch.float64 for t in tree_leaves(args)):
            self.to = self.to or made
        return out


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, whoever asks for a lower precision, or makes a tensor in it, is given float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_raised, (args, kwargs or {}))
        out = func(*args, **kwargs)
        made = not any(isinstance(t, Tensor) for t in tree_leaves((args, kwargs)))
        if made or func.overloadpacket.__name__ == "lift_fresh":  # as torch.tensor does with what it has made
            return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.dtype in LOWER else t, out)
        return out


def _raised(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOWER else value


class FirstNotFinite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, finds the line whose operation is the first to make NaN (or infinity) out of numbers without it."""

    def __init__(self, nan: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bad, self.word = (torch.isnan, "NaN") if nan else (torch.isinf, "infinity")
        self.where = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        spoilt = not self.where and self._any(args)
        out = func(*args, **(kwargs or {}))
        if not self.where and not spoilt and self._any(out):
            frames = traceback.extract_stack()
            own = next((f for f in reversed(frames) if not f.filename.startswith(MACHINERY)), frames[0])
            name = func.overloadpacket.__name__
            self.where = f"{self.word} first appears in {own.name}, line {own.lineno}: `{own.line}` ({name})"
        return out

    def _any(self, values: Any) -> bool:
        floating = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
        return any(bool(self.bad(t).any()) for t in floating)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, notes which tensor objects operations are called with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ids: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ids |= {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


def read_in(run: Callable[[], Any], tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that some operation in `run` reads; an error ends it."""
    with torch.no_grad(), suppress(Exception), _Reads() as reads:
        run()
    return [name for name, t in tensors if id(t) in reads.ids]
