"""An epoch of pictures, with the workers' start and end: what a user's first number is."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from benchmarks.suites.workloads import loader
from bsprof import watch_loaders


def exhaust(batches: Any) -> None:
    deque(batches, maxlen=0)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epoch(workers: int, benchmark: Any) -> None:
    batches = loader(workers, endless=False)
    benchmark.pedantic(exhaust, args=(batches,), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_watched_epoch(workers: int, benchmark: Any) -> None:
    """The same under the probe: held against `test_epoch` it is what watching costs, its beginning and end included."""
    batches = loader(workers, endless=False)

    def watched() -> None:
        with watch_loaders():
            exhaust(batches)

    benchmark.pedantic(watched, rounds=5, warmup_rounds=1)
