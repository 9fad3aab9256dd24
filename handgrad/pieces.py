"""How formulas are computed: large tensors in pieces that the cache holds, half precision in float32; fast operations.

Several passes over a piece in the cache cost one trip to memory, which for large tensors is what takes the time. So a
formula is written plainly, as if a tensor were whole, and `blockwise` hands it one piece after the other.

A number of half precision has three digits, or in float16 too small a range for a square. So the formulas get float32
there, as they do in torch's own kernels, and only their result is rounded: `in_float32` for one of several operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

R = TypeVar("R")  # rows, or (rows, sums, ...)

LOG2_E = math.log2(math.e)
FEW = 1 << 12  # numbers below which a further call costs more than it can save
WHOLE = 1 << 19  # numbers that are not cut in pieces: up to there the calls cost more than the trips to memory
HALF = frozenset((torch.float16, torch.bfloat16))
PIECE = 1 << 17  # numbers in a piece: 512 KB of float32, so that three pieces are within a core's own cache


def eager_on_cpu(x: Tensor) -> bool:
    """Whether what is done with x is done now and by the processor: then its values may be looked at, and pieces pay.

    While a graph is compiled there are no values, and those on another device would have to be waited for.
    """
    return not is_compiling() and x.is_cpu


def wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of the dtype are computed in: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in HALF else dtype


def in_float32(x: Tensor) -> Tensor:
    """An x of half precision in float32, any other as it is."""
    return x.to(wide(x.dtype))


def precise(formula: Callable[..., R], *tensors: Tensor) -> R:
    """``formula(*tensors)``; in half precision the formula gets float32, its rows are rounded and its sums stay so.

    >>> x = torch.tensor([300.0, 400.0], dtype=torch.float16)
    >>> precise(lambda x: x * x / 1000, x)  # 300 * 300 is beyond float16
    tensor([ 90., 160.], dtype=torch.float16)
    """
    dtype = tensors[0].dtype
    if dtype not in HALF:
        return formula(*tensors)
    result: Any = formula(*map(in_float32, tensors))
    rows, *sums = result if isinstance(result, tuple) else (result,)
    rows = None if rows is None else rows.to(dtype)
    return cast(R, (rows, *sums) if sums else rows)


def is_whole(x: Tensor) -> bool:
    """Whether `blockwise` hands x to a formula as it is: in one piece and in its own dtype."""
    return x.dtype not in HALF and (x.numel() <= WHOLE or not eager_on_cpu(x))


def blockwise(formula: Callable[..., R], *tensors: Tensor) -> R:
    """``formula(*tensors)`` as `precise` computes it, of large tensors piece by piece along dimension 0.

    The tensors are as long as each other; the formula gets the same rows of each. It returns rows of its own, one for
    each of theirs, or a tuple of rows (or None) and of sums over its rows: the rows are joined, the sums added up.
    A formula with a parameter `dx` may write the rows there, which saves a copy: rows like those of the first tensor,
    or None where the formula gets the tensors whole or in float32.

    In a compiled graph tensors stay whole: there, torch makes one pass of many by itself. So they do off the CPU.

    >>> x = torch.ones(4, 1 << 20)
    >>> rows, total = blockwise(lambda piece: (2 * piece, piece.sum(0)), x)
    >>> bool((rows == 2).all()), bool((total == 4).all())
    (True, True)
    >>> rows = blockwise(lambda piece, dx=None: torch.mul(piece, 3, out=dx), x)
    >>> bool((rows == 3).all())
    True
    """
    first = tensors[0]
    if is_whole(first):
        return formula(*tensors)
    count, length, half = first.numel(), len(first), first.dtype in HALF
    if count <= WHOLE or not eager_on_cpu(first):
        return precise(formula, *tensors)
    step = max(1, PIECE * length // count)
    takes_dx = not half and "dx" in signature(formula).parameters
    joined: Any = first.new_empty(first.shape) if takes_dx else None
    sums: list[Any] = []
    for i, piece in enumerate(zip(*[torch.split(t, step) for t in tensors])):
        here = slice(i * step, (i + 1) * step)
        dx = joined[here] if takes_dx else None
        result: Any = formula(*piece, dx=dx) if takes_dx else precise(formula, *piece)
        rows, *parts = result if isinstance(result, tuple) else (result,)
        if rows is not None and rows is not dx:
            joined = rows.new_empty(length, *rows.shape[1:]) if joined is None else joined
            joined[here] = rows  # while the cache still holds them
        sums.append(parts)
    totals = [torch.stack(parts).sum(0) for parts in zip(*sums)]
    return cast(R, (joined, *totals) if totals else joined)


def where_positive(dout: Tensor, out: Tensor) -> Tensor:
    """``dout.where(out > 0, 0)``, which on a processor is several times as slow as a product with the sign of out.

    The product is the same where dout is finite: infinity times 0 is NaN. (The sign of NaN is 0.)
    """
    if eager_on_cpu(out):
        dx = out.sign().mul_(dout)
        if math.isfinite(dx.sum()):
            return dx
    return dout.where(out > 0, 0)


def exp(x: Tensor, out: Tensor | None = None) -> Tensor:
    """``e^x``; of many numbers as ``2^(LOG2_E x)``, for torch's exp2 is up to four times as fast as its exp.

    The product with LOG2_E is rounded, so that a relative error of eps becomes one of (1 + |x|) eps.
    """
    if x.numel() < FEW or not eager_on_cpu(x):
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2_E, out=out).exp2_()


def normal_cdf(x: Tensor) -> Tensor:
    """``(1 + erf(x/sqrt 2))/2`` of finite x; of many numbers as ``gelu(x)/x``, for torch's gelu is faster than its erf.

    Near 0, where the quotient is 0/0 or has no digits, it is 1/2.
    """
    if x.numel() < FEW or not eager_on_cpu(x):
        return (1 + torch.erf(x * math.sqrt(1 / 2))) / 2
    x = functional.hardshrink(x, 1e-30)  # 0 where |x| <= 1e-30
    return functional.gelu(x).div_(x).nan_to_num_(0.5)


def normal_pdf(x: Tensor) -> Tensor:
    """``e^(-x^2/2) / sqrt(2 pi)``, as a power of 2 for the reason given at `exp`."""
    log2_at_0 = torch.full((), -math.log2(2 * math.pi) / 2, dtype=x.dtype, device=x.device)
    return torch.addcmul(log2_at_0, x, x, value=-LOG2_E / 2).exp2_()
