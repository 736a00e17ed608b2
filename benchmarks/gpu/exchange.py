"""All-reduces, and a training under DDP, by the device's own backend."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from benchmarks.gpu.command import python, told
from benchmarks.gpu.verdict import Line, Stand, Unable, fail, judge
from bsprof import exchange, store
from bsprof.errors import BsprofError
from bsprof.measure import collectives, forks, ranks
from bsprof.measure.clock import host_clock
from bsprof.measure.collectives import Found
from bsprof.measure.repeats import FULL, Extent
from bsprof.measure.roll import Meeting
from bsprof.model import Axes, Case, Measurement, Plan, Rank, Settings, Stop, case_key
from bsprof.readings import Reading

SHARE_S = 5.0
SMALL = FULL._replace(all_reduce_bytes=(2**10, 2**12), repeat_s=0.001, repeats=6)
GRADIENT_BYTES = 4
"""Of a number in fp32."""


def all_reduce(stand: Stand) -> Iterator[Line]:
    """Expect NCCL in a world of one to run every size of the all-reduce ceiling, with sums that are right.

    One rank exchanges nothing, so no time of it is held against anything. What is shown is that a rank is started,
    joins, reduces on the device, and is timed by the device's events. A rehearsal does it with gloo.
    """
    found = msgspec.json.decode(_ask(stand, "reduce", timeout_s=60), type=Found)
    backend = found.found[0].backend if stand.rehearsed and found.found else "nccl"
    yield from judge_sizes(found, SMALL if stand.rehearsed else FULL, backend)


def judge_sizes(found: Found, extent: Extent, backend: str) -> Iterator[Line]:
    """Hold what was reduced against what was asked for."""
    reduced = {one.bytes: one.seconds for one in found.found}
    yield judge(
        "every size is reduced, and summed rightly",
        tuple(reduced) == extent.all_reduce_bytes,
        f"{len(reduced)} sizes",
        f"{len(extent.all_reduce_bytes)} sizes",
        "; ".join(found.left_out.values()),
        seconds={str(size): seconds for size, seconds in reduced.items()},
    )
    yield _judge_backend({one.backend for one in found.found}, backend)


def _judge_backend(found: set[str], expected: str) -> Line:
    named = ", ".join(sorted(found)) or "none"
    return judge("by the device's own backend", found == {expected}, named, expected, "another one was taken")


def ddp(stand: Stand) -> Iterator[Line]:
    """Expect a rank under DDP, SyncBatchNorm in its model, to mark, pair and time its steps on the device's clock.

    A world of one: what more ranks cost each other cannot be seen in it. A rehearsal does it with gloo, and without
    SyncBatchNorm, which needs a device.
    """
    measurement = msgspec.json.decode(_ask(stand, "train", timeout_s=90), type=Measurement)
    yield from judge_rank(measurement, on_device=not stand.rehearsed)


def judge_rank(measurement: Measurement, *, on_device: bool) -> Iterator[Line]:
    """Hold what the rank says of itself against what DDP must have done."""
    yield judge("a rank trains under DDP", measurement.outcome.kind == "ok", told(measurement), "ok", "it failed")
    if measurement.outcome.kind != "ok":
        return
    communication, facts, (rank,) = measurement.communication, measurement.facts, measurement.ranks
    if communication is None or facts is None:
        yield fail("what is exchanged", "the rank says nothing of it")
        return
    yield _judge_backend({communication.backend}, "nccl" if on_device else "gloo")
    reduced, expected = sum(communication.bucket_bytes), GRADIENT_BYTES * (facts.parameters or 0)
    yield judge(
        "its buckets hold all gradients", reduced == expected, f"{reduced} B", f"{expected} B", "some are missing"
    )
    yield _judge_marks(rank, on_device=on_device)
    kinds = [block.kind for block in rank.blocks]
    both = kinds.count("synchronised") == kinds.count("unsynchronised") > 1
    timed = not on_device or all(block.device_wall_ns for block in rank.blocks)
    exposed = exchange.exposed(Reading(rank.samples, measurement=measurement)) if rank.samples else None
    yield judge(
        "blocks with and without an exchange",
        both and timed,
        f"{len(kinds)}, {exposed.value * 1e6:+.0f} us a step" if exposed else f"{len(kinds)}",
        "as many of each, timed by the device" if on_device else "as many of each",
        "not in pairs" if timed else "the device has not timed them",
    )


def _judge_marks(rank: Rank, *, on_device: bool) -> Line:
    """Expect in every step's backward, on the clock that its phases have, the moment before the first all-reduce."""
    samples = rank.samples
    spans = (samples.device_ns if on_device else samples.host_ns) if samples else None
    backward = (spans or {}).get("backward", [])
    marks: Sequence[int] = rank.before_reduce_ns or []
    inside = sum(0 < mark <= whole for mark, whole in zip(marks, backward, strict=False))
    steps = len(samples.step_ns) if samples else 0
    return judge(
        "a mark inside each backward, before the first all-reduce",
        0 < steps == len(marks) == inside,
        f"{inside} of {steps}",
        "all",
        f"{len(marks)} marks",
    )


# --- in an interpreter of its own -------------------------------------------------------------------


def _ask(stand: Stand, what: str, *, timeout_s: float) -> bytes:
    """Return what a fresh interpreter has written.

    Ranks come from a fork server, and a check is itself a fork of the process that has one.
    """
    answer = stand.folder / f"{what}.json"
    small = ["--small"] if stand.rehearsed else []
    finished = python(stand, ["-m", __name__, what, str(answer), *small], timeout_s=timeout_s)
    if finished.code:
        raise Unable(finished.complaint)
    return answer.read_bytes()


def _reduce(*, small: bool) -> bytes:
    return msgspec.json.encode(collectives.among(1, SMALL if small else FULL, share_s=SHARE_S, cores=1))


def _train(*, small: bool) -> bytes:
    settings = Settings(
        model="benchmarks.gpu.models:normalised",
        data="synthetic:3x8x8,n=64" if small else "synthetic",
        batch_size=8 if small else 64,
        workers=0,
        threads=1 if small else None,
        sync_batchnorm=not small,
    )
    plan = Plan(
        axes=Axes(),
        stop=Stop(max_case_time_s=1.0 if small else 8.0, precision=0.5 if small else 0.02),
        telemetry_hz=0,
        profile_steps=0 if small else 5,
        deadline_s=60,
    )
    case = Case(key=case_key(settings), settings=settings)
    with tempfile.TemporaryDirectory() as cache:
        measured = ranks.measure(
            case,
            plan,
            cache=Path(cache),
            requested_ns=host_clock(),
            emit=lambda *_: None,
            trace=None,
            meeting=Meeting(),
        )
    return store.to_json(measured)


def main(what: str, answer: Path, *, small: bool) -> None:
    """Let one rank do as it is told, and write what it has found."""
    tempfile.tempdir = str(answer.parent)  # torch's launcher leaves a folder of logs behind
    forks.serve()
    try:
        found = {"reduce": _reduce, "train": _train}[what](small=small)
    except (BsprofError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    answer.write_bytes(found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), small="--small" in sys.argv)
