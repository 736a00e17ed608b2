"""What watching a loader costs: CPU time in its workers, throughput, and nothing at all when it is over.

    python -m benchmarks.loader.overhead [--rounds N] [--json FILE]

(a) CPU time that a worker adds for each batch and each sample, on samples that cost nothing: one process that fetches
and pickles as a worker does, a few batches with the probe and a few without, in turns of some milliseconds; at two
batch sizes, which tell a batch's cost from a sample's. A batch's first sample computes for a fixed CPU time, so that
caches are as cold for the probe as beside real work. (Two workers, one of them watched, tell it to 30 us where
processors are shared: what being woken costs scatters by more than the probe takes.) (b) The throughput of samples
that take 1 ms. (c) After the block every attribute of the patched libraries is the object that it was, and a loop costs
what it costs in a process that has never watched. With 95 % intervals. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, _DatasetKind

from benchmarks.loader.faults import spin
from bsprof import stats
from bsprof.loader.worker import start_worker
from bsprof.sweep.runner import describe_environment

ROOT = Path(__file__).parents[2]
BATCH_LIMIT_US, SAMPLE_LIMIT_NS, SLOWDOWN_LIMIT = 10.0, 200.0, 1.01
OFF_LIMIT = 1.005
"""The same code in two processes: what its interval must reach down to."""
BATCH_S = 0.3e-3
TURN, TURNS, WARM_UP = 8, 1500, 50
"""Batches of a turn, turns of either kind in a process, and those before, in which the probe finds its rhythm."""
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


# --- (a) CPU time in a worker -----------------------------------------------------------------------


class WorkerCost(NamedTuple):
    """What the probe adds in a worker."""

    batch_us: stats.Estimate
    sample_ns: stats.Estimate


def worker_cost(rounds: int, turns: int = TURNS) -> WorkerCost:
    """Return what watching adds to each batch and to each sample: means over `rounds` processes of so many turns."""
    added_s = {size: [_in_a_child(size, turns) for _ in range(rounds)] for size in SIZES}
    few, many = SIZES
    sample_s = [(b - a) / (many - few) for a, b in zip(added_s[few], added_s[many], strict=True)]
    batch_s = [a - few * sample for a, sample in zip(added_s[few], sample_s, strict=True)]
    return WorkerCost(_mean(batch_s, 1e6), _mean(sample_s, 1e9))


def _mean(values: list[float], scale: float) -> stats.Estimate:
    """Return the mean with Student's t interval between processes: costs may be less than nothing by chance."""
    n, mean = len(values), statistics.fmean(values) * scale
    if n < 2:
        return stats.Estimate(mean, None, None, n, float(n))
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) * scale / math.sqrt(n)
    return stats.Estimate(mean, mean - half, mean + half, n, float(n))


def _in_a_child(size: int, turns: int) -> float:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=_take_turns, args=(size, turns, folder, theirs))
        child.start()
        theirs.close()
        try:
            seconds: float = ours.recv()
        finally:
            child.join()
    return seconds


def _take_turns(size: int, turns: int, folder: str, pipe: Any) -> None:
    """Send the CPU seconds that watching adds to a batch: fetched and pickled with it and without it, in turns."""
    data = Small(size, BATCH_S, every=size)
    indices = list(range(size))
    arguments = (data, True, count_of, False)
    plain_dumps = ForkingPickler.dumps
    plain = _DatasetKind.create_fetcher(_DatasetKind.Map, *arguments)
    start_worker(folder, 0, None, 0)
    watched_dumps = ForkingPickler.dumps
    watched = _DatasetKind.create_fetcher(_DatasetKind.Map, *arguments)

    def turn(fetcher: Any, dumps: Callable[[Any], Any]) -> int:
        begun = time.thread_time_ns()
        for number in range(TURN):
            dumps((number, fetcher.fetch(indices)))
        return time.thread_time_ns() - begun

    spent = {False: 0, True: 0}
    for number in range(-WARM_UP, turns):
        for is_watched in (False, True) if number % 2 else (True, False):
            ns = turn(watched, watched_dumps) if is_watched else turn(plain, plain_dumps)
            spent[is_watched] += ns if number >= 0 else 0
    pipe.send((spent[True] - spent[False]) / (turns * TURN) / 1e9)


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
    cost = worker_cost(max(2, arguments.rounds // 3))
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
