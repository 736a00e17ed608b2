"""Clocks: the host's monotonic counter, and the device's timing events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

HostClock = Callable[[], int]
"""Nanoseconds of a monotonic counter. Tests put a fake in its place."""

host_clock: HostClock = time.perf_counter_ns

POOL = 64
"""Events created at a time. Creating one takes a few microseconds."""


class DeviceClock(Protocol):
    """Boundaries put on the device's own queue, read only once they have passed."""

    def reserve(self, boundaries: int) -> None:
        """Prepare what the next `boundaries` records need, so that recording allocates nothing. Never waits."""

    def record(self) -> None:
        """Put a boundary at the end of the current stream. Never waits."""

    def passed_ns(self) -> list[int]:
        """Return the times between the successive boundaries that have passed by now. Never waits."""

    def intervals_ns(self) -> list[int]:
        """Wait for the last boundary and return the times between successive ones (one fewer than recorded)."""

    def stamp(self) -> int:
        """Put a boundary that stands beside the chain on the current stream, and return its number. Never waits."""

    def span_ns(self, first: int, last: int) -> int:
        """Wait for stamp `last` and return the time from stamp `first` to it."""


class EventClock:
    """Timing events of a `torch.Event` device (CUDA, ROCm, XPU, MPS), recorded on the current stream of that device.

    An event knows the kind of its device only and records on whichever is current, so where the device is told by
    number its stream is asked for; that costs a little more.

    Events come from a pool and go back to it once they have passed and their interval has been read, so that a loop of
    any length takes a bounded number of them. Intervals are taken between neighbours, because the driver returns
    milliseconds as a 32-bit float: over a window of 100 s its resolution would be 8 us.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._put = torch.Event.record if device.index is None else _record_on(device.index)
        self._free: list[torch.Event] = []
        self._pending: deque[torch.Event] = deque()
        """Recorded and not yet read; the first one's interval has been read, and it starts the next."""
        self._intervals: list[int] = []
        self._stamps: list[torch.Event] = []

    def reserve(self, boundaries: int) -> None:
        """Read what has passed, and create the events that the next `boundaries` records need beyond the free ones."""
        self._read_passed()
        self._free.extend(self._new() for _ in range(boundaries - len(self._free)))

    def record(self) -> None:
        """Record the next event of the pool."""
        if not self._free:
            self._refill()
        event = self._free.pop()
        self._put(event)
        self._pending.append(event)

    def passed_ns(self) -> list[int]:
        """Return nanoseconds between successive events as far as the device has come."""
        self._read_passed()
        return self._intervals

    def intervals_ns(self) -> list[int]:
        """Return nanoseconds between successive events; waits for all of them, for they may be on several streams."""
        for event in self._pending:
            event.synchronize()
        return self.passed_ns()

    def stamp(self) -> int:
        """Record an event of its own."""
        event = self._new()
        self._put(event)
        self._stamps.append(event)
        return len(self._stamps) - 1

    def span_ns(self, first: int, last: int) -> int:
        """Return nanoseconds from stamp `first` to stamp `last`; waits for `last`."""
        self._stamps[last].synchronize()
        return _between_ns(self._stamps[first], self._stamps[last])

    def _new(self) -> torch.Event:
        """Return an event that the driver has created: it does so at the first record, and not before."""
        event = torch.Event(device=self._device, enable_timing=True)
        self._put(event)
        return event

    def _refill(self) -> None:
        """Find events for a loop that nobody reserved for; a few at a time, so that no step pays for many."""
        self._read_passed(most=POOL)
        if not self._free:
            self._free.extend(self._new() for _ in range(POOL))

    def _read_passed(self, most: int | None = None) -> None:
        pending = self._pending
        end = len(pending) if most is None else min(len(pending), most)
        for _ in range(end - 1):
            # Both, for a user may change streams, and streams do not wait for each other.
            if not (pending[0].query() and pending[1].query()):
                return
            first = pending.popleft()
            self._intervals.append(_between_ns(first, pending[0]))
            self._free.append(first)


def _record_on(index: int) -> Callable[[torch.Event], None]:
    """Return what records an event on the stream that is current on the device of this number."""
    stream = torch.accelerator.current_stream
    return lambda event: event.record(stream(index))


def _between_ns(first: torch.Event, last: torch.Event) -> int:
    return round(first.elapsed_time(last) * 1e6)


def wait_for(device: torch.device) -> None:
    """Wait until `device` has done all that it was given; never inside a timed window. A CPU has done it already."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def present_device() -> torch.device:
    """Return the accelerator that is there, or the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if device is None else device


def device_clock(device: torch.device) -> EventClock | None:
    """Return the clock of `device`, or None where it has none of its own (a CPU) or its events carry no time."""
    if device.type == "cpu":
        return None
    try:
        clock = EventClock(device)
        clock.record()
        clock.record()
        clock.intervals_ns()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):  # each backend refuses in its own way
        return None
    return EventClock(device)
