"""Ctrl-C as a request that is met where it is safe, and no exception in the middle of anything."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any, Self

from bsprof.errors import Exit

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Hears signals while it is entered: the first asks to stop, the second leaves at once.

    Leaving at once loses nothing that was journalled, and the running case ends with its parent; `farewell` is all that
    is still said, on stderr. `requested` tells whether a stop was asked for; `fileno()` becomes readable then, for a
    wait that must wake.
    """

    def __init__(self, farewell: str = "") -> None:
        self.requested = False
        self._farewell = farewell.encode(errors="backslashreplace")
        self._reader, self._writer = os.pipe()
        self._before: dict[int, Any] = {}

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when a stop is asked for."""
        return self._reader

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            with contextlib.suppress(OSError):
                os.write(2, self._farewell)
            os._exit(Exit.INTERRUPTED)
        self.requested = True
        os.write(self._writer, b"\0")

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # Once stopped, the process is on its way out: a signal that comes late must not change its exit code.
            signal.signal(number, signal.SIG_IGN if self.requested else handler)
        os.close(self._reader)
        os.close(self._writer)
