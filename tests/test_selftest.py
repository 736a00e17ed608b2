"""The self-test finds planted delays in the real loop, and finds out a loop that is not right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, pairwise

import pytest
import torch

from bsprof.measure import selftest
from bsprof.measure.loop import Stage, run_block
from bsprof.measure.tape import Tape
from bsprof.model import PHASES, Block, Check

CLOCK = count(0, 1000).__next__
"""A microsecond a reading."""


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def run() -> dict[str, Check]:
    """Run the self-test's real loop on a clock that only reading it moves, so that no machine is too busy for it."""
    return {check.phase: check for check in selftest.run(lambda *_: None, clock=CLOCK)}


def test_delays_come_back_where_they_were_put():
    checks = run()
    assert list(checks) == list(PHASES)
    for phase, check in checks.items():
        assert check.passed, check
        assert check.leaked_into != phase
        assert selftest.DELAY_NS <= check.planted_ns <= selftest.DELAY_NS + 2_000


def test_says_where_it_plants():
    told: list[str] = []
    selftest.run(lambda stage, *_: told.append(stage))
    assert told == [f"planting in {phase}" for phase in PHASES]


def run_swapped(stages: Sequence[Stage], steps: int, tape: Tape | None) -> Block:
    """Call forward's time backward's, and the other way round."""
    names = {"forward": "backward", "backward": "forward"}
    return run_block([(names.get(phase, phase), stage) for phase, stage in stages], steps, tape)


def run_late(stages: Sequence[Stage], steps: int, tape: Tape | None) -> Block:
    """Call the time of each phase that of the phase before it."""
    phases = [phase for phase, _ in stages]
    shifted = zip([phases[-1], *phases[:-1]], stages, strict=True)
    return run_block([(phase, stage) for phase, (_, stage) in shifted], steps, tape)


def run_forgetting(stages: Sequence[Stage], steps: int, tape: Tape | None) -> Block:
    """Set no mark behind forward: its time goes to backward."""
    if tape is None:
        return run_block(stages, steps, None)
    by_phase = dict(stages)

    def both() -> None:
        by_phase["forward"]()
        by_phase["backward"]()

    joined = {**by_phase, "backward": both}
    del joined["forward"]
    return run_block(list(joined.items()), steps, tape)


def run_losing(stages: Sequence[Stage], steps: int, tape: Tape | None) -> Block:
    """Lose a millisecond of each step to nobody."""
    if tape is None:
        return run_block(stages, steps, None)

    def lost() -> None:
        selftest.spin(1_000_000, CLOCK)

    return run_block([*stages, ("", lost)], steps, tape)


def test_swapped_marks_are_found_out(monkeypatch):
    monkeypatch.setattr(selftest, "run_block", run_swapped)
    checks = run()
    assert not checks["forward"].passed
    assert not checks["backward"].passed
    assert checks["forward"].leaked_into == "backward"
    assert checks["forward"].leaked_ns > selftest.DELAY_NS / 2
    assert checks["forward"].found_ns < selftest.DELAY_NS / 2


def test_shifted_marks_are_found_out(monkeypatch):
    monkeypatch.setattr(selftest, "run_block", run_late)
    assert not any(check.passed for check in run().values())


def test_a_forgotten_mark_is_found_out(monkeypatch):
    monkeypatch.setattr(selftest, "run_block", run_forgetting)
    forward = run()["forward"]
    assert not forward.passed
    assert forward.found_ns == 0
    assert forward.leaked_into == "backward"
    assert forward.leaked_ns > selftest.DELAY_NS / 2


def test_time_that_no_phase_has_is_found_out(monkeypatch):
    monkeypatch.setattr(selftest, "run_block", run_losing)
    checks = run()
    assert not any(check.passed for check in checks.values())
    assert all(check.residual_ns >= 1_000_000 for check in checks.values())


# --- on a device's own clock ------------------------------------------------------------------------


class Queue:
    """A device that is never idle: its time moves only by the work that it is given."""

    def __init__(self, rate: float = 1.0) -> None:
        self.now = 0
        self.rate = rate
        """Nanoseconds that the device takes for one that it is asked for."""

    def sleep(self, nanoseconds: int) -> None:
        self.now += round(nanoseconds * self.rate)

    def make_clock(self, device: torch.device) -> QueueClock:
        return QueueClock(self)

    def make_sleep(self, device: torch.device, events: object) -> selftest.Sleep:
        return self.sleep

    def checks(self) -> dict[str, Check]:
        checks = selftest.run_on_device(
            lambda *_: None, torch.device("cpu"), make_clock=self.make_clock, make_sleep=self.make_sleep
        )
        return {check.phase: check for check in checks}


class QueueClock:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.times: list[int] = []
        self.stamps: list[int] = []

    def reserve(self, boundaries: int) -> None: ...

    def record(self) -> None:
        self.times.append(self.queue.now)

    def passed_ns(self) -> list[int]:
        return [b - a for a, b in pairwise(self.times)]

    intervals_ns = passed_ns

    def stamp(self) -> int:
        self.stamps.append(self.queue.now)
        return len(self.stamps) - 1

    def span_ns(self, first: int, last: int) -> int:
        return self.stamps[last] - self.stamps[first]


def test_delays_on_the_device_come_back_on_its_clock():
    checks = Queue().checks()
    assert list(checks) == list(PHASES)
    for check in checks.values():
        assert (check.clock, check.passed) == ("device", True)
        assert (check.found_ns, check.leaked_ns, check.residual_ns) == (selftest.DELAY_NS, 0, 0)


def test_a_device_clock_that_is_off_is_found_out():
    assert not any(check.passed for check in Queue(rate=1.1).checks().values())


def test_marks_that_are_swapped_on_the_device_are_found_out(monkeypatch):
    monkeypatch.setattr(selftest, "run_block", run_swapped)
    checks = Queue().checks()
    assert [phase for phase, check in checks.items() if not check.passed] == ["forward", "backward"]


def test_a_machine_with_one_clock_has_nothing_to_check_on_a_device():
    assert selftest.run_on_device(lambda *_: None, torch.device("cpu")) == []


def test_a_cuda_sleep_is_counted_against_events(monkeypatch):
    queue = Queue(rate=0.5)  # 2 cycles a nanosecond
    monkeypatch.setattr(torch.cuda, "_sleep", queue.sleep)
    sleep = selftest.cuda_sleep(torch.device("cuda"), QueueClock(queue))
    assert sleep is not None
    before = queue.now
    sleep(3_000_000)
    assert queue.now - before == 3_000_000
    assert selftest.cuda_sleep(torch.device("mps"), QueueClock(queue)) is None


def test_a_cuda_sleep_is_not_counted_while_the_clock_still_rises(monkeypatch):
    """An idle GPU stays at its low clock for a while, then rises; a rate from then would make each delay too short."""
    queue, slept = Queue(), count()

    def spend(cycles: int) -> None:
        queue.rate = 5.0 / min(5.0, 1 + max(0, next(slept) - 2) / 5)  # from 0.2 to 1 cycle a nanosecond
        queue.sleep(cycles)

    monkeypatch.setattr(torch.cuda, "_sleep", spend)
    sleep = selftest.cuda_sleep(torch.device("cuda"), QueueClock(queue))
    assert sleep is not None
    before = queue.now
    sleep(3_000_000)
    assert queue.now - before == 3_000_000
