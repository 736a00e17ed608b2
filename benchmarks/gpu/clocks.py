"""Whether time is told truthfully: planted delays, a loader of known period, sums, and no waiting inside a window."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec

from benchmarks.gpu.device import Device, Stopwatch, milliseconds
from benchmarks.gpu.training import real_training
from benchmarks.gpu.verdict import Line, Stand, judge
from bsprof import metrics, stats
from bsprof.measure import selftest
from bsprof.measure.loop import Stage, run_block
from bsprof.measure.tape import Steps, Tape
from bsprof.model import PHASES, Block, Samples
from bsprof.readings import Reading

DELAY_NS = 5_000_000
TOLERANCE, TOLERANCE_NS = 0.01, 100_000
"""A planted delay may come back wrong by the larger of the two, and a neighbour may move by as much."""
KEEP_AHEAD_NS = 300_000
"""Each phase's sleep on the device: much more than the host takes to launch it, so that the queue never runs dry."""
BLOCK = 8
"""Steps in a row. What they launch stays far below the driver's queue of 1024, where the host would have to wait."""
PAIRS = 6
STALL_TOLERANCE = 0.05
RESIDUAL_LIMIT = 0.01
AHEAD_LIMIT = 0.2
CLOCKS_LIMIT = 0.01


def _nothing() -> None:
    pass


def _recorded(
    device: Device, stages: Sequence[Stage], steps: int, *, lead_in: int = 0
) -> tuple[Steps, Steps, Block, list[int]]:
    """Run a block with bsprof's marks and return host steps, device steps, the block and its one outside interval.

    Making a clock may drain the queue; `lead_in` bare steps fill it again.
    """
    device.sleep(1)  # the first one calibrates, which is no part of any window
    device.wait()
    tape = Tape(clock=device.host_clock, device_clock=device.clock())
    tape.reserve(steps * len(stages) + 1)
    run_block(stages, lead_in, None)
    outside = device.stopwatch()
    outside.record()
    block = run_block(stages, steps, tape)
    outside.record()
    device.wait()
    on_device = tape.device_steps()
    assert on_device is not None, "the device has no clock"
    return tape.host_steps(), on_device, block, outside.intervals_ns()


# --- planted delays ---------------------------------------------------------------------------------


def planted_delays(stand: Stand) -> Iterator[Line]:
    """Expect a delay planted in a phase back in that phase, on the clock that it was planted on.

    On the device a spinning kernel of about 5 ms is queued behind a phase. How long it really took is read from a pair
    of plain events around it, for the clock rate may move; bsprof's own events must find the same in that phase
    and nothing in its neighbours, within max(1 %, 100 us). Every phase keeps the device busy a little, so that the host
    is always ahead: what the device gains where the host was late would look like a leak. On the host's clock the
    host spins in one phase in turn. First the two clocks themselves are held against each other.
    """
    device = stand.device
    yield _clocks_agree(device)
    for clock in ("device", "host"):
        for phase in PHASES:
            yield _planted(device, clock, phase)
    checks = selftest.run(_quiet, clock=device.host_clock)
    if device.rehearsed:
        checks += selftest.run_on_device(
            _quiet,
            device.torch_device,
            make_clock=lambda _: device.clock(),
            make_sleep=lambda _, events: device.sleep,
        )
    else:
        checks += selftest.run_on_device(_quiet, device.torch_device)
    on_device = [check for check in checks if check.clock == "device"]
    wrong = [f"{check.phase} on the {check.clock}" for check in checks if not check.passed]
    yield judge(
        "bsprof selftest",
        not wrong and len(on_device) == len(PHASES),
        f"{len(checks) - len(wrong)} of {len(checks)} checks, {len(on_device)} of them on the device",
        f"all, {len(PHASES)} on the device",
        f"failed: {', '.join(wrong) or 'none was made on the device'}",
    )


def _quiet(stage: str, steps: int, precision: float | None) -> None:
    pass


def _clocks_agree(device: Device) -> Line:
    """Hold a device interval of 200 ms against the host's clock, waiting at both ends."""
    device.sleep(1_000_000)
    ratios = []
    for _ in range(3):
        device.wait()
        tape = Tape(clock=device.host_clock, device_clock=device.clock())
        tape.reserve(2)
        device.wait()
        start = device.host_clock()
        tape.begin()
        device.sleep(200_000_000)
        tape.mark("data")
        device.wait()
        host_ns = device.host_clock() - start
        on_device = tape.device_steps()
        assert on_device is not None
        ratios.append(on_device.step_ns[0] / host_ns)
    ratio = statistics.median(ratios)
    return judge(
        "a second is a second on both clocks",
        abs(ratio - 1) <= CLOCKS_LIMIT,
        f"device / host {ratio:.4f}",
        f"1 ± {CLOCKS_LIMIT:g}",
        "the device's clock runs at another rate than the host's",
        ratios=ratios,
    )


def _planted(device: Device, clock: str, planted: str) -> Line:
    plain: dict[str, list[int]] = {phase: [] for phase in PHASES}
    delayed: dict[str, list[int]] = {phase: [] for phase in PHASES}
    truth: list[int] = []
    for _ in range(PAIRS):
        for delay_ns, found in ((0, plain), (DELAY_NS, delayed)):
            watch = device.stopwatch()
            spent: list[int] = []
            stages = [
                (phase, _stage(device, clock, delay_ns if phase == planted else 0, watch, spent)) for phase in PHASES
            ]
            host, on_device, _, _ = _recorded(device, stages, BLOCK)
            steps = on_device if clock == "device" else host
            for phase in PHASES:
                found[phase] += steps.phase_ns[phase]
            if delay_ns:
                truth += watch.intervals_ns()[::2] if clock == "device" else spent
    expected = statistics.median(truth)
    moved = {phase: stats.median(delayed[phase]).value - stats.median(plain[phase]).value for phase in PHASES}
    leak = max((phase for phase in PHASES if phase != planted), key=lambda phase: abs(moved[phase]))
    tolerance = max(TOLERANCE * expected, TOLERANCE_NS)
    return judge(
        f"delay in {planted}, {clock}",
        abs(moved[planted] - expected) <= tolerance and abs(moved[leak]) <= tolerance,
        f"{milliseconds(moved[planted])} of {milliseconds(expected)}, {moved[leak] / 1e3:+.1f} us in {leak}",
        f"± {tolerance / 1e3:.0f} us",
        f"{(moved[planted] - expected) / 1e3:+.1f} us off in {planted}",
        planted_ns=expected,
        moved_ns=moved,
    )


def _stage(device: Device, clock: str, delay_ns: int, watch: Stopwatch, spent: list[int]) -> Callable[[], None]:
    def on_host() -> None:
        if delay_ns:
            start = device.host_clock()
            device.pause(delay_ns)
            spent.append(device.host_clock() - start)  # a host that others use as well pauses for longer than asked

    def on_device() -> None:
        device.sleep(KEEP_AHEAD_NS)
        if delay_ns:
            watch.record()
            device.sleep(delay_ns)
            watch.record()

    return on_device if clock == "device" else on_host


def _samples(host: Steps, on_device: Steps, block: Block, outside_ns: int) -> Samples:
    """Return what was recorded as a case's samples, the block timed by one pair of events around it."""
    return Samples(
        batch_size=None,
        step_ns=host.step_ns,
        host_ns=host.phase_ns,
        device_step_ns=on_device.step_ns,
        device_ns=on_device.phase_ns,
        blocks=[msgspec.structs.replace(block, device_wall_ns=outside_ns)],
    )


# --- wait and stall ---------------------------------------------------------------------------------


def stall(stand: Stand) -> Iterator[Line]:
    """Expect a loader of known period to stall the device for max(0, period - step), and the rest hidden.

    The device's work is one spinning kernel a step, its true length read from plain events. The loader gives its k-th
    batch at start + k * period, so that the host waits about one period a step whatever the device does. At half
    the step time the device never runs dry, at the step time itself hardly, at twice the step time for one step.
    Wait, stall and hidden come from bsprof.metrics, within 5 % of the step or of the expected stall.
    """
    device = stand.device
    work_ns, steps = 10_000_000, (12 if stand.rehearsed else 50)
    for ratio in (0.5, 1.0, 2.0):
        watch = device.stopwatch()
        stages = _paced(device, round(ratio * work_ns), work_ns, watch)
        device.wait()
        host, on_device, block, outside = _recorded(device, stages, steps, lead_in=3)
        samples = _samples(host, on_device, block, outside[0])
        yield judge_stall(samples, ratio * work_ns, statistics.median(watch.intervals_ns()[::2]))


def judge_stall(samples: Samples, period_ns: float, work_ns: float) -> Line:
    """Hold wait, stall and hidden of `samples` against a loader's period and the device's work a step."""
    reading = Reading(samples)
    wait, stalled, hidden = (_seconds(name, reading) * 1e9 for name in ("wait", "stall", "hidden"))
    busy_elsewhere = sum(ns * 1e9 for phase, ns in reading.host.items() if phase != "data")
    expected = max(0.0, period_ns - work_ns)
    tolerance = STALL_TOLERANCE * max(work_ns, expected)
    expected_wait = period_ns - busy_elsewhere
    errors = {
        "stall": stalled - expected,
        "wait": wait - expected_wait,
        "hidden": hidden - (expected_wait - expected),
    }
    worst = max(errors, key=lambda name: abs(errors[name]))
    return judge(
        f"loader at {period_ns / work_ns:.2f} x the step",
        abs(errors[worst]) <= tolerance,
        f"stall {milliseconds(stalled)} of {milliseconds(expected)}, wait {milliseconds(wait)}, "
        f"hidden {milliseconds(hidden)}",
        f"± {milliseconds(tolerance)}",
        f"{worst} is {errors[worst] / 1e6:+.3f} ms off",
        period_ns=period_ns,
        work_ns=work_ns,
        wait_ns=wait,
        stall_ns=stalled,
        hidden_ns=hidden,
    )


def _seconds(name: str, reading: Reading) -> float:
    value = metrics.METRICS[name].compute(reading)
    assert isinstance(value, float), f"{name} was not captured"
    return value


def _paced(device: Device, period_ns: int, work_ns: int, watch: Stopwatch) -> list[Stage]:
    def batches() -> Iterator[None]:
        due_ns = device.host_clock()
        while True:
            due_ns += period_ns
            device.pause(due_ns - device.host_clock())
            yield

    loader = batches()

    def work() -> None:
        watch.record()
        device.sleep(work_ns)
        watch.record()

    run = {"data": lambda: next(loader), "forward": work}
    return [(phase, run.get(phase, _nothing)) for phase in PHASES]


# --- sums -------------------------------------------------------------------------------------------


def sums(stand: Stand) -> Iterator[Line]:
    """Expect phases on the device to add up to one pair of events around the whole window, within 1 %.

    The pair shares nothing with the chain of marks. Once with sleeps of different lengths, once with MobileNetV2; the
    residual is the one that every result shows.
    """
    device = stand.device
    lengths = dict(zip(PHASES, (1, 2, 4, 3, 2), strict=True))
    sleeping = [(phase, partial(device.sleep, 400_000 * times)) for phase, times in lengths.items()]
    yield _residual("sleeps", device, sleeping, 10)
    training = real_training(device, batch_size=32)
    run_block(training.stages, 2 if stand.rehearsed else 10, None)
    device.wait()
    yield _residual("real training", device, _with_work(device, training.stages), 3 if stand.rehearsed else 30)
    training.stop()


def _with_work(device: Device, stages: Sequence[Stage]) -> list[Stage]:
    """Give a rehearsal's device something to do: training on the CPU's tensors leaves its queue empty."""
    work = [("forward", partial(device.sleep, 2_000_000))] if device.rehearsed else []
    return [*stages, *work]


def _residual(name: str, device: Device, stages: Sequence[Stage], steps: int) -> Line:
    host, on_device, block, outside = _recorded(device, stages, steps)
    residual = _seconds("residual", Reading(_samples(host, on_device, block, outside[0])))
    return judge(
        f"phases of {steps} steps, {name}",
        abs(residual) <= RESIDUAL_LIMIT,
        f"residual {residual:+.3%} of {milliseconds(outside[0])}",
        f"± {RESIDUAL_LIMIT:.0%}",
        "the phases do not account for the window",
        residual=residual,
    )


# --- no waiting -------------------------------------------------------------------------------------


def no_synchronisation(stand: Stand) -> Iterator[Line]:
    """Expect that recording never makes the host wait for the device.

    The queue is kept full by long sleeps: a host that never waits is done with the block while the device has hardly
    begun. And torch, told to raise wherever it would synchronise, does not raise in an instrumented block of real
    training. Each is done once more with a synchronisation planted, which must be seen.
    """
    device = stand.device
    sleep_ns, steps = 5_000_000, 16
    sleeping: list[Stage] = [(phase, partial(device.sleep, sleep_ns // len(PHASES))) for phase in PHASES]
    waiting: list[Stage] = [(phase, device.wait if phase == "backward" else run) for phase, run in sleeping]
    ahead = _host_share(device, sleeping, steps)
    yield judge(
        "the host runs ahead of a full queue",
        ahead <= AHEAD_LIMIT,
        f"host {ahead:.1%} of the device's time",
        f"<= {AHEAD_LIMIT:.0%}",
        "something in the block waits for the device",
        host_share=ahead,
    )
    behind = _host_share(device, waiting, steps)
    yield judge(
        "a planted synchronisation is seen so",
        behind > AHEAD_LIMIT,
        f"host {behind:.1%} of the device's time",
        f"> {AHEAD_LIMIT:.0%}",
        "this check could not have failed",
        host_share=behind,
    )
    training = real_training(device, batch_size=16)
    run_block(training.stages, 3, None)
    device.wait()
    tape = Tape(clock=device.host_clock, device_clock=device.clock())
    tape.reserve(5 * len(training.stages) + 1)
    raised = _refused(device, partial(run_block, training.stages, 5, tape))
    yield judge(
        "no synchronising call in 5 instrumented steps",
        raised is None,
        raised or "none",
        "none",
        "torch's sync debug mode raised",
    )
    raised = _refused(device, device.peek)
    yield judge(
        "a planted synchronising call raises so",
        raised is not None,
        "raised" if raised else "nothing raised",
        "raised",
        "this check could not have failed",
    )
    device.wait()
    training.stop()


def _host_share(device: Device, stages: list[Stage], steps: int) -> float:
    device.sleep(1)
    device.wait()
    _, on_device, block, _ = _recorded(device, stages, steps)
    return block.wall_ns / sum(on_device.step_ns)


def _refused(device: Device, run: Callable[[], object]) -> str | None:
    """Return what torch said where `run` would have waited for the device, or None."""
    try:
        with device.refusing_to_wait():
            run()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None
