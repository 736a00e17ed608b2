"""The largest batch that fits: found by trying, each batch in a process of its own.

What a batch needs depends on the algorithms that a library picks for it, so nothing but a training that survives shows
that it fits. The search doubles until a batch fails and then closes in between the largest that fitted and the smallest
that failed. The line through the peaks of those that fitted tells it where to look, never what to answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from bsprof import stats
from bsprof.errors import BsprofError
from bsprof.model import (
    TOO_LARGE,
    Case,
    LargestBatch,
    LargestBatchSearch,
    Measurement,
    Memory,
    Plan,
    Settings,
    Stop,
    case_key,
)
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.runner import UNFINISHED, Executor, Log, Swept, Watcher, sweep

START = 8
"""The first batch tried. Smaller ones need what the optimizer needs, whatever their size."""
EXACT_BELOW = 64
"""Batches below are found to the sample, larger ones to this part of their size."""

_LINE_POINTS = 3
"""The search aims by the line through this many of the largest batches that fitted."""
_FAR = 4
"""A line is not trusted beyond so many times the largest batch that fitted: its claim is tested on the way first."""
_ON_THE_WAY = 0.4
"""Where on the way. Below half, so that the test becomes one of the points of `predicted`."""
_FARTHEST = 16
"""However flat a line is, no more than so many times the largest batch that fitted is tried."""
_PLAIN_EVERY = 4
"""One try in so many doubles or halves whatever the line says, so that a line that misleads costs no more than that."""


class Searched(NamedTuple):
    """What was measured on the way, and what was found for each combination, in the order of the cases."""

    swept: Swept
    found: list[LargestBatch]


def search(
    cases: Sequence[Case],
    plan: Plan,
    executor: Executor,
    log: Log,
    watcher: Watcher,
    stop: Interruption,
    done: Sequence[Measurement] = (),
) -> Searched:
    """Search the largest batch for the settings of each case, whose own `batch_size` means nothing.

    What is `done` already is not tried again, and the search goes on as if it had never stopped, for the next batch
    follows from what was tried and from nothing else. `stop`, once requested, ends it with what there is.
    """
    assert plan.largest_batch is not None
    trying = probe_plan(plan)
    measurements: list[Measurement] = []
    found: list[LargestBatch] = []
    failure: BsprofError | None = None
    for case in cases:
        assert case.settings is not None
        tried = _tried(case.settings, done)
        measurements.extend(tried.values())
        while not (stop.requested or failure) and (batch := next_batch(tried, plan.largest_batch.most)) is not None:
            probe = msgspec.structs.replace(case.settings, batch_size=batch)
            swept = sweep([Case(key=case_key(probe), settings=probe)], trying, executor, log, watcher, stop)
            measurements.extend(swept.measurements)
            failure = swept.failure
            if not (finished := _tried(case.settings, swept.measurements)):
                break
            tried |= finished
        found.append(_conclude(case.settings, plan.largest_batch, tried))
    return Searched(Swept(measurements, stop.requested, failure), found)


def probe_plan(plan: Plan) -> Plan:
    """Return the plan of one try: the steps to survive lie in the timed window, however the step times scatter."""
    assert plan.largest_batch is not None
    # As many bare steps run beside the instrumented ones, and those of the warm-up before them.
    steps = max(2, math.ceil(plan.largest_batch.steps / 2))
    # What takes longer than the deadline ends as a time-out; it never counts as survived after fewer steps.
    stop = Stop(precision=0.999, min_steps=steps, max_steps=steps, max_case_time_s=plan.deadline_s)
    return msgspec.structs.replace(plan, stop=stop, repeat=1, serialised_steps=0, profile_steps=0, telemetry_hz=0.0)


def next_batch(tried: Mapping[int, Measurement], most: int) -> int | None:
    """Return the batch to try after those `tried`, by batch size; None when the search is at its end.

    It ends when the smallest batch that failed is the next one behind the largest that fitted, or within 1/64 of it
    from 64 on; when `most` fitted; and when a batch failed for another reason than memory. No batch comes twice.
    """
    if any(m.outcome.kind not in ("ok", *TOO_LARGE) for m in tried.values()):
        return None
    largest, failed = _bracket(tried)
    gap = _gap(largest)
    aim = _aim(tried) if len(tried) % _PLAIN_EVERY != _LINE_POINTS - 1 else None
    if failed is None:
        if largest >= most:
            return None
        if aim is None:
            wanted = 2 * largest or START
        elif aim > _FAR * largest:
            wanted = min(_FARTHEST * largest, math.ceil(aim * _ON_THE_WAY))
        else:
            wanted = max(aim, largest + gap)
        return min(wanted, most)
    if failed - largest <= gap:
        return None
    if aim is None or failed - largest <= 2 * gap:
        return (largest + failed) // 2
    wanted = min(max(aim, largest + gap), failed - gap)
    beside = any(0 < largest - batch <= 2 * gap or 0 < batch - failed <= 2 * gap for batch in tried)
    if beside and wanted in (largest + gap, failed - gap):
        return (largest + failed) // 2  # one step aside was not enough: the line is off
    return wanted


def _peak(memory: Memory) -> int:
    """Return the peak that a limit is held against: what the allocator reserved, where it tells."""
    return memory.allocated_peak if memory.reserved_peak is None else memory.reserved_peak


def _tried(settings: Settings, measurements: Sequence[Measurement]) -> dict[int, Measurement]:
    """Return those of `measurements` that are finished and have these settings, by batch size."""
    found = {}
    for measurement in measurements:
        theirs = measurement.case.settings
        if theirs is None or measurement.outcome.kind in UNFINISHED:
            continue
        if msgspec.structs.replace(theirs, batch_size=settings.batch_size) == settings:
            found[theirs.batch_size] = measurement
    return found


def _bracket(tried: Mapping[int, Measurement]) -> tuple[int, int | None]:
    """Return the largest batch that fitted, or 0, and the smallest beyond it that was too large, or None."""
    largest = max((batch for batch, m in tried.items() if m.outcome.kind == "ok"), default=0)
    failed = min((batch for batch, m in tried.items() if m.outcome.kind in TOO_LARGE and batch > largest), default=None)
    return largest, failed


def _gap(batch: int) -> int:
    return max(1, batch // EXACT_BELOW)


def _peaks(tried: Mapping[int, Measurement]) -> dict[int, int]:
    """Return the peaks of the batches that fitted, smallest batch first."""
    return {
        batch: _peak(memory)
        for batch, m in sorted(tried.items())
        if m.outcome.kind == "ok" and (memory := m.memory) is not None
    }


def _available(tried: Mapping[int, Measurement]) -> int | None:
    """Return what the largest batch that fitted was allowed, in bytes."""
    told = {batch: m.memory.total for batch, m in tried.items() if m.outcome.kind == "ok" and m.memory is not None}
    return told[max(told)] if told else None


def _aim(tried: Mapping[int, Measurement]) -> int | None:
    """Return the batch at which the line through the largest peaks reaches what is available; None without one."""
    points = list(_peaks(tried).items())[-_LINE_POINTS:]
    solved = _solve(points, _available(tried)) if len(points) == _LINE_POINTS else None
    return None if solved is None else math.floor(min(solved.value, 2**62))


def _solve(points: Sequence[tuple[int, int]], available: int | None) -> stats.Estimate | None:
    if available is None or not points:
        return None
    line = stats.fit_line(*zip(*points, strict=True))
    return line.solve(available) if line is not None and line.slope > 0 else None


def _conclude(settings: Settings, asked: LargestBatchSearch, tried: Mapping[int, Measurement]) -> LargestBatch:
    """Return what the tries say, and beside it what the line said that had seen no batch above half of the answer."""
    largest, failed = _bracket(tried)
    available = _available(tried)
    smaller = [(batch, peak) for batch, peak in _peaks(tried).items() if 2 * batch <= largest]
    predicted = _solve(smaller, available)
    if predicted is not None and (predicted.low is None or predicted.high is None):
        predicted = None  # two points, or a line that does not rise for sure: it would be a guess
    return LargestBatch(
        settings=settings,
        batch_size=largest or None,
        margin=asked.margin,
        steps=_survived(tried[largest]) if largest else 0,
        tried={str(batch): tried[batch].outcome.kind for batch in sorted(tried)},
        memory_bytes=available,
        predicted=predicted and predicted.value,
        predicted_low=predicted and predicted.low,
        predicted_high=predicted and predicted.high,
        complete=failed is not None and failed - largest <= _gap(largest),
    )


def _survived(measurement: Measurement) -> int:
    """Return all steps that were run, those of the warm-up included."""
    samples = measurement.samples
    return len(samples.warmup_ns) + sum(block.steps for block in samples.blocks) if samples else 0
