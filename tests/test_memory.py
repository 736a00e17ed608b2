"""What the training holds: real peaks on the host, and the device's counters as its allocator tells them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import interpret

from bsprof.errors import BsprofError
from bsprof.measure import memory

MIB = 2**20
CPU = torch.device("cpu")
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset through Linux's /proc")


def child(code: str) -> Any:
    """Run `code` in a process of its own, where limits and peaks are nobody else's, and return what it prints."""
    head = "import json, resource, torch\nfrom bsprof.errors import BsprofError\nfrom bsprof.measure import memory\n"
    head += "cpu = torch.device('cpu')\nMIB = 2**20\n"
    return json.loads(interpret(head + code))


# --- the host -----------------------------------------------------------------------------------------


@LINUX
def test_the_hosts_peak_is_that_of_the_window():
    before, inside, total = child("""
watch = memory.watch(cpu)
resident = lambda: memory._status()["VmRSS"]
torch.ones(512 * MIB // 4)  # gone before the window: no part of its peak
before = resident()
watch.begin()
torch.ones(128 * MIB // 4)
watch.end()
seen = watch.memory()
assert seen.pool == "host" and seen.allocated_between is None and seen.phase_allocated_peak == {}
assert seen.reserved_peak >= 512 * MIB
print(json.dumps([before, seen.allocated_peak, seen.total]))
""")
    assert 120 * MIB < inside - before < 200 * MIB
    assert total > inside


@LINUX
def test_a_peak_that_cannot_be_reset_counts_only_if_it_rose():
    quiet, rose = child("""
from pathlib import Path
real = memory._SELF
class Locked(type(real)):
    def write_text(self, *_): raise PermissionError
memory._SELF = Locked(real)
torch.ones(128 * MIB // 4)
def peak(size):
    watch = memory.watch(cpu)
    watch.begin()
    torch.ones(size * MIB // 4)
    watch.end()
    return watch.memory() and watch.memory().allocated_peak
print(json.dumps([peak(16), peak(512)]))
""")
    assert quiet is None
    assert rose > 512 * MIB


@LINUX
def test_private_memory_was_never_more_than_its_limit():
    """What is reserved without access counts for nothing but the peak of all mappings."""
    private, reserved, limit = child("""
import mmap
private = memory._status()["VmData"]
limit = private + 64 * MIB
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
mmap.mmap(-1, 1024 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()
watch = memory.watch(cpu)
watch.begin()
watch.end()
print(json.dumps([private, watch.memory().reserved_peak, limit]))
""")
    assert private <= reserved <= limit


@LINUX
def test_a_limit_next_to_nothing_still_limits():
    """Linux lets a process with a limit of 0 have what it likes."""
    allowed, failed = child("""
resource.setrlimit(resource.RLIMIT_DATA, (1, resource.RLIM_INFINITY))
allowed = memory.withhold(cpu, 0.05)
try:
    torch.empty(512 * MIB, dtype=torch.uint8)
    failed = False
except RuntimeError:
    failed = True
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([allowed, failed]))
""")
    assert allowed > 0
    assert failed


def test_without_a_window_nothing_was_seen():
    assert memory.watch(CPU).memory() is None


def test_a_share_of_the_hosts_limit_is_withheld():
    nothing, allowed, limit, total, failed = child("""
try:
    nothing = memory.withhold(cpu, 0.25)
except BsprofError as error:
    nothing = error.message
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, resource.RLIM_INFINITY))
allowed = memory.withhold(cpu, 0.25)
watch = memory.watch(cpu)
watch.begin()
kept = torch.ones(64 * MIB // 4)
watch.end()
try:
    torch.empty(7 * 2**30, dtype=torch.uint8)
    failed = False
except RuntimeError:
    failed = True
print(json.dumps([nothing, allowed, resource.getrlimit(resource.RLIMIT_DATA)[0], watch.memory().total, failed]))
""")
    assert "no limit" in nothing
    assert allowed == limit == 6 * 2**30
    assert total <= limit
    assert failed


# --- the device ---------------------------------------------------------------------------------------


class Allocator:
    """A device module: the counters of torch's caching allocator, for allocations that a test makes."""

    TOTAL = 1000

    def __init__(self) -> None:
        self.live = self.peak = self.reserved = self.reserved_peak = 0
        self.retries = 3
        self.fraction = 1.0
        self.asked: list[object] = []

    def current_device(self) -> int:
        return 2

    def allocate(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.reserved = max(self.reserved, self.live + 10)
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def free(self, size: int) -> None:
        self.live -= size

    def memory_stats(self, device: int) -> dict[str, int]:
        self.asked.append(device)
        return {
            "allocated_bytes.all.current": self.live,
            "allocated_bytes.all.peak": self.peak,
            "reserved_bytes.all.current": self.reserved,
            "reserved_bytes.all.peak": self.reserved_peak,
            "inactive_split_bytes.all.current": 7,
            "num_alloc_retries": self.retries,
        }

    def reset_peak_memory_stats(self, device: int) -> None:
        self.asked.append(device)
        self.peak, self.reserved_peak = self.live, self.reserved

    def mem_get_info(self, device: int) -> tuple[int, int]:
        self.asked.append(device)
        return self.TOTAL - 200 - self.reserved, self.TOTAL

    def set_per_process_memory_fraction(self, fraction: float, device: int) -> None:
        assert isinstance(device, int)
        self.fraction = fraction

    def get_per_process_memory_fraction(self, device: int) -> float:
        assert isinstance(device, int)
        return self.fraction


@pytest.fixture
def allocator(monkeypatch):
    module = Allocator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return module


CUDA = torch.device("cuda")


def test_the_devices_peaks_are_those_of_the_window(allocator):
    allocator.allocate(500)
    allocator.free(400)
    watch = memory.watch(CUDA)
    watch.begin()
    allocator.retries += 2
    allocator.allocate(50)
    allocator.free(30)
    watch.end()
    seen = watch.memory()
    assert seen is not None
    assert (seen.pool, seen.allocated_peak, seen.allocated_between) == ("device", 150, 120)
    assert seen.reserved_peak == 510  # what the allocator kept from before is still held
    assert (seen.retries, seen.inactive_split) == (2, 7)
    assert (seen.total, seen.outside) == (1000, 200)
    assert set(allocator.asked) == {2}


def test_each_phase_has_the_peak_that_it_reached(allocator):
    watch = memory.watch(CUDA)
    allocator.allocate(100)
    watch.begin()
    watch.end()
    rounds = iter([1, 5, 2])

    def backward() -> None:
        size = 10 * next(rounds)
        allocator.allocate(size)
        allocator.free(size + 40)

    watch.measure_phases([("forward", lambda: allocator.allocate(40)), ("backward", backward)], 3)
    seen = watch.memory()
    assert seen is not None
    assert seen.phase_allocated_peak == {"forward": 140, "backward": 190}
    assert seen.phase_reserved_peak["backward"] == 200
    assert seen.allocated_peak == 100


def test_a_failure_of_the_training_itself_goes_through(allocator):
    watch = memory.watch(CUDA)
    watch.begin()
    watch.end()
    with pytest.raises(ZeroDivisionError):
        watch.measure_phases([("forward", lambda: 1 // 0)], 1)  # type: ignore[arg-type, return-value]


def test_what_is_withheld_is_a_share_of_what_is_free(allocator):
    assert memory.withhold(CUDA, 0.25) == 600  # of 800 free, of 1000
    assert allocator.fraction == 0.6
    watch = memory.watch(CUDA)
    watch.begin()
    watch.end()
    seen = watch.memory()
    assert seen is not None
    assert seen.total == 600


def test_a_driver_that_refuses_to_withhold_is_heard(allocator, monkeypatch):
    def refuse(device: int) -> None:
        raise RuntimeError("the device has fallen off the bus")

    monkeypatch.setattr(allocator, "mem_get_info", refuse)
    with pytest.raises(RuntimeError, match="bus"):
        memory.withhold(CUDA, 0.05)


@pytest.mark.parametrize(
    "missing", ["reset_peak_memory_stats", "mem_get_info", "get_per_process_memory_fraction", "memory_stats"]
)
@pytest.mark.parametrize("broken", [True, False])
def test_a_backend_that_does_not_tell_gives_none(allocator, monkeypatch, missing, broken):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if broken:
        monkeypatch.setattr(allocator, missing, fail)
    else:
        monkeypatch.delattr(Allocator, missing)
    watch = memory.watch(CUDA)
    watch.begin()
    watch.end()
    watch.measure_phases([("forward", lambda: None)], 1)
    seen = watch.memory()
    if missing == "memory_stats":
        assert seen is None
    else:
        assert seen is not None
        assert (seen.total is None) == (missing == "mem_get_info")


def test_a_device_without_an_allocator_that_counts_gives_none():
    """Torch's own module of a device that has none of these functions."""
    watch = memory.watch(torch.device("mps"))
    watch.begin()
    watch.end()
    watch.measure_phases([], 1)
    assert watch.memory() is None
    with pytest.raises(BsprofError, match="mps"):
        memory.withhold(torch.device("mps"), 0.05)


def test_torchs_cuda_has_what_is_asked_of_it():
    names = [name for name in vars(Allocator) if not name.startswith("_") and name not in ("TOTAL", "allocate", "free")]
    assert len(names) == 6
    assert [name for name in names if not callable(getattr(torch.cuda, name, None))] == []
