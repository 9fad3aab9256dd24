"""The error for what a user can put right, and the import of packages that may be missing."""

from __future__ import annotations

import importlib
import reprlib
from types import ModuleType


class InputError(Exception):
    """Something the user gave cannot be used: reported in one line, exit code 2."""


def require(module: str) -> ModuleType:
    """Import a module that comes with the extra `models`, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {error.name or module}: pip install 'handgrad[models]'") from None


def shorten(text: str) -> str:
    """A text in quotes, its middle left out where it is long."""
    short = reprlib.Repr()
    short.maxstring = 70
    return short.repr(text)
