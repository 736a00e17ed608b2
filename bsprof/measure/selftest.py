"""Known delays, planted in each phase of the real step loop, must come back where they were put."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bsprof import stats
from bsprof.measure.clock import HostClock, host_clock
from bsprof.measure.loop import Stage, Training, run_block
from bsprof.measure.tape import Tape
from bsprof.model import PHASES, Check, Settings

DELAY_NS = 5_000_000
"""Long beside a phase of the tiny model, short beside the user's patience."""
STEPS = 40
TOLERANCE = 0.01
TOLERANCE_NS = 100_000
"""A planted delay may come back wrong by the larger of the two; a neighbour may move by as much."""


def spin(nanoseconds: int, clock: HostClock = host_clock) -> None:
    """Keep the processor busy; unlike a sleep it ends when it should."""
    end = clock() + nanoseconds
    while clock() < end:
        pass


class _Pairs(Dataset[tuple[torch.Tensor, int]]):
    """Small random samples; `delay_ns` is spent in making the first of each batch."""

    def __init__(self, batch_size: int, clock: HostClock) -> None:
        self.batch_size = batch_size
        self.clock = clock
        self.delay_ns = 0
        self._image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.batch_size * STEPS * 100

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index % self.batch_size == 0:
            spin(self.delay_ns, self.clock)
        return self._image, index % 10


def run(emit: Callable[[str, int, float | None], None], *, clock: HostClock = host_clock) -> list[Check]:
    """Plant a delay in each phase in turn and return what came back.

    The loop is the one that measures every case, around a tiny model whose phases are short beside the delay. Blocks
    with and without the delay alternate, so that the machine's drift does not look like a leak.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = Settings(batch_size=8)
    samples = _Pairs(settings.batch_size, clock)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    training = Training(
        model,
        DataLoader(samples, batch_size=settings.batch_size),
        torch.optim.SGD(model.parameters(), lr=0.01),
        settings,
        torch.device("cpu"),
    )
    training.start()
    run_block(training.stages, 20, None)
    checks = []
    for phase in PHASES:
        emit(f"planting in {phase}", 0, None)
        checks.append(_check(phase, training, samples))
    training.stop()
    return checks


def _check(planted: str, training: Training, samples: _Pairs) -> Check:
    plain: dict[str, list[int]] = {phase: [] for phase in PHASES}
    delayed: dict[str, list[int]] = {phase: [] for phase in PHASES}
    residual = 0
    for _ in range(STEPS // 4):
        for delay_ns, found in ((0, plain), (DELAY_NS, delayed)):
            samples.delay_ns = delay_ns if planted == "data" else 0
            tape = Tape(clock=samples.clock)
            block = run_block(_delayed(training.stages, planted, delay_ns, samples.clock), 4, tape)
            steps = tape.host_steps()
            residual += block.wall_ns - sum(map(sum, steps.phase_ns.values()))
            for phase in PHASES:
                # A phase without a mark has no time: it fails the check, and does not stop it.
                found[phase] += steps.phase_ns.get(phase, [0] * len(steps.step_ns))
    samples.delay_ns = 0
    moved = {phase: round(stats.median(delayed[phase]).value - stats.median(plain[phase]).value) for phase in PHASES}
    leaked_into = max((phase for phase in PHASES if phase != planted), key=lambda phase: abs(moved[phase]))
    tolerance = max(round(DELAY_NS * TOLERANCE), TOLERANCE_NS)
    residual //= 2 * STEPS
    largest_error = max(abs(moved[planted] - DELAY_NS), abs(moved[leaked_into]), abs(residual))
    return Check(
        phase=planted,
        planted_ns=DELAY_NS,
        found_ns=moved[planted],
        leaked_ns=moved[leaked_into],
        leaked_into=leaked_into,
        residual_ns=residual,
        tolerance_ns=tolerance,
        passed=largest_error <= tolerance,
    )


def _delayed(stages: tuple[Stage, ...], planted: str, delay_ns: int, clock: HostClock) -> list[Stage]:
    """Return `stages` with a delay behind the `planted` one. In `data` the data set itself is slow instead."""

    def slow(run: Callable[[], None]) -> Callable[[], None]:
        def stage() -> None:
            run()
            spin(delay_ns, clock)

        return stage

    return [(phase, slow(run) if phase == planted and phase != "data" and delay_ns else run) for phase, run in stages]
