"""What the ranks of a case cost each other: the exchange of gradients, and waiting for whoever is late.

Everything here is derived from one process of a case, which is one start of its world. What was not captured is None,
and a difference keeps its sign: exposed communication below zero says how far the noise reaches.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from bsprof import stats
from bsprof.model import PHASES, Block, Rank, Samples
from bsprof.readings import Floats, Reading, neighbours, wall_ns
from bsprof.stats import Estimate

NOTABLE = 0.01
"""Share of the step that a rank must be late by, surely, before it is named, and from which a skew is told."""
MET = 0.25
"""Ranks that are apart by less than this share of what rank 0 was late by have met since."""

OTHER = "other"
"""What no mark of a rank claims, beside its phases."""

# --- where a step goes --------------------------------------------------------------------------------


class Split(NamedTuple):
    """The mean step in four parts, in seconds; where all are known they add up to it exactly.

    In a world of 1 nothing is exchanged and nobody waited for: there `exposed_s` and `skew_s` are None, and compute and
    loading are all.
    """

    step_s: float
    compute_s: float | None
    """What the other three leave."""
    exposed_s: float | None
    """Communication that no computing hides."""
    skew_s: float | None
    """What the slowest rank takes longer than the mean of all, each left to itself."""
    loading_s: float | None
    """Mean stall for data, over the ranks."""


def split(reading: Reading) -> Split | None:
    """Return where the mean step of the timed window goes; None where there is no steady step."""
    step = reading.mean
    if step is None:
        return None
    estimates = [exposed(reading), skew(reading)] if len(reading.ranks) > 1 else []
    shared = [estimate.value if estimate else None for estimate in estimates]
    loaded = loading(reading)
    parts = [*shared, loaded]
    known = [part for part in parts if part is not None]
    compute = step - sum(known) if len(known) == len(parts) else None
    communication, waiting = shared or (None, None)
    return Split(step, compute, communication, waiting, loaded)


def exposed(reading: Reading) -> Estimate | None:
    """Return the seconds a step that exchanging gradients adds, with a 95 % interval over pairs of blocks.

    Blocks with and without an exchange (`no_sync`) took turns, neighbours making a pair. Of each block the slowest
    rank's time counts, so that what a rank is always slower by is in both and cancels: that is `skew`. The mean of the
    differences is given with the paired Student's t interval.
    """
    pairs = neighbours(_slowest(reading.ranks), ("synchronised", "unsynchronised"))
    return stats.mean([(with_it - without) * 1e-9 for with_it, without in pairs]) if pairs else None


def _slowest(ranks: Sequence[Rank]) -> list[Block]:
    """Return of each block that of the rank that took longest, as far as all ranks had the same blocks."""
    found = []
    for blocks in zip(*(rank.blocks for rank in ranks), strict=False):
        if len({(block.kind, block.steps) for block in blocks}) > 1:
            break
        found.append(max(blocks, key=wall_ns))
    return found


def skew(reading: Reading) -> Estimate | None:
    """Return by how much the slowest rank's mean step without an exchange exceeds the mean of all ranks', in seconds.

    It cannot be negative: of ranks that are equal it is the scatter of their means. The interval is Student's t over
    blocks, at 95 % for all ranks together (Bonferroni), since the slowest was sought among them.
    """
    steps = [
        [wall_ns(block) / block.steps * 1e-9 for block in rank.blocks if block.kind == "unsynchronised" and block.steps]
        for rank in reading.ranks
    ]
    count = min(map(len, steps), default=0)
    if len(steps) < 2 or not count:
        return None
    slowest = max(steps, key=lambda one: statistics.fmean(one[:count]))
    means = [statistics.fmean(block) for block in zip(*(one[:count] for one in steps), strict=True)]
    return stats.mean([own - mean for own, mean in zip(slowest, means, strict=False)], 1 - 0.05 / len(steps))


def loading(reading: Reading) -> float | None:
    """Return the mean stall for data in seconds, over all ranks; None where it is not known of one."""
    if not reading.ranks:
        return reading.phases.get("data")
    stalls = [Reading(rank.samples).phases.get("data") for rank in reading.ranks if rank.samples is not None]
    known = [stall for stall in stalls if stall is not None]
    return statistics.fmean(known) if len(known) == len(reading.ranks) else None


# --- what is exchanged --------------------------------------------------------------------------------

_SHRINK = {"none": 1, "fp16": 2, "bf16": 2}
"""What DDP's own hooks divide fp32 gradients by before they travel (torch's `default_hooks`)."""


class Exchange(NamedTuple):
    """What a step exchanges and how fast."""

    backend: str
    world: int
    buckets: tuple[int, ...] | None
    """Bytes of each all-reduce; None under a hook of the user's own, which may send anything."""
    seconds: float | None
    """Time a step: a collective's kernel ran, where that was traced, else what DDP's logger says."""
    hidden: float | None
    """Share of that time beside which backward computed."""

    @property
    def bytes(self) -> int | None:
        """Bytes that each rank contributes to a step's all-reduces."""
        return sum(self.buckets) if self.buckets else None

    @property
    def bus_bandwidth(self) -> float | None:
        """Bytes a second that each rank's link carried, 2 (p - 1) / p x bytes / time.

        The *bus bandwidth* of NCCL's tests (nccl-tests, doc/PERFORMANCE.md), which can be held against what a link
        does whatever the number of ranks.
        """
        if not self.bytes or not self.seconds:
            return None
        return 2 * (self.world - 1) / self.world * self.bytes / self.seconds


def exchange(reading: Reading) -> Exchange | None:
    """Return what a step of several ranks exchanges; None where it was not told.

    Hidden is 1 - exposed / collectives' time where collectives were traced, else DDP's logger's own figure: the overlap
    of exchange and backward over the time from a step's first bucket being ready to the last one's being reduced.
    """
    told, world = reading.communication, len(reading.ranks)
    if told is None or world < 2:
        return None
    shrink = _SHRINK.get(reading.settings.comm_hook) if reading.settings else 1
    buckets = tuple(size // shrink for size in told.bucket_bytes) if shrink else None
    hidden = None
    if told.collectives_ns:
        estimate = exposed(reading)
        hidden = 1 - estimate.value / (told.collectives_ns * 1e-9) if estimate else None
    elif told.reduce_ns and told.overlap_ns is not None:
        hidden = told.overlap_ns / told.reduce_ns
    time_ns = told.reduce_ns if told.collectives_ns is None else told.collectives_ns
    return Exchange(told.backend, world, buckets or None, time_ns * 1e-9 if time_ns else None, hidden)


# --- who is late --------------------------------------------------------------------------------------


class Late(NamedTuple):
    """The rank that the others wait for."""

    rank: int
    node: int
    by: Estimate
    """Median seconds that it comes later than the last of the others, with a 95 % interval."""
    share: float
    """Share of the steps in which it was the last."""
    phase: str
    """The phase that takes longer than on other ranks the most: of `backward` only what comes before the exchange."""
    longer_s: float
    """By how much, in the mean, than the median of the other ranks."""


class _Own(NamedTuple):
    """What one rank did by itself in each steady step, in seconds."""

    rank: Rank
    phases: dict[str, Floats]
    """Of `backward` only what comes before the exchange."""
    until_forward: Floats
    """From the end of the last exchange, or the begin of a block, to where forward begins."""
    until_exchange: Floats
    """And to where its first gradients are ready."""


def late(reading: Reading) -> Late | None:
    """Return the rank that others wait for, or None: nobody is late, or it cannot be told.

    What makes a rank late is what it does between two exchanges: the end of its last step, its data, its forward and
    its backward up to the first gradients. Whole backwards tell nothing, since everybody's lasts until the last rank
    has come. For each rank the series of how much later than the last of the others it came is looked at, and it is
    named where the 95 % interval of the median of that series lies above 1 % of the step. No two ranks can be.

    A forward may wait as well. DDP sends rank 0's buffers, as batch norm has them, to all others when it begins
    (`_sync_buffers`), so a late rank 0 is told by where its forward begins, if the ranks have met since then. Under
    SyncBatchNorm all ranks meet inside forward, and only what comes before it is looked at.
    """
    ranks, step = _alone(reading), reading.median_s
    if len(ranks) < 2 or not step:
        return None
    early = ("data", "h2d", "optimizer", OTHER)
    begins = [one.until_forward for one in ranks]
    if reading.settings is not None and reading.settings.sync_batchnorm:
        return _named(ranks, begins, early, step)
    found = _named(ranks, begins, early, step)
    if found is not None and found.rank == 0 and _have_met(ranks, found.by.value * MET):
        return found
    return _named(ranks, [one.until_exchange for one in ranks], (*PHASES, OTHER), step)


def skew_by_phase(reading: Reading) -> dict[str, float]:
    """Return of each phase what the rank with the longest takes more than the mean of all ranks, in seconds.

    Of `backward` only what comes before the exchange. Empty where it was not captured of every rank.
    """
    ranks = _alone(reading)
    if len(ranks) < 2:
        return {}
    means = {phase: [float(one.phases[phase].mean()) for one in ranks] for phase in (*PHASES, OTHER)}
    return {phase: max(values) - statistics.fmean(values) for phase, values in means.items()}


def _alone(reading: Reading) -> list[_Own]:
    """Return what each rank did by itself, over the same steady steps; empty where that was not captured of all."""
    series = [_series(rank) for rank in reading.ranks]
    found = [one for one in series if one is not None]
    if not found or len(found) < len(series):
        return []
    count = min(one.until_exchange.size for one in found)
    steady = np.ones(count, dtype=bool)
    for rank in reading.ranks:
        boundaries = rank.samples.epoch_boundaries if rank.samples else []
        steady[[index for index in boundaries if index < count]] = False
    if not steady.any():
        return []
    return [
        _Own(
            one.rank,
            {phase: values[:count][steady] for phase, values in one.phases.items()},
            one.until_forward[:count][steady],
            one.until_exchange[:count][steady],
        )
        for one in found
    ]


def _series(rank: Rank) -> _Own | None:
    samples, before = rank.samples, rank.before_reduce_ns
    if samples is None or not before:
        return None
    recorded = samples.host_ns if samples.device_ns is None else samples.device_ns
    steps = samples.step_ns if samples.device_step_ns is None else samples.device_step_ns
    count = min(len(steps), len(before), *map(len, recorded.values()))
    if not count:
        return None

    def seconds(ns: Sequence[int]) -> Floats:
        return np.asarray(ns[:count], dtype=np.float64) * 1e-9

    none = np.zeros(count)
    data, h2d, forward, backward, optimizer = (
        seconds(recorded[phase]) if phase in recorded else none for phase in PHASES
    )
    own = seconds(before)
    after = seconds(steps) - data - h2d - forward - backward
    carried = np.concatenate([none[:1], after[:-1]])
    carried[_firsts(samples, count)] = 0.0  # all ranks begin a block together
    until_forward = carried + data + h2d
    phases = dict(zip(PHASES, (data, h2d, forward, own, optimizer), strict=True))
    return _Own(rank, {**phases, OTHER: after - optimizer}, until_forward, until_forward + forward + own)


def _firsts(samples: Samples, count: int) -> list[int]:
    """Return the steps with which a block begins."""
    lengths = [block.steps for block in samples.blocks if block.kind == "instrumented"]
    return [first for first in accumulate(lengths, initial=0) if first < count]


def _named(ranks: Sequence[_Own], times: Sequence[Floats], phases: Sequence[str], step_s: float) -> Late | None:
    """Return the rank whose `times` are surely the latest, by a notable share of the step, and which phase it is."""
    arrivals = np.vstack(times)
    ordered = np.sort(arrivals, axis=0)
    behind = arrivals - np.where(arrivals == ordered[-1], ordered[-2], ordered[-1])
    shares = (behind > 0).mean(axis=1)
    place = int(shares.argmax())
    by = stats.median(behind[place])
    if by.low is None or by.low <= NOTABLE * step_s:
        return None
    means = {phase: [float(one.phases[phase].mean()) for one in ranks] for phase in phases}
    longer = {
        phase: values[place] - statistics.median(values[:place] + values[place + 1 :])
        for phase, values in means.items()
    }
    worst = max(longer, key=lambda phase: longer[phase])
    rank = ranks[place].rank
    return Late(rank.rank, rank.node, by, float(shares[place]), worst, longer[worst])


def _have_met(ranks: Sequence[_Own], apart_s: float) -> bool:
    """Whether all ranks come to the exchange within so much of rank 0, in the median."""
    zero = next(one.until_exchange for one in ranks if one.rank.rank == 0)
    return all(abs(stats.middle(one.until_exchange - zero)) <= apart_s for one in ranks)
