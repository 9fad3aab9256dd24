"""What the library knows of autograd, beside bridges and oracles: tensors that it tracks are refused; its profiler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.autograd import profiler

from handgrad.errors import StateError

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextmanager
def tracked_by_autograd() -> Iterator[None]:
    """Inside, autograd may record a layer's forward: for oracles, which differentiate it."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def refuse_tracked(layer: Any, out: Any) -> None:
    """Raise StateError where autograd tracks the output of a forward, because of an input or a parameter.

    It would record beside us and keep all that alive; and the `.grad` of what it tracks is not ours to change.
    """
    if not _is_tracked(out) or _allowed.get():
        return
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    if names:
        problem = f"{', '.join(names)} must be a plain tensor, not one that requires grad; assign its .detach(). "
        problem += "(To keep gradients from a parameter, freeze() its layer.)"
    else:
        problem = (
            "x must be a plain tensor, not one that requires grad; give x.detach(), or make a torch module of the "
        )
        problem += "layer by handgrad.to_torch"
    raise layer.error(StateError, "forward", problem)


def any_tracked(tensors: Iterable[Tensor]) -> bool:
    """Whether one of the tensors requires grad."""
    return any([t.requires_grad for t in tensors])  # noqa: C419  # a list is faster


def profiling() -> bool:
    """Whether a profiler is on, in any thread. (The public question is of this thread alone.)"""
    return profiler._is_profiler_enabled


def _is_tracked(out: Any) -> bool:
    return out.requires_grad if isinstance(out, Tensor) else any(map(_is_tracked, out))
