"""What a check can say: the layer is wrong (CheckFailure), or the check itself is (CheckError)."""

from __future__ import annotations

import traceback
from types import FrameType
from typing import Any

from handgrad.errors import HandgradError

MACHINERY = ("handgrad.testing", "hypothesis", "IPython", "ipykernel")  # whose lines say nothing about a mistake


class _ReadableError(HandgradError):
    """An error of which a notebook shows the reader's own lines and the text, without the machinery between them."""

    def _render_traceback_(self) -> list[str]:
        """The lines that IPython prints instead of its own traceback."""
        return _readable(self)


def _readable(error: BaseException) -> list[str]:
    lines = []
    if error.__cause__ is not None:
        lines = [*_readable(error.__cause__), "", "That was the cause of:", ""]
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _is_machinery(frame)]
    text = "".join([*traceback.StackSummary.extract(iter(frames)).format(), *traceback.format_exception_only(error)])
    return lines + text.rstrip().split("\n")


def _is_machinery(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return any(module == name or module.startswith(f"{name}.") for name in MACHINERY)


class CheckFailure(_ReadableError, AssertionError):  # noqa: N818  # an assertion that failed, not an accident
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


class CheckError(_ReadableError, RuntimeError):
    """The check is at fault, and says nothing about the layer. The base of OracleError and VacuousCheck."""


class OracleError(CheckError):
    """The gradient to compare with is itself wrong: finite differences of the forward disagree with it."""


class VacuousCheck(CheckError):  # noqa: N818  # named for what it found
    """The check passed but could not have failed: too few distinct examples, nothing compared, a fault unnoticed."""
