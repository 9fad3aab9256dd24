"""Every error that handgrad raises, each also the builtin that a caller would expect to catch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from handgrad.layer import Layer


class HandgradError(Exception):
    """The base of every error of handgrad: `except HandgradError` catches them all.

    The message says what must hold, what came, and what to do. A container that the error passes through on its way
    out adds its own step to `path`, so that the text ends up naming the place, as in
    ``in 3 (BatchNorm1d(64)): BatchNorm1d(64).forward: ...``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.path: list[str] = []
        self.place = ""

    def __str__(self) -> str:
        return f"in {'.'.join(self.path)} ({self.place}): {self.message}" if self.path else self.message


class ArgumentError(HandgradError, ValueError):
    """A constructor or a call was given a value that cannot work (a size below 1, an unknown reduction, ...)."""


class ShapeError(HandgradError, ValueError):
    """A tensor does not have the shape that the layer needs."""


class DtypeError(HandgradError, TypeError):
    """A tensor does not have the dtype that the layer needs, or is no tensor at all."""


class IndexRangeError(HandgradError, IndexError):
    """An index or class label lies outside the table it points into."""


class StateError(HandgradError, RuntimeError):
    """Calls came in an order that cannot be right: a backward without its forward, a recorded tensor overwritten."""


class StateDictError(HandgradError, RuntimeError):
    """A state_dict does not fit the model: keys are missing or unexpected, or shapes differ."""


class CompileError(HandgradError, RuntimeError):
    """A graph cannot be compiled here: there is no C++ compiler."""


def locate(error: Exception, step: str, layer: Layer) -> None:
    """Add `step`, the name under which a container knows `layer`, to the place that `error` reports.

    An error of handgrad carries the place in its text. Any other error keeps its type and text and gets the place as
    a note (Python 3.11 and newer print it below the message).
    """
    if isinstance(error, HandgradError):
        error.path.insert(0, step)
        error.place = error.place or repr(layer)
    elif hasattr(error, "add_note"):
        error.add_note(f"in {step} ({layer!r})")
