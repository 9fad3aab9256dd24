"""What a check can say: the layer is wrong (CheckFailure), or the check itself is (CheckError)."""

from __future__ import annotations

from typing import Any

from handgrad.errors import HandgradError


class CheckFailure(HandgradError, AssertionError):  # noqa: N818  # an assertion that failed, not an accident
    """The layer is wrong. The base of GradientMismatch, OutputMismatch, ContractError and LayerCrash.

    `details` holds what the failing property knew: the tensors got and wanted, the limit, and the like. Under
    `check_layer` the text also carries the example, shrunk, a hint, and how to run it again.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class GradientMismatch(CheckFailure):
    """A gradient is missing, or has a wrong value, shape or dtype."""


class OutputMismatch(CheckFailure):
    """An output of forward, or a buffer after it, is not what it must be."""


class ContractError(CheckFailure):
    """The layer breaks a rule of the contract that is not about values; the text explains the rule."""


class LayerCrash(CheckFailure):
    """Forward or backward raised on an input that the layer is said to take."""


class CheckError(HandgradError, RuntimeError):
    """The check is at fault, and says nothing about the layer. The base of OracleError and VacuousCheck."""


class OracleError(CheckError):
    """The gradient to compare with is itself wrong: finite differences of the forward disagree with it."""


class VacuousCheck(CheckError):  # noqa: N818  # named for what it found
    """The check passed but could not have failed: too few distinct examples, nothing compared, a fault unnoticed."""
