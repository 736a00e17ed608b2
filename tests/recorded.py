"""The recordings in `recordings/`, and how they were made: bsprof's own sampling over made-up GPUs and hosts.

    python tests/recorded.py

writes them anew. They are checked in, because a later bsprof must still read what this one wrote.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pynvml
from fake_nvml import FakeGpu, FakeNvml

from bsprof.measure.nvml import NullSource, NvmlSource, Source
from bsprof.measure.sampler import Line, Sampling

FOLDER = Path(__file__).with_name("recordings")

BEGIN_NS = 1_000_000_000_000
"""The clock when a recording begins."""
HZ = 10
CASE = 4242
"""The case's process."""
OTHER = 99_999_999
"""No machine has a process of this id, so nothing of the one that records gets in."""

UUID = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

Script = Callable[[int, FakeGpu, dict[str, Any]], None]
"""Called before each sample with its number, the GPU and the host's columns, to change what they will tell."""


class ScriptedHost:
    def __init__(self) -> None:
        self.limits = {"host_memory_bytes": 32 * 2**30}
        self.unsupported: list[str] = []
        self.fast: dict[str, Any] = {"busy_cores": 1.25, "runnable": 2}
        self.slow: dict[str, Any] = {
            "memory_available_bytes": 20 * 2**30,
            "swap_in_bytes": 0,
            "swap_out_bytes": 0,
            "cpu_mhz": 3000.0,
        }

    def read(self, now_ns: int, *, slow: bool = True) -> dict[str, Any]:
        return self.fast | (self.slow if slow else {})

    def close(self) -> None:
        pass


def steps(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    """A training at 400 W: the counter moves 40 J a sample."""
    gpu.told["energy"] = 5_000_000 + 40_000 * tick
    gpu.told["processes"] = [(CASE, 12 * 2**30)]


def hot(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told |= {"temperature": 91} | ({"reasons": 0x28} if 10 <= tick < 15 else {"reasons": 0})


def capped(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told["reasons"] = 0x4 if tick % 2 else 0


def moving(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told["sm"] = 1980 if tick < 15 else 1605


def idle_between(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    """Clocks and link go down, but only where there is nothing to do."""
    steps(tick, gpu, host)
    busy = tick % 4
    gpu.told |= {"gpu": 90 if busy else 0, "sm": 1980 if busy else 345, "reasons": 0 if busy else 1}
    gpu.told["generation"] = 5 if busy else 1


def slow_link(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told |= {"generation": 3, "width": 8}


def shared(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told["processes"] = [(CASE, 12 * 2**30), (OTHER, 3 * 2**30), (OTHER + 1, None)]


def container(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told["processes"] = [(OTHER, 12 * 2**30), (OTHER + 1, 2**30)]


def container_alone(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    gpu.told["processes"] = [(OTHER, 12 * 2**30)]


def lost(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    if tick >= 18:
        gpu.lost = pynvml.NVML_ERROR_GPU_IS_LOST


def rare_updates(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick - tick % 5, gpu, host)


def counter_reset(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    if tick >= 16:
        gpu.told["energy"] = 40_000 * tick


def no_counter(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    """Power climbs evenly, so that the trapezoidal rule is exact: 300 W and 4 W more with each sample."""
    steps(tick, gpu, host)
    gpu.told |= {"energy": NOT_SUPPORTED, "instant": NOT_SUPPORTED, "power": 300_000 + 4_000 * tick}


def poor_host(tick: int, gpu: FakeGpu, host: dict[str, Any]) -> None:
    steps(tick, gpu, host)
    host |= {"cpu_mhz": 3000.0 - 10 * tick, "memory_available_bytes": 2**30, "swap_out_bytes": 2**20 * tick}


RECORDINGS: dict[str, tuple[Script, int]] = {
    "steady": (steps, 30),
    "hot": (hot, 30),
    "capped": (capped, 30),
    "moving_clocks": (moving, 30),
    "idle_between": (idle_between, 30),
    "slow_link": (slow_link, 30),
    "shared": (shared, 30),
    "container": (container, 30),
    "container_alone": (container_alone, 30),
    "lost": (lost, 30),
    "slice": (steps, 30),
    "rare_updates": (rare_updates, 30),
    "counter_reset": (counter_reset, 30),
    "no_counter": (no_counter, 30),
    "poor_host": (poor_host, 80),
    "no_driver": (steps, 30),
}
"""By name: what happens, and for how many samples. The window that tests look at leaves out five at either end."""


def lines(name: str) -> Iterable[Line]:
    script, ticks = RECORDINGS[name]
    gpu, host = FakeGpu(UUID), ScriptedHost()
    script(0, gpu, host.slow)
    written: list[Line] = []
    source: Source = NvmlSource(FakeNvml(pynvml, [gpu]), gpu, gpu if name == "slice" else None, name == "slice")
    if name == "no_driver":
        source = NullSource("NVML: Driver Not Loaded")
    sampling = Sampling(source, host, written.append, hz=HZ, parent=CASE)
    sampling.begin(BEGIN_NS)
    for tick in range(ticks):
        script(tick, gpu, host.slow)
        sampling.sample(tick_ns(tick), 50_000_000 + 300_000 * tick)
    sampling.list_processes(tick_ns(ticks))
    sampling.end(tick_ns(ticks), 50_000_000 + 300_000 * ticks, "closed")
    return written


def tick_ns(tick: int) -> int:
    return BEGIN_NS + round(tick * 1e9 / HZ)


def text(name: str) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines(name))


if __name__ == "__main__":
    for name in RECORDINGS:
        FOLDER.joinpath(f"{name}.jsonl").write_bytes(text(name))
