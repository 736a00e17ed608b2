"""Watching the data loaders of anyone's loop.

The hooks of the consuming process, and how they reach the workers: `worker_init_fn` is swapped for ours while workers
are started. Everything is put back when the probe ends, whatever happened inside.
"""

from __future__ import annotations

import functools
import multiprocessing.reduction
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, _DatasetKind
from torch.utils.data._utils import pin_memory as pinning
from torch.utils.data._utils.worker import _IterableDatasetStopIteration
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from bsprof.errors import BsprofError
from bsprof.loader.assembling import HERE, Pass, Row, Start, WatchedLoader, assemble
from bsprof.loader.patches import Patches
from bsprof.loader.recording import Recording, close_recording, read_recording
from bsprof.loader.stages import CLOCK, HOOKS
from bsprof.loader.worker import Cost, Watch, cost, recording_path, start_worker, usable_cores
from bsprof.loading import MAIN, LoaderSettings, Loading

Item = TypeVar("Item")
Value = TypeVar("Value")

_now = time.perf_counter_ns
_process_cpu = time.process_time_ns

MOST_BATCHES = 500_000
"""Batches of one loader that are remembered in the consuming process."""

_active: Probe | None = None
_entering = threading.Lock()


class Probe:
    """Watches each DataLoader that is iterated while it is open, in this process and in its workers.

    The program gets the same batches in the same order, and its random numbers are not touched. One probe can be open
    at a time, once. Raises BsprofError when it is entered again or while another is open.
    """

    def __init__(self) -> None:
        self._began = 0
        self._ended: int | None = None
        self._directory: Path | None = None
        self._patches = Patches()
        self._here = _Here()
        self._loaders: list[WatchedLoader] = []
        self._known_loaders: _ByIdentity[WatchedLoader] = _ByIdentity()
        self._known_iterators: _ByIdentity[_Iterating] = _ByIdentity()
        self._starts: list[Start] = []
        self._watch: Watch | None = None
        self._pinned: dict[tuple[int, int], _Arrival] = {}
        self._recordings: dict[tuple[int, int], bytes] = {}
        self._cost: Cost | None = None

    def __enter__(self) -> Probe:
        global _active
        with _entering:
            if _active is not None:
                raise BsprofError("loaders are being watched already", hint="leave the other watch_loaders() first")
            if self._began:
                raise BsprofError("a probe watches once", hint="take a new one: watch_loaders()")
            self._directory = Path(tempfile.mkdtemp(prefix="bsprof-loader-"))
            self._began = _now()
            try:
                self._put_hooks()
            except BaseException:
                self._patches.undo()
                shutil.rmtree(self._directory, ignore_errors=True)
                raise
            _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _active
        self._ended = _now()
        try:
            self._patches.undo()
            self._stop_here()
            self._note_exits()
            self._read(closing=True)
        finally:
            _active = None
            if self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _open(self) -> bool:
        return self._began > 0 and self._ended is None

    # --- what was seen ---

    @property
    def began_ns(self) -> int:
        """When it was opened, by the host's clock: moments in its Loadings count from here."""
        return self._began

    def watch(self, batches: Iterable[Item]) -> Iterable[Item]:
        """Return `batches`, watched: for what is no DataLoader. Only the consumer's side can be seen then.

        A DataLoader is watched anyway and comes back as it is. While the probe is not open nothing is recorded.
        """
        return batches if isinstance(batches, DataLoader) else _WatchedIterable(self, batches)

    def loadings(self) -> list[Loading]:
        """Return what was seen, one Loading for each loader, most batches first.

        While the probe is open it is what was seen so far.
        """
        if self._ended is None:
            self._note_exits()
            self._read(closing=False)
        measured = self._measured_cost()
        window_ns = (self._ended or _now()) - self._began
        loadings = [
            assemble(loader, self._recordings, began=self._began, window_ns=window_ns, cost=measured)
            for loader in self._loaders
        ]
        return sorted(loadings, key=lambda loading: -sum(got is not None for got in loading.batches.got_at_ns))

    # --- hooks ---

    def _put_hooks(self) -> None:
        put = self._patches.put
        stateful = sys.modules.get("torchdata.stateful_dataloader.stateful_dataloader")
        for loader in [DataLoader, *_classes(stateful, "StatefulDataLoader")]:
            put(loader, "_get_iterator", self._around_get_iterator(loader._get_iterator))
            put(loader, "__iter__", self._around_iter(loader.__iter__))
        workers = [_MultiProcessingDataLoaderIter, *_classes(stateful, "_StatefulMultiProcessingDataLoaderIter")]
        for iterator in workers:
            put(iterator, "_reset", self._around_reset(iterator._reset))
            put(iterator, "_try_put_index", self._around_try_put_index(iterator._try_put_index))
            put(iterator, "_try_get_data", self._around_try_get_data(iterator._try_get_data))
            put(iterator, "_shutdown_workers", self._around_shutdown_workers(iterator._shutdown_workers))
        put(_BaseDataLoaderIter, "__next__", self._around_next(_BaseDataLoaderIter.__next__))
        put(_DatasetKind, "create_fetcher", staticmethod(self._around_create_fetcher(_DatasetKind.create_fetcher)))
        put(ForkingPickler, "loads", staticmethod(self._around_loads(ForkingPickler.loads)))
        put(multiprocessing.reduction, "dump", self._around_dump(multiprocessing.reduction.dump))
        put(pinning, "pin_memory", self._around_pin_memory(pinning.pin_memory))

    def _around_iter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def iterate(loader: Any) -> Any:
            began = _now()
            iterator = original(loader)
            if isinstance(iterator, _BaseDataLoaderIter):
                self._iterating(iterator, loader).returned(began, _now())
            return iterator

        return iterate

    def _around_get_iterator(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_iterator(loader: Any) -> Any:
            start = self._start(loader)
            user_init = loader.worker_init_fn
            outer, self._here.starting = self._here.starting, (start, loader)
            if start.workers:
                loader.worker_init_fn = functools.partial(start_worker, str(self._directory), start.number, user_init)
            try:
                iterator = original(loader)
            finally:
                self._here.starting = outer
                loader.worker_init_fn = user_init
            if isinstance(iterator, _BaseDataLoaderIter):
                self._iterating(iterator, loader).start = start
            return iterator

        return get_iterator

    def _around_create_fetcher(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def create_fetcher(*arguments: Any, **named: Any) -> Any:
            starting = self._here.starting
            if starting is None or starting[0].workers or CLOCK.owner:
                return original(*arguments, **named)
            watch = self._watch_here()
            if watch is None:
                return original(*arguments, **named)
            fetcher = watch.create(original, *arguments, **named)
            starting[0].fetcher = watch.generation
            return fetcher

        return create_fetcher

    def _around_reset(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def reset(iterator: Any, *arguments: Any, **named: Any) -> Any:
            # Batches of the pass before may still come in; the new pass begins with the first index that is given out.
            state = self._iterating(iterator)
            state.resets = True
            try:
                return original(iterator, *arguments, **named)
            finally:
                state.begin_pass_after_reset()

        return reset

    def _around_try_put_index(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def try_put_index(iterator: Any) -> Any:
            state = self._iterating(iterator)
            state.begin_pass_after_reset()
            place = iterator._send_idx
            at = _now()
            done = original(iterator)
            if iterator._send_idx > place and (info := iterator._task_info.get(place)):
                state.current.dispatched[place] = (info[0], at)
            return done

        return try_put_index

    def _around_try_get_data(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def try_get_data(iterator: Any, *arguments: Any, **named: Any) -> Any:
            self._here.arrival = None
            found = original(iterator, *arguments, **named)
            if found[0] and type(found[1]) is tuple and type(found[1][0]) is int:
                self._received(iterator, *found[1])
            return found

        return try_get_data

    def _received(self, iterator: Any, place: int, data: Any) -> None:
        at = _now()
        state = self._iterating(iterator)
        arrival = self._here.arrival
        if getattr(iterator, "_pin_memory", False):
            thread = iterator._pin_memory_thread.ident
            arrival = self._pinned.pop((thread, place), None)
        elif arrival is None or arrival.place != place:
            arrival = _Arrival(place, at, None)
        if isinstance(data, tuple) and data:  # torchdata sends the worker's state along
            data = data[0]
        if isinstance(data, _IterableDatasetStopIteration):
            return
        current = state.current
        if arrival is not None:
            current.received[place] = (arrival.at, arrival.unpickle_ns, arrival.pin_ns, arrival.pinned_at)
        current.last_received = place
        if getattr(iterator, "_in_order", True) and place != iterator._rcvd_idx and current.ordering_since is None:
            current.ordering_since = at

    def _around_next(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def next_batch(iterator: Any) -> Any:
            state = self._iterating(iterator)
            here, current = self._here, state.current
            current.ordering_since = here.pinned = None
            cpu = _process_cpu()
            asked = _now()
            try:
                batch = original(iterator)
            except StopIteration:
                if current.ended is None:
                    current.last_asked, current.ended = asked, _now()
                raise
            except BaseException:
                state.append(Row(state.awaited(iterator), asked, None, None, cpu, None, None))
                raise
            got = _now()
            since = current.ordering_since
            ordering = 0 if since is None else got - since
            state.append(Row(state.returned_place(iterator), asked, got, ordering, cpu, _process_cpu(), here.pinned))
            return batch

        return next_batch

    def _around_loads(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def loads(*arguments: Any, **named: Any) -> Any:
            begun = _now()
            found = original(*arguments, **named)
            if type(found) is tuple and len(found) == 2 and type(found[0]) is int:
                at = _now()
                self._here.arrival = _Arrival(found[0], at, at - begun)
            return found

        return loads

    def _around_pin_memory(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def pin_memory(*arguments: Any, **named: Any) -> Any:
            here = self._here
            if here.pinning:  # it calls itself for each part of a batch
                return original(*arguments, **named)
            here.pinning = True
            begun = _now()
            try:
                return original(*arguments, **named)
            finally:
                at = _now()
                here.pinning = False
                here.pinned = (at - begun, at)
                arrival = here.arrival
                if arrival is not None and threading.current_thread() is not threading.main_thread():
                    arrival.pin_ns, arrival.pinned_at = at - begun, at
                    self._pinned[threading.get_ident(), arrival.place] = arrival

        return pin_memory

    def _around_dump(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def dump(obj: Any, file: Any, *arguments: Any, **named: Any) -> Any:
            starting = self._here.starting
            if starting is None:
                return original(obj, file, *arguments, **named)
            before = file.tell()
            done = original(obj, file, *arguments, **named)
            starting[0].pickled_bytes = (starting[0].pickled_bytes or 0) + file.tell() - before
            return done

        return dump

    def _around_shutdown_workers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def shutdown_workers(iterator: Any) -> Any:
            try:
                return original(iterator)
            finally:
                self._note_exit(iterator)

        return shutdown_workers

    # --- who is who ---

    def _loader(self, loader: Any) -> WatchedLoader:
        known = self._known_loaders.get(loader)
        if known is None:
            known = self._known_loaders.put(loader, WatchedLoader())
            self._loaders.append(known)
        return known

    def _start(self, loader: Any) -> Start:
        watched = self._loader(loader)
        start = Start(number=len(self._starts), workers=loader.num_workers, first_pass=len(watched.passes))
        self._starts.append(start)
        watched.starts.append(start)
        return start

    def _iterating(self, iterator: Any, loader: Any = None) -> _Iterating:
        state = self._known_iterators.get(iterator)
        if state is None:
            start = None
            if self._here.starting is not None:
                start, loader = self._here.starting
            # An iterator that was made before the probe stands for its loader, which nothing leads to.
            watched = self._loader(iterator if loader is None else loader)
            state = self._known_iterators.put(iterator, _Iterating(watched, start))
        if loader is not None and state.watched.settings is None and self._here.starting is None:
            state.watched.settings = _settings_of(loader, iterator)
        elif state.watched.settings is None and self._here.starting is None:
            state.watched.settings = _settings_of_iterator(iterator)
        return state

    def _watch_here(self) -> Watch | None:
        """Return the watch of this process, whose batches of all loaders go into one recording."""
        if self._watch is None:
            try:
                recording = Recording(recording_path(self._directory or "", HERE, MAIN), worker=MAIN)
            except OSError:
                return None
            recording.entered(_now())
            recording.ready(_now(), cores=usable_cores(), torch_threads=torch.get_num_threads())
            self._watch = Watch(recording)
        return self._watch

    # --- the end ---

    def _stop_here(self) -> None:
        HOOKS.undo()
        CLOCK.end()
        CLOCK.cells.clear()
        if self._watch is not None:
            self._watch.stop()

    def _note_exits(self) -> None:
        for iterator in self._known_iterators.alive():
            self._note_exit(iterator)

    def _note_exit(self, iterator: Any) -> None:
        state = self._known_iterators.get(iterator)
        if state is not None and state.start is not None:
            for number, process in enumerate(getattr(iterator, "_workers", ())):
                if process.exitcode is not None:
                    state.start.exit_codes[number] = process.exitcode

    def _read(self, *, closing: bool) -> None:
        places = [(start.number, worker) for start in self._starts for worker in range(start.workers)]
        for start, worker in [*places, (HERE, MAIN)]:
            path = recording_path(self._directory or "", start, worker)
            try:
                self._recordings[start, worker] = read_recording(path)
                if closing:
                    close_recording(path)
            except OSError:
                continue  # this worker left none, which its Loading tells

    def _measured_cost(self) -> Cost | None:
        if self._cost is None and self._ended is not None:
            with tempfile.TemporaryDirectory(prefix="bsprof-loader-") as directory:
                try:
                    self._cost = cost(Recording(Path(directory) / "cost", worker=MAIN))
                except OSError:
                    return None
        return self._cost


class _Here(threading.local):
    """What is going on in the thread that looks here."""

    def __init__(self) -> None:
        self.starting: tuple[Start, Any] | None = None
        """Workers are being started, for this loader."""
        self.arrival: _Arrival | None = None
        """What was unpickled last."""
        self.pinning = False
        self.pinned: tuple[int, int] | None = None
        """How long the last page-locking took, and when it was done."""


class _Arrival:
    """A batch out of the pipe."""

    __slots__ = ("at", "pin_ns", "pinned_at", "place", "unpickle_ns")

    def __init__(self, place: int, at: int, unpickle_ns: int | None) -> None:
        self.place = place
        self.at = at
        self.unpickle_ns = unpickle_ns
        self.pin_ns: int | None = None
        self.pinned_at: int | None = None


class _Iterating:
    """An iterator over a loader, and the pass that it is in."""

    def __init__(self, watched: WatchedLoader, start: Start | None) -> None:
        self.watched = watched
        self.start = start
        self.resets = False
        self._generation = -1
        self._current: Pass | None = None

    @property
    def current(self) -> Pass:
        return self._current or self.begin_pass()

    def begin_pass(self) -> Pass:
        self._generation += 1
        self._current = Pass(epoch=len(self.watched.passes), start=self.start, generation=self._generation)
        self.watched.passes.append(self._current)
        return self._current

    def begin_pass_after_reset(self) -> None:
        if self.resets:
            self.resets = False
            self.begin_pass()

    def returned(self, began: int, ready: int) -> None:
        """Note that iter() returned this iterator."""
        current = self.current
        if current.began is not None:
            current = self.begin_pass()
        current.began, current.ready = began, ready

    def append(self, row: Row) -> None:
        if self.watched.seen >= MOST_BATCHES:
            self.watched.dropped += 1
            return
        self.watched.seen += 1
        self.current.rows.append(row)

    def returned_place(self, iterator: Any) -> int | None:
        """Return which of the batches given out next() has just returned; None without workers."""
        if not hasattr(iterator, "_rcvd_idx"):
            return None
        # In order, the iterator has stepped past it; otherwise what comes is returned at once.
        return iterator._rcvd_idx - 1 if getattr(iterator, "_in_order", True) else self.current.last_received

    def awaited(self, iterator: Any) -> int | None:
        """Return which of the batches given out next() failed to return; None without workers."""
        place = self.returned_place(iterator)
        if place is None or (place in self.current.received and all(row.place != place for row in self.current.rows)):
            return place
        return int(iterator._rcvd_idx)


class _ByIdentity(Generic[Value]):
    """Maps objects to values without holding them, comparing them, or asking for their hash."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[weakref.ref[Any], Value]] = {}

    def get(self, key: Any) -> Value | None:
        found = self._values.get(id(key))
        return found[1] if found is not None and found[0]() is key else None

    def put(self, key: Any, value: Value) -> Value:
        identity, values = id(key), self._values

        def forget(reference: weakref.ref[Any]) -> None:
            if identity in values and values[identity][0] is reference:
                del values[identity]

        values[identity] = (weakref.ref(key, forget), value)
        return value

    def alive(self) -> list[Any]:
        found = [reference() for reference, _ in list(self._values.values())]
        return [key for key in found if key is not None]


class _WatchedIterable(Generic[Item]):
    """An iterable whose consumer is watched."""

    def __init__(self, probe: Probe, batches: Iterable[Item]) -> None:
        self._probe = probe
        self._batches = batches

    def __iter__(self) -> Iterator[Item]:
        if not self._probe._open:
            return iter(self._batches)
        began = _now()
        iterator = iter(self._batches)
        watched = self._probe._loader(self)
        if watched.settings is None:
            watched.settings = LoaderSettings(kind=type(self._batches).__name__)
        state = _Iterating(watched, None)
        state.returned(began, _now())
        return _WatchedIterator(self._probe, state, iterator)

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


class _WatchedIterator(Iterator[Item]):
    def __init__(self, probe: Probe, state: _Iterating, iterator: Iterator[Item]) -> None:
        self._probe = probe
        self._state = state
        self._iterator = iterator

    def __next__(self) -> Item:
        if not self._probe._open:
            return next(self._iterator)
        current = self._state.current
        cpu = _process_cpu()
        asked = _now()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if current.ended is None:
                current.last_asked, current.ended = asked, _now()
            raise
        except BaseException:
            self._state.append(Row(None, asked, None, None, cpu, None, None))
            raise
        self._state.append(Row(None, asked, _now(), None, cpu, _process_cpu(), None))
        return batch


def _classes(module: ModuleType | None, name: str) -> list[Any]:
    found = getattr(module, name, None)
    return [] if found is None else [found]


def _settings_of(loader: Any, iterator: Any) -> LoaderSettings:
    """Describe a loader; called once its workers run, so that asking for the start method decides nothing."""
    workers = loader.num_workers
    style = _style(loader._dataset_kind)
    start_method = None
    if workers:
        context = loader.multiprocessing_context or torch.multiprocessing
        start_method = context.get_start_method()
    batches = None
    if style == "map":  # an iterable data set's length, once asked for, makes the loader complain where it is wrong
        try:
            batches = len(loader)
        except Exception:
            batches = None  # a sampler without a length
    getitems = style == "map" and loader._auto_collation and bool(getattr(loader.dataset, "__getitems__", None))
    return LoaderSettings(
        kind=type(loader).__name__,
        dataset=type(loader.dataset).__name__,
        style=style,
        batch_size=loader.batch_size,
        workers=workers,
        prefetch=loader.prefetch_factor,
        start_method=start_method,
        persistent_workers=loader.persistent_workers,
        pin_memory=loader.pin_memory,
        pinned=bool(iterator._pin_memory),
        in_order=getattr(loader, "in_order", None),
        getitems=getitems,
        batches_per_epoch=batches,
    )


def _settings_of_iterator(iterator: Any) -> LoaderSettings:
    return LoaderSettings(
        kind=type(iterator).__name__,
        dataset=type(iterator._dataset).__name__,
        style=_style(iterator._dataset_kind),
        workers=iterator._num_workers,
        prefetch=getattr(iterator, "_prefetch_factor", None),
        persistent_workers=iterator._persistent_workers,
        pinned=bool(iterator._pin_memory),
        in_order=getattr(iterator, "_in_order", None),
    )


def _style(kind: int) -> Any:
    return "map" if kind == _DatasetKind.Map else "iterable"


def _forget_in_child() -> None:
    """Take the hooks out of a process that was forked while loaders are watched: workers put their own."""
    global _active
    if _active is not None:
        probe, _active = _active, None
        probe._patches.undo()
        probe._stop_here()


os.register_at_fork(after_in_child=_forget_in_child)
