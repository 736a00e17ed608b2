"""Processes that do the same work at the same time, and how many cores that gets them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from bsprof import stats
from bsprof.loading import Rate
from bsprof.measure.clock import host_clock

SPIN = 10_000
"""Rounds of arithmetic that `spin` does for each piece of work: about half a millisecond."""

PIECE_S = 0.03
REPEATS = 7


class Spent(NamedTuple):
    """What a piece of work took in one process."""

    wall_s: float
    cpu_s: float


class Crew:
    """Processes that do the same work at the same time. A context manager: none of them outlives it."""

    def __init__(self, size: int, work: Callable[[int], None]) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.Process] = []
        try:
            for _ in range(size):
                ours, theirs = multiprocessing.Pipe()
                self._pipes.append(ours)
                process = multiprocessing.Process(target=_serve, args=(theirs, work), daemon=True)
                process.start()
                self._processes.append(process)
                theirs.close()  # so that a process that dies leaves nobody who could still answer
            self.spend(size, 1)  # all are there, and have done it once
        except BaseException:
            self.close()
            raise

    def spend(self, processes: int, count: int) -> list[Spent]:
        """Let each of the first `processes` do the work `count` times, all at once; returns what each took."""
        busy = self._pipes[:processes]
        try:
            for pipe in busy:
                pipe.send(count)
            return [Spent(*pipe.recv()) for pipe in busy]
        except (EOFError, ConnectionError):
            raise RuntimeError("a process that was to take part died") from None

    def seconds(self, processes: int, count: int) -> list[float]:
        """Like `spend`, wall time alone."""
        return [spent.wall_s for spent in self.spend(processes, count)]

    def close(self) -> None:
        """End and reap all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, work: Callable[[int], None]) -> None:
    while True:
        try:
            count = pipe.recv()
        except EOFError:
            return
        start, cpu = host_clock(), time.process_time_ns()
        work(count)
        pipe.send(((host_clock() - start) / 1e9, (time.process_time_ns() - cpu) / 1e9))


def spin(count: int) -> None:
    """Keep a core busy with arithmetic that needs no memory."""
    value = 1
    for _ in range(count * SPIN):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF


def cores_to_be_had(cores: int) -> Rate:
    """Return how many cores' worth of work gets done when as many processes as `cores` compute at once, now.

    The unit is one process alone that never waits: its work a second of *CPU* time. So what others leave of the cores
    counts, as well as what shared execution units and falling clocks take. Median and 95 % interval over a few
    repeats, about half a second in all. Raises RuntimeError when a process dies.
    """
    with Crew(cores, spin) as crew:
        (alone,) = crew.spend(1, 4)
        count = max(1, round(4 * PIECE_S / max(alone.cpu_s, 1e-6)))
        seen = []
        for _ in range(REPEATS):
            (alone,) = crew.spend(1, count)
            seen.append(sum(alone.cpu_s / spent.wall_s for spent in crew.spend(cores, count)))
    found = stats.between(seen)
    return Rate(value=found.value, low=found.low, high=found.high)
