"""How long a command takes that does next to nothing, as a user waits for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites.workloads import results
from bsprof import store


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "bsprof", "--version"),
        ("-m", "bsprof", "bench", "--help"),
        ("-c", "import bsprof"),
        ("-c", "import torch"),
    ],
    ids=["version", "help", "import", "import torch, for comparison"],
)
def test_command(words: tuple[str, ...], benchmark: Any) -> None:
    benchmark.pedantic(run, args=words, rounds=7, warmup_rounds=1)


def test_show(benchmark: Any, tmp_path: Path) -> None:
    store.save(results(20)[0], tmp_path / "result.json")
    words = ("-m", "bsprof", "show", str(tmp_path / "result.json"))
    benchmark.pedantic(run, args=words, rounds=7, warmup_rounds=1)
