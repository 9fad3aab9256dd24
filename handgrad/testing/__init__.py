"""Proof that a hand-written backward is right: one line a layer.

`gradient_table` and `compare` need torch alone; the rest needs hypothesis (`pip install "handgrad[testing]"`), and is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from handgrad.testing.compare import compare
from handgrad.testing.errors import (
    CheckError,
    CheckFailure,
    ContractError,
    GradientMismatch,
    LayerCrash,
    OracleError,
    OutputMismatch,
    VacuousCheck,
)
from handgrad.testing.plan import SYNTAX
from handgrad.testing.properties import (
    assert_accumulation,
    assert_aliasing,
    assert_dtypes,
    assert_edges,
    assert_gradients,
    assert_layouts,
    assert_linearity,
    assert_modes,
    assert_ownership,
    assert_plumbing,
    assert_reuse,
    assert_rng,
    assert_special,
    assert_state,
)
from handgrad.testing.table import GradientTable, gradient_table

if TYPE_CHECKING:
    from handgrad.testing import strategies
    from handgrad.testing.check import check_layer, check_loss
    from handgrad.testing.optimizer import check_optimizer

_NEED_HYPOTHESIS = {
    "check_layer": "handgrad.testing.check",
    "check_loss": "handgrad.testing.check",
    "check_optimizer": "handgrad.testing.optimizer",
    "strategies": "",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_HYPOTHESIS:
        raise AttributeError(f"module 'handgrad.testing' has no attribute {name!r}")
    try:
        import_module("hypothesis")
    except ModuleNotFoundError as error:
        raise ImportError(f'handgrad.testing.{name} needs hypothesis: pip install "handgrad[testing]"') from error
    home = _NEED_HYPOTHESIS[name]
    return getattr(import_module(home), name) if home else import_module(f"handgrad.testing.{name}")


__all__ = [
    "SYNTAX",
    "CheckError",
    "CheckFailure",
    "ContractError",
    "GradientMismatch",
    "GradientTable",
    "LayerCrash",
    "OracleError",
    "OutputMismatch",
    "VacuousCheck",
    "assert_accumulation",
    "assert_aliasing",
    "assert_dtypes",
    "assert_edges",
    "assert_gradients",
    "assert_layouts",
    "assert_linearity",
    "assert_modes",
    "assert_ownership",
    "assert_plumbing",
    "assert_reuse",
    "assert_rng",
    "assert_special",
    "assert_state",
    "check_layer",
    "check_loss",
    "check_optimizer",
    "compare",
    "gradient_table",
    "strategies",
]
