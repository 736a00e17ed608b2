"""Two results side by side, for a terminal, a pull request and a workflow's log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bsprof.compare import Absence, CaseComparison, Change, Comparison, Verdict, varying
from bsprof.report import figures
from bsprof.report.cases import axis_columns
from bsprof.report.figures import MISSING, amount, percent, plural
from bsprof.report.grid import column, heading, print_grid, print_words, width_of

_STYLES: dict[Verdict, str] = {
    "regressed": "bold red",
    "improved": "bold green",
    "unchanged": "green",
    "inconclusive": "yellow",
    "incomparable": "bold red",
}
_MARKS: dict[Verdict, str] = {
    "regressed": "🔴",
    "improved": "🟢",
    "unchanged": "⚪",
    "inconclusive": "🟡",
    "incomparable": "⛔",
}


# --- in words ---------------------------------------------------------------------------------------


def sentence(comparison: Comparison) -> str:
    """Return what came of it, in one sentence."""
    if comparison.refused:
        return f"Not compared: it is another machine ({'; '.join(comparison.refused)})."
    if not comparison.cases:
        return "Nothing was compared: no case has figures on both sides."
    counts = {verdict: sum(case.verdict == verdict for case in comparison.cases) for verdict in _STYLES}
    parts = [f"{count} {verdict}" for verdict, count in counts.items() if count]
    told = f"{plural(len(comparison.cases), 'case')}: {', '.join(parts)}"
    for absences, how in ((comparison.missing, "missing in the new"), (comparison.added, "new")):
        told += f"; {len(absences)} {how}" if absences else ""
    return f"{told}."


def method(comparison: Comparison) -> str:
    """Return how it was decided, in one sentence."""
    gate = comparison.gate
    how = "pair by pair, measured in turns" if comparison.paired else "processes against processes (Welch)"
    return (
        f"new / base, {how}, with its 95 % interval; a case regressed or improved where all of it lies beyond "
        f"{percent(gate.threshold)}, after correction for {plural(_decisions(comparison), 'figure')} (Holm), and is "
        "unchanged where all of it lies within; detectable: what would be found in 80 % of such comparisons."
    )


def _decisions(comparison: Comparison) -> int:
    return sum(len(case.gated) for case in comparison.cases)


def _shift(change: Change) -> str:
    return percent(change.ratio - 1, signed=True) if change.ratio != 1 else "0%"


def _interval(change: Change) -> str:
    if change.low is None or change.high is None:
        return MISSING
    return f"{percent(change.low - 1, signed=True)} … {percent(change.high - 1, signed=True)}"


class _Row(NamedTuple):
    """One line of the table: a figure of a case."""

    case: CaseComparison
    change: Change
    is_phase: bool

    @property
    def is_first(self) -> bool:
        """Whether it is the case's first line."""
        return self.change is self.case.gated[0]

    @property
    def label(self) -> str:
        return f"  {self.change.label}" if self.is_phase else self.change.label


def _rows(comparison: Comparison) -> list[_Row]:
    return [
        _Row(case, change, is_phase)
        for case in comparison.cases
        for is_phase, changes in ((False, case.gated), (True, case.phases))
        for change in changes
    ]


def _names(comparison: Comparison) -> list[str]:
    axes = varying(comparison)
    return [figures.case_name(case.case, axes) for case in comparison.cases]


# --- in a terminal ----------------------------------------------------------------------------------


def render(comparison: Comparison, console: Console) -> None:
    """Print a table with a row a figure, phases beneath their case, then what else must be known."""
    print_words(
        console, Text.assemble("base ", (comparison.base, "bold"), "  new ", (comparison.new, "bold")), indent=0
    )
    console.print()
    axes = varying(comparison)
    rows = _rows(comparison)
    if rows:
        named = [
            one._replace(cells=[cell if row.is_first else Text("") for cell, row in zip(one.cells, rows, strict=True)])
            for one in axis_columns([row.case.case for row in rows], axes)
        ]
        figure = column("", [row.label for row in rows], right=False)
        columns = [
            column("base", [amount(row.change.unit, row.change.base) for row in rows]),
            column("new", [amount(row.change.unit, row.change.new) for row in rows]),
            column("change", [_shift(row.change) for row in rows]),
            column("95 % interval", [_interval(row.change) for row in rows]),
            column("detectable", [percent(row.change.detectable) for row in rows]),
            column("verdict", [_verdict(row) for row in rows], right=False),
        ]
        for spared in ("detectable", "new", "base", "95 % interval"):
            if width_of([*named, figure, *columns]) > console.width:
                columns = [one for one in columns if one.header != spared]
        print_grid(console, [*named, figure, *columns], {}, 0)
        console.print()
        print_words(console, Text(method(comparison), "dim"))
        console.print()
    for name, case in zip(_names(comparison), comparison.cases, strict=True):
        for reason in case.refused:
            print_words(console, Text.assemble(("incomparable", "bold red"), f" {name}: {reason}"))
    for absence in comparison.missing:
        print_words(console, Text.assemble(("missing", "bold red"), f" {_absent(comparison, absence)}"))
    for absence in comparison.added:
        print_words(console, Text.assemble(("new", "bold"), f" {_absent(comparison, absence)} in the base"))
    for text in _notes(comparison):
        print_words(console, Text.assemble(("! ", "yellow"), text))
    if comparison.differences:
        heading(console, "what differs around it")
        for difference in comparison.differences:
            print_words(console, Text(difference, "dim"))
        console.print()
    style = _STYLES[comparison.verdict]
    print_words(console, Text(sentence(comparison), style), indent=0)


def _verdict(row: _Row) -> Text:
    return Text(row.change.verdict, "dim" if row.is_phase else _STYLES[row.change.verdict])


def _absent(comparison: Comparison, absence: Absence) -> str:
    return f"{figures.case_name(absence.case, varying(comparison))}: {absence.reason}"


def _notes(comparison: Comparison) -> Iterator[str]:
    """Yield each note once, with the cases it is of where they are not all."""
    told: dict[str, list[str]] = {}
    for name, case in zip(_names(comparison), comparison.cases, strict=True):
        for note in case.notes:
            told.setdefault(note.text, []).append(name)
    for text, names in told.items():
        every = len(names) == len(comparison.cases)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield text if every else f"{', '.join(names[:3])}{more}: {text}"


# --- in a pull request, and in a workflow's log -----------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """Return the same as a table that a pull request shows, phases folded away."""
    lines = [f"### bsprof: {_MARKS[comparison.verdict]} {sentence(comparison)}", ""]
    lines += [f"`{comparison.base}` → `{comparison.new}`", ""]
    rows = _rows(comparison)
    named = dict(zip(map(id, comparison.cases), _names(comparison), strict=True))
    gated = [row for row in rows if not row.is_phase]
    phases = [row for row in rows if row.is_phase]
    if gated:
        lines += [*_table(gated, named), ""]
    if phases:
        lines += ["<details><summary>phases</summary>", "", *_table(phases, named), "", "</details>", ""]
    for name, case in zip(_names(comparison), comparison.cases, strict=True):
        lines += [f"- ⛔ {figures.escaped(name)}: {figures.escaped(reason)}" for reason in case.refused]
    lines += [f"- missing: {figures.escaped(_absent(comparison, one))}" for one in comparison.missing]
    lines += [f"- new: {figures.escaped(_absent(comparison, one))} in the base" for one in comparison.added]
    lines += [f"- {figures.escaped(text)}" for text in _notes(comparison)]
    lines += [f"- {figures.escaped(text)}" for text in comparison.differences]
    if rows:
        lines += ["", f"<sub>{method(comparison)}</sub>"]
    return "\n".join(lines).rstrip()


def _table(rows: Sequence[_Row], named: dict[int, str]) -> list[str]:
    lines = [
        "| case | figure | base | new | change | 95 % interval | detectable | verdict |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        change = row.change
        cells = [
            named[id(row.case)],
            change.label,
            amount(change.unit, change.base),
            amount(change.unit, change.new),
        ]
        cells += [_shift(change), _interval(change), percent(change.detectable)]
        lines.append(f"| {' | '.join(map(figures.escaped, cells))} | {_MARKS[change.verdict]} {change.verdict} |")
    return lines


def commands(comparison: Comparison) -> Iterator[str]:
    """Yield GitHub's workflow commands: an error for what fails a gate, a warning for what is not decided."""
    if comparison.refused or not comparison.cases:
        yield _command("error", "bsprof: incomparable", sentence(comparison))
    for name, case in zip(_names(comparison), comparison.cases, strict=True):
        for reason in case.refused:
            yield _command("error", f"bsprof: {name} is incomparable", reason)
        for change in case.gated:
            kind = {"regressed": "error", "inconclusive": "warning", "improved": "notice"}.get(change.verdict)
            if kind is not None:
                text = (
                    f"{change.label} {_shift(change)} ({_interval(change)}): {amount(change.unit, change.base)} → "
                    f"{amount(change.unit, change.new)}; detectable {percent(change.detectable)}"
                )
                yield _command(kind, f"bsprof: {name} {change.verdict}", text)
    for absence in comparison.missing:
        yield _command("error", "bsprof: a case is missing", _absent(comparison, absence))
    yield sentence(comparison)


def _command(kind: str, title: str, text: str) -> str:
    """Return a workflow command, its text escaped as GitHub's own toolkit does."""
    plain = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    heading = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{kind} title={heading.replace(':', '%3A').replace(',', '%2C')}::{plain}"
