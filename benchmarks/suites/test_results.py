"""Result files written, read and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites.workloads import results
from bsprof import store
from bsprof.compare import compare
from bsprof.model import Gate, Result

CASES = 200


@pytest.fixture(scope="module")
def sides() -> tuple[Result, Result]:
    return results(CASES)


def test_encode(benchmark: Any, sides: tuple[Result, Result]) -> None:
    benchmark(store.encode, sides[0])


@pytest.mark.parametrize("name", ["result.json", "result.json.gz"])
def test_load(name: str, benchmark: Any, sides: tuple[Result, Result], tmp_path: Path) -> None:
    store.save(sides[0], tmp_path / name)
    benchmark.pedantic(store.load, args=(tmp_path / name,), rounds=10, warmup_rounds=1)


def test_compare(benchmark: Any, sides: tuple[Result, Result]) -> None:
    benchmark.pedantic(compare, args=(*sides, Gate()), rounds=5, warmup_rounds=1)
