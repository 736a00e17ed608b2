"""What a Chrome trace of torch.profiler says about a training step: pure reading, no torch.

The trace is the profiler's public product, so nothing here rests on its private attributes. The fields are those that
Kineto writes (`libkineto/src/output_json.cpp`, `CuptiActivity.h`): complete events (`"ph": "X"`) with a category, a
thread or stream, `ts` and `dur` in microseconds to three decimals, and `args.correlation`, which an activity of the
device shares with the call on the host that launched it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from bsprof.errors import BsprofError
from bsprof.model import Copy, Hotspot, Profile

RANGE = "bsprof:"
"""What stands before a phase in the name of its range."""
TOP = 10
"""Kernels and operators that are named; all of them are in the sums."""

_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Work. `gpu_user_annotation` mirrors a range of the host, `cuda_sync` is waiting."""
_CALLS = ("_runtime", "_driver")
"""How the categories of launching calls end, on CUDA (`cuda_runtime`, `cuda_driver`: Triton's kernels) and on XPU."""
_COPY = re.compile(r"Memcpy (?P<way>\w+) \((?P<source>[^)]*?) -> (?P<target>[^)]*)\)")
_HOST_MEMORY = ("Pinned", "Pageable")
_COLLECTIVE = "nccl"
"""How the names of NCCL's and RCCL's kernels begin: `ncclDevKernel_AllReduce_Sum_f32_RING_LL(…)`."""

Interval = tuple[int, int]
"""Start and end in nanoseconds."""


class _Args(msgspec.Struct, gc=False):
    correlation: int | None = None
    bytes: int | None = None


class _Event(msgspec.Struct, gc=False):
    """What is read of an event; the many other fields are skipped, which is what makes reading fast."""

    ph: str
    name: str = ""
    cat: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float = 0.0
    dur: float = 0.0
    args: _Args = msgspec.field(default_factory=_Args)


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]  # the format's own spelling


_DECODER = msgspec.json.Decoder(_Trace)


def read_trace(content: bytes, phases: Sequence[str], *, steps: int, wall_ns: int, trace: str | None = None) -> Profile:
    """Return what the Chrome trace in `content` says of `steps` steps, each with one range a phase.

    An activity of the device belongs to the phase in whose range the call that launched it began, on whatever thread:
    autograd launches from a thread of its own, but phases do not overlap in host time. A phase's busy time is the
    length of the union of its activities over all streams, so kernels side by side count once. A launch is a call on
    the host: a CUDA graph's counts once, however many kernels it runs. Operators nest on their thread, and one's own
    time is its duration without those that it calls. What was launched or called before the first range is left out.

    `wall_ns` and the name `trace` are taken over as they are. Where no device was traced, all figures of the device
    are None. Raises BsprofError for what is no Chrome trace, and where a phase has not its `steps` ranges.
    """
    try:
        recorded = _DECODER.decode(content).traceEvents
    except msgspec.DecodeError as error:
        raise BsprofError(f"the profiler's trace cannot be read: {error}") from error
    events = [event for event in recorded if event.ph == "X"]
    spans = _Spans(events)
    ranges = _phase_ranges(events, spans, phases, steps)
    launched_at = _launch_times(events, spans)
    window = min((start for found in ranges.values() for start, _ in found), default=0)
    activities = [
        event
        for event in events
        if event.cat in _ON_DEVICE and launched_at.get(_call(event), spans.start(event)) >= window
    ]
    collectives = [event for event in activities if event.cat == "kernel" and event.name.startswith(_COLLECTIVE)]
    kernels = _hotspots((event.name, spans.duration(event)) for event in activities if event.cat == "kernel")
    operators = _hotspots(
        _own_times([event for event in events if event.cat == "cpu_op" and spans.start(event) >= window], spans)
    )
    return Profile(
        steps=steps,
        wall_ns=wall_ns,
        phase_ns={phase: sum(end - start for start, end in ranges[phase]) for phase in phases},
        busy_ns=_busy_by_phase(activities, spans, launched_at, ranges),
        busy_total_ns=union_ns(map(spans.of, activities)) if activities else None,
        launches=_launches(activities) if activities else None,
        kernels_ns=sum(kernel.ns for kernel in kernels) if activities else None,
        collectives_ns=union_ns(map(spans.of, collectives)) if collectives else None,
        kernels=kernels[:TOP],
        copies=_copies(activities, spans),
        operators_ns=sum(operator.ns for operator in operators),
        operators=operators[:TOP],
        trace=trace,
    )


def union_ns(intervals: Iterable[Interval]) -> int:
    """Return the length of the union of `intervals`: the time in which at least one of them runs."""
    total, reached = 0, None
    for start, end in sorted(intervals):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total


class _Spans:
    """Microseconds in floats made whole nanoseconds, counted from the first event.

    They are written to three decimals, so nothing is lost so long as large numbers are subtracted before they are
    multiplied.
    """

    def __init__(self, events: Sequence[_Event]) -> None:
        self._base = min((event.ts for event in events), default=0.0)

    def start(self, event: _Event) -> int:
        return round((event.ts - self._base) * 1000)

    def duration(self, event: _Event) -> int:
        return round(event.dur * 1000)

    def of(self, event: _Event) -> Interval:
        start = self.start(event)
        return start, start + self.duration(event)


def _phase_ranges(
    events: Sequence[_Event], spans: _Spans, phases: Sequence[str], steps: int
) -> dict[str, list[Interval]]:
    ranges: dict[str, list[Interval]] = {phase: [] for phase in phases}
    for event in events:
        phase = event.name.removeprefix(RANGE)
        if event.cat == "user_annotation" and event.name.startswith(RANGE) and phase in ranges:
            ranges[phase].append(spans.of(event))
    for phase, found in ranges.items():
        if len(found) != steps:
            raise BsprofError(
                f"the profiler's trace has {len(found)} ranges of {phase} for {steps} steps",
                hint="something in the training loop started or stopped a profiler of its own",
            )
    return ranges


def _call(event: _Event) -> int:
    """Return the number that an activity shares with the call that launched it; 0 is none."""
    return event.args.correlation or 0


def _launch_times(events: Sequence[_Event], spans: _Spans) -> dict[int, int]:
    """Return when each call of the device's runtime or driver began, by its number."""
    return {call: spans.start(event) for event in events if event.cat.endswith(_CALLS) and (call := _call(event))}


def _busy_by_phase(
    activities: Sequence[_Event], spans: _Spans, launched_at: dict[int, int], ranges: dict[str, list[Interval]]
) -> dict[str, int] | None:
    """Return each phase's busy time, or None where no activity can be laid to a call on the host."""
    timeline = sorted((start, end, phase) for phase, found in ranges.items() for start, end in found)
    starts = [start for start, _, _ in timeline]
    work: dict[str, list[Interval]] = {phase: [] for phase in ranges}
    joined = False
    for activity in activities:
        at = launched_at.get(_call(activity))
        if at is None:
            continue
        joined = True
        index = bisect_right(starts, at) - 1
        if index >= 0 and at <= timeline[index][1]:
            work[timeline[index][2]].append(spans.of(activity))
    return {phase: union_ns(intervals) for phase, intervals in work.items()} if joined else None


def _launches(activities: Sequence[_Event]) -> int:
    """Count the calls behind `activities`; one whose call is not told is a launch of its own."""
    calls = [_call(activity) for activity in activities]
    return len({*calls} - {0}) + calls.count(0)


def _copies(activities: Sequence[_Event], spans: _Spans) -> tuple[Copy, ...]:
    by_direction: dict[str, list[_Event]] = defaultdict(list)
    for activity in activities:
        if activity.cat == "gpu_memcpy":
            by_direction[_direction(activity.name)].append(activity)
    copies = []
    for direction, made in by_direction.items():
        sizes = [copy.args.bytes for copy in made if copy.args.bytes is not None]
        copies.append(
            Copy(
                direction=direction,
                calls=len(made),
                ns=sum(map(spans.duration, made)),
                bytes=sum(sizes) if len(sizes) == len(made) else None,
            )
        )
    return tuple(sorted(copies, key=lambda copy: (-copy.ns, copy.direction)))


def _direction(name: str) -> str:
    """Return `HtoD pinned` for `Memcpy HtoD (Pinned -> Device)`; a name of another make stays as it is."""
    told = _COPY.fullmatch(name)
    if told is None:
        return name
    memory = next((kind for kind in (told["source"], told["target"]) if kind in _HOST_MEMORY), None)
    return f"{told['way']} {memory.lower()}" if memory else told["way"]


def _own_times(operators: Sequence[_Event], spans: _Spans) -> list[tuple[str, int]]:
    """Return name and own time of each of `operators`: its duration without the operators that run inside it.

    Where two overlap and neither holds the other, the part they share is laid to the one that began later, so the own
    times of a thread never sum to more than the time that passed.
    """
    threads: dict[tuple[int | str, int | str], list[tuple[int, int, str]]] = defaultdict(list)
    for operator in operators:
        start, end = spans.of(operator)
        threads[operator.pid, operator.tid].append((start, -end, operator.name))
    own: list[tuple[str, int]] = []
    for calls in threads.values():
        calls.sort()
        times = [-negated - start for start, negated, _ in calls]
        running: list[int] = []
        for index, (start, negated, _) in enumerate(calls):
            while running and -calls[running[-1]][1] <= start:
                running.pop()
            reached = start
            for caller in reversed(running):  # the first holds all of it, where they nest as they should
                shared = min(-negated, -calls[caller][1])
                if shared > reached:
                    times[caller] -= shared - reached
                    reached = shared
                if reached == -negated:
                    break
            running.append(index)
        own.extend((name, time) for (_, _, name), time in zip(calls, times, strict=True))
    return own


def _hotspots(times: Iterable[tuple[str, int]]) -> tuple[Hotspot, ...]:
    """Return the times summed by name, most time first."""
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, ns in times:
        total[name] += ns
        calls[name] += 1
    found = (Hotspot(name=name, calls=calls[name], ns=ns) for name, ns in total.items())
    return tuple(sorted(found, key=lambda hotspot: (-hotspot.ns, hotspot.name)))
