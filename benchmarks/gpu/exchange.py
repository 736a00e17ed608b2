"""All-reduces by the device's own backend."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from benchmarks.gpu.verdict import Line, Stand, Unable, judge
from bsprof.errors import BsprofError
from bsprof.measure import collectives
from bsprof.measure.collectives import Found
from bsprof.measure.repeats import FULL, Extent

SHARE_S = 5.0


def all_reduce(stand: Stand) -> Iterator[Line]:
    """Expect NCCL, in a world of one, to run every size of the all-reduce ceiling, with sums that are right.

    One rank exchanges nothing, so no time of it is held against anything. What is shown is that a rank is started,
    joins, reduces on the device, and is timed by the device's events. A rehearsal does it with gloo.
    """
    tempfile.tempdir = str(stand.folder)  # torch's launcher leaves a folder of logs behind
    extent = FULL._replace(all_reduce_bytes=(2**10, 2**12), repeat_s=0.001) if stand.rehearsed else FULL
    try:
        found = collectives.among(1, extent, share_s=SHARE_S, cores=1)
    except BsprofError as error:
        raise Unable(error.message) from error
    yield from judge_sizes(found, extent, "gloo" if stand.rehearsed else "nccl")


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
    yield judge("by the device's own backend", backends == {backend}, ", ".join(sorted(backends)), backend)
