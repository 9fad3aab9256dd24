"""What a step and `many` are given: minibatches in tensors, lists and tuples, as one thing or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from handgrad.errors import ShapeError


def minibatches(many: Any, which: Any) -> Any:
    """One of the K minibatches, or several: of each part, where a tuple stands for several inputs."""
    return tuple([minibatches(part, which) for part in many]) if isinstance(many, tuple) else many[which]


def length(xs: Any, targets: Any) -> int:
    """K, which all parts of both must share."""
    lengths = [len(part) for many in (xs, targets) for part in (many if isinstance(many, tuple) else (many,))]
    if len(set(lengths)) != 1 or lengths[0] == 0:
        problem = f"xs and targets must hold K minibatches each, at least one, got {' and '.join(map(str, lengths))}"
        raise ShapeError(f"TrainStep.many: {problem} (a tuple stands for several inputs, a list for K minibatches)")
    return lengths[0]


def joined(many: Any, levels: int) -> Any:
    """Minibatches one after the other: one (0), a tensor or list of them (1), or those of several steps (2)."""
    if isinstance(many, tuple):
        return tuple([joined(part, levels) for part in many])
    if not isinstance(many, (Tensor, list)):
        return many
    if levels == 0:
        return many.unsqueeze(0) if isinstance(many, Tensor) else many
    if isinstance(many, list):
        each = [joined(part, levels - 1) for part in many]
        return _side_by_side(each)
    return many if levels == 1 else many.flatten(0, 1)


def _side_by_side(each: list[Any]) -> Any:
    """One value of several alike: their tensors joined along dimension 0."""
    if isinstance(each[0], tuple):
        return tuple([_side_by_side(list(parts)) for parts in zip(*each)])
    return torch.cat(each) if isinstance(each[0], Tensor) else each[0]


def ends_of_alike(xs: Any, targets: Any, steps: int) -> list[int]:
    """Where stretches of steps whose minibatches have the same shapes end."""
    both = (part for many in (xs, targets) for part in (many if isinstance(many, tuple) else [many]))
    if not any(isinstance(part, list) for part in both):
        return [steps]
    kinds = [_kind(minibatches(xs, k), minibatches(targets, k)) for k in range(steps)]
    return [k + 1 for k in range(steps) if k + 1 == steps or kinds[k] != kinds[k + 1]]


def _kind(*values: Any) -> Any:
    """The shapes and dtypes of a minibatch."""
    inside = (tuple, list)
    return [(v.shape, v.dtype) if isinstance(v, Tensor) else _kind(*v) if isinstance(v, inside) else v for v in values]


def taken_apart(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested tuples, and the structure that `rebuilt` makes the value of again.

    >>> taken_apart((torch.ones(1), (None, torch.ones(2))))[1] == (Tensor, (None, Tensor))
    True
    """
    if isinstance(value, tuple):
        pairs = [taken_apart(part) for part in value]
        return [t for parts, _ in pairs for t in parts], tuple([structure for _, structure in pairs])
    return ([value], Tensor) if isinstance(value, Tensor) else ([], value)


def rebuilt(structure: Any, parts: Iterator[Tensor]) -> Any:
    """The value that `taken_apart` took apart, of other tensors."""
    if isinstance(structure, tuple):
        return tuple([rebuilt(part, parts) for part in structure])
    return next(parts) if structure is Tensor else structure
