"""How a rate is measured: a piece of work is done so often that it fills a repeat, and repeats are taken in turns."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch

from bsprof import stats
from bsprof.measure.clock import EventClock, host_clock
from bsprof.measure.failures import classify
from bsprof.model import Ceiling

Rate = Callable[[], float]
"""Measures once: units a second."""

Seconds = Callable[[int], float]
"""Does a piece of work so many times and returns the seconds it took."""

MOST_COUNT = 1000
"""Pieces of work in a repeat at the most; also less than a device's launch queue holds."""

ALL_REDUCE_BYTES = tuple(2**10 * 4**power for power in range(10))
"""1 KiB, 4 KiB … 256 MiB."""


class Extent(NamedTuple):
    """How much is done for each rate. The defaults take about a minute on two cores."""

    copy_bytes: int = 256 * 2**20
    file_bytes: int = 128 * 2**20
    images: int = 64
    first_side: int = 512
    most_side: int = 8192
    """Matrices grow from one side to the other until a product takes a repeat's time, or no larger ones fit."""
    repeat_s: float = 0.05
    repeats: int = 40
    group_s: float = 4.0
    """A group ends after this time, or after so many repeats."""
    all_reduce_bytes: tuple[int, ...] = ALL_REDUCE_BYTES
    """Multiples of 1 KiB."""
    all_reduce_s: float = 8.0
    """Shared by all worlds and sizes; a size may take more where one call is long."""


FULL = Extent()


# --- repeats ----------------------------------------------------------------------------------------


class Tally:
    """What has been measured so far, and what could not be."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.rates: dict[str, Ceiling] = {}
        self.missing: dict[str, str] = {}

    def measure(
        self, unit: Literal["B/s", "FLOP/s", "1/s", "cores"], prepared: Mapping[str, Callable[[], Rate]]
    ) -> dict[str, list[float]]:
        """Prepare each rate, then measure all of them in turns; returns the repeats of each that could be."""
        ready: dict[str, Rate] = {}
        for name, prepare in prepared.items():
            with self.or_missing(name):
                ready[name] = prepare()
        repeats: dict[str, list[float]] = {name: [] for name in ready}
        end_ns = host_clock() + round(self.extent.group_s * 1e9)
        for turn in range(self.extent.repeats):
            if turn and host_clock() > end_ns:
                break
            for name, rate in ready.items():
                if name not in self.missing:
                    with self.or_missing(name):
                        repeats[name].append(rate())
        measured = {name: values for name, values in repeats.items() if name not in self.missing}
        for name, values in measured.items():
            estimate = stats.median(values)
            self.rates[name] = Ceiling(value=estimate.value, unit=unit, low=estimate.low, high=estimate.high)
        return measured

    def rate(self, seconds: Seconds, units: float) -> Rate:
        """Return the rate of a piece of work that is worth `units`, done as often as fills a repeat."""
        count = count_for(seconds, self.extent.repeat_s)
        return lambda: units * count / seconds(count)

    @contextlib.contextmanager
    def or_missing(self, *names: str) -> Iterator[None]:
        """Let a failure inside be the reason why those of `names` are missing that have no rate yet."""
        try:
            yield
        except Exception as error:  # whatever it is, the others can be measured
            reason = classify(error).message or type(error).__name__
            self.missing |= {name: reason for name in names if name not in self.rates}


def count_for(seconds: Seconds, enough_s: float) -> int:
    """Return how often to do a piece of work for it to take about `enough_s`; the first time, cold, does not count."""
    seconds(1)
    count = 1
    while (taken := seconds(count)) < enough_s and count < MOST_COUNT:
        wanted = math.ceil(count * enough_s / taken) if taken > 0 else MOST_COUNT
        # No leaps: one reading that was too short by chance must not make a repeat of minutes.
        count = min(wanted, 10 * count, MOST_COUNT) if wanted > count else count + 1
    return count


# --- the device's time ------------------------------------------------------------------------------


def seconds_on(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes on `device`, by a pair of its events around it; a CPU's by the host clock.

    Tests put a fake in its place. Raises RuntimeError where the device's events carry no time.
    """
    if device.type == "cpu":
        start = host_clock()
        work()
        return (host_clock() - start) / 1e9
    clock = EventClock(device)
    before = clock.stamp()
    work()
    return clock.span_ns(before, clock.stamp()) / 1e9


def timed(device: torch.device, work: Callable[[], object]) -> Seconds:
    """Return what does `work` on `device` so many times, one after another on its queue, and tells the seconds."""

    def repeatedly(count: int) -> None:
        for _ in range(count):
            work()

    return lambda count: seconds_on(device, functools.partial(repeatedly, count))
