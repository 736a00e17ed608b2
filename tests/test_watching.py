"""Loaders are watched in anyone's loop, and one of them at a given pace."""

import gc
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import loaders
import pytest
import torch
from torch.utils.data import DataLoader

from bsprof import store
from bsprof.errors import BsprofError
from bsprof.loader import watching
from bsprof.loader.patches import Patches
from bsprof.loading import Consumer
from bsprof.report import terminal

FAST = Consumer(kind="fastest")


def left_behind():
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("bsprof")]
    return multiprocessing.active_children(), threads


def test_a_loop_of_ones_own_is_watched_and_saved(tmp_path):
    with watching.watch_loaders() as probe:
        for batch in loaders.make_loader():
            assert batch.shape == (4, 3)
    loading = probe.loading()
    assert (loading.settings.workers, loading.consumer.kind) == (1, "loop")
    assert sum(loading.batches.samples) == 64
    assert loading.machine is not None and loading.machine.cores >= 1
    assert loading.resources is not None and loading.resources.open_files > 0
    assert loading.resources.sharing == torch.multiprocessing.get_sharing_strategy()
    assert probe.diagnosis().sentence
    probe.save(tmp_path / "loading.json")
    result = store.load(tmp_path / "loading.json")
    assert result.measurements[0].loading == loading
    assert result.measurements[0].diagnosis == probe.diagnosis()
    terminal.render(result, terminal.console())
    assert left_behind() == ([], [])


def test_every_loader_of_a_loop_has_a_measurement_of_its_own():
    with watching.watch_loaders() as probe:
        for loader in (loaders.make_loader(num_workers=0), DataLoader(loaders.Pictures(), batch_size=16)):
            for _ in loader:
                pass
    kinds = [(m.case.key, m.loading.settings.dataset) for m in probe.result().measurements]
    assert kinds == [("loader 1", "Sleepy"), ("loader 2", "Pictures")]


def test_cpu_time_of_batches_made_in_the_consuming_process_is_counted_once():
    loader = DataLoader(range(60), batch_size=4, collate_fn=lambda numbers: sum(range(300_000)))
    before = time.process_time_ns()
    with watching.watch_loaders() as probe:
        for _ in loader:
            pass
    used_ns = time.process_time_ns() - before
    loading = probe.loading()
    assert sum(cpu or 0 for cpu in loading.batches.process_cpu_ns) > 0.3 * used_ns
    assert loading.machine.own_cores * loading.window_ns <= 1.1 * used_ns


def test_a_generator_is_watched_from_the_consumers_side():
    with watching.watch_loaders() as probe:
        assert list(probe.watch(loaders.numbers())) == list(range(50))
    loading = probe.loading()
    assert [note.code for note in loading.notes] == ["consumer_only"]
    assert loading.batches.begun_at_ns == [None] * 50


def test_without_a_loader_there_is_nothing_to_tell():
    with watching.watch_loaders() as probe:
        pass
    for ask in (probe.loading, probe.result, probe.diagnosis):
        with pytest.raises(ValueError, match="no loader was iterated"):
            ask()


def test_what_a_loop_raises_arrives_and_nothing_stays(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="b") as folder:  # a short name: torch makes sockets in it
        monkeypatch.setattr("tempfile.tempdir", folder)
        what_a_loop_raises_arrives(Path(folder))
        gc.collect()  # the iterator and its traceback hold each other, and the worker that writes to this folder
        assert left_behind() == ([], [])


def what_a_loop_raises_arrives(folder):
    with pytest.raises(ValueError, match="damaged"), watching.watch_loaders() as probe:
        for _ in loaders.broken:
            pass
    assert probe.loading().batches.order
    assert left_behind()[1] == []  # the traceback still holds the iterator, and that its worker
    assert list(folder.glob("bsprof*")) == []


def test_watching_twice_at_once_is_refused_and_the_first_goes_on():
    with watching.watch_loaders() as probe:
        with pytest.raises(BsprofError, match="watched already"), watching.watch_loaders():
            pass
        for _ in loaders.make_loader(num_workers=0):
            pass
    assert probe.loading().batches.order
    assert left_behind() == ([], [])


def test_a_watch_that_cannot_begin_leaves_nothing_behind(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    unwatched = DataLoader.__iter__
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", folder)
        patch.setattr(watching._Aside, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"), watching.watch_loaders():
            pass
        assert list(Path(folder).iterdir()) == []
    assert DataLoader.__iter__ is unwatched
    assert left_behind() == ([], [])
    with watching.watch_loaders():
        pass


def test_a_signal_that_raises_on_leaving_waits_until_all_is_cleaned_up(monkeypatch):
    def overdue(number, frame):
        raise TimeoutError

    def undo(patches):
        if os.getpid() == here:  # and not in a worker
            os.kill(here, signal.SIGALRM)  # as torch's does for a worker that has died
        really_undo(patches)

    here, really_undo = os.getpid(), Patches.undo
    unwatched = DataLoader.__iter__
    before = signal.signal(signal.SIGALRM, overdue)
    monkeypatch.setattr(Patches, "undo", undo)
    try:
        loading, error = watching.try_to_watch(loaders.make_loader(), seconds=0.1, consumer=FAST, thorough=False)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert isinstance(error, TimeoutError)
    assert len(loading.batches.order) >= 16
    assert DataLoader.__iter__ is unwatched
    assert left_behind() == ([], [])


def test_a_watch_is_entered_once():
    with watching.watch_loaders() as probe:
        pass
    with pytest.raises(BsprofError, match="watches once"), probe:
        pass


@pytest.mark.parametrize("name", ["loader", "spawned", "by_batches", "whole", "stream"])
def test_a_loader_is_consumed_for_a_while(name):
    loading = watching.watch(getattr(loaders, name), seconds=0.2, consumer=FAST, thorough=False)
    assert loading.batches.order and loading.capacity_cores is None and loading.cached_step_ns is None
    assert len(loading.epochs) >= 1
    assert left_behind() == ([], [])


def test_a_step_is_taken_after_each_batch_and_on_kept_batches_without_a_loader():
    seen = []

    def step(batch):
        seen.append((multiprocessing.active_children() != [], batch))

    loading = watching.watch(loaders.loader, seconds=0.2, step=step, consumer=Consumer(kind="model", model="mine"))
    got = sum(at is not None for at in loading.batches.got_at_ns)
    during, after = [batch for busy, batch in seen[:got]], seen[got:]
    assert len(during) == got
    assert len(loading.cached_step_ns) >= watching.KEPT_BATCHES
    assert len(after) == len(loading.cached_step_ns) + watching.KEPT_BATCHES
    assert not any(busy for busy, _ in after)
    assert loading.capacity_cores.value > 0


@pytest.mark.parametrize(
    ("batch", "kept"),
    [
        (torch.zeros(3), watching.KEPT_BATCHES),
        (torch.eye(3).to_sparse(), watching.KEPT_BATCHES),  # has no size in bytes
        (torch.empty(watching.KEPT_BYTES + 1, dtype=torch.uint8), 0),
        ([object()] * 20_000, 0),  # too many parts to count
    ],
    ids=["small", "sparse", "large", "in_many_parts"],
)
def test_batches_are_kept_that_take_little_room(batch, kept):
    steps = []
    batches = [batch] * (watching.KEPT_BATCHES + 1)
    loading = watching.watch(iter(batches), seconds=5, step=steps.append, consumer=FAST)
    assert len(steps) - len(loading.cached_step_ns) == len(batches) + kept


def test_cores_of_a_fixed_pace_are_left_to_the_workers():
    step_ns = 4_000_000
    consumer = Consumer(kind="fixed", step_ns=step_ns)
    loading = watching.watch(
        loaders.loader, seconds=0.3, step=watching.pause(step_ns), consumer=consumer, thorough=False
    )
    own = [b - a for a, b in zip(loading.batches.got_at_ns, loading.batches.asked_at_ns[1:], strict=False) if a and b]
    assert min(own) >= step_ns
    assert loading.consumer.kind == "fixed" and loading.consumer.cpu_share < 0.9


def test_an_empty_loader_is_an_error_and_a_spent_iterator_an_end():
    with pytest.raises(BsprofError, match="gives no batch"):
        watching.watch(loaders.make_nothing(), seconds=0.1, consumer=FAST, thorough=False)
    loading = watching.watch(iter(range(5)), seconds=5, consumer=FAST, thorough=False)
    assert len(loading.batches.order) == 5


@pytest.mark.parametrize(("name", "error"), [("broken", ValueError), ("deadly", RuntimeError)])
def test_what_was_seen_of_a_loader_that_fails_is_kept(name, error):
    watched = watching.try_to_watch(getattr(loaders, name), seconds=5, consumer=FAST, thorough=False)
    assert isinstance(watched.error, error)
    assert 3 <= sum(got is not None for got in watched.loading.batches.got_at_ns) <= 5
    watched.error.__traceback__ = None


def test_the_interpreters_lock_held_by_another_thread_shows():
    stop = threading.Event()

    def hold():
        while not stop.is_set():
            sum(range(200_000))

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        held = watching.watch(loaders.loader, seconds=1.2, consumer=FAST, thorough=False)
    finally:
        stop.set()
        thread.join()
    assert held.gil_overshoot_ns and max(held.gil_overshoot_ns) > 1_000_000
