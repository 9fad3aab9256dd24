"""A model's tensors overwritten or converted all together or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values given for some of the tensors, one text per key.

    >>> misfits({"weight": torch.ones(3)}, {"weight": [1.0, 2.0, 3.0]})
    ['weight: expected a tensor, got list']
    """
    problems = {key: _misfit(own[key], value) for key, value in given.items()}
    first: dict[int, str] = {}
    for key, problem in problems.items():
        other = first.setdefault(id(own[key]), key)
        if not problem and not problems[other] and not _equal(given[key], given[other]):
            problems[key] = f"expected the values of {other}, which is the same tensor in this model, got others"
    return [f"{key}: {problem}" for key, problem in problems.items() if problem]


def _misfit(tensor: Tensor, value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        return f"expected an ordinary dense tensor, got a {kind} one"
    if value.shape != tensor.shape:
        return f"expected shape {tuple(tensor.shape)}, got {tuple(value.shape)}"
    if value.is_meta or tensor.is_meta:
        whose = "this model's own tensor" if tensor.is_meta else "the tensor given"
        return f"expected values, but {whose} has none, being on the device meta"
    if not torch.can_cast(value.dtype, tensor.dtype):
        return f"expected {tensor.dtype}, got {value.dtype}"
    if _is_narrower(tensor.dtype, value.dtype) and not _equal(value.to(tensor.dtype).isfinite(), value.isfinite()):
        return f"expected {tensor.dtype}, got finite values of {value.dtype} that are infinite there"
    return ""


def _is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype.is_floating_point and than.is_floating_point and torch.finfo(dtype).max < torch.finfo(than).max


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all values are the same, NaN counting as equal to itself."""
    return a is b or bool(torch.isclose(a, b.to(a.device, a.dtype), rtol=0, atol=0, equal_nan=True).all())


def copy_all(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Copy the values into the tensors; what was wrong, in which case all tensors are as before."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    # what lies in the model's memory itself would change while it is copied from
    values = {k: v.clone() if v.untyped_storage().data_ptr() in memory else v for k, v in given.items()}
    before: list[tuple[Tensor, Tensor]] = []
    key = ""
    with torch.no_grad():
        try:
            for key, value in values.items():
                before.append((own[key], own[key].clone()))
                own[key].copy_(value)
        except BaseException as error:
            for tensor, old in before:
                with suppress(RuntimeError):  # of the one that cannot be written to
                    tensor.copy_(old)
            if not isinstance(error, RuntimeError):
                raise
            return [f"{key}: {error}"]
    return []


def convert(tensors: Sequence[Tensor], targets: Sequence[torch.dtype | torch.device | str]) -> None:
    """Give each tensor, and its gradient, memory of another dtype or device; integers keep their dtype."""
    converted = []
    for tensor in tensors:
        data, grad = tensor.data, tensor.grad
        for target in targets:
            if not isinstance(target, torch.dtype) or data.is_floating_point():
                data = data.to(target)
        converted.append((tensor, data, None if grad is None else grad.to(data.device, data.dtype)))
    before = [(tensor, tensor.data, tensor.grad) for tensor in tensors]
    try:
        _assign(converted)
    except BaseException:
        _assign(before)
        raise


def _assign(pairs: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    for tensor, data, grad in pairs:
        tensor.grad = None  # which must be like the data
        tensor.data = data
        tensor.grad = grad
