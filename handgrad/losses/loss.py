"""What all losses share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from handgrad.errors import ArgumentError, IndexRangeError, ShapeError
from handgrad.layer import Layer, Spec

REDUCTIONS = ("mean", "sum", "none")


class Loss(Layer):
    """A layer of two inputs that ends a model: ``loss(x, target)``, then ``model.backward(loss.backward())``.

    The target has no gradient, so `backward` returns dx alone. A reduced loss is a scalar whose own gradient is 1:
    `backward()` needs no argument. With reduction "none" the loss has a value a row, and `backward(dout)` wants one.
    """

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"{type(self).__name__}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
        self.reduction = reduction

    def _check_dout(self, dout: Any, spec: Spec) -> None:
        """Accept None, standing for 1, where the loss is a scalar."""
        if dout is not None:
            super()._check_dout(dout, spec)
        elif isinstance(spec, tuple) and spec[0]:
            problem = f"only a scalar loss has a default dout; this one needs dout of shape {tuple(spec[0])}"
            raise self.error(ShapeError, "backward", problem)


def labels(target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor]:
    """Which rows are not ignored, None for all of them, and the labels, with 0 for those of ignored rows.

    The usual batch, where nothing is negative and so nothing is ignored, goes without masks. A compiled graph cannot
    look at values and always takes the mask.
    """
    if ignore_index < 0 and not is_compiling() and (target.numel() == 0 or target.min().item() >= 0):
        return None, target
    used = target != ignore_index
    return used, target.where(used, 0)


def check_labels(loss: Loss, y: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexRangeError unless every label is a class."""
    if y.numel() > 0:
        low, high = (int(limit) for limit in y.aminmax())
        if low < 0 or high >= classes:
            wanted = f"targets must be in 0..{classes - 1} or ignore_index={ignore_index}"
            raise loss.error(IndexRangeError, "forward", f"{wanted}, got {low if low < 0 else high}")
