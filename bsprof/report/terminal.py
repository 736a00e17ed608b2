"""Results as text: dense tables that fit the terminal and stay readable without colour."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from bsprof import store
from bsprof.metrics import CaseSummary, summarise, varying_axes
from bsprof.model import Result
from bsprof.report import figures, words
from bsprof.report.cases import caption, marks_of
from bsprof.report.cases import render_cases as render_cases
from bsprof.report.device import render_device
from bsprof.report.grid import heading, print_line, print_words
from bsprof.report.largest import render_largest
from bsprof.report.loading import render_loading, render_short
from bsprof.report.machine import machine_lines
from bsprof.report.machine import render_environment as render_environment
from bsprof.report.machine import render_selftest as render_selftest
from bsprof.report.scaling import render_scaling
from bsprof.report.steps import render_costs, render_steps

_PIPED_WIDTH = 120


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


def print_json(result: Result) -> None:
    """Write `result` to stdout. Raises OSError where that cannot be written."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "closed")
    sys.stdout.buffer.write(store.encode(result) + b"\n")
    sys.stdout.buffer.flush()


def render(result: Result, console: Console, *, sweep: bool = False) -> None:
    """Print a result: what was held constant, the tables, notes and failures, the machine, a paragraph of words.

    Fits `console.width` down to 80 columns; without colour where the console has none. `sweep` adds what the loader
    is predicted to deliver under other settings.
    """
    watched = [m.loading and not m.samples for m in result.measurements]
    if result.loader is not None or (watched and all(watched)):
        _render_loaders(result, console, sweep=sweep)
        return
    cases = summarise(result)
    varying = varying_axes(case.settings for case in cases)
    facts = [case.facts for case in cases if case.facts]
    print_words(console, caption([case.case for case in cases], facts, varying), indent=0)
    console.print()
    if result.largest_batches:
        render_largest(result, console)  # the tries themselves are too short to compare
    else:
        if cases:
            render_steps(cases, varying, console)
            render_costs(cases, varying, console)
            render_scaling(result, cases, console)
            render_device(cases, varying, result.ceilings, console)
            _render_diagnoses(result, varying, console, sweep=sweep)
        _render_notes(cases, varying, result, console)
        _render_hints(cases, console)
    for line in machine_lines(result.environment):
        print_words(console, Text(line, "dim"))
    if not result.largest_batches:
        console.print()
        for sentence in words.summary(result, cases):
            print_words(console, sentence)


def _render_loaders(result: Result, console: Console, *, sweep: bool) -> None:
    """Print each loader that was watched, how the watching ended where it failed, and the machine."""
    for measurement in result.measurements:
        if len(result.measurements) > 1:
            heading(console, measurement.case.key)
        outcome = measurement.outcome
        if outcome.kind != "ok":
            print_words(console, Text.assemble((outcome.kind, "bold red"), f" {outcome.message or ''}"), indent=0)
            if outcome.hint:
                print_words(console, Text.assemble(("hint", "bold"), f": {outcome.hint}"), indent=0)
            console.print()
        if measurement.loading and measurement.diagnosis:
            render_loading(
                measurement.loading,
                measurement.diagnosis,
                console,
                sweep=sweep,
                verifications=result.verifications,
            )
    for line in machine_lines(result.environment):
        print_words(console, Text(line, "dim"))


def _render_diagnoses(result: Result, varying: Sequence[str], console: Console, *, sweep: bool) -> None:
    """Print what is wrong with each case's loader: a line, or all of it where that was asked for."""
    found = [(m, m.diagnosis) for m in result.measurements if m.diagnosis and m.loading]
    if not found:
        return
    heading(console, "loader")
    for measurement, diagnosis in found:
        name = figures.case_name(measurement.case, varying)
        print_words(console, Text.assemble((f"{name}: " if name else "", "bold"), render_short(diagnosis)))
    console.print()
    if result.plan is None or result.plan.diagnose != "full":
        return
    for measurement, diagnosis in found:
        assert measurement.loading is not None
        heading(console, f"loader of {figures.case_name(measurement.case, varying) or 'the case'}")
        render_loading(measurement.loading, diagnosis, console, sweep=sweep)


def _render_notes(cases: Sequence[CaseSummary], varying: Sequence[str], result: Result, console: Console) -> None:
    marks = marks_of(cases)
    for code, mark in marks.items():
        noted = [(case, note.text) for case in cases for note in case.notes if note.code == code]
        which, text = noted[0]
        where = ""
        if len({text for _, text in noted}) > 1:
            where = f" ({figures.case_name(which.case, varying)}; like it in {len(noted) - 1} more)"
        print_words(console, Text.assemble((mark, "yellow"), f" {text}{where}"))
    for note in result.notes:
        print_words(console, Text.assemble(("! ", "yellow"), note.text))
    if marks or result.notes:
        console.print()


def _render_hints(cases: Sequence[CaseSummary], console: Console) -> None:
    """Print each hint once, however many cases failed in the same way."""
    outcomes = [one.outcome for case in cases for one in case.failures if one.outcome.hint]
    hints = dict.fromkeys((outcome.kind, outcome.hint) for outcome in outcomes)
    for kind, hint in hints:
        print_words(console, Text.assemble((kind, "bold red"), f" hint: {hint}"))
    if hints:
        console.print()


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
            print_line(console, Text.assemble("  ", (f"{name:<{width}}", "cyan"), f"  {summary}".rstrip()))
