"""The zoo: each fault as a loader that has it and a consumer whose step it holds up, and the same without the fault.

Times are given in steps of the consumer, and CPU work as a load: 2 means that as many workers as there are cores, all
at it, need two steps for a batch. So the faults are as large on any machine, and at each `scale`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.loader import faults

STEP_S = 0.02
"""The consumer's step at scale 1."""
LONG = 1_000_000
"""Samples of an epoch that does not end while it is watched."""
BATCH = 4
FORK, SPAWN = "fork", "spawn"


class Unable(Exception):
    """The machine cannot have that fault; says why."""


class Scene(NamedTuple):
    """A loader and how long its consumer's step takes."""

    loader: DataLoader[Any]
    step_s: float


class Conditions(NamedTuple):
    """Under which a scene is built."""

    method: str
    """How workers are started."""
    scale: float
    healthy: bool
    """Without the fault."""
    directory: Path
    """For files; emptied by who made it."""
    stack: contextlib.ExitStack
    """Undoes what the scene started."""

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def step_s(self) -> float:
        return STEP_S * self.scale

    def sample_s(self, load: float) -> float:
        """CPU seconds a sample at that load."""
        return load * self.step_s * self.cores / BATCH

    def load(
        self, dataset: Any, workers: int | None = None, *, batch: int = BATCH, **arguments: Any
    ) -> DataLoader[Any]:
        """Return a loader with that many workers, one a core where none is said."""
        workers = self.cores if workers is None else workers
        context = multiprocessing.get_context(self.method) if workers else None
        return DataLoader(dataset, batch, num_workers=workers, multiprocessing_context=context, **arguments)

    def scene(self, dataset: Any, workers: int | None = None, **arguments: Any) -> Scene:
        return Scene(self.load(dataset, workers, **arguments), self.step_s)


# --- too few, too many, in each other's way ---------------------------------------------------------


def no_workers(at: Conditions) -> Scene:
    return at.scene(faults.Planted(LONG, cpu_s=0.5 * at.step_s / BATCH), 1 if at.healthy else 0)


def too_few_workers(at: Conditions) -> Scene:
    return at.scene(faults.Planted(LONG, blocked_s=1.7 * at.step_s / BATCH), 3 if at.healthy else 1)


def too_few_for_cpu_work(at: Conditions) -> Scene:
    if at.cores < 2:
        raise Unable("needs two cores")
    return at.scene(faults.Planted(LONG, cpu_s=1.4 * at.step_s / BATCH), 2 if at.healthy else 1)


def cpu_saturated(at: Conditions) -> Scene:
    return at.scene(faults.Planted(LONG, cpu_s=at.sample_s(0.4 if at.healthy else 2)), 3 * at.cores)


def cpu_contended(at: Conditions) -> Scene:
    """Enough by itself, and too little beside one process a core that never stops: see `Fault.hogged`."""
    return at.scene(faults.Planted(LONG, cpu_s=at.sample_s(0.65)))


def thread_oversubscription(at: Conditions) -> Scene:
    one = faults.Arithmetic(100, LONG)
    operations = max(1, round(one.operations * at.sample_s(0.5) / _cpu_s(lambda: one[0])))
    threads = faults.ManyThreads(1 if at.healthy else 8 * at.cores)
    return at.scene(faults.Arithmetic(operations, LONG), worker_init_fn=threads)


def affinity_shrunk(at: Conditions) -> Scene:
    if at.cores < 2:
        raise Unable("needs two cores")
    init = None if at.healthy else faults.on_one_core
    return at.scene(faults.Planted(LONG, cpu_s=at.sample_s(0.7)), worker_init_fn=init)


# --- a stage that is slow ---------------------------------------------------------------------------


def slow_decode(at: Conditions) -> Scene:
    side = round(1600 * at.scale**0.5)
    large = _jpegs(at.directory / "large", side)
    step_s = BATCH * _cpu_s(lambda: large[0]) / at.cores / 2
    return Scene(at.load(_jpegs(at.directory / "small", side // 4) if at.healthy else large), step_s)


def slow_transform_v1(at: Conditions) -> Scene:
    slow_s, fast_s = at.sample_s(0.2 if at.healthy else 1.8), at.sample_s(0.2)
    return at.scene(faults.Planted(LONG, transform=transforms.Compose([faults.Jitter(fast_s), faults.Blur(slow_s)])))


def slow_transform_v2(at: Conditions) -> Scene:
    slow_s, fast_s = at.sample_s(0.2 if at.healthy else 1.8), at.sample_s(0.2)
    return at.scene(faults.Planted(LONG, transform=v2.Compose([faults.Warp(slow_s), faults.Jitter(fast_s)])))


def slow_own_code(at: Conditions) -> Scene:
    return at.scene(faults.Planted(LONG, cpu_s=at.sample_s(0.4 if at.healthy else 2)))


def per_item_overhead(at: Conditions) -> Scene:
    numbers = np.random.default_rng(0).random((4096, 16)).round(4)
    lines = faults.Lines([",".join([str(i), *map(str, row)]) for i, row in enumerate(numbers.tolist())], LONG)
    thousand_s = _cpu_s(lambda: default_collate([lines[i] for i in range(1000)]))
    step_s = at.step_s / 2
    batch = round(1000 * 2 * step_s * at.cores / thousand_s)
    if not at.healthy:
        return Scene(at.load(lines, batch=batch, persistent_workers=True), step_s)
    rows = faults.Rows(torch.tensor(numbers, dtype=torch.float32), torch.arange(len(numbers)), LONG)
    return Scene(at.load(rows, batch=batch, collate_fn=faults.as_made, persistent_workers=True), step_s)


def slow_collate(at: Conditions) -> Scene:
    collate = faults.SpinningCollate(BATCH * at.sample_s(0.2 if at.healthy else 1.6))
    return at.scene(faults.Planted(LONG, cpu_s=at.sample_s(0.3)), collate_fn=collate)


# --- uneven work ------------------------------------------------------------------------------------

HOT = 37


def hot_sample(at: Conditions) -> Scene:
    sample_s = at.sample_s(0.7)
    hot = {} if at.healthy else {HOT: 50 * sample_s}
    return at.scene(faults.Planted(_pass_samples(at), cpu_s=sample_s, hot=hot), sampler=_passes(at))


def small_prefetch(at: Conditions) -> Scene:
    seldom = faults.Planted(LONG, blocked_s=0.4 * at.step_s / BATCH, rare_s=6 * at.step_s, rare_share=0.12 / BATCH)
    return at.scene(seldom, 2, prefetch_factor=16 if at.healthy else 1)


def uneven_workers(at: Conditions) -> Scene:
    sample_s = at.step_s / BATCH
    shards = (1.5 * sample_s, 1.5 * sample_s) if at.healthy else (2.8 * sample_s, 0.2 * sample_s)
    return at.scene(faults.Shards(shards, LONG), 2)


# --- storage and locks ------------------------------------------------------------------------------


def cold_disk(at: Conditions) -> Scene:
    piece = np.random.default_rng(0).bytes(1 << 20)
    paths = [at.directory / f"{i}.bin" for i in range(32)]
    for path in paths:
        with path.open("wb") as file:
            for _ in range(round(4 * at.scale)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # dirty pages cannot be evicted
    cold, warm = (faults.Files(paths, LONG, evict=evict) for evict in (True, False))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    cold_s = _wall_s(lambda: cold[0])
    if resource.getrusage(resource.RUSAGE_SELF).ru_inblock == before:
        raise Unable(f"{at.directory} is not on a disk that can be read cold")
    for i in range(len(paths)):
        warm[i]
    if _wall_s(lambda: warm[0]) > cold_s / 4:
        raise Unable("the disk is not four times slower than the page cache")
    batch = 4 * BATCH
    return Scene(at.load(warm if at.healthy else cold, batch=batch), batch * cold_s / at.cores / 2)


def slow_storage(at: Conditions) -> Scene:
    """Ask a server that serves one request at a time: more workers get no more out of it."""
    seconds = (0.4 if at.healthy else 2) * at.step_s / BATCH
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.loader.storage", str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    at.stack.enter_context(server)
    at.stack.callback(server.kill)
    assert server.stdout is not None
    return at.scene(faults.Remote(int(server.stdout.readline()), LONG), 4)


def lock(at: Conditions) -> Scene:
    return at.scene(faults.Locked(LONG, _locks(at, 4), held_s=2 * at.step_s / BATCH), 4)


def lock_around_cpu_work(at: Conditions) -> Scene:
    if at.cores < 2:
        raise Unable("needs two cores")
    return at.scene(faults.Locked(LONG, _locks(at, 4), held_s=1.4 * at.step_s / BATCH, spinning=True), 4)


# --- what a batch is made of ------------------------------------------------------------------------


def large_payload(at: Conditions) -> Scene:
    values = round(64 * at.scale * 2**20) // 4 // BATCH
    large, small = (faults.Frames(values, dtype, LONG) for dtype in (torch.float32, torch.uint8))
    step_s = _wall_s(lambda: _into_shared_memory([large[0]] * BATCH)) / at.cores / 2
    return Scene(at.load(small if at.healthy else large), step_s)


def many_tensors(at: Conditions) -> Scene:
    _raise_open_files_limit()
    return Scene(at.load(faults.Fields(round(200 * at.scale), at.healthy, LONG), 2), at.step_s / 2)


def pinning(at: Conditions) -> Scene:
    emulate_pinning(at.stack, (0.1 if at.healthy else 2) * at.step_s)
    return at.scene(faults.Planted(LONG, blocked_s=0.3 * at.step_s / BATCH), 1, pin_memory=True)


# --- the consuming process --------------------------------------------------------------------------


def gil_held(at: Conditions) -> Scene:
    if not at.healthy:
        stop = threading.Event()
        thread = threading.Thread(target=_hold_gil, args=(stop,), daemon=True)
        at.stack.callback(thread.join)
        at.stack.callback(stop.set)
        thread.start()
    return at.scene(faults.Planted(LONG, blocked_s=0.3 * at.step_s / BATCH), 1)


# --- starting ---------------------------------------------------------------------------------------


def epoch_restart(at: Conditions) -> Scene:
    data = faults.Planted(12 * BATCH, blocked_s=0.5 * at.step_s / BATCH)
    return at.scene(data, 2, worker_init_fn=faults.Sleeping(5 * at.step_s), persistent_workers=at.healthy)


def slow_start(at: Conditions) -> Scene:
    data = faults.Planted(100 * BATCH, blocked_s=0.5 * at.step_s / BATCH)
    init = faults.Sleeping(0.0 if at.healthy else 1 + at.scale)
    return at.scene(data, 2, worker_init_fn=init, persistent_workers=True)


def slow_start_by_pickling(at: Conditions) -> Scene:
    entries = 1000 if at.healthy else round(1_500_000 * at.scale)
    listing = tuple((f"class{i % 1000}/image{i}.jpg", i % 1000) for i in range(entries))
    data = faults.Planted(100 * BATCH, blocked_s=0.5 * at.step_s / BATCH, payload=listing)
    return at.scene(data, 2, persistent_workers=True)


# --- what runs out ----------------------------------------------------------------------------------


def memory_growth(at: Conditions) -> Scene:
    kept = 0 if at.healthy else round(64 * at.scale) << 10
    return at.scene(faults.Growing(LONG, kept, cpu_s=0.3 * at.step_s / BATCH), 1)


def shm_low(at: Conditions) -> Scene:
    """Fill, nearly, the shared memory that `Fault.shm_mb` gives: five batches in flight, two kept by who watches."""
    values = round(4 * at.scale * 2**20) // 4 // BATCH
    return at.scene(faults.Frames(values, torch.float32, LONG), 2)


def fds_low(at: Conditions) -> Scene:
    if not at.healthy:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = round(512 * at.scale)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        while limit - len(list(Path("/proc/self/fd").iterdir())) > 40:  # enough for two workers and what watches them
            at.stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
    return at.scene(faults.Planted(LONG, blocked_s=0.3 * at.step_s / BATCH), 2)


# --- two at once ------------------------------------------------------------------------------------


def transform_and_collate(at: Conditions) -> Scene:
    blur, collate = (0.2, 0.2) if at.healthy else (1.5, 0.7)
    chain = transforms.Compose([faults.Blur(at.sample_s(blur))])
    spinning = faults.SpinningCollate(BATCH * at.sample_s(collate))
    return at.scene(faults.Planted(LONG, transform=chain), collate_fn=spinning)


def two_transforms(at: Conditions) -> Scene:
    blur, jitter = (0.2, 0.2) if at.healthy else (1.6, 0.8)
    chain = transforms.Compose([faults.Jitter(at.sample_s(jitter)), faults.Blur(at.sample_s(blur))])
    return at.scene(faults.Planted(LONG, transform=chain))


def restart_and_transform(at: Conditions) -> Scene:
    return _restart_and_transform(at, start_steps=16, blur=1.6)


def transform_and_restart(at: Conditions) -> Scene:
    return _restart_and_transform(at, start_steps=4, blur=2.5)


def hot_and_collate(at: Conditions) -> Scene:
    hot = {} if at.healthy else {HOT: 40 * at.step_s}
    collate = faults.SpinningCollate(BATCH * at.sample_s(0.2 if at.healthy else 1.4))
    data = faults.Planted(_pass_samples(at), cpu_s=at.sample_s(0.2), hot=hot)
    return at.scene(data, sampler=_passes(at), collate_fn=collate)


def collate_and_growth(at: Conditions) -> Scene:
    kept = 0 if at.healthy else round(64 * at.scale) << 10
    collate = faults.SpinningCollate(BATCH * at.sample_s(0.2 if at.healthy else 1.6))
    return at.scene(faults.Growing(LONG, kept), collate_fn=collate)


def _restart_and_transform(at: Conditions, *, start_steps: float, blur: float) -> Scene:
    chain = transforms.Compose([faults.Blur(at.sample_s(0.3 if at.healthy else blur))])
    return at.scene(
        faults.Planted(12 * BATCH, transform=chain),
        worker_init_fn=faults.Sleeping(0.0 if at.healthy else start_steps * at.step_s),
        persistent_workers=at.healthy,
    )


# --- what they are built with -----------------------------------------------------------------------


def _pass_samples(at: Conditions) -> int:
    return 32 * max(at.cores, 2)


def _passes(at: Conditions) -> list[int]:
    """Many passes over the same samples without an epoch's end between them."""
    return list(range(_pass_samples(at))) * 200


def _locks(at: Conditions, workers: int) -> list[Any]:
    context = multiprocessing.get_context(at.method)
    return [context.Lock() for _ in range(workers if at.healthy else 1)]


def _jpegs(directory: Path, side: int) -> faults.Jpegs:
    directory.mkdir()
    paths = [directory / f"{i}.jpg" for i in range(4)]
    for i, path in enumerate(paths):
        coarse = np.random.default_rng(i).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return faults.Jpegs(paths, LONG)


def _into_shared_memory(samples: list[torch.Tensor]) -> None:
    """Stack samples the way default_collate does in a worker."""
    storage = samples[0]._typed_storage()._new_shared(sum(s.numel() for s in samples), device="cpu")
    out = samples[0].new(storage).resize_(len(samples), *samples[0].shape)
    torch.stack(samples, 0, out=out)


def _cpu_s(make: Callable[[], object]) -> float:
    return _median_s(make, time.thread_time)


def _wall_s(make: Callable[[], object]) -> float:
    return _median_s(make, time.perf_counter)


def _median_s(make: Callable[[], object], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(5):
        start = clock()
        make()
        times.append(clock() - start)
    return statistics.median(times)


def _hold_gil(stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        for _ in range(100_000):
            number += 1


def _raise_open_files_limit() -> None:
    """Each tensor in flight holds a file descriptor in the consuming process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def emulate_pinning(stack: contextlib.ExitStack, seconds: float, wait: Callable[[float], None] = time.sleep) -> None:
    """Let DataLoader believe that there is an accelerator, and page-lock a tensor by copying it slowly."""

    def pin_memory(tensor: torch.Tensor, device: object = None) -> torch.Tensor:
        wait(seconds)
        return tensor.clone()

    def device(check_available: bool = False) -> torch.device:
        return torch.device("cpu")

    for place, name, stand_in in (
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", device),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "set_device_index", lambda index: None),
        (torch.Tensor, "pin_memory", pin_memory),
    ):
        stack.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, stand_in)


# --- the table --------------------------------------------------------------------------------------


class Cause(NamedTuple):
    """A cause that must be named."""

    code: str
    names: str = ""
    """What its text or evidence must contain: the stage, the index."""


class Fault(NamedTuple):
    """One row of the zoo."""

    name: str
    causes: tuple[Cause, ...]
    """Largest first; but where `hogged`, in any order."""
    build: Callable[[Conditions], Scene]
    methods: tuple[str, ...] = (FORK, SPAWN)
    hogged: bool = False
    """Beside one process a core that spins, started by somebody else."""
    shm_mb: tuple[int, int] | None = None
    """Shared memory at scale 1 with the fault and without, in a mount namespace of its own."""
    costs_steps: bool = True
    """Whether a stopwatch over the steps shows it: a risk, or a slow start, does not."""
    seconds: float = 4.0
    """For how long it is watched from the first batch on."""


def _one(code: str, build: Callable[[Conditions], Scene], name: str = "", names: str = "", **more: Any) -> Fault:
    return Fault(name or code, (Cause(code, names),), build, **more)


FAULTS = (
    _one("no_workers", no_workers, methods=(FORK,)),
    _one("too_few_workers", too_few_workers),
    _one("too_few_workers", too_few_for_cpu_work, "too_few_workers_cpu"),
    _one("cpu_saturated", cpu_saturated),
    _one("cpu_contended", cpu_contended, hogged=True),
    _one("thread_oversubscription", thread_oversubscription),
    _one("affinity_shrunk", affinity_shrunk),
    _one("slow_stage", slow_decode, "slow_decode", "decode"),
    _one("slow_stage", slow_transform_v1, "slow_transform_v1", "Blur"),
    _one("slow_stage", slow_transform_v2, "slow_transform_v2", "Warp"),
    _one("slow_stage", slow_own_code, "slow_own_code"),
    _one("per_item_overhead", per_item_overhead),
    _one("slow_collate", slow_collate),
    _one("hot_sample", hot_sample, names=str(HOT)),
    _one("small_prefetch", small_prefetch),
    _one("uneven_workers", uneven_workers),
    _one("cold_disk", cold_disk),
    _one("slow_storage", slow_storage),
    _one("lock", lock),
    _one("lock", lock_around_cpu_work, "lock_cpu"),
    _one("large_payload", large_payload),
    _one("many_tensors", many_tensors),
    _one("gil_held", gil_held),
    _one("pinning", pinning),
    _one("epoch_restart", epoch_restart),
    _one("slow_start", slow_start, methods=(FORK,), costs_steps=False),
    _one("slow_start", slow_start_by_pickling, "slow_start_pickled", methods=(SPAWN,), costs_steps=False),
    _one("memory_growth", memory_growth, costs_steps=False, seconds=8.0),
    _one("shm_low", shm_low, shm_mb=(40, 512), costs_steps=False),
    _one("fds_low", fds_low, costs_steps=False),
    Fault("transform+collate", (Cause("slow_stage", "Blur"), Cause("slow_collate")), transform_and_collate),
    Fault("two_transforms", (Cause("slow_stage", "Blur"), Cause("slow_stage", "Jitter")), two_transforms),
    Fault("restart+transform", (Cause("epoch_restart"), Cause("slow_stage", "Blur")), restart_and_transform),
    Fault(
        "transform+restart",
        (Cause("slow_stage", "Blur"), Cause("epoch_restart")),
        transform_and_restart,
        methods=(FORK,),  # a spawned worker takes seconds to start, so that the restart is always the larger
    ),
    Fault("hot+collate", (Cause("hot_sample", str(HOT)), Cause("slow_collate")), hot_and_collate),
    Fault("collate+growth", (Cause("slow_collate"), Cause("memory_growth")), collate_and_growth, seconds=8.0),
    Fault("hog+transform", (Cause("cpu_contended"), Cause("slow_stage", "Blur")), slow_transform_v1, hogged=True),
    Fault("hog+collate", (Cause("cpu_contended"), Cause("slow_collate")), slow_collate, hogged=True),
    Fault("hog+hot", (Cause("cpu_contended"), Cause("hot_sample", str(HOT))), hot_sample, hogged=True),
)


@contextlib.contextmanager
def built(fault: Fault, method: str, scale: float, healthy: bool, directory: Path) -> Iterator[Scene]:
    """Build a fault's scene and undo all that it needed. Raises Unable where this machine cannot have it."""
    with contextlib.ExitStack() as stack:
        yield fault.build(Conditions(method, scale, healthy, directory, stack))
