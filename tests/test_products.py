"""Large products in a program, left to oneDNN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from handgrad import SGD, CrossEntropy, Linear, Sequential, Tanh, TrainStep, products
from handgrad.rewrites import products_by_onednn
from tests.exported import run_exported
from tests.test_rewrites import graph_of
from tests.versions import COMPILES

ONEDNN = torch.backends.mkldnn.is_available()


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handgrad.rewrites.onednn_is_faster", lambda: True)


def rewritten(*inputs: Tensor) -> torch.fx.GraphModule:
    """The product of two matrices, or of one with itself."""
    module = graph_of(lambda *given: given[0] @ given[-1], *inputs)
    products_by_onednn(module)
    return module


def targets(module: torch.fx.GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


@COMPILES
@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("size", "dtype", "found"),
    [
        (128, torch.float32, "handgrad.product.default"),
        (64, torch.float32, "aten.mm.default"),
        (128, torch.float64, "aten.mm.default"),
    ],
)
def test_large_float32_products_alone(size: int, dtype: torch.dtype, found: str) -> None:
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    module = rewritten(a, b)
    assert targets(module) == {found}
    torch.testing.assert_close(module(a, b)[0], a @ b)


@COMPILES
@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_matrix_times_itself() -> None:
    assert targets(rewritten(torch.randn(128, 128))) == {"handgrad.product.default"}


def test_the_faster_library_is_found_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(own: float, onednn: float) -> bool:
        times = iter([own, onednn])
        monkeypatch.setattr(products, "_seconds", lambda _: next(times))
        return products.onednn_is_faster.__wrapped__()

    assert decide(2.0, 1.0) is ONEDNN
    assert not decide(2.0, 1.9)


@COMPILES
@pytest.mark.slow
@pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")
def test_an_exported_step_with_large_products_is_the_eager_one_up_to_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sequential(Linear(128, 256), Tanh(), Linear(256, 128), Tanh(), Linear(128, 10))
    step = TrainStep(model, CrossEntropy(), SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(5, 128, 128), torch.randint(10, (5, 128))
    compiled = copy.deepcopy(step).compile()
    compiled(x[0], y[0])
    program = next(iter(compiled._made[0][1].values()))
    assert program.traced.graph.code.count("handgrad.product") == 5  # the inner layers' products, forward and backward

    step.export(tmp_path / "wide.pt2", x[0], y[0])
    found = run_exported(tmp_path / "wide.pt2", [{"x": x, "target": y}])
    torch.testing.assert_close(found["calls"][0]["losses"], step.many(x, y))
    for name, p in model.named_parameters():
        torch.testing.assert_close(found["state"][name], p, msg=name)
