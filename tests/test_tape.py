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
        self.passed = 0
        """Boundaries that lie behind the device already."""

    def reserve(self, boundaries: int) -> None:
        self.reserved = max(self.reserved, self.recorded + boundaries)

    def record(self) -> None:
        self.recorded += 1

    def intervals_ns(self) -> list[int]:
        return [b - a for a, b in pairwise(self.times[: self.recorded])]

    def passed_ns(self) -> list[int]:
        return [b - a for a, b in pairwise(self.times[: self.passed])]

    def stamp(self) -> int:
        return self.recorded

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
    assert device.reserved >= 4


def test_reading_what_has_passed_leaves_the_step_that_runs_out():
    device = FakeDevice([10, 20, 40, 70, 170, 180, 200, 230, 1000])
    tape = Tape(device_clock=device)
    for phases in (("data", "forward", "data", "forward"), ("data", "forward", "data")):
        tape.begin()
        for phase in phases:
            tape.mark(phase)
    read = []
    for device.passed in range(10):
        read.append(tape.passed_step_ns())
    # What lies between two chains belongs to no step, and the step begun last may go on.
    assert read == [[]] * 4 + [[30]] * 3 + [[30, 130]] * 2 + [[30, 130, 50]]


def test_one_clock_has_no_device_steps():
    tape = Tape()
    tape.begin()
    tape.mark("data")
    assert tape.device_steps() is None
    assert tape.passed_step_ns() is None


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

    class FakeEvent:
        """Passes when the device has come as far: `done` is the device's time, which each record puts off by one."""

        made = 0
        recorded = 0
        done = 0.0

        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert enable_timing
            FakeEvent.made += 1

        def record(self) -> None:
            FakeEvent.recorded += 1
            self.at_ms = float(FakeEvent.recorded) ** 2

        def query(self) -> bool:
            return self.at_ms <= FakeEvent.done

        def synchronize(self) -> None:
            FakeEvent.done = max(FakeEvent.done, self.at_ms)

        def elapsed_time(self, other: FakeEvent) -> float:
            assert self.query() and other.query(), "not ready"
            return other.at_ms - self.at_ms

    monkeypatch.setattr(clock.torch, "Event", FakeEvent)
    events = clock.EventClock(torch.device("cuda"))
    events.reserve(clock.POOL)
    pool = FakeEvent.made
    assert FakeEvent.recorded == pool  # the driver makes an event at its first record, and that is not a boundary
    first = events.stamp()
    for _ in range(5):
        events.record()
    last = events.stamp()
    assert FakeEvent.done == 0.0
    assert events.passed_ns() == []
    at = [(pool + 3 + i) ** 2 for i in range(5)]
    FakeEvent.done = at[2]
    assert events.passed_ns() == [(b - a) * 1_000_000 for a, b in pairwise(at[:3])]
    assert events.intervals_ns() == [(b - a) * 1_000_000 for a, b in pairwise(at)]
    assert events.span_ns(first, last) == ((pool + 9) ** 2 - (pool + 2) ** 2) * 1_000_000
    assert FakeEvent.made == pool + 2


def test_a_loop_of_any_length_takes_a_bounded_number_of_events(monkeypatch):
    import torch

    from bsprof.measure import clock

    made = []

    class Passing:
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            made.append(self)

        def record(self) -> None:
            self.number = next(numbers)

        def query(self) -> bool:
            return self.number < behind()

        def synchronize(self) -> None:
            self.query = lambda: True

        def elapsed_time(self, other: Passing) -> float:
            assert self.number < other.number
            return 1.0

    numbers = count()
    newest = [0]

    def behind() -> int:
        return newest[0] - 40

    monkeypatch.setattr(clock.torch, "Event", Passing)
    events = clock.EventClock(torch.device("cuda"))
    for _ in range(10_000):
        events.record()
        newest[0] = next(numbers)
    assert len(made) <= 3 * clock.POOL
    assert 10_000 - 3 * clock.POOL < len(events.passed_ns()) < 10_000


def test_events_of_a_numbered_device_go_to_its_own_stream(monkeypatch):
    """Another device may be the current one, and an event by itself would go there."""
    import torch

    from bsprof.measure import clock

    streams = []

    class OnStream:
        def __init__(self, device: torch.device, enable_timing: bool) -> None: ...

        def record(self, stream: str | None = None) -> None:
            streams.append(stream)

    monkeypatch.setattr(clock.torch, "Event", OnStream)
    monkeypatch.setattr(clock.torch.accelerator, "current_stream", lambda index: f"stream of {index}")
    for device, expected in (("cuda:1", "stream of 1"), ("cuda", None)):
        events = clock.EventClock(torch.device(device))
        events.reserve(1)
        events.record()
        events.stamp()
        assert streams == [expected] * 4
        streams.clear()


@pytest.mark.parametrize("marks", [0, 1, 7])
def test_reserving_makes_room_on_the_device_too(marks):
    device = FakeDevice([])
    Tape(device_clock=device).reserve(marks)
    assert device.reserved == marks
