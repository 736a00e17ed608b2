"""Two cases in one process, a few steps of each in turns: what slows the machine meanwhile slows both.

Which of the two is built first changes from process to process. What is allocated first lies elsewhere in memory, and
that alone makes it 0.3 % slower or faster in all of its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bsprof.measure.case import WARMUP_SHARE, CaseRun, Emit
from bsprof.measure.clock import host_clock
from bsprof.measure.counters import CounterWindow, TurnCounter
from bsprof.model import Case, Measurement, Outcome, Plan

TURN_S, DEVICE_TURN_S = 0.005, 0.1
"""A turn takes about so long, or one step. Short, because neighbours in time resemble each other: on a shared machine,
where steps of 11 ms scatter by 25 %, two seconds of single steps in turns tell a ratio to 2 %, turns of 0.1 s to 5 %.
An accelerator scatters less, and has to be filled with work again at each turn."""
LEAST_ROUNDS = 2
"""A round is two turns of each: A B B A, then B A A B."""


def measure(
    cases: tuple[Case, Case], plan: Plan, *, cache: Path, requested_ns: int, emit: Emit
) -> tuple[Measurement, Measurement]:
    """Measure both cases in this process, in turns, for twice `max_case_time_s`; a failure is an outcome of its case.

    Neither loads with workers: those of the one would work while the other is timed. On an accelerator a turn begins
    with a step that is not timed, and ends with a wait.
    """
    entered_ns = host_clock()
    time_ns = round(plan.stop.max_case_time_s * 1e9)
    one, other = (CaseRun(case, plan, cache, lambda *_: None, None) for case in cases)
    runs = (one, other) if cases[0].process % 2 == 0 else (other, one)
    for run in runs:
        emit("warmup", 0, None)
        with run.failing():
            run.stage = "build"
            run.build()
            run.stage = "warmup"
            run.start()
            run.warm_up(host_clock() + round(time_ns * WARMUP_SHARE))
            run.stage = "measure"
        if run.outcome.kind != "ok":
            break
    else:
        _take_turns(runs, host_clock() + round(2 * time_ns * (1 - WARMUP_SHARE)), emit)
    failed = [run for run in runs if run.outcome.kind != "ok"]
    for run in runs:
        if failed and run not in failed:
            run.outcome = Outcome(kind="skipped", message="the other side failed, and they are measured in turns")
        elif not failed:
            run.training.stop()
    return one.measurement(requested_ns, entered_ns), other.measurement(requested_ns, entered_ns)


def _take_turns(runs: Sequence[CaseRun], end_ns: int, emit: Emit) -> None:
    """Let both take turns until `end_ns`, or until one fails."""
    turn_ns = 1e9 * (DEVICE_TURN_S if runs[0].on_device else TURN_S)
    sizes = {run: max(1, round(turn_ns / run.recent_step_ns())) for run in runs}
    counters = {run: TurnCounter() for run in runs}
    first, second = runs
    window = CounterWindow()
    rounds = steps = 0
    while rounds < LEAST_ROUNDS or host_clock() < end_ns:
        for run in (first, second, second, first) if rounds % 2 == 0 else (second, first, first, second):
            with run.failing():
                run.resume()
                if run.on_device:
                    run.run_bare(1)
                with counters[run].turn():
                    run.take_block("instrumented", sizes[run])
                    run.settle()
            if run.outcome.kind != "ok":
                return
            steps += sizes[run]
            emit("measure", steps, None)
        rounds += 1
    window.close()
    for run in runs:
        with run.failing():
            run.resume()
            run.conclude(counters[run].counters(), window.notes(torch.get_num_threads()))
