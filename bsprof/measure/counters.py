"""What the operating system counted over a window, and whether others used the machine during it."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bsprof import cgroup
from bsprof.loading import MachineUse
from bsprof.model import Counters
from bsprof.noun import Note

PRESSURE_SHARE = 0.05
"""Share of the window in which something that could run had to wait for a core. From 5 % on it marks about half of the
disturbed runs: a sign worth showing, not proof, and its absence proves nothing."""

FOREIGN_SHARE = 0.05
"""Cores kept busy by others, as a share of all cores. System daemons of an idle machine stay near 1 %."""

STEAL_SHARE = 0.02
"""Time a hypervisor took away while the machine had work, as a share of the time it wanted. As much as the precision
asked of a median by default: from here on the interval speaks of the neighbours too."""

THROTTLED_SHARE = 0.02
"""Share of the quota's periods in which it ran out. A period is 0.1 s as a rule, so a throttled one holds up whole
steps."""

MIN_CORE_SECONDS = 1.0
"""`/proc/stat` counts in ticks of 10 ms: with fewer than 100 of them a share is too coarse to be compared with 2 %."""


class Machine(NamedTuple):
    """One reading of what the whole machine did so far; each field is `None` where the system does not tell.

    Times are seconds since some fixed moment, so only differences of two readings mean anything.
    """

    clock_s: float
    busy_s: float | None
    """Core time spent on anything, by all cores together, without what was stolen."""
    idle_s: float | None
    stolen_s: float | None
    pressure_s: float | None
    """Wall time in which at least one process waited for a core."""
    own_s: float
    """Core time of this program: of this process, its multiprocessing children and all their children that have ended,
    or of all processes of its session."""
    throttling: cgroup.Throttling | None


class CounterWindow:
    """Counts from its making to `close()`; both ends cost well under a millisecond and nothing runs in between.

    What it reads about the machine lies outside what it reads about the process, so that one does not count the other.
    `session`: all processes of this one's session are this program, as where ranks train together.
    """

    def __init__(self, *, session: bool = False) -> None:
        self._session = session
        self._machine = read_machine(session=session)
        self._end: tuple[Machine, _Process] | None = None
        self._process = _read_process()

    def close(self) -> None:
        """End the window. Closing again moves its end."""
        process = _read_process()
        self._end = read_machine(session=self._session), process

    def counters(self) -> Counters:
        """Return what was counted for this process alone, all its threads included. Closes the window if it is open."""
        first, last = self._process, self._closed()[1]
        return Counters(**{name: getattr(last, name) - getattr(first, name) for name in _Process._fields})

    def notes(self, threads: int | None = None) -> list[Note]:
        """Return the signs that the window's numbers are not this program's alone. Closes the window if it is open.

        `threads` is how many this program computes with.
        """
        return contention_notes(self._machine, self._closed()[0], threads)

    def _closed(self) -> tuple[Machine, _Process]:
        if self._end is None:
            self.close()
        assert self._end is not None
        return self._end


class TurnCounter:
    """Counts for this process alone over windows between which it does something else."""

    def __init__(self) -> None:
        self._sums = _Process(*(0 for _ in _Process._fields))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count what the block does."""
        first = _read_process()
        yield
        last = _read_process()
        self._sums = _Process(*(sum_ + b - a for sum_, a, b in zip(self._sums, first, last, strict=True)))

    def counters(self) -> Counters:
        """Return what was counted so far."""
        return Counters(**self._sums._asdict())


def contention_notes(before: Machine, after: Machine, threads: int | None = None) -> list[Note]:
    """Return a note for each sign that others, or a limit, slowed the time between two readings.

    `cpu_contended`: others kept cores busy. `cpu_oversubscribed`: processes waited for cores, and not because of
    others: this program has more runnable threads than cores. `steal`: the hypervisor gave cores to other guests.
    `cpu_quota`: the control group's quota ran out. Each text carries the figure; what is not counted gives no note.
    """
    return [*_waiting(before, after, threads), *_steal(before, after), *_quota(before, after)]


def machine_use(before: Machine, after: Machine, cores: float) -> MachineUse:
    """Return what the whole machine did between two readings; `cores` is how many this program may use."""
    wall = after.clock_s - before.clock_s
    foreign = _foreign_cores(before, after)
    return MachineUse(
        cores=cores,
        own_cores=max(0.0, after.own_s - before.own_s) / wall if wall > 0 else None,
        foreign_cores=foreign[0] if foreign else None,
        stolen_share=_stolen_share(before, after),
        throttled_share=_throttled_share(before, after),
        pressure_share=_pressure_share(before, after),
    )


def _pressure_share(before: Machine, after: Machine) -> float | None:
    wall = after.clock_s - before.clock_s
    waited = _change(before.pressure_s, after.pressure_s)
    return waited / wall if waited is not None and wall > 0 else None


def _waiting(before: Machine, after: Machine, threads: int | None) -> list[Note]:
    pressure = _pressure_share(before, after)
    pressed = pressure is not None and pressure >= PRESSURE_SHARE
    told = f"; something runnable waited for a core {pressure:.0%} of the time" if pressure is not None else ""
    foreign = _foreign_cores(before, after)
    if foreign is not None:
        busy_elsewhere, cores = foreign
        if busy_elsewhere >= FOREIGN_SHARE * cores:
            text = (
                f"other programs kept {busy_elsewhere:.2f} of {cores:.0f} cores busy while this case was measured{told}"
            )
            free = cores - busy_elsewhere
            if threads is not None and threads > max(1.0, free):
                text += (
                    f"; {threads} threads had {free:.1f} cores, and an operation is done when the slowest of them is: "
                    f"fewer threads ({max(1, int(free))}) lose less"
                )
            return [Note(code="cpu_contended", text=text)]
        if pressed:
            text = (
                "more threads and workers than cores: something runnable waited for a core "
                f"{pressure:.0%} of the time, and hardly anything else was running"
            )
            return [Note(code="cpu_oversubscribed", text=text)]
    elif pressed:
        text = f"something runnable, of this case or of others, waited for a core {pressure:.0%} of the time"
        return [Note(code="cpu_contended", text=text)]
    return []


def _foreign_cores(before: Machine, after: Machine) -> tuple[float, float] | None:
    """Return how many cores others kept busy on average, and how many cores there are."""
    wall = after.clock_s - before.clock_s
    busy = _change(before.busy_s, after.busy_s)
    idle = _change(before.idle_s, after.idle_s)
    stolen = _change(before.stolen_s, after.stolen_s) or 0.0
    if busy is None or idle is None or wall <= 0 or busy + idle + stolen < MIN_CORE_SECONDS:
        return None
    return max(0.0, busy - (after.own_s - before.own_s)) / wall, max(1.0, (busy + idle + stolen) / wall)


def _stolen_share(before: Machine, after: Machine) -> float | None:
    stolen, busy = _change(before.stolen_s, after.stolen_s), _change(before.busy_s, after.busy_s)
    if stolen is None or busy is None or stolen + busy < MIN_CORE_SECONDS:
        return None
    return stolen / (stolen + busy)


def _steal(before: Machine, after: Machine) -> list[Note]:
    share = _stolen_share(before, after)
    if share is None or share < STEAL_SHARE:
        return []
    return [Note(code="steal", text=f"the hypervisor gave {share:.1%} of the CPU time wanted here to other guests")]


def _throttled_share(before: Machine, after: Machine) -> float | None:
    if before.throttling is None or after.throttling is None:
        return None
    periods = after.throttling.periods - before.throttling.periods
    return (after.throttling.throttled_periods - before.throttling.throttled_periods) / periods if periods > 0 else None


def _quota(before: Machine, after: Machine) -> list[Note]:
    share = _throttled_share(before, after)
    if share is None or share < THROTTLED_SHARE or before.throttling is None or after.throttling is None:
        return []
    held_s = (after.throttling.throttled_ns - before.throttling.throttled_ns) / 1e9
    text = f"the control group's CPU quota ran out in {share:.0%} of its periods ({held_s:.2f} s held back)"
    return [Note(code="cpu_quota", text=text)]


def _change(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


# --- reading ----------------------------------------------------------------------------------------


def read_machine(root: Path = cgroup.ROOT, *, session: bool = False) -> Machine:
    """Read everything that `contention_notes` compares. `root` is `/` but for tests.

    `session` counts all processes of this one's session as its own: reading every process takes some milliseconds.
    """
    user, nice, system, idle, iowait, irq, softirq, steal = _cpu_times(root) or (None,) * 8
    counted = None not in (user, nice, system, idle, iowait, irq, softirq)
    return Machine(
        clock_s=time.monotonic(),
        busy_s=_total(user, nice, system, irq, softirq) if counted else None,
        idle_s=_total(idle, iowait) if counted else None,
        stolen_s=steal,
        pressure_s=_pressure_s(root),
        own_s=_session_s() if session else _own_s(),
        throttling=cgroup.throttling(root),
    )


def _total(*seconds: float | None) -> float:
    return sum(second or 0.0 for second in seconds)


def _cpu_times(root: Path) -> tuple[float, ...] | None:
    """Return seconds as user, nice, system, idle, iowait, irq, softirq, steal (proc(5)); user includes guests' time."""
    fields = _read(root / "proc/stat").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    return tuple(int(field) / _TICKS_PER_S for field in fields[1:9])


def _pressure_s(root: Path) -> float | None:
    match = re.search(r"^some .*\btotal=(\d+)", _read(cgroup.pressure_file(root)), re.MULTILINE)
    return int(match[1]) / 1e6 if match else None


def _own_s() -> float:
    """Return the CPU time of this process and its DataLoader workers.

    Running children are read one by one: `RUSAGE_CHILDREN` holds only those that ended. A process started by other
    means than multiprocessing counts as foreign until it ends; finding it would mean reading every process there is.
    """
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    running = (_process_s(child.pid) for child in multiprocessing.active_children() if child.pid is not None)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + sum(running)


def _process_s(pid: int) -> float:
    """Return CPU seconds of a process and of its ended children, 0 where it has gone or the system does not tell."""
    return _cpu_s(_stat_fields(Path(f"/proc/{pid}")))


def _stat_fields(process: Path) -> list[str]:
    """Return the fields of a process from its state on (proc(5)), none where it has gone."""
    # The second field is the command's name in parentheses, and may hold anything, blanks and parentheses included.
    return _read(process / "stat").rpartition(")")[2].split()


def _cpu_s(fields: list[str]) -> float:
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S


def _session_s() -> float:
    """Return the CPU time of all processes of this session and of their ended children; Linux alone tells."""
    session = str(os.getsid(0))
    processes = map(_stat_fields, Path("/proc").glob("[0-9]*"))
    return sum(_cpu_s(fields) for fields in processes if fields[3:4] == [session]) or _own_s()


class _Process(NamedTuple):
    """What this process used so far, fields as in `model.Counters`."""

    wall_ns: int
    cpu_ns: int
    minor_faults: int
    major_faults: int
    voluntary_switches: int
    involuntary_switches: int


def _read_process() -> _Process:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return _Process(
        wall_ns=time.perf_counter_ns(),
        cpu_ns=time.process_time_ns(),
        minor_faults=usage.ru_minflt,
        major_faults=usage.ru_majflt,
        voluntary_switches=usage.ru_nvcsw,
        involuntary_switches=usage.ru_nivcsw,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


_TICKS_PER_S: int = os.sysconf("SC_CLK_TCK")
