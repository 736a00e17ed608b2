"""How cases are told apart: the caption says what they share, columns say what varies, letters point to notes."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from bsprof.metrics import CaseSummary, axis_values, varying_axes
from bsprof.model import AXES, Case, Facts, Settings
from bsprof.report import figures
from bsprof.report.grid import Column, column, print_grid, print_words

_MARKS = "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ"


def caption(cases: Sequence[Case], facts: Sequence[Facts], varying: Sequence[str]) -> Text:
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
        ("", {fact.dtype for fact in facts} - {None}),
        ("", {figures.plural(fact.threads, "thread") for fact in facts}),
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


def axis_columns(cases: Sequence[Case], varying: Sequence[str]) -> list[Column]:
    """One column an axis that varies; a user's loop, or a single case, goes by its name."""
    if not varying or any(case.settings is None for case in cases):
        return [column("case", (figures.case_name(case, varying) for case in cases), right=False)]
    return [
        column(
            AXES[name].info.column,
            (figures.axis_setting(name, getattr(case.settings, name)) for case in cases),
            right=AXES[name].type is int,
        )
        for name in varying
    ]


def render_cases(cases: Sequence[Case], expected: str, console: Console) -> None:
    """Print what a sweep would measure, in the order in which it would, and the time it is expected to take."""
    varying = varying_axes(case.settings for case in cases)
    processes = len({case.process for case in cases})
    columns = [column("", (str(index + 1) for index in range(len(cases)))), *axis_columns(cases, varying)]
    if processes > 1:
        columns.append(column("process", (str(case.process + 1) for case in cases)))
    print_words(console, caption(cases, [], varying), indent=0)
    console.print()
    if cases:
        print_grid(console, columns, {}, 1)
        console.print()
    distinct = len({case.key for case in cases})
    total = figures.plural(distinct, "case") + (f" × {processes} processes" if processes > 1 else "")  # noqa: RUF001
    print_words(console, f"{total}, expected to take {expected}")


def marks_of(cases: Sequence[CaseSummary]) -> dict[str, str]:
    """Return a mark for each code of note; one more than there are letters shares the last."""
    codes = list(dict.fromkeys(note.code for case in cases for note in case.notes))
    return {code: _MARKS[min(index, len(_MARKS) - 1)] for index, code in enumerate(codes)}


def case_marks(case: CaseSummary, marks: dict[str, str]) -> str:
    """Return the marks of a case's notes, each once."""
    codes = {note.code for note in case.notes}
    return "".join(dict.fromkeys(mark for code, mark in marks.items() if code in codes))
