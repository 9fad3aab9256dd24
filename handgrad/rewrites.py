"""What is changed in the graph of a step before it is compiled: indices are checked, and biases added apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = frozenset(
    (aten.view.default, aten.unsqueeze.default, aten.squeeze.dims, aten.expand.default, aten.permute.default)
)
BY_DIMENSION = frozenset(  # (x, dimension, index, ...)
    (aten.gather.default, aten.index_select.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
)
BY_POSITION = frozenset((aten.index.Tensor, aten.index_put.default))  # (x, [index or None of each dimension], ...)


def check_indices(module: fx.GraphModule) -> bool:
    """Clamp each index that is computed of integer inputs to its range; add to the results whether one was outside.

    Returns whether there is such an index. A kernel compiled without this asserts the range as it goes, which ends the
    whole process where a thread other than the first finds it. A negative index counts from the end where torch says
    so: in `x[index]`.
    """
    graph, given, found = module.graph, set[Any](), _Found(module.graph)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype is torch.bool:
            pass
        elif (node.op == "placeholder" and value.dim() > 0) or given.intersection(node.all_input_nodes):
            given.add(node)
        if node.op != "call_function":
            continue
        args = list(node.args)
        if node.target is aten.embedding.default and args[1] in given:
            args[1] = found.clamped(args[1], args[0].meta["val"].shape[0], node)
        elif node.target in BY_DIMENSION and args[2] in given:
            args[2] = found.clamped(args[2], args[0].meta["val"].shape[args[1]], node)
        elif node.target in BY_POSITION:
            pairs = zip(args[1], args[0].meta["val"].shape)
            args[1] = [found.clamped(i, size, node, wraps=True) if i in given else i for i, size in pairs]
        node.args = tuple(args)
    if found.outside is None:
        return False
    output = next(reversed(graph.nodes))
    output.args = ((*output.args[0], found.outside),)
    graph.lint()
    module.recompile()
    return True


def add_bias_apart(module: fx.GraphModule) -> None:
    """Make each ``bias + a @ b`` a product and a sum, which the compiler computes in the kernel that reads it.

    The operation for both copies the bias first, which for small matrices takes half as long as the product. The sum is
    written as the difference to -bias, or the compiler would make the one operation of it again.
    """
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        if node.kwargs:  # with factors
            continue
        bias, a, b = node.args
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, (a, b))
            total = graph.call_function(aten.sub.Tensor, (product, graph.call_function(aten.neg.default, (bias,))))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    module.recompile()


class _Found:
    """The indices that were clamped, and whether any was out of range: a node."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.outside: fx.Node | None = None
        self.done: dict[tuple[Any, int, bool], Any] = {}

    def clamped(self, index: Any, size: int, user: fx.Node, wraps: bool = False) -> Any:
        """The index within 0..size-1, for this user; what several users see through views is looked at once."""
        views = []
        while index.target in VIEWS:
            views.append(index)
            index = index.args[0]
        key = index, size, wraps
        call = self.graph.call_function
        with self.graph.inserting_before(user):
            if key not in self.done:
                if wraps:
                    from_end = call(aten.lt.Scalar, (index, 0)), call(aten.add.Tensor, (index, size))
                    index = call(aten.where.self, (*from_end, index))
                self.done[key] = call(aten.clamp.default, (index, 0, size - 1))
                outside = call(aten.any.default, (call(aten.ne.Tensor, (index, self.done[key])),))
                earlier = self.outside
                self.outside = outside if earlier is None else call(aten.logical_or.default, (earlier, outside))
            result = self.done[key]
            for view in reversed(views):
                result = call(view.target, (result, *view.args[1:]), view.kwargs)
        return result
