"""bsprof's phases in a training loop of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from factories import Perceptron, Pixels, Raising
from torch.utils.data import DataLoader

import bsprof
from bsprof import Recorder, store
from bsprof.measure.selftest import spin
from bsprof.metrics import CaseSummary, summarise
from bsprof.model import Measurement, Result, Samples

REPOSITORY = Path(__file__).parents[1]


class Time:
    """A clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def passes(self, nanoseconds: int) -> None:
        self.now += nanoseconds


class Loader:
    """Batches that take so long: 100 to begin, 50 for the first, 10 for each other one, 30 to end."""

    def __init__(self, time: Time, batches: int) -> None:
        self.time, self.batches = time, batches

    def __iter__(self) -> Iterator[int]:
        self.time.passes(100)
        return self._batches()

    def _batches(self) -> Iterator[int]:
        for i in range(self.batches):
            self.time.passes(10 if i else 50)
            yield i
        self.time.passes(30)


def only(result: Result) -> Measurement:
    (measurement,) = result.measurements
    return measurement


def samples_of(recorder: Recorder) -> Samples:
    samples = only(recorder.result()).samples
    assert samples is not None
    return samples


def summary_of(recorder: Recorder) -> CaseSummary:
    (summary,) = summarise(recorder.result())
    return summary


def phases_and_other_make_up_the_step(samples: Samples) -> bool:
    sums = [sum(times) for times in zip(*samples.host_ns.values(), strict=True)]
    return all(step >= total > 0 for step, total in zip(samples.step_ns, sums, strict=True))


# --- exact, on a clock of its own -------------------------------------------------------------------


def recorded(batches: Iterable[int], *, device: FakeDevice | None = None) -> Recorder:
    """Record epochs of so many batches in which each phase takes a time of its own."""
    time = Time()
    recorder = Recorder(batch_size=4, device="cpu", clock=time, events=device)
    for batches_of_epoch in batches:
        for _ in recorder.steps(Loader(time, batches_of_epoch)):
            time.passes(20)
            recorder.mark("forward")
            time.passes(40)
            recorder.mark("backward")
            time.passes(3)
    return recorder


class FakeDevice:
    """A device on which a boundary passes 1000 after the one before."""

    def __init__(self) -> None:
        self.recorded = 0

    def reserve(self, boundaries: int) -> None: ...

    def record(self) -> None:
        self.recorded += 1

    def intervals_ns(self) -> list[int]:
        return [1000] * max(0, self.recorded - 1)

    passed_ns = intervals_ns

    def stamp(self) -> int:
        return self.recorded

    def span_ns(self, first: int, last: int) -> int:
        return 1000 * (last - first)


def test_steps_phases_and_other():
    samples = samples_of(recorded([5]))
    # The first step is cold.
    assert samples.warmup_ns == [50 + 63]
    assert samples.step_ns == [10 + 63] * 4
    assert samples.host_ns == {"data": [10] * 4, "forward": [20] * 4, "backward": [40] * 4}
    assert samples.batch_size == 4
    assert samples.device_step_ns is None


def test_epochs_begin_and_end_apart_from_steady_steps():
    measurement = only(recorded([4, 4, 4]).result())
    samples, startup = measurement.samples, measurement.startup
    assert samples is not None
    assert samples.warmup_ns + samples.step_ns == [113, 73, 73, 73] * 3
    # The first step of an epoch is no steady one; that of the first epoch is the warm-up.
    assert samples.epoch_boundaries == [3, 7]
    assert [samples.host_ns["data"][i] for i in samples.epoch_boundaries] == [50, 50]
    assert startup is not None
    assert (startup.iterator_ns, startup.first_batch_ns) == (100, 50)
    assert startup.epoch_end_ns == [30, 30, 30]
    assert startup.epoch_start_ns == [150, 150]
    summary = summary_of(recorded([4, 4, 4]))
    assert summary.value("step") == pytest.approx(73e-9)
    assert summary.value("other") == pytest.approx(3e-9)
    assert summary.value("epoch_boundary") == pytest.approx(180e-9)


def test_time_between_epochs_belongs_to_no_step():
    time = Time()
    recorder = Recorder(device="cpu", clock=time)
    for _ in range(2):
        for _ in recorder.steps(Loader(time, 3)):
            time.passes(5)
            recorder.mark("forward")
        time.passes(1_000_000)
    samples = samples_of(recorder)
    assert max(samples.warmup_ns + samples.step_ns) == 55


def test_a_slow_beginning_is_the_warm_up():
    time = Time()
    recorder = Recorder(device="cpu", clock=time)
    for i in recorder.steps(Loader(time, 200)):
        time.passes(1000 if i < 30 else 90 + i % 3)
        recorder.mark("forward")
    measurement = only(recorder.result())
    samples = measurement.samples
    assert samples is not None
    assert samples.steady
    assert len(samples.warmup_ns) >= 30
    assert max(samples.step_ns) <= 102
    assert "no_steady_state" not in {note.code for note in measurement.notes}


def test_too_few_steps_to_be_steady_are_said_to_be_so():
    measurement = only(recorded([5]).result())
    assert measurement.samples is not None
    assert not measurement.samples.steady
    assert "no_steady_state" in {note.code for note in measurement.notes}


def test_a_single_step_is_kept():
    samples = samples_of(recorded([1]))
    assert samples.step_ns == [113]
    assert samples.warmup_ns == []


def test_epochs_of_one_step_have_no_steady_one():
    summary = summary_of(recorded([1] * 6))
    assert summary["step"] is None
    assert summary.value("first_step") == pytest.approx(113e-9)


def test_an_epoch_without_a_batch_leaves_no_step():
    samples = samples_of(recorded([0, 3, 0, 3]))
    assert len(samples.warmup_ns + samples.step_ns) == 6


def test_leaving_early_ends_the_step():
    time = Time()
    recorder = Recorder(device="cpu", clock=time)
    for epoch in range(2):
        for i in recorder.steps(Loader(time, 100)):
            time.passes(7)
            recorder.mark("forward")
            time.passes(2)
            if i == 4:
                break
        time.passes(10_000 * (epoch + 1))
    samples = samples_of(recorder)
    assert samples.warmup_ns + samples.step_ns == [59, 19, 19, 19, 19] * 2
    assert samples.epoch_boundaries == [4]


def test_an_exception_in_the_loop_keeps_what_came_before():
    time = Time()
    recorder = Recorder(device="cpu", clock=time)
    with pytest.raises(ArithmeticError, match="mine"):
        for i in recorder.steps(Loader(time, 100)):
            time.passes(7)
            recorder.mark("forward")
            if i == 4:
                raise ArithmeticError("mine")
            time.passes(40)
            recorder.mark("backward")
    samples = samples_of(recorder)
    assert samples.warmup_ns + samples.step_ns == [97, 57, 57, 57, 17]
    assert samples.host_ns["backward"] == [40, 40, 40, 0]


def test_the_device_is_a_second_clock():
    device = FakeDevice()
    recorder = recorded([4, 4], device=device)
    samples = samples_of(recorder)
    # data, forward, backward, other
    assert samples.device_step_ns == [4000] * 7
    assert samples.device_ns == {phase: [1000] * 7 for phase in ("data", "forward", "backward")}
    assert samples.host_ns["forward"] == [20] * 7
    summary = summary_of(recorder)
    assert summary.value("step") == pytest.approx(4e-6)
    assert summary.value("stall") == pytest.approx(1e-6)
    assert summary.value("wait") == pytest.approx(10e-9)


@pytest.mark.parametrize("mark", [False, True])
def test_nothing_recorded_is_an_error_in_words(mark):
    recorder = Recorder(device="cpu")
    if mark:
        recorder.mark("forward")
        recorder.mark("backward")
    with pytest.raises(ValueError, match=r"iterate over recorder\.steps"):
        recorder.result()
    for _ in recorder.steps([]):
        pass
    with pytest.raises(ValueError, match=r"iterate over recorder\.steps"):
        recorder.result()


# --- a real loop ------------------------------------------------------------------------------------


class Loop:
    """A loop as users write them."""

    def __init__(self, recorder: Recorder, *, accumulate: int = 1) -> None:
        torch.manual_seed(0)
        self.recorder, self.accumulate = recorder, accumulate
        self.model = Perceptron()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loss_fn = torch.nn.CrossEntropyLoss()
        self.after: dict[str, Callable[[], None]] = {}

    def epoch(self, loader: Iterable[Any]) -> None:
        for i, (images, labels) in enumerate(self.recorder.steps(loader)):
            images, labels = images.to("cpu"), labels.to("cpu")
            self._mark("h2d")
            loss = self.loss_fn(self.model(images), labels)
            self._mark("forward")
            loss.backward()
            self._mark("backward")
            if (i + 1) % self.accumulate == 0:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self._mark("clip")
                self.optimizer.step()
                self.optimizer.zero_grad()
                self._mark("optimizer")

    def _mark(self, phase: str) -> None:
        self.after.get(phase, lambda: None)()
        self.recorder.mark(phase)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_real_loop(workers):
    recorder = Recorder(name="mine", batch_size=8, device="cpu")
    loop = Loop(recorder)
    loader = DataLoader(Pixels(), batch_size=8, num_workers=workers)
    for _ in range(3):
        loop.epoch(loader)
    measurement = only(recorder.result())
    samples, startup = measurement.samples, measurement.startup
    assert samples is not None
    assert startup is not None
    assert measurement.case.key == "mine"
    assert measurement.case.settings is None
    assert list(samples.host_ns) == ["data", "h2d", "forward", "backward", "clip", "optimizer"]
    assert len(samples.warmup_ns) + len(samples.step_ns) == 24
    assert phases_and_other_make_up_the_step(samples)
    assert len(samples.epoch_boundaries) == 2
    assert [b - a for a, b in pairwise(samples.epoch_boundaries)] == [8]
    assert len(startup.epoch_end_ns or []) == 3
    assert len(startup.epoch_start_ns or []) == 2
    assert min(startup.iterator_ns or 0, startup.first_batch_ns or 0) > 0
    assert (samples.recorder_ns_per_step or 0) > 0
    assert samples.counters is not None
    assert samples.counters.wall_ns >= sum(samples.step_ns)
    assert (measurement.facts and measurement.facts.device) == "cpu"


def test_recording_does_not_change_the_training():
    with_recorder, without = Loop(Recorder(device="cpu")), Loop(Recorder(device="cpu"))
    with_recorder.epoch(DataLoader(Pixels(), batch_size=8))
    without.recorder = Deaf()  # type: ignore[assignment]
    without.epoch(DataLoader(Pixels(), batch_size=8))
    for one, other in zip(with_recorder.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)


class Deaf:
    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        yield from batches

    def mark(self, phase: str) -> None: ...


def test_a_phase_that_some_steps_skip_is_zero_there():
    recorder = Recorder(device="cpu")
    Loop(recorder, accumulate=4).epoch(DataLoader(Pixels(), batch_size=4))
    samples = samples_of(recorder)
    taken = [i for i, time in enumerate(samples.host_ns["optimizer"]) if time]
    assert taken == [i for i, time in enumerate(samples.host_ns["clip"]) if time]
    # The first step is the warm-up, so the fourth, eighth … are the third, seventh …
    assert taken == [2, 6, 10, 14]


@pytest.mark.parametrize("batches", [[{"x": 1}] * 5, range(5), (letter for letter in "abcde")])
def test_anything_that_can_be_iterated_is_a_loader(batches):
    recorder = Recorder(device="cpu")
    seen = []
    for batch in recorder.steps(batches):
        seen.append(batch)
        recorder.mark("work")
    assert len(seen) == 5
    assert len(samples_of(recorder).step_ns) == 4


def test_what_the_loader_raises_passes_through_and_the_steps_before_are_kept():
    recorder = Recorder(device="cpu")
    with pytest.raises(LookupError, match="has no label"):
        for _ in recorder.steps(DataLoader(Raising(), batch_size=1)):
            recorder.mark("work")
    samples = samples_of(recorder)
    assert len(samples.warmup_ns) + len(samples.step_ns) == 4


DELAY_NS = 4_000_000
CLOCK = count(0, 1000).__next__
"""A microsecond a reading: no machine is too busy for it."""


class Slow(Pixels):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index % 4 == 0:
            spin(DELAY_NS, CLOCK)
        return super().__getitem__(index)


@pytest.mark.parametrize("phase", ["data", "h2d", "forward", "backward", "clip", "optimizer"])
def test_a_planted_delay_comes_back_where_it_was_put(phase):
    recorder = Recorder(device="cpu", clock=CLOCK)
    loop = Loop(recorder)
    loop.after[phase] = lambda: spin(DELAY_NS, CLOCK)
    loop.epoch(DataLoader(Slow() if phase == "data" else Pixels(), batch_size=4))
    samples = samples_of(recorder)
    medians = {name: sorted(times)[len(times) // 2] for name, times in samples.host_ns.items()}
    assert DELAY_NS <= medians.pop(phase) < 1.5 * DELAY_NS
    assert max(medians.values()) < DELAY_NS / 2


# --- to a file and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_a_saved_loop_comes_back_and_is_shown(tmp_path, name):
    recorder = Recorder(name="mine", batch_size=4, device="cpu")
    loop = Loop(recorder)
    for _ in range(3):
        loop.epoch(DataLoader(Pixels(), batch_size=4))
    recorder.save(tmp_path / name)
    loaded = bsprof.load(tmp_path / name)
    expected = only(recorder.result())
    assert only(loaded).samples is not None
    assert msgspec.structs.replace(only(loaded).samples, counters=None, recorder_ns_per_step=None) == (
        msgspec.structs.replace(expected.samples, counters=None, recorder_ns_per_step=None)
    )
    assert only(loaded).startup == expected.startup
    bsprof.save(loaded, tmp_path / "again.json")
    assert bsprof.load(tmp_path / "again.json") == loaded

    shown = subprocess.run(
        [sys.executable, "-m", "bsprof", "show", name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    for word in ("mine", "forward", "clip", "samples/s"):
        assert word in shown.stdout


def test_a_loop_without_a_steady_step_is_shown_too(tmp_path, capsys):
    from bsprof.report import terminal

    recorded([1] * 4).save(tmp_path / "run.json")
    terminal.render(store.load(tmp_path / "run.json"), terminal.console())
    assert "loop" in capsys.readouterr().out


def test_the_package_offers_what_it_says():
    assert set(bsprof.__all__) == {"Recorder", "Result", "Watching", "load", "save", "watch_loaders"}
    for name in bsprof.__all__:
        assert getattr(bsprof, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        bsprof.nothing_like_it  # noqa: B018
