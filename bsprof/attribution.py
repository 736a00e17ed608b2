"""Where the time of a batch and of a step goes, by what a Loading recorded.

Everything is a mean over the steady state, in seconds: each epoch's first batches and its end are left out, for what
they cost is the start's and not the step's. A figure whose parts were not recorded is None (NaN in arrays), never 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bsprof.loading import MAIN, Batches, Loading
from bsprof.stats import fit_line

Seconds: TypeAlias = NDArray[np.float64]

OWN = "own code"
"""What is left of making the samples when all stages with a hook are taken out: the data set's own code."""
COLLATE = "collate"


def seconds(nanoseconds: Iterable[float | None]) -> Seconds:
    """Return nanoseconds as seconds, NaN for what was not captured."""
    return np.array([np.nan if value is None else value * 1e-9 for value in nanoseconds], np.float64)


def mean(values: Seconds | Iterable[float]) -> float | None:
    """Return the mean of what was captured; None where nothing was."""
    array = np.asarray(values, np.float64)
    known = array[~np.isnan(array)]
    return float(known.mean()) if known.size else None


# --- the consumer's steps ---------------------------------------------------------------------------


class Steps(NamedTuple):
    """The steady steps, one entry each: what next() waited for, and the consumer's own part."""

    batch: NDArray[np.int64]
    """Which batch each began with."""
    wait_s: Seconds
    busy_s: Seconds
    """NaN where the loop was left in this step."""
    production_s: Seconds
    """Part of the wait in which neither the awaited batch nor a later one was there."""
    ordering_s: Seconds
    """Part in which a later one was."""
    handoff_s: Seconds
    """Part after the awaited one had been sent."""
    pin_s: Seconds
    """Part of the hand-off after it had been received: it was being page-locked."""


class Pass(NamedTuple):
    """One pass over the loader, as indices of batches in the order in which they were asked for."""

    epoch: int
    starting: list[int]
    """The first one; where workers make them and there are enough, the first of each worker: they start one after
    another, and what their first batches are waited for is the start's cost and not the step's."""
    steady: list[int]
    asked_again_s: Seconds
    """When next() was called again after each steady batch; NaN where the loop was left."""


def passes_of(loading: Loading) -> list[Pass]:
    """Return the passes of a recording, without batches that were never asked for or never came."""
    b = loading.batches
    asked, got = seconds(b.asked_at_ns), seconds(b.got_at_ns)
    members: dict[int, list[int]] = defaultdict(list)
    for i in np.flatnonzero(~np.isnan(asked) & ~np.isnan(got)).tolist():
        members[b.epoch[i]].append(i)
    passes = []
    for epoch, own in sorted(members.items()):
        own.sort(key=lambda i: asked[i])
        workers = len({b.worker[i] for i in own} - {MAIN})
        first = workers if workers > 1 and len(own) >= 3 * workers else 1
        end = loading.epochs[epoch].last_asked_at_ns if 0 <= epoch < len(loading.epochs) else None
        after = [*(float(asked[i]) for i in own[1:]), np.nan if end is None else end * 1e-9]
        passes.append(Pass(epoch, own[:first], own[first:], np.array(after[first:], np.float64)))
    return passes


def steps_of(loading: Loading) -> Steps:
    """Return the steady steps of a recording, in the order in which they were taken."""
    b = loading.batches
    asked, sent = seconds(b.asked_at_ns), seconds(b.sent_at_ns)
    got = np.maximum(seconds(b.got_at_ns), asked)
    received, pinned = seconds(b.received_at_ns), seconds(b.pinned_at_ns)
    produced, sent = seconds(b.produced_at_ns), np.where(np.isnan(sent), received, sent)
    batch: list[int] = []
    rows: list[tuple[float, ...]] = []
    for one in passes_of(loading):
        later = _earliest_later(b, [*one.starting, *one.steady], sent)
        for i, again in zip(one.steady, one.asked_again_s.tolist(), strict=True):
            wait, busy = max(0.0, got[i] - asked[i]), float(np.maximum(0.0, again - got[i]))  # NaN stays NaN
            batch.append(i)
            if np.isnan(sent[i]):  # made by the consumer itself, if by anybody that was seen
                parts = (wait, 0.0, 0.0, 0.0) if not np.isnan(produced[i]) and b.worker[i] == MAIN else (np.nan,) * 4
                rows.append((wait, busy, *parts))
                continue
            come = min(max(sent[i], asked[i]), got[i])
            early = come if np.isnan(later[i]) else min(max(later[i], asked[i]), come)
            here = min(max(received[i], come), got[i])
            pin = 0.0 if np.isnan(pinned[i] - here) else max(0.0, min(pinned[i], got[i]) - here)
            rows.append((wait, busy, early - asked[i], come - early, got[i] - come, pin))
    columns = np.array(rows, np.float64).reshape(len(rows), 6).T
    return Steps(np.array(batch, np.int64), *columns)


def _earliest_later(b: Batches, members: Sequence[int], sent: Seconds) -> dict[int, float]:
    """Return for each batch of a pass when the first one behind it was sent; NaN where there is none."""
    first, found = np.nan, {}
    for i in sorted(members, key=lambda i: b.order[i], reverse=True):
        found[i] = first
        first = float(np.fmin(first, sent[i]))
    return found


def ready_depths(loading: Loading) -> list[int]:
    """Return how many finished batches lay there each time that the consumer asked for one, in its order.

    Empty where the loader has no workers or does not tell when a batch was done.
    """
    b = loading.batches
    done = [
        (s if s is not None else r, g, e)
        for s, r, g, e, w in zip(b.sent_at_ns, b.received_at_ns, b.got_at_ns, b.epoch, b.worker, strict=True)
        if w != MAIN and (s is not None or r is not None)
    ]
    if not done:
        return []
    sent = np.sort([at for at, _, _ in done if at is not None])
    taken = np.sort([at for _, at, _ in done if at is not None])
    asked = sorted(at for at, w in zip(b.asked_at_ns, b.worker, strict=True) if at is not None and w != MAIN)
    depths = np.searchsorted(sent, asked, "right") - np.searchsorted(taken, asked, "right")
    return [max(0, int(depth)) for depth in depths]


# --- the worker's part of a batch -------------------------------------------------------------------


class Fetches(NamedTuple):
    """What making the batches took, one entry each."""

    wall_s: Seconds
    cpu_s: Seconds
    """CPU time of the thread that makes the batch."""
    runqueue_s: Seconds
    blocked_s: Seconds
    worker: NDArray[np.int64]


def fetches_of(loading: Loading) -> Fetches:
    """Return what each batch took to make; the three parts make up the whole, except where one was not captured."""
    b = loading.batches
    wall = np.maximum(seconds(b.produced_at_ns) - seconds(b.begun_at_ns), 0.0)
    parts = seconds(b.items_ns) + np.nan_to_num(seconds(b.collate_ns))
    wall = np.where(np.isnan(wall), parts, wall)
    cpu = np.minimum(seconds(b.cpu_ns), wall)
    queued = np.minimum(seconds(b.runqueue_ns), wall - cpu)
    return Fetches(wall, cpu, queued, wall - cpu - queued, np.array(b.worker, np.int64))


class Row(NamedTuple):
    """One line of where a mean batch's time goes, in seconds a batch; None where it was not captured."""

    name: str
    where: Literal["worker", "queue", "consumer"]
    """Who is at work: the worker that makes the batch, nobody (it lies there), or the consumer inside next()."""
    wall_s: float
    cpu_s: float | None = None
    runqueue_s: float | None = None
    blocked_s: float | None = None
    share: float | None = None
    """Of the worker's time for a batch; for the consumer's rows of the mean step; None for what only lies there."""
    apportioned: bool = False
    """CPU time was read in a part of it only, and what it was off the CPU is split into run-queue and blocked time as
    the whole fetch is."""


def attribution(loading: Loading) -> tuple[Row, ...]:
    """Return where the time of a mean batch goes, in the order in which a batch passes.

    The worker's rows (each stage, the data set's own code, collate, serialise) add up to what a batch costs its worker;
    the consumer's (production, ordering, hand-off) to the wait of a steady step. `unpickle` and `pin` are parts of the
    hand-off; where there is a pin thread, they run beside the step as well. `h2d` is part of the step itself.
    """
    b = loading.batches
    rows = _worker_rows(loading)
    serialise = mean(seconds(b.serialise_ns))
    if serialise is not None:
        rows.append(Row("serialise", "worker", serialise))
    whole = sum(row.wall_s for row in rows)
    rows = [row._replace(share=row.wall_s / whole if whole > 0 else None) for row in rows]

    steps = steps_of(loading)
    sent, received, got = seconds(b.sent_at_ns), seconds(b.received_at_ns), seconds(b.got_at_ns)
    unpickle, pin = seconds(b.unpickle_ns), seconds(b.pin_ns)
    many = np.array(b.worker, np.int64) != MAIN
    for name, wait_s in (
        ("index queue", seconds(b.begun_at_ns) - seconds(b.dispatched_at_ns)),
        ("in pipe", received - np.nan_to_num(unpickle) - sent),
        ("ready", got - np.fmax(received, seconds(b.pinned_at_ns))),
    ):
        wall = mean(np.maximum(wait_s[many], 0.0))
        if wall is not None:
            rows.append(Row(name, "queue", wall))

    wait, busy = mean(steps.wait_s), mean(steps.busy_s)
    step = wait + busy if wait is not None and busy is not None else None
    for name, wall in (
        ("production", mean(steps.production_s)),
        ("ordering", mean(steps.ordering_s)),
        ("hand-off", mean(steps.handoff_s)),
        ("unpickle", mean(unpickle)),
        ("pin", mean(pin)),
        ("h2d", mean(seconds(list(loading.h2d_ns or [])))),
    ):
        if wall is not None:
            rows.append(Row(name, "consumer", wall, share=min(1.0, wall / step) if step else None))
    return tuple(rows)


def worker_stages(loading: Loading) -> tuple[Row, ...]:
    """Return the rows of a fetch alone: each stage, the data set's own code, and collate."""
    rows = _worker_rows(loading)
    whole = sum(row.wall_s for row in rows)
    return tuple(row._replace(share=row.wall_s / whole if whole > 0 else None) for row in rows)


def _worker_rows(loading: Loading) -> list[Row]:
    b = loading.batches
    items = seconds(b.items_ns)
    known = ~np.isnan(items)
    if not known.any():
        return []
    walls = {
        name: float(seconds(times)[known].mean()) for name, times in b.stage_ns.items() if len(times) == len(items)
    }
    walls[OWN] = max(0.0, float(items[known].mean()) - sum(walls.values()))
    collate = mean(seconds(b.collate_ns))
    if collate is not None:
        walls[COLLATE] = collate

    fetches = fetches_of(loading)
    cpu, queued, blocked = mean(fetches.cpu_s), mean(fetches.runqueue_s), mean(fetches.blocked_s)
    if cpu is None:
        return [Row(name, "worker", wall) for name, wall in walls.items()]
    cpus = _stage_cpu(loading, walls, cpu)
    off = (queued or 0.0) + (blocked or 0.0)
    rows = []
    for name, wall in walls.items():
        away = wall - cpus[name]
        split = None if queued is None or blocked is None else (queued / off if off > 0 else 0.0)
        rows.append(
            Row(
                name,
                "worker",
                wall,
                cpus[name],
                None if split is None else away * split,
                None if split is None else away * (1 - split),
                apportioned=True,
            )
        )
    return rows


def _stage_cpu(loading: Loading, walls: dict[str, float], cpu: float) -> dict[str, float]:
    """Return the CPU seconds a batch of each stage.

    A stage's share of CPU time is that of its calls that were looked at closely. What they leave of the fetch's CPU
    time belongs to the others, in proportion to their time.
    """
    cpus = {}
    for name, stage in loading.stages.items():
        if name in walls and stage.closely_ns > 0:
            cpus[name] = walls[name] * min(1.0, stage.closely_cpu_ns / stage.closely_ns)
    if sum(cpus.values()) > cpu > 0:
        cpus = {name: value * cpu / sum(cpus.values()) for name, value in cpus.items()}
    others = {name: wall for name, wall in walls.items() if name not in cpus}
    left, room = max(0.0, cpu - sum(cpus.values())), sum(others.values())
    for name, wall in others.items():
        cpus[name] = wall * min(1.0, left / room) if room > 0 else 0.0
    return cpus


# --- one worker against another ---------------------------------------------------------------------


class WorkerRow(NamedTuple):
    """What one worker number did over everything that was watched, in all its processes."""

    id: int
    starts: int
    batches: int
    fetch_s: float | None
    """Median time for a batch."""
    cpu_s: float | None
    """Means a batch, as the two that follow."""
    runqueue_s: float | None
    blocked_s: float | None
    private_bytes: int | None
    """The last that was read."""
    bytes_per_s: float | None
    """Slope of its private memory, over its longest-lived process."""
    threads: int | None
    cores: int | None
    died: bool


def worker_rows(loading: Loading) -> tuple[WorkerRow, ...]:
    """Return a row for each worker number, in order."""
    fetches = fetches_of(loading)
    rows = []
    for number in sorted({int(w) for w in fetches.worker} | {w.id for w in loading.workers}):
        own = fetches.worker == number
        processes = [w for w in loading.workers if w.id == number]
        longest = max(processes, key=lambda w: len(w.memory_at_ns), default=None)
        line = None
        if longest is not None and longest.memory_at_ns:
            line = fit_line([at * 1e-9 for at in longest.memory_at_ns], list(longest.private_bytes))
        times = fetches.wall_s[own & ~np.isnan(fetches.wall_s)]
        rows.append(
            WorkerRow(
                number,
                len(processes),
                int(own.sum()),
                float(np.median(times)) if times.size else None,
                mean(fetches.cpu_s[own]),
                mean(fetches.runqueue_s[own]),
                mean(fetches.blocked_s[own]),
                next((w.private_bytes[-1] for w in reversed(processes) if w.private_bytes), None),
                line.slope if line else None,
                max((w.threads for w in processes if w.threads is not None), default=None),
                min((w.cores for w in processes if w.cores is not None), default=None),
                any(w.ended == "died" for w in processes),
            )
        )
    return tuple(rows)
