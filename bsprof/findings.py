"""What follows from metrics: of one case, and of cases that differ in a single axis.

Everything here is derived from `CaseSummary`s alone and can be derived again from a saved result. Where what a finding
needs was not captured, there is none (`None` or an empty list); no finding is made from a missing figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bsprof import stats
from bsprof.metrics import CaseSummary
from bsprof.model import AXES, Settings
from bsprof.stats import Estimate

LAUNCH_BOUND_BUSY = 0.7
"""A phase's kernels run for less of its time on the device than this. The profiler lengthens short kernels by some
per cent and the steps it sees are others than the timed ones, so that a share near 1 proves nothing; a third of the
time idle does."""
LAUNCH_BOUND_HOST = 0.9
"""And the host is in that phase for more of this time: it is the host that the device waits for. A host that runs
ahead is done in a fraction of it."""
JUDGED = 0.05
"""A phase below this share of the mean step is not judged: mending it would gain nothing worth having."""
FEWEST_BATCHES = 3
"""Batch sizes that a line needs before its scatter is known, and so an interval."""


def alike(a: Settings | None, b: Settings | None, but: str) -> bool:
    """Whether two settings agree in all axes but one; where an axis means nothing in one of them, that is none."""

    def agree(name: str) -> bool:
        values = getattr(a, name), getattr(b, name)
        return values[0] == values[1] or (AXES[name].info.needs is not None and None in values)

    return a is not None and b is not None and all(name == but or agree(name) for name in AXES)


def fastest(cases: Sequence[CaseSummary]) -> CaseSummary | None:
    """Return the case of highest throughput; of the shortest step where batch sizes are not known."""
    usable = [case for case in cases if case.ok and case["step"] is not None]
    if all(case.value("throughput") is not None for case in usable):
        return max(usable, key=lambda case: case.value("throughput") or 0.0, default=None)
    return min(usable, key=lambda case: case.value("step") or 0.0, default=None)


def differ(a: CaseSummary, b: CaseSummary, key: str) -> bool:
    """Whether two intervals are disjoint; without both intervals nothing is claimed."""
    first, second = a.interval(key), b.interval(key)
    return first is not None and second is not None and (first[1] < second[0] or second[1] < first[0])


# --- who waits for whom -----------------------------------------------------------------------------------


class Launching(NamedTuple):
    """How the host's launches and the device's work compare in the phases that compute: all but `data` and `h2d`."""

    phases: tuple[str, ...]
    """Those that are launch-bound; none is a finding as well."""
    whole: bool
    """Whether the step is, all its computing phases taken together."""
    busy_share: float
    """Time in which a kernel or copy of theirs ran, of their time on the device."""
    host_share: float
    """Time that the host was in them, of their time on the device."""


def launching(case: CaseSummary) -> Launching | None:
    """Judge whether the device waits for the host to launch work; `None` where it was not captured.

    A phase is launch-bound where busy < 70 % of its time on the device and host > 90 % of it: the device idles, and the
    host is there all along. `data` is left out, so that a stall is never taken for slow launching, and so is `h2d`,
    whose copy may make the host wait. Device and host times are those of the timed window, busy time is that of the
    profiled steps.
    """
    found: dict[str, tuple[float, float, float]] = {}
    for phase in case.phases:
        busy, elapsed, host = (case.value(f"{phase}.{what}") for what in ("busy", "device", "host"))
        if phase not in ("data", "h2d") and busy is not None and host is not None and elapsed:
            found[phase] = busy, elapsed, host
    if not found:
        return None

    def bound(busy: float, elapsed: float, host: float) -> bool:
        return busy < LAUNCH_BOUND_BUSY * elapsed and host > LAUNCH_BOUND_HOST * elapsed

    judged = {phase: times for phase, times in found.items() if (case.value(f"{phase}.share") or 0.0) >= JUDGED}
    busy, elapsed, host = (sum(column) for column in zip(*found.values(), strict=True))
    return Launching(
        phases=tuple(phase for phase, times in judged.items() if bound(*times)),
        whole=bound(busy, elapsed, host),
        busy_share=busy / elapsed,
        host_share=host / elapsed,
    )


# --- what cuDNN's search costs ----------------------------------------------------------------------------


class PayBack(NamedTuple):
    """Two cases that differ in `cudnn_benchmark` alone: what the search cost, and when it has paid."""

    off: CaseSummary
    on: CaseSummary
    cost_s: float
    """Warm-up cost with the search less that without, signed."""
    saved_s: float
    """Median step without less that with, signed."""
    sure: bool
    """Whether the intervals of the two steps are clear of each other."""
    steps: float | None
    """Steps until the search has paid; null where no step is surely shorter for it."""


def paybacks(cases: Sequence[CaseSummary]) -> list[PayBack]:
    """Return every pair of measured cases that differ in `cudnn_benchmark` alone.

    Both run N steps in `warmup_excess + N * step`, where the excess is the warm-up less as many steady steps (a
    warm-up step trains as well, so only what it takes longer is a cost). They are even at
    N = (excess on - excess off) / (step off - step on).
    """
    pairs = []
    for off in cases:
        for on in cases:
            if off.settings is None or on.settings is None or not alike(off.settings, on.settings, "cudnn_benchmark"):
                continue
            if off.settings.cudnn_benchmark is not False or on.settings.cudnn_benchmark is not True:
                continue
            steps = [case.value("step") for case in (off, on)]
            costs = [case.value("warmup_excess") for case in (off, on)]
            if off.ok and on.ok and None not in (*steps, *costs):
                cost, saved = (costs[1] or 0.0) - (costs[0] or 0.0), (steps[0] or 0.0) - (steps[1] or 0.0)
                sure = differ(off, on, "step")
                pairs.append(
                    PayBack(off, on, cost, saved, sure, max(cost, 0.0) / saved if sure and saved > 0 else None)
                )
    return pairs


# --- what larger batches would take -----------------------------------------------------------------------


class Growth(NamedTuple):
    """How memory grows with the batch, by a line through cases that differ in `batch_size` alone."""

    cases: tuple[CaseSummary, ...]
    """By batch size."""
    a_sample: float
    """Bytes that one more sample takes."""
    batch_size: int
    """Twice the largest measured."""
    peak: Estimate
    """Peak memory that it would take, with a 95 % prediction interval where three batch sizes or more are known."""
    limit: int | None
    """Bytes that there are for it: the device's memory less what others hold."""
    largest: Estimate | None
    """Batch size at which the line meets `limit`."""


def memory_growth(cases: Sequence[CaseSummary]) -> list[Growth]:
    """Return how peak memory grows in each family of three or more batch sizes that differ in nothing else.

    Allocated memory is fitted, not reserved: what the allocator holds beside it is rounded up and has a history.
    """
    left = [case for case in cases if case.ok and case.settings and case["peak_memory"] is not None]
    families = []
    while left:
        family = [case for case in left if alike(left[0].settings, case.settings, "batch_size")]
        left = [case for case in left if case not in family]
        families.append(sorted(family, key=_batch))
    return [growth for family in families if (growth := _growth(family)) is not None]


def _growth(family: Sequence[CaseSummary]) -> Growth | None:
    batches = [_batch(case) for case in family]
    line = stats.fit_line(batches, [case.value("peak_memory") or 0.0 for case in family])
    if len(set(batches)) < FEWEST_BATCHES or line is None:
        return None
    a_sample = line.slope
    memory = next((reading.memory for case in family for reading in case.readings if reading.memory), None)
    limit = memory.total - (memory.outside or 0) if memory and memory.total is not None else None
    largest = line.solve(limit) if limit is not None and a_sample > 0 else None
    return Growth(tuple(family), a_sample, 2 * batches[-1], line.at(2 * batches[-1]), limit, largest)


def _batch(case: CaseSummary) -> int:
    return case.settings.batch_size if case.settings else 0


# --- what was asked, and what was in force ----------------------------------------------------------------


class Disagreement(NamedTuple):
    """A switch that was not in force as it was asked."""

    axis: str
    asked: bool
    in_force: str | bool


def disagreements(case: CaseSummary) -> list[Disagreement]:
    """Return the switches that torch, read back after the timed window, had otherwise than the settings asked."""
    settings, backends = case.settings, case.backends
    if settings is None or backends is None:
        return []
    in_force: dict[str, str | bool] = {
        "cudnn_benchmark": backends.cudnn_benchmark,
        "cudnn_deterministic": backends.cudnn_deterministic,
        "deterministic_algorithms": backends.deterministic_algorithms,
    }
    found = []
    for axis, value in in_force.items():
        asked = getattr(settings, axis)
        if asked is not None and asked != (value if isinstance(value, bool) else value == "on"):
            found.append(Disagreement(axis, asked, value))
    return found
