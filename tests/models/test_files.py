"""The files of a run: whole or not at all, and refused beforehand where they could only fail."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from names.errors import InputError
from names.files import Files, refuse_paths, write_atomically
from tests.models.running import run


def no_room(*_: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(patch: pytest.MonkeyPatch, way: str) -> None:
    """The disk is full: one of the ways to get at it says so."""
    if way == "write":

        class Full(io.FileIO):
            """A file that makes room for two bytes."""

            def write(self, content: Any) -> int:
                super().write(content[:2])
                return int(no_room())

        patch.setattr(Path, "open", lambda self, mode: Full(self, mode.replace("b", "")))
    elif way == "fsync":
        patch.setattr(os, "fsync", no_room)
    else:
        patch.setattr(Path, way, no_room)


@pytest.mark.parametrize("way", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(
    way: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in writing the room ends."""
    path = tmp_path / "c"
    if earlier:
        path.write_text("before")
    fill(monkeypatch, way)
    with pytest.raises(InputError) as error:
        write_atomically(path, b"after")
    monkeypatch.undo()
    kept = "; the earlier one is kept" if earlier else ""
    assert str(error.value) == f"cannot write {path}: No space left on device{kept}"
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == ([("c", "before")] if earlier else [])


def test_a_file_is_replaced_as_a_whole_and_a_link_stays_a_link(tmp_path: Path) -> None:
    """No other file is left."""
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "c", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    write_atomically(link, b"after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert [each.name for each in target.parent.iterdir()] == ["c"]


def test_a_failure_is_kept_until_the_file_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file that fails is no reason not to write another."""
    kept = Files()
    with monkeypatch.context() as patch:
        fill(patch, "fsync")
        kept.write("report", tmp_path / "r", b"1")
    kept.write("plot", tmp_path / "p", b"2", "a remark")
    assert kept.written == {"plot": (tmp_path / "p", "a remark")}
    assert kept.kept() == [f"plot {tmp_path / 'p'}"]
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        kept.raise_failure()
    kept.write("report", tmp_path / "r", b"1")
    kept.raise_failure()
    assert list(kept.written) == ["plot", "report"]


def test_paths_that_could_only_fail_later(tmp_path: Path) -> None:
    """A directory, a device, no directory, too long a name; nothing is left of the attempt, nor is a file changed."""
    (tmp_path / "there").write_text("before")
    for path, problem in [
        (tmp_path, "it is a directory; give the path of a file"),
        (Path("/dev/null"), "it is a device; give the path of a file"),
        (tmp_path / "no" / "x", f"there is no directory {tmp_path / 'no'}"),
        (tmp_path / "there" / "x", f"there is no directory {tmp_path / 'there'}"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        with pytest.raises(InputError) as error:
            refuse_paths([("--plot", path)])
        assert str(error.value) == f"cannot write {path}: {problem}"
    refuse_paths([("--plot", tmp_path / "new"), ("--report", tmp_path / "there"), ("--data", tmp_path)])
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("there", "before")]


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only(tmp_path: Path) -> None:
    """As for a user."""
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="Permission denied"):
        refuse_paths([("--plot", tmp_path / "p")])
    tmp_path.chmod(0o755)


def test_a_directory_that_refuses_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system's reason."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"cannot write .*: Permission denied"):
        refuse_paths([("--plot", tmp_path / "p")])


def test_two_flags_with_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However its path is written; only the checkpoint that was resumed may be saved to."""
    (tmp_path / "link").symlink_to(tmp_path / "z")
    z, same = tmp_path / "z", [tmp_path / "z", tmp_path / "link", tmp_path / ".." / tmp_path.name / "z"]
    outputs = ["--save", "--report", "--plot", "--watch"]
    pairs = [
        (a, b)
        for i, a in enumerate(["--data", "--resume", *outputs])
        for b in outputs
        if b not in outputs[: max(0, i - 1)]
    ]
    for first, second in [pair for pair in pairs if pair != ("--resume", "--save")]:
        for path in same:
            assert run(first, z, second, path, "--steps", 1) == 2
            error = capsys.readouterr().err
            assert (
                error
                == f"names_mlp: error: {first} and {second} are the same file, {path}; give {second} another one\n"
            )
            assert not z.exists()
    refuse_paths([("--resume", z), ("--save", z)])
