"""Clocks: the host's monotonic counter, and the device's timing events."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch

HostClock = Callable[[], int]
"""Nanoseconds of a monotonic counter. Tests put a fake in its place."""

host_clock: HostClock = time.perf_counter_ns


class DeviceClock(Protocol):
    """Boundaries put on the device's own queue, read only once they have passed."""

    def reserve(self, boundaries: int) -> None:
        """Allocate ahead what the next `boundaries` records need, so that recording allocates nothing."""

    def record(self) -> None:
        """Put a boundary at the end of the current stream. Never waits."""

    def intervals_ns(self) -> list[int]:
        """Wait for the last boundary and return the times between successive ones (one fewer than recorded)."""

    def span_ns(self, first: int, last: int) -> int:
        """Wait for boundary `last` and return the time from boundary `first` to it."""


class EventClock:
    """Timing events of a `torch.Event` device (CUDA, ROCm, XPU, MPS), recorded on the current stream.

    Intervals are taken between neighbours, because the driver returns milliseconds as a 32-bit float: over
    a window of 100 s its resolution would be 8 us.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.Event] = []
        self._used = 0
        self.reserve(2)

    def reserve(self, boundaries: int) -> None:
        """Create the events that the next `boundaries` records use."""
        missing = self._used + boundaries - len(self._events)
        self._events.extend(torch.Event(device=self._device, enable_timing=True) for _ in range(missing))

    def record(self) -> None:
        """Record the next event of the pool."""
        if self._used == len(self._events):
            self.reserve(max(64, self._used))
        self._events[self._used].record()
        self._used += 1

    def intervals_ns(self) -> list[int]:
        """Return nanoseconds between successive events; waits for the last one."""
        events = self._events[: self._used]
        if not events:
            return []
        events[-1].synchronize()
        return [round(a.elapsed_time(b) * 1e6) for a, b in pairwise(events)]

    def span_ns(self, first: int, last: int) -> int:
        """Return nanoseconds from event `first` to event `last`; waits for `last`."""
        self._events[last].synchronize()
        return round(self._events[first].elapsed_time(self._events[last]) * 1e6)


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
    except (RuntimeError, NotImplementedError):
        return None
    return EventClock(device)
