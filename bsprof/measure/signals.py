"""Signals that may raise anywhere, held back from code that must run to its end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

RAISING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD)
"""Signals whose handlers raise in the main thread, wherever that is: Ctrl-C, a deadline, and torch's, which raises for
a DataLoader worker that has died."""


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let the handlers of `RAISING` wait until the block has ended; then those that were called for run, once each.

    Handlers run in the main thread alone: elsewhere there is nothing to hold back. Only handlers that are Python's are
    held; what the system does by itself is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in RAISING if callable(handler := signal.getsignal(number))}
    came: dict[int, FrameType | None] = {}

    def hold(number: int, frame: FrameType | None) -> None:
        came.setdefault(number, frame)

    def release(number: signal.Signals) -> None:
        if number in came:
            handlers[number](number, came[number])

    with contextlib.ExitStack() as after:  # all of it is done, last first, whatever a handler raises meanwhile
        for number in handlers:
            after.callback(release, number)
        for number, handler in handlers.items():
            after.callback(signal.signal, number, handler)
            signal.signal(number, hold)
        yield
