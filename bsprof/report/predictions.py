"""What other settings of a loader would deliver, and whether a change did what was predicted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from bsprof.loading import Change, Diagnosis, LoaderSettings, Prediction, Rate, Verification
from bsprof.report import figures
from bsprof.report.figures import MISSING
from bsprof.report.grid import Column, column, heading, parts, print_grid, print_words, width_of


def arguments(change: Change) -> str:
    """Write a change as the arguments of a call: `num_workers=6, prefetch_factor=2`."""
    return ", ".join(f"{name}={value!r}" for name, value in change.items())


def speedup(rate: Rate) -> str:
    """Write a speed-up with its interval: `2.10× [1.80, 2.30]`."""  # noqa: RUF002 - the sign of multiplication
    text = f"{rate.value:.2f}×"  # noqa: RUF001
    return text if rate.low is None or rate.high is None else f"{text} [{rate.low:.2f}, {rate.high:.2f}]"


def render_verifications(verifications: Sequence[Verification], console: Console) -> None:
    """Print what each change was predicted and measured to do, side by side."""
    if not verifications:
        return
    heading(console, "Verified", "step time before / after the change, measured in turns")
    for one in verifications:
        verdict = Text("agree", "bold green") if one.agrees else Text("DISAGREE", "bold red")
        rounds = figures.plural(min(len(one.before_s), len(one.after_s)), "round")
        print_words(console, Text(arguments(one.change), "bold"))
        compared = (f"predicted {speedup(one.predicted)} · measured {speedup(one.measured)} · they ", verdict)
        print_words(console, Text.assemble(*compared), indent=5)
        if one.before_s and one.after_s:
            before, after = statistics.fmean(one.before_s), statistics.fmean(one.after_s)
            steps = f"{figures.duration(before)} → {figures.duration(after)} a step, {rounds}"
            print_words(console, Text(steps, "dim"), indent=5)
    console.print()


def render_sweep(settings: LoaderSettings, diagnosis: Diagnosis, console: Console) -> None:
    """Print predicted throughput, workers down and prefetch across; a matrix for each order."""
    predictions = diagnosis.predictions
    if not predictions:
        return
    unit = "samples/s" if all(one.samples_per_s is not None for one in predictions) else "batches/s"
    orders = sorted({one.in_order for one in predictions}, reverse=True)
    for in_order in orders:
        made = [one for one in predictions if one.in_order == in_order]
        which = "" if len(orders) == 1 else (", in order" if in_order else ", in any order (in_order=False)")
        heading(console, f"Predicted {unit} by workers and prefetch{which}")
        for part in _matrix(made, settings, diagnosis.best, unit, console.width):
            print_grid(console, part, {}, 1)
            console.print()
    said = ["± the longer side of the 95 % interval", "m: as measured", "*: the smallest within 2% of the best"]
    if any(not one.workers for one in predictions):
        said.append("without workers there is no prefetch")
    print_words(console, Text(" · ".join(said), "dim"))
    console.print()


def _matrix(
    made: Sequence[Prediction], settings: LoaderSettings, best: Prediction | None, unit: str, width: int
) -> Iterator[list[Column]]:
    """Yield the columns of as many grids as `width` asks for; without intervals where that saves a second one."""
    workers = sorted({one.workers for one in made})
    prefetches: list[int | None] = [*sorted({one.prefetch for one in made if one.workers and one.prefetch is not None})]
    prefetches = prefetches or [None]
    # Without workers there is no prefetch: such a setting stands in the first column.
    cells = {(one.workers, one.prefetch if one.workers else prefetches[0]): one for one in made}
    rates = {key: _rate(one, unit) for key, one in cells.items()}
    places = figures.decimals(rate.value for rate in rates.values())
    widest = max((len(f"{_longer_side(rate):.{places}f}") for rate in rates.values()), default=0)

    def cell(workers: int, prefetch: int | None, *, sides: bool) -> Text:
        one, rate = cells.get((workers, prefetch)), rates.get((workers, prefetch))
        if one is None or rate is None:
            return Text()
        is_best = best is not None and _place(one) == _place(best)
        text = Text(f"{rate.value:.{places}f}", "bold" if is_best else "")
        if sides:
            text.append(f" ±{_longer_side(rate):>{widest}.{places}f}", "dim")
        mark = ("m" if is_measured(one, settings) else "") + ("*" if is_best else "")
        return text.append(f" {mark}".ljust(3), "yellow")

    def columns(*, sides: bool) -> list[Column]:
        return [
            column(
                (MISSING if prefetch is None else f"prefetch {prefetch}" if place == 0 else str(prefetch)) + "   ",
                (cell(count, prefetch, sides=sides) for count in workers),
            )
            for place, prefetch in enumerate(prefetches)
        ]

    axis = column("workers", map(str, workers))
    shown = columns(sides=True)
    if width_of([axis, *shown]) > width:
        shown = columns(sides=False)
    yield from parts([axis], shown, width)


def is_measured(one: Prediction, settings: LoaderSettings) -> bool:
    """Whether a prediction is for the settings that the loader has."""
    if one.workers != settings.workers:
        return False
    return not one.workers or (one.prefetch == settings.prefetch and one.in_order == (settings.in_order is not False))


def _place(one: Prediction) -> tuple[int, int | None, bool]:
    return one.workers, one.prefetch if one.workers else None, one.in_order


def _rate(one: Prediction, unit: str) -> Rate:
    """Return the rate of a prediction; its interval is that of the speed-up."""
    value = one.samples_per_s if unit == "samples/s" else None
    if value is None:
        value = 1 / one.step_s if one.step_s else 0.0
    base = value / one.speedup if one.speedup else 0.0
    return Rate(value=value, low=base * one.speedup_low, high=base * one.speedup_high)


def _longer_side(rate: Rate) -> float:
    low, high = rate.value if rate.low is None else rate.low, rate.value if rate.high is None else rate.high
    return max(rate.value - low, high - rate.value)
