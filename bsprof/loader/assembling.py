"""From what the hooks saw to the nouns: one Loading for each loader."""

from __future__ import annotations

import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bsprof.loader import recording
from bsprof.loader.recording import ABSENT, COUNTED, ENDED, FIGURES_A_STAGE, HASHED, Batch, Recorded, Sent
from bsprof.loader.worker import Cost
from bsprof.loading import (
    MAIN,
    Batches,
    Consumer,
    Epoch,
    LoaderSettings,
    Loading,
    ProbeCost,
    SampleTimes,
    SlowSample,
    Stage,
    Worker,
)
from bsprof.noun import Note

HERE = -1
"""Stands for the start of workers where the consuming process is the worker, once for all of its passes."""

SLOWEST = 10
"""Samples that are named."""

_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


# --- what the consuming process saw -----------------------------------------------------------------


class Row(NamedTuple):
    """One call of next()."""

    place: int | None
    """Which of the batches given out to workers it was about."""
    asked: int
    got: int | None
    ordering: int | None
    cpu_asked: int
    cpu_got: int | None
    pinned: tuple[int, int] | None
    """Page-locked in next() itself: how long it took, and when it was done."""


@dataclass(slots=True)
class Start:
    """One start of workers, or of the fetcher that stands for them in the consuming process."""

    number: int
    workers: int
    first_pass: int
    fetcher: int | None = None
    """Without workers: which of the consuming process's fetchers it made."""
    pickled_bytes: int | None = None
    exit_codes: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Pass:
    """One pass over a loader."""

    epoch: int
    start: Start | None
    """None where the workers were there before the probe was."""
    generation: int
    """Passes before it with the same workers."""
    began: int | None = None
    ready: int | None = None
    last_asked: int | None = None
    ended: int | None = None
    dispatched: dict[int, tuple[int, int]] = field(default_factory=dict)
    """For each batch given out: the worker, and when."""
    received: dict[int, tuple[int, int | None, int | None, int | None]] = field(default_factory=dict)
    """For each batch that came back: when, how long unpickling and page-locking took, when the latter was done."""
    rows: list[Row] = field(default_factory=list)
    ordering_since: int | None = None
    last_received: int | None = None


@dataclass(slots=True)
class WatchedLoader:
    """Everything that the consuming process saw of one loader."""

    settings: LoaderSettings | None = None
    passes: list[Pass] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    seen: int = 0
    dropped: int = 0


# --- matching ---------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """A batch as its worker saw it."""

    batch: Batch
    stages: dict[str, array.array[int]]
    """For each stage the figures after its number."""


@dataclass
class _Line:
    """One batch, matched."""

    epoch: int
    worker: int
    row: Row | None = None
    dispatched: int | None = None
    received: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    made: _Made | None = None
    sent: Sent | None = None
    order: int = 0

    @property
    def got(self) -> int | None:
        return self.row.got if self.row is not None else None


class _Recordings:
    """The recordings of one loader's workers."""

    def __init__(self, loader: WatchedLoader, contents: Mapping[tuple[int, int], bytes]) -> None:
        self.of: dict[tuple[int, int], Recorded] = {}
        self.missing = 0
        self._made: dict[tuple[int, int, int | None, int], _Made] = {}
        self._sent: dict[tuple[int, int, int, int], Sent] = {}
        for start in loader.starts:
            for worker in range(start.workers):
                self._add(start.number, worker, recording.decode(contents.get((start.number, worker), b"")))
        here = [start for start in loader.starts if not start.workers]
        if here:
            recorded = recording.decode(contents.get((HERE, MAIN), b""))
            fetchers = {start.fetcher for start in here if start.fetcher is not None}
            self.missing += len(here) - len(fetchers)
            self._add(HERE, MAIN, recorded and recorded.of(fetchers))

    def made(self, start: Start, worker: int, generation: int, number: int) -> _Made | None:
        """Return the fetch that came `number`-th in a pass."""
        if not start.workers:
            return self._made.get((HERE, MAIN, start.fetcher, number))
        return self._made.get((start.number, worker, generation, number))

    def sent(self, start: Start, worker: int, generation: int, place: int) -> Sent | None:
        """Return when the batch was pickled that was given out `place`-th in a pass."""
        return self._sent.get((start.number, worker, generation, place))

    def all(self) -> Iterable[Recorded]:
        return self.of.values()

    def _add(self, start: int, worker: int, recorded: Recorded | None) -> None:
        if recorded is None:
            self.missing += worker != MAIN
            return
        self.of[start, worker] = recorded
        for batch, figures in zip(recorded.batches, recorded.stages, strict=True):
            stages = {
                recorded.stage_names.get(figures[at], "?"): figures[at + 1 : at + FIGURES_A_STAGE]
                for at in range(0, len(figures), FIGURES_A_STAGE)
            }
            self._made[start, worker, batch.generation, batch.number] = _Made(batch, stages)
        for sent in recorded.sent:
            self._sent.setdefault((start, worker, sent.generation, sent.place), sent)


def _lines(loader: WatchedLoader, recordings: _Recordings) -> list[_Line]:
    lines = [line for one in loader.passes for line in _lines_of(one, recordings)]
    got = sorted((line for line in lines if line.got is not None), key=lambda line: line.got or 0)
    rest = [line for line in lines if line.got is None]
    orders: dict[int, int] = defaultdict(int)
    for line in (*got, *rest):
        line.order = orders[line.epoch]
        orders[line.epoch] += 1
    return [*got, *rest]


def _lines_of(one: Pass, recordings: _Recordings) -> Iterator[_Line]:
    """Match what is known of each batch of a pass.

    A worker does not learn what a batch is called by its fetch, but it takes up what it is given in order: its k-th
    fetch of a pass is the k-th that was given to it.
    """
    start = one.start
    if not one.dispatched:
        for number, row in enumerate(one.rows):
            line = _Line(one.epoch, MAIN, row=row)
            if row.pinned is not None:
                line.received = (None, None, *row.pinned)
            if start is not None:
                line.made = recordings.made(start, MAIN, 0, number)
            yield line
        return
    rows = {row.place: row for row in one.rows if row.place is not None}
    numbers: dict[int, int] = defaultdict(int)
    over: set[int] = set()
    for place in sorted(one.dispatched.keys() | rows.keys()):
        # Of an iterator that is older than the probe, the first batches were given out before.
        worker, at = one.dispatched.get(place, (MAIN, None))
        line = _Line(one.epoch, worker, row=rows.get(place), dispatched=at)
        line.received = one.received.get(place, line.received)
        if start is not None:
            line.made = recordings.made(start, worker, one.generation, numbers[worker])
            line.sent = recordings.sent(start, worker, one.generation, place)
        numbers[worker] += 1
        if line.made is not None and line.made.batch.status == ENDED:
            over.add(worker)
        if worker not in over:
            # What an iterable data set's worker is given after its stream's end makes no batch.
            yield line


# --- assembling -------------------------------------------------------------------------------------


def assemble(
    loader: WatchedLoader,
    contents: Mapping[tuple[int, int], bytes],
    *,
    began: int,
    window_ns: int,
    cost: Cost | None,
) -> Loading:
    """Return what was seen of `loader`, moments counting from `began`.

    `contents` holds the recordings by the start's number and the worker.
    """
    recordings = _Recordings(loader, contents)
    lines = _lines(loader, recordings)
    return Loading(
        settings=loader.settings or LoaderSettings(kind="DataLoader"),
        consumer=Consumer(kind="loop", cpu_share=_consumer_cpu(loader)),
        window_ns=window_ns,
        batches=_batches(lines, began),
        workers=tuple(_workers(loader, recordings, began)),
        epochs=tuple(_epochs(loader, began)),
        stages=_stages(recordings),
        samples=_samples(recordings),
        probe=cost and ProbeCost(batch_ns=cost.batch, brief_ns=cost.brief, sample_ns=cost.sample, stage_ns=cost.stage),
        dropped=loader.dropped + sum(recorded.dropped for recorded in recordings.all()),
        notes=tuple(_notes(loader, recordings)),
    )


def _batches(lines: list[_Line], began: int) -> Batches:
    def since(at: int | None) -> int | None:
        return None if at is None or at == ABSENT else at - began

    def figure(name: str) -> list[int | None]:
        return [_present(getattr(line.made.batch, name)) if line.made else None for line in lines]

    stages = sorted({stage for line in lines if line.made for stage in line.made.stages})
    return Batches(
        epoch=[line.epoch for line in lines],
        order=[line.order for line in lines],
        worker=[line.worker for line in lines],
        samples=figure("samples"),
        asked_at_ns=[since(line.row.asked) if line.row else None for line in lines],
        got_at_ns=[since(line.row.got) if line.row else None for line in lines],
        dispatched_at_ns=[since(line.dispatched) for line in lines],
        begun_at_ns=[since(line.made.batch.begun) if line.made else None for line in lines],
        produced_at_ns=[since(line.made.batch.produced) if line.made else None for line in lines],
        sent_at_ns=[since(line.sent.ended) if line.sent else None for line in lines],
        received_at_ns=[since(line.received[0]) for line in lines],
        pinned_at_ns=[since(line.received[3]) for line in lines],
        items_ns=figure("items"),
        collate_ns=figure("collate"),
        serialise_ns=[line.sent.ended - line.sent.begun if line.sent else None for line in lines],
        unpickle_ns=[line.received[1] for line in lines],
        pin_ns=[line.received[2] for line in lines],
        ordering_ns=[line.row.ordering if line.row else None for line in lines],
        cpu_ns=figure("cpu"),
        runqueue_ns=figure("runqueue"),
        process_cpu_ns=figure("process_cpu"),
        minor_faults=figure("minor_faults"),
        major_faults=figure("major_faults"),
        blocks_in=figure("blocks_in"),
        switches=figure("switches"),
        tensors=figure("tensors"),
        bytes=figure("bytes"),
        float_bytes=figure("float_bytes"),
        pickled_bytes=[line.sent.length if line.sent else None for line in lines],
        stage_ns={
            stage: [line.made.stages[stage][0] if line.made and stage in line.made.stages else 0 for line in lines]
            for stage in stages
        },
    )


def _present(figure: int) -> int | None:
    return None if figure == ABSENT else figure


def _consumer_cpu(loader: WatchedLoader) -> float | None:
    """CPU seconds of the consuming process for each second between a batch and the next question."""
    cpu = wall = 0
    for one in loader.passes:
        for before, after in zip(one.rows, one.rows[1:], strict=False):
            if before.got is not None and before.cpu_got is not None:
                cpu += after.cpu_asked - before.cpu_got
                wall += after.asked - before.got
    return cpu / wall if wall else None


def _workers(loader: WatchedLoader, recordings: _Recordings, began: int) -> Iterator[Worker]:
    starts = {start.number: start for start in loader.starts}
    for (number, worker), recorded in recordings.of.items():
        start = starts.get(number, loader.starts[0])
        code = start.exit_codes.get(worker)
        memory = [look for look in recorded.looks if look.private_bytes != ABSENT]
        in_worker = worker != MAIN
        yield Worker(
            id=worker,
            pid=recorded.pid,
            epoch=start.first_pass,
            entered_at_ns=recorded.entered - began if in_worker and recorded.entered != ABSENT else None,
            ready_at_ns=recorded.ready - began if in_worker and recorded.ready != ABSENT else None,
            cores=_present(recorded.cores),
            torch_threads=_present(recorded.torch_threads),
            threads=_most(look.threads for look in recorded.looks),
            open_files=_most(look.open_files for look in recorded.looks),
            memory_at_ns=[look.at - began for look in memory],
            private_bytes=[look.private_bytes for look in memory],
            ended=None if code is None else "ok" if code == 0 else "died",
        )


def _most(figures: Iterable[int]) -> int | None:
    return max((figure for figure in figures if figure != ABSENT), default=None)


def _epochs(loader: WatchedLoader, began: int) -> Iterator[Epoch]:
    for one in loader.passes:
        first = one.began if one.began is not None else min((row.asked for row in one.rows), default=began)
        new_workers = one.start is not None and one.generation == 0
        yield Epoch(
            began_at_ns=first - began,
            ready_at_ns=(one.ready if one.ready is not None else first) - began,
            last_asked_at_ns=one.last_asked - began if one.last_asked is not None else None,
            ended_at_ns=one.ended - began if one.ended is not None else None,
            pickled_bytes=one.start.pickled_bytes if new_workers and one.start else None,
        )


def _stages(recordings: _Recordings) -> dict[str, Stage]:
    totals: dict[str, Any] = {}
    for recorded in recordings.all():
        for figures in recorded.stages:
            for at in range(0, len(figures), FIGURES_A_STAGE):
                name = recorded.stage_names.get(figures[at], "?")
                totals[name] = totals.get(name, 0) + np.array(figures[at + 1 : at + FIGURES_A_STAGE], dtype=np.int64)
    return {
        name: Stage(
            ns=int(total[0]),
            calls=int(total[1]),
            closely_ns=int(total[2]),
            closely_cpu_ns=int(total[3]),
            closely_calls=int(total[4]),
        )
        for name, total in sorted(totals.items())
    }


def _samples(recordings: _Recordings) -> SampleTimes | None:
    """Summarise the samples' times; None where no single sample's is known."""
    texts: dict[str, int] = {}
    parts = [part for recorded in recordings.all() for part in _timed_samples(recorded, texts)]
    if not parts:
        return None
    # One column a sample: what its key means, the key, how long it took, when it was done, its worker.
    columns = np.concatenate(parts, axis=1)
    times = columns[2]
    quantiles = np.quantile(times, list(_QUANTILES.values()))
    return SampleTimes(
        count=len(times),
        mean_ns=float(times.mean()),
        quantiles_ns={name: round(float(ns)) for name, ns in zip(_QUANTILES, quantiles, strict=True)},
        slowest=_slowest(columns[:, columns[0] != _NAMELESS], list(texts)),
    )


_NAMELESS, _TEXT, _INDEX, _PLACE = range(4)
"""What tells a sample from others: nothing that is known, its name's number, its index, its place in the stream of the
worker whose number is added."""


def _timed_samples(recorded: Recorded, texts: dict[str, int]) -> Iterator[Any]:
    for batch, names, ends in zip(recorded.batches, recorded.sample_names, recorded.sample_ends, strict=True):
        if not batch.timed:
            continue
        columns = np.empty((5, batch.timed), dtype=np.int64)
        columns[3] = ends
        columns[2] = np.diff(columns[3], prepend=batch.begun)
        columns[4] = recorded.worker
        if batch.naming == COUNTED:
            columns[0] = _PLACE + 1 + recorded.worker
            columns[1] = np.arange(names[0], names[0] + batch.timed)
        elif batch.naming == HASHED:
            for place, hashed in enumerate(names):
                text = recorded.index_names.get(hashed)
                columns[0, place] = _NAMELESS if text is None else _TEXT
                columns[1, place] = 0 if text is None else texts.setdefault(text, len(texts))
        else:
            columns[0] = _INDEX
            columns[1] = names
        yield columns


def _slowest(columns: Any, texts: list[str]) -> tuple[SlowSample, ...]:
    """Return the samples with the highest median times."""
    kinds, keys, times, ended, workers = columns[:, np.lexsort((columns[2], columns[1], columns[0]))]
    if not len(keys):
        return ()
    first = np.flatnonzero(np.r_[True, (np.diff(kinds) != 0) | (np.diff(keys) != 0)])
    last = np.r_[first[1:], len(keys)]
    medians = times[(first + last - 1) // 2]  # sorted within each sample; of two the lower, as once is not always
    slowest = []
    for group in np.argsort(-medians, kind="stable")[:SLOWEST]:
        of = slice(first[group], last[group])
        key = int(keys[first[group]])
        slowest.append(
            SlowSample(
                index=texts[key] if kinds[first[group]] == _TEXT else str(key),
                worker=int(workers[of][-1]),
                times_ns=times[of][np.argsort(ended[of])].tolist(),
            )
        )
    return tuple(slowest)


def _notes(loader: WatchedLoader, recordings: _Recordings) -> Iterator[Note]:
    if not any(start.number >= 0 for start in loader.starts):
        yield Note(
            code="consumer_only",
            text="no more than the consumer's side could be watched: how long it waited, not why",
        )
    if recordings.missing:
        text = f"{recordings.missing} of {sum(max(1, start.workers) for start in loader.starts)} recordings of"
        yield Note(code="unwatched_workers", text=f"{text} batches in the making are missing")
    for recorded in recordings.all():
        for text in recorded.notes:
            yield Note(code="watching_ended", text=f"worker {recorded.worker}: {text}")
