"""The probe in the process that makes batches: a worker, or the consuming process where there are none.

torch's own fetchers are replaced by subclasses of the same meaning that read clocks between samples and batches. The
data set is left as it is: `get_worker_info().dataset` stays the user's object.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from multiprocessing import util
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import _DatasetKind
from torch.utils.data._utils.fetch import _IterableDatasetFetcher, _MapDatasetFetcher
from torch.utils.data._utils.worker import _ResumeIteration

from bsprof.loader.patches import Patches
from bsprof.loader.recording import (
    ABSENT,
    COUNTED,
    ENDED,
    FAILED,
    HASHED,
    INDEXED,
    MADE,
    NO_SAMPLES,
    Batch,
    Look,
    Recording,
)
from bsprof.loader.stages import CALLS, CLOCK, HOOKS, timed

InitFn = Callable[[int], None]

_now = time.perf_counter_ns
_cpu = time.thread_time_ns
_process_cpu = time.process_time_ns
_usage = resource.getrusage
_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # only Linux counts threads apart

_CLOSE_SHARE = 0.002
"""Part of a sample's time that may go into reading CPU clocks at its stages."""

_WHOLE_SHARE = 0.005
_MOST_STRIDE = 128
_FIRST_BATCHES = 16
"""A batch is accounted for whole where that takes this share of its time at the most; of faster ones every second or
third, at the least every 128th is, after the first few. Of the others it is known when they were begun and done."""
_MOST_SENT = 5 * 64
"""Figures of batches sent that are kept back at the most."""

_LOOK_EVERY_NS = 500_000_000
_LOOK_SHARE = 500
"""A look at the process comes no more often than twice a second, nor than 500 times what it cost; the same holds for
counting its private memory."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_MOST_NODES = 10_000
"""Objects of a batch that are looked at to count its tensors."""

_REPEATS = 100
"""Of what is measured of the probe itself."""

_PLAIN = (int, float, str, bytes, bool, complex, type(None))


# --- starting a worker ------------------------------------------------------------------------------


def recording_path(directory: str | os.PathLike[str], start: int, worker: int) -> Path:
    """Where the worker writes that was begun by the `start`-th start of workers."""
    return Path(directory) / f"{start}_{worker}.recording"


def usable_cores() -> int:
    """Return the cores that this process may run on; `ABSENT` where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ABSENT


def start_worker(directory: str, start: int, user_init: InitFn | None, worker: int) -> None:
    """Stand in for a loader's `worker_init_fn`: watch this worker, and call `user_init`.

    It runs after the user's seeds were set and draws no random number. If watching cannot begin, the worker works on
    without; the reader will miss its recording.
    """
    entered = _now()
    recording: Recording | None = None
    with contextlib.suppress(OSError):
        recording = Recording(recording_path(directory, start, worker), worker=worker)
        recording.entered(entered)
    if user_init is not None:
        user_init(worker)
    if recording is not None:
        recording.ready(_now(), cores=usable_cores(), torch_threads=torch.get_num_threads())
        _WorkerProbe(recording).install()


class _Looking:
    """When this process is to be looked at next, and what its memory was when the kernel last counted it."""

    next_at = 0
    count_at = 0
    counting_ns = 0
    """What counting took the last time it was asked; 0 where it was not counted then."""
    private_bytes = ABSENT
    resident_bytes = ABSENT

    def private(self) -> int:
        """Return the memory that this process shares with no other; `ABSENT` where the kernel does not tell.

        Counting it takes milliseconds, so mostly it is what was counted last and by how much memory has grown since;
        pages that were shared and are no more come in with the next count.
        """
        resident = _resident_bytes()
        begun = _now()
        self.counting_ns = 0
        if begun >= self.count_at or ABSENT in (resident, self.resident_bytes, self.private_bytes):
            self.private_bytes, self.resident_bytes = _private_bytes(), resident
            ended = _now()
            self.counting_ns = ended - begun
            self.count_at = ended + _LOOK_SHARE * self.counting_ns
            return self.private_bytes
        return max(0, self.private_bytes + resident - self.resident_bytes)


_looking = _Looking()


class _WorkerProbe:
    """The hooks of one worker process."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._patches = Patches()
        self._watch = Watch(recording, on_stop=self._take_out)
        self._sending = -1
        """The generation of the batches that the feeder thread pickles."""
        self._sent: list[int] = []

    def install(self) -> None:
        """Watch the fetchers of this worker and the pickling of what they make."""
        watch = self._watch
        create_fetcher: Callable[..., Any] = _DatasetKind.create_fetcher
        dumps: Callable[..., Any] = ForkingPickler.dumps

        def create_watched(*arguments: Any, **named: Any) -> Any:
            # Loaders that the data set itself iterates make fetchers as well, while one of ours is at work.
            return (
                create_fetcher(*arguments, **named)
                if self._watch.busy
                else self._watch.create(create_fetcher, *arguments, **named)
            )

        def dumps_watched(pickler: type[ForkingPickler], obj: Any, protocol: int | None = None) -> Any:
            place = obj[0] if type(obj) is tuple and len(obj) == 2 else None
            if type(place) is not int:
                if isinstance(place, _ResumeIteration):
                    # Batches and this acknowledgement go through one queue: what follows belongs to the next pass.
                    self._sending += 1
                return dumps(obj, protocol)
            begun = _now()
            pickled = dumps(obj, protocol)
            # In the feeder thread, which the next batch's code waits for: in one go, where batches come fast.
            sent = self._sent
            sent += (self._sending, place, begun, _now(), len(pickled))
            if watch.stride == 1 or len(sent) >= _MOST_SENT:
                self._sent = []
                if not self._recording.closed:
                    self._recording.append_sent(sent)
            return pickled

        self._sending = 0
        _looking.next_at = _looking.count_at = 0  # a forked worker has its parent's
        self._patches.put(_DatasetKind, "create_fetcher", staticmethod(create_watched))
        self._patches.put(ForkingPickler, "dumps", classmethod(dumps_watched))
        util.Finalize(None, self._watch.stop, exitpriority=100)

    def _take_out(self) -> None:
        self._recording.append_sent(self._sent)
        self._sent = []
        HOOKS.undo()
        self._patches.undo()


# --- watching a fetcher -----------------------------------------------------------------------------


class Watch:
    """Reads clocks while one process makes batches, and writes them down."""

    def __init__(self, recording: Recording, *, on_stop: Callable[[], None] | None = None) -> None:
        self.recording = recording
        self.busy = False
        self.generation = -1
        self._on_stop = on_stop
        self._counters = _Counters()
        self._stages: dict[str, int] = {}
        self._named: set[int] = set()
        self._close_cost_ns = float(np.median(_in_turn(_cpu)))
        self.close_stride = 1
        """Of how many samples one is looked at closely; the first batch tells what that costs."""
        self.close_countdown = 0
        self.stride = 1
        """Of how many batches one is accounted for whole."""
        self.brief = 0
        """Batches that are not, before the next one that is."""
        self.briefly: list[int] = []
        self._first = _FIRST_BATCHES
        self._whole_ns = 0.0
        """What that costs here, where it is done: some times what it costs in a loop of nothing else."""
        self._stopped = False

    def create(self, create_fetcher: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return the fetcher that `create_fetcher` makes of the arguments, watched."""
        self.busy = True
        try:
            fetcher = create_fetcher(*arguments, **named)
        finally:
            self.busy = False
        if not self._stopped:
            self.generation += 1
            try:
                self._take(fetcher)
            except Exception as error:  # a fetcher of somebody else's that will not have it: it works on unwatched
                self.recording.append_note(f"no fetcher to watch: {type(error).__name__}: {error}")
        return fetcher

    def _take(self, fetcher: Any) -> None:
        fetcher.bsprof_watch = self
        fetcher.bsprof_generation = self.generation
        fetcher.bsprof_number = 0
        fetcher.bsprof_streamed = 0
        HOOKS.refresh()
        if type(fetcher) is _MapDatasetFetcher:
            fetcher.__class__ = _WatchedMapFetcher
        elif type(fetcher) is _IterableDatasetFetcher:
            fetcher.__class__ = _WatchedIterableFetcher
        else:
            fetch = fetcher.fetch
            fetcher.fetch = lambda index: _fetch_whole(fetch, fetcher, index)

    def begin(self) -> bool:
        """Return whether the next fetch is to be watched: not one inside another, and not once the reader has gone."""
        if self._stopped or self.busy or CLOCK.owner:
            return False
        if self.recording.closed:
            self.stop()
            return False
        self.busy = True
        return True

    def counters(self) -> _Counts:
        """Return this thread's counters."""
        return self._counters.read()

    def stop(self) -> None:
        """Watch no more, and close the files. Doing it again does nothing."""
        if self._stopped:
            return
        self._stopped = True
        if self._on_stop is not None:
            self._on_stop()
        self.recording.append_brief(self.briefly)
        self.briefly = []
        self.brief = 0
        self._counters.close()
        self.recording.close()

    def write(self, fetched: _Fetched) -> None:
        """Write a fetch down. What goes wrong here is left as a note and ends the watch, not the worker."""
        try:
            self._write(fetched)
        except Exception as error:
            self.recording.append_note(f"watching ended: {type(error).__name__}: {error}")
            self.stop()

    def _write(self, fetched: _Fetched) -> None:
        before, after = fetched.before, fetched.after
        if self.briefly:
            self.recording.append_brief(self.briefly)
            self.briefly = []
        tensors, size, floats = payload(fetched.batch) if fetched.status == MADE else (ABSENT, ABSENT, ABSENT)
        ends = fetched.ends if len(fetched.ends) > 1 else None
        naming, names = self._names(fetched) if ends is not None else (NO_SAMPLES, None)
        stages, calls = self._stage_figures()
        self.recording.append_batch(
            Batch(  # in the order of its fields: naming them takes 1.5 µs
                fetched.generation,
                fetched.number,
                fetched.status,
                before.at,
                after.at,
                ABSENT if fetched.made == ABSENT else fetched.made - before.at,
                ABSENT if fetched.made == ABSENT else after.at - fetched.made,
                after.cpu - before.cpu,
                ABSENT if before.runqueue == ABSENT else after.runqueue - before.runqueue,
                after.process_cpu - before.process_cpu,
                after.usage.ru_minflt - before.usage.ru_minflt,
                after.usage.ru_majflt - before.usage.ru_majflt,
                after.usage.ru_inblock - before.usage.ru_inblock,
                after.usage.ru_nvcsw - before.usage.ru_nvcsw,
                tensors,
                size,
                floats,
                fetched.samples,
                naming,
                len(ends) - 1 if ends is not None else 0,
            ),
            stages,
            names,
            ends[1:] if ends is not None else None,
        )
        HOOKS.refresh()
        samples = max(1, len(fetched.ends) - 1)
        mean_ns = (after.at - before.at) / samples
        a_look = 2 * self._close_cost_ns * calls / samples
        self.close_stride = max(1, math.ceil(a_look / (_CLOSE_SHARE * mean_ns))) if mean_ns > 0 else 1
        self.close_countdown = min(self.close_countdown, self.close_stride)
        self._set_stride(after.at - before.at, _now() - after.at)
        if after.at >= _looking.next_at:
            self._look()

    def _set_stride(self, batch_ns: int, written_ns: int) -> None:
        """Choose how many batches to leave out, from what the last one took and what writing it down did."""
        self._whole_ns += (written_ns - self._whole_ns) / 8 if self._whole_ns else written_ns
        if self._first:
            self._first -= 1
            return
        stride = math.ceil(2 * self._whole_ns / (_WHOLE_SHARE * max(1, batch_ns)))  # counting takes as long as writing
        self.stride = min(_MOST_STRIDE, max(1, stride))
        self.brief = self.stride - 1

    def _stage_figures(self) -> tuple[list[int], int]:
        figures: list[int] = []
        calls = 0
        for name, cell in CLOCK.cells.items():
            if not cell[CALLS]:
                continue
            number = self._stages.get(name)
            if number is None:
                number = self._stages[name] = len(self._stages)
                self.recording.append_stage(number, name)
            figures.append(number)
            figures += cell
            calls += cell[CALLS]
            cell[:] = (0, 0, 0, 0, 0)
        return figures, calls

    def _names(self, fetched: _Fetched) -> tuple[int, array.array[int]]:
        indices = fetched.indices
        if indices is None:
            return COUNTED, array.array("q", (fetched.streamed,))
        indices = indices[: len(fetched.ends) - 1]
        try:
            return INDEXED, array.array("q", indices)
        except (TypeError, OverflowError):
            pass
        try:
            hashes = [hash(index) for index in indices]
        except TypeError:
            hashes = [hash(repr(index)) for index in indices]
        # Of a batch only the slowest sample is named: a name costs more than all else.
        ends = fetched.ends
        slowest = max(range(len(hashes)), key=lambda place: ends[place + 1] - ends[place])
        if hashes[slowest] not in self._named:
            self._named.add(hashes[slowest])
            self.recording.append_index(hashes[slowest], repr(indices[slowest])[:200])
        return HASHED, array.array("q", hashes)

    def _look(self) -> None:
        begun = _now()
        look = Look(
            at=begun,
            private_bytes=_looking.private(),
            threads=_entries("/proc/self/task"),
            open_files=_entries("/proc/self/fd", less=1 + Recording.OPEN_FILES + self._counters.open_files),
        )
        ended = _now()
        # Counting has a rhythm of its own: were it part of a look, all looks would be as rare as counts.
        _looking.next_at = ended + max(_LOOK_EVERY_NS, _LOOK_SHARE * (ended - begun - _looking.counting_ns))
        self.recording.append_look(look)


class _Fetched:
    """One fetch while it happens."""

    __slots__ = (
        "after",
        "batch",
        "before",
        "ends",
        "generation",
        "indices",
        "made",
        "number",
        "samples",
        "status",
        "streamed",
        "watch",
    )

    def __init__(self, watch: Watch, fetcher: Any) -> None:
        self.watch = watch
        self.generation = fetcher.bsprof_generation
        self.number = fetcher.bsprof_number - 1
        self.streamed = fetcher.bsprof_streamed
        self.status = FAILED
        self.batch: Any = None
        self.indices: Any = None
        self.samples = ABSENT
        self.made = ABSENT
        self.before = watch.counters()
        self.ends = [self.before.at]

    def end(self) -> None:
        self.after = self.watch._counters.read_last()
        CLOCK.end()
        self.watch.write(self)
        self.watch.busy = False


def _fetch(fetcher: Any, index: Any, make: Callable[[Any, Any, _Fetched], Any], plain: type[Any]) -> Any:
    """Fetch as `plain` would, with the samples made by `make`."""
    watch: Watch = fetcher.bsprof_watch
    fetcher.bsprof_number += 1
    if watch.brief > 0 and not (watch.busy or CLOCK.owner):
        return _fetch_briefly(watch, fetcher, index, plain)
    if not watch.begin():
        return plain.fetch(fetcher, index)
    fetched = _Fetched(watch, fetcher)
    CLOCK.begin()
    try:
        data = make(fetcher, index, fetched)
        CLOCK.end()
        fetched.made = _now()
        batch = fetched.batch = fetcher.collate_fn(data)
        fetched.status = MADE
    except StopIteration:
        if plain is _IterableDatasetFetcher:
            fetched.status = ENDED
        raise
    finally:
        fetched.end()
    return batch


def _fetch_briefly(watch: Watch, fetcher: Any, index: Any, plain: type[Any]) -> Any:
    status = FAILED
    watch.busy = True
    watch.brief -= 1
    begun = _now()
    try:
        batch = plain.fetch(fetcher, index)
        status = MADE
        if plain is _IterableDatasetFetcher:  # so many, but for a last batch that is smaller
            fetcher.bsprof_streamed += len(index) if fetcher.auto_collation else 1
    except StopIteration:
        if plain is _IterableDatasetFetcher:
            status = ENDED
        raise
    finally:
        # Written down with the next whole one.
        watch.briefly += (fetcher.bsprof_generation, fetcher.bsprof_number - 1, status, begun, _now())
        watch.busy = False
    return batch


class _WatchedMapFetcher(_MapDatasetFetcher):
    def fetch(self, possibly_batched_index: Any) -> Any:
        return _fetch(self, possibly_batched_index, _items_of_map, _MapDatasetFetcher)


class _WatchedIterableFetcher(_IterableDatasetFetcher):
    def fetch(self, possibly_batched_index: Any) -> Any:
        return _fetch(self, possibly_batched_index, _items_of_iterable, _IterableDatasetFetcher)


def _fetch_whole(fetch: Callable[[Any], Any], fetcher: Any, index: Any) -> Any:
    """Fetch with a fetcher of somebody else's: how it makes its samples is not known."""
    watch: Watch = fetcher.bsprof_watch
    fetcher.bsprof_number += 1
    if not watch.begin():
        return fetch(index)
    fetched = _Fetched(watch, fetcher)
    try:
        batch = fetched.batch = fetch(index)
        fetched.status = MADE
    except StopIteration:
        fetched.status = ENDED
        raise
    finally:
        fetched.end()
    return batch


def _items_of_map(fetcher: Any, index: Any, fetched: _Fetched) -> Any:
    dataset, watch, ends = fetcher.dataset, fetched.watch, fetched.ends
    if not fetcher.auto_collation:
        fetched.indices = (index,)
        fetched.samples = len(index) if isinstance(index, list | tuple) else 1
        CLOCK.closely = _is_turn(watch)
        item = dataset[index]
        ends.append(_now())
        return item
    if hasattr(dataset, "__getitems__") and dataset.__getitems__:
        with contextlib.suppress(TypeError):
            fetched.samples = len(index)
        CLOCK.closely = _is_turn(watch)
        return dataset.__getitems__(index)
    items: list[Any] = []
    known = isinstance(index, list | tuple)
    fetched.indices = index if known else []
    done, append, clock, now = ends.append, items.append, CLOCK, _now
    countdown = watch.close_countdown
    try:
        for one in index:
            if not known:
                fetched.indices.append(one)
            countdown -= 1
            if countdown < 0:
                countdown = watch.close_stride - 1
                clock.closely = True
                append(dataset[one])
                clock.closely = False
            else:
                append(dataset[one])
            done(now())
    finally:
        watch.close_countdown = countdown
        fetched.samples = len(items)
    return items


def _items_of_iterable(fetcher: Any, index: Any, fetched: _Fetched) -> Any:
    if fetcher.ended:
        raise StopIteration
    watch, ends, stream = fetched.watch, fetched.ends, fetcher.dataset_iter
    if not fetcher.auto_collation:
        CLOCK.closely = _is_turn(watch)
        item = next(stream)
        ends.append(_now())
        fetcher.bsprof_streamed += 1
        return item
    items: list[Any] = []
    for _ in index:
        CLOCK.closely = _is_turn(watch)
        try:
            items.append(next(stream))
        except StopIteration:
            fetcher.ended = True
            break
        ends.append(_now())
    fetched.samples = len(items)
    fetcher.bsprof_streamed += len(items)
    if not items or (fetcher.drop_last and len(items) < len(index)):
        raise StopIteration
    return items


def _is_turn(watch: Watch) -> bool:
    watch.close_countdown -= 1
    if watch.close_countdown >= 0:
        return False
    watch.close_countdown = watch.close_stride - 1
    return True


# --- what the system tells --------------------------------------------------------------------------


class _Counts(NamedTuple):
    """The counters of a thread and its process at one moment."""

    usage: resource.struct_rusage
    runqueue: int
    process_cpu: int
    cpu: int
    at: int


class _Counters:
    """Reads the counters of the calling thread."""

    def __init__(self) -> None:
        self._thread = 0
        self._schedstat = -1

    @property
    def open_files(self) -> int:
        return int(self._schedstat >= 0)

    def read(self) -> _Counts:
        """Read them, the clock last: a window begins."""
        if self._thread != get_ident():
            self._open()
        usage, runqueue = _usage(_THREAD), self._runqueue()
        return _Counts(usage, runqueue, _process_cpu(), _cpu(), _now())

    def read_last(self) -> _Counts:
        """Read them in the same thread, the clock first: a window ends."""
        at, cpu, process_cpu = _now(), _cpu(), _process_cpu()
        return _Counts(_usage(_THREAD), self._runqueue(), process_cpu, cpu, at)

    def close(self) -> None:
        if self._schedstat >= 0:
            os.close(self._schedstat)
            self._schedstat = -1

    def _open(self) -> None:
        # The file shows the thread that opened it.
        self.close()
        self._thread = get_ident()
        with contextlib.suppress(OSError):
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def _runqueue(self) -> int:
        if self._schedstat < 0:
            return ABSENT
        try:
            return int(os.pread(self._schedstat, 64, 0).split(b" ", 2)[1])
        except (OSError, ValueError, IndexError):
            return ABSENT


def _private_bytes() -> int:
    """Return the memory that this process shares with no other; `ABSENT` where the kernel does not tell."""
    private = 0
    try:
        with Path("/proc/self/smaps_rollup").open("rb") as file:
            for line in file:
                if line.startswith(b"Private_") and not line.startswith(b"Private_Hugetlb"):
                    private += int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        return ABSENT
    return private


def _resident_bytes() -> int:
    """Return the memory in use that no file stands behind, by proc_pid_statm(5); `ABSENT` where that is not told."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_bytes().split()
        return (int(resident) - int(shared)) * _PAGE_BYTES
    except (OSError, ValueError):
        return ABSENT


def _entries(directory: str, *, less: int = 0) -> int:
    try:
        return len(os.listdir(directory)) - less  # noqa: PTH208 - Path.iterdir would make objects of all of them
    except OSError:
        return ABSENT


def payload(batch: Any) -> tuple[int, int, int]:
    """Return how many tensors and arrays are in a batch, their bytes, and how many of these are floating-point numbers.

    `ABSENT` three times where it has too many parts.
    """
    tensors = size = floats = nodes = 0
    rest = [batch]
    while rest:
        node = rest.pop()
        nodes += 1
        if nodes > _MOST_NODES:
            return ABSENT, ABSENT, ABSENT
        kind = type(node)
        if kind is torch.Tensor:  # by far the most, and a look at its class is quicker than what follows
            tensors += 1
            size += (held := _bytes_of(node))
            floats += held if node.is_floating_point() else 0
        elif kind is list or kind is tuple:
            if len(node) <= 8 or not (isinstance(node[0], _PLAIN) and isinstance(node[-1], _PLAIN)):
                rest += node
        elif kind is dict:
            rest += node.values()
        elif kind in _PLAIN:
            continue
        elif isinstance(node, torch.Tensor | np.ndarray):
            tensors += 1
            size += (held := _bytes_of(node))
            is_float = node.dtype.kind == "f" if isinstance(node, np.ndarray) else node.is_floating_point()
            floats += held if is_float else 0
        elif isinstance(node, Mapping):
            rest += node.values()
        elif isinstance(node, list | tuple):
            rest += node
        elif dataclasses.is_dataclass(node) or hasattr(node, "pin_memory"):
            with contextlib.suppress(TypeError):  # no __dict__
                rest += vars(node).values()
    return tensors, size, floats


def _bytes_of(tensor: Any) -> int:
    try:
        return int(tensor.nbytes)
    except RuntimeError:  # some layouts have no size in bytes
        return 0


# --- what watching costs ----------------------------------------------------------------------------


class Cost(NamedTuple):
    """What watching takes, in ns."""

    batch: float
    """One that is accounted for whole."""
    brief: float
    """One that is not."""
    sample: float
    stage: float


def cost(recording: Recording) -> Cost:
    """Measure what watching costs: batches of nothing, fetched plain and watched, into a `recording` of no further use.

    Medians over repeats, in each of which everything is done in turn, so that a machine that changes its speed changes
    it for all. The cost of a batch is that of one sample's batch less the sample.
    """
    plain = _MapDatasetFetcher([0] * 64, True, _first, False)
    watch = Watch(recording)
    watched = watch.create(_MapDatasetFetcher, [0] * 64, True, _first, False)
    few, many = [0], list(range(64))

    def fetch(indices: list[int], brief: int) -> None:
        watch.brief = brief
        watched.fetch(indices)

    try:
        plain_1, whole_1, brief_1, plain_64, whole_64 = _in_turn(
            functools.partial(plain.fetch, few),
            functools.partial(fetch, few, 0),
            functools.partial(fetch, few, 1),
            functools.partial(plain.fetch, many),
            functools.partial(fetch, many, 0),
        )
    finally:
        watch.stop()
        HOOKS.undo()
    CLOCK.begin()
    try:
        bare, hooked = _in_turn(functools.partial(_first, many), functools.partial(timed(_first, [0] * 5), many))
    finally:
        CLOCK.end()
    one, all_of_them = whole_1 - plain_1, whole_64 - plain_64
    sample = float(np.median(all_of_them - one)) / (len(many) - len(few))
    return Cost(
        batch=float(np.median(one)) - sample,
        brief=float(np.median(brief_1 - plain_1)),
        sample=sample,
        stage=float(np.median(hooked - bare)),
    )


def _in_turn(*calls: Callable[[], object]) -> NDArray[np.int64]:
    """Return how long each call takes in nanoseconds, a row a call and a column a repeat."""
    times = np.empty((len(calls), _REPEATS), dtype=np.int64)
    for repeat in range(_REPEATS):
        for place, call in enumerate(calls):
            before = _now()
            call()
            times[place, repeat] = _now() - before
    return times


def _first(items: list[Any]) -> Any:
    return items[0]
