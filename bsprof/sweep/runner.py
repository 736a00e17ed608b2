"""The sweep: cases one after another, each journalled before the next starts, whatever becomes of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from bsprof import cgroup, store
from bsprof.errors import BsprofError
from bsprof.loading import LoaderRequest
from bsprof.model import Case, Ceilings, Check, Environment, Measurement, Outcome, Plan, Settings
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.nodes import Party
from bsprof.sweep.process import ChildError, Death, Interpreter, Progressed, call, current_directory

LAST_WORDS = 200
"""Characters of what a dying process said last that its outcome repeats."""

GRACE_S = 20.0
"""A child that should have given up by itself is ended so long after."""

UNFINISHED = ("interrupted", "skipped")
"""Outcomes of a case that is still to be measured."""


class ChildDied(BsprofError):
    """A child that was asked something ended without an answer; the hint holds its last words."""


class Executor(Protocol):
    """Measures one case. The real one starts a process; tests put a fake in its place."""

    def measure(self, case: Case, plan: Plan, watcher: Watcher) -> Measurement:
        """Return what came of `case`; KeyboardInterrupt ends it."""


class Watcher(Protocol):
    """Is told what happens, about once a second."""

    def started(self, case: Case) -> None:
        """Say that a case begins."""

    def advanced(self, case: Case, stage: str, steps: int, precision: float | None) -> None:
        """Say where a case is."""

    def tick(self) -> None:
        """Say that a second has passed."""

    def finished(self, measurement: Measurement) -> None:
        """Say that a case has ended, one way or another."""


class Log(Protocol):
    """Keeps each measurement for good before it returns."""

    def append(self, measurement: Measurement) -> None:
        """Keep `measurement`."""


class Swept(NamedTuple):
    """All measurements in case order, whether the user stopped the sweep, and why it could not go on."""

    measurements: list[Measurement]
    interrupted: bool
    failure: BsprofError | None


def sweep(
    cases: Sequence[Case],
    plan: Plan,
    executor: Executor,
    log: Log,
    watcher: Watcher,
    stop: Interruption,
    done: Sequence[Measurement] = (),
) -> Swept:
    """Measure every case that is not among `done`; `stop`, once requested, ends it with what there is.

    A case that ran is done, however it ended; one that was interrupted or skipped is not.
    """
    kept = {_point(m.case): m for m in done if m.outcome.kind not in UNFINISHED}
    failure = None
    failed = 0
    for case in cases:
        if _point(case) in kept:
            continue
        given_up = plan.max_failures is not None and failed >= plan.max_failures
        if stop.requested or failure or given_up:
            why = "the sweep was stopped by the user"
            if failure or given_up:
                why = failure.message if failure else f"{failed} cases before it had failed"
            kept[_point(case)] = Measurement(case=case, outcome=Outcome(kind="skipped", message=why), wall_s=0.0)
            continue
        watcher.started(case)
        started = time.monotonic()
        try:
            measurement = executor.measure(case, plan, watcher)
        except KeyboardInterrupt:
            outcome = Outcome(kind="interrupted", message="stopped by the user")
            measurement = Measurement(case=case, outcome=outcome, wall_s=time.monotonic() - started)
        kept[_point(case)] = measurement
        failed += measurement.outcome.kind not in ("ok", *UNFINISHED)
        try:
            log.append(measurement)
        except BsprofError as error:
            failure = error
        watcher.finished(measurement)
    return Swept([kept[_point(case)] for case in cases], stop.requested, failure)


def _point(case: Case) -> tuple[str, int]:
    return case.key, case.process


class ProcessExecutor:
    """Measures each case in a process of its own, until `stop` is requested.

    `trace` says where a case's trace is kept, `party` who else brings ranks to it.
    """

    def __init__(
        self, stop: Interruption, *, trace: Mapping[Case, Path] | None = None, party: Party | None = None
    ) -> None:
        self._stop = stop
        self._trace = trace or {}
        self._party = party

    def measure(self, case: Case, plan: Plan, watcher: Watcher) -> Measurement:
        """Return the child's measurement, or what can be said of its death."""
        trace = self._trace.get(case)
        steps = 0

        def heard(message: Progressed | None) -> None:
            nonlocal steps
            if message is None:
                watcher.tick()
            else:
                steps = message.steps
                watcher.advanced(case, message.stage, message.steps, message.precision)

        question: dict[str, Any] = {"case": case, "plan": plan, "trace": str(trace) if trace else None}
        if self._party:
            question["meeting"] = self._party.meeting(f"{case.key}-{case.process}-{uuid.uuid4().hex[:8]}")
        measurement = _measure("measure", question, case, plan.deadline_s, heard, self._stop)
        if measurement.inside_s is not None or measurement.outcome.kind == "error":
            return measurement
        outcome = measurement.outcome  # its process died without a word
        outcome = msgspec.structs.replace(outcome, evidence={**outcome.evidence, "steps": steps})
        return msgspec.structs.replace(measurement, outcome=outcome)


def _measure(
    function: str,
    question: object,
    case: Case,
    deadline_s: float,
    on_progress: Callable[[Progressed | None], None],
    stop: Interruption,
) -> Measurement:
    """Return the Measurement that a function of the child's gives, or what can be said of the child's death."""
    (measurement,) = measure_all(function, question, (case,), deadline_s, on_progress, stop)
    return measurement


def measure_all(
    function: str,
    question: object,
    cases: Sequence[Case],
    deadline_s: float,
    on_progress: Callable[[Progressed | None], None],
    stop: Interruption,
    interpreter: Interpreter | None = None,
) -> tuple[Measurement, ...]:
    """Return what a function of the child's measures of each case, or what can be said of the child's death."""
    kills_before = cgroup.oom_kills()
    stage = "starting"

    def heard(message: Progressed | None) -> None:
        nonlocal stage
        if message is not None:
            stage = message.stage
        on_progress(message)

    started = time.monotonic()
    try:
        reply = call(
            f"bsprof.sweep.child:{function}",
            store.to_json(question),
            deadline_s=deadline_s,
            on_progress=heard,
            stop=stop,
            interpreter=interpreter,
        )
    except ChildError as error:
        outcome = Outcome(kind="error", message=error.text, traceback=error.trace, phase=stage)
        wall_s = time.monotonic() - started
        return tuple(Measurement(case=case, outcome=outcome, wall_s=wall_s) for case in cases)
    if reply.value is not None:
        found = msgspec.json.decode(reply.value, type=Measurement | tuple[Measurement, ...])
        told = found if isinstance(found, tuple) else (found,)
        return tuple(msgspec.structs.replace(one, wall_s=reply.wall_s) for one in told)
    assert reply.death is not None
    oom_kills = (cgroup.oom_kills() or 0) - (kills_before or 0)
    outcome = death_outcome(reply.death, stage, deadline_s, oom_kills)
    return tuple(Measurement(case=case, outcome=outcome, wall_s=reply.wall_s) for case in cases)


def death_outcome(death: Death, stage: str, deadline_s: float, oom_kills: int) -> Outcome:
    """Return the outcome of a case that died without a word in `stage`.

    `oom_kills` counts the processes of this cgroup that the kernel killed for memory while the case ran.
    """
    evidence: dict[str, int | float | str | None] = {
        "signal": death.signal.name if death.signal else None,
        "exit_code": death.exit_code,
        "stderr": death.last_words or None,
    }
    if death.timed_out:
        return Outcome(
            kind="timeout",
            message=f"still in {stage} after {deadline_s:g} s; ended with all its processes",
            hint="raise --deadline, or make the case smaller",
            phase=stage,
            evidence={"deadline_s": deadline_s, "stderr": death.last_words or None},
        )
    if death.signal is not None and death.signal.name == "SIGKILL" and oom_kills > 0:
        return Outcome(
            kind="host_oom",
            message=f"killed by the kernel for memory in {stage}",
            hint="fewer workers, a smaller batch or a smaller prefetch",
            phase=stage,
            evidence={**evidence, "oom_kills": oom_kills},
        )
    how = f"killed by {death.signal.name}" if death.signal else f"exited with code {death.exit_code}"
    *_, last = ["", *death.last_words.splitlines()]
    said = f": {last.strip()[:LAST_WORDS]}" if last else ""
    return Outcome(kind="crash", message=f"{how} in {stage}{said}", phase=stage, evidence=evidence)


def watch_loader(
    request: LoaderRequest,
    *,
    thorough: bool,
    deadline_s: float,
    on_stage: Callable[[str], None],
    stop: Interruption,
) -> Measurement:
    """Watch a loader in a process of its own and return the Measurement, or what can be said of the process' death.

    Raises BsprofError where there is no such loader, and KeyboardInterrupt once `stop` is requested.
    """

    def heard(message: Progressed | None) -> None:
        if message is not None:
            on_stage(message.stage)

    question = {"request": request, "deadline_s": deadline_s, "thorough": thorough}
    # The child gives up by itself, and tells what it saw; one that cannot is ended.
    return _measure("watch_loader", question, Case(key="loader"), deadline_s + GRACE_S, heard, stop)


def describe_environment() -> Environment:
    """Return the Environment of this machine, with the git commit of the current directory.

    It is collected in a child, so that this process never loads torch.
    """
    return msgspec.json.decode(_ask("describe", current_directory()), type=Environment)


def check_names(all_settings: Sequence[Settings], plan: Plan) -> None:
    """Raise BsprofError where a model or a data set cannot be found."""
    _ask("check_names", {"settings": list(all_settings), "plan": plan})


def prepare(all_settings: Sequence[Settings], plan: Plan) -> None:
    """Check every name and make every data set, before anything is timed. Raises BsprofError."""
    _ask("prepare", {"settings": list(all_settings), "plan": plan})


def introduce(interpreter: Interpreter, all_settings: Sequence[Settings], plan: Plan) -> Environment:
    """Prepare as `prepare` does, in another interpreter, and return the Environment of its own software.

    Raises ChildDied where bsprof does not run there.
    """
    question = {"settings": list(all_settings), "plan": plan}
    return msgspec.json.decode(_ask("introduce", question, interpreter=interpreter), type=Environment)


def catalogue() -> list[tuple[str, str, str]]:
    """Return the workloads as (kind, name, summary) rows."""
    return msgspec.json.decode(_ask("catalogue", None), type=list[tuple[str, str, str]])


def check_clocks() -> list[Check]:
    """Run the self-test in a child and return its checks."""
    return msgspec.json.decode(_ask("check_clocks", None), type=list[Check])


def measure_ceilings(identity: str, on_stage: Callable[[str], None]) -> Ceilings:
    """Measure what this machine can do at the most, in a child; `on_stage` is told what is being measured.

    Raises KeyboardInterrupt when the user stops it, and BsprofError when the child died; neither leaves a trace.
    """

    def heard(message: Progressed | None) -> None:
        if message is not None:
            on_stage(message.stage)

    with Interruption("\ninterrupted at once\n") as stop:
        reply = _ask("measure_ceilings", identity, on_progress=heard, stop=stop)
    return msgspec.json.decode(reply, type=Ceilings)


def _ask(
    function: str,
    question: object,
    *,
    on_progress: Callable[[Progressed | None], None] = lambda _: None,
    stop: Interruption | None = None,
    interpreter: Interpreter | None = None,
) -> bytes:
    """Return the answer of a function of the child's, or raise ChildDied."""
    target = f"bsprof.sweep.child:{function}"
    reply = call(target, store.to_json(question), on_progress=on_progress, stop=stop, interpreter=interpreter)
    if reply.value is None:
        assert reply.death is not None
        how = reply.death.signal.name if reply.death.signal else f"exit code {reply.death.exit_code}"
        *_, last = ["", *reply.death.last_words.splitlines()]
        raise ChildDied(f"{function}: the process died ({how})", hint=f"its last words: {last}" if last else None)
    return reply.value
