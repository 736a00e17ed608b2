"""The history of each case, for a terminal and for a page: its segments, the last drift, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bsprof.history import CaseHistory, History, Segment, Shift, Verdict, varying
from bsprof.metrics import Unit
from bsprof.report import figures
from bsprof.report.cases import axis_columns
from bsprof.report.figures import MISSING, amount, percent, plural
from bsprof.report.grid import column, print_grid, print_words, width_of
from bsprof.stats import SHORTEST_SEGMENT

_STYLES: dict[Verdict, str] = {
    "incomparable": "bold red",
    "regressed": "bold red",
    "inconclusive": "yellow",
    "improved": "bold green",
    "steady": "green",
}
_MARKS: dict[Verdict, str] = {
    "incomparable": "⛔",
    "regressed": "🔴",
    "inconclusive": "🟡",
    "improved": "🟢",
    "steady": "⚪",
}


# --- in words ---------------------------------------------------------------------------------------


def sentence(told: History) -> str:
    """Return what came of it, in one sentence."""
    if told.results == 1:
        return f"One result, of {told.until}: a history begins with the next."
    if not told.cases:
        return f"The newest result, of {told.until}, has no case with figures."
    counts = {verdict: sum(case.verdict == verdict for case in told.cases) for verdict in _STYLES}
    parts = [f"{count} {_word(verdict, told.unit)}" for verdict, count in counts.items() if count]
    return f"{plural(len(told.cases), 'case')}: {', '.join(parts)}."


def method(told: History) -> str:
    """Return how it was decided, in one sentence."""
    worse, better = (_word(verdict, told.unit) for verdict in ("regressed", "improved"))
    return (
        f"{told.label} of {told.results} results; change: from the segment before, with its 95 % interval; {worse} or "
        f"{better} where all of the interval of the last steps in one direction lies beyond "
        f"{percent(told.threshold)}, after correction for {plural(len(told.cases), 'case')} (Holm)."
    )


def _word(verdict: Verdict, unit: Unit) -> str:
    """Return a verdict as it is read: what takes time drifts slower, what takes memory drifts worse."""
    is_speed = unit in ("s", "1/s")
    match verdict:
        case "regressed":
            return "drifted slower" if is_speed else "drifted worse"
        case "improved":
            return "drifted faster" if is_speed else "drifted better"
    return verdict


def _notes(told: History) -> Iterator[str]:
    """Yield what the table does not say: drifts of several steps, histories too short, cases that ended."""
    axes = varying(told)
    for case in told.cases:
        name = figures.case_name(case.case, axes)
        if case.drift is not None and case.drift.steps > 1:
            change = case.drift.change
            yield (
                f"{name}: {_percent(change.ratio)} ({_interval(change)}) since {case.drift.since}, in "
                f"{case.drift.steps} steps"
            )
    short = [case for case in told.cases if case.results < 2 * SHORTEST_SEGMENT and not case.refused]
    if short:
        whose = "" if len(short) == len(told.cases) else f" of {plural(len(short), 'case')}"
        yield f"no step can be told yet{whose}: that takes {2 * SHORTEST_SEGMENT} results, {SHORTEST_SEGMENT} behind it"
    for absence in told.ended:
        yield f"{figures.case_name(absence.case, axes)}: {absence.reason}"


# --- the table --------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One line of the table: a segment of a case."""

    case: CaseHistory
    segment: Segment

    @property
    def is_first(self) -> bool:
        return self.segment is self.case.segments[0]

    @property
    def verdict(self) -> Verdict | None:
        """The case's, beside its newest segment."""
        return self.case.verdict if self.segment is self.case.segments[-1] else None


def _rows(told: History) -> list[_Row]:
    return [_Row(case, segment) for case in told.cases for segment in case.segments]


def _since(rows: Sequence[_Row]) -> list[str]:
    """Return when each segment began: the day, and the time too where some case's segments share a day."""
    for length in (10, 16):
        texts = [row.segment.since[:length].replace("T", " ") for row in rows]
        distinct = {(id(row.case), text) for row, text in zip(rows, texts, strict=True)}
        if len(distinct) == len(rows):
            return texts
    return [row.segment.since.replace("T", " ") for row in rows]


def _percent(ratio: float) -> str:
    return percent(ratio - 1, signed=True) if ratio != 1 else "0%"


def _shift(change: Shift | None) -> str:
    return MISSING if change is None else _percent(change.ratio)


def _interval(change: Shift | None) -> str:
    if change is None or change.low is None or change.high is None:
        return MISSING
    return f"{_percent(change.low)} … {_percent(change.high)}"


def render(told: History, console: Console) -> None:
    """Print a row a segment, cases one after another, then what else must be known; of one result a line alone."""
    if told.results == 1:
        print_words(console, sentence(told), indent=0)
        return
    rows = _rows(told)
    if rows:
        named = [
            one._replace(cells=[cell if row.is_first else Text("") for cell, row in zip(one.cells, rows, strict=True)])
            for one in axis_columns([row.case.case for row in rows], varying(told))
        ]
        columns = [
            column("since", _since(rows), right=False),
            column("results", [str(row.segment.results) for row in rows]),
            column(told.label, [amount(told.unit, row.segment.value) for row in rows]),
            column("change", [_shift(row.segment.change) for row in rows]),
            column("95 % interval", [_interval(row.segment.change) for row in rows]),
            column("verdict", [_verdict(row, told.unit) for row in rows], right=False),
        ]
        for spared in ("results", "95 % interval"):
            if width_of([*named, *columns]) > console.width:
                columns = [one for one in columns if one.header != spared]
        print_grid(console, [*named, *columns], {}, 0)
        console.print()
        print_words(console, Text(method(told), "dim"))
        console.print()
    for name, reason in _refusals(told):
        print_words(console, Text.assemble(("incomparable", "bold red"), f" {name}: {reason}"))
    for text in _notes(told):
        print_words(console, Text.assemble(("! ", "yellow"), text))
    print_words(console, Text(sentence(told), _STYLES[told.verdict]), indent=0)


def _verdict(row: _Row, unit: Unit) -> Text:
    return Text("") if row.verdict is None else Text(_word(row.verdict, unit), _STYLES[row.verdict])


def _refusals(told: History) -> list[tuple[str, str]]:
    axes = varying(told)
    return [(figures.case_name(case.case, axes), reason) for case in told.cases for reason in case.refused]


def markdown(told: History) -> str:
    """Return the same as a table for a page."""
    if told.results == 1:
        return sentence(told)
    axes = varying(told)
    rows = _rows(told)
    lines = [f"### bsprof: {_MARKS[told.verdict]} {sentence(told)}", ""]
    if rows:
        lines += [
            f"| case | since | results | {figures.escaped(told.label)} | change | 95 % interval | verdict |",
            "|---|---|--:|--:|--:|--:|---|",
        ]
    for row, since in zip(rows, _since(rows), strict=True):
        segment = row.segment
        name = figures.case_name(row.case.case, axes) if row.is_first else ""
        cells = [name, since, str(segment.results), amount(told.unit, segment.value)]
        cells += [_shift(segment.change), _interval(segment.change)]
        verdict = "" if row.verdict is None else f"{_MARKS[row.verdict]} {_word(row.verdict, told.unit)}"
        lines.append(f"| {' | '.join(map(figures.escaped, cells))} | {verdict} |")
    lines += ["", *(f"- ⛔ {figures.escaped(f'{name}: {reason}')}" for name, reason in _refusals(told))]
    lines += [f"- {figures.escaped(text)}" for text in _notes(told)]
    if rows:
        lines += ["", f"<sub>{method(told)}</sub>"]
    return "\n".join(lines).rstrip()
