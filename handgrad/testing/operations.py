"""What a forward does, operation by operation: which random numbers it draws, and which tensors it reads.

Two right runs of a random layer can be compared only where they draw the same numbers in the same places. torch's draws
depend on the dtype (float32 takes other numbers from the generator than float64) and on the layout (a mask like a
transposed x is drawn in the order of its memory). `SameNumbers` makes them depend on the seed and the shape alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

RETURNED = "rand rand_like randn randn_like randint randint_like randperm multinomial normal poisson bernoulli"
WRITTEN = "uniform_ normal_ random_ bernoulli_ exponential_ geometric_ log_normal_ cauchy_"
DRAWS = frozenset([*RETURNED.split(), "native_dropout", *WRITTEN.split()])  # the operations that draw
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
