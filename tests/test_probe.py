"""The probe in DataLoader: it sees what a loader does, and changes nothing of it."""

import gc
import inspect
import multiprocessing.reduction
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_datasets import (
    Draws,
    DrawsAtOnce,
    Fails,
    Named,
    Nested,
    Pair,
    Sleeps,
    Stream,
    Uneven,
    collate_dict,
    collate_pair,
    init_fails,
    init_worker,
)
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, _DatasetKind
from torch.utils.data._utils import pin_memory as pinning
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from bsprof.errors import BsprofError
from bsprof.loader import worker
from bsprof.loader.probe import Probe
from bsprof.loader.recording import Batch, Recording, decode, read_recording
from bsprof.loader.stages import CLOCK, HOOKS
from bsprof.loader.worker import payload

PATCHED = [
    *((DataLoader, name) for name in ("_get_iterator", "__iter__")),
    *((_MultiProcessingDataLoaderIter, n) for n in ("_reset", "_try_put_index", "_try_get_data", "_shutdown_workers")),
    (_BaseDataLoaderIter, "__next__"),
    (_DatasetKind, "create_fetcher"),
    (ForkingPickler, "loads"),
    (ForkingPickler, "dumps"),
    (multiprocessing.reduction, "dump"),
    (pinning, "pin_memory"),
]


def hooked():
    """Return whatever the probe replaces, as it stands now."""
    return [inspect.getattr_static(holder, name) for holder, name in PATCHED]


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    folder = Path(tempfile.mkdtemp(prefix="b"))  # a short name: torch makes sockets in it
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    before = hooked()
    yield
    assert all(now is then for now, then in zip(hooked(), before, strict=True))
    assert list(folder.glob("bsprof-*")) == []
    assert CLOCK.owner == 0


def flat(batch):
    """Return a batch as plain values that compare equal when it is the same batch."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {name: flat(part) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return [type(batch).__name__, *map(flat, batch)]
    return batch


def only(probe):
    (loading,) = probe.loadings()
    return loading


def got(loading):
    return [place for place, at in enumerate(loading.batches.got_at_ns) if at is not None]


# --- it changes nothing -----------------------------------------------------------------------------

LOADERS = {
    "map": lambda: {"dataset": Draws(), "batch_size": 4, "shuffle": True},
    "drop_last": lambda: {"dataset": Draws(23), "batch_size": 4, "drop_last": True},
    "generator": lambda: {
        "dataset": Draws(),
        "batch_size": 4,
        "shuffle": True,
        "generator": torch.Generator().manual_seed(5),
    },
    "iterable": lambda: {"dataset": Stream(), "batch_size": 3},
    "iterable_drop_last": lambda: {"dataset": Stream(), "batch_size": 3, "drop_last": True},
    "iterable_single": lambda: {"dataset": Stream(), "batch_size": None},
    "getitems": lambda: {"dataset": DrawsAtOnce(), "batch_size": 4},
    "batch_sampler": lambda: {
        "dataset": Draws(),
        "batch_sampler": BatchSampler(RandomSampler(range(24)), 5, drop_last=False),
    },
    "single": lambda: {"dataset": Draws(), "batch_size": None},
    "collate": lambda: {"dataset": Draws(), "batch_size": 4, "collate_fn": collate_dict},
    "init": lambda: {"dataset": Draws(), "batch_size": 4, "worker_init_fn": init_worker},
}


def epochs_of(arguments, epochs=2):
    """Return what a loader gives and the state that it leaves all random streams in."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    loader = DataLoader(**arguments)
    batches = [[flat(batch) for batch in loader] for _ in range(epochs)]
    generator = loader.generator.get_state().tolist() if loader.generator is not None else None
    state = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), generator)
    return batches, state, loader.worker_init_fn


def same_when_watched(arguments):
    plain = epochs_of(arguments())
    with Probe() as probe:
        watched = epochs_of(arguments())
    assert watched == plain
    loading = only(probe)
    assert len(got(loading)) == sum(map(len, plain[0]))
    return loading


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_and_random_streams(kind, workers):
    loading = same_when_watched(lambda: LOADERS[kind]() | {"num_workers": workers})
    assert loading.notes == ()
    assert None not in loading.batches.produced_at_ns


@pytest.mark.parametrize("kind", ["map", "iterable"])
def test_the_same_with_persistent_workers(kind):
    loading = same_when_watched(lambda: LOADERS[kind]() | {"num_workers": 2, "persistent_workers": True})
    assert len(loading.workers) == 2
    assert [epoch.pickled_bytes for epoch in loading.epochs] == [None, None]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_same_in_workers_that_begin_afresh(method):
    # Such a worker takes a second to start. What a forked one makes is the same: the seeds are the loader's.
    arguments = LOADERS[{"spawn": "init", "forkserver": "iterable"}[method]]() | {"num_workers": 1}
    plain = epochs_of(arguments, epochs=1)
    with Probe() as probe:
        assert epochs_of(arguments | {"multiprocessing_context": method}, epochs=1) == plain
    loading = only(probe)
    assert loading.settings.start_method == method
    assert loading.epochs[0].pickled_bytes > 500
    assert None not in loading.batches.sent_at_ns
    assert loading.workers[0].entered_at_ns > loading.epochs[0].began_at_ns


def test_whatever_order_batches_come_in():
    with Probe() as probe:
        seen = [tuple(flat(batch[1])) for batch in DataLoader(Sleeps(), 2, num_workers=2, in_order=False)]
    assert sorted(seen) == [(place, place + 1) for place in range(0, 16, 2)]
    loading = only(probe)
    assert len(got(loading)) == 8
    assert set(loading.batches.ordering_ns) == {0}
    assert loading.settings.in_order is False


# --- it sees what happens ---------------------------------------------------------------------------


def test_the_moments_of_a_batch_are_in_order():
    with Probe() as probe:
        loader = DataLoader(Sleeps(), 4, num_workers=2, collate_fn=collate_pair)
        for _ in range(2):
            for _batch in loader:
                time.sleep(0.001)
    loading = only(probe)
    batches = loading.batches
    assert batches.epoch == [0] * 4 + [1] * 4
    assert batches.order == [0, 1, 2, 3] * 2
    assert batches.worker == [0, 1, 0, 1] * 2
    assert batches.samples == [4] * 8
    for moments in zip(
        batches.dispatched_at_ns,
        batches.begun_at_ns,
        batches.produced_at_ns,
        batches.sent_at_ns,
        batches.received_at_ns,
        batches.got_at_ns,
        strict=True,
    ):
        assert moments == tuple(sorted(moments))
    assert batches.tensors == [2] * 8
    assert batches.bytes == [4 * 4 * 4 + 4 * 8] * 8
    assert all(size > 100 for size in batches.pickled_bytes)
    assert all(ns >= 8e6 for ns in batches.items_ns)
    assert all(ns >= 3e6 for ns in batches.collate_ns)
    assert all(cpu >= 0 for cpu in batches.cpu_ns)
    assert [worker.id for worker in loading.workers] == [0, 1, 0, 1]
    assert [worker.epoch for worker in loading.workers] == [0, 0, 1, 1]
    assert {worker.ended for worker in loading.workers} == {"ok"}
    assert all(worker.memory_at_ns for worker in loading.workers)
    assert all(epoch.ended_at_ns >= epoch.last_asked_at_ns >= epoch.ready_at_ns for epoch in loading.epochs)
    assert loading.samples.count == 32
    assert loading.samples.quantiles_ns["p50"] >= 2e6
    assert loading.probe.batch_ns > loading.probe.brief_ns > 0
    assert loading.probe.sample_ns > 0
    assert loading.settings.batches_per_epoch == 4


def test_without_workers_the_consuming_process_is_the_worker():
    with Probe() as probe:
        loader = DataLoader(Sleeps(), 4)
        assert len(list(loader)) == len(list(loader))
    loading = only(probe)
    assert loading.batches.worker == [-1] * 8
    assert loading.batches.dispatched_at_ns == [None] * 8
    assert all(ns >= 8e6 for ns in loading.batches.items_ns)
    (worker,) = loading.workers
    assert (worker.id, worker.pid, worker.ended) == (-1, os.getpid(), None)


def test_samples_are_named_by_what_the_sampler_gave():
    names = ["a", "bb", "slow", "ccc"]
    with Probe() as probe:
        loader = DataLoader(Named(), batch_sampler=[names], num_workers=1)
        assert len(list(loader)) == len(list(loader)) == 1
    slowest = only(probe).samples.slowest
    assert slowest[0].index == "'slow'"
    assert len(slowest[0].times_ns) == 2
    assert min(slowest[0].times_ns) >= 20e6


def test_the_slowest_samples_are_the_same_whichever_worker_makes_them():
    with Probe() as probe:
        loader = DataLoader(Uneven(), 2, num_workers=2, shuffle=True)
        for _ in range(3):
            list(loader)
    first, second, *_ = only(probe).samples.slowest
    assert (first.index, second.index) == ("11", "7")
    assert len(first.times_ns) == len(second.times_ns) == 3
    assert first.worker in (0, 1)


def test_a_samples_place_in_its_workers_stream_names_it():
    with Probe() as probe:
        list(DataLoader(Stream(9), 2, num_workers=2))
    samples = only(probe).samples
    assert samples.count == 9
    named = {(sample.worker, sample.index) for sample in samples.slowest}
    assert named == {(0, str(place)) for place in range(5)} | {(1, str(place)) for place in range(4)}


def test_several_loaders_are_told_apart():
    with Probe() as probe:
        few, many = DataLoader(Sleeps(4), 2), DataLoader(Sleeps(8), 1, num_workers=1)
        for _pair in zip(few, many, strict=False):
            pass
        list(DataLoader(Stream(3), 3))
    by_size = [(loading.settings.batch_size, len(got(loading))) for loading in probe.loadings()]
    assert sorted(by_size) == [(1, 2), (2, 2), (3, 1)]
    assert by_size[-1] == (3, 1)


def test_memory_is_looked_at_often_although_counting_it_takes_long(monkeypatch):
    def slow():
        time.sleep(0.02)
        return 10 << 20

    monkeypatch.setattr(worker, "_private_bytes", slow)
    end = time.monotonic() + 2
    with Probe() as probe:
        for _ in DataLoader(Sleeps(4000, 0.001), 4, num_workers=1):
            if time.monotonic() > end:
                break
    (own,) = only(probe).workers
    assert len(own.memory_at_ns) == len(own.private_bytes) >= 3


def test_many_passes_hold_no_files_open():
    with Probe() as probe:
        for loader in (DataLoader(Sleeps(2, 0)), DataLoader(Sleeps(2, 0), num_workers=1)):
            list(loader)
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(5):
                list(loader)
            # Were they held, it would be one a pass at the least; a worker that has not quite ended holds two.
            assert len(list(Path("/proc/self/fd").iterdir())) < before + 5
    for loading in probe.loadings():
        assert len(got(loading)) == 12
        assert None not in loading.batches.produced_at_ns
        assert loading.samples.count == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_inside_a_data_set_is_part_of_it(workers):
    with Probe() as probe:
        assert [flat(batch) for batch in DataLoader(Nested(), 2, num_workers=workers)] == [[1, 5]]
    outer = probe.loadings()[0 if workers else -1]
    assert outer.settings.dataset == "Nested"
    assert outer.batches.samples == [2]
    assert None not in outer.batches.items_ns


def test_a_loader_that_gives_nothing():
    with Probe() as probe:
        assert list(DataLoader(Stream(0), 3, num_workers=1)) == []
    loading = only(probe)
    assert loading.batches.got_at_ns == []
    assert loading.epochs[0].ended_at_ns is not None


def test_what_is_no_loader_is_watched_from_the_consumers_side():
    def batches():
        for number in range(3):
            time.sleep(0.002)
            yield number

    with Probe() as probe:
        loader = DataLoader(Sleeps())
        assert probe.watch(loader) is loader
        assert list(probe.watch(batches())) == [0, 1, 2]
        rest = probe.watch(batches())
    assert list(rest) == [0, 1, 2]
    loading = only(probe)
    assert loading.settings.kind == "generator"
    assert [note.code for note in loading.notes] == ["consumer_only"]
    asked, came = loading.batches.asked_at_ns, loading.batches.got_at_ns
    assert all(end - begin >= 2e6 for begin, end in zip(asked, came, strict=True))
    assert loading.batches.produced_at_ns == [None] * 3
    assert loading.epochs[0].ended_at_ns is not None


def test_an_iterator_older_than_the_probe_is_watched_from_the_consumers_side():
    iterator = iter(DataLoader(Draws(), 4, num_workers=1))
    next(iterator)
    with Probe() as probe:
        assert len(list(iterator)) == 5
    loading = only(probe)
    assert len(got(loading)) == 5
    assert [note.code for note in loading.notes] == ["consumer_only"]


def test_pinning_is_told_from_the_rest(monkeypatch):
    """Emulated: this machine may have no accelerator."""

    def slowly(tensor, *_):
        time.sleep(0.002)
        return tensor

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", slowly)
    for workers in (0, 1):
        with Probe() as probe:
            seen = [flat(batch) for batch in DataLoader(Sleeps(), 8, num_workers=workers, pin_memory=True)]
        assert len(seen) == 2
        loading = only(probe)
        assert loading.settings.pinned is True
        batches = loading.batches
        assert all(ns >= 4e6 for ns in batches.pin_ns)
        assert all(at <= end for at, end in zip(batches.pinned_at_ns, batches.got_at_ns, strict=True))
        if workers:
            assert all(ns > 0 for ns in batches.unpickle_ns)
            assert all(at < end for at, end in zip(batches.received_at_ns, batches.pinned_at_ns, strict=True))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_loader_is_watched_in_full():
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    for persistent in (False, True):
        with Probe() as probe:
            loader = stateful.StatefulDataLoader(Sleeps(), 4, num_workers=2, persistent_workers=persistent)
            for _ in range(2):
                assert len(list(loader)) == 4
                assert loader.state_dict()
        loading = only(probe)
        assert loading.settings.kind == "StatefulDataLoader"
        assert len(got(loading)) == 8
        assert None not in loading.batches.items_ns
        assert None not in loading.batches.sent_at_ns
        del loader


# --- stages -----------------------------------------------------------------------------------------


class Waits:
    def __init__(self, ms):
        self.ms = ms

    def __call__(self, sample):
        time.sleep(self.ms / 1e3)
        return [*sample, self.ms]


class WaitsLonger(Waits):
    pass


class Transformed(Sleeps):
    def __init__(self, transform):
        super().__init__(8, 0)
        self.transform = transform

    def __getitem__(self, index):
        return len(self.transform([index]))


def composes():
    from torchvision import transforms
    from torchvision.transforms import v2

    return [transforms.Compose, v2.Compose]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("compose", composes())
def test_each_transform_is_a_stage(compose, workers):
    inner = compose([WaitsLonger(2)])
    with Probe() as probe:
        loader = DataLoader(Transformed(compose([Waits(1), inner, Waits(3)])), 4, num_workers=workers)
        assert [flat(batch) for batch in loader] == [[4] * 4] * 2
    loading = only(probe)
    assert set(loading.stages) == {"Waits", "Compose", "WaitsLonger", "Waits#2"}
    for name, ms in {"Waits": 1, "WaitsLonger": 2, "Waits#2": 3}.items():
        stage = loading.stages[name]
        assert stage.calls == 8
        assert stage.ns >= 8 * ms * 1e6
        assert sum(loading.batches.stage_ns[name]) == stage.ns
        assert 0 <= stage.closely_cpu_ns <= stage.closely_ns <= stage.ns
        assert stage.closely_calls >= 1
    # The inner Compose is a transform of the outer one, without what is inside it.
    assert loading.stages["Compose"].ns < loading.stages["WaitsLonger"].ns
    for items, *stages in zip(loading.batches.items_ns, *loading.batches.stage_ns.values(), strict=True):
        assert items >= sum(stages)


@pytest.mark.parametrize("compose", composes())
def test_a_transform_that_fails_fails_unchanged_and_is_closed(compose):
    def bad(sample):
        raise LookupError(sample)

    pipeline = compose([Waits(1), bad])
    HOOKS.refresh()
    CLOCK.begin()
    try:
        CLOCK.inner_ns = 5
        with pytest.raises(LookupError, match="1"):
            pipeline([1])
        assert CLOCK.inner_ns >= 1e6
        assert CLOCK.cell("bad")[:2][1] == 1
    finally:
        CLOCK.end()
        CLOCK.cells.clear()
        HOOKS.undo()


def test_reading_and_decoding_an_image_are_stages(tmp_path):
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(4):
        Image.fromarray(pixels).save(tmp_path / "images" / "a" / f"{number}.jpg")
    with Probe() as probe:
        data = ImageFolder(tmp_path / "images", v2.Compose([v2.Resize(32), v2.ToImage()]))
        list(DataLoader(data, 2, num_workers=1))
    stages = only(probe).stages
    assert {"read", "decode", "Resize", "ToImage"} <= set(stages)
    assert stages["decode"].calls == 4
    assert Image.open.__module__ == "PIL.Image" and not hasattr(Image.open, "__wrapped__")


def test_stages_of_other_threads_are_left_alone():
    HOOKS.refresh()
    try:
        assert torch.load is not None
        CLOCK.owner = 1  # nobody's
        for compose in composes():
            assert compose([Waits(0)])([]) == [0]
        assert not any(cell[1] for cell in CLOCK.cells.values())
    finally:
        CLOCK.end()
        HOOKS.undo()


# --- when things go wrong ---------------------------------------------------------------------------


def test_hooks_are_gone_after_an_exception():
    with pytest.raises(ZeroDivisionError), Probe():
        for _batch in DataLoader(Sleeps(), 4, num_workers=1):
            raise ZeroDivisionError


def test_hooks_are_gone_after_ctrl_c():
    with pytest.raises(KeyboardInterrupt), Probe() as probe:
        for number, _batch in enumerate(DataLoader(Sleeps(), 4, num_workers=1)):
            if number == 1:
                raise KeyboardInterrupt
    assert len(got(only(probe))) == 2


LOOP = """
import sys, time
sys.path.insert(0, {tests!r})
from loader_datasets import Sleeps
from torch.utils.data import DataLoader
from bsprof.loader import worker
from bsprof.loader.probe import Probe
with Probe() as probe:
    loader = DataLoader(Sleeps(1_000_000), 4, num_workers=2)
    try:
        for number, _ in enumerate(loader):
            if number == 3:
                print("going", flush=True)
    finally:
        print("stopping", flush=True)
"""


def test_ctrl_c_reaches_all_processes_and_nothing_hangs():
    """As from a terminal: the signal goes to the workers as well."""
    command = [sys.executable, "-c", LOOP.format(tests=str(Path(__file__).parent))]
    surroundings = dict(os.environ)
    loop = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, start_new_session=True
    )
    try:
        assert loop.stdout.readline() == "going\n"
        os.killpg(loop.pid, signal.SIGINT)
        output, errors = loop.communicate(timeout=60)
    finally:
        if loop.poll() is None:
            os.killpg(loop.pid, signal.SIGKILL)
            loop.communicate()
    assert output == "stopping\n"
    assert "KeyboardInterrupt" in errors and "bsprof/loader/assembling" not in errors
    assert loop.returncode == -signal.SIGINT


def test_one_probe_at_a_time_and_once():
    with Probe() as probe:
        with pytest.raises(BsprofError, match="watched already"), Probe():
            pass
        list(DataLoader(Sleeps(2)))
    with pytest.raises(BsprofError, match="watches once"), probe:
        pass
    assert len(got(only(probe))) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_the_data_set_arrives_unchanged(workers):
    with Probe() as probe:
        iterator = iter(DataLoader(Fails(5, "raise"), 4, num_workers=workers))
        next(iterator)
        with pytest.raises(KeyError, match="this sample"):
            next(iterator)
        assert len(list(iterator)) == 2
    batches = only(probe).batches
    assert len(got(only(probe))) == 3
    assert batches.asked_at_ns[-1] is not None and batches.begun_at_ns[-1] is not None
    assert batches.items_ns[-1] is None


def test_an_exception_in_worker_init_arrives_unchanged():
    with Probe(), pytest.raises(ValueError, match="no such luck"):
        list(DataLoader(Sleeps(), 4, num_workers=1, worker_init_fn=init_fails))


def test_a_worker_that_is_killed_leaves_its_recording():
    with Probe() as probe, pytest.raises(RuntimeError, match=r"exited unexpectedly|killed"):
        list(DataLoader(Fails(9, "kill"), 4, num_workers=1))
    loading = only(probe)
    (worker,) = loading.workers
    assert worker.ended == "died"
    assert sum(at is not None for at in loading.batches.produced_at_ns) == 2
    lost = loading.batches.got_at_ns.index(None)
    assert loading.batches.asked_at_ns[lost] is not None
    assert loading.batches.dispatched_at_ns[lost] is not None


def test_a_loader_left_in_mid_epoch():
    with Probe() as probe:
        for _batch in DataLoader(Sleeps(), 4, num_workers=1):
            break
        gc.collect()
    loading = only(probe)
    assert len(got(loading)) == 1
    assert len(loading.batches.epoch) == 3  # two more were given out
    assert loading.epochs[0].ended_at_ns is None
    assert loading.workers[0].ended == "ok"


def test_persistent_workers_left_in_mid_epoch_begin_a_new_one():
    with Probe() as probe:
        loader = DataLoader(Sleeps(), 4, num_workers=2, persistent_workers=True)
        next(iter(loader))
        assert len(list(loader)) == 4
        del loader
    batches = only(probe).batches
    places = got(only(probe))
    assert [batches.epoch[place] for place in places] == [0, 1, 1, 1, 1]
    for place in places:
        assert batches.begun_at_ns[place] >= batches.dispatched_at_ns[place]
        assert batches.produced_at_ns[place] <= batches.sent_at_ns[place] <= batches.got_at_ns[place]


def test_workers_outlive_the_probe_unwatched():
    with Probe() as probe:
        loader = DataLoader(Sleeps(), 4, num_workers=1, persistent_workers=True)
        assert len(list(loader)) == 4
    assert len(list(loader)) == 4
    assert only(probe).workers[0].ended is None
    assert len(got(only(probe))) == 4


def test_without_room_for_a_recording_loading_goes_on(monkeypatch):
    def no_room(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    for workers in (0, 1):
        with Probe() as probe:
            assert len(list(DataLoader(Sleeps(), 4, num_workers=workers))) == 4
        loading = only(probe)
        assert len(got(loading)) == 4
        assert loading.batches.produced_at_ns == [None] * 4
        assert [note.code for note in loading.notes] == ["unwatched_workers"]


# --- the parts --------------------------------------------------------------------------------------


def test_a_full_recording_counts_what_it_drops(tmp_path, monkeypatch):
    monkeypatch.setattr("bsprof.loader.recording.BOUND", 1 << 19)
    recording = Recording(tmp_path / "file", worker=3)
    for number in range(5000):
        recording.append_batch(Batch(0, number, *range(18)), [], None, None)
    recording.append_note("nobody reads this")
    recorded = decode(read_recording(tmp_path / "file"))
    recording.close()
    assert recorded.worker == 3
    assert [batch.number for batch in recorded.batches] == list(range(len(recorded.batches)))
    assert len(recorded.batches) > 1000
    assert recorded.dropped == 5000 - len(recorded.batches)


def test_a_batch_is_counted_whatever_holds_it():
    tensor = torch.zeros(3, dtype=torch.float64)
    array = np.zeros(5, dtype=np.int16)
    assert payload(tensor) == (1, 24, 24)
    assert payload({"a": [tensor, (array, "text")], "b": Pair(tensor, tensor)}) == (4, 82, 72)
    assert payload([1] * 10_000_000) == (0, 0, 0)
    assert payload(torch.nn.Parameter(tensor)) == (1, 24, 24)
    assert payload([object()] * 20_000) == (-1, -1, -1)


def test_a_probe_that_saw_no_loader_has_nothing_to_tell():
    with Probe() as probe:
        pass
    assert probe.loadings() == []


def test_a_system_that_tells_less_is_watched_as_well(monkeypatch):
    """macOS knows neither affinity nor what single threads used, and reserves no room."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with Probe() as probe:
        batches = list(DataLoader(Sleeps(8), 4, num_workers=1))
    loading = only(probe)
    assert len(batches) == len(got(loading)) == 2
    assert [worker.cores for worker in loading.workers] == [None]
    assert all(cpu is not None for cpu in loading.batches.cpu_ns)
