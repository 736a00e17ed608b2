"""What watching a loader costs: CPU time in its workers, throughput, and nothing at all when it is over.

    python -m benchmarks.loader.overhead [--rounds N] [--json FILE]

(a) CPU seconds that workers add for each batch and each sample, on samples that cost nothing: workers with and without
the probe, in random order in one process; each for few and for many batches, whose difference leaves out the start of
a worker; at two batch sizes, which tell a batch's cost from a sample's. A batch's first sample computes for a fixed CPU
time, so that the worker never waits: how often it slept and was woken would be measured otherwise. (b) The throughput
of samples that take 1 ms. (c) After the block every attribute of the patched libraries is the object that it was, and a
loop costs what it costs in a process that has never watched. Medians over interleaved rounds with 95 % intervals.
Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.loader.faults import spin
from bsprof import stats
from bsprof.sweep.runner import describe_environment

ROOT = Path(__file__).parents[2]
BATCH_LIMIT_US, SAMPLE_LIMIT_NS, SLOWDOWN_LIMIT = 10.0, 200.0, 1.01
OFF_LIMIT = 1.005
"""The same code in two processes: what its interval must reach down to."""
BATCH_S = 0.3e-3
FEW, MANY = 500, 4500
"""Batches of a run for (a)."""
SIZES = (1, 65)
"""Samples a batch for (a)."""
ROUNDS, AFTER_PAIRS = 25, 15
SAMPLE_S = 1e-3
SLOW_BATCH, SLOW_BATCHES = 16, 40
AFTER_BATCHES = 4000

PATCHED = (
    "multiprocessing.reduction",
    "numpy",
    "PIL.Image",
    "PIL.ImageFile",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "torch",
    "torch.serialization",
    "torch.utils.data",
    "torch.utils.data.dataloader",
    "torch.utils.data._utils.fetch",
    "torch.utils.data._utils.pin_memory",
    "torch.utils.data._utils.worker",
    "torchvision.io",
    "torchvision.io.image",
    "torchvision.transforms.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2._container",
)
"""Modules of others in which something is replaced while loaders are watched: these and their classes are compared."""

FILLED_IN = {"__annotations__", "__warningregistry__", "__abstractmethods__", "_abc_impl"}
"""Attributes that Python itself makes or replaces when a module or a class is used."""


class Small(Dataset[Tensor]):
    """Samples that are there already; every so many of them one takes a fixed CPU time."""

    def __init__(self, length: int, cpu_s: float = 0.0, every: int = 1) -> None:
        self.length, self.cpu_s, self.every, self.sample = length, cpu_s, every, torch.zeros(4)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if self.cpu_s and index % self.every == 0:
            spin(self.cpu_s)
        return self.sample


def count_of(samples: list[Tensor]) -> int:
    """Return how many there are, for a batch: it costs nothing to collate or to send."""
    return len(samples)


def loader_of(batches: int, size: int, *, workers: int = 1, cpu_s: float = 0.0, every: int = 1) -> DataLoader[Any]:
    context = multiprocessing.get_context("fork") if workers else None
    data = Small(batches * size, cpu_s, every)
    return DataLoader(data, size, num_workers=workers, collate_fn=count_of, multiprocessing_context=context)


def consume(loader: DataLoader[Any]) -> float:
    """Return the seconds from the first batch to the last, whose workers have ended then."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    seconds = time.perf_counter() - start
    del batches
    return seconds


def probed(run: Callable[[], float]) -> float:
    from bsprof.loader.probe import Probe

    with Probe():
        return run()


# --- (a) CPU time in the workers --------------------------------------------------------------------


def worker_cpu_s(batches: int, size: int, *, watched: bool) -> float:
    """Return the CPU seconds of a worker that makes so many batches, its start and its end among them."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    def run() -> float:
        return consume(loader_of(batches, size, cpu_s=BATCH_S, every=size))

    probed(run) if watched else run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class WorkerCost(NamedTuple):
    """What the probe adds in a worker."""

    batch_us: stats.Estimate
    sample_ns: stats.Estimate


def worker_cost(rounds: int, many: int = MANY) -> WorkerCost:
    order = random.Random(0)
    kinds = [(batches, size, watched) for batches in (FEW, many) for size in SIZES for watched in (False, True)]
    batch_us, sample_ns = [], []
    for _ in range(rounds):
        seconds = {kind: worker_cpu_s(kind[0], kind[1], watched=kind[2]) for kind in order.sample(kinds, len(kinds))}
        added = {
            size: (
                seconds[many, size, True]
                - seconds[FEW, size, True]
                - seconds[many, size, False]
                + seconds[FEW, size, False]
            )
            / (many - FEW)
            for size in SIZES
        }
        sample_s = (added[SIZES[1]] - added[SIZES[0]]) / (SIZES[1] - SIZES[0])
        sample_ns.append(1e9 * sample_s)
        batch_us.append(1e6 * (added[SIZES[0]] - SIZES[0] * sample_s))
    return WorkerCost(stats.median(batch_us), stats.median(sample_ns))


# --- (b) throughput ---------------------------------------------------------------------------------


def slowdown(rounds: int, batches: int = SLOW_BATCHES) -> stats.Estimate:
    """Return time with the probe / time without, for samples of 1 ms."""
    order = random.Random(1)
    times: dict[bool, list[float]] = {False: [], True: []}

    def run() -> float:
        return consume(loader_of(batches, SLOW_BATCH, cpu_s=SAMPLE_S))

    for _ in range(rounds):
        for watched in order.sample([False, True], 2):
            times[watched].append(probed(run) if watched else run())
    return stats.paired_ratio(times[True], times[False])


# --- (c) when it is over ----------------------------------------------------------------------------


def attributes(modules: list[ModuleType]) -> dict[str, object]:
    """Return every attribute of these modules and of the classes in them, by its full name."""
    found: dict[str, object] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            found[f"{module.__name__}.{name}"] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] == module.__name__.partition(".")[0]:
                found |= {f"{value.__module__}.{value.__qualname__}.{key}": a for key, a in list(vars(value).items())}
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of attributes that are another object now, or are there in one of the two alone."""
    missing = object()
    names = {name for name in before.keys() | after.keys() if name.rpartition(".")[2] not in FILLED_IN}
    return sorted(name for name in names if before.get(name, missing) is not after.get(name, missing))


def left_behind() -> tuple[list[str], list[str]]:
    """Return the attributes that are replaced inside a block, and those that still are after it."""
    from bsprof.loader.probe import Probe

    def loop() -> None:
        for workers in (0, 1):
            consume(loader_of(4, 2, workers=workers))

    modules = [importlib.import_module(name) for name in PATCHED]
    loop()  # what is imported at the first use is imported now
    before = attributes(modules)
    with Probe():
        loop()
        inside = changed(before, attributes(modules))
    return inside, changed(before, attributes(modules))


def after_ratio(pairs: int, batches: int = AFTER_BATCHES) -> stats.Estimate:
    """Return the time of a loop in a process that has watched / in one that never has."""
    order = random.Random(2)
    times: dict[str, list[float]] = {"never": [], "after": []}
    for _ in range(pairs):
        for kind in order.sample(list(times), 2):
            command = [sys.executable, "-m", "benchmarks.loader.overhead", "--child", kind, "--batches", str(batches)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            times[kind].append(float(done.stdout))
    return stats.paired_ratio(times["after"], times["never"])


def child(kind: str, batches: int) -> None:
    """Print the seconds of a loop over batches made in this process, where a patch left behind would show most."""

    def run() -> float:
        return consume(loader_of(batches, 8, workers=0))

    run()
    if kind == "after":
        probed(run)
    print(min(run() for _ in range(5)))


# --- the report -------------------------------------------------------------------------------------


class Row(NamedTuple):
    what: str
    value: float
    low: float | None
    high: float | None
    limit: float
    unit: str
    right: bool


def row(what: str, estimate: stats.Estimate, limit: float, unit: str) -> Row:
    return Row(what, estimate.value, estimate.low, estimate.high, limit, unit, estimate.value <= limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("never", "after"), help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=AFTER_BATCHES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments.child, arguments.batches)
        return
    inside, still = left_behind()
    rows = [Row("attributes still replaced afterwards", len(still), None, None, 0, f"of {len(inside)}", not still)]
    cost = worker_cost(arguments.rounds)
    rows.append(row("worker CPU added, a batch", cost.batch_us, BATCH_LIMIT_US, "us"))
    rows.append(row("worker CPU added, a sample", cost.sample_ns, SAMPLE_LIMIT_NS, "ns"))
    rows.append(row("time with the probe / without, 1 ms a sample", slowdown(arguments.rounds), SLOWDOWN_LIMIT, "x"))
    after = after_ratio(max(2, arguments.rounds * AFTER_PAIRS // ROUNDS))
    reached = (after.value if after.low is None else after.low) <= OFF_LIMIT
    rows.append(Row("a loop afterwards / never watched", *after[:3], OFF_LIMIT, "x", reached))
    for one in rows:
        between = "" if one.low is None or one.high is None else f" [{one.low:.4g}, {one.high:.4g}]"
        print(f"{'ok  ' if one.right else 'FAIL'}  {one.what}: {one.value:.4g}{between} {one.unit} (<= {one.limit:g})")
    for name in still:
        print(f"      {name}")
    if arguments.json:
        report = {"figures": [one._asdict() for one in rows], "replaced_inside": inside, "left_behind": still}
        report["environment"] = msgspec.to_builtins(describe_environment())
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(one.right for one in rows) else 1)


if __name__ == "__main__":
    main()
