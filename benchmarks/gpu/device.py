"""The device that checks run on: a CUDA device, or for a rehearsal a queue that exists only as arithmetic."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch

from bsprof.measure.clock import DeviceClock, HostClock, device_clock, host_clock


class Device(Protocol):
    """What checks ask of a device. Times are nanoseconds."""

    name: str
    rehearsed: bool
    torch_device: torch.device
    host_clock: HostClock

    def pause(self, ns: int) -> None:
        """Keep the host busy."""

    def sleep(self, ns: int) -> None:
        """Put about `ns` of work on the device's queue, and return at once."""

    def wait(self) -> None:
        """Wait until the queue is empty."""

    def clock(self) -> DeviceClock | None:
        """Return the clock under test: bsprof's own."""

    def stopwatch(self) -> Stopwatch:
        """Return a clock that shares no code with bsprof's: what the truth is read from."""

    def refusing_to_wait(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which what makes the host wait for the device raises RuntimeError."""

    def peek(self) -> None:
        """Read a value back from the device, which makes the host wait for it."""


class Stopwatch(Protocol):
    """Moments on the device's queue."""

    def record(self) -> None:
        """Take one more moment."""

    def intervals_ns(self) -> list[int]:
        """Wait for the last moment and return the times between neighbours."""


# --- the real one -----------------------------------------------------------------------------------


class CudaEvents:
    """A stopwatch of plain `torch.cuda.Event`s on the current stream."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def record(self) -> None:
        """Record one more event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals_ns(self) -> list[int]:
        """Wait for the last event and return the times between neighbours."""
        self._events[-1].synchronize()
        return [round(a.elapsed_time(b) * 1e6) for a, b in pairwise(self._events)]


class CudaDevice:
    """The first visible CUDA device; making one does not touch it, so that a check that only runs commands holds none.

    `torch.cuda._sleep` spins for a number of clock cycles, calibrated against events at its first use.
    """

    rehearsed = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.torch_device = torch.device("cuda", 0)
        self.host_clock: HostClock = host_clock
        self._cycles_per_ns: float | None = None

    def pause(self, ns: int) -> None:
        """Spin: a sleep of the operating system ends late."""
        end = self.host_clock() + ns
        while self.host_clock() < end:
            pass

    def sleep(self, ns: int) -> None:
        """Queue a spinning kernel. What it really takes depends on the clock rate, so truth is measured around it."""
        if self._cycles_per_ns is None:
            self._cycles_per_ns = self._calibrate()
        torch.cuda._sleep(max(1, round(ns * self._cycles_per_ns)))

    def _calibrate(self) -> float:
        """Return cycles a nanosecond from the difference of two lengths, so that the launch itself drops out."""
        load = torch.randn(4096, 4096, device=self.torch_device)
        end = self.host_clock() + 500_000_000  # an idle device clocks down, and takes a while to come up again
        while self.host_clock() < end:
            for _ in range(10):
                torch.mm(load, load)
            self.wait()
        short, long = 10_000_000, 30_000_000
        rates = []
        for _ in range(5):
            watch = CudaEvents()
            watch.record()
            torch.cuda._sleep(short)
            watch.record()
            torch.cuda._sleep(long)
            watch.record()
            first, second = watch.intervals_ns()
            rates.append((long - short) / (second - first))
        return statistics.median(rates)

    def wait(self) -> None:
        """Synchronise: between the windows of a check, never inside."""
        torch.cuda.synchronize(self.torch_device)

    def clock(self) -> DeviceClock | None:
        """Return bsprof's clock of this device, unnumbered: the one that `bsprof bench` measures with."""
        return device_clock(torch.device(self.torch_device.type))

    def stopwatch(self) -> Stopwatch:
        """Return plain events."""
        return CudaEvents()

    @contextlib.contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Let torch raise where it would synchronise."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def peek(self) -> None:
        """Copy one number to the host."""
        torch.ones((), device=self.torch_device).item()


# --- the stand-in -----------------------------------------------------------------------------------


class _Boundaries:
    """Events of the stand-in: each is the moment at which the queue will have drained."""

    def __init__(self, passed_ns: Callable[[], int], rate: float, after: Callable[[], None]) -> None:
        self._passed_ns, self._rate, self._after = passed_ns, rate, after
        self._times: list[int] = []
        self._stamps: list[int] = []

    def reserve(self, boundaries: int) -> None:
        """Nothing to allocate."""

    def record(self) -> None:
        """Remember when the queue drains."""
        self._times.append(self._passed_ns())
        self._after()

    def intervals_ns(self) -> list[int]:
        """Return the times between neighbours."""
        return [round((b - a) * self._rate) for a, b in pairwise(self._times)]

    def passed_ns(self) -> list[int]:
        """Return the times between neighbours: arithmetic knows them before they have passed."""
        return self.intervals_ns()

    def stamp(self) -> int:
        """Remember when the queue drains, beside the chain."""
        self._stamps.append(self._passed_ns())
        return len(self._stamps) - 1

    def span_ns(self, first: int, last: int) -> int:
        """Return the time between two stamps."""
        return round((self._stamps[last] - self._stamps[first]) * self._rate)


class VirtualHost:
    """A host whose time passes only when it is told to, and by `tick_ns` whenever the clock is read."""

    def __init__(self, tick_ns: int = 500) -> None:
        self._now_ns, self._tick_ns = 1_000_000_000, tick_ns

    def clock(self) -> int:
        """Return nanoseconds; reading takes a tick."""
        self._now_ns += self._tick_ns
        return self._now_ns

    def pause(self, ns: int) -> None:
        """Let time pass."""
        self._now_ns += max(0, ns)


def _really_pause(ns: int) -> None:
    time.sleep(max(0, ns) / 1e9)


class RehearsalDevice:
    """No device: a queue in order whose work is a number, on the CPU's tensors.

    `sleep` moves the moment at which the queue drains, and an event is that moment. The faults that the suite must
    find can be planted: `rate` makes the clock under test wrong, `leak` lets a share of each sleep fall behind
    the next boundary, `waits` makes every boundary wait for the queue, as a careless recorder would.
    """

    name = "rehearsal (no device)"
    rehearsed = True

    def __init__(
        self, *, host: VirtualHost | None = None, rate: float = 1.0, leak: float = 0.0, waits: bool = False
    ) -> None:
        self.torch_device = torch.device("cpu")
        self.host_clock: HostClock = host.clock if host else host_clock
        self._pause = host.pause if host else _really_pause
        self._rate, self._leak, self._waits = rate, leak, waits
        self._drained_ns = 0
        self._leaking_ns = 0
        self._refuses = False

    def pause(self, ns: int) -> None:
        """Let the host's time pass."""
        self._pause(ns)

    def sleep(self, ns: int) -> None:
        """Lengthen the queue."""
        leaking = round(ns * self._leak)
        self._drained_ns = self._passed_ns() + ns - leaking
        self._leaking_ns += leaking

    def wait(self) -> None:
        """Let the host's time pass until the queue is empty."""
        if self._refuses:
            raise RuntimeError("called a synchronizing operation")
        self._pause(self._drained_ns - self.host_clock())

    def clock(self) -> DeviceClock | None:
        """Return a clock that has the planted faults."""
        return _Boundaries(self._passed_ns, self._rate, self._after_boundary)

    def stopwatch(self) -> Stopwatch:
        """Return a clock without faults."""
        return _Boundaries(self._passed_ns, 1.0, lambda: None)

    @contextlib.contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Make `wait` raise."""
        self._refuses = True
        try:
            yield
        finally:
            self._refuses = False

    def peek(self) -> None:
        """Wait, as reading a value would."""
        self.wait()

    def _passed_ns(self) -> int:
        return max(self.host_clock(), self._drained_ns)

    def _after_boundary(self) -> None:
        if self._leaking_ns:
            self._drained_ns = self._passed_ns() + self._leaking_ns
            self._leaking_ns = 0
        if self._waits:
            self.wait()


def milliseconds(ns: float) -> str:
    """Return `12.34 ms`."""
    return f"{ns / 1e6:.3f} ms"
