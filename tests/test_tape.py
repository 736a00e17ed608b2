"""Chained marks: every nanosecond between two boundaries belongs to exactly one phase."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsprof.measure.tape import OTHER, Tape, cost_per_step_ns


class FakeClock:
    """Returns the readings it was given, one a call."""

    def __init__(self, readings: list[int]) -> None:
        self._readings: Iterator[int] = iter(readings)

    def __call__(self) -> int:
        return next(self._readings)


class FakeDevice:
    """A device whose boundaries pass at given times, however early they were recorded."""

    def __init__(self, times: list[int]) -> None:
        self.times = times
        self.recorded = 0
        self.reserved = 0

    def reserve(self, boundaries: int) -> None:
        self.reserved = max(self.reserved, self.recorded + boundaries)

    def record(self) -> None:
        self.recorded += 1

    def intervals_ns(self) -> list[int]:
        return [b - a for a, b in pairwise(self.times[: self.recorded])]

    def span_ns(self, first: int, last: int) -> int:
        return self.times[last] - self.times[first]


def test_phases_lie_end_to_end():
    tape = Tape(clock=FakeClock([100, 110, 112, 150, 163, 170, 201]))
    tape.begin()
    for phase in ("data", "forward", "backward", "data", "forward", "backward"):
        tape.mark(phase)
    steps = tape.host_steps()
    assert steps.step_ns == [50, 51]
    assert steps.phase_ns == {"data": [10, 13], "forward": [2, 7], "backward": [38, 31]}


def test_time_before_a_chain_begins_belongs_to_nothing():
    tape = Tape(clock=FakeClock([0, 5, 1000, 1007]))
    tape.begin()
    tape.mark("data")
    tape.begin()
    tape.mark("data")
    assert tape.host_steps().step_ns == [5, 7]


def test_other_is_part_of_the_step_and_of_no_phase():
    tape = Tape(clock=FakeClock([0, 5, 9, 20, 26]))
    tape.begin()
    for phase in ("data", "forward", OTHER, "data"):
        tape.mark(phase)
    steps = tape.host_steps()
    assert steps.step_ns == [20, 6]
    assert steps.phase_ns == {"data": [5, 6], "forward": [4, 0]}


def test_a_phase_that_comes_later_was_absent_before():
    tape = Tape(clock=count(0, 10).__next__)
    tape.begin()
    for phase in ("data", "forward", "data", "forward", "clip", "data"):
        tape.mark(phase)
    assert tape.host_steps().phase_ns == {"data": [10, 10, 10], "forward": [10, 10, 0], "clip": [0, 10, 0]}


def test_the_device_has_its_own_truth():
    # The host runs ahead of the device: it waits 40 for data while the device still has work, and the device
    # runs dry for 3 only.
    device = FakeDevice([10, 13, 60, 110])
    tape = Tape(clock=FakeClock([0, 40, 41, 43]), device_clock=device)
    tape.reserve(4)
    tape.begin()
    for phase in ("data", "forward", "backward"):
        tape.mark(phase)
    assert tape.host_steps().phase_ns["data"] == [40]
    steps = tape.device_steps()
    assert steps is not None
    assert steps.phase_ns == {"data": [3], "forward": [47], "backward": [50]}
    assert tape.device_span_ns(0, 3) == sum(steps.step_ns) == 100
    assert device.reserved >= 4


def test_one_clock_has_no_device_steps():
    tape = Tape()
    tape.begin()
    tape.mark("data")
    assert tape.device_steps() is None
    assert tape.device_span_ns(0, 1) is None


def test_reads_on_from_where_a_block_began():
    tape = Tape(clock=count().__next__)
    for _ in range(3):
        first = len(tape)
        tape.begin()
        tape.mark("data")
        tape.mark("forward")
        assert tape.host_steps(first + 1).step_ns == [2]
    assert tape.host_steps().step_ns == [2, 2, 2]
    assert tape.step_at(len(tape)) == 3
    assert tape.step_at(first) == 2


@given(
    st.lists(st.sampled_from(["", "data", "h2d", "forward", "other"]), min_size=1, max_size=60),
    st.lists(st.integers(0, 10**9), min_size=61, max_size=61),
)
def test_no_time_is_lost_or_counted_twice(phases, gaps):
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    tape = Tape(clock=FakeClock(times))
    tape.begin()
    for phase in phases:
        tape.mark(phase)
    steps = tape.host_steps()
    between_chains = sum(gaps[i + 1] for i, phase in enumerate(phases) if phase == "")
    assert sum(steps.step_ns) == times[len(phases)] - times[0] - between_chains
    assert all(len(column) == len(steps.step_ns) for column in steps.phase_ns.values())
    for i, step in enumerate(steps.step_ns):
        assert step >= sum(column[i] for column in steps.phase_ns.values())


def test_own_cost_is_measured():
    assert cost_per_step_ns(("data", "forward"), steps=20) > 0


def test_a_device_that_gives_no_times_is_no_clock(monkeypatch):
    import torch

    from bsprof.measure import clock

    assert clock.device_clock(torch.device("cpu")) is None

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no timing events here")

    monkeypatch.setattr(clock.torch, "Event", refuse)
    assert clock.device_clock(torch.device("cuda")) is None


def test_event_clock_takes_intervals_between_neighbours(monkeypatch):
    import torch

    from bsprof.measure import clock

    made: list[FakeEvent] = []

    class FakeEvent:
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert enable_timing
            made.append(self)
            self.waited = False

        def record(self) -> None:
            self.at_ms = float(made.index(self)) ** 2

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, other: FakeEvent) -> float:
            return other.at_ms - self.at_ms

    monkeypatch.setattr(clock.torch, "Event", FakeEvent)
    events = clock.EventClock(torch.device("cuda"))
    for _ in range(5):
        events.record()
    assert not any(event.waited for event in made)
    assert events.intervals_ns() == [1_000_000, 3_000_000, 5_000_000, 7_000_000]
    assert [event.waited for event in made].count(True) == 1
    assert events.span_ns(1, 4) == 15_000_000


@pytest.mark.parametrize("marks", [0, 1, 7])
def test_reserving_makes_room_on_the_device_too(marks):
    device = FakeDevice([])
    Tape(device_clock=device).reserve(marks)
    assert device.reserved == marks
