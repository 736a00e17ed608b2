"""Results of several ranks, made up by arithmetic: nothing in them was measured.

Each rank does its own work up to its first gradients, then all meet: the exchange ends for everybody at the same time,
`exposed_ms` after the last of them would have ended its backward alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from machines import environment

from bsprof.model import (
    AllReduce,
    Block,
    Case,
    Ceilings,
    Communication,
    Facts,
    Measurement,
    Outcome,
    Plan,
    Rank,
    Result,
    Samples,
    Settings,
    case_key,
)

MS = 1_000_000
OWN_MS = {"data": 1.0, "h2d": 0.1, "forward": 20.0, "before": 5.0, "rest": 30.0, "optimizer": 3.0, "other": 0.4}
"""What a rank spends by itself; `before` and `rest` are the two parts of its backward."""
BUCKETS = (8_000_000, 6_000_000)
Own = dict[str, np.ndarray]


def settings(world: int = 1, **axes: Any) -> Settings:
    return Settings(**{"pin_memory": None, "batch_size": 32, "world_size": world, "threads": 1, **axes})


def world(
    size: int,
    *,
    more_ms: Mapping[int, Mapping[str, float]] | None = None,
    exposed_ms: float = 4.0,
    steps: int = 60,
    block: int = 10,
    pairs: int = 8,
    jitter: float = 0.002,
    seed: int = 0,
    scale: float = 1.0,
    buffers: bool = False,
    process: int = 0,
    told: Mapping[str, Any] | None = None,
    **axes: Any,
) -> Measurement:
    """Return a case of so many ranks. `more_ms` adds to a phase of a rank, `buffers` lets all wait for rank 0's."""
    dice = np.random.default_rng([seed, size, process])
    chosen = settings(size, **axes)

    def own(count: int) -> list[Own]:
        return [
            {
                name: (ms * scale + (more_ms or {}).get(rank, {}).get(name, 0.0))
                * MS
                * dice.lognormal(0, jitter, count)
                for name, ms in OWN_MS.items()
            }
            for rank in range(size)
        ]

    timed = own(steps)
    exposed = (exposed_ms if size > 1 else 0.0) * MS
    taken, befores = _together(timed, exposed, block, buffers)
    ranks = [_samples(phases, chosen.batch_size, steps, block) for phases in taken]
    case = Case(key=case_key(chosen), settings=chosen, process=process)
    facts = Facts(device="cpu", threads=1)
    slowest = max(ranks, key=lambda one: sum(one.step_ns))
    common = {"case": case, "outcome": Outcome(kind="ok"), "wall_s": 10.0, "facts": facts}
    if size == 1:
        return Measurement(samples=slowest, **common)
    blocks = _exchange_blocks(own(2 * pairs * block), exposed, block)
    return Measurement(
        samples=msgspec.structs.replace(slowest, batch_size=size * chosen.batch_size),
        ranks=tuple(
            Rank(
                rank=rank,
                node=0,
                host="synthetic",
                facts=facts,
                samples=samples,
                before_reduce_ns=[round(ns) for ns in before],
                blocks=[one[rank] for one in blocks],
            )
            for rank, (samples, before) in enumerate(zip(ranks, befores, strict=True))
        ),
        communication=Communication(
            **{"backend": "gloo", "bucket_bytes": BUCKETS, "reduce_ns": 20 * MS, "overlap_ns": 16 * MS, **(told or {})}
        ),
        **common,
    )


def _together(timed: list[Own], exposed: float, block: int, buffers: bool) -> tuple[list[Own], list[np.ndarray]]:
    """Return the phases of each rank as they are recorded, and the parts of its backwards before the exchange."""
    recorded = [{name: values.copy() for name, values in own.items()} for own in timed]
    steps = timed[0]["data"].size
    for step in range(steps):
        begins = []
        for own in timed:
            carried = 0.0 if step % block == 0 else own["optimizer"][step - 1] + own["other"][step - 1]
            begins.append(carried + own["data"][step] + own["h2d"][step])
        forwards = [own["forward"][step] for own in timed]
        if buffers:
            forwards = [ns + max(begins[0] - begin, 0.0) for ns, begin in zip(forwards, begins, strict=True)]
        arrives = [begin + ns for begin, ns in zip(begins, forwards, strict=True)]
        ends = [at + own["before"][step] + own["rest"][step] for at, own in zip(arrives, timed, strict=True)]
        end = max(ends) + exposed
        for one, at, forward in zip(recorded, arrives, forwards, strict=True):
            one["forward"][step] = forward
            one["backward"] = one.get("backward", np.zeros(steps))
            one["backward"][step] = end - at
    return recorded, [own["before"] for own in timed]


def _samples(own: Own, batch: int, steps: int, block: int) -> Samples:
    host = {name: [round(ns) for ns in own[name]] for name in ("data", "h2d", "forward", "backward", "optimizer")}
    step_ns = [sum(column) + round(other) for *column, other in zip(*host.values(), own["other"], strict=True)]
    blocks = []
    for first in range(0, steps, block):
        part = step_ns[first : first + block]
        blocks += [Block(kind=kind, steps=len(part), wall_ns=sum(part)) for kind in ("instrumented", "bare")]
    return Samples(batch_size=batch, step_ns=step_ns, host_ns=host, blocks=blocks)


def _exchange_blocks(timed: list[Own], exposed: float, block: int) -> list[list[Block]]:
    """Return blocks in turns, each with its time on every rank; the order is swapped from pair to pair."""
    walls = [sum(own.values()) for own in timed]
    found = []
    for place, first in enumerate(range(0, timed[0]["data"].size, block)):
        alone = [wall[first : first + block].sum() for wall in walls]
        exchanges = place % 4 in (0, 3)
        together = max(alone) + block * exposed
        kind = "synchronised" if exchanges else "unsynchronised"
        found.append([Block(kind=kind, steps=block, wall_ns=round(together if exchanges else wall)) for wall in alone])
    return found


def result(*measurements: Measurement, all_reduce: tuple[AllReduce, ...] = (), **plan: Any) -> Result:
    ceilings = Ceilings(identity="synthetic", created="2031-01-01T00:00:00Z", rates={}, all_reduce=all_reduce)
    return Result(
        created="2031-01-01T00:00:00Z",
        plan=Plan(**plan),
        environment=environment(host="synthetic (made up, never measured)"),
        measurements=list(measurements),
        ceilings=ceilings if all_reduce else None,
    )


def all_reduces(
    alpha_s: float = 40e-6, beta: float = 1.5e9, *, worlds: tuple[int, ...] = (2, 4), noise: float = 0.0, seed: int = 0
) -> tuple[AllReduce, ...]:
    """Return measured times that follow the ring model, but for noise."""
    dice = np.random.default_rng(seed)
    return tuple(
        AllReduce(
            backend="gloo",
            world_size=size,
            bytes=2**power,
            seconds=(2 * (size - 1) * alpha_s + 2 * (size - 1) / size * 2**power / beta) * (1 + noise * dice.normal()),
        )
        for size in worlds
        for power in range(10, 27, 2)
    )
