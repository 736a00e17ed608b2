"""What the workers were blocked in: a process of its own that looks at them now and then.

A thread would need the interpreter's lock of the program that is watched. This one loads no torch, is given no more
than a fraction of a core, and ends when its standard input does or when its parent has gone.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bsprof.measure.companion import Companion

HZ = 25.0
"""Looks a second at each process; a look costs about 20 us."""

MOST_LOOKS_PER_S = 500
"""At all processes together: 1 % of a core."""

LIST_PERIOD_S = 0.25
"""How often it is looked who has been started meanwhile."""


class Look(NamedTuple):
    """One look at the main thread of one process."""

    t_ns: int
    pid: int
    blocked_in: str
    """The kernel's function that it slept in, or nothing where it ran or waited for a core."""


class Looking:
    """Looks at everything that this process has started, from `start` to `close`. `path` is where it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._companion: Companion | None = None

    def start(self) -> None:
        """Start looking; where that is impossible nothing is seen."""
        # Silent, because the terminal is that of the program that is watched.
        self._companion = Companion(__name__, str(self._path), str(os.getpid()), stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Stop looking and reap the process."""
        if self._companion is not None:
            self._companion.close()

    def looks(self) -> list[Look]:
        """Return what was seen so far."""
        try:
            lines = self._path.read_text().splitlines()
        except OSError:
            return []
        seen = []
        for line in lines:
            t_ns, _, rest = line.partition(" ")
            pid, tab, function = rest.partition(" ")
            if tab:  # the last line may have been cut off
                seen.append(Look(int(t_ns), int(pid), function))
        return seen


def during(looks: Iterable[Look], begun_ns: Sequence[int], ended_ns: Sequence[int]) -> tuple[dict[str, int], int]:
    """Return how often each kernel function was seen, and all looks, within any of the spans, sorted and disjoint."""
    counts: dict[str, int] = {}
    total = 0
    for look in looks:
        span = bisect.bisect_right(begun_ns, look.t_ns) - 1
        if span < 0 or look.t_ns > ended_ns[span]:
            continue
        total += 1
        if look.blocked_in:
            counts[look.blocked_in] = counts.get(look.blocked_in, 0) + 1
    return counts, total


# --- the process ------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Look until standard input ends or the parent has gone."""
    path, parent = arguments[0], int(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear, and it says when to end
    pids: list[int] = []
    listed = 0.0
    with Path(path).open("w", buffering=1 << 16) as file:
        while os.getppid() == parent:
            now = time.monotonic()
            if now - listed >= LIST_PERIOD_S:
                pids = [pid for pid in descendants(parent) if pid != os.getpid()]
                listed = now
                file.flush()
            for pid in pids:
                t_ns = time.perf_counter_ns()
                with contextlib.suppress(OSError):
                    function = Path(f"/proc/{pid}/wchan").read_text()
                    file.write(f"{t_ns} {pid} {'' if function == '0' else function}\n")
            # Standard input may live on in a worker that was forked meanwhile; the parent's id is looked at too.
            if select.select([0], [], [], max(1 / HZ, len(pids) / MOST_LOOKS_PER_S))[0]:
                return


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes that `pid` started, and that those started (proc_pid_task(5): `children`)."""
    found: list[int] = []
    asked = [pid]
    while asked:
        one = asked.pop()
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                new = [int(word) for word in children.read_text().split()]
                found += new
                asked += new
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
