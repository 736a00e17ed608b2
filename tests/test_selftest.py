"""The self-test finds planted delays in the real loop, and finds out a loop that is not right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

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
        assert check.planted_ns == selftest.DELAY_NS


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
