"""The profiler window: a few steps under `torch.profiler`, apart from the timed ones; and NVTX ranges."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch.profiler import ProfilerActivity, record_function, supported_activities

from bsprof.errors import BsprofError
from bsprof.files import write_whole
from bsprof.measure.clock import host_clock, wait_for
from bsprof.measure.loop import Stage
from bsprof.measure.traces import RANGE, read_trace
from bsprof.model import Profile
from bsprof.noun import Note

_TWO_PROFILERS = ("Profiler is already enabled", "Can't disable Kineto profiler when it's not running")
"""What torch says when one profiler was started inside another: its versions differ in which of them finds out."""
_WITHOUT = "--profile-steps 0 does without bsprof's own"


def profile(stages: Sequence[Stage], steps: int, device: torch.device, trace: Path | None = None) -> Profile:
    """Run `steps` steps under `torch.profiler` and return where their time went; see `read_trace`.

    One more step is run before and left out: in it the profiler gets itself ready, which on CUDA takes longer than
    many steps. The device is waited for before and after the window, never inside it. With `trace` the Chrome trace,
    which Perfetto opens, is left there, gzipped if the name ends in `.gz`: the whole file or nothing. The step that is
    left out is in it too, without ranges.

    On a CPU, and where the device could not be traced (`untraced` says why), the device's figures are None.
    Raises BsprofError inside another profiler and for a trace that cannot be read, and TraceNotKeptError, which holds
    the profile, for a file that cannot be written; what a stage raises comes through, the profiler being stopped by
    then. On CUDA its library stays attached to the process, so nothing should be timed after this window.
    """
    if _profiler_enabled():  # to start a second session would cancel the first, and that one is the user's
        raise BsprofError("another profiler is running in this process", hint=f"end it first; {_WITHOUT}")
    ranges = [(RANGE + phase, run) for phase, run in stages]
    # Without `acc_events` some versions warn that events of an earlier cycle are dropped; here there is one cycle.
    profiler = torch.profiler.profile(activities=_activities(device), acc_events=True)
    try:
        with profiler:
            for _, run in stages:
                run()
            wait_for(device)
            start = host_clock()
            for _ in range(steps):
                for name, run in ranges:
                    with record_function(name):
                        run()
            wait_for(device)
            wall_ns = host_clock() - start
            # A profiler that the training loop starts may cancel ours without a word (torch 2.15), and to export a
            # session that was cancelled ends the process by a segmentation fault.
            if not _profiler_enabled():
                raise _own_profiler()
    except RuntimeError as error:
        if not any(words in str(error) for words in _TWO_PROFILERS):
            raise
        raise _own_profiler() from error
    with tempfile.TemporaryDirectory(prefix="bsprof-") as directory:
        exported = Path(directory, "trace.json")
        profiler.export_chrome_trace(str(exported))
        try:
            content = exported.read_bytes()
        except OSError as error:  # a full disk is not told by torch
            raise BsprofError(
                f"the profiler left no trace in {directory}: {error.strerror or error}",
                hint="is that disk full? TMPDIR names another",
            ) from error
    phases = tuple(phase for phase, _ in stages)
    found = read_trace(content, phases, steps=steps, wall_ns=wall_ns, trace=None if trace is None else str(trace))
    if trace is not None:
        try:
            write_whole(trace, content)
        except OSError as error:
            unkept = BsprofError(f"--trace: {trace}: {error.strerror or error}")
            raise TraceNotKeptError(unkept, msgspec.structs.replace(found, trace=None)) from error
    return found


class TraceNotKeptError(BsprofError):
    """The trace could not be written where it was asked for; what `profile` learned from it is here all the same."""

    def __init__(self, error: BsprofError, profile: Profile) -> None:
        super().__init__(error.message, hint=error.hint)
        self.profile = profile


def untraced(profile: Profile, device: torch.device) -> Note | None:
    """Return why `profile` lacks the figures of `device`, or None where it has them or there is no device."""
    if device.type == "cpu" or profile.busy_ns is not None:
        return None
    activity = _device_activity(device)
    if activity is None:
        why = f"torch.profiler knows no {device.type} devices"
    elif activity not in _supported():
        why = f"the profiler of this torch build, {torch.__version__}, does not trace {device.type} devices"
    elif profile.busy_total_ns is not None:
        why = "no kernel in the trace can be laid to the call that launched it"
    else:
        why = f"the trace holds no work of {device}"
        if device.type == "cuda":
            why += ": is CUPTI missing, used by another profiler (Nsight, DCGM), or not permitted here?"
    return Note(code="device_not_profiled", text=f"no kernel-busy time: {why}")


def ranged(stages: Sequence[Stage], device: torch.device) -> tuple[Stage, ...]:
    """Return `stages` with an NVTX range named after the phase around each, for Nsight Systems.

    Raises BsprofError where `device` is no CUDA device, or the torch build has no NVTX.
    """
    if device.type != "cuda":
        raise BsprofError(f"--nvtx: NVTX ranges need a CUDA device, this is {device.type}", hint="leave --nvtx away")
    try:
        _in_range(f"{RANGE}nvtx", lambda: None)
    except RuntimeError as error:
        raise BsprofError(f"--nvtx: this torch build has no NVTX: {error}", hint="leave --nvtx away") from error
    # A partial has no code object of its own: the frames of an exception still lead to the stage's.
    return tuple((phase, partial(_in_range, phase, run)) for phase, run in stages)


def _in_range(phase: str, run: Callable[[], None]) -> None:
    torch.cuda.nvtx.range_push(phase)  # type: ignore[no-untyped-call]
    try:
        run()
    finally:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


def _device_activity(device: torch.device) -> ProfilerActivity | None:
    return ProfilerActivity.__members__.get(device.type.upper())


def _activities(device: torch.device) -> list[ProfilerActivity]:
    on_device = _device_activity(device)
    return list({ProfilerActivity.CPU, on_device or ProfilerActivity.CPU} & _supported())


def _supported() -> set[ProfilerActivity]:
    """Return what this build of torch can trace on this machine."""
    return set(supported_activities())  # type: ignore[no-untyped-call]


def _profiler_enabled() -> bool:
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def _own_profiler() -> BsprofError:
    return BsprofError("the training loop runs a profiler of its own", hint=f"end it first; {_WITHOUT}")
