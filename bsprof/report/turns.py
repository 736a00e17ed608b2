"""Live progress of two sides measured in turns: the interval closes in. Drawn by the calls of whoever measures."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.text import Text

from bsprof.compare import Change
from bsprof.report.figures import percent
from bsprof.report.live import LiveArea

_REDRAW_S = 0.5


class TurnsProgress(LiveArea):
    """What a run of pairs is doing: a line on a terminal, one line a pair elsewhere. Use it as a context manager."""

    def __init__(self, console: Console, budget_s: float) -> None:
        super().__init__(console)
        self._budget_s = budget_s
        self._began = self._drawn = time.monotonic()
        self._done, self._total, self._stage = 0, 0, "starting"
        self._change: Change | None = None

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        return super().__enter__()

    def heard(self, stage: str) -> None:
        """Say where the pair in progress is."""
        self._stage = stage
        if time.monotonic() - self._drawn >= _REDRAW_S:
            self._draw()

    def advance(self, done: int, total: int, change: Change | None) -> None:
        """Say that a pair is done, how many there are to be, and what all of them say of B / A."""
        self._done, self._total, self._change = done, total, change
        if self._live:
            self._draw()
        else:
            self._console.print(self._line(), soft_wrap=True, highlight=False)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._live:
            self._live.update(self._line().append(f"  {self._stage}", "cyan"), refresh=True)

    def _line(self) -> Text:
        of = f"/{self._total}" if self._total else ""
        text = Text.assemble((f"[{self._done}{of} pairs] ", "dim"), no_wrap=True, overflow="ellipsis")
        if (change := self._change) is not None:
            text.append(f"{change.label} of B ").append(f"{percent(change.ratio - 1, signed=True)} ", "bold")
            if change.low is not None and change.high is not None:
                low, high = (percent(end - 1, signed=True) for end in (change.low, change.high))
                text.append(f"[{low} … {high}]", "yellow")
        return text.append(f"  {time.monotonic() - self._began:.0f} s of {self._budget_s:.0f} s", "dim")
