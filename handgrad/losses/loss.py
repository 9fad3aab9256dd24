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


def labels(loss: Loss, target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor | None, Tensor]:
    """Which rows are not ignored, None for all of them, and the labels, with 0 for those of ignored rows.

    Raises IndexRangeError for a label that is no class. The range check already tells whether a row can be ignored, so
    the usual batch goes without masks. A compiled graph cannot look at values and always takes the mask.
    """
    if not is_compiling():
        if target.numel() == 0:
            return None, target
        low, high = (limit.item() for limit in target.aminmax())
        if low >= 0 and high < classes and not low <= ignore_index <= high:
            return None, target
    used = target != ignore_index
    y = target.where(used, 0)
    if not is_compiling():
        low, high = (int(limit) for limit in y.aminmax())
        if low < 0 or high >= classes:
            wanted = f"targets must be in 0..{classes - 1} or ignore_index={ignore_index}"
            raise loss.error(IndexRangeError, "forward", f"{wanted}, got {low if low < 0 else high}")
    return used, y
