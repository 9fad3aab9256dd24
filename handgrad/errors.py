"""Every error that handgrad raises, each also the builtin that a caller would expect to catch."""

from __future__ import annotations


class HandgradError(Exception):
    """The base of every error of handgrad: `except HandgradError` catches them all.

    The message says what must hold, what came, and what to do. On its way out of nested layers the error collects the
    name of each in `path`, so that the text names the place: ``in 3 (BatchNorm1d(64)): BatchNorm1d(64).forward: ...``.
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
    """A graph cannot be compiled here: there is no C++ compiler, or torch is too old."""


class ProcessError(HandgradError, RuntimeError):
    """Another process that trains the same model failed, has ended, or did not come in time."""


class NonFiniteError(HandgradError, ArithmeticError):
    """A value is NaN or infinite, or beyond a limit, where `tripwire` looks."""

    def __str__(self) -> str:
        return self.message  # which names the place by itself
