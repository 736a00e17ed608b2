"""All-reduces among ranks of this machine: how long each size takes, and so what their links carry."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec
import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist

from bsprof import cgroup, stats
from bsprof.ceilings import bus_bandwidth
from bsprof.measure import ranks
from bsprof.measure.clock import present_device
from bsprof.measure.failures import classify
from bsprof.measure.repeats import Extent, Seconds, Tally, count_for, timed
from bsprof.model import AllReduce

DEADLINE_S = 120.0
"""Ranks that have not measured all sizes by then hang."""

LEAST = 6
"""Repeats of a size, however long one takes: fewer have no interval."""

COPIES = 3
"""Times the bytes of a size that a rank holds on the host: the tensor, and what gloo sends from and receives into."""

_ROW = 256
"""Numbers after which the pattern that is summed begins again: 1 KiB of them."""


def measure_all_reduce(tally: Tally, device: torch.device, cores: int) -> tuple[AllReduce, ...]:
    """Measure all-reduces among all accelerators of `device`'s kind, and among 2, 4, 8 … of them, as `all_reduce`.

    Where `device` is the CPU two processes share the `cores` and exchange by gloo. The rate is the largest bus
    bandwidth of all worlds and sizes. A world that fails is missing as `all_reduce_<ranks>`, and larger ones are not
    tried; a size that finds no memory as `all_reduce_<ranks>_<bytes>`.
    """
    devices = 0 if device.type == "cpu" else torch.accelerator.device_count()
    worlds = worlds_of(devices) if devices else [2]
    if devices == 1:
        tally.missing["all_reduce"] = "one accelerator has no other to exchange with"
        return ()
    if not devices and cores < 2:
        tally.missing["all_reduce"] = "two ranks on one core take turns"
        return ()
    found: list[AllReduce] = []
    for size in worlds:
        name = f"all_reduce_{size}" if found else "all_reduce"
        with tally.or_missing(name):
            told = among(size, tally.extent, share_s=tally.extent.all_reduce_s / len(worlds), cores=cores)
            found += told.found
            tally.missing |= {f"all_reduce_{size}_{bytes}": reason for bytes, reason in told.left_out.items()}
        if name in tally.missing:
            break
    if found:
        tally.rates["all_reduce"] = max(map(bus_bandwidth, found), key=lambda rate: rate.value)
    else:
        tally.missing.setdefault("all_reduce", "no size finds memory")
    return tuple(found)


def worlds_of(devices: int) -> list[int]:
    """Return the numbers of ranks to measure: 2, 4, 8 … and all `devices`; none for a single one."""
    return sorted({2**power for power in range(1, devices.bit_length())} | {devices}) if devices > 1 else []


class Found(msgspec.Struct):
    """What ranks have measured, the same on all of them, and which sizes, in bytes, have found no memory and why."""

    found: list[AllReduce] = msgspec.field(default_factory=list)
    left_out: dict[int, str] = msgspec.field(default_factory=dict)


class _Asked(msgspec.Struct):
    bytes: tuple[int, ...]
    share_s: float
    """For each size."""
    repeat_s: float
    repeats: int
    threads: int


def among(size: int, extent: Extent, *, share_s: float, cores: int) -> Found:
    """Measure each size of `extent` among `size` new ranks, in `share_s` seconds in all, each with its part of `cores`.

    Each rank has an accelerator of its own where there are any. A world of one shows that the backend works, and its
    times say nothing of any link. Raises BsprofError where a rank failed, or summed wrongly, and RuntimeError where
    they cannot meet.
    """
    asked = _Asked(
        bytes=extent.all_reduce_bytes,
        share_s=share_s / max(1, len(extent.all_reduce_bytes)),
        repeat_s=extent.repeat_s,
        repeats=extent.repeats,
        threads=max(1, cores // size),
    )
    told = [
        msgspec.json.decode(answer, type=Found)
        for answer in ranks.ask(reduce_all, msgspec.json.encode(asked).decode(), size, DEADLINE_S)
    ]
    reasons = {bytes: reason for one in told for bytes, reason in one.left_out.items()}
    return Found(found=told[0].found, left_out=reasons)


# --- in a rank --------------------------------------------------------------------------------------


def reduce_all(question: str) -> str:
    """Sum tensors of each size over all ranks, check the sums, and return a Found; raises ArithmeticError."""
    asked = msgspec.json.decode(question, type=_Asked)
    torch.set_num_threads(asked.threads)
    device = present_device()
    told = Found()
    for size in asked.bytes:
        buffer, reason = _room_for(size, device)
        if reason:
            told.left_out[size] = reason
        if not _on_all(buffer is not None) or buffer is None:
            continue
        check_sum(buffer, dist.get_rank(), dist.get_world_size(), dist.all_reduce)
        # What is summed again and again soon overflows. Infinity takes as long to send, and to add.
        estimate = stats.median(_repeats(_slowest(timed(device, functools.partial(dist.all_reduce, buffer))), asked))
        told.found.append(
            AllReduce(
                backend=dist.get_default_backend_for_device(device),
                world_size=dist.get_world_size(),
                bytes=size,
                seconds=estimate.value,
                low=estimate.low,
                high=estimate.high,
            )
        )
    return msgspec.json.encode(told).decode()


def _room_for(size: int, device: torch.device) -> tuple[torch.Tensor | None, str]:
    """Return a tensor of `size` bytes on `device`, or None and why there is none."""
    if device.type == "cpu":  # the system would promise more than it has, and kill who takes it
        needed, free = COPIES * size * dist.get_world_size(), host_bytes_free()
        if needed > free:
            return None, f"{needed / 2**20:.0f} MiB of memory are needed, {free / 2**20:.0f} MiB free"
    try:
        return torch.empty(size // 4, device=device), ""
    except RuntimeError as error:
        outcome = classify(error)
        if outcome.kind not in ("oom", "host_oom"):
            raise
        return None, outcome.message or outcome.kind


def host_bytes_free() -> int:
    """Return the memory that the machine has left, or all that this process's group may have if that is less."""
    free = int(psutil.virtual_memory().available)
    return min(free, cgroup.memory_limit() or free)


def check_sum(buffer: torch.Tensor, rank: int, size: int, reduce: Callable[[torch.Tensor], object]) -> None:
    """Let `reduce` sum a pattern over `size` ranks into `buffer`. Raises ArithmeticError where any place is wrong."""
    rows = buffer.view(-1, _ROW)
    row = torch.arange(1, _ROW + 1, dtype=buffer.dtype, device=buffer.device)
    rows.copy_(row * (rank + 1))
    reduce(buffer)
    wrong = int((rows != row * (size * (size + 1) // 2)).sum())  # whole numbers below 2^24: no rounding
    if wrong:
        raise ArithmeticError(f"an all-reduce of {buffer.nbytes} bytes is wrong in {wrong} of {buffer.numel()} places")


def _slowest(seconds: Seconds) -> Seconds:
    """Return what lets all ranks begin together and tells the time of the slowest, to the bit the same on all.

    So all of them come to the same decisions by it. Their hosts agree by gloo, outside what is timed.
    """

    def of_all(count: int) -> float:
        dist.all_reduce(torch.zeros(1))
        taken = torch.tensor([seconds(count)], dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    return of_all


def _on_all(so: bool) -> bool:
    """Whether it is so on every rank."""
    shared = torch.tensor([int(so)])
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return bool(shared)


def _repeats(seconds: Seconds, asked: _Asked) -> list[float]:
    """Return the seconds of one call, as often as its share of time allows.

    Calls follow each other without a pause, as many as fill a repeat: one of a small size takes less time than ranks
    need to begin together.
    """
    count = count_for(seconds, asked.repeat_s)
    found: list[float] = []
    while len(found) < asked.repeats and (len(found) < LEAST or sum(found) * count < asked.share_s):
        found.append(seconds(count) / count)
    return found
