"""The tables under a diagnosis: where a batch's time goes, what the step waits for, workers, samples, ready batches."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.text import Text

from bsprof.attribution import Row, WorkerRow, attribution, ready_depths, worker_rows
from bsprof.loading import MAIN, Diagnosis, Loading
from bsprof.report import figures
from bsprof.report.figures import MISSING
from bsprof.report.grid import Column, column, heading, is_captured, parts, print_grid, print_words, width_of

_BAR_WIDTH, _SHORTEST_BAR = 20, 5
_FEW_WORKERS = 8
"""So many, and each has a row; of more, the least, the middle and the most."""
_DEPTHS = 8
"""Rows of the histogram of ready batches."""
_SAMPLES = 8
_TIMES_SHOWN = 4
_LONGEST_NAME = 40


def short_name(name: str) -> str:
    """Return a name of the user's, cut at its end where it is very long, with nothing in it that steers a terminal."""
    name = figures.printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _with_bars(columns: Sequence[Column], shares: Iterable[float | None], width: int) -> list[Column]:
    """Return what was captured of columns, with shares drawn as bars behind them as wide as there is room for."""
    shown = [one for one in columns if is_captured(one)]
    room = min(width - width_of(shown) - 2, _BAR_WIDTH)
    if room < _SHORTEST_BAR:
        return shown
    bars = (Text("█" * round(min(max(share or 0.0, 0.0), 1.0) * room), "cyan") for share in shares)
    return [*shown, column("", bars, right=False)]


# --- where the time goes --------------------------------------------------------------------------------


def render_where(loading: Loading, console: Console) -> None:
    """Print where a mean batch's time goes: what its worker does, where it lies, what is done beside the consumer."""
    rows = [row for row in attribution(loading) if row.name not in _AWAITED_ROWS]
    if not rows:
        if loading.batches.epoch:
            print_words(console, Text("Where a batch's time goes is not captured: only next() was seen.", "dim"), 0)
            console.print()
        return
    rows = _with_sums(rows)
    firsts = {row.where: index for index, row in reversed(list(enumerate(rows)))}
    unit = figures.time_unit([max(row.wall_s for row in rows)])
    columns = [
        column("", (_WHERE[row.where] if firsts[row.where] == i else "" for i, row in enumerate(rows)), right=False),
        column("stage", (short_name(row.name) for row in rows), right=False),
        *(
            column(header, figures.column(values, unit.per_second))
            for header, values in (
                (unit.name, [row.wall_s for row in rows]),
                ("CPU", [row.cpu_s for row in rows]),
                ("run-queue", [row.runqueue_s for row in rows]),
                ("blocked", [row.blocked_s for row in rows]),
            )
        ),
        column("share", (figures.percent(row.share) for row in rows)),
    ]
    heading(console, "Where a batch's time goes", f"{unit.name} a mean batch")
    print_grid(console, _with_bars(columns, (row.share for row in rows), console.width), {}, 2)
    console.print()
    if legend := _legend(rows):
        print_words(console, Text(legend, "dim"))
        console.print()


_AWAITED_ROWS = ("production", "ordering", "hand-off")
"""Rows of the wait, which has a table of its own."""
_WHERE = {"worker": "making it", "queue": "lying there", "consumer": "taking it"}
_SUM = "together"


def _with_sums(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the sum of what a batch costs its worker behind these."""
    made = [row for row in rows if row.where == "worker"]
    if len(made) < 2:
        return list(rows)
    whole = Row(
        _SUM,
        "worker",
        sum(row.wall_s for row in made),
        _sum(row.cpu_s for row in made),
        _sum(row.runqueue_s for row in made),
        _sum(row.blocked_s for row in made),
    )
    return [*made, whole, *(row for row in rows if row.where != "worker")]


def _sum(values: Iterable[float | None]) -> float | None:
    """Return the sum; None where a part of it was not captured."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _legend(rows: Sequence[Row]) -> str:
    wheres = {row.where for row in rows}
    said = []
    if any(row.cpu_s is not None for row in rows):
        said.append("run-queue: it could run and waited for a core · blocked: the rest")
    if any(row.apportioned for row in rows):
        said.append("both apportioned as in the whole fetch")
    shares = [
        f"of {whole} ({_WHERE[where]})"
        for where, whole in (("worker", "the worker's time"), ("consumer", "the mean step"))
        if where in wheres
    ]
    if shares:
        said.append(f"share: {', '.join(shares)}")
    return " · ".join(said)


_UNTOLD = "not told"
_AWAITED = {
    "production": "no worker has made the batch yet",
    "ordering": "later ones came before it",
    "handoff": "it is made, and on its way",
    "epoch": "start and end of epochs, shared out among the steps and beside the rest",
    _UNTOLD: "it was not seen what went on",
}


def render_waits(diagnosis: Diagnosis, console: Console) -> None:
    """Print the wait of a mean step by what was awaited."""
    waits, step = dict(diagnosis.waits_s), diagnosis.step_s
    if diagnosis.wait_s and not any(name in waits for name in ("production", "ordering", "handoff")):
        waits[_UNTOLD] = diagnosis.wait_s
    if not any(waits.values()):
        return
    names = [*(name for name in _AWAITED if name in waits), *(name for name in waits if name not in _AWAITED)]
    labels = [name.replace("handoff", "hand-off") for name in names]
    unit = figures.time_unit([max(waits.values())])
    shares = [waits[name] / step if step else None for name in names]
    columns = [
        column("awaited", labels, right=False),
        column(unit.name, figures.column([waits[name] for name in names], unit.per_second)),
        column("of step", map(figures.percent, shares)),
    ]
    heading(console, "What a mean step waits for")
    print_grid(console, _with_bars(columns, shares, console.width), {}, 1)
    console.print()
    legend = [f"{label}: {_AWAITED[name]}" for name, label in zip(names, labels, strict=True) if name in _AWAITED]
    print_words(console, Text(" · ".join(legend), "dim"))
    console.print()


# --- workers --------------------------------------------------------------------------------------------


def render_workers(loading: Loading, console: Console) -> None:
    """Print a row for each worker, or the least, the middle and the most of many."""
    rows = [row for row in worker_rows(loading) if row.fetch_s is not None or row.private_bytes is not None]
    if not rows:
        return
    folded = len(rows) > _FEW_WORKERS
    labels = ["least", "middle", "most"] if folded else ["main" if row.id == MAIN else str(row.id) for row in rows]

    def values(get: Callable[[WorkerRow], float | None]) -> list[float | None]:
        every = [get(row) for row in rows]
        if not folded:
            return every
        known = [value for value in every if value is not None]
        return [min(known), statistics.median(known), max(known)] if known else [None] * len(labels)

    unit = figures.time_unit(row.fetch_s for row in rows)
    size = figures.byte_unit(row.private_bytes for row in rows)
    columns = [
        column("worker", labels, right=False),
        column("batches", map(_whole, values(lambda row: row.batches))),
        column(f"fetch {unit.name}", figures.column(values(lambda row: row.fetch_s), unit.per_second)),
        column("CPU", figures.column(values(lambda row: row.cpu_s), unit.per_second)),
        column("run-queue", figures.column(values(lambda row: row.runqueue_s), unit.per_second)),
        column("blocked", figures.column(values(lambda row: row.blocked_s), unit.per_second)),
        column(f"memory {size.name}", figures.column(values(lambda row: row.private_bytes), 1 / size.bytes)),
        column("MiB/min", map(_growth, values(lambda row: row.bytes_per_s))),
    ]
    alike = []
    for noun, get in _COUNTED:
        counts = values(get)
        if len(set(counts)) > 1:
            columns.append(column(f"{noun}s", map(_whole, counts)))
        elif counts[0] is not None and not (rows[0].id == MAIN and noun == "start"):
            alike.append(figures.plural(int(counts[0]), noun))
    alone = len(rows) == 1 and rows[0].id == MAIN
    heading(console, "Main thread" if alone else figures.plural(len(rows), "worker"))
    for part in parts(columns[:1], [one for one in columns[1:] if is_captured(one)], console.width):
        print_grid(console, part, {}, 1)
        console.print()
    said = []
    if folded:
        said.append("least, middle and most of each column by itself")
    if any(row.fetch_s is not None for row in rows):
        said.append("fetch: median of a batch")
    if any(row.cpu_s is not None for row in rows):
        said.append("CPU, run-queue, blocked: means")
    if any(row.private_bytes is not None for row in rows):
        said.append("memory: shared with no other process, at the end, and its growth")
    if alike:
        said.append(f"each: {', '.join(alike)}")
    print_words(console, Text(" · ".join(said), "dim"))
    for one in loading.workers:
        if one.ended == "died":
            print_words(console, Text.assemble(("! ", "yellow"), f"worker {one.id} (pid {one.pid}) died"))
    console.print()


_COUNTED: tuple[tuple[str, Callable[[WorkerRow], float | None]], ...] = (
    ("thread", lambda row: row.threads),
    ("core", lambda row: row.cores),
    ("start", lambda row: row.starts),
)
"""Columns where workers differ, and words where they do not."""


def _whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}"


def _growth(bytes_per_s: float | None) -> str:
    if bytes_per_s is None:
        return MISSING
    text = f"{bytes_per_s * 60 / 2**20:+.1f}"
    return "0" if text in ("+0.0", "-0.0") else text


# --- samples, and batches that are ready ------------------------------------------------------------------


def render_samples(loading: Loading, console: Console) -> None:
    """Print the slowest samples by index, with each time that they were made, and the quantiles of all."""
    samples = loading.samples
    if samples is None:
        return
    heading(console, "Slowest samples", f"of {samples.count}")
    slowest = sorted((one for one in samples.slowest if one.times_ns), key=lambda one: -max(one.times_ns))[:_SAMPLES]
    longest = [max(one.times_ns) * 1e-9 for one in slowest]
    unit = figures.time_unit(longest)
    middle = samples.quantiles_ns.get("p50", 0) * 1e-9
    if slowest:
        name = "place in stream" if loading.settings.style == "iterable" else "index"
        columns = [
            column(name, (short_name(one.index) for one in slowest), right=False),
            column("worker", ("main" if one.worker == MAIN else str(one.worker) for one in slowest)),
            column(f"longest {unit.name}", figures.column(longest, unit.per_second)),
            column("of median", (f"{figures.rate(time / middle)}×" if middle else MISSING for time in longest)),  # noqa: RUF001
            column("each time it was made", (_listed(one.times_ns, unit) for one in slowest), right=False),
        ]
        print_grid(console, columns, {}, 1)
        console.print()
    quantiles = [f"{name} {figures.duration(ns * 1e-9)}" for name, ns in samples.quantiles_ns.items()]
    said = ", ".join([f"mean {figures.duration(samples.mean_ns * 1e-9)}", *quantiles])
    print_words(console, Text(f"all samples: {said}", "dim"))
    console.print()


def _listed(times_ns: Sequence[int], unit: figures.TimeUnit) -> str:
    if len(times_ns) == 1:
        return "once"
    shown = figures.column([ns * 1e-9 for ns in times_ns[:_TIMES_SHOWN]], unit.per_second)
    return " ".join(shown) + (f" … ({len(times_ns)} times)" if len(times_ns) > _TIMES_SHOWN else "")


def render_depth(loading: Loading, console: Console) -> None:
    """Print how many batches were there whenever next() was called, as a histogram."""
    counts = Counter(ready_depths(loading))
    if not counts:
        return
    total, deepest = counts.total(), max(counts)
    wide = -(-(deepest + 1) // _DEPTHS)
    bins = {
        (low, min(low + wide - 1, deepest)): sum(counts[depth] for depth in range(low, low + wide)) / total
        for low in range(0, deepest + 1, wide)
    }
    columns = [
        column("ready", (str(low) if low == high else f"{low}–{high}" for low, high in bins)),  # noqa: RUF001
        column("of calls", map(figures.percent, bins.values())),
    ]
    heading(console, "Batches that were ready when next() was called")
    print_grid(console, _with_bars(columns, bins.values(), console.width), {}, 1)
    console.print()
