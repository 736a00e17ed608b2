"""One process's samples as arrays: what every metric reads.

All times are in seconds. Phases are *means* over the steady steps, because only means add up:
phases + other = mean step.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bsprof import ceilings, stats
from bsprof.ceilings import Bound
from bsprof.model import (
    Block,
    Ceilings,
    Communication,
    Measurement,
    Memory,
    Profile,
    Rank,
    Samples,
    Startup,
    Telemetry,
)
from bsprof.stats import Estimate

Floats = npt.NDArray[np.float64]


class Reading:
    """The samples of one process as arrays, each converted once and only if a metric asks for it.

    `measurement` adds what was captured beside the samples (profile, memory, telemetry, ranks), `rates` what the
    machine can do.

    The *primary clock* is the device's where it was captured, else the host's. Steady steps are all steps but
    those in which an epoch ended.
    """

    def __init__(
        self,
        samples: Samples,
        startup: Startup | None = None,
        measurement: Measurement | None = None,
        rates: Ceilings | None = None,
    ) -> None:
        self.samples = samples
        self.startup = startup
        self.settings = measurement.case.settings if measurement else None
        self.facts = measurement.facts if measurement else None
        self.memory: Memory | None = measurement.memory if measurement else None
        self.profile: Profile | None = measurement.profile if measurement else None
        self.telemetry: Telemetry | None = measurement.telemetry if measurement else None
        self.ranks: tuple[Rank, ...] = measurement.ranks if measurement else ()
        self.communication: Communication | None = measurement.communication if measurement else None
        self._serialised = measurement.serialised if measurement else None
        self._rates = rates
        self.has_device_clock = samples.device_step_ns is not None

    def _seconds(self, ns: list[int]) -> Floats:
        times: Floats = np.asarray(ns, dtype=np.float64) * 1e-9
        boundaries = self.samples.epoch_boundaries
        return np.delete(times, boundaries) if boundaries else times

    def _means(self, phases: dict[str, list[int]]) -> dict[str, float]:
        """Return means in seconds. A sum of integers is exact, and takes less time than making an array of them."""
        left_out = set(self.samples.epoch_boundaries)
        count = len(self.samples.step_ns) - len(left_out)
        if not count:
            return {}
        return {phase: (sum(ns) - sum(ns[index] for index in left_out)) / count * 1e-9 for phase, ns in phases.items()}

    @cached_property
    def step(self) -> Floats:
        """Steady step times on the primary clock, in seconds."""
        device = self.samples.device_step_ns
        return self._seconds(self.samples.step_ns if device is None else device)

    @cached_property
    def median(self) -> Estimate | None:
        """Median step with its 95 % interval at the effective sample size, within this process."""
        return stats.median(self.step) if self.step.size else None

    @cached_property
    def median_s(self) -> float | None:
        """Median step alone, in seconds: all that counts where there are several processes, and soon found."""
        return stats.middle(self.step) if self.step.size else None

    @cached_property
    def mean(self) -> float | None:
        """Mean step in seconds: what phases and `other` add up to."""
        return float(self.step.mean()) if self.step.size else None

    @cached_property
    def host(self) -> dict[str, float]:
        """Mean host seconds of each phase in a steady step."""
        return self._means(self.samples.host_ns)

    @cached_property
    def device(self) -> dict[str, float]:
        """Mean device seconds of each phase in a steady step; empty where the device has no clock of its own."""
        return self._means(self.samples.device_ns or {})

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds of each phase on the primary clock."""
        return self.device if self.has_device_clock else self.host

    @cached_property
    def serialised(self) -> dict[str, float]:
        """Mean seconds of each phase with a synchronisation at each boundary; empty where that was not run."""
        phases = self._serialised.host_ns if self._serialised else {}
        return {phase: statistics.fmean(ns) * 1e-9 for phase, ns in phases.items() if ns}

    @cached_property
    def bounds(self) -> list[Bound]:
        """The least time that each measured ceiling leaves a step, the binding one first; empty where none is known."""
        if self.settings is None or self.facts is None or self._rates is None or self.median_s is None:
            return []
        return ceilings.bounds(self.settings, self.facts, self.median_s, self._rates)

    @property
    def mfu(self) -> float | None:
        """The step's floating-point operations a second as a share of the matrix rate measured on this device."""
        if self.facts is None or self._rates is None or self.median_s is None:
            return None
        return ceilings.mfu(self.facts, self.median_s, self._rates)

    def during(self, column: str) -> list[float]:
        """Return what telemetry told of the device within the timed window; empty where it told nothing."""
        told = self.telemetry
        if told is None or column not in told.device:
            return []
        rows = zip(told.time_ns, told.device[column], strict=False)  # a sampler may be cut off
        return [value for at, value in rows if value is not None and 0 <= at <= told.window_ns]

    def turns(self, phase: str | None = None) -> list[float | None]:
        """Return the mean seconds of a step, or of one phase, in each instrumented block; None where none is steady.

        Steps and phases are told on the primary clock.
        """
        samples = self.samples
        if phase is None:
            times = samples.step_ns if samples.device_step_ns is None else samples.device_step_ns
        else:
            times = (samples.host_ns if samples.device_ns is None else samples.device_ns)[phase]
        left_out = set(samples.epoch_boundaries)
        means: list[float | None] = []
        first = 0
        for block in samples.blocks:
            if block.kind == "instrumented":
                steps = range(first, min(first + block.steps, len(times)))
                steady = [times[step] for step in steps if step not in left_out]
                means.append(statistics.fmean(steady) * 1e-9 if steady else None)
                first += block.steps
        return means

    @cached_property
    def distortion(self) -> Estimate | None:
        """What recording adds to a step, as a fraction: instrumented / bare - 1, over neighbouring blocks."""
        pairs = neighbours(self.samples.blocks, ("instrumented", "bare"))
        if not pairs:
            return None
        return excess(stats.paired_ratio([a for a, _ in pairs], [b for _, b in pairs]))


def excess(ratio: Estimate) -> Estimate:
    """Return the estimate of ratio - 1."""
    low, high = (None if bound is None else bound - 1 for bound in (ratio.low, ratio.high))
    return ratio._replace(value=ratio.value - 1, low=low, high=high)


def neighbours(blocks: Sequence[Block], kinds: tuple[str, str]) -> list[tuple[float, float]]:
    """Return nanoseconds a step of each pair of neighbours of these two kinds; no block is used twice."""
    pairs: list[tuple[float, float]] = []
    waiting: Block | None = None
    for block in blocks:
        if block.steps < 1 or wall_ns(block) < 1 or block.kind not in kinds:
            waiting = None
        elif waiting is None or waiting.kind == block.kind:
            waiting = block
        else:
            both: dict[str, float] = {one.kind: wall_ns(one) / one.steps for one in (waiting, block)}
            pairs.append((both[kinds[0]], both[kinds[1]]))
            waiting = None
    return pairs


def wall_ns(block: Block) -> int:
    """Return how long a block took, by the device's clock where it was captured."""
    return block.device_wall_ns or block.wall_ns
