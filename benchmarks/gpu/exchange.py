"""All-reduces by the device's own backend."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.gpu.command import python
from benchmarks.gpu.verdict import Line, Stand, Unable, judge
from bsprof.errors import BsprofError
from bsprof.measure import collectives
from bsprof.measure.collectives import Found
from bsprof.measure.repeats import FULL, Extent

SHARE_S = 5.0
SMALL = FULL._replace(all_reduce_bytes=(2**10, 2**12), repeat_s=0.001, repeats=6)


def all_reduce(stand: Stand) -> Iterator[Line]:
    """Expect NCCL in a world of one to run every size of the all-reduce ceiling, with sums that are right.

    One rank exchanges nothing, so no time of it is held against anything. What is shown is that a rank is started,
    joins, reduces on the device, and is timed by the device's events. A rehearsal does it with gloo.
    """
    answer = stand.folder / "found.json"
    # A fresh interpreter: ranks come from a fork server, and a check is itself a fork of the process that has one.
    small = ["--small"] if stand.rehearsed else []
    finished = python(stand, ["-m", __name__, str(answer), *small], timeout_s=60)
    if finished.code:
        raise Unable(finished.complaint)
    found = msgspec.json.decode(answer.read_bytes(), type=Found)
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
    backends = {one.backend for one in found.found}
    yield judge(
        "by the device's own backend",
        backends == {backend},
        ", ".join(sorted(backends)) or "none",
        backend,
        "another one was taken",
    )


def main(answer: Path, extent: Extent) -> None:
    """Let one rank reduce, and write what it has found."""
    tempfile.tempdir = str(answer.parent)  # torch's launcher leaves a folder of logs behind
    try:
        found = collectives.among(1, extent, share_s=SHARE_S, cores=1)
    except (BsprofError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    answer.write_bytes(msgspec.json.encode(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), SMALL if "--small" in sys.argv else FULL)
