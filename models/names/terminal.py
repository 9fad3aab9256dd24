"""The terminal that a script writes to: it may lack letters, nobody may read on, and Ctrl-C may come at any time."""

from __future__ import annotations

import io
import signal
import sys
from typing import Any


def prepare() -> None:
    """First of all in a script, before the imports that take seconds: from here on, nothing of this is a traceback.

    Ctrl-C ends the script at once; the exit code is 130 in a shell. (While a model trains, `Stop` in command_line.py
    takes over.) A letter that the terminal lacks is written as its number. What nobody reads is dropped.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `>&-`
            continue
        stream.reconfigure(errors="backslashreplace")
        if not stream.isatty():
            raw = io.BufferedWriter(Lenient(stream.fileno(), "w", closefd=False))
            text = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)


class Lenient(io.FileIO):
    """A stream that drops what it cannot write, as after `| head -1`: the run goes on, and writes its files."""

    failed = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and not self.failed and not isinstance(error, BrokenPipeError):
                print(f"the output is lost: {error.strerror}", file=sys.stderr)
            self.failed = True
            return memoryview(data).nbytes
