"""The tables of steps: where a step's time goes, how steps scatter, and what is paid around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bsprof.metrics import CaseSummary, order_phases
from bsprof.model import Measurement
from bsprof.report import figures
from bsprof.report.cases import axis_columns, case_marks, marks_of
from bsprof.report.figures import MISSING
from bsprof.report.grid import Column, column, is_captured, print_grid, print_words, width_of

_PHASE_COLOURS = {"data": "yellow", "h2d": "magenta", "forward": "green", "backward": "blue", "optimizer": "cyan"}

_BAR_WIDTH = 24

_NEGLIGIBLE = 0.0005
"""A phase below this share in every case gets words instead of a column."""


def render_steps(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Print the step of each case and its phases, failures as rows of their own, then a legend."""
    axes = axis_columns([case.case for case in cases], varying)
    phases = order_phases(phase for case in cases for phase in case.phases)
    shares = {phase: max((case.value(f"{phase}.share") or 0.0 for case in cases), default=0.0) for phase in phases}
    negligible = [phase for phase in phases if shares[phase] < _NEGLIGIBLE] if max(shares.values(), default=0) else []
    shown = [phase for phase in phases if phase not in negligible]
    unit = figures.time_unit(case.value("step") for case in cases)
    columns = axes
    for detail in _DETAILS:
        columns = [*axes, *_step_columns(cases, shown, unit, detail, console)]
        if width_of(columns) <= console.width:
            break
    failed = {index: _failure_rows(case) for index, case in enumerate(cases) if case.failures}
    print_grid(console, columns, failed, len(axes))
    console.print()
    if not phases:
        return
    times = f"mean {unit.name} and share of the mean step" if detail.times else "share of the mean step"
    print_words(console, Text(_legend(cases, shown, negligible, times, {column.header for column in columns}), "dim"))
    console.print()


class _Detail(NamedTuple):
    """How much of the table there is room for."""

    times: bool = True
    intervals: bool = False
    left_out: frozenset[str] = frozenset({"where a step goes"})


_DETAILS = (
    _Detail(intervals=True, left_out=frozenset()),
    _Detail(intervals=True),
    _Detail(),
    _Detail(left_out=frozenset({"where a step goes", "steps", "processes"})),
    _Detail(times=False),
    _Detail(times=False, left_out=frozenset({"where a step goes", "steps", "processes"})),
    _Detail(times=False, left_out=frozenset({"where a step goes", "steps", "processes", "other", "distortion"})),
)
"""From wide terminals to narrow ones. Steps and processes stand in the second table as well."""


def _step_columns(
    cases: Sequence[CaseSummary], phases: Sequence[str], unit: figures.TimeUnit, detail: _Detail, console: Console
) -> list[Column]:
    columns = [
        _step_column(cases, unit),
        column(_rate_unit(cases), figures.column([case.value("throughput") for case in cases])),
        *_phase_columns(cases, phases, unit, with_times=detail.times),
        column("other", (_table_share(case.value("other_share"), signed=True) for case in cases)),
        column("steps", (_count(case.value("steps")) for case in cases)),
        column("distortion", (_distortion(case, with_interval=detail.intervals) for case in cases)),
        column("spread", (figures.percent(case.spread) for case in cases)),
        column("where a step goes", (_bar(case, phases, console) for case in cases), right=False),
    ]
    return [column for column in columns if column.header not in detail.left_out and is_captured(column)]


def _rate_unit(cases: Sequence[CaseSummary]) -> str:
    return "img/s" if all(case.settings is not None for case in cases) else "samples/s"


def _step_column(cases: Sequence[CaseSummary], unit: figures.TimeUnit) -> Column:
    """Median ± the longer side of its interval, then the marks of its notes."""
    marks = marks_of(cases)
    values = [_scaled(case.value("step"), unit) for case in cases]
    sides = [_scaled(_side(case), unit) for case in cases]
    places = max(figures.decimals(values, digits=4), figures.decimals(sides, digits=2))
    widest = max((len(f"{side:.{places}f}") for side in sides if side is not None), default=0)
    widest_mark = max((len(case_marks(case, marks)) for case in cases), default=0)

    def cell(case: CaseSummary, value: float | None, side: float | None) -> Text:
        if value is None:
            return Text(MISSING)
        text = Text.assemble((f"{value:.{places}f}", "bold"))
        text.append(f" ±{side:>{widest}.{places}f}" if side is not None else " " * (widest + 2 if widest else 0), "dim")
        return text.append(f"{case_marks(case, marks):<{widest_mark}}", "yellow")

    cells = [cell(*row) for row in zip(cases, values, sides, strict=True)]
    return column(f"step {unit.name}", cells)


def _side(case: CaseSummary) -> float | None:
    value, interval = case.value("step"), case.interval("step")
    return max(interval[1] - value, value - interval[0]) if interval and value is not None else None


def _scaled(seconds: float | None, unit: figures.TimeUnit) -> float | None:
    return None if seconds is None else seconds * unit.per_second


def _phase_columns(
    cases: Sequence[CaseSummary], phases: Sequence[str], unit: figures.TimeUnit, *, with_times: bool
) -> Iterator[Column]:
    largest = [max(case.phases, key=lambda phase: case.value(f"{phase}.time") or 0.0, default=None) for case in cases]
    for phase in phases:
        times = figures.column([case.value(f"{phase}.time") for case in cases], unit.per_second)
        cells = []
        for case, time, first in zip(cases, times, largest, strict=True):
            share = _table_share(case.value(f"{phase}.share"))
            emphasis = f"bold {_PHASE_COLOURS.get(phase, 'red')}" if phase == first else ""
            cell = Text(time, emphasis) if with_times else Text()
            if time == MISSING:
                cell = Text(MISSING)
            elif with_times:
                cell.append(f" {share:>3}", emphasis or "dim")
            else:
                cell.append(share, emphasis)
            cells.append(cell)
        yield Column(phase, cells)


def _table_share(share: float | None, *, signed: bool = False) -> str:
    """Write a share for a table: whole per cent, or tenths where the sign matters."""
    if share is None:
        return MISSING
    if signed:
        return f"{share:+.1%}" if abs(share) >= 0.0005 else "0.0%"
    return f"{share:.0%}"


def _count(value: float | None) -> str:
    return f"{value:.0f}" if value else MISSING


def _distortion(case: CaseSummary, *, with_interval: bool) -> str:
    value, interval = case.value("distortion"), case.interval("distortion")
    if value is None or interval is None or not figures.is_telling(interval):
        return MISSING  # one pair of blocks says nothing, and two say hardly more
    text = _table_share(value, signed=True)
    return f"{text} ±{max(interval[1] - value, value - interval[0]):.1%}" if with_interval else text


def _bar(case: CaseSummary, phases: Sequence[str], console: Console) -> Text:
    """Draw the mean step as a bar of its phases."""
    return stacked(
        [(phase[0], _PHASE_COLOURS.get(phase, "red"), case.value(f"{phase}.share") or 0.0) for phase in phases], console
    )


def stacked(parts: Iterable[tuple[str, str, float]], console: Console) -> Text:
    """Draw (letter, colour, share of the whole) as a bar: coloured, or made of the letters where there is no colour."""
    coloured = console.is_terminal and not console.no_color
    bar, total, drawn = Text(), 0.0, 0
    for letter, colour, share in parts:
        total += max(share, 0.0)
        until = min(round(total * _BAR_WIDTH), _BAR_WIDTH)
        bar.append(("█" if coloured else letter) * (until - drawn), colour)
        drawn = max(until, drawn)
    return bar


def _legend(
    cases: Sequence[CaseSummary], shown: Sequence[str], negligible: Sequence[str], times: str, headers: set[str]
) -> str:
    several = any(len(case.readings) > 1 for case in cases)
    device = any(reading.has_device_clock for case in cases for reading in case.readings)
    parts = [
        f"step: median ± 95 % interval, {'between processes' if several else 'within one process'}",
        f"phases: {times}; with other (signed) they add up to it",
    ]
    if any(reading.ranks for case in cases for reading in case.readings):
        parts.append("of several ranks: the slowest one's, whose backward waits for the exchange of gradients")
    if any(case.settings is not None for case in cases):
        parts.append("forward includes the loss; optimizer includes zero_grad")
    if "data" in (*shown, *negligible):
        parts.append("data is the stall, on the device's clock" if device else "data is the wait in next()")
    if "distortion" in headers:
        parts.append("distortion: instrumented / bare steps - 1")
    if negligible:
        parts.append(f"{', '.join(negligible)}: under {figures.percent(_NEGLIGIBLE)} in every case")
    return " · ".join(parts)


def _failure_rows(case: CaseSummary) -> list[Text]:
    """One line for each way in which the case failed."""
    kinds: dict[tuple[str, str], list[Measurement]] = {}
    for one in case.failures:
        kinds.setdefault((one.outcome.kind, one.outcome.message or ""), []).append(one)
    rows = []
    for (kind, message), failed in kinds.items():
        text = Text.assemble((kind, "bold red"))
        if len(case.measurements) > 1:
            text.append(f" in {len(failed)} of {len(case.measurements)} processes", "red")
        text.append(f"  {_first_line(message)}")
        rows.append(text)
    return rows


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


_COSTS = (
    ("p10", "step_p10"),
    ("p90", "step_p90"),
    ("min", "step_min"),
    ("wait", "wait"),
    ("hidden", "hidden"),
    ("precision", "precision"),
    ("steps", "steps"),
    ("worth", "effective_steps"),
    ("faults", "minor_faults"),
    ("first step", "first_step"),
    ("warm-up", "warmup"),
    ("build", "build"),
    ("iter()", "iterator"),
    ("1st batch", "first_batch"),
    ("epoch end", "epoch_boundary"),
)
"""Columns of the second table. Host wait and hidden wait differ from `data` only where the device has a clock."""

_COSTS_EXPLAINED = (
    ("precision", "precision: of the median, within a process"),
    ("worth", "worth: as many independent steps"),
    ("faults", "faults: minor, a step"),
    ("epoch end", "epoch end: last next(), iter() and first next()"),
)

_EXPENDABLE = ("min", "iter()", "1st batch", "build", "p10", "precision", "steps", "worth")
"""Columns given up, one after the other, until the second table fits."""


def render_costs(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Print how the steps scatter and what is paid before the first steady step and at each epoch's end."""
    measured = [case for case in cases if case.readings]
    if not measured:
        return
    two_clocks = any(reading.has_device_clock for case in measured for reading in case.readings)
    axes = axis_columns([case.case for case in measured], varying)
    unit = figures.time_unit(case.value("step") for case in measured)
    columns = list(axes)
    for header, key in _COSTS:
        values = [case.value(key) for case in measured]
        if key in ("wait", "hidden") and not two_clocks:
            continue
        if key.startswith("step_") or key in ("wait", "hidden"):
            cells = figures.column(values, unit.per_second)
            header = f"{header} {unit.name}"
        elif key == "precision":
            cells = [figures.percent(value) for value in values]
        elif key in ("minor_faults", "effective_steps", "steps"):
            cells = [MISSING if value is None else f"{value:.0f}" for value in values]
        else:
            cells = [figures.duration(value) for value in values]
        columns.append(column(header, cells))
    columns = [column for column in columns if column in axes or is_captured(column)]

    for header in _EXPENDABLE:
        if width_of(columns) <= console.width:
            break
        columns = [column for column in columns if column.header.removesuffix(f" {unit.name}") != header]
    print_grid(console, columns, {}, len(axes))
    console.print()
    shown = {column.header for column in columns}
    explained = [text for header, text in _COSTS_EXPLAINED if header in shown]
    if explained:
        print_words(console, Text(" · ".join(explained), "dim"))
    console.print()
