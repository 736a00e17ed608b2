"""Results as text: one dense table a sweep, that fits the terminal and stays readable without colour."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO, cast

import msgspec
from rich.console import Console
from rich.text import Text

from bsprof.metrics import CaseSummary, axis_values, order_phases, summarise, varying_axes
from bsprof.model import AXES, Accelerator, Case, Check, Environment, Facts, Measurement, Result, Settings
from bsprof.report import figures, words
from bsprof.report.figures import MISSING

_MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"
_PHASE_COLOURS = {"data": "yellow", "h2d": "magenta", "forward": "green", "backward": "blue", "optimizer": "cyan"}
_BAR_WIDTH = 24
_PIPED_WIDTH = 120
_NEGLIGIBLE = 0.0005
"""A phase below this share in every case gets words instead of a column."""


class _Console(Console):
    """A console that leaves it to its caller what a reader who has gone means; rich's own ends the program."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Notices:
    """Standard error that nobody need hear: a full disk or a closed pipe there must not end a sweep."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr; it honours NO_COLOR, COLUMNS and the width of the terminal.

    On stdout it raises OSError where nothing can be written any more, on stderr it goes on in silence.
    """
    file = cast(TextIO, _Notices(sys.stderr)) if stderr and sys.stderr is not None else None
    found = _Console(file=file, stderr=stderr, highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        # A file has no width of its own; the whole table is of more use than 80 columns of it.
        found.width = _PIPED_WIDTH
    return found


# --- a grid of text --------------------------------------------------------------------------------------


class _Column(NamedTuple):
    header: str
    cells: list[Text]
    right: bool = True


def _column(header: str, cells: Iterable[str | Text], *, right: bool = True) -> _Column:
    return _Column(header, [Text(cell) if isinstance(cell, str) else cell for cell in cells], right)


def _is_captured(column: _Column) -> bool:
    return any(cell.plain not in ("", MISSING) for cell in column.cells)


def _width(columns: Sequence[_Column]) -> int:
    return 2 + sum(_cells_width(column) for column in columns) + 2 * (len(columns) - 1)


def _cells_width(column: _Column) -> int:
    return max([len(column.header), *(cell.cell_len for cell in column.cells)])


def _print_grid(console: Console, columns: Sequence[_Column], after: dict[int, list[Text]], lead: int) -> None:
    """Print columns under their headers; rows in `after` follow row i and span all columns but the first `lead`."""
    columns = _squeezed(columns, console.width)
    widths = [_cells_width(column) for column in columns]

    def line(cells: Iterable[Text]) -> Text:
        row = Text("  ")
        for column, width, cell in zip(columns, widths, cells, strict=False):
            pad = " " * (width - cell.cell_len)
            row.append_text(Text.assemble(pad, cell, "  ") if column.right else Text.assemble(cell, pad, "  "))
        row.rstrip()
        return row

    _print_line(console, line(Text(column.header, "bold") for column in columns))
    _print_line(console, Text("  " + "─" * (_width(columns) - 2), "dim"))
    for index in range(len(columns[0].cells) if columns else 0):
        cells = [column.cells[index] for column in columns]
        if any(cell.plain not in ("", MISSING) for cell in cells[lead:]) or index not in after:
            _print_line(console, line(cells))
        start = line(cells[:lead])
        start.pad_right(2 + sum(widths[:lead]) + 2 * lead - start.cell_len)
        for span in after.get(index, ()):
            for part in span.wrap(console, max(console.width - start.cell_len, 20)):
                part.rstrip()
                _print_line(console, Text.assemble(start, part))
                start = Text(" " * start.cell_len)


_SHORTEST_NAME = 8


def _squeezed(columns: Sequence[_Column], width: int) -> list[_Column]:
    """Shorten names, the longest column first and from their front, as far as it takes to fit into `width`."""
    squeezed = list(columns)
    for index in sorted(range(len(columns)), key=lambda index: -_cells_width(columns[index])):
        excess = _width(squeezed) - width
        if excess <= 0:
            break
        if not columns[index].right:
            room = max(_SHORTEST_NAME, _cells_width(columns[index]) - excess)
            cells = [cell if cell.cell_len <= room else Text("…") + cell[1 - room :] for cell in columns[index].cells]
            squeezed[index] = _column(columns[index].header, cells, right=False)
    return squeezed


def _print_line(console: Console, text: Text) -> None:
    if not text.plain.isprintable():
        # A message may hold anything: what moves the cursor or paints the screen must not reach the terminal.
        text.plain = figures.printable(text.plain)
    console.print(text, no_wrap=True, overflow="ellipsis", highlight=False)


def _print_words(console: Console, text: Text | str, indent: int = 2) -> None:
    text = Text(text) if isinstance(text, str) else text
    for part in text.wrap(console, max(console.width - indent, 20)):
        part.rstrip()
        _print_line(console, Text(" " * indent).append_text(part))


# --- a result --------------------------------------------------------------------------------------------


def render(result: Result, console: Console) -> None:
    """Print a result: what was held constant, the tables, notes and failures, the machine, a paragraph of words.

    Fits `console.width` down to 80 columns; without colour where the console has none.
    """
    cases = summarise(result)
    varying = varying_axes(case.settings for case in cases)
    facts = [case.facts for case in cases if case.facts]
    _print_words(console, _caption([case.case for case in cases], facts, varying), indent=0)
    console.print()
    if cases:
        _render_steps(cases, varying, console)
        _render_costs(cases, varying, console)
    _render_notes(cases, varying, result, console)
    _render_hints(cases, console)
    for line in _machine(result.environment):
        _print_words(console, Text(line, "dim"))
    console.print()
    for sentence in words.summary(result, cases):
        _print_words(console, sentence)


def _caption(cases: Sequence[Case], facts: Sequence[Facts], varying: Sequence[str]) -> Text:
    """Name what all cases have in common: model and data, the device, and settings that are not at their default."""
    settings = [case.settings for case in cases if case.settings]
    if not settings:
        title = "your own loop" if cases else "no cases"
    else:
        named = [setting for name in ("model", "data") if (setting := _common(name, settings, varying))]
        title = " on ".join(named)
    parts = []
    for unit, values in (
        ("", {fact.device for fact in facts}),
        ("threads", {fact.threads for fact in facts}),
        ("parameters", {figures.thousands(fact.parameters) for fact in facts if fact.parameters is not None}),
        ("px", {fact.image_size for fact in facts} - {None}),
        ("samples", {fact.samples_in_dataset for fact in facts} - {None}),
    ):
        if len(values) == 1:
            parts.append(f"{next(iter(values))} {unit}".strip())
    for name, axis in AXES.items():
        shown_already = name in ("model", "data", "image_size", "threads")
        if settings and not shown_already and (text := _common(name, settings, varying)):
            is_default = {axis.default} == axis_values(name, settings)
            if not is_default or name in ("optimizer", "batch_size", "workers"):
                parts.append(f"{axis.info.column} {text}")
    malloc = {fact.malloc for fact in facts}
    if len(malloc) == 1:
        parts.append(f"malloc {malloc.pop().partition(':')[0]}")
    return Text.assemble((title, "bold"), *(f" · {part}" for part in parts))


def _common(name: str, settings: Sequence[Settings], varying: Sequence[str]) -> str | None:
    values = axis_values(name, settings)
    return figures.axis_setting(name, next(iter(values))) if name not in varying and len(values) == 1 else None


def _axis_columns(cases: Sequence[Case], varying: Sequence[str]) -> list[_Column]:
    """One column an axis that varies; a user's loop, or a single case, goes by its name."""
    if not varying or any(case.settings is None for case in cases):
        return [_column("case", (figures.case_name(case, varying) for case in cases), right=False)]
    return [
        _column(
            AXES[name].info.column,
            (figures.axis_setting(name, getattr(case.settings, name)) for case in cases),
            right=AXES[name].type is int,
        )
        for name in varying
    ]


def _render_steps(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    axes = _axis_columns([case.case for case in cases], varying)
    phases = order_phases(phase for case in cases for phase in case.phases)
    shares = {phase: max((case.value(f"{phase}.share") or 0.0 for case in cases), default=0.0) for phase in phases}
    negligible = [phase for phase in phases if shares[phase] < _NEGLIGIBLE] if max(shares.values(), default=0) else []
    shown = [phase for phase in phases if phase not in negligible]
    unit = figures.time_unit(case.value("step") for case in cases)
    columns = axes
    for detail in _DETAILS:
        columns = [*axes, *_step_columns(cases, shown, unit, detail, console)]
        if _width(columns) <= console.width:
            break
    failed = {index: _failure_rows(case) for index, case in enumerate(cases) if case.failures}
    _print_grid(console, columns, failed, len(axes))
    console.print()
    if not phases:
        return
    times = f"mean {unit.name} and share of the mean step" if detail.times else "share of the mean step"
    _print_words(console, Text(_legend(cases, shown, negligible, times, {column.header for column in columns}), "dim"))
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
) -> list[_Column]:
    columns = [
        _step_column(cases, unit),
        _column(_rate_unit(cases), figures.column([case.value("throughput") for case in cases])),
        *_phase_columns(cases, phases, unit, with_times=detail.times),
        _column("other", (_table_share(case.value("other_share"), signed=True) for case in cases)),
        _column("steps", (_count(case.value("steps")) for case in cases)),
        _column("distortion", (_distortion(case, with_interval=detail.intervals) for case in cases)),
        _column("spread", (figures.percent(case.spread) for case in cases)),
        _column("where a step goes", (_bar(case, phases, console) for case in cases), right=False),
    ]
    return [column for column in columns if column.header not in detail.left_out and _is_captured(column)]


def _rate_unit(cases: Sequence[CaseSummary]) -> str:
    return "img/s" if all(case.settings is not None for case in cases) else "samples/s"


def _step_column(cases: Sequence[CaseSummary], unit: figures.TimeUnit) -> _Column:
    """Median ± the longer side of its interval, then the marks of its notes."""
    marks = _marks(cases)
    values = [_scaled(case.value("step"), unit) for case in cases]
    sides = [_scaled(_side(case), unit) for case in cases]
    places = max(figures.decimals(values, digits=4), figures.decimals(sides, digits=2))
    widest = max((len(f"{side:.{places}f}") for side in sides if side is not None), default=0)
    widest_mark = max((len(_case_marks(case, marks)) for case in cases), default=0)

    def cell(case: CaseSummary, value: float | None, side: float | None) -> Text:
        if value is None:
            return Text(MISSING)
        text = Text.assemble((f"{value:.{places}f}", "bold"))
        text.append(f" ±{side:>{widest}.{places}f}" if side is not None else " " * (widest + 2 if widest else 0), "dim")
        return text.append(f"{_case_marks(case, marks):<{widest_mark}}", "yellow")

    cells = [cell(*row) for row in zip(cases, values, sides, strict=True)]
    return _column(f"step {unit.name}", cells)


def _side(case: CaseSummary) -> float | None:
    value, interval = case.value("step"), case.interval("step")
    return max(interval[1] - value, value - interval[0]) if interval and value is not None else None


def _scaled(seconds: float | None, unit: figures.TimeUnit) -> float | None:
    return None if seconds is None else seconds * unit.per_second


def _phase_columns(
    cases: Sequence[CaseSummary], phases: Sequence[str], unit: figures.TimeUnit, *, with_times: bool
) -> Iterator[_Column]:
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
        yield _Column(phase, cells)


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
    if value is None or interval is None:
        return MISSING  # one pair of blocks says nothing
    text = _table_share(value, signed=True)
    return f"{text} ±{max(interval[1] - value, value - interval[0]):.1%}" if with_interval else text


def _bar(case: CaseSummary, phases: Sequence[str], console: Console) -> Text:
    """Draw the mean step as a bar: coloured, or made of the phases' first letters where there is no colour."""
    coloured = console.is_terminal and not console.no_color
    bar, total, drawn = Text(), 0.0, 0
    for phase in phases:
        total += max(case.value(f"{phase}.share") or 0.0, 0.0)
        until = min(round(total * _BAR_WIDTH), _BAR_WIDTH)
        bar.append(("█" if coloured else phase[0]) * (until - drawn), _PHASE_COLOURS.get(phase, "red"))
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


# --- costs around the steps ------------------------------------------------------------------------------


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


def _render_costs(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Print how the steps scatter and what is paid before the first steady step and at each epoch's end."""
    measured = [case for case in cases if case.readings]
    if not measured:
        return
    two_clocks = any(reading.has_device_clock for case in measured for reading in case.readings)
    axes = _axis_columns([case.case for case in measured], varying)
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
        columns.append(_column(header, cells))
    columns = [column for column in columns if column in axes or _is_captured(column)]

    for header in _EXPENDABLE:
        if _width(columns) <= console.width:
            break
        columns = [column for column in columns if column.header.removesuffix(f" {unit.name}") != header]
    _print_grid(console, columns, {}, len(axes))
    console.print()
    shown = {column.header for column in columns}
    explained = [text for header, text in _COSTS_EXPLAINED if header in shown]
    if explained:
        _print_words(console, Text(" · ".join(explained), "dim"))
    console.print()


# --- notes, failures, machine ----------------------------------------------------------------------------


def _marks(cases: Sequence[CaseSummary]) -> dict[str, str]:
    """Return a mark for each code of note; one more than there are letters shares the last."""
    codes = list(dict.fromkeys(note.code for case in cases for note in case.notes))
    return {code: _MARKS[min(index, len(_MARKS) - 1)] for index, code in enumerate(codes)}


def _case_marks(case: CaseSummary, marks: dict[str, str]) -> str:
    return "".join(dict.fromkeys(marks[note.code] for note in case.notes))


def _render_notes(cases: Sequence[CaseSummary], varying: Sequence[str], result: Result, console: Console) -> None:
    marks = _marks(cases)
    for code, mark in marks.items():
        noted = [(case, note.text) for case in cases for note in case.notes if note.code == code]
        which, text = noted[0]
        where = ""
        if len({text for _, text in noted}) > 1:
            where = f" ({figures.case_name(which.case, varying)}; like it in {len(noted) - 1} more)"
        _print_words(console, Text.assemble((mark, "yellow"), f" {text}{where}"))
    for note in result.notes:
        _print_words(console, Text.assemble(("! ", "yellow"), note.text))
    if marks or result.notes:
        console.print()


def _render_hints(cases: Sequence[CaseSummary], console: Console) -> None:
    """Print each hint once, however many cases failed in the same way."""
    outcomes = [one.outcome for case in cases for one in case.failures if one.outcome.hint]
    hints = dict.fromkeys((outcome.kind, outcome.hint) for outcome in outcomes)
    for kind, hint in hints:
        _print_words(console, Text.assemble((kind, "bold red"), f" hint: {hint}"))
    if hints:
        console.print()


def _machine(environment: Environment) -> list[str]:
    """Describe the machine and its software, a short line each."""
    cores = f"{environment.cores_usable} of {figures.plural(environment.cores_logical, 'core')} usable"
    memory = f"{figures.size(environment.memory_bytes)} memory"
    if environment.memory_limit_bytes is not None:
        memory += f" (limit {figures.size(environment.memory_limit_bytes)})"
    quota = f"quota {environment.cpu_quota:g} cores" if environment.cpu_quota is not None else None
    software = [
        f"torch {environment.torch}",
        f"torchvision {environment.torchvision}" if environment.torchvision else None,
        f"CUDA {environment.cuda}" if environment.cuda else None,
        f"cuDNN {environment.cudnn}" if environment.cudnn else None,
        f"driver {environment.driver}" if environment.driver else None,
        f"Python {environment.python}",
        f"commit {_short_commit(environment.git_commit)}" if environment.git_commit else None,
        f"bsprof {environment.bsprof}",
    ]
    accelerators = [_accelerator(accelerator) for accelerator in environment.accelerators] or ["no accelerator"]
    hardware = [environment.cpu, cores, quota, memory, environment.hypervisor, *accelerators]
    return [" · ".join(part for part in line if part) for line in (hardware, software)]


def _short_commit(commit: str) -> str:
    return commit[:10] + ("+" if commit.endswith("+") else "") if len(commit) > 11 else commit


def _accelerator(accelerator: Accelerator) -> str:
    parts = [f"{accelerator.kind}:{accelerator.index}", accelerator.name]
    if accelerator.memory_bytes is not None:
        parts.append(figures.size(accelerator.memory_bytes))
    if accelerator.capability:
        parts.append(f"capability {accelerator.capability}")
    return " ".join(parts)


def render_environment(environment: Environment, console: Console) -> None:
    """Print every field of an environment, one a line; a dash for what was not captured."""
    labels, values = [], []
    for field in msgspec.structs.fields(Environment):
        value = getattr(environment, field.name)
        label = field.name.removesuffix("_bytes").replace("_", " ")
        if field.name == "accelerators":
            lines = [_accelerator(one) + (f" {one.uuid}" if one.uuid else "") for one in value] or ["none"]
        elif field.name == "variables":
            lines = [f"{name}={text}" for name, text in sorted(value.items())] or ["none set"]
        elif field.name.endswith("_bytes") and value is not None:
            lines = [figures.size(value)]
        else:
            lines = [figures.setting(value)]
        labels += [label, *[""] * (len(lines) - 1)]
        values += lines
    width = max(map(len, labels)) + 2
    for label, text in zip(labels, values, strict=True):
        console.print(Text.assemble((f"{label:<{width}}", "bold"), text), highlight=False, soft_wrap=True)


def render_cases(cases: Sequence[Case], expected: str, console: Console) -> None:
    """Print what a sweep would measure, in the order in which it would, and the time it is expected to take."""
    varying = varying_axes(case.settings for case in cases)
    processes = len({case.process for case in cases})
    columns = [_column("", (str(index + 1) for index in range(len(cases)))), *_axis_columns(cases, varying)]
    if processes > 1:
        columns.append(_column("process", (str(case.process + 1) for case in cases)))
    _print_words(console, _caption(cases, [], varying), indent=0)
    console.print()
    if cases:
        _print_grid(console, columns, {}, 1)
        console.print()
    distinct = len({case.key for case in cases})
    total = figures.plural(distinct, "case") + (f" × {processes} processes" if processes > 1 else "")  # noqa: RUF001
    _print_words(console, f"{total}, expected to take {expected}")


def render_catalogue(entries: Iterable[tuple[str, str, str]], console: Console) -> None:
    """Print (kind, name, summary) entries, grouped by kind in order of appearance."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for kind, name, summary in entries:
        kinds.setdefault(kind, []).append((name, summary))
    width = max((len(name) for group in kinds.values() for name, _ in group), default=0)
    for index, (kind, group) in enumerate(kinds.items()):
        if index:
            console.print()
        console.print(Text(kind, "bold"))
        for name, summary in group:
            _print_line(console, Text.assemble("  ", (f"{name:<{width}}", "cyan"), f"  {summary}".rstrip()))


def render_selftest(checks: Sequence[Check], console: Console) -> None:
    """Print what was planted in each phase, what came back there, and what leaked elsewhere."""
    milliseconds = 1e6
    columns = [
        _column("planted in", (check.phase for check in checks), right=False),
        _column("planted ms", (f"{check.planted_ns / milliseconds:.3f}" for check in checks)),
        _column("found ms", (f"{check.found_ns / milliseconds:.3f}" for check in checks)),
        _column(
            "largest leak ms",
            (f"{check.leaked_ns / milliseconds:+.3f} into {check.leaked_into}" for check in checks),
        ),
        _column("residual ms", (f"{check.residual_ns / milliseconds:+.4f}" for check in checks)),
        _column("", (Text("ok", "green") if check.passed else Text("WRONG", "bold red") for check in checks)),
    ]
    _print_grid(console, columns, {}, 1)
    console.print()
    tolerance = max(check.tolerance_ns for check in checks) / milliseconds
    wrong = [check.phase for check in checks if not check.passed]
    verdict = (
        f"wrong in {', '.join(wrong)} (was the machine busy? try again when it is quiet)"
        if wrong
        else "every delay came back where it was planted"
    )
    _print_words(console, f"{verdict}, to within {tolerance:.3f} ms (the larger of 1 % and 0.1 ms)")
