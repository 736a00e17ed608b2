"""A live area on stderr that only the calls of whoever works draw.

There is no thread that redraws: beside what is measured the parent must stay idle.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text


class LiveArea:
    """A part of the terminal that is drawn anew and is gone afterwards; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        is_live = console.is_terminal and not console.is_dumb_terminal
        # stdout may be redirected to a file or be the result itself: the live area must not capture it.
        self._live = (
            Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
            if is_live
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()
