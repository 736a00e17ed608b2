"""The sweep without a single process: order, what is done already, interruption, and a log that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bsprof.errors import BsprofError
from bsprof.model import Case, Measurement, Outcome, OutcomeKind, Plan, Settings, case_key
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.process import Death
from bsprof.sweep.runner import Swept, Watcher, death_outcome, sweep

REPOSITORY = Path(__file__).parents[1]
STEPS_S = 1.25


def cases(count: int, processes: int = 1) -> list[Case]:
    points = [Settings(batch_size=i + 1) for i in range(count)]
    return [
        Case(key=case_key(settings), settings=settings, process=process)
        for process in range(processes)
        for settings in points
    ]


def measured(case: Case, kind: OutcomeKind = "ok") -> Measurement:
    return Measurement(case=case, outcome=Outcome(kind=kind), wall_s=STEPS_S)


class Executor:
    """Says what it was told to, and `before` doing so calls back."""

    def __init__(self, outcomes: dict[int, OutcomeKind] | None = None, before: Callable[[Case], None] | None = None):
        self.outcomes, self.before = outcomes or {}, before or (lambda case: None)
        self.asked: list[Case] = []

    def measure(self, case: Case, plan: Plan, watcher: Watcher) -> Measurement:
        self.asked.append(case)
        watcher.advanced(case, "measure", 1, None)
        self.before(case)
        return measured(case, self.outcomes.get(batch(case), "ok"))


def batch(case: Case) -> int:
    assert case.settings is not None
    return case.settings.batch_size


class Log:
    def __init__(self, full_after: int = 1000) -> None:
        self.kept: list[Measurement] = []
        self.full_after = full_after

    def append(self, measurement: Measurement) -> None:
        if len(self.kept) == self.full_after:
            raise BsprofError("out.json.journal: no space left on device", hint="free some")
        self.kept.append(measurement)


class Story:
    """A watcher that writes down what it is told."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.told: list[tuple[str, int]] = []

    def started(self, case: Case) -> None:
        self.told.append(("started", batch(case)))

    def advanced(self, case: Case, stage: str, steps: int, precision: float | None) -> None:
        self.told.append(("advanced", batch(case)))

    def tick(self) -> None: ...

    def finished(self, measurement: Measurement) -> None:
        assert self.log.kept[-1:] == [measurement] or len(self.log.kept) == self.log.full_after
        self.told.append(("finished", batch(measurement.case)))


class Request:
    """A stop that is asked for without a signal."""

    def __init__(self) -> None:
        self.requested = False

    def stop(self) -> None:
        self.requested = True


def run(
    points: list[Case],
    executor: Executor,
    log: Log | None = None,
    stop: Request | None = None,
    done: list[Measurement] | None = None,
) -> tuple[Swept, Log, Story]:
    log = log or Log()
    story = Story(log)
    return sweep(points, Plan(), executor, log, story, stop or Request(), done or []), log, story


def kinds(swept: Swept) -> list[str]:
    return [measurement.outcome.kind for measurement in swept.measurements]


def test_cases_are_measured_in_order_and_kept_one_by_one():
    points = cases(3, processes=2)
    executor = Executor()
    swept, log, story = run(points, executor)
    assert executor.asked == points
    assert [m.case for m in swept.measurements] == [m.case for m in log.kept] == points
    assert (swept.interrupted, swept.failure) == (False, None)
    assert story.told[:6] == [(word, i) for i in (1, 2) for word in ("started", "advanced", "finished")]


def test_failures_do_not_end_it():
    executor = Executor({1: "oom", 2: "crash", 3: "timeout", 4: "host_oom", 5: "shm", 6: "error"})
    swept, log, _ = run(cases(7), executor)
    assert kinds(swept) == ["oom", "crash", "timeout", "host_oom", "shm", "error", "ok"]
    assert len(log.kept) == 7


def test_what_is_done_is_not_measured_again_however_it_ended():
    points = cases(5, processes=2)
    done = [
        measured(points[0]),
        measured(points[1], "oom"),
        measured(points[2], "interrupted"),
        measured(points[3], "skipped"),
    ]
    executor = Executor()
    swept, log, _ = run(points, executor, done=done)
    assert executor.asked == points[2:]
    assert [m.case for m in log.kept] == points[2:]
    assert [m.case for m in swept.measurements] == points
    assert swept.measurements[:2] == done[:2]
    assert kinds(swept)[2:4] == ["ok", "ok"]


def test_the_order_of_the_result_is_that_of_the_cases():
    points = cases(4)
    swept, _, _ = run(points, Executor(), done=[measured(points[3]), measured(points[1])])
    assert [m.case for m in swept.measurements] == points


def test_stopped_between_cases():
    stop = Request()
    executor = Executor(before=lambda case: stop.stop() if batch(case) == 2 else None)
    swept, log, story = run(cases(4), executor, stop=stop)
    assert swept.interrupted
    assert kinds(swept) == ["ok", "ok", "skipped", "skipped"]
    assert all(m.outcome.message for m in swept.measurements if m.outcome.kind == "skipped")
    assert len(log.kept) == 2
    assert ("started", 3) not in story.told


def test_stopped_inside_a_case():
    stop = Request()

    def interrupted(case: Case) -> None:
        if batch(case) == 2:
            stop.stop()
            raise KeyboardInterrupt

    swept, log, story = run(cases(4), Executor(before=interrupted), stop=stop)
    assert swept.interrupted
    assert kinds(swept) == ["ok", "interrupted", "skipped", "skipped"]
    assert swept.measurements[1].outcome.message
    assert swept.measurements[1].wall_s >= 0
    assert [m.outcome.kind for m in log.kept] == ["ok", "interrupted"]
    assert story.told[-1] == ("finished", 2)


def test_stopped_before_it_began():
    stop = Request()
    stop.stop()
    executor = Executor()
    swept, log, _ = run(cases(2), executor, stop=stop)
    assert kinds(swept) == ["skipped", "skipped"]
    assert executor.asked == log.kept == []


def test_what_an_interrupted_sweep_left_can_be_finished():
    stop = Request()
    points = cases(4)
    executor = Executor(before=lambda case: stop.stop() if batch(case) == 2 else None)
    first, _, _ = run(points, executor, stop=stop)
    executor = Executor()
    second, _, _ = run(points, executor, done=first.measurements)
    assert executor.asked == points[2:]
    assert kinds(second) == ["ok"] * 4


def test_a_log_that_fails_ends_it_and_loses_nothing():
    executor = Executor()
    swept, _, story = run(cases(4), executor, Log(full_after=2))
    assert len(executor.asked) == 3
    assert kinds(swept) == ["ok", "ok", "ok", "skipped"]
    assert swept.failure is not None
    assert "no space left" in swept.failure.message
    assert "no space left" in (swept.measurements[3].outcome.message or "")
    assert not swept.interrupted
    assert story.told[-1] == ("finished", 3)


# --- a child that died ------------------------------------------------------------------------------


def death(
    *, killed_by: signal.Signals | None = None, exit_code: int | None = None, timed_out: bool = False, words: str = ""
) -> Death:
    if killed_by is not None:
        exit_code = -killed_by
    return Death(signal=killed_by, exit_code=exit_code, timed_out=timed_out, last_words=words)


@pytest.mark.parametrize(
    ("died", "oom_kills", "kind", "message"),
    [
        (death(killed_by=signal.SIGKILL), 0, "crash", "killed by SIGKILL in measure"),
        (death(killed_by=signal.SIGKILL), 2, "host_oom", "killed by the kernel for memory in measure"),
        (death(killed_by=signal.SIGSEGV), 0, "crash", "killed by SIGSEGV in measure"),
        # Somebody was killed for memory meanwhile, but not this child.
        (death(killed_by=signal.SIGSEGV), 2, "crash", "killed by SIGSEGV in measure"),
        (death(exit_code=7), 0, "crash", "exited with code 7 in measure"),
        (death(exit_code=0), 0, "crash", "exited with code 0 in measure"),
        (death(timed_out=True), 0, "timeout", "still in measure after 2.5 s"),
        (death(timed_out=True, killed_by=signal.SIGKILL), 2, "timeout", "still in measure after 2.5 s"),
    ],
)
def test_a_death_is_an_outcome_with_evidence(died, oom_kills, kind, message):
    outcome = death_outcome(died._replace(last_words="last words"), "measure", 2.5, oom_kills)
    assert outcome.kind == kind
    assert message in (outcome.message or "")
    assert outcome.phase == "measure"
    assert outcome.evidence["stderr"] == "last words"
    if kind == "timeout":
        assert outcome.evidence["deadline_s"] == 2.5
    else:
        assert outcome.evidence["exit_code"] == died.exit_code
        assert outcome.evidence["signal"] == (died.signal and died.signal.name)
    assert (outcome.evidence.get("oom_kills") == oom_kills) is (kind == "host_oom")
    assert bool(outcome.hint) is (kind in ("timeout", "host_oom"))


def test_a_death_without_last_words_has_none():
    assert death_outcome(death(exit_code=1), "build", 300, 0).evidence["stderr"] is None


# --- signals ----------------------------------------------------------------------------------------

WAITING = """
import select, signal, sys
from bsprof.sweep.interruption import Interruption

with Interruption() as stop:
    print("ready", flush=True)
    select.select([stop.fileno()], [], [], 60)
    print("woken", stop.requested, flush=True)
    if "stay" in sys.argv:
        signal.pause()
print("left", flush=True)
signal.raise_signal(signal.SIGINT)
print("unharmed", flush=True)
"""


def waiting(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_and_wakes_who_waits(number):
    process = waiting()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    # Another one, when the process is on its way out, changes nothing.
    assert out.split("\n") == ["woken True", "left", "unharmed", ""]
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once(number):
    process = waiting("stay")
    process.send_signal(number)
    assert process.stdout is not None
    assert process.stdout.readline() == "woken True\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("", "")
    assert process.returncode == 130


def test_without_a_signal_everything_is_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Interruption() as stop:
        assert not stop.requested
        assert signal.getsignal(signal.SIGINT) not in before
        os.fstat(stop.fileno())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    with pytest.raises(OSError):
        os.fstat(stop.fileno())
