"""Layers made of layers: in a row, and side by side.

Wherever the same x goes into several bodies, their dx add up; wherever a body is one of several, `dout` is handed to
it unchanged. Bodies run backward in reverse order, so one layer object may be, or be inside, several of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, overload

import torch
from torch import Tensor

from handgrad.arguments import integer
from handgrad.errors import ArgumentError, DtypeError, ShapeError
from handgrad.layer import Layer, spec_of, with_zeros


class Several(Layer):
    """What the containers of several layers share: those layers, which can be counted, indexed and iterated."""

    takes_apart = False  # a tuple goes on whole, and the layers inside take it apart

    def __init__(self, *layers: Layer) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                kind = type(self).__name__
                raise ArgumentError(f"{kind}: every argument must be a Layer, got {type(layer).__name__} at {i}")
        self.layers = list(layers)

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        return ((str(i), layer) for i, layer in enumerate(self.layers))

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class Sequential(Several):
    """Layers in a row, each fed with the output of the one before.

    Forward:   x_0 = x,  x_i = layer_i(x_{i-1}),  out = x_n
    Backward:  dx_n = dout,  dx_{i-1} = layer_i.backward(dx_i),  dx = dx_0: the chain rule, last layer first.
               With need_dx=False the first layer is told that nobody wants its dx.
    Recorded:  nothing itself; the layers record
    Raises:    what the layers raise, with the place: "in 3 (BatchNorm1d(64)): ...".

    The same layer object may stand in several places. Indexing gives a layer, slicing a Sequential of the same layer
    objects. An empty Sequential is the identity. The first layer may take several inputs, given one by one or as a
    tuple; where a layer returns a tuple, one that takes several inputs gets its parts.

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

    hands_on = True

    def forward(self, *inputs: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 else inputs
        for i, layer in enumerate(self.layers):
            x = layer.forward_at(i, x)
        self.push(out=x)
        return x

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        self.pop(dout)
        for i in reversed(range(len(self.layers))):
            wanted = need_dx if i == 0 else not self.layers[i - 1].stops_dout
            dout = self.layers[i].backward_at(i, dout, wanted)
        return dout

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer:
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]


class Identity(Layer):
    """The input itself.

    Forward:   out = x
    Shapes:    any
    Backward:  dx = dout. Neither is copied: out is x and dx is dout.
    Recorded:  nothing
    Raises:    DtypeError; ShapeError and StateError from backward.

    >>> layer = Identity()
    >>> layer(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    >>> layer.backward(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        self.push(out=x)
        return x

    def backward(self, dout: Tensor) -> Tensor:
        self.pop(dout)
        return dout


class Constant(Layer):
    """A body that counts as a constant: nothing is recorded in it, and nothing goes back.

    Forward:   out = body(x), under torch.no_grad()
    Shapes:    those of body
    Backward:  d out / dx counts as 0: dx = 0, whatever dout is, and no parameter of body gets a gradient.
               A container does not even ask the layer above for the dout.
    Recorded:  the shape of x
    Raises:    what body raises, with the place "in body (...)".

    ``Sequential(Constant(base), head)`` trains the head on what a base makes, at the cost of the base's forward alone.
    Its modes are body's: in training a batch norm inside still uses and updates its statistics.

    >>> from handgrad import Linear
    >>> model = Sequential(Constant(Linear(3, 4)), Linear(4, 1))
    >>> out, dx = model(torch.ones(2, 3)), model.backward(torch.ones(2, 1))
    >>> dx.count_nonzero(), [name for name, p in model.named_parameters() if p.grad is not None]
    (tensor(0), ['1.weight', '1.bias'])
    """

    takes_apart, hands_on, stops_dout = False, True, True

    def __init__(self, body: Layer) -> None:
        if not isinstance(body, Layer):
            raise ArgumentError(f"Constant: body must be a Layer, got {type(body).__name__}")
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 else inputs
        with torch.no_grad():
            out = self.body.forward_at("body", x)
        self.push(spec_of(x), out=out)
        return out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        (spec,) = self.pop(dout)
        # out = body(x), a constant
        return with_zeros(None, spec) if need_dx else None


class Residual(Layer):
    """A body with a connection around it.

    Forward:   out = x + body(x); of several inputs, each is added to the output in its place
    Shapes:    x any that body keeps; out like x
    Backward:  x acts twice, directly and through body, hence dx = dout + body.backward(dout)
    Recorded:  nothing itself; body records
    Raises:    ShapeError, DtypeError where body(x) is not like x; what body raises, with the place "in body (...)".
    Source:    He et al. 2015, arXiv:1512.03385

    >>> from handgrad import Linear
    >>> block = Residual(Linear(3, 3))
    >>> block
    Residual(
      (body): Linear(3 -> 3)
    )
    >>> x = torch.ones(2, 3)
    >>> bool((block(x) == x + torch.nn.functional.linear(x, block.body.weight, block.body.bias)).all())
    True
    """

    takes_apart = False

    def __init__(self, body: Layer) -> None:
        if not isinstance(body, Layer):
            raise ArgumentError(f"Residual: body must be a Layer, got {type(body).__name__}")
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        x = inputs[0] if len(inputs) == 1 else inputs
        y = self.body.forward_at("body", x)
        xs, ys = (x, y) if isinstance(x, tuple) else ((x,), (y,))
        if not isinstance(ys, tuple) or len(ys) != len(xs):
            came = f"a tuple of {len(ys)}" if isinstance(ys, tuple) else type(ys).__name__
            raise self.error(ShapeError, "forward", f"body must give {len(xs)} outputs for as many inputs, got {came}")
        for a, b in zip(xs, ys):
            check_same_form(self, {"x": a, "the output of body": b})
        out = plus(x, y)
        self.push(out=out)
        return out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        self.pop(dout)
        # out = x + body(x)
        dx = self.body.backward_at("body", dout, need_dx)
        return plus(dout, dx) if need_dx else None


class Branches(Several):
    """What Sum, Product, Concat and Parallel share: each body has a dout of its own, and gives a dx of its own."""

    def __init__(self, *bodies: Layer) -> None:
        if not bodies:
            raise ArgumentError(f"{type(self).__name__}: at least one body is needed")
        super().__init__(*bodies)

    def _forward_each(self, *inputs: Any) -> list[Any]:
        """Every body's output for the same x."""
        x = inputs[0] if len(inputs) == 1 else inputs
        return [body.forward_at(i, x) for i, body in enumerate(self.layers)]

    def _backward_each(self, douts: list[Any], need_dx: bool) -> list[Any]:
        """Every body's dx for its own dout, last body first: the latest record is the first to be taken."""
        dxs: list[Any] = [None] * len(douts)
        for i in reversed(range(len(douts))):
            dxs[i] = self.layers[i].backward_at(i, douts[i], need_dx)
        return dxs


class Sum(Branches):
    """The sum of what several bodies make of the same input.

    Forward:   out = body_0(x) + body_1(x) + ...
    Shapes:    every body's output has the same shape, which is out's
    Backward:  dx = body_0.backward(dout) + body_1.backward(dout) + ...; None for an integer x
    Recorded:  nothing itself; the bodies record
    Raises:    ShapeError, DtypeError where the outputs differ; what the bodies raise, with the place "in 0 (...)".

    With a single body dx and out are that body's own. x may be whatever the bodies take, a tuple included.

    >>> layer = Sum(Identity(), Identity(), Identity())
    >>> layer(torch.tensor([1.0, 2.0]))
    tensor([3., 6.])
    >>> layer.backward(torch.tensor([1.0, 10.0]))
    tensor([ 3., 30.])
    """

    def forward(self, *inputs: Any) -> Tensor:
        outs = self._forward_each(*inputs)
        check_same_form(self, {f"the output of {i}": out for i, out in enumerate(outs)})
        out: Tensor = total(outs)
        self.push(out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        self.pop(dout)
        # out = body_0(x) + body_1(x) + ...
        dxs = self._backward_each([dout] * len(self.layers), need_dx)
        return total(dxs) if need_dx else None


class Product(Branches):
    """The elementwise product of what several bodies make of the same input: a gate, where one of them is a Sigmoid.

    Forward:   out = body_0(x) * body_1(x) * ...
    Shapes:    every body's output has the same shape, which is out's
    Backward:  with out_i = body_i(x), d out / d out_i is the product of the others, hence
               dx = sum_i body_i.backward(dout prod_{j != i} out_j); None for an integer x.
               The product of the others is that of those before i times that of those after: no division, so
               outputs of zero are right.
    Recorded:  every out_i
    Raises:    ShapeError, DtypeError where the outputs differ; what the bodies raise, with the place "in 0 (...)".

    >>> square = Product(Identity(), Identity())
    >>> square(torch.tensor([3.0, 0.0]))
    tensor([9., 0.])
    >>> square.backward(torch.tensor([1.0, 1.0]))
    tensor([6., 0.])
    """

    def forward(self, *inputs: Any) -> Tensor:
        outs = self._forward_each(*inputs)
        check_same_form(self, {f"the output of {i}": out for i, out in enumerate(outs)})
        out: Tensor = outs[0]
        for factor in outs[1:]:
            out = out * factor
        self.push(*outs, out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        outs = self.pop(dout)
        # out = body_0(x) * body_1(x) * ...
        douts = times_the_others(dout, outs)
        dxs = self._backward_each(douts, need_dx)
        return total(dxs) if need_dx else None


class Concat(Branches):
    """What several bodies make of the same input, joined along a dimension.

    Forward:   out = cat([body_0(x), body_1(x), ...], dim)
    Shapes:    the bodies' outputs agree in all dimensions but `dim`, where out has the sum of their sizes
    Backward:  each element of an output appears once in out, so dout is cut at the same places into dout_i, and
               dx = sum_i body_i.backward(dout_i); None for an integer x. Each dout_i is a view of dout.
    Recorded:  the sizes of the outputs along dim
    Raises:    ShapeError, DtypeError where the outputs cannot be joined; what the bodies raise, with the place.

    >>> layer = Concat(Identity(), Identity(), dim=-1)
    >>> layer(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2., 1., 2.]])
    >>> layer.backward(torch.tensor([[1.0, 2.0, 10.0, 20.0]]))
    tensor([[11., 22.]])
    """

    def __init__(self, *bodies: Layer, dim: int) -> None:
        super().__init__(*bodies)
        self.dim = integer(self, "dim", dim, None)

    def forward(self, *inputs: Any) -> Tensor:
        outs = self._forward_each(*inputs)
        check_same_form(self, {f"the output of {i}": out for i, out in enumerate(outs)}, but=self.dim)
        out = torch.cat(outs, self.dim)
        self.push([out.shape[self.dim] for out in outs], out=out)
        return out

    def backward(self, dout: Tensor, need_dx: bool = True) -> Any:
        (sizes,) = self.pop(dout)
        # out = cat([body_0(x), body_1(x), ...], dim)
        dxs = self._backward_each(list(torch.split(dout, sizes, self.dim)), need_dx)
        return total(dxs) if need_dx else None


class Parallel(Branches):
    """Several bodies, each with an input and an output of its own: from a tuple to a tuple.

    Forward:   out = (body_0(x[0]), body_1(x[1]), ...)
    Shapes:    x a tuple of as many inputs as there are bodies
    Backward:  dx = (body_0.backward(dout[0]), body_1.backward(dout[1]), ...), None where x[i] is an integer tensor
    Recorded:  nothing itself; the bodies record
    Raises:    ShapeError where x is not a tuple of that length; what the bodies raise, with the place "in 0 (...)".

    >>> from handgrad import Linear
    >>> layer = Parallel(Linear(3, 2), Identity())
    >>> [tuple(out.shape) for out in layer((torch.ones(4, 3), torch.ones(5)))]
    [(4, 2), (5,)]
    >>> [tuple(dx.shape) for dx in layer.backward((torch.ones(4, 2), torch.ones(5)))]
    [(4, 3), (5,)]
    """

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        x = inputs[0] if len(inputs) == 1 else inputs
        if not isinstance(x, (tuple, list)) or len(x) != len(self.layers):
            came = f"{len(x)} of them" if isinstance(x, (tuple, list)) else type(x).__name__
            problem = f"x must be a tuple of {len(self.layers)} inputs, one per body, got {came}"
            raise self.error(ShapeError, "forward", problem)
        out = tuple([body.forward_at(i, x[i]) for i, body in enumerate(self.layers)])
        self.push(out=out)
        return out

    def backward(self, dout: tuple[Any, ...], need_dx: bool = True) -> tuple[Any, ...] | None:
        self.pop(dout)
        dxs = self._backward_each(list(dout), need_dx)
        return tuple(dxs) if need_dx else None


def times_the_others(dout: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """For each factor, dout times the product of the others: of those before it, and of those after it."""
    douts = [dout]  # times the factors before
    for factor in factors[:-1]:
        douts.append(douts[-1] * factor)
    after = factors[-1]
    for i in reversed(range(len(factors) - 1)):
        douts[i] = douts[i] * after
        after = after * factors[i] if i else after
    return douts


def plus(a: Any, b: Any) -> Any:
    """The sum of two tensors, or of two tuples of them element by element; None stands for nothing."""
    if a is None or b is None:
        return b if a is None else a
    return tuple([plus(x, y) for x, y in zip(a, b)]) if isinstance(a, tuple) else a + b


def total(terms: Sequence[Any]) -> Any:
    """The sum of several; a new tensor unless there is one term."""
    return reduce(plus, terms)


def check_same_form(layer: Layer, outs: dict[str, Any], but: int | None = None) -> None:
    """Raise unless all are floating tensors of one dtype and one shape, the size along dimension `but` left aside."""
    if not outs:
        raise layer.error(ShapeError, "forward", "takes at least one input, got none")
    first = next(iter(outs))
    for name, out in outs.items():
        layer.check_input(out, name=name)
        if out.dtype is not outs[first].dtype:
            problem = f"{first} and {name} must have one dtype, got {outs[first].dtype} and {out.dtype}"
            raise layer.error(DtypeError, "forward", problem)
        if but is not None and not -out.dim() <= but < out.dim():
            problem = f"{name} must have dimension {but}, got shape {tuple(out.shape)}"
            raise layer.error(ShapeError, "forward", problem)
        if _without(out, but) != _without(outs[first], but):
            rest = "" if but is None else f" apart from dimension {but}"
            problem = f"{first} and {name} must have one shape{rest}, got {tuple(outs[first].shape)} and "
            raise layer.error(ShapeError, "forward", problem + f"{tuple(out.shape)}")


def _without(x: Tensor, dim: int | None) -> list[int]:
    shape = list(x.shape)
    if dim is not None and shape:
        shape[dim] = -1
    return shape
