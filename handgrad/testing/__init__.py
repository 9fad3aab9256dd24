"""Proof that a hand-written backward is right: one line per layer.

Which file answers which question, in the order of a check:

==================  =================================================================================
`check`             how one line checks a layer, and what its arguments mean
`plan`, `strategies`  what is drawn, and how: sizes, parameters, inputs, douts
`sample`            what one drawn example is
`subject`           what a layer is to the checks: its tensors, its copies, its calls
`operations`        what a forward does, operation by operation: the numbers it draws, the tensors it reads
`oracle`            where the right gradients come from
`judge`             when two tensors agree
`rounding`          how much of a difference is only rounding
`registry`          what a property is, and how to add one of your own
`properties/`       the fourteen properties: `values`, `order` of calls, `memory`
`sensitivity`       would the check have noticed a fault
`report`, `hints`   what a check says: its table, a failure's text, a guess at the mistake
`errors`            what a check raises
`optimizer`         the same for an optimizer's step
`compare`, `table`  a layer beside a torch module; all gradients of one training step
`__main__`          the command line
==================  =================================================================================

`gradient_table` and `compare` need torch alone; the rest needs hypothesis (`pip install "handgrad[testing]"`), and is
imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from handgrad.testing import properties  # noqa: F401  # registers the fourteen
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
from handgrad.testing.registry import PROPERTIES, NotApplicable, prop
from handgrad.testing.sample import Sample
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
    """`assert_<name>` of every registered property, and what needs hypothesis."""
    if name.startswith("assert_") and name[len("assert_") :] in PROPERTIES:
        return PROPERTIES[name[len("assert_") :]].public
    if name not in _NEED_HYPOTHESIS:
        raise AttributeError(f"module 'handgrad.testing' has no attribute {name!r}")
    try:
        import_module("hypothesis")
    except ModuleNotFoundError as error:
        raise ImportError(f'handgrad.testing.{name} needs hypothesis: pip install "handgrad[testing]"') from error
    home = _NEED_HYPOTHESIS[name]
    return getattr(import_module(home), name) if home else import_module(f"handgrad.testing.{name}")


__all__ = [
    "PROPERTIES",
    "SYNTAX",
    "CheckError",
    "CheckFailure",
    "ContractError",
    "GradientMismatch",
    "GradientTable",
    "LayerCrash",
    "NotApplicable",
    "OracleError",
    "OutputMismatch",
    "Sample",
    "VacuousCheck",
    "check_layer",
    "check_loss",
    "check_optimizer",
    "compare",
    "gradient_table",
    "prop",
    "strategies",
    *(f"assert_{name}" for name in PROPERTIES),
]
