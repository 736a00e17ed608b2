"""Telemetry of a case: started beside it, read back, and judged against the window in which its steps were timed."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from bsprof.errors import BsprofError
from bsprof.measure.companion import Companion
from bsprof.measure.nvml import Gpu, Number
from bsprof.measure.sampler import FORMAT, End, Header, Lost, Process, Processes, Request, Sample
from bsprof.model import Energy, ForeignProcess, Telemetry
from bsprof.noun import Note

KEEP_S = 1.0
"""Samples so long before and after the window are kept: what came before explains its beginning."""

COVERED = 0.8
"""Share of the samples due in the window that must be there. A busy machine makes the sampler miss a tick now and
then; a fifth is more than that."""

BUSY_PERCENT = 10
"""GPU utilisation from which a sample counts as busy. Below, clocks and link go down because there is nothing to do."""

THROTTLED_SHARE = 0.02
"""Share of the samples in which clocks were held down: as much as the precision asked of a median by default."""

GPU_CLOCK_SPREAD = 0.05
"""Spread of the SM clock, p95 over p5 less one. A step bound by computing is so much longer or shorter by it."""

CPU_CLOCK_SPREAD = 0.10
"""The same of the CPU clock. It is a mean over cores, idle ones among them, and wanders more than a GPU's."""

CLOCK_SAMPLES = 5
"""Fewer readings of a clock have no percentiles."""

PCIE_SHARE = 0.5
"""Share of the busy samples on a slower link: it needs a moment to wake, and one slow reading is no fault."""

HOST_MEMORY_SHARE = 0.05
"""Share of the machine's memory still available. Below, the kernel drops the cached files that the loader reads."""

SWAPPED_BYTES = 16 * 2**20
"""Moved between memory and swap in the window. Less is the kernel's housekeeping."""

ENERGY_UPDATES = 10
"""Changes of the energy counter needed. When each happened is known to a sample's distance, so that both ends of ten of
them leave the time between in doubt by about a tenth of it."""

POWER_READINGS = 20
"""Power readings needed where there is no counter. Each is a mean of some past time, up to 1 s, so they know less."""

# Bits of nvmlClocksEventReasons. The plain hardware slow-down (8) is not among them: it is also told of a mere change
# of clocks, and comes with one of these where it is more.
_IDLE = 0x1
_POWER_CAP, _POWER_BRAKE = 0x4, 0x80
_SOFTWARE_THERMAL, _HARDWARE_THERMAL = 0x20, 0x40


# --- starting it ------------------------------------------------------------------------------------


def record(device: torch.device, hz: float, path: Path) -> Companion:
    """Start to sample `device` and the host `hz` times a second into the file `path`, and return at once.

    CUDA need not have started, and is not started by this; where it has, the device is known by its UUID. Nothing that
    the sampler meets is raised here: what is missing in the recording is said by `summarise`. Raises BsprofError for a
    rate that is none.
    """
    if not hz > 0:
        raise BsprofError(f"--telemetry-hz {hz}: expected more than 0", hint="0 in a plan means: start no sampler")
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)  # an older recording must not be taken for this one
    request = Request(path=str(path.absolute()), hz=hz, parent=os.getpid(), gpu=cuda_gpu(device))
    return Companion("bsprof.measure.sampler", msgspec.json.encode(request).decode())


def cuda_gpu(device: torch.device) -> Gpu | None:
    """Return how NVML can find `device`, or `None` where it is no NVIDIA GPU. Starts no CUDA."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return Gpu(device.index or 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return Gpu(index, None if uuid is None else str(uuid))


# --- reading it -------------------------------------------------------------------------------------


class Recording(NamedTuple):
    """What a sampler wrote. Without a header it wrote nothing; without an end it was killed, or still runs."""

    header: Header | None
    samples: tuple[Sample, ...] = ()
    processes: tuple[Processes, ...] = ()
    lost: Lost | None = None
    end: End | None = None


def read(path: Path) -> Recording:
    """Return the recording at `path`. One that was never begun is empty, and a last line that is torn is left out.

    Raises BsprofError for a file that is no recording, is damaged before its last line, or is of a newer format.
    """
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise BsprofError(f"{path}: {error.strerror}") from error
    decoder = msgspec.json.Decoder(Header | Sample | Processes | Lost | End)
    found: list[Header | Sample | Processes | Lost | End] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BsprofError(f"{path}: line {number}: {error}") from error
    if not found:
        return Recording(None)
    header = found[0]
    if not isinstance(header, Header):
        raise BsprofError(f"{path}: no telemetry recording: it does not begin with a header")
    if header.format > FORMAT:
        raise BsprofError(
            f"{path}: written in format {header.format}, this bsprof reads up to {FORMAT}",
            hint="upgrade: pip install --upgrade bsprof",
        )
    return Recording(
        header=header,
        samples=tuple(line for line in found if isinstance(line, Sample)),
        processes=tuple(line for line in found if isinstance(line, Processes)),
        lost=next((line for line in found if isinstance(line, Lost)), None),
        end=next((line for line in found if isinstance(line, End)), None),
    )


# --- judging it -------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """A recording and the time in it that counts, with the samples of that time."""

    recording: Recording
    begin_ns: int
    end_ns: int
    samples: tuple[Sample, ...]

    @property
    def limits(self) -> dict[str, Number]:
        return self.recording.header.limits if self.recording.header else {}

    @property
    def busy(self) -> list[Sample]:
        return [sample for sample in self.samples if _is_busy(sample)]

    def seconds(self, time_ns: int) -> float:
        """Return `time_ns` as seconds since the window began."""
        return (time_ns - self.begin_ns) / 1e9


def summarise(
    recording: Recording, *, begin_ns: int, end_ns: int, steps: int, own_pids: Collection[int] = ()
) -> tuple[Telemetry, list[Note]]:
    """Return the telemetry of the window in which `steps` steps were timed, and what makes its numbers doubtful.

    `begin_ns` and `end_ns` are readings of `time.perf_counter_ns`. Processes on the device are foreign unless they are
    the case's, were started by it, or are in `own_pids`.
    """
    inside = tuple(sample for sample in recording.samples if begin_ns <= sample.t <= end_ns)
    window = _Window(recording, begin_ns, end_ns, inside)
    keep_ns = round(KEEP_S * 1e9)
    kept = [sample for sample in recording.samples if begin_ns - keep_ns <= sample.t <= end_ns + keep_ns]
    foreign, foreign_notes = _foreign(window, own_pids)
    header = recording.header
    telemetry = Telemetry(
        source=header.source if header else "none",
        device_uuid=header.device_uuid if header else None,
        time_ns=[sample.t - begin_ns for sample in kept],
        window_ns=end_ns - begin_ns,
        device=_columns([sample.device for sample in kept]),
        host=_columns([sample.host for sample in kept]),
        limits=dict(window.limits),
        unsupported=header.unsupported if header else (),
        foreign=foreign,
        energy=_energy(window, steps),
        sampler_cpu_ns=kept[-1].cpu_ns - kept[0].cpu_ns if len(kept) > 1 else None,
    )
    judges: tuple[Callable[[_Window], Iterator[Note]], ...] = (
        _incomplete,
        _lost,
        _throttled,
        _gpu_clocks,
        _pcie,
        _shared_power,
        _cpu_clocks,
        _host_memory,
    )
    return telemetry, [*(note for judge in judges for note in judge(window)), *foreign_notes]


def _columns(readings: Sequence[dict[str, Number]]) -> dict[str, list[Number | None]]:
    names = dict.fromkeys(name for reading in readings for name in reading)
    return {name: [reading.get(name) for reading in readings] for name in names}


def _device(samples: Sequence[Sample], column: str) -> list[Number]:
    return [sample.device[column] for sample in samples if column in sample.device]


def _host(samples: Sequence[Sample], column: str) -> list[Number]:
    return [sample.host[column] for sample in samples if column in sample.host]


def _is_busy(sample: Sample) -> bool:
    """Tell by utilisation; a GPU cut into slices has none, and then by not being idle."""
    if (percent := sample.device.get("gpu_percent")) is not None:
        return percent >= BUSY_PERCENT
    return bool(sample.device) and not _reasons(sample) & _IDLE


def _reasons(sample: Sample) -> int:
    return int(sample.device.get("throttle_reasons", 0))


def _spread(values: Sequence[Number]) -> tuple[float, float] | None:
    """Return the 5th and the 95th percentile, or `None` of too few."""
    if len(values) < CLOCK_SAMPLES:
        return None
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


# --- notes ------------------------------------------------------------------------------------------


def _incomplete(window: _Window) -> Iterator[Note]:
    header, samples, _, _, end = window.recording
    if header is None:
        yield Note(code="telemetry_incomplete", text="no telemetry: the sampling process wrote nothing")
        return
    faults = []
    if header.problem is not None:
        faults.append(f"nothing tells of the GPU ({header.problem})")
    due = (window.end_ns - window.begin_ns) / 1e9 * header.hz
    if due >= 1 and len(window.samples) < COVERED * due - 1:  # the first tick may come a period after the beginning
        faults.append(f"{len(window.samples)} samples where {due:.0f} were due")
    elif due < 1 and not window.samples:
        faults.append("the window is shorter than the time between two samples")
    last_ns = samples[-1].t if samples else header.t
    if last_ns < window.end_ns - 2e9 / header.hz and (end is None or end.reason != "closed"):
        why = "was killed" if end is None else f"ended ({end.reason})"
        faults.append(f"the sampling process {why} {window.seconds(last_ns):.1f} s into the window")
    if faults:
        yield Note(code="telemetry_incomplete", text="; ".join(faults))


def _lost(window: _Window) -> Iterator[Note]:
    lost = window.recording.lost
    if lost is not None and lost.t <= window.end_ns:
        when = window.seconds(lost.t)
        said = f"{when:.1f} s into the window" if when >= 0 else "before the window"
        yield Note(code="gpu_lost", text=f"the GPU stopped answering {said}: {lost.reason}")


def _throttled(window: _Window) -> Iterator[Note]:
    told = [sample for sample in window.samples if "throttle_reasons" in sample.device]

    def share(bits: int) -> float:
        return sum(bool(_reasons(sample) & bits) for sample in told) / max(1, len(told))

    hot = share(_SOFTWARE_THERMAL | _HARDWARE_THERMAL)
    if told and hot >= THROTTLED_SHARE:
        text = f"clocks were held down by heat in {hot:.0%} of the samples"
        if temperatures := _device(window.samples, "temperature_c"):
            text += f"; up to {max(temperatures):.0f} °C"
        if (limit := window.limits.get("slowdown_c")) is not None:
            text += f", the hardware slows down at {limit:.0f} °C"
        yield Note(code="gpu_throttled_thermal", text=text)
    capped = share(_POWER_CAP | _POWER_BRAKE)
    if told and capped >= THROTTLED_SHARE:
        text = f"clocks were held down by the power limit in {capped:.0%} of the samples"
        if (limit := window.limits.get("power_limit_w")) is not None:
            text += f"; it is {limit:.0f} W"
        if braked := share(_POWER_BRAKE):
            text += f"; the supply's power brake in {braked:.0%}"
        yield Note(code="gpu_throttled_power", text=text)


def _gpu_clocks(window: _Window) -> Iterator[Note]:
    spread = _spread(_device(window.busy, "sm_mhz"))
    if spread is not None and spread[0] > 0 and spread[1] / spread[0] - 1 > GPU_CLOCK_SPREAD:
        low, high = spread
        text = f"while busy the SM clock moved between {low:.0f} and {high:.0f} MHz ({high / low - 1:.0%}; p5 to p95)"
        if (most := window.limits.get("sm_mhz_max")) is not None:
            text += f"; {most:.0f} MHz is the most"
        yield Note(code="gpu_clocks_moved", text=text)


def _pcie(window: _Window) -> Iterator[Note]:
    generation, width = window.limits.get("pcie_generation_max"), window.limits.get("pcie_width_max")
    links = [
        (sample.device["pcie_generation"], sample.device["pcie_width"])
        for sample in window.busy
        if "pcie_generation" in sample.device and "pcie_width" in sample.device
    ]
    if generation is None or width is None or not links:
        return
    slower = [link for link in links if link[0] < generation or link[1] < width]
    if len(slower) >= PCIE_SHARE * len(links):
        now_generation, now_width = min(slower)
        text = (
            f"the PCIe link ran at gen{now_generation} x{now_width} in {len(slower) / len(links):.0%} of the busy "
            f"samples; card and slot can do gen{generation} x{width}"
        )
        yield Note(code="gpu_pcie_degraded", text=text)


def _shared_power(window: _Window) -> Iterator[Note]:
    header = window.recording.header
    if header is not None and header.mig and header.source != "none":
        text = "power, clocks, temperature and energy are the whole GPU's, of which this is a slice: others' work is in"
        yield Note(code="mig_shared_power", text=text)


def _cpu_clocks(window: _Window) -> Iterator[Note]:
    spread = _spread(_host(window.samples, "cpu_mhz"))
    if spread is not None and spread[0] > 0 and spread[1] / spread[0] - 1 > CPU_CLOCK_SPREAD:
        low, high = spread
        text = f"the CPU clock moved between {low:.0f} and {high:.0f} MHz ({high / low - 1:.0%}; p5 to p95)"
        yield Note(code="cpu_clocks_moved", text=text)


def _host_memory(window: _Window) -> Iterator[Note]:
    faults = []
    available, total = _host(window.samples, "memory_available_bytes"), window.limits.get("host_memory_bytes")
    if available and total and min(available) < HOST_MEMORY_SHARE * total:
        faults.append(f"only {_gib(min(available))} of the machine's {_gib(total)} of memory were available")
    swapped = sum(
        moved[-1] - moved[0]
        for column in ("swap_in_bytes", "swap_out_bytes")
        if len(moved := _host(window.samples, column)) > 1
    )
    if swapped >= SWAPPED_BYTES:
        faults.append(f"{swapped / 2**20:.0f} MiB went between memory and swap")
    if faults:
        yield Note(code="host_memory_low", text="; ".join(faults))


def _foreign(window: _Window, own_pids: Collection[int]) -> tuple[tuple[ForeignProcess, ...], list[Note]]:
    """Tell others' processes on the device.

    Inside a container a driver may give the host's process ids, which mean nothing here. Then none of them is this
    case's, and nobody can be accused: that there is more than one is all that is known.
    """

    def is_own(process: Process) -> bool:
        return process.own or process.pid in own_pids

    lists = window.recording.processes
    before = [found for found in lists if found.t < window.begin_ns][-1:]
    after = [found for found in lists if found.t > window.end_ns][:1]
    inside = [found for found in lists if window.begin_ns <= found.t <= window.end_ns]
    relevant = [*before, *inside, *after]
    if not any(is_own(process) for found in lists for process in found.processes):
        most = max((len(found.processes) for found in relevant), default=0)
        if most < 2:
            return (), []
        text = (
            f"{most} processes used the GPU; at most one is this case's own, and which one cannot be told: the driver "
            "gives process ids that are not this container's"
        )
        return (), [Note(code="gpu_foreign_process", text=text)]
    largest: dict[int, Process] = {}
    for process in (process for found in relevant for process in found.processes if not is_own(process)):
        known = largest.get(process.pid)
        if known is None or (process.memory_bytes or 0) > (known.memory_bytes or 0):
            largest[process.pid] = process
    foreign = tuple(
        ForeignProcess(pid=process.pid, name=process.name, memory_bytes=process.memory_bytes)
        for process in sorted(largest.values(), key=lambda process: -(process.memory_bytes or 0))
    )
    if not foreign:
        return (), []
    told = ", ".join(
        f"{process.name or 'unnamed'} (pid {process.pid}"
        + ("" if process.memory_bytes is None else f", {_gib(process.memory_bytes)}")
        + ")"
        for process in foreign
    )
    return foreign, [Note(code="gpu_foreign_process", text=f"others used the GPU: {told}")]


def _gib(size: Number) -> str:
    return f"{size / 2**30:.1f} GiB"


# --- energy -----------------------------------------------------------------------------------------


def _energy(window: _Window, steps: int) -> Energy | None:
    """Return the device's energy in the window, from its counter where it has one, else from its power readings."""
    if any("energy_mj" in sample.device for sample in window.recording.samples):
        return _from_counter(window, steps)
    for column in ("power_instant_w", "power_w"):
        if any(column in sample.device for sample in window.recording.samples):
            return _from_power(window, steps, column)
    return None


def _from_counter(window: _Window, steps: int) -> Energy:
    """Take the counter from its first to its last change in the window: only there does its time stand for its value.

    That a reading is a change is known from the one before, which may lie before the window.
    """
    readings = [
        (sample.t, sample.device["energy_mj"])
        for sample in window.recording.samples
        if "energy_mj" in sample.device and sample.t <= window.end_ns
    ]
    changes = [
        (time_ns, value)
        for (_, before), (time_ns, value) in pairwise(readings)
        if value != before and time_ns >= window.begin_ns
    ]
    span_ns, updates = changes[-1][0] - changes[0][0] if changes else 0, len(changes)
    relevant = [value for time_ns, value in readings if time_ns >= window.begin_ns]
    backwards = any(after < before for before, after in pairwise(relevant))
    reason = _whole_gpu(window)
    if reason is None and backwards:
        reason = "the energy counter ran backwards: it was reset, or wrapped"
    if reason is None and updates < ENERGY_UPDATES:
        reason = f"the energy counter was seen to move {updates} times in the window; {ENERGY_UPDATES} are needed"
    joules = None if reason else (changes[-1][1] - changes[0][1]) / 1e3
    return Energy(
        joules=joules,
        source="counter",
        window_ns=span_ns,
        steps=_steps_in(window, span_ns, steps),
        updates=updates,
        resolvable=joules is not None,
        reason=reason,
    )


def _from_power(window: _Window, steps: int, column: str) -> Energy:
    """Integrate the power readings in the window by the trapezoidal rule."""
    readings = [(sample.t, sample.device[column]) for sample in window.samples if column in sample.device]
    span_ns = readings[-1][0] - readings[0][0] if readings else 0
    reason = _whole_gpu(window)
    if reason is None and len(readings) < POWER_READINGS:
        reason = f"no energy counter, and {len(readings)} power readings in the window; {POWER_READINGS} are needed"
    joules = None
    if reason is None:
        pairs = pairwise(readings)
        joules = sum((p0 + p1) / 2 * (t1 - t0) for (t0, p0), (t1, p1) in pairs) / 1e9
        reason = (
            f"an approximation: no energy counter, so {len(readings)} power readings were integrated, each of them "
            "itself a mean of the time before it"
        )
    return Energy(
        joules=joules,
        source="power",
        window_ns=span_ns,
        steps=_steps_in(window, span_ns, steps),
        updates=len(readings),
        resolvable=joules is not None,
        reason=reason,
    )


def _whole_gpu(window: _Window) -> str | None:
    header = window.recording.header
    return "the energy is the whole GPU's, of which this is a slice" if header is not None and header.mig else None


def _steps_in(window: _Window, span_ns: int, steps: int) -> float:
    whole_ns = window.end_ns - window.begin_ns
    return steps * span_ns / whole_ns if whole_ns > 0 else 0.0
