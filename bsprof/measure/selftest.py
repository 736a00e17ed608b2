"""Known delays, planted in each phase of the real step loop, must come back where they were put."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bsprof import stats
from bsprof.measure.clock import DeviceClock, HostClock, device_clock, host_clock
from bsprof.measure.loop import Training, followed, run_block
from bsprof.measure.tape import Steps, Tape
from bsprof.model import PHASES, Check, Settings

DELAY_NS = 5_000_000
"""Long beside a phase of the tiny model, short beside the user's patience."""
STEPS = 40
BLOCK = 4
"""Steps in a row with or without the delay."""
KEEP_BUSY_NS = 1_000_000
"""Each phase's sleep on the device: longer than the host takes to launch the tiny model's phase."""
CALIBRATION_CYCLES = 20_000_000
"""About 10 ms of a GPU at 2 GHz."""
CALIBRATION_NS = (300_000_000, 2_000_000_000)
"""Sleeps are timed for so long, at the least and at the most: an idle GPU does not have its full clock at once."""
CALIBRATED_SPREAD = 0.002
"""Spread of the last five rates at which the clock counts as settled; far below what a delay may be wrong by."""
TOLERANCE = 0.01
TOLERANCE_NS = 100_000
"""A planted delay may come back wrong by the larger of the two; a neighbour may move by as much."""


Emit = Callable[[str, int, float | None], None]
Sleep = Callable[[int], None]
"""Keeps the device busy for so many nanoseconds, without waiting for it."""


def spin(nanoseconds: int, clock: HostClock = host_clock) -> int:
    """Keep the processor busy and return for how long: on a machine that others use as well it is longer than asked."""
    start = now = clock()
    while now < start + nanoseconds:
        now = clock()
    return now - start


class _Pairs(Dataset[tuple[torch.Tensor, int]]):
    """Small random samples; `delay_ns` is spent in making the first of each batch."""

    def __init__(self, batch_size: int, clock: HostClock) -> None:
        self.batch_size = batch_size
        self.clock = clock
        self.delay_ns = 0
        self.spent_ns: list[int] = []
        self._image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.batch_size * STEPS * 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.delay_ns and index % self.batch_size == 0:
            self.spent_ns.append(spin(self.delay_ns, self.clock))
        return self._image, index % 10


def cuda_sleep(device: torch.device, events: DeviceClock) -> Sleep | None:
    """Return a sleep of a CUDA or ROCm device, its cycles counted against timing events; None elsewhere."""
    if device.type != "cuda":
        return None
    spend: Callable[[int], None] = torch.cuda._sleep
    least_ns, most_ns = CALIBRATION_NS
    rates: deque[float] = deque(maxlen=5)
    slept_ns = 0
    while True:
        before = events.stamp()
        spend(CALIBRATION_CYCLES)
        slept_ns += (taken_ns := events.span_ns(before, events.stamp()))
        rates.append(CALIBRATION_CYCLES / taken_ns)
        settled = slept_ns >= least_ns and max(rates) <= (1 + CALIBRATED_SPREAD) * min(rates)
        if len(rates) == 5 and (settled or slept_ns >= most_ns):
            break
    cycles_per_ns = sorted(rates)[2]
    return lambda nanoseconds: spend(round(nanoseconds * cycles_per_ns))


def run(emit: Emit, *, clock: HostClock = host_clock) -> list[Check]:
    """Plant a delay in each phase in turn and return what came back on the host's clock.

    The loop is the one that measures every case, around a tiny model whose phases are short beside the delay. Blocks
    with and without the delay alternate, so that the machine's drift does not look like a leak.
    """
    torch.set_num_threads(1)
    training, samples = _tiny_training(torch.device("cpu"), clock)

    def block(planted: str, delay_ns: int) -> _Block:
        samples.delay_ns = delay_ns if planted == "data" else 0
        samples.spent_ns.clear()
        # In `data` the data set itself is slow; elsewhere the delay stands behind the stage.
        slow = planted != "data" and delay_ns > 0
        behind = {planted: lambda: samples.spent_ns.append(spin(delay_ns, clock))} if slow else {}
        tape = Tape(clock=clock)
        wall_ns = run_block(followed(training.stages, behind), BLOCK, tape).wall_ns
        samples.delay_ns = 0
        return _Block(tape.host_steps(), wall_ns, samples.spent_ns.copy())

    return _plant("host", block, training, emit)


def run_on_device(
    emit: Emit,
    device: torch.device,
    *,
    make_clock: Callable[[torch.device], DeviceClock | None] = device_clock,
    make_sleep: Callable[[torch.device, DeviceClock], Sleep | None] = cuda_sleep,
) -> list[Check]:
    """Plant a delay on `device` behind each phase in turn and return what came back on its own clock.

    Every phase sleeps a little, so that the host is always ahead: a device that waits for its host gains time back
    wherever it is delayed, which is true and looks like a leak. Nothing is returned for a device without a clock, or
    that cannot be made to sleep.
    """
    events = make_clock(device)
    sleep = None if events is None else make_sleep(device, events)
    if sleep is None:
        return []
    training, _ = _tiny_training(device, host_clock)

    def block(planted: str, delay_ns: int) -> _Block:
        behind = {phase: partial(sleep, KEEP_BUSY_NS + (delay_ns if phase == planted else 0)) for phase in PHASES}
        own = make_clock(device)
        assert own is not None
        tape = Tape(device_clock=own)
        tape.reserve(BLOCK * len(PHASES) + 1)
        before = own.stamp()
        run_block(followed(training.stages, behind), BLOCK, tape)
        after = own.stamp()
        steps = tape.device_steps()
        assert steps is not None
        return _Block(steps, own.span_ns(before, after), [delay_ns])

    return _plant("device", block, training, emit)


class _Block(NamedTuple):
    """A few steps, their time by a clock reading of its own at either end, and the delays that were in them."""

    steps: Steps
    wall_ns: int
    planted_ns: list[int]
    """How long the delays really were."""


def _tiny_training(device: torch.device, clock: HostClock) -> tuple[Training, _Pairs]:
    torch.manual_seed(0)
    settings = Settings(batch_size=8)
    samples = _Pairs(settings.batch_size, clock)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    loader = DataLoader(samples, batch_size=settings.batch_size, pin_memory=device.type == "cuda")
    training = Training(model, loader, torch.optim.SGD(model.parameters(), lr=0.01), settings, device)
    training.start()
    run_block(training.stages, 20, None)
    return training, samples


def _plant(
    clock: Literal["host", "device"], block: Callable[[str, int], _Block], training: Training, emit: Emit
) -> list[Check]:
    checks = []
    for phase in PHASES:
        emit(f"planting in {phase}", 0, None)
        checks.append(_check(phase, clock, block))
    training.stop()
    return checks


def _check(planted: str, clock: Literal["host", "device"], block: Callable[[str, int], _Block]) -> Check:
    plain: dict[str, list[int]] = {phase: [] for phase in PHASES}
    delayed: dict[str, list[int]] = {phase: [] for phase in PHASES}
    residual = 0
    delays: list[int] = []
    for _ in range(STEPS // BLOCK):
        for delay_ns, found in ((0, plain), (DELAY_NS, delayed)):
            steps, wall_ns, planted_ns = block(planted, delay_ns)
            delays += planted_ns if delay_ns else []
            residual += wall_ns - sum(map(sum, steps.phase_ns.values()))
            for phase in PHASES:
                # A phase without a mark has no time: it fails the check, and does not stop it.
                found[phase] += steps.phase_ns.get(phase, [0] * len(steps.step_ns))
    moved = {phase: round(stats.median(delayed[phase]).value - stats.median(plain[phase]).value) for phase in PHASES}
    leaked_into = max((phase for phase in PHASES if phase != planted), key=lambda phase: abs(moved[phase]))
    tolerance = max(round(DELAY_NS * TOLERANCE), TOLERANCE_NS)
    residual //= 2 * STEPS
    delay_ns = round(stats.median(delays).value)
    largest_error = max(abs(moved[planted] - delay_ns), abs(moved[leaked_into]), abs(residual))
    return Check(
        phase=planted,
        clock=clock,
        planted_ns=delay_ns,
        found_ns=moved[planted],
        leaked_ns=moved[leaked_into],
        leaked_into=leaked_into,
        residual_ns=residual,
        tolerance_ns=tolerance,
        passed=largest_error <= tolerance,
    )
