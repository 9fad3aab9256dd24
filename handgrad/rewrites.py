"""What is changed in the graph of a step before it is compiled.

Indices are checked; and it is made faster: biases added apart, large products left to oneDNN, tanh computed by exp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from handgrad.products import LARGE, onednn_is_faster, product

aten = torch.ops.aten
VIEWS = frozenset(
    (aten.view.default, aten.unsqueeze.default, aten.squeeze.dims, aten.expand.default, aten.permute.default)
)
BY_DIMENSION = frozenset(  # (x, dimension, index, ...)
    (aten.gather.default, aten.index_select.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
)
BY_POSITION = frozenset((aten.index.Tensor, aten.index_put.default))  # (x, [index or None of each dimension], ...)


def check_indices(module: fx.GraphModule) -> fx.GraphModule | None:
    """Clamp each index that is computed of integer inputs to its range; give a graph that says whether one is outside.

    That graph has the same inputs; None where there is no such index. A kernel compiled without this asserts the range
    as it goes, which ends the whole process where a thread other than the first finds it. A negative index counts from
    the end where torch says so: in `x[index]`.
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
    check = None if found.outside is None else _computing(module, found.outside)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return check


def _computing(module: fx.GraphModule, result: fx.Node) -> fx.GraphModule:
    """A graph of the same inputs that computes this one node."""
    copied, copies, needed = fx.Graph(), dict[fx.Node, fx.Node](), {result}
    for node in reversed(module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = copied.node_copy(node, copies.__getitem__)
    copied.output(copies[result])
    return fx.GraphModule(module, copied)


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
            plain = graph.call_function(aten.mm.default, (a, b))
            total = graph.call_function(aten.sub.Tensor, (plain, graph.call_function(aten.neg.default, (bias,))))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    module.recompile()


def products_by_onednn(module: fx.GraphModule) -> None:
    """Leave large products of float32 matrices on a CPU to oneDNN, where it is the faster library."""
    for node in module.graph.find_nodes(op="call_function", target=aten.mm.default):
        a, b = (arg.meta["val"] for arg in node.args)
        size = a.shape[0] * a.shape[1] * b.shape[-1]
        if size >= LARGE and a.dtype is torch.float32 and a.device.type == "cpu" and onednn_is_faster():
            node.target = product()
    module.recompile()


def tanh_by_exp(module: fx.GraphModule) -> None:
    """Compute tanh in float32 on a CPU by `_tanh`, which takes half as long as the compiler's own call of Sleef."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.tanh.default):
        x, value = node.args[0], node.meta["val"]
        if value.dtype is torch.float32 and value.device.type == "cpu":
            formula = make_fx(_tanh)(torch.zeros(1)).graph
            inputs = list(formula.find_nodes(op="placeholder"))
            with graph.inserting_before(node):
                result: Any = graph.graph_copy(formula, {inputs[0]: x})
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    module.recompile()


def _tanh(x: Tensor) -> Tensor:
    """Tanh as x + x z P(z) with z = x^2 where abs(x) < 0.625, else 1 - 2 / (exp(2 x) + 1) with the sign of x.

    Off by at most 1.4 units in the last place. P is that of tanhf in Cephes (Moshier, netlib.org/cephes).
    """
    z = x * x
    small = x + x * z * _horner(
        z, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    )
    large = torch.copysign(1 - 2 / (torch.exp(2 * x.abs()) + 1), x)
    return torch.where(x.abs() < 0.625, small, large)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


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
