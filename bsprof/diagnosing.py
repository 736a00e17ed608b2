"""`bsprof loader`: from flags to a diagnosis, and to the proof of its cure."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from bsprof import stats, store
from bsprof.bench import check_output
from bsprof.errors import BsprofError, Exit
from bsprof.loading import Cause, Change, Diagnosis, LoaderRequest, Rate, Verification
from bsprof.model import Measurement, Result
from bsprof.report import terminal
from bsprof.report.trace import write_trace
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.runner import describe_environment, watch_loader

ROUNDS = 4
"""Pairs of a measurement before and after the change, in turns."""
ROUND_SHARE = 0.4
"""A measurement of a round takes this share of `--seconds`, and no less than this many seconds."""
SHORTEST_ROUND_S = 2.0

LEAST_DEADLINE_S = 120.0
DEADLINE_FACTOR = 10.0
"""Without `--deadline` a loader is given up after so many times `--seconds`, and not before the least."""

_ARGUMENTS = {
    "batch_size": "batch_size",
    "workers": "num_workers",
    "prefetch": "prefetch_factor",
    "start_method": "multiprocessing_context",
    "persistent_workers": "persistent_workers",
    "pin_memory": "pin_memory",
    "in_order": "in_order",
    "shuffle": "shuffle",
}
"""DataLoader's name for each flag."""


class Request(NamedTuple):
    """What the command line asks for; `flags` by parameter name, None where not given."""

    target: str
    output: str | None
    trace: Path | None
    sweep: bool
    verify: bool
    flags: Mapping[str, Any]


def run(request: Request) -> int:
    """Do what `request` asks and return the exit code."""
    started = time.monotonic()
    check_output(request.output)
    _check_trace(request.trace, request.output)
    asked = _loader_request(request)
    deadline_s = _deadline_s(request.flags["deadline"], asked.seconds)
    notices = terminal.console(stderr=True)
    with _status(notices, "starting") as status, Interruption("\ninterrupted at once\n") as stop:
        environment = describe_environment()

        def measured(asked: LoaderRequest, what: str = "", *, thorough: bool = True) -> Measurement:
            return watch_loader(
                asked, thorough=thorough, deadline_s=deadline_s, on_stage=lambda stage: status(what + stage), stop=stop
            )

        measurement = measured(asked)
        verifications = []
        if request.verify and measurement.diagnosis:
            verification = _verify(asked, measurement.diagnosis, measured, notices)
            verifications = [verification] if verification else []
    result = Result(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        plan=None,
        environment=environment,
        measurements=[measurement],
        loader=asked,
        verifications=verifications,
        wall_s=time.monotonic() - started,
    )
    return _tell(result, request, notices)


def _tell(result: Result, request: Request, notices: Console) -> int:
    """Save and print what was asked for; what was measured is printed although a file cannot be written."""
    failure: BsprofError | None = None
    (measurement,) = result.measurements
    try:
        if request.output == "-":
            terminal.print_json(result)
        elif request.output:
            store.save(result, Path(request.output))
        if request.trace and measurement.loading:
            write_trace(measurement.loading, request.trace)
    except BsprofError as error:
        failure = error
    terminal.render(result, terminal.console(stderr=request.output == "-"), sweep=request.sweep)
    if failure:
        raise failure
    for path in (request.output if request.output != "-" else None, request.trace if measurement.loading else None):
        if path:
            notices.print(f"saved {path}", highlight=False, soft_wrap=True)
    return Exit.DONE if measurement.outcome.kind == "ok" else Exit.USAGE


# --- flags ------------------------------------------------------------------------------------------


def _loader_request(request: Request) -> LoaderRequest:
    flags = request.flags
    if flags["step_ms"] is not None and flags["model"] is not None:
        raise BsprofError("--step-ms and --model: the one gives what the other measures", hint="leave out one")
    for flag, least in (("seconds", 0.0), ("step_ms", -1e-9)):
        value = flags[flag]
        if value is not None and not (math.isfinite(value) and value > least):
            raise BsprofError(f"--{flag.replace('_', '-')}: {value:g} is no time", hint="give a positive number")
    arguments: Change = {name: flags[flag] for flag, name in _ARGUMENTS.items() if flags[flag] is not None}
    for flag in ("batch_size", "prefetch"):
        if flags[flag] is not None and flags[flag] < 1:
            raise BsprofError(f"--{flag.replace('_', '-')}: {flags[flag]} is less than 1", hint="give a larger one")
    if flags["workers"] is not None and flags["workers"] < 0:
        raise BsprofError(f"--workers: {flags['workers']} is less than 0", hint="0 loads in the main process")
    root = flags["data_root"]
    return LoaderRequest(
        target=request.target,
        arguments=arguments,
        seconds=flags["seconds"],
        step_ms=flags["step_ms"],
        model=flags["model"],
        seed=flags["seed"],
        data_root=str(Path(root).resolve()) if root else None,
    )


def _deadline_s(given: float | None, seconds: float) -> float:
    if given is None:
        return max(LEAST_DEADLINE_S, DEADLINE_FACTOR * seconds)
    if not (math.isfinite(given) and given > 0):
        raise BsprofError(f"--deadline: {given:g} is no time", hint="give a positive number of seconds")
    return given


def _check_trace(trace: Path | None, output: str | None) -> None:
    if trace is None:
        return
    if not trace.name.endswith((".json", ".json.gz")):
        raise BsprofError(f"--trace {trace}: expected .json or .json.gz", hint="it opens in Perfetto")
    if output and output != "-" and Path(output).absolute() == trace.absolute():
        raise BsprofError(f"--trace {trace}: is where the result goes", hint="name another file")
    if not trace.parent.is_dir() or trace.is_dir():
        raise BsprofError(f"--trace {trace}: cannot be written there", hint="name a file in a folder that exists")


@contextlib.contextmanager
def _status(notices: Console, first: str) -> Any:
    """Yield what shows a stage: on a terminal in a line that goes away."""
    if not notices.is_terminal:
        yield lambda stage: None
        return
    with notices.status(first) as status:
        yield status.update


# --- the proof ----------------------------------------------------------------------------------------


class _Cure(NamedTuple):
    change: Change
    predicted: Rate


def _cure(diagnosis: Diagnosis) -> _Cure | None:
    """Return the first prescription that is a matter of DataLoader arguments, with the speed-up predicted of it."""
    for cause in diagnosis.causes:
        if cause.change and cause.gives_back is not None:
            return _Cure(cause.change, _speedup(cause))
    best = diagnosis.best
    if best is not None and best.speedup_low > 1:
        change: Change = {"num_workers": best.workers}
        if best.prefetch is not None:
            change["prefetch_factor"] = best.prefetch
        return _Cure(change, Rate(value=best.speedup, low=best.speedup_low, high=best.speedup_high))
    return None


def _speedup(cause: Cause) -> Rate:
    """Return step before / step after, of the share of the step that is given back."""

    def of(share: float | None) -> float | None:
        return None if share is None else 1 / (1 - min(share, 0.999))

    value = of(cause.gives_back)
    assert value is not None
    return Rate(value=value, low=of(cause.gives_back_low), high=of(cause.gives_back_high))


def _verify(asked: LoaderRequest, diagnosis: Diagnosis, measured: Any, notices: Console) -> Verification | None:
    """Apply the cure and measure with and without it in turns, each in a process of its own; order A B B A."""
    cure = _cure(diagnosis)
    if cure is None:
        notices.print("nothing to verify: no DataLoader argument is predicted to help", highlight=False)
        return None
    seconds = max(SHORTEST_ROUND_S, asked.seconds * ROUND_SHARE)
    before = msgspec.structs.replace(asked, seconds=seconds)
    after = msgspec.structs.replace(before, arguments={**asked.arguments, **cure.change})
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS):
        for changed in (False, True) if number % 2 == 0 else (True, False):
            what = f"verifying, round {number + 1} of {ROUNDS}, {'after' if changed else 'before'} the change: "
            measurement = measured(after if changed else before, what, thorough=False)
            step_s = measurement.diagnosis.step_s if measurement.diagnosis else None
            if not step_s:
                why = measurement.outcome.message or "no steady step"
                notices.print(f"not verified: {why}", highlight=False)
                return None
            times[changed].append(step_s)
    ratio = stats.paired_ratio(times[False], times[True])
    seen = Rate(value=ratio.value, low=ratio.low, high=ratio.high)
    return Verification(
        change=cure.change,
        predicted=cure.predicted,
        measured=seen,
        before_s=times[False],
        after_s=times[True],
        agrees=_overlap(cure.predicted, seen),
    )


def _overlap(a: Rate, b: Rate) -> bool:
    def ends(rate: Rate) -> tuple[float, float]:
        return (
            rate.value if rate.low is None else rate.low,
            rate.value if rate.high is None else rate.high,
        )

    (a_low, a_high), (b_low, b_high) = ends(a), ends(b)
    return a_low <= b_high and b_low <= a_high
