"""What this machine can do at the most: where its measured rates are kept, and which of them binds a step."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from bsprof import cache
from bsprof.model import AllReduce, Ceiling, Ceilings, Environment, Facts, Settings

# --- kept under the hardware's identity -------------------------------------------------------------


def identity(environment: Environment) -> str:
    """Return a short hash of what the rates depend on: processor, cores, accelerators, torch, CUDA and driver.

    An accelerator counts by name, memory and multiprocessors, not by its place or UUID, and the host's name does not
    count: equal machines have equal ceilings.
    """
    parts = {
        "cpu": environment.cpu,
        "cores_usable": environment.cores_usable,
        "accelerators": sorted(
            ((one.name, one.memory_bytes, one.multiprocessors) for one in environment.accelerators), key=repr
        ),
        "torch": environment.torch,
        "cuda": environment.cuda,
        "driver": environment.driver,
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:16]


def path_of(identity: str) -> Path:
    """Return where the ceilings of `identity` are kept: a file in the user's cache."""
    return cache.place("ceilings", f"{identity}.json")


def cached(environment: Environment) -> Ceilings | None:
    """Return the ceilings kept for this hardware and software, or None."""
    name = identity(environment)
    kept = cache.read(path_of(name), Ceilings)
    return kept if kept and kept.identity == name else None


def keep(ceilings: Ceilings) -> Path:
    """Write `ceilings` where `cached` finds them and return the path. Raises BsprofError where that cannot be done."""
    return cache.write(path_of(ceilings.identity), ceilings)


# --- what an all-reduce makes of the links ----------------------------------------------------------


def bus_bandwidth(one: AllReduce) -> Ceiling:
    """Return 2 (p - 1) / p x bytes / seconds for the p ranks of an all-reduce, with its interval, in bytes a second.

    This is what NCCL-tests call the bus bandwidth (doc/PERFORMANCE.md there): so much each rank has to send, and to
    receive, at the least. Unlike bytes / seconds it can be held against the speed of a link, however many ranks there
    are. A single rank sends nothing: 0.
    """
    moved = 2 * (one.world_size - 1) / one.world_size * one.bytes
    return Ceiling(
        value=moved / one.seconds,
        unit="B/s",
        low=moved / one.high if one.high else None,
        high=moved / one.low if one.low else None,
    )


# --- which of them binds a step ---------------------------------------------------------------------


class Bound(NamedTuple):
    """A time that no step of a case can be shorter than, because one part of the machine has work for so long."""

    name: str
    """`compute`, `transfer` or `decode`."""
    rate: str
    """The ceiling that it follows from, a key of `Ceilings.rates`."""
    floor_s: float
    share: float
    """`floor_s` / step: 1 means that the step runs at this ceiling. Above 1 the step does with less work."""


def bounds(settings: Settings, facts: Facts, step_s: float, ceilings: Ceilings) -> list[Bound]:
    """Return what each ceiling demands of a step of `step_s` seconds, the one that binds first.

    - compute: `flops_per_step` / the matrix rate of the case's own dtype and device;
    - transfer: `batch_bytes` / the host-to-device rate, pinned or pageable as the case has it;
    - decode: `batch_size` / (`jpeg_core` x the workers that can run at once), for the generated 500x375 JPEG files.

    What is not known, of the case or of the machine, bounds nothing. Parts that work at the same time do not add up:
    the step takes at least the longest of these. Work that other means save, as Winograd's convolutions do with
    multiplications, can take a share above 1. The disk is left out: what it must read depends on the page cache.
    """
    found = [
        (name, rate, work / per_second)
        for name, rate, work, per_second in (
            ("compute", *_compute(facts, ceilings)),
            ("transfer", *_transfer(settings, facts, ceilings)),
            ("decode", *_decode(settings, ceilings)),
        )
        if work and per_second
    ]
    listed = [Bound(name, rate, floor_s, floor_s / step_s) for name, rate, floor_s in found]
    return sorted(listed, key=lambda bound: -bound.floor_s)


def mfu(facts: Facts, step_s: float, ceilings: Ceilings) -> float | None:
    """Return the model FLOPs utilisation: `flops_per_step` / `step_s` / the matrix rate, or None where one is unknown.

    Chowdhery et al. 2022 (PaLM, appendix B) divide by the vendor's peak. Here it is the rate that this machine's own
    large matrix products reached in the case's dtype, so the figure is higher, and 1 can be reached.
    """
    _, work, per_second = _compute(facts, ceilings)
    return work / step_s / per_second if work and per_second else None


_Demand = tuple[str, float | None, float | None]
"""The rate's name, the work in its unit, and the rate a second."""


def _compute(facts: Facts, ceilings: Ceilings) -> _Demand:
    rate = f"{'cpu_' if _on_cpu(facts) else ''}matrix_{facts.dtype}"
    return rate, facts.flops_per_step, _value(ceilings, rate)


def _transfer(settings: Settings, facts: Facts, ceilings: Ceilings) -> _Demand:
    rate = "h2d_pinned" if settings.pin_memory else "h2d_pageable"
    return rate, None if _on_cpu(facts) else facts.batch_bytes, _value(ceilings, rate)


_GENERATED = re.compile(r"jpeg(:(500x375)?,?(n=\d+)?)?")
"""The data sets whose files are those that the decoding rate was measured on."""


def _decode(settings: Settings, ceilings: Ceilings) -> _Demand:
    core = _value(ceilings, "jpeg_core") if _GENERATED.fullmatch(settings.data) else None
    processes = float(max(1, settings.workers))
    cores = _value(ceilings, "cpu_cores")
    if cores is not None:
        processes = max(1.0, min(processes, cores))
    return "jpeg_core", settings.batch_size, core and core * processes


def _on_cpu(facts: Facts) -> bool:
    return facts.device.partition(":")[0] == "cpu"


def _value(ceilings: Ceilings, rate: str) -> float | None:
    found = ceilings.rates.get(rate)
    return found.value if found else None
