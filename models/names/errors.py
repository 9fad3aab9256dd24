"""The error for what a user can put right, and the import of packages that may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType


class InputError(Exception):
    """Something the user gave cannot be used: reported in one line, exit code 2."""


def require(module: str) -> ModuleType:
    """Import a module that comes with the extra `models`, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"this needs {error.name}: pip install 'handgrad[models]'") from None
