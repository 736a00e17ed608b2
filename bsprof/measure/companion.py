"""A process of bsprof's own beside this one, which it looks at from outside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Self

CLOSE_S = 5.0
"""A companion has so long to end when it is told to. The slowest question, to a driver, takes some 0.1 s."""


class Companion:
    """A module of bsprof run by a fresh interpreter. It ends with `close`, or by itself when this process has gone.

    That is for the module to see to: it reads a byte or the end of its standard input, and looks at its parent's id
    as well, because DataLoader workers that are forked meanwhile hold its pipe open.
    """

    def __init__(self, module: str, *arguments: str, stderr: int | None = None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # no process, nothing seen: whoever reads what it wrote finds that out
            # All paths are handed over, so that it finds what this process finds, and nothing else first.
            search = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": search},
            )

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Tell the process to end and wait until it has; it is killed where it does not. Closing twice is once."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(b".", timeout=CLOSE_S)  # not the end of the pipe alone: workers may hold it open
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
