"""What the training holds: the device allocator's own counters, or on a CPU what the operating system counts.

Everything here is a call on the host that reads or resets a counter. Nothing waits for the device: its allocator hands
out and takes back memory when the host asks, long before a kernel touches it, so its peaks belong to the phase in which
the host asked. A backend that does not tell gives None, never an exception.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil  # type: ignore[import-untyped]
import torch

from bsprof import cgroup
from bsprof.errors import BsprofError
from bsprof.measure.loop import Stage
from bsprof.model import Memory

_SELF = Path("/proc/self")


class Watch(Protocol):
    """Watches one pool of memory: reset before the timed window, read after it, by phase once more behind it."""

    def begin(self) -> None:
        """Forget earlier peaks; just before the timed window."""

    def end(self) -> None:
        """Read the peaks; just after the timed window, while its loader and its model still live."""

    def measure_phases(self, stages: Sequence[Stage], steps: int) -> None:
        """Run `steps` steps with the peaks read and reset at each phase's end. What the stages raise goes through."""

    def memory(self) -> Memory | None:
        """Return what was seen, or None where nothing was told."""


def watch(device: torch.device) -> Watch:
    """Return the watch of the memory that a training on `device` fills."""
    return _HostWatch() if device.type == "cpu" else _DeviceWatch(device)


def withhold(device: torch.device, margin: float) -> int:
    """Keep the share `margin` of the memory from this process, before it takes any, and return what it may have.

    On CUDA and XPU that is a share of what is *free* now, the context of this process already paid for. On a CPU the
    limit on private memory (RLIMIT_DATA) is lowered by that share. `Memory.total` tells afterwards what was in force.
    Raises BsprofError where there is no limit to lower or the backend knows none, and lets through what a driver
    raises: a search whose margin was silently not kept would find a batch too large.
    """
    if device.type == "cpu":
        limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if limit == resource.RLIM_INFINITY:
            raise BsprofError("--max-batch: this process has no limit to keep a margin of", hint="give --host-memory")
        allowed = max(1, int(limit * (1 - margin)))  # Linux takes a limit of 0 for none
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
        return allowed
    backend: Any = torch.get_device_module(device)
    if not (hasattr(backend, "mem_get_info") and hasattr(backend, "set_per_process_memory_fraction")):
        raise BsprofError(
            f"--max-batch: torch cannot keep a process from a part of {device.type}'s memory",
            hint="try batches one by one: --batch-size 32,64,128",
        )
    index = _index(device, backend)
    free, total = backend.mem_get_info(index)
    allowed = int(free * (1 - margin))
    backend.set_per_process_memory_fraction(allowed / total, index)
    return allowed


def _index(device: torch.device, backend: Any) -> int:
    """Return the number of `device`: not all functions take a device that leaves it open."""
    return int(backend.current_device()) if device.index is None else device.index


# --- the device's allocator -----------------------------------------------------------------------------


class _DeviceWatch:
    """The caching allocator's counters, that CUDA, ROCm and XPU keep under the same names."""

    def __init__(self, device: torch.device) -> None:
        self._backend: Any = torch.get_device_module(device)
        self._device = device
        self._retries_before = 0
        self._memory: Memory | None = None
        self._phase_allocated: dict[str, int] = {}
        self._phase_reserved: dict[str, int] = {}

    def begin(self) -> None:
        self._retries_before = self._counters().get("num_alloc_retries", 0)
        self._reset()

    def end(self) -> None:
        counters = self._counters()
        allocated = counters.get("allocated_bytes.all.peak")
        if allocated is None:
            return
        reserved_now = counters.get("reserved_bytes.all.current")
        retries = counters.get("num_alloc_retries")
        free, total = self._free_and_total()
        outside = None
        if free is not None and total is not None and reserved_now is not None:
            # A driver that counts otherwise than the allocator must not make it negative.
            outside = max(0, total - free - reserved_now)
        self._memory = Memory(
            pool="device",
            allocated_peak=allocated,
            reserved_peak=counters.get("reserved_bytes.all.peak"),
            allocated_between=counters.get("allocated_bytes.all.current"),
            inactive_split=counters.get("inactive_split_bytes.all.current"),
            retries=None if retries is None else retries - self._retries_before,
            total=self._allowed(total),
            outside=outside,
        )

    def measure_phases(self, stages: Sequence[Stage], steps: int) -> None:
        if self._memory is None:
            return
        for _ in range(steps):
            for phase, run in stages:
                self._reset()
                run()
                counters = self._counters()
                _keep_highest(self._phase_allocated, phase, counters.get("allocated_bytes.all.peak"))
                _keep_highest(self._phase_reserved, phase, counters.get("reserved_bytes.all.peak"))

    def memory(self) -> Memory | None:
        if self._memory is None:
            return None
        return msgspec.structs.replace(
            self._memory, phase_allocated_peak=self._phase_allocated, phase_reserved_peak=self._phase_reserved
        )

    def _counters(self) -> Mapping[str, int]:
        try:
            counters: Mapping[str, int] = self._backend.memory_stats(_index(self._device, self._backend))
        except Exception:  # a backend without counters, or a device that an error has broken
            return {}
        return counters

    def _reset(self) -> None:
        try:
            self._backend.reset_peak_memory_stats(_index(self._device, self._backend))
        except Exception:  # as above; what then cannot be read is null
            return

    def _free_and_total(self) -> tuple[int | None, int | None]:
        try:
            free, total = self._backend.mem_get_info(_index(self._device, self._backend))
        except Exception:  # as above
            return None, None
        return int(free), int(total)

    def _allowed(self, total: int | None) -> int | None:
        """Return `total`, or the share of it that this process may have where it was told to have less."""
        try:
            index = _index(self._device, self._backend)
            fraction = float(self._backend.get_per_process_memory_fraction(index))
        except Exception:  # not every backend can be asked
            return total
        return round(total * fraction) if total is not None and 0 < fraction < 1 else total


def _keep_highest(peaks: dict[str, int], phase: str, peak: int | None) -> None:
    if peak is not None:
        peaks[phase] = max(peak, peaks.get(phase, 0))


# --- the host's memory ----------------------------------------------------------------------------------


class _HostWatch:
    """What the kernel counts for this process alone, without its workers.

    `allocated_peak` is the highest resident set while the window was open, `reserved_peak` the highest private memory
    that the process has ever had mapped, touched or not: that is what RLIMIT_DATA (`--host-memory`) counts.
    Phases are not told apart: memory that a phase frees stays resident, so all phases would have one figure.
    """

    def __init__(self) -> None:
        self._was_reset = False
        self._before: int | None = None
        self._memory: Memory | None = None

    def begin(self) -> None:
        try:
            (_SELF / "clear_refs").write_text("5")  # proc(5): resets the peak resident set to the current one
            self._was_reset = True
        except OSError:
            self._was_reset = False
        self._before = _resident_peak()

    def end(self) -> None:
        peak = _resident_peak()
        # Where the peak of the whole life cannot be reset, it is the window's only if it rose there.
        rose = peak is not None and self._before is not None and peak > self._before
        if peak is None or not (self._was_reset or rose):
            return
        self._memory = Memory(
            pool="host", allocated_peak=peak, reserved_peak=_private_peak(), total=_host_memory_allowed()
        )

    def measure_phases(self, stages: Sequence[Stage], steps: int) -> None:
        pass

    def memory(self) -> Memory | None:
        return self._memory


def _status() -> dict[str, int]:
    """Return the sizes in /proc/self/status, in bytes; none where there is no such file."""
    try:
        lines = (_SELF / "status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.replace(":", " ").split() for line in lines)
    return {field[0]: int(field[1]) * 1024 for field in fields if len(field) == 3 and field[2] == "kB"}


def _resident_peak() -> int | None:
    peak = _status().get("VmHWM")
    if peak is not None:
        return peak
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024) or None  # getrusage(2): bytes there, KiB elsewhere


def _private_peak() -> int | None:
    """Return the highest private writable memory so far: the peak of all mappings less those of other kinds.

    The kernel keeps a peak of all mappings only. Files and code, the other kinds, hardly change once a training runs;
    but what was reserved for a moment without access, as glibc does for each arena, is in that peak. Where private
    memory is limited the kernel never let it get that far, so then it is no more than the limit.
    """
    status = _status()
    if not {"VmPeak", "VmSize", "VmData"} <= status.keys():
        return None
    peak = status["VmPeak"] - (status["VmSize"] - status["VmData"])
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return peak if limit == resource.RLIM_INFINITY else min(peak, max(limit, status["VmData"]))


def _host_memory_allowed() -> int:
    """Return what this process may have: the least of its own limit, its control group's and the machine's memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [int(psutil.virtual_memory().total), cgroup.memory_limit()]
    if limit != resource.RLIM_INFINITY:
        limits.append(limit)
    return min(size for size in limits if size is not None)
