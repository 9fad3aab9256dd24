"""What a terminal may do to a script: lack letters, be read no further, send Ctrl-C; nothing of it is a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.running import ENVIRONMENT, MODELS

PREPARED = "from names.terminal import prepare; prepare(); "
POSIX_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(*command: object, **environment: str) -> subprocess.Popen[bytes]:
    """Python on a command, with both outputs as pipes."""
    paths = {"PYTHONPATH": os.pathsep.join([str(MODELS.parent), str(MODELS)])}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**ENVIRONMENT, **paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_run_that_nobody_reads_in_letters_that_the_terminal_lacks(tmp_path: Path) -> None:
    """Both at once: after `| head -1` a run of Cyrillic names on a Windows terminal still writes its report."""
    data, report = tmp_path / "Имена.txt", tmp_path / "r.json"
    data.write_text("Илья\nЮлия\nИлья Ильич\nЖюли\n", "utf-8")
    arguments = ["--data", data, "--steps", 30, "--samples", 3, "--report", report]
    with start(MODELS / "names_mlp.py", *arguments, PYTHONIOENCODING="cp1252") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"4 names, ")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    found = json.loads(report.read_text("utf-8"))
    assert len(found["samples"]) == 3
    assert any(letter in "".join(found["samples"]) for letter in "ИЮЖльяию")
    assert found["config"]["data"] == str(data)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, POSIX_C], ids=["cp1252", "C"])
def test_a_letter_that_the_terminal_lacks_is_written_as_its_number(environment: dict[str, str]) -> None:
    """In both outputs."""
    text = r"print('\u0410nna'); print('\u0411ob', file=sys.stderr)"
    output, errors = start("-c", f"import sys; {PREPARED}{text}", **environment).communicate()
    assert (output.splitlines(), errors.splitlines()) == ([rb"\u0410nna"], [rb"\u0411ob"])


def test_letters_that_the_terminal_has_are_written_as_they_are() -> None:
    """UTF-8."""
    output, _ = start("-c", PREPARED + r"print('\u0410nna')", PYTHONIOENCODING="utf-8").communicate()
    assert output.decode().splitlines() == ["\u0410nna"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_is_dropped(stream: str) -> None:
    """The script goes on, to its exit code, and so does the interpreter when it ends."""
    go_on = f"[print('x' * 100, file=sys.{stream}) for _ in range(2000)]; "
    at_exit = f"print('the rest', end='', file=sys.{stream}); sys.exit(7)"
    with start("-c", f"import sys; {PREPARED}{go_on}{at_exit}") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        getattr(process, stream).close()
        other = process.stderr if stream == "stdout" else process.stdout
        assert other.read() == b""
    assert process.returncode == 7


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_has_no_room_is_said_to_be_lost() -> None:
    """Once; the script goes on."""
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-c", f"{PREPARED}print('a'); print('b')"]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(MODELS)}
        result = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "the output is lost: No space left on device\n")


@pytest.mark.parametrize("name", ["names_mlp", "names_wavenet", "names_gru", "names_gpt", "names_mlp_by_hand"])
def test_ctrl_c_during_the_imports_is_no_traceback(name: str, tmp_path: Path) -> None:
    """While torch is imported; the shell's exit code is 130. A stand-in for torch waits for the signal."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    paths = os.pathsep.join([str(tmp_path), str(MODELS.parent)])
    with start(MODELS / f"{name}.py", PYTHONPATH=paths) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"importing"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (-signal.SIGINT, b"", b"")


def test_a_script_in_the_background_leaves_ctrl_c_ignored() -> None:
    """As a shell starts it."""
    check = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + PREPARED
    process = start("-c", check + "print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)")
    assert process.communicate()[0].strip() == b"True"
