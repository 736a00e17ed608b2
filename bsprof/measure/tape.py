"""Chained marks: the end of one phase is the start of the next, so nothing falls between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
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

    A mark costs a clock read and two appends; on an accelerator also one timing event, and never a synchronisation.
    Measured in the step it serves, five such marks add 2 to 3 us to a step, and a method that stores into arrays
    allocated ahead 4 to 5 us: the interpreter's work outweighs what a list's growth costs.
    """

    def __init__(self, *, clock: HostClock = host_clock, device_clock: DeviceClock | None = None) -> None:
        self.clock = clock
        self._device = device_clock
        self._times: list[int] = []
        self._phases: list[str] = []
        self.mark: Callable[[str], None] = self._marker()
        """Close a phase, by its name, here: the time since the boundary before belongs to it."""

    def _marker(self) -> Callable[[str], None]:
        clock, add_time, add_phase = self.clock, self._times.append, self._phases.append

        def mark(phase: str) -> None:
            add_time(clock())
            add_phase(phase)

        if self._device is None:
            return mark
        record = self._device.record

        def mark_on_both(phase: str) -> None:
            add_time(clock())
            record()
            add_phase(phase)

        return mark_on_both

    def __len__(self) -> int:
        """Boundaries recorded."""
        return len(self._times)

    def begin(self) -> None:
        """Start a new chain."""
        self.mark(START)

    def reserve(self, marks: int) -> None:
        """Make room for the device events of `marks` more boundaries, so that no mark creates one."""
        if self._device is not None:
            self._device.reserve(marks)

    def host_steps(self, first: int = 0) -> Steps:
        """Return the steps recorded since boundary `first`, by the host's clock."""
        times = self._times
        return self._steps([times[i] - times[i - 1] for i in range(max(first, 1), len(times))], max(first, 1))

    def device_steps(self) -> Steps | None:
        """Return all steps by the device's clock, or None where there is none. Waits for the last boundary."""
        return None if self._device is None else self._steps(self._device.intervals_ns(), 1)

    def passed_step_ns(self) -> list[int] | None:
        """Return the whole steps that the device has passed by now, or None where there is no device clock.

        Never waits; the last step that it has begun is left out, for it may go on.
        """
        return None if self._device is None else self._steps(self._device.passed_ns(), 1).step_ns[:-1]

    def step_at(self, boundary: int) -> int:
        """Return the index of the step that was running when `boundary` boundaries had been recorded."""
        return self._phases[:boundary].count("data")

    def _steps(self, intervals: list[int], first: int) -> Steps:
        """Group `intervals` (the one before boundary `first`, and so on) into steps; `data` begins a step."""
        steps = Steps([], {})
        for interval, phase in zip(intervals, islice(self._phases, first, None), strict=False):
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
        tape.reserve(steps * len(names) + 1)
        tape.begin()
        mark = tape.mark
        start = host_clock()
        for _ in range(steps):
            for name in names:
                mark(name)
        costs.append((host_clock() - start) // steps)
    return sorted(costs)[2]
