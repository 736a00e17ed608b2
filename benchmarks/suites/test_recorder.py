"""What a mark of the Recorder costs, and a step of five phases."""

from __future__ import annotations

from typing import Any

from bsprof import Recorder

PHASES = ("h2d", "forward", "backward", "optimizer")


def test_mark(benchmark: Any) -> None:
    benchmark(Recorder().mark, "forward")


def test_step_of_nothing(benchmark: Any) -> None:
    """A thousand steps: iterating, and the marks of four phases."""

    def steps() -> None:
        recorder = Recorder()
        for _ in recorder.steps(range(1000)):
            for phase in PHASES:
                recorder.mark(phase)

    benchmark(steps)
