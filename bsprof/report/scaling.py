"""Several ranks as text: how much faster they are, where their step goes, and what larger worlds would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from bsprof import scaling
from bsprof.exchange import NOTABLE, Split
from bsprof.metrics import CaseSummary, varying_axes
from bsprof.model import Result
from bsprof.report import figures
from bsprof.report.cases import axis_columns
from bsprof.report.figures import MISSING, case_name, duration, percent
from bsprof.report.grid import Column, column, heading, is_captured, parts, print_grid, print_words, width_of
from bsprof.report.steps import stacked
from bsprof.scaling import Checked, Outlook, Scaled
from bsprof.stats import Estimate

_BAR = "where a step goes"
_PARTS: tuple[tuple[str, str, str, Callable[[Split], float | None]], ...] = (
    ("compute", "c", "green", lambda whole: whole.compute_s),
    ("communication", "x", "blue", lambda whole: whole.exposed_s),
    ("skew", "s", "red", lambda whole: whole.skew_s),
    ("loading", "l", "yellow", lambda whole: whole.loading_s),
)
"""The parts of a step: name, letter and colour in the bar, and where they stand in a Split."""

_EXPENDABLE = ("hidden", "bus GB/s", "exchanged", _BAR, "±", "step", "img/s", "late rank")
"""What is given up, one after the other, until the table fits: columns by how they begin, and intervals (`±`)."""
_FEW = 2
"""So many cases, and each has its skew told by phase; of more, those of the largest world alone."""


def render_scaling(result: Result, cases: Sequence[CaseSummary], console: Console) -> None:
    """Print cases of several ranks beside those of one, and what larger worlds would do; nothing without ranks."""
    rows = scaling.scaled(result, cases)
    if not rows:
        return
    varying = [name for name in varying_axes(row.case.settings for row in rows) if name != "world_size"]
    axes = axis_columns([row.case.case for row in rows], varying) if varying else []
    axes.append(column("world", (str(row.world) for row in rows)))
    strong = scaling.is_strong(result)
    same = "the same batch of all ranks together" if strong else "the same batch of each rank"
    heading(console, "Scaling", f"{'strong' if strong else 'weak'}: {same}")
    given_up = 0
    columns = _columns(rows, (), console)
    while width_of([*axes, *columns]) > console.width and given_up < len(_EXPENDABLE):
        given_up += 1
        columns = _columns(rows, _EXPENDABLE[:given_up], console)
    for part in parts(axes, columns, console.width):
        print_grid(console, part, {}, len(axes))
        console.print()
    print_words(console, Text(" · ".join(_legend(rows, {one.header for one in columns})), "dim"))
    _render_skews(rows, varying, console)
    console.print()
    for outlook in scaling.outlooks(result, rows):
        _render_outlook(outlook, varying, strong, console)


def _columns(rows: Sequence[Scaled], given_up: Sequence[str], console: Console) -> list[Column]:
    unit = figures.time_unit(row.case.value("step") for row in rows)
    intervals = "±" not in given_up
    size = figures.byte_unit(row.exchange.bytes if row.exchange else None for row in rows)
    columns = [
        column(f"step {unit.name}", figures.column([row.case.value("step") for row in rows], unit.per_second)),
        column("img/s", figures.column([row.case.value("throughput") for row in rows])),
        column("efficiency", (_efficiency(row, with_interval=intervals) for row in rows)),
        *_part_columns(rows, unit, with_interval=intervals),
        column(
            f"exchanged {size.name}",
            figures.column([row.exchange.bytes if row.exchange else None for row in rows], 1 / size.bytes),
        ),
        column("hidden", (percent(row.exchange.hidden if row.exchange else None) for row in rows)),
        column(
            "bus GB/s", figures.column([row.exchange.bus_bandwidth if row.exchange else None for row in rows], 1e-9)
        ),
        column("late rank", map(_late, rows), right=False),
        column(_BAR, (_bar(row.split, console) for row in rows), right=False),
    ]
    return [one for one in columns if is_captured(one) and not one.header.startswith(tuple(given_up))]


def _efficiency(row: Scaled, *, with_interval: bool) -> Text:
    found = row.efficiency
    if found is None:
        return Text(MISSING)
    text = Text(f"{found.value:.1%}", "bold")
    if not with_interval or found.low is None or found.high is None:
        return text
    return text.append(f" ±{max(found.high - found.value, found.value - found.low):.1%}", "not bold dim")


def _part_columns(rows: Sequence[Scaled], unit: figures.TimeUnit, *, with_interval: bool) -> list[Column]:
    columns = []
    for name, _, _, get in _PARTS:
        values = [get(row.split) if row.split else None for row in rows]
        has_sides = name == "communication" and with_interval
        columns.append(column(name, _times(values, [_side(row.exposed) if has_sides else None for row in rows], unit)))
    return columns


def _times(values: Sequence[float | None], sides: Sequence[float | None], unit: figures.TimeUnit) -> list[Text]:
    """Write times and the sides of their intervals, where they have any, with the same decimals for all."""
    scaled = [None if value is None else value * unit.per_second for value in values]
    margins = [None if side is None else side * unit.per_second for side in sides]
    places = max(figures.decimals(scaled), figures.decimals(margins, digits=2) if any(margins) else 0)
    widest = max((len(f" ±{margin:.{places}f}") for margin in margins if margin is not None), default=0)
    cells = []
    for value, margin in zip(scaled, margins, strict=True):
        cell = Text(MISSING if value is None else f"{value:.{places}f}")
        text = "" if margin is None or value is None else f"±{margin:.{places}f}"
        cells.append(cell.append(f"{text:>{widest}}" if widest and value is not None else "", "dim"))
    return cells


def _side(estimate: Estimate | None) -> float | None:
    return None if estimate is None or estimate.high is None else estimate.high - estimate.value


def _late(row: Scaled) -> Text:
    if row.late is None:
        # Of one rank there is none to be late, and where nothing was captured nothing is known.
        return Text("none" if row.skews else MISSING)
    return Text(f"{row.late.rank} {row.late.phase}", "yellow")


def _bar(whole: Split | None, console: Console) -> Text:
    if whole is None or not whole.step_s or whole.compute_s is None:
        return Text(MISSING)
    return stacked(((letter, colour, (get(whole) or 0.0) / whole.step_s) for _, letter, colour, get in _PARTS), console)


def _legend(rows: Sequence[Scaled], headers: set[str]) -> list[str]:
    bases = sorted({row.base.settings.world_size for row in rows if row.base and row.base.settings})
    said = []
    if bases:
        ends = {row.efficiency.between for row in rows if row.efficiency and row.efficiency.low is not None}
        of = " or ".join(map(str, bases))
        smallest = "" if bases == [1] else ", the smallest measured"
        said.append(f"efficiency: img/s a rank / img/s a rank in a world of {of}{smallest}")
        if ends:
            how = {True: "between processes", False: "within a process"}
            said[-1] += f", ± 95 % interval {' or '.join(how[end] for end in sorted(ends, reverse=True))}"
    names = [name for name, *_ in _PARTS if name in headers]
    if names:
        said.append(f"{', '.join(names)}: means, with their signs; they add up to the mean step")
    if "communication" in headers:
        said.append("communication: exposed, steps with an exchange - steps without")
    if "skew" in headers:
        said.append("skew: the slowest rank - mean of the ranks, without an exchange")
    if "loading" in headers:
        said.append("loading: mean stall of the ranks")
    if "compute" in headers:
        said.append("compute: the rest")
    if "hidden" in headers:
        said.append("hidden: share of the exchange beside which backward computed")
    if "bus GB/s" in headers:
        said.append("bus: 2 (p - 1) / p × bytes / time of the exchange")  # noqa: RUF001
    if "late rank" in headers:
        said.append("late rank: others wait for it, and its phase that takes longer")
    if _BAR in headers:
        said.append("bar: " + ", ".join(f"{letter} {name}" for name, letter, *_ in _PARTS))
    return said


def _render_skews(rows: Sequence[Scaled], varying: Sequence[str], console: Console) -> None:
    """Say of each phase what the rank with the longest takes more than the mean of all, where that is notable."""
    told = [row for row in rows if row.skews]
    largest = max((row.world for row in told), default=0)
    for row in told if len(told) <= _FEW else [row for row in told if row.world == largest]:
        least = NOTABLE * (row.case.value("step") or 0.0)
        named = [
            f"{phase}{' until the exchange' if phase == 'backward' else ''} {duration(value)}"
            for phase, value in row.skews.items()
            if value >= least
        ]
        if named:
            name = case_name(row.case.case, [*varying, "world_size"])
            print_words(console, Text(f"{name}: the longest of the ranks - their mean: {', '.join(named)}", "dim"))


# --- larger worlds --------------------------------------------------------------------------------------


def _render_outlook(outlook: Outlook, varying: Sequence[str], strong: bool, console: Console) -> None:
    """Print predictions with their intervals, and what the model they rest on said of a size that it had not seen."""
    start, worlds = outlook.start, outlook.worlds
    name = case_name(start.case.case, varying) if varying else ""
    heading(console, "Predicted for larger worlds" + (f": {name}" if name else ""), "not measured")
    if worlds:
        unit = figures.time_unit(one.step.value for one in worlds)
        exposed = figures.column([one.exposed_s for one in worlds], unit.per_second)
        columns = [
            column("world", (str(one.world) for one in worlds)),
            column(
                f"mean step {unit.name}",
                _times([one.step.value for one in worlds], [_side(one.step) for one in worlds], unit),
            ),
            column("img/s", figures.column([one.throughput for one in worlds])),
            column("efficiency", (percent(one.efficiency) for one in worlds)),
            column("communication", exposed),
        ]
        print_grid(console, [one for one in columns if is_captured(one)], {}, 1)
        console.print()
        batch = ", each rank with the batch that it has there" if strong else ""
        words = (
            f"from world {start.world}{batch}: compute, skew and loading as measured there, communication × the growth "  # noqa: RUF001
            "of the all-reduces; ± 95 % interval of the model and of the communication together"
        )
    else:
        words = "none: there is no exposed communication above zero that would grow"
    print_words(console, Text(f"{words} · {_model(outlook)}", "dim"))
    print_words(console, Text(_check(outlook.check), "dim" if outlook.check and outlook.check.holds else "yellow"))
    console.print()


def _model(outlook: Outlook) -> str:
    ring = outlook.ring
    beta = "unlimited" if ring.beta is None else figures.bandwidth(ring.beta)
    backend = outlook.start.exchange.backend if outlook.start.exchange else ""
    return (
        f"ring model of {figures.plural(outlook.points, 'all-reduce')} measured by {backend}: "
        f"latency {duration(ring.alpha_s)} a message, {beta}, scatter {percent(ring.scatter)}"
    )


def _check(check: Checked | None) -> str:
    if check is None:
        return "the model is not checked: too few sizes were measured to leave one out"
    low, high = (duration(end) for end in (check.predicted.low, check.predicted.high))
    verdict = "" if check.holds else "; the interval misses it, so do not rely on the prediction"
    return (
        f"check, without having seen it: all-reduce of {figures.size(check.bytes)} between {check.world} ranks "
        f"predicted {duration(check.predicted.value)} [{low}, {high}], measured {duration(check.measured)}, "
        f"error {percent(check.error, signed=True)}{verdict}"
    )
