"""Live progress on stderr, drawn by the calls of whoever runs the sweep.

There is no thread that redraws: beside a case the parent must stay idle, so the live area changes only inside
`advanced` and `tick`, and at most once a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.text import Text

from bsprof.metrics import CaseSummary
from bsprof.model import Case, Measurement
from bsprof.report.figures import case_name, duration, percent, plural, printable, rate
from bsprof.report.live import LiveArea

_REDRAW_S = 1.0
_BAR_WIDTH = 30
_STAGES = {
    "starting": "starting",
    "build": "building",
    "warmup": "warming up",
    "measure": "measuring",
    "loader": "watching the loader",
    "epoch": "crossing an epoch",
}


class Progress(LiveArea):
    """What a sweep is doing: a live area on a terminal, one line a finished case anywhere.

    `cases` are still to be measured, or None where nobody knows how many there will be, `varying` the axes that tell
    them apart, `expected_s` the time all of them may take and `target` the precision asked for. Use it as a context
    manager.
    """

    def __init__(
        self,
        console: Console,
        cases: int | None,
        varying: Sequence[str],
        expected_s: float,
        target: float | None = None,
    ) -> None:
        super().__init__(console)
        self._total = cases
        self._varying = list(varying)
        self._expected_s = expected_s
        self._target = target
        self._done = 0
        self._began = self._case_began = self._drawn = time.monotonic()
        self._status: tuple[str, str, int, float | None] | None = None

    def __enter__(self) -> Self:
        self._began = self._case_began = time.monotonic()
        return super().__enter__()

    def started(self, case: Case) -> None:
        """Say that a case was asked for."""
        self._case_began = time.monotonic()
        self._status = (self._name(case), "starting", 0, None)
        self._draw()

    def advanced(self, case: Case, stage: str, steps: int, precision: float | None) -> None:
        """Say how far a case is: its stage, the steps measured so far and the precision they have reached."""
        self._status = (self._name(case), stage, steps, precision)
        self.tick()

    def tick(self) -> None:
        """Let the clocks move on; redraws if the last drawing is a second old."""
        if time.monotonic() - self._drawn >= _REDRAW_S:
            self._draw()

    def finished(self, measurement: Measurement) -> None:
        """Leave one line for a case that has ended."""
        self._done += 1
        self._status = None
        self._print(self._line(measurement))
        self._draw()

    def note(self, text: str) -> None:
        """Leave a line of text."""
        self._print(Text(text))

    @property
    def _of_total(self) -> str:
        return "" if self._total is None else f"/{self._total}"

    # --- drawing ----------------------------------------------------------------------------------------

    def _name(self, case: Case) -> str:
        return case_name(case, self._varying) + (f", process {case.process + 1}" if case.process else "")

    def _line(self, measurement: Measurement) -> Text:
        summary, outcome = CaseSummary([measurement]), measurement.outcome
        text = Text.assemble((f"[{self._done}{self._of_total}] ", "dim"), self._name(measurement.case), ": ")
        if outcome.kind != "ok":
            text.append(outcome.kind, "bold red")
            message = (outcome.message or "").strip().partition("\n")[0]
            return text.append(f": {printable(message)}") if message else text
        text.append(duration(summary.value("step")), "bold")
        text.append(f" ±{percent(summary.value('precision'))}" if summary["precision"] is not None else "")
        if summary["throughput"] is not None:
            text.append(f", {rate(summary.value('throughput'))} samples/s")
        text.append(f" in {plural(len(summary.readings[0].step), 'step')}" if summary.readings else "", "dim")
        return text.append(f", {measurement.wall_s:.0f} s", "dim")

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self._live:
            self._live.update(self._area(), refresh=True)

    def _area(self) -> Text:
        now = time.monotonic()
        text = Text(no_wrap=True, overflow="ellipsis")
        if self._status:
            name, stage, steps, precision = self._status
            text.append(name, "bold").append(f"  {_STAGES.get(stage, stage)}", "cyan")
            text.append(f"  {plural(steps, 'step')}" if steps else "")
            if precision is not None:
                reached = self._target is not None and precision <= self._target
                text.append(f"  ±{percent(precision)}", "green" if reached else "yellow")
                text.append(f" of ±{percent(self._target)} asked" if self._target is not None else "")
            text.append(f"  {now - self._case_began:.0f} s", "dim")
        if self._total is None:
            return text.append(f"\n{plural(self._done, 'case')} done  {_clock(now - self._began)} elapsed")
        filled = round(_BAR_WIDTH * self._done / self._total) if self._total else _BAR_WIDTH
        text.append("\n").append("━" * filled, "green").append("━" * (_BAR_WIDTH - filled), "dim")
        text.append(f"  {self._done}/{plural(self._total, 'case')}  {_clock(now - self._began)} elapsed")
        return text.append(f", about {_clock(self._left_s(now))} left" if self._done < self._total else "")

    def _left_s(self, now: float) -> float:
        """Time left: the expectation counts as one case's worth of evidence beside the cases that are done."""
        if not self._total:
            return 0.0
        expected = self._expected_s / self._total
        a_case = (expected + self._case_began - self._began) / (1 + self._done) if self._done else expected
        return max(a_case * (self._total - self._done) - min(now - self._case_began, a_case), 0.0)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
