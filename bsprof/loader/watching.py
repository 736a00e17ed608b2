"""Watch what loaders do: in a loop of one's own, or one loader consumed at a given pace."""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch

from bsprof import store
from bsprof.diagnosis import diagnose
from bsprof.errors import BsprofError
from bsprof.loader import looks
from bsprof.loader.probe import Probe
from bsprof.loader.recording import ABSENT
from bsprof.loader.worker import payload
from bsprof.loading import MAIN, Batches, Consumer, Diagnosis, Loading, MachineUse, Rate, Resources, Worker
from bsprof.measure import counters, environment
from bsprof.measure.clock import host_clock, present_device
from bsprof.measure.crew import cores_to_be_had
from bsprof.measure.environment import cores_of_this_process
from bsprof.measure.failures import blame_a_worker
from bsprof.measure.signals import held_back
from bsprof.model import Case, Facts, Measurement, Outcome, Result

Batch = TypeVar("Batch")
Step = Callable[[Any], None]
"""What the consumer does with a batch."""

KEPT_BATCHES = 2
KEPT_BYTES = 64 * 2**20
"""Batches kept for the steps without a loader. They hold shared memory, so few."""

FEWEST_BATCHES = 30
PATIENCE = 1.5
"""Where so many batches do not come in the time given, it is lengthened by this factor at the most."""

CACHED_SHARE = 0.2
"""Steps on kept batches may take this share of the time that the loader is watched."""
CACHED_STEPS = 50

GIL_NAP_S = 1e-3
GIL_NAPS = 20
ASIDE_PERIOD_S = 0.5
MOST_NAPS = 4000
"""A thread that sleeps shows who holds the interpreter's lock: 20 naps of 1 ms twice a second, 0.1 % of a core."""


class Watching:
    """Records every DataLoader that is iterated in a `with` block, and what the machine does meanwhile.

    In a loop of your own::

        with bsprof.watch_loaders() as probe:
            for images, labels in loader:
                ...
        print(probe.diagnosis().sentence)
        probe.save("loader.json")                       # `bsprof show loader.json`

    What is no DataLoader is watched from the consumer's side: `for batch in probe.watch(generator())`. Patches are in
    place inside the block and nowhere else; order, values and random numbers stay as they are. It watches once:
    entering it again, or where loaders are already watched, raises BsprofError.
    """

    def __init__(self, consumer: Consumer | None = None) -> None:
        self._consumer = consumer or Consumer(kind="loop")
        self._probe = Probe()
        self._aside = _Aside()
        self._undo = contextlib.ExitStack()
        self._looks: list[looks.Look] = []
        self._before: counters.Machine | None = None
        self._use: MachineUse | None = None
        self._cpu_began_ns = 0
        self._cpu_ns = 0

    def __enter__(self) -> Watching:
        with contextlib.ExitStack() as undo:
            folder = tempfile.mkdtemp(prefix="bsprof-looks-")
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            looking = looks.Looking(Path(folder) / "looks")
            undo.callback(self._stop_looking, looking)
            looking.start()
            self._before = counters.read_machine()
            self._cpu_began_ns = time.process_time_ns()
            # What the loop did ends with the probe, left first; all else is waited for and read after it.
            undo.callback(self.close_window)
            undo.callback(self._aside.stop)
            undo.enter_context(self._probe)
            self._aside.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with held_back():  # torch raises wherever the main thread is when it hears that a worker has died
            self._undo.__exit__(kind, error, traceback)

    def close_window(self) -> None:
        """Read what the machine did up to now; workers that end later would be counted as somebody else's."""
        if self._use is None and self._before is not None:
            self._use = counters.machine_use(self._before, counters.read_machine(), float(cores_of_this_process()))
            self._cpu_ns = time.process_time_ns() - self._cpu_began_ns

    def _stop_looking(self, looking: looks.Looking) -> None:
        looking.close()
        self._looks = looking.looks()

    def watch(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """Return `batches`, watched: a DataLoader as it is, anything else in a wrapper that times its next()."""
        return self._probe.watch(batches)

    def loadings(self) -> list[Loading]:
        """Return what was seen, one Loading for each loader, the one that gave the most batches first."""
        return [self._whole(loading) for loading in self._probe.loadings()]

    def loading(self) -> Loading:
        """Return the Loading of the loader that gave the most batches. Raises ValueError where none was iterated."""
        found = self._probe.loadings()
        if not found:
            raise ValueError("no loader was iterated while it was watched")
        return self._whole(found[0])

    def diagnosis(self) -> Diagnosis:
        """Return what is wrong with that loader. Raises ValueError where none was iterated."""
        return diagnose(self.loading())

    def result(self) -> Result:
        """Return a Result with one Measurement for each loader, diagnosed. Raises ValueError where there was none."""
        found = self.loadings()
        if not found:
            raise ValueError("no loader was iterated while it was watched")
        return Result(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            plan=None,
            environment=environment.collect(Path.cwd()),
            measurements=[
                measurement_of(loading, "loader" if len(found) == 1 else f"loader {number}")
                for number, loading in enumerate(found, 1)
            ],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `result()` to `path` (.json or .json.gz); `bsprof show` prints it."""
        store.save(self.result(), Path(path))

    def _whole(self, loading: Loading) -> Loading:
        """Add to what the probe saw what was seen from outside."""
        return msgspec.structs.replace(
            loading,
            consumer=msgspec.structs.replace(self._consumer, cpu_share=loading.consumer.cpu_share),
            workers=tuple(self._looked_at(worker, loading.batches) for worker in loading.workers),
            machine=self._machine(loading),
            resources=self._aside.resources(),
            gil_overshoot_ns=self._aside.overshoot_ns or None,
        )

    def _machine(self, loading: Loading) -> MachineUse | None:
        """Return what the machine did, workers that a fork server started and reaped among our own."""
        if self._use is None or self._use.own_cores is None:
            return self._use
        made = zip(loading.batches.worker, loading.batches.process_cpu_ns, strict=True)
        in_workers_ns = sum(cpu or 0 for worker, cpu in made if worker != MAIN)  # MAIN's is in our own
        seen = (self._cpu_ns + in_workers_ns) / max(1, loading.window_ns)
        missed = max(0.0, seen - self._use.own_cores)
        foreign = self._use.foreign_cores
        return msgspec.structs.replace(
            self._use,
            own_cores=self._use.own_cores + missed,
            foreign_cores=None if foreign is None else max(0.0, foreign - missed),
        )

    def _looked_at(self, worker: Worker, batches: Batches) -> Worker:
        if worker.id == MAIN:
            return worker
        spans = sorted(
            (begun + self._probe.began_ns, produced + self._probe.began_ns)
            for number, begun, produced in zip(batches.worker, batches.begun_at_ns, batches.produced_at_ns, strict=True)
            if number == worker.id and begun is not None and produced is not None
        )
        own = [look for look in self._looks if look.pid == worker.pid]
        blocked_in, seen = looks.during(own, [begun for begun, _ in spans], [produced for _, produced in spans])
        last = own[-1].blocked_in if own else None
        return msgspec.structs.replace(worker, blocked_in=blocked_in, looks=seen, last_seen_in=last)


def watch_loaders() -> Watching:
    """Return a context manager that records every DataLoader iterated inside it."""
    return Watching()


def measurement_of(loading: Loading, name: str) -> Measurement:
    """Return the Measurement that carries `loading` and its diagnosis."""
    return Measurement(
        case=Case(key=name),
        outcome=Outcome(kind="ok"),
        wall_s=loading.window_ns / 1e9,
        facts=Facts(device=str(present_device()), threads=torch.get_num_threads()),
        loading=loading,
        diagnosis=diagnose(loading),
    )


# --- one loader at a given pace ---------------------------------------------------------------------


class Watched(NamedTuple):
    """What was seen of a loader until it was enough, or until the loader failed."""

    loading: Loading | None
    """Null where it failed before its first pass began."""
    error: BaseException | None


def watch(
    loader: Iterable[Any], *, seconds: float, step: Step | None = None, consumer: Consumer, thorough: bool = True
) -> Loading:
    """Consume `loader` for `seconds` from its first batch on, epoch after epoch, with a `step` after each batch.

    `thorough` also measures the cores to be had, before, and the step on batches that are already there, after: 0.5 s
    and up to a fifth of `seconds` more. Raises BsprofError where the loader gives nothing, and whatever it raises.
    """
    watched = try_to_watch(loader, seconds=seconds, step=step, consumer=consumer, thorough=thorough)
    if watched.error is not None:
        raise watched.error
    assert watched.loading is not None
    return watched.loading


def try_to_watch(
    loader: Iterable[Any], *, seconds: float, step: Step | None = None, consumer: Consumer, thorough: bool = True
) -> Watched:
    """Do what `watch` does, and return what was seen although the loader, or the step, raised an Exception."""
    capacity = cores_or_none() if thorough else None
    kept: list[Any] = []
    failure: Exception | None = None
    watching = Watching(consumer)
    try:
        with watching:
            try:
                try:
                    _consume(watching.watch(loader), seconds, step, watching, kept)
                except (OSError, EOFError):
                    blame_a_worker()
                    raise
            except Exception as error:
                failure = error
    except Exception as error:  # a signal's, that was held back until all was cleaned up
        failure = failure or error
    found = watching.loadings()
    if not found:
        return Watched(None, failure)
    cached = steps_on(kept, step, seconds * CACHED_SHARE) if thorough and step and not failure else None
    return Watched(msgspec.structs.replace(found[0], capacity_cores=capacity, cached_step_ns=cached), failure)


def cores_or_none() -> Rate | None:
    """Return the cores to be had now, or None where no processes can be started to find out."""
    try:
        return cores_to_be_had(cores_of_this_process())
    except (RuntimeError, OSError):
        return None


def _consume(loader: Iterable[Any], seconds: float, step: Step | None, watching: Watching, kept: list[Any]) -> None:
    """Take batches until the time is up, and enough of them, or the patience; some of them are left in `kept`."""
    room = KEPT_BYTES
    pace = Pace(seconds)
    while True:
        empty = True
        for batch in loader:
            empty = False
            pace.count()
            if len(kept) < KEPT_BATCHES and room >= 0:
                _, size, _ = payload(batch)
                room -= KEPT_BYTES + 1 if size == ABSENT else size  # too many parts to count are too many to keep
                if room >= 0:
                    kept.append(batch)
            if step is not None:
                step(batch)
            if not pace.goes_on():
                watching.close_window()
                return
        if empty:
            if not pace.batches:
                raise BsprofError("the loader gives no batch", hint="is its data set empty, or smaller than a batch?")
            return  # it cannot be iterated again


class Pace:
    """How long to go on: some seconds from the first batch on; longer, but not for ever, where few batches come."""

    def __init__(self, seconds: float, fewest: int = FEWEST_BATCHES) -> None:
        self._seconds, self._fewest = seconds, fewest
        self._end: float | None = None
        self.batches = 0

    def count(self) -> None:
        """Note that a batch has come."""
        self.batches += 1
        if self._end is None:
            self._end = time.monotonic() + self._seconds

    def goes_on(self) -> bool:
        """Whether more is wanted."""
        if self._end is None:
            return True
        late = time.monotonic() - self._end
        return late < 0 or (self.batches < self._fewest and late < PATIENCE * self._seconds)


def steps_on(kept: list[Any], step: Step, seconds: float) -> list[int]:
    """Return the times of steps on batches that are already there, the first, cold round apart."""
    times: list[int] = []
    if not kept:
        return times
    for batch in kept:
        step(batch)
    end = time.monotonic() + seconds
    while len(times) < CACHED_STEPS and (not times or time.monotonic() < end):
        for batch in kept:
            before = host_clock()
            step(batch)
            times.append(host_clock() - before)
    return times


def pause(step_ns: int) -> Step:
    """Return a step that lasts `step_ns` and leaves the cores to the workers, as one on an accelerator does."""

    def step(batch: Any) -> None:
        end = host_clock() + step_ns
        while (left := end - host_clock()) > 0:
            time.sleep(left / 1e9)

    return step


# --- beside the loop ----------------------------------------------------------------------------------


class _Aside(threading.Thread):
    """Naps to find out who holds the interpreter's lock, and looks at what a loader can run out of."""

    def __init__(self) -> None:
        super().__init__(name="bsprof-aside", daemon=True)
        self.overshoot_ns: list[int] = []
        self._ended = threading.Event()
        self._shm: tuple[int, int] | None = None
        self._files: int | None = None

    def run(self) -> None:
        while not self._ended.wait(ASIDE_PERIOD_S):
            self._look()
            if len(self.overshoot_ns) < MOST_NAPS:
                for _ in range(GIL_NAPS):
                    before = host_clock()
                    time.sleep(GIL_NAP_S)
                    self.overshoot_ns.append(host_clock() - before - round(GIL_NAP_S * 1e9))

    def stop(self) -> None:
        """End; the last look is taken here, so that there is one however short the block was."""
        self._ended.set()
        if self.is_alive():
            self.join()
        self._look()

    def _look(self) -> None:
        with contextlib.suppress(OSError):
            room = os.statvfs("/dev/shm")
            free = room.f_bavail * room.f_frsize
            self._shm = (room.f_blocks * room.f_frsize, min(free, self._shm[1]) if self._shm else free)
        with contextlib.suppress(OSError):
            self._files = max(len(os.listdir("/proc/self/fd")), self._files or 0)  # noqa: PTH208 - half the time

    def resources(self) -> Resources:
        """Return the least and the most that was seen."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        sharing = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
        return Resources(
            shm_bytes=self._shm[0] if self._shm else None,
            shm_free_bytes=self._shm[1] if self._shm else None,
            open_files=self._files,
            open_files_limit=limit if limit != resource.RLIM_INFINITY else None,
            sharing=str(sharing),
        )
