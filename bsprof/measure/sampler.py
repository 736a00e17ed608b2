"""The process that samples device and host beside a case, and the format of what it writes.

It is a fresh interpreter and no fork of the case's process. A fork would hold CUDA's file descriptors open, inherit
NVML in a state that does not work in a child, and make every page that the training writes be copied once. It loads no
torch, so that it is soon there; it ends when it is told to or when its parent has gone.

A recording is JSON lines: a Header, then Samples, now and then Processes, at most one Lost, and at the end an End. All
times are `time.perf_counter_ns`, one clock for all processes of a machine.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from bsprof.measure.nvml import DeviceLostError, Gpu, NullSource, Number, Source, open_source

FORMAT = 1

SLOW_PERIOD_S = 1.0
"""What changes slowly (temperature, link, memory, CPU clocks) is read this often: reading all at 10 Hz costs more
than 1 % of a core on machines with many cores."""

PROCESSES_PERIOD_S = 5.0
"""Who computes on the device is asked at the start, at the end and this often between."""

LONGEST_WAIT_S = 1.0
"""The sampler looks this often at least whether its parent still lives."""

MOST_CORES = 16
"""CPU clocks are read of so many cores at most, spread over the usable ones: each one is a file."""


# --- the recording ----------------------------------------------------------------------------------


class Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="line", tag=str.lower, omit_defaults=True):
    """A line of a recording; `line` says which."""

    t: int
    """Nanoseconds of `time.perf_counter_ns`, read before anything else."""


class Header(Line, frozen=True, kw_only=True):
    """What is sampled, and what never changes."""

    format: int
    source: str
    hz: float
    device_uuid: str | None = None
    mig: bool | None = None
    limits: dict[str, Number] = {}
    unsupported: tuple[str, ...] = ()
    problem: str | None = None
    """Why no device is read, where there should be one."""


class Sample(Line, frozen=True, kw_only=True):
    """One reading. A column that is not here was not told, or not asked, then."""

    cpu_ns: int
    """Core time of the sampling process since it began."""
    device: dict[str, Number] = {}
    host: dict[str, Number] = {}


class Process(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process that computes on the device."""

    pid: int
    name: str | None = None
    memory_bytes: int | None = None
    own: bool = False
    """The case's process, or one that it started."""


class Processes(Line, frozen=True, kw_only=True):
    """Who computes on the device."""

    processes: tuple[Process, ...]


class Lost(Line, frozen=True, kw_only=True):
    """The device cannot be read any more."""

    reason: str


class End(Line, frozen=True, kw_only=True):
    """The last line. Without it the sampler was killed."""

    cpu_ns: int
    reason: str
    """`closed`, `orphaned`, or what went wrong."""


class Request(msgspec.Struct):
    """What the sampler is to do; its only argument, as JSON."""

    path: str
    hz: float
    parent: int
    gpu: Gpu | None


# --- the host ---------------------------------------------------------------------------------------


class Host:
    """Cores, clocks and memory of the machine, from Linux's `/proc` and `/sys`; elsewhere the little that psutil tells.

    `root` is `/` but for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.limits: dict[str, Number] = {}
        self.unsupported: list[str] = []
        self._before: dict[str, tuple[int, float]] = {}
        self._files: list[int] = []
        self._fast: list[Callable[[int], dict[str, Number]]] = []
        self._slow: list[Callable[[int], dict[str, Number]]] = []
        self._stat = self._open(root / "proc/stat")
        self._memory = self._open(root / "proc/meminfo")
        self._swaps = self._open(root / "proc/vmstat")
        self._clocks = self._clock_files(root)
        if self._stat is not None:
            self._fast.append(self._read_stat)
        if self._memory is not None:
            self._slow.append(self._read_memory)
            if total := _number_after(_reread(self._memory), b"MemTotal:"):
                self.limits["host_memory_bytes"] = total * 1024
        if self._swaps is not None:
            self._slow.append(self._read_swaps)
        if self._clocks:
            self._slow.append(self._read_clocks)
        if self._stat is None and self._memory is None:
            self._fast.append(self._ask_psutil)
        told = set(self.read(time.perf_counter_ns()))
        if self._fast:
            told.add("busy_cores")  # from the second reading on
        columns = ("busy_cores", "runnable", "memory_available_bytes", "swap_in_bytes", "swap_out_bytes", "cpu_mhz")
        self.unsupported = [column for column in columns if column not in told]

    def read(self, now_ns: int, *, slow: bool = True) -> dict[str, Number]:
        """Return what the machine tells; `busy_cores` is the mean since the reading before."""
        told: dict[str, Number] = {}
        for read in (*self._fast, *self._slow) if slow else self._fast:
            with contextlib.suppress(OSError, ValueError):
                told |= read(now_ns)
        return told

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)
        self._files.clear()

    def _read_stat(self, now_ns: int) -> dict[str, Number]:
        """Busy is user, nice, system, irq and softirq (proc(5)); user includes what guests used."""
        assert self._stat is not None
        text = _reread(self._stat)
        ticks = [int(field) for field in text[: text.index(b"\n")].split()[1:8]]
        told: dict[str, Number] = {}
        busy = self._change("busy", now_ns, sum(ticks) - ticks[3] - ticks[4])
        if busy is not None:
            told["busy_cores"] = round(busy / _TICKS_PER_S, 3)
        if (runnable := _number_after(text, b"procs_running")) is not None:
            told["runnable"] = max(0, runnable - 1)  # this process runs while it asks
        return told

    def _read_memory(self, now_ns: int) -> dict[str, Number]:
        assert self._memory is not None
        available = _number_after(_reread(self._memory), b"MemAvailable:")
        return {} if available is None else {"memory_available_bytes": available * 1024}

    def _read_swaps(self, now_ns: int) -> dict[str, Number]:
        """Bytes moved between memory and swap since the machine started; only differences mean anything."""
        assert self._swaps is not None
        text = _reread(self._swaps)
        pages = {"swap_in_bytes": b"\npswpin ", "swap_out_bytes": b"\npswpout "}
        return {
            column: count * _PAGE_BYTES
            for column, name in pages.items()
            if (count := _number_after(text, name)) is not None
        }

    def _read_clocks(self, now_ns: int) -> dict[str, Number]:
        clocks = [int(text) for file in self._clocks if (text := _reread(file).strip()).isdigit()]
        return {"cpu_mhz": round(sum(clocks) / len(clocks) / 1e3, 1)} if clocks else {}

    def _clock_files(self, root: Path) -> list[int]:
        """Open the clocks of some usable cores.

        The kernel has them where it governs the clocks. `/proc/cpuinfo` of a guest shows a constant: that is no
        measurement, so it is not read.
        """
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        chosen = usable[:: -(-len(usable) // MOST_CORES)] if usable else []
        paths = [root / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq" for core in chosen]
        return [file for path in paths if (file := self._open(path)) is not None]

    def _ask_psutil(self, now_ns: int) -> dict[str, Number]:
        import psutil  # type: ignore[import-untyped]

        times = psutil.cpu_times()
        busy = self._change("busy", now_ns, times.user + times.system)
        told: dict[str, Number] = {"memory_available_bytes": psutil.virtual_memory().available}
        self.limits.setdefault("host_memory_bytes", psutil.virtual_memory().total)
        return told if busy is None else told | {"busy_cores": round(busy, 3)}

    def _change(self, name: str, now_ns: int, value: float) -> float | None:
        """Return the change a second since the last call with this `name`."""
        before = self._before.get(name)
        self._before[name] = (now_ns, value)
        if before is None or now_ns <= before[0]:
            return None
        return (value - before[1]) / (now_ns - before[0]) * 1e9

    def _open(self, path: Path) -> int | None:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        self._files.append(file)
        return file


_TICKS_PER_S: int = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: int = os.sysconf("SC_PAGE_SIZE")


def _reread(file: int) -> bytes:
    """Return the whole of a small system file that stays open."""
    return os.pread(file, 1 << 18, 0)


def _number_after(text: bytes, name: bytes) -> int | None:
    start = text.find(name)
    if start < 0:
        return None
    word = text[start + len(name) : start + len(name) + 32].split()[0]
    return int(word) if word.isdigit() else None


# --- sampling ---------------------------------------------------------------------------------------


def next_tick(start_ns: int, period_ns: int, now_ns: int) -> int:
    """Return the first moment after `now_ns` that is a whole number of periods from `start_ns`.

    So the schedule does not drift, and what a stall made it miss is left out instead of made up for in a burst.
    """
    return start_ns + ((now_ns - start_ns) // period_ns + 1) * period_ns


class Sampling:
    """Reads a source and the host, and hands lines to `write`. The clock is the caller's."""

    def __init__(self, source: Source, host: Host, write: Callable[[Line], None], *, hz: float, parent: int) -> None:
        self._source, self._host, self._write, self._parent = source, host, write, parent
        self._slow_ns = self._processes_ns = -1
        self._hz = hz

    def begin(self, now_ns: int) -> None:
        """Write the header."""
        self._write(
            Header(
                t=now_ns,
                format=FORMAT,
                source=self._source.name,
                hz=self._hz,
                device_uuid=self._source.uuid,
                mig=self._source.mig,
                limits=self._source.limits | self._host.limits,
                unsupported=(*self._source.unsupported, *self._host.unsupported),
                problem=self._source.problem,
            )
        )

    def sample(self, now_ns: int, cpu_ns: int) -> None:
        """Read everything that is due at `now_ns` and write it."""
        slow = now_ns >= self._slow_ns
        if slow:
            self._slow_ns = now_ns + round(SLOW_PERIOD_S * 1e9)
        lost = None
        device: dict[str, Number] = {}
        try:
            device = self._source.read(slow=slow)
        except DeviceLostError as error:
            lost = str(error)
        self._write(Sample(t=now_ns, cpu_ns=cpu_ns, device=device, host=self._host.read(now_ns, slow=slow)))
        if lost is not None:
            self._write(Lost(t=now_ns, reason=lost))
            self._source.close()
            self._source = NullSource()
        elif now_ns >= self._processes_ns:
            self._processes_ns = now_ns + round(PROCESSES_PERIOD_S * 1e9)
            self.list_processes(now_ns)

    def list_processes(self, now_ns: int) -> None:
        """Write who computes on the device, where it tells."""
        found = self._source.processes()
        if found is not None:
            processes = (
                Process(
                    pid=one.pid, name=_name(one.pid), memory_bytes=one.memory_bytes, own=descends(one.pid, self._parent)
                )
                for one in found
            )
            self._write(Processes(t=now_ns, processes=tuple(processes)))

    def end(self, now_ns: int, cpu_ns: int, reason: str) -> None:
        """Write the last line and let go of source and host."""
        self._write(End(t=now_ns, cpu_ns=cpu_ns, reason=reason))
        self._source.close()
        self._host.close()


def _name(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return None


def descends(pid: int, ancestor: int) -> bool:
    """Return whether the process `pid` is `ancestor` or was started by it, directly or not."""
    for _ in range(64):  # deeper than any chain of processes, and an end where ids are reused meanwhile
        if pid == ancestor:
            return True
        try:
            # The second field is the command's name in parentheses, and may hold anything.
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            return False
        if pid <= 1:
            return False
    return False


# --- the process ------------------------------------------------------------------------------------


def main(arguments: Iterable[str]) -> None:
    """Sample as the Request in the first argument says, until standard input speaks or ends, or the parent has gone."""
    (text,) = arguments
    request = msgspec.json.decode(text, type=Request)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear, and it says when to end
    file = os.open(request.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    encoder = msgspec.json.Encoder()

    def write(line: Line) -> None:
        os.write(file, encoder.encode(line) + b"\n")

    sampling = Sampling(open_source(request.gpu, os.environ), Host(), write, hz=request.hz, parent=request.parent)
    sampling.begin(time.perf_counter_ns())
    gc.freeze()  # what was imported is never looked through again
    reason = "closed"
    try:
        reason = _sample_until_told(sampling, request)
        sampling.list_processes(time.perf_counter_ns())
    except Exception as error:  # it must not be silent, and nobody reads a traceback here
        reason = f"{type(error).__name__}: {error}"
    sampling.end(time.perf_counter_ns(), time.process_time_ns(), reason)


def _sample_until_told(sampling: Sampling, request: Request) -> str:
    """Return why it ended.

    The parent's end of the pipe may live on in its DataLoader workers, so that it has an end is no sign that it
    lives: its id is looked at too.
    """
    period_ns = max(1, round(1e9 / request.hz))
    start_ns = due_ns = time.perf_counter_ns()
    while True:
        now_ns = time.perf_counter_ns()
        if now_ns >= due_ns:
            sampling.sample(now_ns, time.process_time_ns())
            now_ns = time.perf_counter_ns()
            due_ns = next_tick(start_ns, period_ns, now_ns)
        ready, _, _ = select.select([0], [], [], min((due_ns - now_ns) / 1e9, LONGEST_WAIT_S))
        if ready:
            return "closed" if os.read(0, 1) else "orphaned"
        if os.getppid() != request.parent:
            return "orphaned"


if __name__ == "__main__":
    main(sys.argv[1:])
