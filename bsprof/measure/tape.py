"""Chained marks: the end of one phase is the start of the next, so nothing falls between."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

from bsprof.measure.clock import DeviceClock, HostClock, host_clock

OTHER = "other"
"""Time of a step that no phase claims: its signed residual."""

START = ""
"""The first boundary of a chain: the time before it belongs to nothing."""


class Steps(NamedTuple):
    """Times of whole steps in ns: `step_ns[i] = sum over phases of phase_ns[phase][i] + other[i]`."""

    step_ns: list[int]
    phase_ns: dict[str, list[int]]


class Tape:
    """Boundaries in the order they were passed: for each the clock's reading and the phase that it closes.

    A mark costs a clock read and two stores into arrays allocated ahead (doubled when full); on an accelerator also
    one timing event, and never a synchronisation.
    """

    def __init__(
        self, *, clock: HostClock = host_clock, device_clock: DeviceClock | None = None, capacity: int = 4096
    ) -> None:
        self.clock = clock
        self._device = device_clock
        self._times = array("q", bytes(8 * capacity))
        self._phases = [START] * capacity
        self._count = 0

    def __len__(self) -> int:
        """Boundaries recorded."""
        return self._count

    def mark(self, phase: str) -> None:
        """Close `phase` here: the time since the boundary before belongs to it."""
        now = self.clock()
        i = self._count
        try:
            self._times[i] = now
        except IndexError:
            self.reserve(i)
            self._times[i] = now
        self._phases[i] = phase
        self._count = i + 1
        if self._device is not None:
            self._device.record()

    def begin(self, marks: int = 0) -> None:
        """Start a new chain, with room made for `marks` boundaries."""
        self.reserve(marks + 1)
        self.mark(START)

    def reserve(self, marks: int) -> None:
        """Make room for `marks` more boundaries, so that none of them allocates."""
        missing = self._count + marks - len(self._times)
        if missing > 0:
            self._times.frombytes(bytes(8 * missing))
            self._phases.extend([START] * missing)
        if self._device is not None:
            self._device.reserve(marks)

    def host_steps(self, first: int = 0) -> Steps:
        """Return the steps recorded since boundary `first`, by the host's clock."""
        times = self._times
        return self._steps([times[i] - times[i - 1] for i in range(max(first, 1), self._count)], max(first, 1))

    def device_steps(self) -> Steps | None:
        """Return all steps by the device's clock, or None where there is none. Waits for the last boundary."""
        return None if self._device is None else self._steps(self._device.intervals_ns(), 1)

    def device_span_ns(self, first: int, last: int) -> int | None:
        """Return the device time between two boundaries, or None where there is no device clock. Waits for `last`."""
        return None if self._device is None else self._device.span_ns(first, last)

    def step_at(self, boundary: int) -> int:
        """Return the index of the step that was running when `boundary` boundaries had been recorded."""
        return self._phases[:boundary].count("data")

    def _steps(self, intervals: list[int], first: int) -> Steps:
        """Group `intervals` (the one before boundary `first`, and so on) into steps; `data` begins a step."""
        steps = Steps([], {})
        for interval, phase in zip(intervals, self._phases[first : self._count], strict=True):
            if phase == START:
                continue
            if phase == "data" or not steps.step_ns:
                steps.step_ns.append(0)
                for column in steps.phase_ns.values():
                    column.append(0)
            steps.step_ns[-1] += interval
            if phase != OTHER:
                if phase not in steps.phase_ns:
                    steps.phase_ns[phase] = [0] * len(steps.step_ns)
                steps.phase_ns[phase][-1] += interval
        return steps


def cost_per_step_ns(phases: Iterable[str], *, device_clock: DeviceClock | None = None, steps: int = 300) -> int:
    """Return what the marks alone cost a step, in ns of host time (median of 5 loops that do nothing else)."""
    names = tuple(phases)
    costs = []
    for _ in range(5):
        tape = Tape(device_clock=device_clock)
        tape.begin(steps * len(names))
        mark = tape.mark
        start = host_clock()
        for _ in range(steps):
            for name in names:
                mark(name)
        costs.append((host_clock() - start) // steps)
    return sorted(costs)[2]
