"""Replaying recorded batches under other settings: a discrete-event copy of DataLoader's scheduler.

A closed form, throughput = min(workers / batch, cores / CPU, 1 / step), knows neither that batches differ nor that the
next one is awaited while later ones lie there. The replay does: it takes what each recorded batch cost and lets as many
workers as asked for make them again, in simulated time. What it copies of torch's scheduler (`_try_put_index`,
`_next_data` and `_process_data` of `torch.utils.data.dataloader._MultiProcessingDataLoaderIter`):

- `workers * prefetch` batches are given out at first, by turns; after that one more whenever a batch is *returned*, so
  that one slow batch idles the other workers;
- in order, batches that come too early are unpickled and kept; else each is returned as it comes, and the next work
  goes to a worker that has room;
- unpickling is the consumer's work, inside next().

A batch costs its worker CPU time and blocked time by turns. The machine's capacity is shared equally among all that
want to compute (processor sharing: at a demand of k threads each runs at min(1, capacity / k)), the consumer's own part
of the step and its unpickling included. Pinning takes as long as it took.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from bsprof.loading import MAIN, Batches, Loading, Prediction

Seconds: TypeAlias = NDArray[np.float64]

MODEL_ERROR = 0.06
"""Standard deviation of ln(predicted / measured throughput), over 80 configurations: 0.05 on one machine of two cores;
0.07 on another, before steps were held against their own recording. `benchmarks/loader_prediction.py` measures it
anew, and `reports/` keep what it found."""

MOST_BATCHES = 400
"""Recorded batches that a replay reads: more would make a grid of settings take longer than it is worth."""

FEWEST_BATCHES = 256
"""Batches that a replay returns at the least, whatever was recorded: bursts of many workers have to average out."""

STEADY_BATCHES = 8
"""Batches that have to be left before those of an epoch's start are left out."""

MOST_CHUNKS = 8
"""Pieces of a batch in which computing and blocking take turns, one a sample: more of them would change nothing."""

OTHER_THREADS = 1.1
"""CPU time of the process / of its main thread, from which on other threads count. Less is the pickling thread."""

UNPICKLE_S = {"file_descriptor": 0.12e-3, "file_system": 0.03e-3}
"""Seconds to unpickle a tensor, by torch's sharing strategy, while its worker idles: for recordings that do not show
it, having had no workers, or none that idled. Measured with torch 2.15 on Linux."""

UNEVEN_SHARE = 0.2
"""Difference between one worker's mean batch and the others', as a share of the mean, from which on they are uneven."""

UNEVEN_ERRORS = 4
"""The same in standard errors: batches that merely scatter make no worker slow."""

BUSY_SHARE = 0.25
"""Part of the time in which a batch is unpickled: a worker that computes for longer holds that up."""

RESAMPLES = 12
"""Resampled recordings behind an interval: its width is then uncertain by a fifth, which the model error covers."""

BLOCK = 5
"""Batches that stay together in resampling, so that neighbours that resemble each other still do."""

GOOD_ENOUGH = 0.02
"""Share of the best step time that a smaller setting may cost more."""

PREFETCHES = (1, 2, 4, 8)

MOST_UNEXPLAINED = 1.25
"""A recorded step is no further from its own replay than by this factor: beyond, it is no matter of scale."""


# --- what is replayed -------------------------------------------------------------------------------


class Load(NamedTuple):
    """What recorded batches cost, one entry a batch, in seconds."""

    cpu_s: Seconds
    """Worker's CPU time."""
    blocked_s: Seconds
    """Time that the worker neither computed nor waited for a core."""
    handoff_s: Seconds
    """Consumer's time to take a batch that is there while its worker makes another: unpickling, above all."""
    step_s: Seconds
    """Consumer's own part of the step, from next() returning to next() called again."""
    worker: NDArray[np.int64]
    """Who made it; `MAIN` for the consumer itself."""
    chunks: int = MOST_CHUNKS
    """Pieces of a batch in which computing and blocking take turns."""
    consumer_cpu: float = 0.0
    """Cores that the consumer keeps busy in its own part of the step: 0 asleep, 0.5 half the time, 4 with 4 threads."""
    worker_cores: float = 1.0
    """Cores that a worker keeps busy while it computes."""
    idle_handoff_s: float = math.inf
    """The most that hand-off takes while the worker that made the batch has nothing to do. One that computes holds its
    interpreter's lock for 5 ms at a time, and its memory can be asked for in between only."""
    crowding: float = 1.0
    """Threads for each core that wanted to compute when a batch was taken, the consumer among them; at least 1."""
    latency_s: float = 0.0
    """What a batch is on its way while neither worker nor consumer works: the queues' threads and pipes."""
    relay_s: Seconds | None = None
    """Time of the pin thread, where there is one: it unpickles and pins one batch after another."""
    samples: float | None = None
    """In a mean batch."""
    recorded_step_s: float | None = None
    """Mean time from one batch to the next as it was recorded, waiting included."""


class Setting(NamedTuple):
    """What a replay can change."""

    workers: int
    prefetch: int = 2
    """Batches given out to a worker ahead; without workers it means nothing."""
    in_order: bool = True
    capacity: float = math.inf
    """Cores that run at once."""


class Replayed(NamedTuple):
    """What came of it."""

    step_s: float
    """Mean time from one batch to the next."""
    wait_s: float
    """Part of it inside next()."""


def scaled(load: Load, keep: float | Seconds) -> Load:
    """Return the load with the time that making a batch takes multiplied by `keep`: one factor, or one a batch."""
    return load._replace(cpu_s=load.cpu_s * keep, blocked_s=load.blocked_s * keep)


def without_blocked(load: Load) -> Load:
    """Return the load with nothing to wait for: no disk, no network, no lock."""
    return load._replace(blocked_s=np.zeros_like(load.blocked_s))


def without_handoff(load: Load) -> Load:
    """Return the load with batches that cost the consumer nothing to take."""
    return load._replace(handoff_s=np.zeros_like(load.handoff_s), relay_s=None)


def evened(load: Load) -> Load:
    """Return the load with every batch as costly as the mean one, whoever makes it."""
    return load._replace(
        cpu_s=np.full_like(load.cpu_s, load.cpu_s.mean()), blocked_s=np.full_like(load.blocked_s, load.blocked_s.mean())
    )


# --- from a recording -------------------------------------------------------------------------------


def load_of(loading: Loading) -> Load | None:
    """Return what the batches of the steady state cost, or None where nothing says what making them took.

    The first `workers * prefetch + 1` batches of each epoch are left out, being made while the consumer does nothing
    else than start, unless too few would be left. Time without a run-queue reading counts as not queued; a batch
    without a CPU reading as computed from end to end. Steps are those on cached batches where they are known: what
    workers add to a step by taking its cores, and what an accelerator takes off one while it waits for data, the
    replay finds itself.
    """
    batches = loading.batches
    asked, got = _seconds(batches.asked_at_ns), _seconds(batches.got_at_ns)
    begun, produced = _seconds(batches.begun_at_ns), _seconds(batches.produced_at_ns)
    index = _steady(np.isfinite(got - asked) & np.isfinite(produced - begun), batches.order, setting_of(loading))
    if not index.size:
        return None

    worker = np.asarray(batches.worker, dtype=np.int64)
    cpu_s, blocked_s, cores = _making(
        (produced - begun)[index],
        *(_seconds(of)[index] for of in (batches.cpu_ns, batches.runqueue_ns, batches.process_cpu_ns)),
    )
    handoff_s, idle_handoff_s = _handing_over(loading, asked, got, index)
    step_s, consumer_cpu = _consuming(loading, asked, got, index)
    queued_s = _seconds(batches.runqueue_ns)[index]
    relay_s = (_seconds(batches.unpickle_ns) + _seconds(batches.pin_ns))[index]
    samples = [batches.samples[i] for i in index.tolist()]
    known = [count for count in samples if count is not None]
    return Load(
        cpu_s=cpu_s,
        blocked_s=blocked_s,
        handoff_s=handoff_s,
        step_s=step_s,
        worker=worker[index],
        chunks=min(MOST_CHUNKS, max(1, round(float(np.mean(known))))) if known else MOST_CHUNKS,
        consumer_cpu=consumer_cpu,
        worker_cores=cores,
        idle_handoff_s=idle_handoff_s,
        crowding=_crowding(
            float((cpu_s * cores).sum() + np.nansum(queued_s)),
            float(np.ptp(produced[index]) if index.size > 1 else 0.0),
            _capacity(loading),
        ),
        latency_s=_latency(loading, begun, produced, index),
        relay_s=_filled(relay_s) if np.isfinite(relay_s).any() else None,
        samples=float(np.mean(known)) if known else None,
        recorded_step_s=_recorded(loading, got, index),
    )


def _recorded(loading: Loading, got: Seconds, index: NDArray[np.int64]) -> float | None:
    """Return the mean time between two neighbours among the batches of `index`, in one epoch; None without any."""
    epoch = np.asarray(loading.batches.epoch, dtype=np.int64)
    before, after = index[:-1], index[1:]
    neighbours = (after == before + 1) & (epoch[after] == epoch[before])
    steps = (got[after] - got[before])[neighbours]
    return float(steps.mean()) if steps.size else None


def setting_of(loading: Loading) -> Setting:
    """Return the settings that were watched, on the machine as it was."""
    settings = loading.settings
    seen = len({worker for worker in loading.batches.worker if worker != MAIN})
    return Setting(
        workers=seen if settings.workers is None else settings.workers,
        prefetch=settings.prefetch or 2,
        in_order=settings.in_order is not False,
        capacity=_capacity(loading),
    )


def _capacity(loading: Loading) -> float:
    if loading.capacity_cores is not None and loading.capacity_cores.value > 0:
        return loading.capacity_cores.value
    if (machine := loading.machine) is not None:
        free = machine.cores - (machine.foreign_cores or 0.0)
        return max(free, machine.own_cores or 0.0) or machine.cores
    return float(max((worker.cores for worker in loading.workers if worker.cores), default=math.inf))


def _seconds(values: list[int | None]) -> Seconds:
    """Return nanoseconds as seconds, with NaN for what was not captured."""
    return np.array([math.nan if value is None else value / 1e9 for value in values], dtype=np.float64)


def _filled(values: Seconds) -> Seconds:
    """Return the values with their median, or 0 where there are none, in the place of NaN."""
    known = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, np.median(known) if known.size else 0.0)


def _steady(known: NDArray[np.bool_], order: list[int], setting: Setting) -> NDArray[np.int64]:
    """Return which batches to replay; of very many, blocks of neighbours from all over the recording."""
    place = np.asarray(order, dtype=np.int64)
    for first in (setting.workers * setting.prefetch + 1, 1, 0):
        index = np.flatnonzero(known & (place >= first))
        if index.size >= STEADY_BATCHES:
            break
    if index.size > MOST_BATCHES:
        blocks = np.linspace(0, index.size - BLOCK, MOST_BATCHES // BLOCK).astype(np.int64)
        index = index[(blocks[:, None] + np.arange(BLOCK)).ravel()]
    return index


def _making(fetch_s: Seconds, cpu_s: Seconds, queued_s: Seconds, process_s: Seconds) -> tuple[Seconds, Seconds, float]:
    """Return computing and blocked time of each batch, and the cores that a worker keeps busy while it computes."""
    cpu_s = _as_the_others(cpu_s, fetch_s, fetch_s)
    unqueued_s = np.maximum(fetch_s - _as_the_others(queued_s, fetch_s, np.zeros_like(fetch_s)), cpu_s)
    process_s = _as_the_others(process_s, fetch_s, cpu_s)
    if process_s.sum() > OTHER_THREADS * cpu_s.sum():
        # While its other threads compute, the main thread computes too or waits for them: either way it is at work.
        cpu_s = np.clip(process_s, cpu_s, unqueued_s)
    cores = max(float(process_s.sum() / cpu_s.sum()), 1.0) if cpu_s.sum() > 0 else 1.0
    return cpu_s, unqueued_s - cpu_s, cores


def _crowding(wanted_s: float, span_s: float, capacity: float) -> float:
    """Return `Load.crowding` of batches that wanted so many core seconds within a time."""
    return max(1.0, (wanted_s / span_s + 1) / capacity) if span_s > 0 else 1.0


def _as_the_others(part_s: Seconds, whole_s: Seconds, otherwise_s: Seconds) -> Seconds:
    """Return a part of each batch's time; where it is not known the share that it has of the others, if of any."""
    known = np.isfinite(part_s)
    whole = float(whole_s[known].sum())
    return np.where(known, part_s, whole_s * (float(part_s[known].sum()) / whole) if whole > 0 else otherwise_s)


def _consuming(loading: Loading, asked: Seconds, got: Seconds, index: NDArray[np.int64]) -> tuple[Seconds, float]:
    """Return the consumer's own part of each step, and the cores that it keeps busy in it."""
    epoch = np.asarray(loading.batches.epoch, dtype=np.int64)
    asked_again = np.append(asked[1:], math.nan)
    for i in np.flatnonzero(np.append(epoch[1:] != epoch[:-1], True)).tolist():
        last = loading.epochs[epoch[i]].last_asked_at_ns if epoch[i] < len(loading.epochs) else None
        asked_again[i] = math.nan if last is None else last / 1e9
    step_s = np.maximum(_filled((asked_again - got)[index]), 0.0)
    share, recorded_s = loading.consumer.cpu_share or 0.0, float(step_s.mean())
    if loading.cached_step_ns:
        step_s = np.resize(np.asarray(loading.cached_step_ns, dtype=np.float64) / 1e9, step_s.size)
        # What a step computes does not depend on how many others want the cores; how long it takes does.
        share *= recorded_s / max(float(step_s.mean()), 1e-9)
    # A consumer that does next to nothing seems to do it with many cores: what next() computes is counted to it.
    return step_s, min(share, _capacity(loading))


def _handing_over(loading: Loading, asked: Seconds, got: Seconds, index: NDArray[np.int64]) -> tuple[Seconds, float]:
    """Return the consumer's own time to take each batch, were it there already, and the most while its worker idles.

    The latter is the median over those whose worker idled. Where workers never do, it is what the fastest tenth took,
    or what tensors are known to take (`UNPICKLE_S`) where even those waited for the worker's interpreter.
    """
    batches = loading.batches
    sent, received, pinned = (_seconds(of) for of in (batches.sent_at_ns, batches.received_at_ns, batches.pinned_at_ns))
    unpickle_s = _seconds(batches.unpickle_ns)
    sharing = loading.resources.sharing if loading.resources is not None else None
    tensors = np.array([count or 0 for count in batches.tensors], dtype=np.float64)[index]
    tensors_s = tensors * UNPICKLE_S.get(sharing or "file_descriptor", 0.0)
    if (np.asarray(batches.worker)[index] == MAIN).all():
        return tensors_s, math.inf
    if np.isfinite(pinned).any():
        handoff_s = got - np.fmax(asked, pinned)
    elif np.isfinite(unpickle_s + received).any():
        handoff_s = unpickle_s + got - np.fmax(asked, received)
    else:
        sent = np.where(np.isfinite(sent), sent, _seconds(batches.produced_at_ns))
        handoff_s = np.where(sent <= asked, got - asked, math.nan)
        if not np.isfinite(handoff_s[index]).any():  # it was never there in time: what came after it had been sent
            handoff_s = got - np.fmax(asked, sent)
    taken_s = np.maximum(_filled(handoff_s[index]), 0.0)
    done = np.fmin(received, got)
    busy = _busy(batches, done - np.nan_to_num(unpickle_s), done)[index]
    idle_s = taken_s[~busy]
    if np.count_nonzero(busy) >= STEADY_BATCHES:
        # Whether its worker is busy is for the replay to find: each batch gets what one took that found it so.
        taken_s[~busy] = np.resize(taken_s[busy], idle_s.size)
    if idle_s.size >= STEADY_BATCHES:
        return taken_s, float(np.median(idle_s))
    fastest_s = float(np.quantile(taken_s, 0.1))
    known_s = tensors_s[tensors_s > 0]
    return taken_s, min(fastest_s, float(known_s.mean())) if known_s.size else fastest_s


def _busy(batches: Batches, first: Seconds, last: Seconds) -> NDArray[np.bool_]:
    """Return whether the worker of each batch computed on others for much of the time from `first` to `last`.

    A moment would not do: a worker takes up its next batch right after it has sent one, and may be done with it when
    that one has been taken. While it waits for a disk or a server it holds nobody up.
    """
    begun, produced = _seconds(batches.begun_at_ns), _seconds(batches.produced_at_ns)
    computing = np.nan_to_num(np.clip(_seconds(batches.cpu_ns) / (produced - begun), 0.0, 1.0), nan=1.0)
    worker = np.asarray(batches.worker, dtype=np.int64)
    busy = np.zeros(worker.size, dtype=np.bool_)
    for one in np.unique(worker):
        own = np.flatnonzero((worker == one) & np.isfinite(produced - begun))
        own = own[np.argsort(begun[own])]
        latest = np.searchsorted(begun[own], last[own], "right") - 1  # the last that was begun meanwhile, or before
        computed = np.zeros(own.size)
        for place in (latest, latest - 1):
            made = np.maximum(place, 0)
            overlap = np.minimum(produced[own][made], last[own]) - np.maximum(begun[own][made], first[own])
            computed += np.where(place >= 0, np.maximum(overlap, 0.0), 0.0) * computing[own][made]
        busy[own] = computed > BUSY_SHARE * (last - first)[own]
    return busy


def _latency(loading: Loading, begun: Seconds, produced: Seconds, index: NDArray[np.int64]) -> float:
    """Return how long work and batches are on their way when nothing else holds them up, in seconds.

    Both ways are longer while the worker's queue thread waits for the interpreter's lock behind the next batch, which
    costs no time as long as there is a next one; so it is what the fastest tenth took.
    """
    batches = loading.batches
    dispatched, sent = _seconds(batches.dispatched_at_ns), _seconds(batches.sent_at_ns)
    free = np.full_like(begun, math.nan)
    for worker in {worker for worker in batches.worker if worker != MAIN}:
        own = np.flatnonzero(np.asarray(batches.worker) == worker)
        own = own[np.argsort(begun[own])]
        free[own[1:]] = produced[own[:-1]]
    ways = (begun - np.maximum(dispatched, free), sent - produced)
    known = [way[index][np.isfinite(way[index])] for way in ways]
    return sum(max(float(np.quantile(way, 0.1)), 0.0) for way in known if way.size)


# --- the scheduler ----------------------------------------------------------------------------------


def replay(load: Load, setting: Setting, batches: int | None = None, seed: int | None = None) -> Replayed:
    """Return the mean step over `batches` batches of the steady state.

    Recorded batches are read in their order, over and over; with a seed, resampled in blocks. `batches` is by default a
    multiple of what was recorded, so that each counts equally. Raises ValueError for a load without batches, fewer than
    one batch, and settings that are no setting.
    """
    count = load.cpu_s.size
    if count == 0:
        raise ValueError("no batches to replay")
    if setting.workers < 0 or setting.prefetch < 1 or not setting.capacity > 0:
        raise ValueError(f"no such setting: {setting}")
    if batches is None:
        batches = count * math.ceil(max(FEWEST_BATCHES, 8 * setting.workers) / count)
    if batches < 1:
        raise ValueError("at least one batch has to be replayed")
    if seed is not None:
        load = _resampled(load, min(count, MOST_BATCHES), np.random.default_rng(seed))
    return _in_main(load, setting) if setting.workers == 0 else _Scheduler(load, setting).run(batches)


def mean_step_s(load: Load, setting: Setting) -> float:
    """Return the mean step in seconds."""
    return replay(load, setting).step_s


def _in_main(load: Load, setting: Setting) -> Replayed:
    """One thread does one thing after another; what it would unpickle it has at hand."""
    slower = max(load.worker_cores / setting.capacity, 1.0)
    fetch_s = float(load.cpu_s.mean()) * slower + float(load.blocked_s.mean())
    computing, blocked, cores = _step_parts(load)
    step_s = float(computing.mean()) * max(cores / setting.capacity, 1.0) + float(blocked.mean())
    return Replayed(fetch_s + step_s, fetch_s)


def _step_parts(load: Load) -> tuple[Seconds, Seconds, float]:
    """Return the part of each step that computes, the part that does not, and the cores that the former keeps busy."""
    share = min(load.consumer_cpu, 1.0)
    return load.step_s * share, load.step_s * (1 - share), max(load.consumer_cpu, 1.0)


def _plans(load: Load, setting: Setting) -> list[list[float]]:
    """Return the parts of each recorded batch, last one first: those at even places compute, those at odd ones block.

    Its pieces are not of one length. Equal ones would keep all workers in step, blocked together and then computing
    together, which no machine does: samples differ, and a scheduler lets some finish before it lets others begin.
    """
    most = load.worker_cores * setting.workers + max(load.consumer_cpu, 1.0)
    pieces = load.chunks if most > setting.capacity else 1  # where all can compute at once, the turns change nothing
    shares = np.random.default_rng(0).uniform(0.5, 1.5, (load.cpu_s.size, 2 * pieces))
    shares[:, 0::2] *= (load.cpu_s / shares[:, 0::2].sum(axis=1))[:, None]
    shares[:, 1::2] *= (load.blocked_s / shares[:, 1::2].sum(axis=1))[:, None]
    whole = zip(load.cpu_s.tolist(), load.blocked_s.tolist(), shares.tolist(), strict=True)
    return [parts if cpu and blocked else [cpu, blocked] if blocked else [cpu] for cpu, blocked, parts in whole]


def _own_batches(load: Load, workers: int) -> list[list[int]]:
    """Return the recorded batches that each worker draws from: its own where workers are uneven, else nothing.

    With another number of workers nobody knows who would get what, so all draw from all.
    """
    everybody: list[list[int]] = [[] for _ in range(workers)]
    made = np.unique(load.worker)
    if made.size != workers or workers < 2 or not _uneven(load):
        return everybody
    return [np.flatnonzero(load.worker == worker).tolist() for worker in made]


def _uneven(load: Load) -> bool:
    """Whether one worker's batches take clearly longer or shorter than the others', beyond what chance does."""
    cost = load.cpu_s + load.blocked_s
    for worker in np.unique(load.worker):
        own, others = cost[load.worker == worker], cost[load.worker != worker]
        if own.size < 4 or others.size < 4:
            continue
        difference = abs(float(own.mean() - others.mean()))
        error = math.sqrt(float(own.var(ddof=1)) / own.size + float(others.var(ddof=1)) / others.size)
        if difference > UNEVEN_SHARE * float(cost.mean()) and difference > UNEVEN_ERRORS * error:
            return True
    return False


def _resampled(load: Load, count: int, random: np.random.Generator) -> Load:
    """Return `count` batches of the load in blocks of neighbours from random places (circular block bootstrap)."""
    size = load.cpu_s.size
    starts = random.integers(size, size=math.ceil(count / BLOCK))
    return _taken(load, ((starts[:, None] + np.arange(BLOCK)) % size).ravel()[:count])


def _taken(load: Load, index: NDArray[np.int64]) -> Load:
    return load._replace(
        cpu_s=load.cpu_s[index],
        blocked_s=load.blocked_s[index],
        handoff_s=load.handoff_s[index],
        step_s=load.step_s[index],
        worker=load.worker[index],
        relay_s=None if load.relay_s is None else load.relay_s[index],
    )


class _Clock:
    """Simulated time, in which actors compute at a shared rate or rest.

    All that compute advance alike, so one count of the CPU seconds that each was given is enough: who starts to compute
    is done when that count has grown by what it has to do, however the rate changes until then.
    """

    def __init__(self, capacity: float) -> None:
        self.now = 0.0
        self._capacity = capacity
        self._given = 0.0
        self._demand = 0.0
        self._rate = 1.0
        self._computing: list[tuple[float, int, float]] = []
        self._resting: list[tuple[float, int]] = []

    @property
    def crowding(self) -> float:
        """Threads for each core that want to compute, one more among them; at least 1."""
        return max(1.0, (self._demand + 1) / self._capacity)

    def rest(self, actor: int, seconds: float) -> None:
        heapq.heappush(self._resting, (self.now + seconds, actor))

    def compute(self, actor: int, seconds: float, cores: float) -> None:
        heapq.heappush(self._computing, (self._given + seconds, actor, cores))
        self._share(self._demand + cores)

    def _share(self, demand: float) -> None:
        self._demand = demand
        self._rate = 1.0 if demand <= self._capacity else self._capacity / demand

    def next(self) -> int:
        """Advance to the next end of computing or resting, and return whose it is."""
        resting = self._resting
        if self._computing:
            end = self.now + (self._computing[0][0] - self._given) / self._rate
            if not resting or end <= resting[0][0]:
                self.now = end
                self._given, actor, cores = heapq.heappop(self._computing)
                self._share(self._demand - cores if self._computing else 0.0)
                return actor
            self._given += (resting[0][0] - self.now) * self._rate
        self.now, actor = heapq.heappop(resting)
        return actor


class _Scheduler:
    """The consumer's iterator, its workers, and the queues between them."""

    def __init__(self, load: Load, setting: Setting) -> None:
        self._setting = setting
        workers = setting.workers
        self._clock = _Clock(setting.capacity)
        # The numbers of the actors; above them, `on_the_way + task` is a batch on its way.
        self._consumer, self._relay, self._on_the_way = workers, workers + 1, workers + 2

        self._plans = _plans(load, setting)
        self._worker_cores = load.worker_cores
        self._handoff, self._idle_handoff = load.handoff_s.tolist(), load.idle_handoff_s
        self._crowding = load.crowding
        computing, resting, self._step_cores = _step_parts(load)
        self._step_computing, self._step_resting = computing.tolist(), resting.tolist()
        self._latency = load.latency_s
        self._relaying = None if load.relay_s is None else load.relay_s.tolist()

        self._own = _own_batches(load, workers)
        """The recorded batches that each worker makes, in turn."""
        self._made = [0] * workers
        self._todo: list[deque[int]] = [deque() for _ in range(workers)]
        self._turn = 0
        self._tasks: list[tuple[int, int]] = []
        """Of each task, its worker and the recorded batch that it is."""
        self._left = [0] * workers
        """Parts of its batch that a worker has before it, the one that it is at among them."""
        self._plan: list[list[float]] = [[]] * workers
        self._given_out = [0] * workers

        self._pinning: deque[int] = deque()
        self._pipe: deque[int] = deque()
        self._early: set[int] = set()
        self._expected = 0
        self._task = 0
        """What the consumer unpickles, or has."""
        self._does = self._wait
        """What the consumer does when its time is over."""
        self._waiting = False
        self._asked = 0.0
        self._waited: list[float] = []
        self._got: list[float] = []

    def run(self, batches: int) -> Replayed:
        workers, prefetch, _, _ = self._setting
        for _ in range(workers * prefetch):
            self._give_out()
        self._ask()
        # What was given out at first was made while nobody asked: it is no steady state.
        first = workers * (prefetch + 1)
        last = first + batches
        clock = self._clock
        while len(self._got) <= last:
            actor = clock.next()
            if actor < self._consumer:
                self._go_on(actor)
            elif actor == self._consumer:
                self._does()
            elif actor == self._relay:
                self._pinned()
            else:
                self._arrive(actor - self._on_the_way)

        def growth(total: Seconds) -> float:
            # Workers in step deliver in bursts, so either end is the mean over as many batches as there are workers.
            early, late = (total[end - workers + 1 : end + 1].mean() for end in (first, last))
            return float(late - early) / batches

        return Replayed(growth(np.array(self._got)), growth(np.cumsum(self._waited)))

    # the workers

    def _give_out(self) -> None:
        workers, prefetch, in_order, _ = self._setting
        for _ in range(workers):
            worker = self._turn
            self._turn = (worker + 1) % workers
            if in_order or self._given_out[worker] < prefetch:
                break
        own = self._own[worker]
        task = len(self._tasks)
        self._tasks.append((worker, own[self._made[worker] % len(own)] if own else task % len(self._plans)))
        self._made[worker] += 1
        self._given_out[worker] += 1
        self._todo[worker].append(task)
        if len(self._todo[worker]) == 1:
            self._begin(worker)

    def _begin(self, worker: int) -> None:
        plan = self._plan[worker] = self._plans[self._tasks[self._todo[worker][0]][1]]
        self._left[worker] = len(plan) + 1
        self._go_on(worker)

    def _go_on(self, worker: int) -> None:
        """Take up the next part: of those left, an odd number means that it computes, an even one that it blocks."""
        left = self._left[worker] = self._left[worker] - 1
        if left % 2:
            self._clock.compute(worker, self._plan[worker][left - 1], self._worker_cores)
        elif left:
            self._clock.rest(worker, self._plan[worker][left - 1])
        else:
            task = self._todo[worker].popleft()
            if self._todo[worker]:
                self._begin(worker)
            if self._latency:
                self._clock.rest(self._on_the_way + task, self._latency)
            else:
                self._arrive(task)

    # between them

    def _arrive(self, task: int) -> None:
        if self._relaying is None:
            self._put(task)
        else:
            self._pinning.append(task)
            if len(self._pinning) == 1:
                self._pin()

    def _pin(self) -> None:
        assert self._relaying is not None
        self._clock.rest(self._relay, self._relaying[self._tasks[self._pinning[0]][1]])

    def _pinned(self) -> None:
        task = self._pinning.popleft()
        if self._pinning:
            self._pin()
        self._put(task)

    def _put(self, task: int) -> None:
        self._pipe.append(task)
        if self._waiting:
            self._wait()

    # the consumer

    def _ask(self) -> None:
        self._asked = self._clock.now
        self._wait()

    def _wait(self) -> None:
        self._waiting = False
        if self._expected in self._early:
            self._early.remove(self._expected)
            self._task = self._expected
            self._return()
        elif self._pipe:
            self._task = self._pipe.popleft()
            self._does = self._unpickle
            self._clock.rest(self._consumer, self._held_up_s(*self._tasks[self._task]))
        else:
            self._waiting = True

    def _held_up_s(self, worker: int, batch: int) -> float:
        """Return for how long a batch cannot be unpickled now because its worker is busy.

        A worker holds its interpreter's lock, some of that also while it waits for a core, and until it is done with
        what it makes.
        """
        if not self._todo[worker]:
            return 0.0
        crowding = self._clock.crowding / self._crowding
        held_s: float = max(self._handoff[batch] - self._idle_handoff, 0.0)
        return min(held_s * crowding, sum(self._plan[worker][: self._left[worker]]))

    def _unpickle(self) -> None:
        work_s = min(self._handoff[self._tasks[self._task][1]], self._idle_handoff)
        self._does = self._unpickled
        self._clock.compute(self._consumer, work_s / self._crowding, 1.0)

    def _unpickled(self) -> None:
        if self._setting.in_order and self._task != self._expected:
            self._early.add(self._task)
            self._wait()
        else:
            self._return()

    def _return(self) -> None:
        now = self._clock.now
        self._got.append(now)
        self._waited.append(now - self._asked)
        worker, batch = self._tasks[self._task]
        self._given_out[worker] -= 1
        self._expected += 1
        self._give_out()
        self._does = self._computed
        self._clock.compute(self._consumer, self._step_computing[batch], self._step_cores)

    def _computed(self) -> None:
        self._does = self._ask
        self._clock.rest(self._consumer, self._step_resting[self._tasks[self._task][1]])


# --- predictions ------------------------------------------------------------------------------------


def grid(base: Setting, cores: float) -> tuple[Setting, ...]:
    """Return the settings worth predicting around `base` on a machine of so many cores, `base` itself among them.

    Up to twice the cores, or two workers more than there were, ever more thinly.
    """
    most = max(math.ceil(2 * cores), base.workers + 2)
    workers = {*range(min(most, 4) + 1), base.workers, most}
    workers.update(count for power in range(2, most.bit_length()) for count in (2**power, 3 * 2 ** (power - 1)))
    found = {
        base if base.workers else base._replace(prefetch=PREFETCHES[0]),
        base._replace(workers=0, prefetch=PREFETCHES[0]),
    }
    found.update(
        base._replace(workers=count, prefetch=prefetch)
        for count in workers
        for prefetch in PREFETCHES
        if 0 < count <= most
    )
    return tuple(sorted(found))


def predict(load: Load, base: Setting, settings: Iterable[Setting]) -> tuple[Prediction, ...]:
    """Return what each setting would deliver, with a 95 % interval on its speed-up over the replay of `base`.

    The value is from the batches as recorded. The interval holds two errors, independent and so added in quadrature on
    the log scale: that other batches could have been recorded (both settings replay the same resampled ones; Student's
    t over `RESAMPLES` of them) and the model's own (`MODEL_ERROR`). A setting against itself has neither.

    `base` is what was recorded. What its step took is known, and what the replay lacks of that (wake-ups, the kernel's
    own work) it lacks elsewhere: all step times are longer by the same factor. Speed-ups need none.
    Raises ValueError as `replay` does.
    """
    seeds = range(RESAMPLES)
    base_s = mean_step_s(load, base)
    unexplained = 1.0
    if load.recorded_step_s and base_s > 0:
        unexplained = min(max(load.recorded_step_s / base_s, 1 / MOST_UNEXPLAINED), MOST_UNEXPLAINED)
    base_logs = np.array([_log(replay(load, base, seed=seed).step_s) for seed in seeds])
    t = float(stdtrit(RESAMPLES - 1, 0.975))
    found = []
    for setting in settings:
        step_s, half = base_s, 0.0
        if setting != base:
            step_s = mean_step_s(load, setting)
            logs = base_logs - [_log(replay(load, setting, seed=seed).step_s) for seed in seeds]
            half = math.hypot(t * float(logs.std(ddof=1)), 1.96 * MODEL_ERROR)
        gain = _log(base_s) - _log(step_s)
        found.append(
            Prediction(
                workers=setting.workers,
                prefetch=setting.prefetch if setting.workers else None,
                in_order=setting.in_order,
                step_s=step_s * unexplained,
                samples_per_s=load.samples / (step_s * unexplained) if load.samples and step_s > 0 else None,
                speedup=math.exp(gain),
                speedup_low=math.exp(gain - half),
                speedup_high=math.exp(gain + half),
            )
        )
    return tuple(found)


def _log(step_s: float) -> float:
    return math.log(max(step_s, 1e-9))  # a step without any work takes no time, and clocks count nanoseconds


def smallest_best(predictions: Iterable[Prediction]) -> Prediction:
    """Return the setting with the fewest workers, then the least prefetch, within 2 % of the best step.

    Raises ValueError where there are no predictions.
    """
    among = list(predictions)
    if not among:
        raise ValueError("no predictions to choose from")
    enough = min(one.step_s for one in among) * (1 + GOOD_ENOUGH)
    return min(
        (one for one in among if one.step_s <= enough),
        key=lambda one: (one.workers, one.prefetch or 0, not one.in_order),
    )
