"""What a loader did as a Chrome trace: a lane for each worker, for its feeder, for the main and the pin thread.

The Trace Event Format, in the parts that Perfetto and chrome://tracing both read: complete events (`"ph": "X"`),
flows (`s`, `t`, `f`), counters (`C`), instants (`i`) and the metadata that names and sorts lanes (`M`); `ts` and `dur`
are microseconds, written to the nanosecond, from the moment at which watching began. Only what has a place in time is
drawn: the stages of a batch are sums over its samples and stand in its arguments.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bsprof.errors import BsprofError
from bsprof.files import write_whole
from bsprof.loading import MAIN, Batches, Loading, Worker
from bsprof.report import figures

Event = dict[str, Any]

_CONSUMER, _WORKERS = 1, 2
"""The two groups of lanes, as processes: restarted workers keep their lane, and real process ids may come back."""
_MAIN_LANE = "main thread"
_ARRIVALS_LANE = "unpickling"
_PIN_LANE = "pin thread"


def chrome_trace(loading: Loading) -> dict[str, Any]:
    """Return the trace of a loading as the JSON object of the Trace Event Format.

    The events of one lane nest or do not overlap: where two would, as with two passes over one loader at a time, the
    later one goes to a lane of its own. The arrows of a batch lead from its worker to the next() that returned it. A
    batch whose times were not captured is not drawn, and an argument that was not captured is not there.
    """
    spans = [*_main_spans(loading), *_batch_spans(loading), *_worker_spans(loading.workers)]
    spans = [span for span in spans if span.end_ns >= span.start_ns]
    lanes = _Lanes()
    events = [lanes.draw(span) for span in sorted(spans, key=_drawn_before)]
    events += _flows(lanes.drawn)
    events += _counters(loading)
    events += _instants(loading)
    settings = {key: _plain(value) for key, value in msgspec.to_builtins(loading.settings).items() if value is not None}
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [*lanes.names(), *sorted(events, key=lambda event: event["ts"])],
        "otherData": {"loader": settings, "watched_s": loading.window_ns * 1e-9, "batches_dropped": loading.dropped},
    }


def write_trace(loading: Loading, path: Path) -> None:
    """Write the trace of a loading to `path`, gzipped where its name ends in `.gz`: the whole file or nothing.

    Raises BsprofError where the name ends in neither `.json` nor `.json.gz`, or the file cannot be written.
    """
    if not path.name.endswith((".json", ".json.gz")):
        raise BsprofError(f"{path}: a trace is written as JSON", hint="give it a name in .json or .json.gz")
    if path.exists() and not path.is_file():
        raise BsprofError(f"{path}: not a regular file")
    try:
        write_whole(path, msgspec.json.encode(chrome_trace(loading)))
    except OSError as error:
        raise BsprofError(f"{path}: {error.strerror or error}") from error


# --- what is drawn ------------------------------------------------------------------------------------


class _Span(NamedTuple):
    """One complete event before it has a lane."""

    group: int
    lane: str
    rank: int
    """Place of the lane in its group."""
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Any]
    batch: int | None = None
    """The batch whose arrow passes through it."""


def _main_spans(loading: Loading) -> Iterator[_Span]:
    """Yield iter(), each next() and the consumer's own part of the step, which is what lies between two of them."""
    calls = []
    for number, epoch in enumerate(loading.epochs):
        args = _known(epoch=number, pickled_bytes=epoch.pickled_bytes)
        calls.append(_Span(_CONSUMER, _MAIN_LANE, 0, "iter()", epoch.began_at_ns, epoch.ready_at_ns, args))
        if epoch.last_asked_at_ns is not None and epoch.ended_at_ns is not None:
            args = {"epoch": number, "returned": "StopIteration"}
            ended = (epoch.last_asked_at_ns, epoch.ended_at_ns)
            calls.append(_Span(_CONSUMER, _MAIN_LANE, 0, "next() at the end", *ended, args))
    batches = loading.batches
    for index, (asked, got) in enumerate(zip(batches.asked_at_ns, batches.got_at_ns, strict=True)):
        if asked is not None and got is not None:
            args = _wait_args(batches, index)
            calls.append(_Span(_CONSUMER, _MAIN_LANE, 0, "next()", asked, got, args, index))
    calls.sort(key=lambda call: call.start_ns)
    yield from calls
    starts = [call.start_ns for call in calls]
    for call in calls:
        if call.batch is None:
            continue
        following = bisect_right(starts, call.start_ns)
        if following < len(starts) and starts[following] > call.end_ns:
            args = {"epoch": batches.epoch[call.batch], "order": batches.order[call.batch]}
            yield _Span(_CONSUMER, _MAIN_LANE, 0, "step", call.end_ns, starts[following], args)


def _wait_args(batches: Batches, index: int) -> dict[str, Any]:
    """Say what a next() waited for: the batch had not been sent yet, later ones had come first, it was on its way."""
    asked, got, sent = batches.asked_at_ns[index], batches.got_at_ns[index], batches.sent_at_ns[index]
    unsent = handed = None
    if asked is not None and got is not None and sent is not None:
        unsent = min(max(sent - asked, 0), got - asked)
        handed = got - asked - unsent
    return {
        **_batch_args(batches, index),
        **_known(not_sent_ms=_ms(unsent), ordering_ms=_ms(batches.ordering_ns[index]), hand_off_ms=_ms(handed)),
    }


def _batch_spans(loading: Loading) -> Iterator[_Span]:
    """Yield what was done to each batch before next() had it: fetched, pickled, unpickled, pinned."""
    batches = loading.batches
    pinning = any(moment is not None for moment in batches.pinned_at_ns)
    arrivals = (_PIN_LANE, 2) if pinning else (_ARRIVALS_LANE, 1)
    for index, worker in enumerate(batches.worker):
        args = _batch_args(batches, index)
        begun, produced = batches.begun_at_ns[index], batches.produced_at_ns[index]
        if begun is not None and produced is not None:
            lane = (_CONSUMER, _MAIN_LANE, 0) if worker == MAIN else _worker_lane(worker)
            yield _Span(*lane, "fetch", begun, produced, {**args, **_fetch_args(batches, index)}, index)
        if worker != MAIN and (sent := batches.sent_at_ns[index]) is not None:
            yield from _until(
                _feeder_lane(worker), "pickle", sent, batches.serialise_ns[index], args, index, batches.pickled_bytes
            )
        if (received := batches.received_at_ns[index]) is not None:
            yield from _until((_CONSUMER, *arrivals), "unpickle", received, batches.unpickle_ns[index], args, index)
        if (pinned := batches.pinned_at_ns[index]) is not None:
            yield from _until((_CONSUMER, _PIN_LANE, 2), "pin", pinned, batches.pin_ns[index], args, index)


def _until(
    lane: tuple[int, str, int],
    name: str,
    end_ns: int,
    took_ns: int | None,
    args: dict[str, Any],
    batch: int,
    pickled_bytes: Sequence[int | None] | None = None,
) -> Iterator[_Span]:
    """Yield a span of which the end and the duration were measured; none where it was not."""
    if took_ns is not None:
        if pickled_bytes is not None:
            args = {**args, **_known(pickled_bytes=pickled_bytes[batch])}
        yield _Span(*lane, name, end_ns - took_ns, end_ns, args, batch)


def _worker_lane(worker: int) -> tuple[int, str, int]:
    return _WORKERS, f"worker {worker}", 2 * worker


def _feeder_lane(worker: int) -> tuple[int, str, int]:
    return _WORKERS, f"worker {worker} feeder thread", 2 * worker + 1


def _worker_spans(workers: Sequence[Worker]) -> Iterator[_Span]:
    """Yield what each worker did before its first batch, once the data set had arrived in it."""
    for worker in workers:
        if worker.id != MAIN and worker.entered_at_ns is not None and worker.ready_at_ns is not None:
            args = {"pid": worker.pid, "epoch": worker.epoch}
            moments = (worker.entered_at_ns, worker.ready_at_ns)
            yield _Span(*_worker_lane(worker.id), "worker_init_fn", *moments, args)


def _batch_args(batches: Batches, index: int) -> dict[str, Any]:
    return {
        "epoch": batches.epoch[index],
        "order": batches.order[index],
        **_known(samples=batches.samples[index]),
        **({} if batches.worker[index] == MAIN else {"worker": batches.worker[index]}),
    }


def _fetch_args(batches: Batches, index: int) -> dict[str, Any]:
    begun, produced = batches.begun_at_ns[index], batches.produced_at_ns[index]
    cpu, queued = batches.cpu_ns[index], batches.runqueue_ns[index]
    blocked = None
    if begun is not None and produced is not None and cpu is not None and queued is not None:
        blocked = max(produced - begun - cpu - queued, 0)  # clocks of different make: it may fall just below zero
    stages = {f"stage {_text(name)} ms": _ms(times[index]) for name, times in batches.stage_ns.items()}
    return _known(
        items_ms=_ms(batches.items_ns[index]),
        **stages,
        collate_ms=_ms(batches.collate_ns[index]),
        cpu_ms=_ms(cpu),
        run_queue_ms=_ms(queued),
        blocked_ms=_ms(blocked),
        process_cpu_ms=_ms(batches.process_cpu_ns[index]),
        minor_faults=batches.minor_faults[index],
        major_faults=batches.major_faults[index],
        blocks_in=batches.blocks_in[index],
        tensors=batches.tensors[index],
        bytes=batches.bytes[index],
    )


def _drawn_before(span: _Span) -> tuple[int, bool, int]:
    """Sort spans by their beginning, the whole before its parts; one that takes no time is no part of the next."""
    return span.start_ns, span.end_ns > span.start_ns, -span.end_ns


# --- lanes and arrows -----------------------------------------------------------------------------------


class _Lane:
    """One thread of the trace. Spans come by their beginning, and one that begins inside another must end in it."""

    def __init__(self, group: int, tid: int, name: str, rank: int) -> None:
        self.group, self.tid, self.name, self.rank = group, tid, name, rank
        self._open: list[_Span] = []

    def takes(self, span: _Span) -> bool:
        """Whether `span` lies behind what is here, or wholly inside what it can be a part of; it is then here too."""
        while self._open and self._open[-1].end_ns <= span.start_ns:
            self._open.pop()
        if self._open and (span.end_ns > self._open[-1].end_ns or span.name == self._open[-1].name):
            return False
        self._open.append(span)
        return True


class _Drawn(NamedTuple):
    lane: _Lane
    span: _Span


class _Lanes:
    """Lays spans into lanes so that those of one lane nest or do not overlap, which is what viewers draw rightly."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[int, str], list[_Lane]] = {}
        self._count = 0
        self.drawn: dict[int, list[_Drawn]] = {}
        """By batch, for its arrow."""

    def draw(self, span: _Span) -> Event:
        alike = self._lanes.setdefault((span.group, span.lane), [])
        lane = next((lane for lane in alike if lane.takes(span)), None)
        if lane is None:
            self._count += 1
            name = span.lane if not alike else f"{span.lane} ({len(alike) + 1})"
            # A thread's number is unique in the whole trace, and never a process's: viewers mix them up.
            lane = _Lane(span.group, 100 + self._count, name, span.rank)
            alike.append(lane)
            lane.takes(span)
        if span.batch is not None:
            self.drawn.setdefault(span.batch, []).append(_Drawn(lane, span))
        return {
            "ph": "X",
            "name": span.name,
            "cat": "loader",
            "pid": lane.group,
            "tid": lane.tid,
            "ts": _us(span.start_ns),
            "dur": _us(span.end_ns - span.start_ns),
            "args": span.args,
        }

    def names(self) -> Iterator[Event]:
        """Yield the metadata that names and sorts the groups and their lanes."""
        groups = {_CONSUMER: "consumer", _WORKERS: "workers"}
        lanes = [lane for alike in self._lanes.values() for lane in alike]
        for pid, name in groups.items():
            tid = min((lane.tid for lane in lanes if lane.group == pid), default=pid)
            yield _metadata("process_name", pid, tid, name=name)
            yield _metadata("process_sort_index", pid, tid, sort_index=pid)
        for lane in lanes:
            yield _metadata("thread_name", lane.group, lane.tid, name=lane.name)
            yield _metadata("thread_sort_index", lane.group, lane.tid, sort_index=lane.rank)


def _metadata(kind: str, pid: int, tid: int, **args: str | int) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0.0, "args": args}


def _flows(drawn: dict[int, list[_Drawn]]) -> Iterator[Event]:
    """Yield the arrow of each batch that next() returned and that was made elsewhere than there.

    An end of an arrow belongs to the span around it in its lane, so each point lies inside its span: in the middle,
    but for next(), in which the batch comes at the very end. A span that takes no time has no inside.
    """
    for batch, passed in drawn.items():
        arrived = next((one for one in passed if one.span.name == "next()"), None)
        before = [one for one in passed if one.span.lane != _MAIN_LANE and one.span.end_ns > one.span.start_ns]
        if arrived is None or not before or arrived.span.end_ns == arrived.span.start_ns:
            continue
        points = sorted(((one, (one.span.start_ns + one.span.end_ns) // 2) for one in before), key=lambda one: one[1])
        points.append((arrived, arrived.span.end_ns - 1))
        if points[-2][1] > points[-1][1]:
            continue  # an arrow back in time: the clocks of two processes do not agree
        for place, (one, at_ns) in enumerate(points):
            phase = "s" if place == 0 else "f" if place == len(points) - 1 else "t"
            yield {
                "ph": phase,
                "name": "batch",
                "cat": "batch",
                "id": batch + 1,
                "pid": one.lane.group,
                "tid": one.lane.tid,
                "ts": _us(at_ns),
                **({"bp": "e"} if phase == "f" else {}),
            }


# --- counters and instants ------------------------------------------------------------------------------


def _counters(loading: Loading) -> Iterator[Event]:
    yield from _ready_batches(loading)
    for worker in loading.workers:
        where = "the consumer" if worker.id == MAIN else f"worker {worker.id}"
        pid = _CONSUMER if worker.id == MAIN else _WORKERS
        for at_ns, size in zip(worker.memory_at_ns, worker.private_bytes, strict=False):
            yield _counter(f"private memory of {where}", pid, at_ns, MiB=size / 2**20)


def _ready_batches(loading: Loading) -> Iterator[Event]:
    """Count the batches that workers had sent and next() had not returned; an abandoned pass takes its own along."""
    batches = loading.batches
    ends = {number: epoch.began_at_ns for number, epoch in enumerate(loading.epochs[1:])}
    changes: list[tuple[int, int]] = []
    for sent, got, epoch in zip(batches.sent_at_ns, batches.got_at_ns, batches.epoch, strict=True):
        if sent is None:
            continue
        gone = got if got is not None else ends.get(epoch)
        changes.append((sent, 1))
        if gone is not None:
            changes.append((max(gone, sent), -1))
    depth = 0
    for at_ns, change in sorted(changes, key=lambda change: (change[0], -change[1])):
        depth += change
        yield _counter("ready batches", _CONSUMER, at_ns, batches=depth)


def _counter(name: str, pid: int, at_ns: int, **values: float) -> Event:
    return {"ph": "C", "name": name, "cat": "loader", "pid": pid, "tid": pid, "ts": _us(at_ns), "args": values}


def _instants(loading: Loading) -> Iterator[Event]:
    for number, epoch in enumerate(loading.epochs):
        for name, at_ns in ((f"epoch {number} begins", epoch.began_at_ns), (f"epoch {number} ends", epoch.ended_at_ns)):
            if at_ns is not None:
                yield {
                    "ph": "i",
                    "name": name,
                    "cat": "loader",
                    "pid": _CONSUMER,
                    "tid": _CONSUMER,
                    "ts": _us(at_ns),
                    "s": "p",
                    "args": {"epoch": number},
                }


# --- how values are written -----------------------------------------------------------------------------


def _us(ns: int) -> float:
    """Return microseconds that come back as the same nanoseconds: Perfetto multiplies by 1000 and cuts the rest off.

    A nanosecond lost there would push a call that begins where another ends inside of it.
    """
    us = ns / 1000
    return us if int(us * 1000.0) == ns else math.nextafter(us, math.inf)


def _ms(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e6


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _text(text: str) -> str:
    """Make a name of the user's fit for any reader of JSON: no control characters, no halves of a pair."""
    return figures.printable(text)


def _plain(value: object) -> object:
    return _text(value) if isinstance(value, str) else value
