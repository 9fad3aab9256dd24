"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

from handgrad.errors import ArgumentError, locate
from handgrad.layer import Layer


class Sequential(Layer):
    """Layers in a row, each fed with the output of the one before.

    Forward:   x_0 = x,  x_i = layer_i(x_{i-1}),  out = x_n
    Backward:  dx_n = dout,  dx_{i-1} = layer_i.backward(dx_i),  dx = dx_0: the chain rule, last layer first.
               With need_dx=False the first layer is told that nobody wants its dx.
    Recorded:  nothing itself; the layers record
    Raises:    what the layers raise, with the place: "in 3 (BatchNorm1d(64)): ...".

    The same layer object may stand in several places. Indexing gives a layer, slicing a Sequential of the same layer
    objects. An empty Sequential is the identity.

    >>> from handgrad import Linear, Tanh
    >>> model = Sequential(Linear(3, 8), Tanh(), Linear(8, 2))
    >>> model
    Sequential(
      (0): Linear(3 -> 8)
      (1): Tanh()
      (2): Linear(8 -> 2)
    )
    >>> model[-1], len(model[:2])
    (Linear(8 -> 2), 2)
    """

    def __init__(self, *layers: Layer) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise ArgumentError(f"Sequential: every argument must be a Layer, got {type(layer).__name__} at {i}")
        self.layers = list(layers)

    def forward(self, x: Any) -> Any:
        for i, layer in enumerate(self.layers):
            try:
                x = layer.forward(x)
            except Exception as error:
                locate(error, str(i), layer)
                raise
        self.push(out=x)
        return x

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        self.pop(dout)
        for i in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[i]
            try:
                if i == 0 and not need_dx and layer.takes_need_dx:
                    dout = layer.backward(dout, need_dx=False)
                else:
                    dout = layer.backward(dout)
            except Exception as error:
                locate(error, str(i), layer)
                raise
        return dout

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        return ((str(i), layer) for i, layer in enumerate(self.layers))

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer:
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        rows = [f"  ({i}): " + repr(layer).replace("\n", "\n  ") for i, layer in enumerate(self.layers)]
        return "\n".join(["Sequential(", *rows, ")"]) if rows else "Sequential()"
