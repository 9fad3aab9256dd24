"""Rewrites of a graph: indices clamped, and a graph that says whether one was outside; biases apart; tanh by exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handgrad.rewrites import add_bias_apart, check_indices, tanh_by_exp
from tests.versions import COMPILES

X = torch.arange(12.0).view(4, 3)
USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[int], list[list[int]]]] = {
    "embedding": (lambda x, i: nn.functional.embedding(i, x), [0, 3, 3], [[0, 4, 1], [0, -1, 1]]),
    "gather": (lambda x, i: x.gather(1, i.view(-1, 1)), [0, 2, 1, 1], [[0, 3, 1, 1], [0, -1, 1, 1]]),
    "index_select": (lambda x, i: x.index_select(0, i), [3, 0], [[4, 0], [-1, 0]]),
    "scatter_add": (
        lambda x, i: x.scatter_add(1, i.unsqueeze(1), torch.ones(4, 1)),
        [0, 2, 2, 1],
        [[0, 3, 2, 1], [0, -1, 2, 1]],
    ),
    "from the end": (lambda x, i: x[i], [-4, 3, 0], [[-5, 3, 0], [4, 3, 0]]),
    "in two dimensions": (lambda x, i: x[i, i], [-3, 2, 0], [[3, 2, 0], [-4, 2, 0]]),
    "index_put": (lambda x, i: x.index_put((i,), torch.ones(3)), [-1, 0], [[4, 0], [-5, 0]]),
    "computed": (lambda x, i: nn.functional.embedding(2 * i - 1, x), [1, 2], [[0, 1], [3, 1]]),
}


def graph_of(function: Callable[..., Tensor], *inputs: Tensor) -> torch.fx.GraphModule:
    class Module(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    return torch.export.export(Module(), inputs, strict=False).run_decompositions().graph_module


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use", USES)
def test_each_use_of_an_index_is_checked(use: str) -> None:
    function, good, bad = USES[use]
    graph = graph_of(function, X, torch.tensor(good))
    outside = check_indices(graph)
    assert outside is not None
    assert not outside(X, torch.tensor(good))
    assert torch.equal(graph(X, torch.tensor(good))[0], function(X, torch.tensor(good)))
    for index in bad:
        assert outside(X, torch.tensor(index))
        graph(X, torch.tensor(index))  # takes the nearest that is in range


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_looks_at_the_indices_computes_nothing_else() -> None:
    graph = graph_of(lambda x, i: x[i].exp().sum(), X, torch.tensor([0, 1]))
    outside = check_indices(graph)
    assert outside is not None
    assert not outside.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.any.default)
    assert outside(None, torch.tensor([0, 4]))


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_several_read_through_views_is_looked_at_once() -> None:
    def function(x: Tensor, i: Tensor) -> Any:
        return x.gather(1, i.unsqueeze(1)) + x.scatter_add(1, i.unsqueeze(1), torch.ones(4, 1))

    graph = graph_of(function, X, torch.tensor([0, 1, 2, 0]))
    assert check_indices(graph)
    assert sum(node.target is torch.ops.aten.clamp.default for node in graph.graph.nodes) == 1


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_indices_that_come_of_values_are_left_alone() -> None:
    assert check_indices(graph_of(lambda x: x.gather(1, x.argmax(1, keepdim=True)), X)) is None


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_bias_is_added_apart() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(5)
    graph = graph_of(lambda x, w, b: nn.functional.linear(x, w, b), X, weight, bias)
    add_bias_apart(graph)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)
    torch.testing.assert_close(graph(X, weight, bias)[0], nn.functional.linear(X, weight, bias))


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("limit", [10.0, 1.0, 1e-3, 1e-20])
def test_tanh_by_exp_is_off_by_little_more_than_a_unit_in_the_last_place(limit: float) -> None:
    x = torch.linspace(-limit, limit, 200_001)
    graph = graph_of(torch.tanh, x)
    tanh_by_exp(graph)
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    (y,), right = graph(x), torch.tanh(x.double())
    unit = torch.finfo(x.dtype).eps * 2 ** right.abs().clamp(min=torch.finfo(x.dtype).tiny).log2().floor()
    assert ((y.double() - right).abs() / unit).max() < 1.4


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tanh_by_exp_at_the_ends() -> None:
    x = torch.tensor([-torch.inf, -100.0, -0.625, 0.0, 0.625, 100.0, torch.inf, torch.nan])
    graph = graph_of(torch.tanh, x)
    tanh_by_exp(graph)
    torch.testing.assert_close(graph(x)[0], torch.tanh(x), rtol=2e-7, atol=0, equal_nan=True)


@COMPILES
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tanh_in_float64_is_left_alone() -> None:
    graph = graph_of(torch.tanh, X.double())
    tanh_by_exp(graph)
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
