"""What each way of looking at a step costs it: bare clock reads, our marks, record_function, torch.profiler, TraceML.

    python benchmarks/recorder_overhead.py [--json FILE]

A step of a tiny MLP (about 100 us) is run in interleaved blocks, every variant once in each round and in random
order, so that the machine's drift meets all alike. Printed: microseconds a step that each variant adds to the bare one,
from the differences within a round, with a 95 % interval. TraceML is measured where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces each window on stderr

import torch
from torch import nn

from bsprof import stats
from bsprof.measure import environment
from bsprof.measure.loop import run_block
from bsprof.measure.tape import Tape

ROUNDS, STEPS, WARMUP_ROUNDS, SETTLE_STEPS = 60, 200, 5, 50
LIMIT_US = 4.0
"""What the recorder may add to a step on a CPU."""


class MlpStep:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.images, self.labels = torch.randn(16, 32), torch.randint(0, 10, (16,))
        self.loss_fn = nn.CrossEntropyLoss()
        self.stages = (
            ("data", self.data),
            ("h2d", self.h2d),
            ("forward", self.forward),
            ("backward", self.backward),
            ("optimizer", self.update),
        )

    def data(self) -> None:
        self.batch = self.images, self.labels

    def h2d(self) -> None:
        self.batch = self.batch[0].to("cpu"), self.batch[1].to("cpu")

    def forward(self) -> None:
        self.loss = self.loss_fn(self.model(self.batch[0]), self.batch[1])

    def backward(self) -> None:
        self.loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def variants(step: MlpStep) -> dict[str, Callable[[], int]]:
    """Return for each way of looking a function that runs one block and returns its wall time in ns."""
    stages = step.stages
    clock = time.perf_counter_ns

    def bare() -> int:
        return run_block(stages, STEPS, None).wall_ns

    def clock_reads() -> int:
        start = clock()
        for _ in range(STEPS):
            for _, run in stages:
                run()
                clock()
        return clock() - start

    def recorder() -> int:
        return run_block(stages, STEPS, Tape()).wall_ns

    def record_function() -> int:
        start = clock()
        for _ in range(STEPS):
            for phase, run in stages:
                with torch.profiler.record_function(phase):
                    run()
        return clock() - start

    def active_profiler() -> int:
        # Its start and its export, about a second, are not counted: a profiled window pays them once.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True):
            return bare()

    found = {
        "bare": bare,
        "bare clock reads": clock_reads,
        "bsprof recorder": recorder,
        "record_function": record_function,
        "torch.profiler active": active_profiler,
    }
    if importlib.util.find_spec("traceml_ai") is not None:
        with contextlib.suppress(ImportError, AttributeError):
            from traceml_ai import trace_step

            def traceml() -> int:
                start = clock()
                for _ in range(STEPS):
                    with trace_step(step.model):
                        for _, run in stages:
                            run()
                return clock() - start

            found["TraceML trace_step"] = traceml
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    step = MlpStep()
    blocks = variants(step)
    names = list(blocks)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for i in range(WARMUP_ROUNDS + ROUNDS):
        for name in order.sample(names, len(names)):
            run_block(step.stages, SETTLE_STEPS, None)  # whatever came before has left the caches
            wall_ns = blocks[name]()
            if i >= WARMUP_ROUNDS:
                times[name].append(wall_ns / STEPS / 1e3)
    bare = stats.median(times["bare"]).value
    rows = []
    print(f"bare step {bare:.1f} us; {ROUNDS} interleaved rounds of {STEPS} steps\n")
    print(f"{'':24}{'added us/step':>14}{'95 % interval':>20}{'ratio':>8}")
    for name in names[1:]:
        added = stats.median([a - b for a, b in zip(times[name], times["bare"], strict=True)])
        ratio = stats.paired_ratio(times[name], times["bare"])
        low, high = added.low or float("nan"), added.high or float("nan")
        print(f"{name:24}{added.value:14.2f}{f'[{low:.2f}, {high:.2f}]':>20}{ratio.value:8.3f}")
        rows.append({"variant": name, "added_us": added.value, "low": low, "high": high, "ratio": ratio.value})
    recorder = next(row for row in rows if row["variant"] == "bsprof recorder")
    print(f"\nrecorder <= {LIMIT_US} us a step: {'yes' if recorder['added_us'] <= LIMIT_US else 'NO'}")
    if arguments.json:
        import msgspec

        found = msgspec.to_builtins(environment.collect(Path.cwd()))
        arguments.json.write_text(
            json.dumps({"bare_us": bare, "variants": rows, "environment": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
