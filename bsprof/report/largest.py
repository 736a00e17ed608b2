"""The largest batches that were searched: what fits, what no longer does, and what a line had said of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.text import Text

from bsprof.metrics import varying_axes
from bsprof.model import TOO_LARGE, Case, LargestBatch, LargestBatchSearch, Measurement, Plan, Result, case_key
from bsprof.report import figures
from bsprof.report.cases import axis_columns, caption
from bsprof.report.figures import MISSING
from bsprof.report.grid import column, print_grid, print_words


def render_largest(result: Result, console: Console) -> None:
    """Print a row for each search of a result, and in words where a search and its prediction disagree."""
    if not result.largest_batches:
        return
    most = result.plan.largest_batch.most if result.plan and result.plan.largest_batch else None
    found = [_Found(one, result.measurements, most) for one in result.largest_batches]
    cases = [one.case for one in found]
    varying = varying_axes(case.settings for case in cases)
    names = axis_columns(cases, varying)
    columns = [
        *names,
        column("largest batch", (one.batch for one in found)),
        column("peak memory", (one.peak for one in found)),
        column("next that failed", (one.failure for one in found), right=False),
        column("predicted", (one.predicted for one in found)),
        column("tries", (str(len(one.search.tried)) for one in found)),
    ]
    print_grid(console, columns, {}, len(names))
    console.print()
    margins = sorted({figures.percent(one.search.margin) for one in found})
    legend = (
        f"largest batch: survived in a process of its own, with {', '.join(margins)} of the memory kept from it · "
        "peak memory: reserved, of what it might have · predicted: where the line through the peaks of batches at most "
        "half as large reaches that, and its 95 % interval"
    )
    print_words(console, Text(legend, "dim"))
    for one in found:
        for sentence in one.remarks(figures.case_name(one.case, varying)):
            print_words(console, Text.assemble(("! ", "yellow"), figures.printable(sentence)))
    console.print()


def render_searches(cases: Sequence[Case], plan: Plan, search: LargestBatchSearch, console: Console) -> None:
    """Print for which settings the largest batch would be searched, and what a try is."""
    nameless = [_without_batch(case) for case in cases]
    varying = varying_axes(case.settings for case in nameless)
    print_words(console, caption(nameless, [], [*varying, "batch_size"]), indent=0)
    console.print()
    columns = [column("", (str(index + 1) for index in range(len(nameless)))), *axis_columns(nameless, varying)]
    print_grid(console, columns, {}, 1)
    console.print()
    print_words(
        console,
        f"the largest batch is searched for {figures.plural(len(nameless), 'combination')}: each try is a process that "
        f"has to survive {figures.plural(search.steps, 'step')} with {figures.percent(search.margin)} of the memory "
        f"kept from it, and is ended after {plan.deadline_s:g} s",
    )


class _Found:
    """One search beside the measurements that were made for it; no batch above `most` was to be tried."""

    def __init__(self, search: LargestBatch, measurements: Sequence[Measurement], most: int | None) -> None:
        self.search = search
        self._most = most
        self.case = _without_batch(Case(key=case_key(search.settings), settings=search.settings))
        self._by_key = {m.case.key: m for m in measurements}
        beyond = (batch for batch in sorted(map(int, search.tried)) if batch > (search.batch_size or 0))
        self._failed = next((batch for batch in beyond if search.tried[str(batch)] in TOO_LARGE), None)
        others = (int(batch) for batch, kind in search.tried.items() if kind not in ("ok", *TOO_LARGE))
        self._ended_by = next(others, None)

    def _measurement(self, batch: int) -> Measurement | None:
        return self._by_key.get(case_key(msgspec.structs.replace(self.search.settings, batch_size=batch)))

    @property
    def batch(self) -> Text:
        size, complete = self.search.batch_size, self.search.complete
        if size is None:
            return Text("none" if complete else MISSING)
        return Text(str(size) if complete else f"at least {size}", "bold")

    @property
    def peak(self) -> str:
        measurement = self._measurement(self.search.batch_size) if self.search.batch_size else None
        memory = measurement.memory if measurement else None
        if memory is None:
            return MISSING
        peak = memory.allocated_peak if memory.reserved_peak is None else memory.reserved_peak
        of = f" of {figures.size(self.search.memory_bytes)}" if self.search.memory_bytes is not None else ""
        return figures.size(peak) + of

    @property
    def failure(self) -> str:
        return MISSING if self._failed is None else f"{self._failed}: {self._how(self._failed)}"

    def _how(self, batch: int) -> str:
        measurement = self._measurement(batch)
        phase = measurement.outcome.phase if measurement else None
        return self.search.tried[str(batch)] + (f" in {phase}" if phase else "")

    @property
    def predicted(self) -> str:
        search = self.search
        if search.predicted is None:
            return MISSING
        if search.predicted_low is None or search.predicted_high is None:
            return f"{search.predicted:.0f}"
        return f"{search.predicted:.0f} [{search.predicted_low:.0f}, {search.predicted_high:.0f}]"

    def remarks(self, name: str) -> list[str]:
        """Return what a reader must know: a search that did not end by itself, and a prediction that was wrong."""
        search, remarks = self.search, []
        if self._ended_by is not None:
            measurement = self._measurement(self._ended_by)
            message = ((measurement and measurement.outcome.message) or "").strip().partition("\n")[0]
            remarks.append(
                f"{name}: the search ended at batch {self._ended_by}, which failed for another reason than memory: "
                f"{self._how(self._ended_by)}{': ' if message else ''}{message}"
            )
        elif not search.complete:
            why = "no larger batch was to be tried" if search.batch_size == self._most else "it is not finished"
            remarks.append(f"{name}: the search did not come to an end: {why}")
        low, high = search.predicted_low, search.predicted_high
        if not search.complete or not search.batch_size or self._failed is None or low is None or high is None:
            return remarks
        if self._failed < low - 0.5 or search.batch_size > high + 0.5:  # a batch is a whole number
            remarks.append(
                f"{name}: {search.batch_size} was found where {self.predicted} was predicted: smaller batches are "
                "not in line with it. The one found was tried, the other is arithmetic"
            )
        return remarks


def _without_batch(case: Case) -> Case:
    """Return `case` with a batch size that is the same for all: it means nothing where it was searched."""
    assert case.settings is not None
    return msgspec.structs.replace(case, settings=msgspec.structs.replace(case.settings, batch_size=1))
