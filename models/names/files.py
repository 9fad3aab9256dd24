"""The files that a run writes: seen to be possible before it, each whole or not at all, and named at its end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from names.errors import InputError


class Files:
    """What a run has written, and what it could not write: one failure costs neither the run nor the other files."""

    def __init__(self) -> None:
        self.written: dict[str, tuple[Path, str]] = {}
        self.failures: dict[str, str] = {}

    def write(self, kind: str, path: Path, content: bytes, remark: str = "") -> None:
        """Write a file of this kind, "report" for example; a remark says what of the run is in it."""
        self.note(kind, path, lambda: write_atomically(path, content), remark)

    def note(self, kind: str, path: Path, write: Callable[[], None], remark: str = "") -> None:
        """Call what writes a file, and note that it did, or how it failed: by an InputError."""
        try:
            write()
        except InputError as error:
            self.failures[kind] = str(error)
            self.written.pop(kind, None)
        else:
            self.written[kind] = path, remark
            self.failures.pop(kind, None)

    def kept(self) -> list[str]:
        """What was written, and where."""
        return [f"{kind} {path}" for kind, (path, _) in self.written.items()]

    def raise_failure(self) -> None:
        """Raise InputError where a file could not be written."""
        for failure in self.failures.values():
            raise InputError(failure)


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a new file, and give it the name `path` once it is on the disk: so `path` never holds half of it."""
    path = path.resolve()  # a link stays a link
    draft = draft_of(path)
    try:
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        kept = "; the earlier one is kept" if path.exists() else ""
        raise InputError(f"cannot write {path}: {error.strerror or error}{kept}") from None


def refuse_paths(paths: Sequence[tuple[str, Path]]) -> None:
    """Raise InputError, before any work, for files that could only fail later, or would replace each other.

    Each path comes with its flag. `--data` and `--resume` are read, the others written; `--save` may replace what was
    resumed.
    """
    seen: dict[Path, str] = {}
    for flag, path in paths:
        other = seen.setdefault(path.resolve(), flag)
        if other != flag and (other, flag) != ("--resume", "--save"):
            raise InputError(f"{other} and {flag} are the same file, {path}; give {flag} another one")
    for flag, path in paths:
        if flag not in ("--data", "--resume"):
            try_to_write(path)


def try_to_write(path: Path) -> None:
    """Raise InputError where no file of that name can be written: no permission, for example, or too long a name."""
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {path.parent}")
    draft, problem = draft_of(path.resolve()), None
    try:
        if path.is_dir():
            problem = "it is a directory; give the path of a file"
        elif path.exists() and not path.is_file():
            problem = "it is a device; give the path of a file"
        else:
            new = not draft.exists()
            draft.open("ab").close()
            if new:
                draft.unlink()
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise InputError(f"cannot write {path}: {problem}")


def draft_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f".{path.name}.part")
