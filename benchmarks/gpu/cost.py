"""What bsprof's marks add to a step, beside an active torch.profiler in the same interleaved run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.training import mlp, mobilenet
from benchmarks.gpu.verdict import Line, Stand, judge
from bsprof import stats
from bsprof.measure.loop import Training, run_block
from bsprof.measure.tape import Tape
from bsprof.stats import Estimate

STEP_SHARE = 0.002
"""Of MobileNetV2's step."""
MLP_LIMIT_US = 40.0
"""Five events of 2 to 5 us and the clock reads, on a slow host."""
WIDEST_SHARE = 0.01
"""Half an interval wider than this share of the step proves nothing."""

Round = dict[str, float]
"""Microseconds a step of the variants that one round timed."""
PROFILED = 3
"""Every third round has a block under torch.profiler: taking in what it saw takes far longer than the block."""


def distortion(stand: Stand) -> Iterator[Line]:
    """Expect the marks to cost at most 0.2 % of a MobileNetV2 step and 40 us of a tiny one.

    Blocks of bare steps, of steps with bsprof's marks and of steps under torch.profiler alternate in random order, so
    that drift meets all alike; each block is timed on the host from an empty queue to an empty queue. What a variant
    adds is the median difference from the bare block of the same round, with its 95 % interval. On MobileNetV2 the
    interval must reach below the limit, and one wider than 1 % of the step fails for telling nothing; on the tiny step
    the median itself must be below it.
    """
    rehearsed = stand.rehearsed
    small = {"batch_size": 2, "image_size": 32} if rehearsed else {"batch_size": 32, "image_size": 224}
    training = mobilenet(stand.device, **small, loaded=True)
    rounds = _interleave(training, stand.device, steps=1 if rehearsed else 5, rounds=6 if rehearsed else 30)
    training.stop()
    # A rehearsal of a few steps on a busy CPU cannot tell, and is not asked to.
    limits = {"share": 1.0, "widest": None} if rehearsed else {"share": STEP_SHARE, "widest": WIDEST_SHARE}
    yield judge_added("mobilenet_v2, batch 32", rounds, **limits)
    training = mlp(stand.device)
    rounds = _interleave(training, stand.device, steps=20 if rehearsed else 100, rounds=6 if rehearsed else 45)
    training.stop()
    yield judge_added("a tiny perceptron", rounds, limit_us=MLP_LIMIT_US)


def _interleave(training: Training, device: Device, *, steps: int, rounds: int) -> list[Round]:
    """Return what each round timed."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not device.rehearsed:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    found: list[Round] = []
    order = random.Random(0)
    for number in range(-PROFILED, rounds):  # the first rounds warm up
        names = ["bare", "bsprof", "torch.profiler"] if number % PROFILED == 0 else ["bare", "bsprof"]
        times: Round = {}
        for name in order.sample(names, len(names)):
            tape = None
            if name == "bsprof":
                tape = Tape(clock=device.host_clock, device_clock=device.clock())
                tape.reserve(steps * len(training.stages) + 1)
            run_block(training.stages, 2, None)  # whatever came before has left the caches
            block = partial(run_block, training.stages, steps, tape)
            # The profiler's start and its export are not counted: a profiled window pays them once.
            profiler = torch.profiler.profile(activities=activities, acc_events=True)
            with profiler if name == "torch.profiler" else contextlib.nullcontext():
                times[name] = _timed(block, device) / steps
        if number >= 0:
            found.append(times)
    return found


def _timed(run: Callable[[], object], device: Device) -> float:
    device.wait()
    start = device.host_clock()
    run()
    device.wait()
    return (device.host_clock() - start) / 1e3


def judge_added(
    what: str,
    rounds: Sequence[Round],
    *,
    share: float | None = None,
    limit_us: float | None = None,
    widest: float | None = WIDEST_SHARE,
) -> Line:
    """Hold what `bsprof` adds to `bare`, in microseconds a step, against a share of the step or an absolute limit."""
    bare = stats.median([times["bare"] for times in rounds]).value
    added = {
        name: stats.median([times[name] - times["bare"] for times in rounds if name in times])
        for name in ("bsprof", "torch.profiler")
    }
    ours = added["bsprof"]
    limit = bare * share if share is not None else limit_us
    assert limit is not None
    low, high = (ours.value, ours.value) if ours.low is None or ours.high is None else (ours.low, ours.high)
    telling = share is None or widest is None or (ours.low is not None and (high - low) / 2 <= widest * bare)
    best = ours.value if share is None else low
    return judge(
        f"marks on {what}",
        best <= limit and telling,
        f"{_added(ours)}; torch.profiler {_added(added['torch.profiler'])}; bare step {bare:.1f} us",
        f"{limit:.1f} us" + (f", {share:.1%} of the step" if share is not None else ""),
        "the marks cost more" if telling else "the interval is too wide to tell",
        bare_us=bare,
        added_us={name: estimate._asdict() for name, estimate in added.items()},
        rounds_us=list(rounds),
    )


def _added(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:+.1f} us"
    return f"{estimate.value:+.1f} us [{estimate.low:+.1f}, {estimate.high:+.1f}]"
