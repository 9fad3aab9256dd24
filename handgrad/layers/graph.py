"""The general composition: named nodes, each a layer with the names of what it reads; and joins of several inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from handgrad.arguments import integer
from handgrad.errors import ArgumentError, ShapeError
from handgrad.layer import Layer, spec_of, with_zeros
from handgrad.layers.containers import check_same_form, plus, times_the_others, total


class Add(Layer):
    """The sum of several inputs.

    Forward:   out = x_0 + x_1 + ...
    Shapes:    all inputs the same, which is out's: nothing is broadcast
    Backward:  d out / d x_i = 1, hence dx_i = dout, for each i. It is dout itself, not copied.
    Recorded:  the number of inputs
    Raises:    ShapeError, DtypeError where the inputs differ; StateError.

    >>> layer = Add()
    >>> layer(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]))
    tensor([11., 22.])
    >>> layer.backward(torch.tensor([3.0, 4.0]))
    (tensor([3., 4.]), tensor([3., 4.]))
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        check_same_form(self, {f"x[{i}]": x for i, x in enumerate(inputs)})
        out: Tensor = total(inputs)
        self.push(len(inputs), out=out)
        return out

    def backward(self, dout: Tensor) -> Any:
        (count,) = self.pop(dout)
        # out = x_0 + x_1 + ...
        return per_input([dout] * count)


class Multiply(Layer):
    """The elementwise product of several inputs.

    Forward:   out = x_0 * x_1 * ...
    Shapes:    all inputs the same, which is out's: nothing is broadcast
    Backward:  d out / d x_i is the product of the others, hence dx_i = dout prod_{j != i} x_j, without a division, so
               that zeros among the inputs are right
    Recorded:  every x_i
    Raises:    ShapeError, DtypeError where the inputs differ; StateError.

    >>> layer = Multiply()
    >>> layer(torch.tensor([3.0, 0.0]), torch.tensor([5.0, 7.0]))
    tensor([15.,  0.])
    >>> layer.backward(torch.tensor([1.0, 1.0]))
    (tensor([5., 7.]), tensor([3., 0.]))
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        check_same_form(self, {f"x[{i}]": x for i, x in enumerate(inputs)})
        out = inputs[0]
        for x in inputs[1:]:
            out = out * x
        self.push(*inputs, out=out)
        return out

    def backward(self, dout: Tensor) -> Any:
        xs = self.pop(dout)
        # out = x_0 * x_1 * ...
        return per_input(times_the_others(dout, xs))


class Cat(Layer):
    """Several inputs, joined along a dimension.

    Forward:   out = cat([x_0, x_1, ...], dim)
    Shapes:    the inputs agree in all dimensions but `dim`, where out has the sum of their sizes
    Backward:  each element of an input appears once in out, so dx_i is the piece of dout at its place, a view
    Recorded:  the sizes of the inputs along dim
    Raises:    ShapeError, DtypeError where the inputs cannot be joined; StateError.

    >>> layer = Cat(-1)
    >>> layer(torch.tensor([[1.0]]), torch.tensor([[2.0, 3.0]]))
    tensor([[1., 2., 3.]])
    >>> layer.backward(torch.tensor([[10.0, 20.0, 30.0]]))
    (tensor([[10.]]), tensor([[20., 30.]]))
    """

    shown = ("dim",)

    def __init__(self, dim: int) -> None:
        self.dim = integer(self, "dim", dim, None)

    def forward(self, *inputs: Tensor) -> Tensor:
        check_same_form(self, {f"x[{i}]": x for i, x in enumerate(inputs)}, but=self.dim)
        out = torch.cat(inputs, self.dim)
        self.push([x.shape[self.dim] for x in inputs], out=out)
        return out

    def backward(self, dout: Tensor) -> Any:
        (sizes,) = self.pop(dout)
        # out = cat([x_0, x_1, ...], dim)
        return per_input(torch.split(dout, sizes, self.dim))


def per_input(dxs: Sequence[Any]) -> Any:
    """One dx per input: a tuple for several."""
    return tuple(dxs) if len(dxs) > 1 else dxs[0]


class Source(NamedTuple):
    """One thing that a node reads, or the graph returns: a value, whole or one part of a tuple."""

    slot: int  # of the value: the inputs first, then the nodes
    part: int | None


class Step(NamedTuple):
    """One node, as forward and backward go through them."""

    name: str
    layer: Layer
    sources: tuple[Source, ...]
    whole: int | None  # the slot of the only thing it reads, where that is a whole value
    done: tuple[int, ...]  # the values that nobody reads after it: forward need not keep them
    feeds_nodes: bool  # whether a node that it reads wants its gradient; else only inputs do


class Graph(Layer):
    """Layers at named nodes, each reading inputs and earlier nodes by their names.

    Forward:   node by node, as written: value[node] = layer(value[name] for each name that the node reads)
    Shapes:    those of the layers; several inputs and outputs where several are named
    Backward:  node by node, last first: dvalue[node] is complete when all nodes that read it have had their backward.
               (dvalue of what it reads) = layer.backward(dvalue[node]): the chain rule; a value that is read several
               times gets the sum; one that nobody read counts with zeros.
    Recorded:  the forms of the inputs and of the values whose parts are read; the layers record
    Raises:    ArgumentError for a name that is unknown, written later, used twice or read by nobody; ShapeError where a
               layer gives another number of outputs than is read; what the layers raise, with the node: "in h (...)".
    Source:    nngraph for Torch7 (github.com/torch/nngraph) for the idea of named nodes.

    `inputs` and `outputs` are names with spaces between; every further argument is a node: ``name=(layer, "names")``.
    "enc.1" reads a part of a tuple; parts that nobody reads are no error. A layer object may stand at several nodes.
    Node names are the names in `state_dict()`.

    >>> from handgrad import Embedding, Linear, Sequential, SiLU
    >>> graph = Graph("x t", "out",
    ...     h=(Linear(2, 64), "x"),
    ...     e=(Embedding(10, 64), "t"),
    ...     s=(Add(), "h e"),
    ...     out=(Sequential(SiLU(), Linear(64, 2)), "s"),
    ... )
    >>> graph
    Graph(x, t -> out
      h = Linear(2 -> 64)(x)
      e = Embedding(10 -> 64)(t)
      s = Add()(h, e)
      out = Sequential(
        (0): SiLU()
        (1): Linear(64 -> 2)
      )(s)
    )
    >>> graph(torch.randn(5, 2), torch.randint(10, (5,))).shape
    torch.Size([5, 2])
    >>> dx, dt = graph.backward(torch.randn(5, 2))
    >>> dx.shape, dt
    (torch.Size([5, 2]), None)
    """

    takes_apart = False
    hands_on = True

    def __init__(self, inputs: str, outputs: str, /, **nodes: tuple[Layer, str]) -> None:
        if not isinstance(inputs, str) or not isinstance(outputs, str) or not inputs.strip() or not outputs.strip():
            problem = f"inputs and outputs must be names with spaces between, got {inputs!r} and {outputs!r}"
            raise ArgumentError(f"Graph: {problem}")
        self.inputs, self.outputs = tuple(inputs.split()), tuple(outputs.split())
        for name in (*self.inputs, *nodes):
            if not name.isidentifier():
                raise ArgumentError(
                    f"Graph: a name must be an identifier, names stand apart by spaces alone, got {name!r}"
                )
        self.nodes = {name: self._node(name, node) for name, node in nodes.items()}
        names = [*self.inputs, *self.nodes]
        for name in names:
            if names.count(name) > 1:
                raise ArgumentError(f"Graph: the name {name!r} is used twice, for inputs or nodes; each needs its own")
        self._slots = {name: slot for slot, name in enumerate(names)}
        self._returned = tuple(self._source("the result", text, len(names)) for text in self.outputs)
        self._steps = self._plan()
        self._refuse_unused(names)

    def _plan(self) -> list[Step]:
        last = {source.slot: len(self.nodes) for source in self._returned}  # the step that reads a value last
        read: list[tuple[Source, ...]] = []
        for i, (name, (_, reads)) in reversed(list(enumerate(self.nodes.items()))):
            read.insert(0, tuple(self._source(f"node {name!r}", text, self._slots[name]) for text in reads.split()))
            for source in read[0]:
                last.setdefault(source.slot, i)
        layers = [None] * len(self.inputs) + [layer for layer, _ in self.nodes.values()]
        return [
            Step(
                name,
                layer,
                sources,
                sources[0].slot if len(sources) == 1 and sources[0].part is None else None,
                tuple(slot for slot, step in last.items() if step == i),
                any((behind := layers[slot]) is not None and not behind.stops_dout for slot, _ in sources),
            )
            for i, ((name, (layer, _)), sources) in enumerate(zip(self.nodes.items(), read))
        ]

    def _node(self, name: str, node: Any) -> tuple[Layer, str]:
        fits = isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], Layer) and isinstance(node[1], str)
        if not fits:
            raise ArgumentError(f'Graph: node {name!r} must be (layer, "names of what it reads"), got {node!r}')
        if not node[1].split():
            raise ArgumentError(f"Graph: node {name!r} reads nothing; name an input or an earlier node")
        layer, reads = node
        return layer, reads

    def _source(self, who: str, text: str, before: int) -> Source:
        """What a name, or a name with a part, stands for; only what comes before a slot can be read."""
        name, _, part = text.partition(".")
        if name not in self._slots:
            known = ", ".join(self._slots)
            raise ArgumentError(f"Graph: {who} reads {name!r}, which is neither an input nor a node; there are {known}")
        if self._slots[name] >= before:
            raise ArgumentError(f"Graph: {who} reads {name!r}, which is not there yet; write {name!r} before it")
        if part and not part.isdigit():
            raise ArgumentError(f"Graph: {who} reads {text!r}; a part is a number, as in '{name}.0'")
        return Source(self._slots[name], int(part) if part else None)

    def _refuse_unused(self, names: list[str]) -> None:
        used = {source.slot for source in self._returned}
        for step in reversed(self._steps):
            if self._slots[step.name] in used:
                used |= {source.slot for source in step.sources}
        for name in names:
            if self._slots[name] not in used:
                kind = "input" if name in self.inputs else "node"
                raise ArgumentError(f"Graph: nothing that leads to the result reads the {kind} {name!r}; leave it out")

    def forward(self, *inputs: Any) -> Any:
        if len(self.inputs) > 1 and len(inputs) == 1 and isinstance(inputs[0], tuple):
            inputs = inputs[0]
        if len(inputs) != len(self.inputs):
            wanted = f"{len(self.inputs)} inputs, {', '.join(self.inputs)}, one by one or as a tuple"
            came = f"a {type(inputs[0]).__name__}" if len(inputs) == 1 else f"{len(inputs)}"
            raise self.error(ShapeError, "forward", f"takes {wanted}, got {came}")
        values: list[Any] = [*inputs, *[None] * len(self._steps)]
        counts: dict[int, int] = {}  # of the parts of values that are read by part
        for slot, step in enumerate(self._steps, start=len(inputs)):
            x = values[step.whole] if step.whole is not None else self._read(step.name, values, step.sources, counts)
            values[slot] = step.layer.forward_at(step.name, x)
            for read in step.done:
                values[read] = None
        out = self._read("the result", values, self._returned, counts)
        self.push(counts, [spec_of(x) for x in inputs], out=out)
        return out

    def backward(self, dout: Any, need_dx: bool = True) -> Any:
        counts, specs = self.pop(dout)
        douts: list[Any] = [None] * len(self._slots)
        _send(douts, self._returned, dout, counts)
        slot = len(douts)
        for step in reversed(self._steps):
            slot -= 1
            wanted = need_dx or step.feeds_nodes
            dx = step.layer.backward_at(step.name, douts[slot], wanted)
            douts[slot] = None
            if (only := step.whole) is not None:
                douts[only] = dx if douts[only] is None else plus(douts[only], dx)
            elif wanted:
                _send(douts, step.sources, dx, counts)
        if not need_dx:
            return None
        return per_input([with_zeros(dx, spec) for dx, spec in zip(douts, specs)])

    def _read(self, who: str, values: list[Any], sources: tuple[Source, ...], counts: dict[int, int]) -> Any:
        """What a node reads: one value, or a tuple of several."""
        found = []
        for slot, part in sources:
            value = values[slot]
            if part is not None:
                if not isinstance(value, tuple) or part >= len(value):
                    name = next(name for name, s in self._slots.items() if s == slot)
                    came = f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
                    raise self.error(ShapeError, "forward", f"{who} reads {name}.{part}, but {name} is {came}")
                counts[slot] = len(value)
                value = value[part]
            found.append(value)
        return found[0] if len(found) == 1 else tuple(found)

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        return ((name, layer) for name, (layer, _) in self.nodes.items())

    def __getitem__(self, name: str) -> Layer:
        if name not in self.nodes:
            raise ArgumentError(f"Graph: there is no node {name!r}; there are {', '.join(self.nodes)}")
        return self.nodes[name][0]

    def _head(self) -> str:
        return f"Graph({', '.join(self.inputs)} -> {', '.join(self.outputs)})"

    def __repr__(self) -> str:
        rows = [
            f"  {name} = " + repr(layer).replace("\n", "\n  ") + f"({', '.join(reads.split())})"
            for name, (layer, reads) in self.nodes.items()
        ]
        return "\n".join([self._head()[:-1], *rows, ")"])


def _send(douts: list[Any], sources: tuple[Source, ...], dx: Any, counts: dict[int, int]) -> None:
    """Add the gradients of what a node read to those that are there."""
    dxs = (dx,) if len(sources) == 1 else (None,) * len(sources) if dx is None else dx
    for (slot, part), d in zip(sources, dxs):
        if part is not None:
            d = tuple([d if i == part else None for i in range(counts[slot])])
        douts[slot] = plus(douts[slot], d)
