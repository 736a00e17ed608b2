"""Plants known times in the stages of a batch and holds what `bsprof` finds against them.

    python -m benchmarks.loader.attribution [--batches N] [--json FILE]

Four loaders with one or two workers each: stages in a Compose of either kind, the data set's own code and collate;
pickling and unpickling; page-locking (emulated); batches that come out of order. What is planted takes its time to the
microsecond on a quiet machine, and writes down what it really took: that is what each stage is held against, within
max(5 %, 0.2 ms) a batch. A data set's own code is all of `__getitem__` outside its transforms, so that is what is
written down: calling a transform right after a sleep has been seen to take 30 us on a machine with cold caches. For the
same reason it is timed while nobody watches. Nothing else may run meanwhile all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.loader.scenes import emulate_pinning
from bsprof.attribution import OWN, attribution, steps_of
from bsprof.loader.watching import watch
from bsprof.loading import Consumer, Loading
from bsprof.sweep.runner import describe_environment

RELATIVE, ABSOLUTE_S = 0.05, 0.2e-3
BATCHES = 150
BATCH = 4
STEP_S = 0.04
"""Longer than any batch takes, so that a worker never pickles one beside making the next."""
COLLATE_S, PICKLE_S, UNPICKLE_S, PIN_S = 5e-3, 6e-3, 4e-3, 3e-3
OWN_S, FIRST_S, SECOND_S = 1.5e-3, 2e-3, 0.5e-3
"""A sample."""
SLOW_S, FAST_S, SHORT_STEP_S = 30e-3, 10e-3, 8e-3
"""A batch of either worker where order is planted, and the step there."""
SPIN_S = 1e-3


STAGES = (OWN, "First", "Second", "collate", "serialise", "unpickle", "pin")
TAKEN_S = multiprocessing.RawArray("d", len(STAGES))
CALLS = multiprocessing.RawArray("q", len(STAGES))
"""What was really planted in each stage, shared with the one forked worker that has it."""


DONE_S = [multiprocessing.RawArray("d", 10 * BATCHES) for _worker in range(2)]
"""When each of two workers had made its n-th batch, on the clock that all processes share."""


def last(seconds: float, stage: str | None = None, since: float | None = None) -> float:
    """Return so much time after `since`, to the microsecond: sleep, and spin over the end, where a sleep wakes late."""
    now = time.perf_counter()
    start = now if since is None else since
    if (left := start + seconds - now) > SPIN_S:
        time.sleep(left - SPIN_S)
    while now - start < seconds:
        now = time.perf_counter()
    if stage is not None:
        write_down(stage, now - start)
    return now


def write_down(stage: str, seconds: float) -> None:
    place = STAGES.index(stage)
    TAKEN_S[place] += seconds
    CALLS[place] += 1


def taken_s(stage: str) -> float:
    """Return the mean of what a stage really took a call, and begin anew."""
    place = STAGES.index(stage)
    mean = TAKEN_S[place] / CALLS[place]
    TAKEN_S[place] = CALLS[place] = 0
    return mean


class First:
    """Fits into both kinds of Compose, as any callable."""

    def __call__(self, sample: Tensor) -> Tensor:
        last(FIRST_S, "First")
        return sample


class Second(v2.Transform):
    """The same, as a module: being called as one is among what it takes."""

    def __call__(self, *inputs: Any) -> Any:
        start = time.perf_counter()
        output = super().__call__(*inputs)
        write_down("Second", time.perf_counter() - start)
        return output

    def forward(self, *inputs: Any) -> Any:
        last(SECOND_S)
        return inputs[0]


@dataclass
class Timed(Dataset[Tensor]):
    transform: Any
    own_s: float = OWN_S

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Tensor:
        start = time.perf_counter()
        others_s = sum(TAKEN_S[:])
        sample = torch.full((16,), float(index))
        last(self.own_s, since=start)
        transformed = self.transform(sample)
        write_down(OWN, time.perf_counter() - start - (sum(TAKEN_S[:]) - others_s))
        return transformed


def collate(samples: list[Any]) -> Any:
    start = time.perf_counter()
    batch = default_collate(samples)
    last(COLLATE_S, "collate", start)
    return batch


class Parcel:
    """A batch that is slow to pickle and slow to unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        last(PICKLE_S, "serialise")
        return unpack, ()


def unpack() -> Parcel:
    last(UNPICKLE_S, "unpickle")
    return Parcel()


def parcel(samples: list[Any]) -> Parcel:
    return Parcel()


class TwoPaces(IterableDataset[Tensor]):
    """Whole batches, of which the first worker's take longer."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        assert worker is not None
        for made in itertools.count():
            DONE_S[worker.id][made % len(DONE_S[worker.id])] = last(FAST_S if worker.id else SLOW_S)
            yield torch.zeros(16)


class Row(NamedTuple):
    loader: str
    stage: str
    planted_s: float
    found_s: float | None

    @property
    def allowed_s(self) -> float:
        return max(RELATIVE * self.planted_s, ABSOLUTE_S)

    @property
    def right(self) -> bool:
        return self.found_s is not None and abs(self.found_s - self.planted_s) <= self.allowed_s


def held_against(loader: str, loading: Loading, planted: dict[str, float], step_s: float) -> list[Row]:
    """Return a row for each planted stage, and one for the consumer's own part of the step."""
    found = {row.name: row.wall_s for row in attribution(loading)}
    rows = [Row(loader, stage, planted_s, found.get(stage)) for stage, planted_s in planted.items()]
    busy = steps_of(loading).busy_s
    known = busy[busy == busy]
    return [*rows, Row(loader, "step", step_s, float(known.mean()) if known.size else None)]


def watched(loader: DataLoader[Any], step_s: float, batches: int, asked_s: list[float] | None = None) -> Loading:
    """Return what is seen of so many steps, and add to `asked_s` when each of them had ended."""
    consumer = Consumer(kind="fixed", step_ns=round(step_s * 1e9))
    ends = [] if asked_s is None else asked_s
    return watch(
        loader,
        seconds=batches * step_s,
        step=lambda batch: ends.append(last(step_s)),
        consumer=consumer,
        thorough=False,
    )


def unwatched(loader: DataLoader[Any], step_s: float, batches: int) -> dict[str, float]:
    """Return what each stage of this loader takes a call while nobody watches."""
    TAKEN_S[:], CALLS[:] = [0.0] * len(STAGES), [0] * len(STAGES)
    for _batch in itertools.islice(loader, batches):
        last(step_s)
    return {stage: taken_s(stage) for stage in STAGES if CALLS[STAGES.index(stage)]}


def out_of_order_s(asked_s: list[float]) -> float:
    """Return for how long a batch, on average, made the consumer wait although the next one was there already.

    The slow worker makes the even ones, the fast worker the odd ones. `asked_s[k]` is when batch k + 1 was asked for.
    """
    slow, fast = DONE_S
    waits = [
        max(0.0, slow[number] - max(asked, fast[number]))
        for number, asked in enumerate(asked_s[1::2], start=1)
        if number < min(len(slow), len(fast))
    ]
    return sum(waits) / len(waits) / 2


def measure(batches: int) -> list[Row]:
    fork = multiprocessing.get_context("fork")
    rows = []
    quick = Timed(torch.nn.Identity(), own_s=0.0)
    for name, compose in (("Compose v1", transforms.Compose), ("Compose v2", v2.Compose)):
        data = Timed(compose([First(), Second()]))
        loader = DataLoader(data, BATCH, num_workers=1, collate_fn=collate, multiprocessing_context=fork)
        planted = unwatched(loader, STEP_S, batches)
        planted.update({stage: BATCH * planted[stage] for stage in (OWN, "First", "Second")})
        rows += held_against(name, watched(loader, STEP_S, batches), planted, STEP_S)

    loader = DataLoader(quick, BATCH, num_workers=1, collate_fn=parcel, multiprocessing_context=fork)
    loading = watched(loader, STEP_S, batches)
    rows += held_against("pickling", loading, {stage: taken_s(stage) for stage in ("serialise", "unpickle")}, STEP_S)

    with contextlib.ExitStack() as stack:
        emulate_pinning(stack, PIN_S, lambda seconds: last(seconds, "pin"))
        loader = DataLoader(quick, BATCH, num_workers=1, pin_memory=True, multiprocessing_context=fork)
        loading = watched(loader, STEP_S, batches)
        rows += held_against("page-locking", loading, {"pin": taken_s("pin")}, STEP_S)

    # The fast worker begins a batch a step after the slow one, which is asked for a step later: from when the fast one
    # is done until the slow one is, the consumer waits for its turn. That is once in two batches.
    loader = DataLoader(TwoPaces(), None, num_workers=2, prefetch_factor=1, multiprocessing_context=fork)
    asked_s: list[float] = []
    loading = watched(loader, SHORT_STEP_S, 2 * batches, asked_s)
    return [*rows, *held_against("order", loading, {"ordering": out_of_order_s(asked_s)}, SHORT_STEP_S)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.batches)
    print(f"{'loader':14}{'stage':12}{'planted':>11}{'found':>11}{'difference':>12}{'allowed':>11}")
    for row in rows:
        found, off = ("-", "-") if row.found_s is None else _ms(row.found_s, row.found_s - row.planted_s)
        planted, allowed = _ms(row.planted_s, row.allowed_s)
        mark = "" if row.right else "  FAIL"
        print(f"{row.loader:14}{row.stage:12}{planted:>11}{found:>11}{off:>12}{allowed:>11}{mark}")
    if arguments.json:
        found_rows = [{**row._asdict(), "allowed_s": row.allowed_s, "right": row.right} for row in rows]
        report = {"stages": found_rows, "environment": msgspec.to_builtins(describe_environment())}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(row.right for row in rows) else 1)


def _ms(*seconds: float) -> tuple[str, ...]:
    return tuple(f"{1e3 * value:.3f} ms" for value in seconds)


if __name__ == "__main__":
    main()
