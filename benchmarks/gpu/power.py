"""Whether joules are joules, and what it costs to ask for them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.verdict import Line, Stand, judge
from bsprof.measure import telemetry
from bsprof.model import Energy, Telemetry

SECONDS = 12.0
HZ = 10.0
ENERGY_TOLERANCE = 0.1
"""Power readings are means over a part of the time on some devices (arXiv 2312.02741)."""
SAMPLER_LIMIT = 0.01
"""Of one core."""


def energy(stand: Stand) -> Iterator[Line]:
    """Expect joules from the device's counter to agree with its power readings over 12 s of steady load.

    Within 10 %: the load is one matrix product after another, so power hardly moves and a mean over a part of the time
    is a mean over all of it. Energy per step is resolvable over so long a window, and the process that samples ten
    times a second takes at most 1 % of one core.
    """
    device = stand.device
    path = stand.folder / "telemetry.jsonl"
    with telemetry.record(device.torch_device, HZ, path):
        _load(device, 0.2 if stand.rehearsed else 2.0)  # clocks and power settle
        begin_ns = device.host_clock()
        steps = _load(device, 1.5 if stand.rehearsed else SECONDS)
        end_ns = device.host_clock()
    found, notes = telemetry.summarise(
        telemetry.read(path), begin_ns=begin_ns, end_ns=end_ns, steps=steps, own_pids={os.getpid()}
    )
    if stand.rehearsed:
        found = _as_if_told(found, steps)
    yield judge_energy(found)
    yield judge_resolution(found)
    yield judge_sampler(found)
    codes = [note.code for note in notes]
    yield judge(
        "nothing was lost while sampling",
        not {"gpu_lost", "telemetry_incomplete"} & set(codes),
        f"{len(found.time_ns)} samples, notes: {', '.join(codes) or 'none'}",
        "neither gpu_lost nor telemetry_incomplete",
        "; ".join(note.text for note in notes),
    )


def _load(device: Device, seconds: float) -> int:
    """Keep the device at one and the same work and return how many products it made."""
    size = 256 if device.rehearsed else 8192
    dtype = torch.float32 if device.rehearsed else torch.bfloat16
    a = torch.randn(size, size, device=device.torch_device, dtype=dtype)
    b = torch.randn(size, size, device=device.torch_device, dtype=dtype)
    out = torch.empty_like(a)
    end = device.host_clock() + round(seconds * 1e9)
    steps = 0
    while device.host_clock() < end:
        for _ in range(20):
            torch.mm(a, b, out=out)
        device.wait()  # so that the queue, and with it the window, does not outlast the clock
        steps += 20
    return steps


def _as_if_told(found: Telemetry, steps: int) -> Telemetry:
    """Return telemetry as a device that draws 300 W would give it: a rehearsal has no device to ask."""
    return msgspec.structs.replace(
        found,
        device={"power_w": [300.0] * len(found.time_ns)},
        energy=Energy(
            joules=300.0 * found.window_ns / 1e9,
            source="counter",
            window_ns=found.window_ns,
            steps=steps,
            updates=100,
            resolvable=True,
        ),
    )


def judge_energy(found: Telemetry) -> Line:
    """Hold the counter's joules against the integral of the power readings over the window, as mean watts."""
    what, limit = "energy counter against integrated power", f"± {ENERGY_TOLERANCE:.0%}"
    energy = found.energy
    if energy is None or energy.joules is None or energy.source != "counter":
        return judge(what, False, "no joules", limit, (energy and energy.reason) or "the counter was not captured")
    integrated = mean_power_w(found)
    if integrated is None:
        return judge(what, False, "no power", limit, "power was not captured")
    counted = energy.joules / (energy.window_ns / 1e9)
    return judge(
        what,
        abs(counted / integrated - 1) <= ENERGY_TOLERANCE,
        f"{counted:.1f} W against {integrated:.1f} W, {counted / integrated - 1:+.1%}, {energy.window_ns / 1e9:.1f} s",
        limit,
        "they disagree",
        counter_w=counted,
        power_w=integrated,
        joules=energy.joules,
    )


def mean_power_w(found: Telemetry) -> float | None:
    """Return the trapezoidal mean of the power readings inside the window, or None where fewer than two are there."""
    for column in ("power_instant_w", "power_w"):
        watts = found.device.get(column, [])
        told = [
            (t, w) for t, w in zip(found.time_ns, watts, strict=False) if w is not None and 0 <= t <= found.window_ns
        ]
        if len(told) >= 2:
            times, powers = np.asarray(told, dtype=np.float64).T
            return float((np.diff(times) * (powers[1:] + powers[:-1]) / 2).sum() / (times[-1] - times[0]))
    return None


def judge_resolution(found: Telemetry) -> Line:
    """Ask that energy per step can be resolved, and say it."""
    energy = found.energy
    resolvable = energy is not None and energy.resolvable and energy.joules is not None and energy.steps > 0
    figure = "null"
    if energy is not None and energy.joules is not None and energy.steps > 0:
        figure = f"{energy.joules / energy.steps:.4g} J/step from {energy.updates} updates"
    reason = "telemetry has no energy" if energy is None else energy.reason or "it says it is not resolvable"
    return judge("energy per step", resolvable, figure, "resolvable", reason)


def judge_sampler(found: Telemetry) -> Line:
    """Hold the sampler's core time against the time it sampled for."""
    what, limit = f"sampler at {HZ:g} Hz", f"<= {SAMPLER_LIMIT:.0%} of one core"
    if found.sampler_cpu_ns is None or len(found.time_ns) < 2:
        return judge(what, False, "no figure", limit, "the sampler's own cost was not captured")
    share = found.sampler_cpu_ns / (found.time_ns[-1] - found.time_ns[0])
    return judge(what, share <= SAMPLER_LIMIT, f"{share:.2%} of one core", limit, "sampling costs more", share=share)
