"""What all losses share."""

from __future__ import annotations

from typing import Any

from handgrad.errors import ArgumentError, ShapeError
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
