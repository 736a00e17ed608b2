"""One case, really measured: what is kept, when it stops, what it says about itself, and what survives a failure."""

from __future__ import annotations

import math
import multiprocessing
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import psutil
import pytest
import torch
from factories import FailsInBackward, Perceptron, Pixels
from torch.utils.data import IterableDataset

from bsprof import store
from bsprof.errors import BsprofError
from bsprof.loader import watching
from bsprof.loader.measuring import FEWEST_IN_SHORT, watch_training
from bsprof.measure import case as measuring
from bsprof.measure import failures
from bsprof.measure.case import CaseRun
from bsprof.metrics import METRICS, CaseSummary, summarise
from bsprof.model import PHASES, Case, Environment, Measurement, Plan, Samples, Settings, Stop, case_key
from bsprof.readings import Reading
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.plan import collapse
from bsprof.sweep.runner import ProcessExecutor

GOLDEN = store.load(Path(__file__).parent / "golden" / "result-schema-1.json")
CPU_ONLY: Environment = msgspec.structs.replace(GOLDEN.environment, accelerators=())
NEVER = 1e-9
"""A precision that no case reaches."""


def settings(**chosen: Any) -> Settings:
    model, data = chosen.pop("model", Perceptron), chosen.pop("data", Pixels)
    names = {"model": f"{model.__module__}:{model.__name__}", "data": f"{data.__module__}:{data.__name__}"}
    return collapse(Settings(**{"batch_size": 4, "threads": 1, **names, **chosen}), CPU_ONLY)


@pytest.fixture(scope="module", autouse=True)
def _restored() -> Iterator[None]:
    """A case sets up its process as it likes, for it has one of its own; here it shares the tests'."""
    threads = torch.get_num_threads()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(measuring, "present_device", lambda: torch.device("cpu"))
        yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
    torch.use_deterministic_algorithms(False)


def measure(chosen: Settings, *, emit: measuring.Emit = lambda *_: None, process: int = 0, **stop: Any) -> Measurement:
    stop = {"max_case_time_s": 0.5, "precision": NEVER, **stop}
    plan = Plan(stop=Stop(**stop), malloc="default")
    case = Case(key=case_key(chosen), settings=chosen, process=process)
    asked = time.perf_counter_ns()
    return measuring.measure(case, plan, cache=Path("unused"), requested_ns=asked, emit=emit)


def watched(chosen: Settings, watch: measuring.Watch = watch_training, **kind: Any) -> Measurement:
    """Measure a case whose loader is watched after its timed steps."""
    plan = Plan(stop=Stop(max_case_time_s=1.0, precision=NEVER), malloc="default", profile_steps=0, **kind)
    case, asked = Case(key=case_key(chosen), settings=chosen), time.perf_counter_ns()
    return measuring.measure(case, plan, cache=Path("unused"), requested_ns=asked, emit=lambda *_: None, watch=watch)


def samples_of(measurement: Measurement) -> Samples:
    assert measurement.outcome.kind == "ok", measurement.outcome
    assert measurement.samples is not None
    return measurement.samples


def summary_of(measurement: Measurement) -> CaseSummary:
    (summary,) = summarise(msgspec.structs.replace(GOLDEN, measurements=[measurement]))
    return summary


def codes(measurement: Measurement) -> set[str]:
    """Return the notes' codes but for those about the machine, which others use as well."""
    return {note.code for note in measurement.notes} - {"cpu_contended", "cpu_oversubscribed", "steal", "cpu_quota"}


# --- a healthy case ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 2], ids=["0 workers", "2 workers"])
def measured(request: pytest.FixtureRequest) -> Measurement:
    return measure(settings(workers=request.param, prefetch=3), max_case_time_s=1.0)


def test_phases_make_up_the_step(measured):
    samples = samples_of(measured)
    assert tuple(samples.host_ns) == PHASES
    for i, step in enumerate(samples.step_ns):
        assert step == sum(times[i] for times in samples.host_ns.values())
    residual = METRICS["residual"].compute(Reading(samples))
    assert isinstance(residual, float)
    assert abs(residual) < 0.01
    assert samples.device_step_ns is samples.device_ns is None


def test_warm_up_uses_up_what_was_prepared(measured):
    samples = samples_of(measured)
    chosen = measured.case.settings
    assert chosen is not None
    assert len(samples.warmup_ns) >= chosen.workers * (chosen.prefetch or 0) + 1
    assert samples.steady is ("no_steady_state" not in codes(measured))


def test_starting_is_kept_apart(measured):
    startup = measured.startup
    assert startup is not None
    for cost in (startup.process_ns, startup.build_ns, startup.iterator_ns, startup.first_batch_ns):
        assert cost is not None
        assert cost > 0
    # The cold step begins with its batch.
    assert samples_of(measured).warmup_ns[0] > (startup.first_batch_ns or 0)
    assert measured.inside_s is not None
    assert measured.inside_s > sum(samples_of(measured).warmup_ns) / 1e9


def test_blocks_alternate_and_their_order_too(measured):
    samples = samples_of(measured)
    kinds = [block.kind for block in samples.blocks]
    pairs = [tuple(kinds[i : i + 2]) for i in range(0, len(kinds), 2)]
    expected = [("instrumented", "bare"), ("bare", "instrumented")] * len(pairs)
    assert len(pairs) >= 2
    assert pairs == expected[: len(pairs)]
    for left, right in zip(samples.blocks[::2], samples.blocks[1::2], strict=True):
        assert left.steps == right.steps
    assert sum(block.steps for block in samples.blocks if block.kind == "instrumented") == len(samples.step_ns)


def test_it_says_how_far_it_bent_its_numbers(measured):
    reading = Reading(samples_of(measured))
    assert reading.distortion is not None
    assert reading.distortion.low is not None
    assert reading.distortion.low < reading.distortion.value
    assert (reading.samples.recorder_ns_per_step or 0) > 0


def test_an_epochs_end_is_priced_apart(measured):
    samples, startup = samples_of(measured), measured.startup
    assert samples.epoch_boundaries == []
    assert startup is not None
    for costs in (startup.epoch_end_ns, startup.epoch_start_ns):
        assert costs is not None
        assert len(costs) in (1, 2)
        assert min(costs) > 0
    assert summary_of(measured).value("epoch_boundary")


def test_what_was_in_force_is_said(measured):
    facts, samples = measured.facts, samples_of(measured)
    assert facts is not None
    assert (facts.device, facts.threads, facts.malloc) == ("cpu", 1, "default")
    assert (facts.parameters, facts.classes, facts.image_size, facts.samples_in_dataset) == (1930, 10, 8, 64)
    assert samples.batch_size == 4
    assert samples.counters is not None
    assert samples.counters.wall_ns >= sum(block.wall_ns for block in samples.blocks)
    assert samples.final_loss is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_watched_after_the_timed_steps(workers, monkeypatch):
    """Its time is up at once, so that it is the fewest batches that it goes on for, however slowly they come."""
    monkeypatch.setitem(measuring.WATCH_SHARE, "short", 1e-9)
    monkeypatch.setattr(watching, "PATIENCE", math.inf)
    measurement = watched(settings(workers=workers))
    loading = measurement.loading
    assert samples_of(measurement).step_ns
    assert loading.settings.workers == workers
    assert (loading.consumer.kind, loading.consumer.model) == ("model", "factories:Perceptron")
    assert sum(at is not None for at in loading.batches.got_at_ns) == FEWEST_IN_SHORT
    assert loading.cached_step_ns and loading.h2d_ns is None and loading.capacity_cores is None
    assert multiprocessing.active_children() == []


def test_a_loader_is_watched_in_full_or_not_at_all_as_the_plan_says():
    assert watched(settings(), diagnose="full").loading.capacity_cores.value > 0
    assert watched(settings(), diagnose="off").loading is None


def test_watching_that_fails_is_a_note_and_costs_no_result():
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such luck")

    measurement = watched(settings(), watch=fails)
    assert samples_of(measurement).step_ns
    assert measurement.loading is None
    assert [note.text for note in measurement.notes if note.code == "inspection_failed"] == [
        "loader: RuntimeError: no such luck"
    ]


def test_stages_and_precision_are_told():
    told: list[tuple[str, int, float | None]] = []
    measurement = measure(settings(), emit=lambda *words: told.append(words), max_case_time_s=0.3)
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["build", "warmup", "measure", "inspect", "epoch"]
    steps = [count for _, count, _ in told]
    assert steps == sorted(steps)
    assert steps[-1] == len(samples_of(measurement).step_ns)
    assert any(precision for _, _, precision in told)


class Remembering(Perceptron):
    built: ClassVar[list[torch.Tensor]] = []

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.built.append(next(self.parameters()).detach().clone())


def test_the_seed_fixes_the_weights_and_each_process_has_its_own():
    Remembering.built.clear()
    for process in (0, 0, 1):
        measure(settings(model=Remembering), process=process, max_steps=2, min_steps=2, max_case_time_s=0.2)
    first, again, other = Remembering.built
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- when it stops ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "workers"), [(2, 0), (7, 0), (7, 2), (30, 0)])
def test_max_steps_is_the_most(most, workers):
    measurement = measure(settings(workers=workers), max_steps=most, min_steps=2, max_case_time_s=2)
    samples = samples_of(measurement)
    assert len(samples.step_ns) == most
    assert codes(measurement) >= {"precision_not_reached"}
    summary_of(measurement)


def test_min_steps_is_the_least_and_precision_ends_it():
    measurement = measure(settings(), precision=0.9, min_steps=1500, max_case_time_s=60)
    samples = samples_of(measurement)
    assert len(samples.step_ns) >= 1500
    precision = METRICS["precision"].compute(Reading(samples))
    assert isinstance(precision, float)
    assert precision <= 0.9
    assert "precision_not_reached" not in codes(measurement)


def test_time_ends_it_and_the_precision_that_was_reached_is_said():
    measurement = measure(settings(), max_case_time_s=0.4)
    assert len(samples_of(measurement).step_ns) < Stop().max_steps
    (note,) = (note for note in measurement.notes if note.code == "precision_not_reached")
    assert f"after {len(samples_of(measurement).step_ns)} steps" in note.text
    assert "±" in note.text


def test_a_case_that_never_becomes_steady_says_so(monkeypatch):
    monkeypatch.setattr(measuring.stats, "is_steady", lambda *_, **__: False)
    measurement = measure(settings(), max_case_time_s=0.4)
    assert codes(measurement) >= {"no_steady_state"}
    assert samples_of(measurement).steady is False


class NotANumber(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * torch.nan


def test_a_loss_that_is_no_number_is_noted():
    measurement = measure(settings(model=NotANumber), max_case_time_s=0.3)
    assert codes(measurement) >= {"loss_not_finite"}
    written = msgspec.json.encode(measurement)
    assert msgspec.json.decode(written, type=Measurement).outcome.kind == "ok"


def test_a_batch_larger_than_the_data_is_noted():
    measurement = measure(settings(batch_size=100), max_case_time_s=0.3)
    assert codes(measurement) >= {"small_dataset"}
    samples_of(measurement)


# --- data that ends ---------------------------------------------------------------------------------

SLOW_START_NS = 4_000_000


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """Epochs of 5 batches of 4, slow to begin."""

    classes = Pixels.classes
    batches = 5

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        end = time.perf_counter_ns() + SLOW_START_NS
        while time.perf_counter_ns() < end:
            pass
        for i in range(4 * self.batches):
            yield torch.full((3, 8, 8), i / 64), i % 10


class OneBatchStream(Stream):
    batches = 1


def test_epochs_that_end_inside_the_window_are_flagged_and_left_out():
    measurement = measure(settings(data=Stream), max_case_time_s=0.6)
    samples = samples_of(measurement)
    boundaries = samples.epoch_boundaries
    slow = {i for i, wait in enumerate(samples.host_ns["data"]) if wait >= SLOW_START_NS}
    assert len(boundaries) >= 2
    assert set(boundaries) <= slow
    reading = Reading(samples)
    assert reading.step.size == len(samples.step_ns) - len(boundaries)
    assert reading.host["data"] < statistics.fmean(samples.host_ns["data"]) * 1e-9
    assert measurement.startup is not None
    assert measurement.startup.epoch_end_ns is None
    assert summary_of(measurement).value("epoch_boundary") is None


def test_epochs_of_one_batch_leave_no_steady_step_and_are_no_failure():
    measurement = measure(settings(data=OneBatchStream), max_case_time_s=0.3)
    samples = samples_of(measurement)
    assert samples.epoch_boundaries == list(range(len(samples.step_ns)))
    summary = summary_of(measurement)
    assert summary["step"] is None
    assert summary.value("steps") == 0


class TooShort(Stream):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        yield torch.zeros(3, 8, 8), 0


def test_data_without_a_full_batch_is_an_error_in_words():
    outcome = measure(settings(data=TooShort)).outcome
    assert (outcome.kind, outcome.phase) == ("error", "data")
    assert "no full batch" in (outcome.message or "")
    assert "--batch-size" in (outcome.hint or "")


# --- a case that fails ------------------------------------------------------------------------------


def test_what_was_known_survives_a_failure_in_the_first_step():
    measurement = measure(settings(model=FailsInBackward))
    assert (measurement.outcome.kind, measurement.outcome.phase) == ("error", "backward")
    assert "no gradient today" in (measurement.outcome.message or "")
    assert measurement.samples is None
    assert measurement.facts is not None
    assert measurement.facts.parameters == 1930
    assert measurement.startup is not None
    assert (measurement.startup.build_ns or 0) > 0
    assert measurement.startup.first_batch_ns is None


def test_a_failure_while_building_is_an_outcome():
    measurement = measure(msgspec.structs.replace(settings(), model=f"{__name__}:no_such_thing"))
    assert (measurement.outcome.kind, measurement.outcome.phase) == ("error", "build")
    assert measurement.facts is None
    assert measurement.startup is not None
    assert measurement.startup.process_ns is not None


class Fuse(Perceptron):
    """Burns in the third step after it was lit."""

    lit_for = -1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if Fuse.lit_for >= 0:
            Fuse.lit_for += 1
        if Fuse.lit_for > 3:
            raise ArithmeticError("burnt")
        return super().forward(images)


@pytest.fixture
def fuse(monkeypatch):
    """Lit after the second pair of blocks: the third begins with an instrumented one."""
    monkeypatch.setattr(Fuse, "lit_for", -1)
    pairs = 0

    def emit(stage: str, steps: int, precision: float | None) -> None:
        nonlocal pairs
        pairs += steps > 0
        if pairs == 2:
            Fuse.lit_for = 0

    return emit


@pytest.mark.parametrize("data", [Pixels, OneBatchStream])
def test_blocks_that_were_finished_survive_a_failure_in_a_later_one(fuse, data):
    """Steps and epochs' ends of the unfinished block are not among what is kept."""
    measurement = measure(settings(model=Fuse, data=data), emit=fuse, max_case_time_s=5)
    assert (measurement.outcome.kind, measurement.outcome.phase) == ("error", "forward")
    samples = measurement.samples
    assert samples is not None
    assert len(samples.step_ns) == sum(block.steps for block in samples.blocks if block.kind == "instrumented")
    assert len(samples.step_ns) == len(samples.host_ns["data"]) > 0
    assert all(step < len(samples.step_ns) for step in samples.epoch_boundaries)
    summary = summary_of(measurement)
    assert not summary.ok
    assert summary.value("steps") is not None


# --- a device with a clock of its own ---------------------------------------------------------------


class SimulatedDevice:
    """A device that works through what it was given, in order, while the host goes on.

    `work` takes the device so long, from when it is free; a boundary passes when all work before it is done.
    """

    def __init__(self) -> None:
        self.free_at = 0
        self.broken = False

    def now(self) -> int:
        return max(self.free_at, time.perf_counter_ns())

    def work(self, nanoseconds: int) -> None:
        self.free_at = self.now() + nanoseconds

    def wait(self, device: torch.device) -> None:
        time.sleep(max(0, self.free_at - time.perf_counter_ns()) * 1e-9)

    def clock(self, device: torch.device) -> SimulatedClock:
        return SimulatedClock(self)


class SimulatedClock:
    def __init__(self, stream: SimulatedDevice) -> None:
        self.stream = stream
        self.times: list[int] = []
        self.stamps: list[int] = []
        self.room = 0

    def reserve(self, boundaries: int) -> None:
        self.room = max(self.room, len(self.times) + boundaries)

    def record(self) -> None:
        self.times.append(self.stream.now())

    def passed_ns(self) -> list[int]:
        now = time.perf_counter_ns()
        return self._between([passed for passed in self.times if passed <= now])

    def intervals_ns(self) -> list[int]:
        if self.stream.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self._between(self.times)

    def stamp(self) -> int:
        self.stamps.append(self.stream.now())
        return len(self.stamps) - 1

    def span_ns(self, first: int, last: int) -> int:
        return self.stamps[last] - self.stamps[first]

    @staticmethod
    def _between(times: list[int]) -> list[int]:
        return [b - a for a, b in pairwise(times)]


class OnDevice(Perceptron):
    """Leaves its work to a device, 4 ms of it in `forward`."""

    stream = SimulatedDevice()
    work_ns = 4_000_000

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.stream.work(self.work_ns)
        return super().forward(images)


class Delayed(Pixels):
    """A wait of 0.5 ms for each batch of 4."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        end = time.perf_counter_ns() + 125_000
        while time.perf_counter_ns() < end:
            pass
        return super().__getitem__(index)


@pytest.fixture
def device(monkeypatch):
    stream = SimulatedDevice()
    monkeypatch.setattr(OnDevice, "stream", stream)
    monkeypatch.setattr(measuring, "device_clock", stream.clock)
    monkeypatch.setattr(measuring, "wait_for", stream.wait)
    return stream


def test_a_wait_that_the_device_does_not_feel_is_hidden(device):
    """4 ms of work a step and 0.5 ms of waiting beside it: the device never runs dry."""
    measurement = measure(settings(model=OnDevice, data=Delayed), max_case_time_s=0.6)
    samples = samples_of(measurement)
    assert samples.device_step_ns is not None
    assert samples.device_ns is not None
    assert len(samples.device_step_ns) == len(samples.step_ns)
    assert samples.device_ns.keys() == samples.host_ns.keys()
    assert {len(times) for times in samples.device_ns.values()} == {len(samples.step_ns)}
    for i, step in enumerate(samples.device_step_ns):
        assert step == sum(times[i] for times in samples.device_ns.values())
    assert all((block.device_wall_ns or 0) > 0 for block in samples.blocks)

    summary = summary_of(measurement)
    step, wait, stall, hidden = (summary.value(key) for key in ("step", "wait", "stall", "hidden"))
    assert None not in (step, wait, stall, hidden)
    assert step == pytest.approx(4e-3, rel=0.05)
    assert wait >= 0.5e-3
    assert hidden == pytest.approx(wait - stall)
    assert stall < wait / 2
    assert summary.value("forward.device") > summary.value("forward.host") / 2
    assert abs(summary.value("residual")) < 0.01
    assert summary["distortion"] is not None


def test_a_device_that_runs_dry_waits_as_long_as_the_host(device, monkeypatch):
    monkeypatch.setattr(OnDevice, "work_ns", 10_000)
    summary = summary_of(measure(settings(model=OnDevice, data=Delayed), max_case_time_s=0.6))
    wait, stall, hidden = (summary.value(key) for key in ("wait", "stall", "hidden"))
    assert None not in (wait, stall, hidden)
    assert stall >= 0.4e-3
    assert abs(hidden) < wait / 2


def test_no_event_is_made_inside_a_block(monkeypatch):
    stream = SimulatedDevice()
    monkeypatch.setattr(OnDevice, "stream", stream)
    made: list[SimulatedClock] = []

    def clock(device: torch.device) -> SimulatedClock:
        made.append(stream.clock(device))
        return made[-1]

    monkeypatch.setattr(measuring, "device_clock", clock)
    samples_of(measure(settings(model=OnDevice), max_case_time_s=0.3))
    # The warm-up's clock, which counts for nothing, makes its events as they come.
    measured, _, *_ = made
    assert len(measured.times) > 10
    assert measured.room >= len(measured.times)


def test_steps_that_the_device_has_yet_to_pass_count_for_the_precision_reached(device):
    """The host is done with all steps before the device has passed enough of them for an interval."""
    measurement = measure(settings(model=OnDevice), max_case_time_s=20, min_steps=12, max_steps=12, precision=0.5)
    assert len(samples_of(measurement).step_ns) == 12
    assert "precision_not_reached" not in codes(measurement)


def test_work_that_the_device_has_yet_to_do_counts_as_time(device, monkeypatch):
    """50 ms a step that the host is done with at once: it could queue minutes of work within the time it has."""
    monkeypatch.setattr(OnDevice, "work_ns", 50_000_000)
    measurement = measure(settings(model=OnDevice), max_case_time_s=2.0, precision=0.001)
    steps = len(samples_of(measurement).warmup_ns) + sum(block.steps for block in samples_of(measurement).blocks)
    assert 8 <= steps <= 60


def test_telemetry_is_of_the_blocks_and_not_of_the_lead_in_that_the_device_still_had_to_do(device, monkeypatch):
    monkeypatch.setattr(OnDevice, "work_ns", 30_000_000)
    windows: list[int] = []
    monkeypatch.setattr(measuring.CaseRun, "_read_telemetry", lambda _, begin, end: windows.append(end - begin))
    samples = samples_of(measure(settings(model=OnDevice), max_case_time_s=10, min_steps=4, max_steps=4))
    worked_ns = sum(block.device_wall_ns or 0 for block in samples.blocks)
    assert windows == [pytest.approx(worked_ns, rel=0.15)]


def test_the_queue_is_filled_before_the_first_block_and_events_are_made_before_that(device, monkeypatch):
    told: list[str] = []
    run_block = measuring.run_block

    def recording(stages, steps, tape):
        told.append(f"{'bare' if tape is None else 'instrumented'} {steps}")
        return run_block(stages, steps, tape)

    reserve = measuring.Tape.reserve

    def reserving(tape, marks):
        told.append(f"room for {marks}")
        reserve(tape, marks)

    monkeypatch.setattr(measuring, "run_block", recording)
    monkeypatch.setattr(measuring.Tape, "reserve", reserving)
    samples = samples_of(measure(settings(model=OnDevice), max_case_time_s=2.0))
    size = samples.blocks[0].steps
    room, lead_in, again, first, *_ = told[told.index(f"room for {size * len(PHASES) + 1}") :]
    assert lead_in == f"bare {max(size, measuring.LEAD_IN)}"
    assert (room, first) == (again, f"instrumented {size}")


def test_a_device_that_fails_leaves_its_outcome_and_no_times(device, fuse, monkeypatch):
    def emit(stage: str, steps: int, precision: float | None) -> None:
        fuse(stage, steps, precision)
        device.broken = device.broken or steps > 0

    measurement = measure(settings(model=Fuse), emit=emit, max_case_time_s=5)
    assert (measurement.outcome.kind, measurement.outcome.message) == ("error", "ArithmeticError: burnt")
    assert measurement.samples is None
    assert measurement.facts is not None


def test_a_device_that_fails_at_the_end_is_an_outcome(device):
    def emit(stage: str, steps: int, precision: float | None) -> None:
        device.broken = stage == "measure"

    measurement = measure(settings(), emit=emit, max_case_time_s=0.3)
    assert measurement.outcome.kind == "error"
    assert "illegal memory access" in (measurement.outcome.message or "")
    assert measurement.samples is None


# --- in a process of its own ------------------------------------------------------------------------


class Listening:
    def __init__(self) -> None:
        self.stages: Counter[str] = Counter()

    def started(self, case: Case) -> None: ...
    def tick(self) -> None: ...
    def finished(self, measurement: Measurement) -> None: ...

    def advanced(self, case: Case, stage: str, steps: int, precision: float | None) -> None:
        self.stages[stage] += 1


def test_the_real_executor_measures_in_a_process_of_its_own(monkeypatch):
    """With what cannot be undone here: a pinned allocator and a limit on memory."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(Path(__file__).parent)
    chosen = settings(workers=1)
    plan = Plan(stop=Stop(max_case_time_s=0.5, precision=0.5), host_memory_bytes=16 * 2**30, deadline_s=120)
    watcher = Listening()
    with Interruption() as stop:
        case = Case(key=case_key(chosen), settings=chosen)
        measurement = ProcessExecutor(stop).measure(case, plan, watcher)
    samples_of(measurement)
    assert measurement.case == case
    assert measurement.facts is not None
    assert measurement.facts.malloc.startswith(("pinned: ", "default ("))
    assert measurement.inside_s is not None
    assert 0 < measurement.inside_s < measurement.wall_s
    assert measurement.startup is not None
    assert measurement.startup.process_ns is not None
    assert watcher.stages.keys() == {"build", "warmup", "measure", "inspect", "loader", "epoch"}


@pytest.fixture
def torn_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Loader iterators that were torn down; what a case abandons is let go of when the test is over."""
    found: list[object] = []
    abandoned: list[BaseException] = []
    with pytest.MonkeyPatch.context() as patch:
        iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
        patch.setattr(iterator, "_shutdown_workers", lambda self: found.append(self))
        monkeypatch.setattr(failures, "_ABANDONED", abandoned)
        yield found
    abandoned.clear()


def test_a_loader_whose_worker_died_is_not_torn_down(torn_down: list[object]) -> None:
    """Its queues may be locked for good: torch raised from a signal's handler, wherever the main thread was."""
    from factories import KillsItsWorker

    assert measure(settings(data=KillsItsWorker, workers=1)).outcome.kind == "crash"
    assert torn_down == []


# --- what is looked at beside the clock ---------------------------------------------------------------


def test_what_was_looked_at_is_kept(measured):
    facts, profile, seen = measured.facts, measured.profile, measured.telemetry
    assert facts is not None
    assert facts.clock == "host"
    assert facts.dtype == "fp32"
    assert facts.batch_bytes == 4 * (3 * 8 * 8 * 4 + 8)
    # One product forward, one for the weights' gradient; nobody asks for the images'.
    assert facts.flops_per_step == 2 * 2 * 4 * 192 * 10
    assert facts.backends is not None
    assert profile is not None
    assert profile.steps == 5
    assert tuple(profile.phase_ns) == PHASES
    assert profile.operators
    assert profile.busy_ns is None
    assert seen is not None
    assert (seen.source, seen.device, seen.energy) == ("none", {}, None)
    assert seen.window_ns > 0
    assert measured.memory is None or measured.memory.pool == "host"
    assert measured.serialised is None  # one clock: nothing overlaps


def test_what_was_not_asked_for_is_not_looked_at():
    chosen = settings()
    plan = Plan(stop=Stop(max_case_time_s=0.3, precision=NEVER), malloc="default", profile_steps=0, telemetry_hz=0)
    case = Case(key=case_key(chosen), settings=chosen)
    found = measuring.measure(case, plan, cache=Path("unused"), requested_ns=0, emit=lambda *_: None)
    assert samples_of(found)
    assert (found.profile, found.telemetry, found.facts and found.facts.flops_per_step) == (None, None, None)


def test_a_look_that_fails_costs_a_note_and_not_the_result(monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("no profiler today")

    monkeypatch.setattr(measuring.profiling, "profile", refuse)
    measurement = measure(settings())
    assert len(samples_of(measurement).step_ns) > 10
    assert measurement.profile is None
    (note,) = (note for note in measurement.notes if note.code == "inspection_failed")
    assert note.text == "profiler window: RuntimeError: no profiler today"


def test_a_trace_that_cannot_be_kept_costs_the_trace_alone(tmp_path):
    (tmp_path / "taken.json").mkdir()
    case = Case(key="case", settings=settings())
    plan = Plan(stop=Stop(max_case_time_s=0.3, precision=NEVER), malloc="default", telemetry_hz=0)
    trace = tmp_path / "taken.json"
    found = measuring.measure(case, plan, cache=tmp_path, requested_ns=0, emit=lambda *_: None, trace=trace)
    assert found.profile is not None and found.profile.operators and found.profile.trace is None
    (note,) = (note for note in found.notes if note.code == "inspection_failed")
    assert note.text.startswith("profiler window: --trace: ")


def test_a_recording_that_cannot_be_read_costs_a_note(monkeypatch):
    def refuse(path: Path) -> None:
        raise BsprofError(f"{path.name}: line 3: no sample", hint="it was damaged")

    monkeypatch.setattr(measuring.telemetry, "read", refuse)
    measurement = measure(settings(), max_case_time_s=0.3)
    assert samples_of(measurement)
    assert measurement.telemetry is None
    (note,) = (note for note in measurement.notes if note.code == "inspection_failed")
    assert re.fullmatch(r"telemetry: bsprof-telemetry-\d+\.jsonl: line 3: no sample; it was damaged", note.text)


def test_a_worker_that_dies_after_the_timed_steps_costs_a_note_and_no_teardown(torn_down, monkeypatch):
    def kill(*_: Any) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
        for _ in range(100):
            time.sleep(0.05)  # torch's handler raises in here

    monkeypatch.setattr(measuring.flops, "count", kill)
    monkeypatch.setattr(CaseRun, "_price_epochs", lambda self: None)
    measurement = measure(settings(workers=1), max_case_time_s=0.3)
    assert samples_of(measurement)
    assert torn_down == []
    assert "killed by SIGKILL" in next(n.text for n in measurement.notes if n.code == "inspection_failed")


def test_long_steps_are_looked_at_in_fewer():
    """8 ms a step and 0.1 s for the case: 5 steps of the profiler would take more than a quarter of it."""
    from factories import Sleepy

    profile = measure(settings(data=Sleepy), max_case_time_s=0.1).profile
    assert profile is not None
    assert 1 <= profile.steps < 5


def test_no_sampler_and_no_recording_outlive_a_case(fuse, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.tempfile, "gettempdir", lambda: str(tmp_path))
    started = []
    record = measuring.telemetry.record

    def recorded(*arguments: Any) -> Any:
        sampler = record(*arguments)
        started.append(psutil.Process(sampler.pid))
        return sampler

    monkeypatch.setattr(measuring.telemetry, "record", recorded)
    assert measure(settings(model=Fuse), emit=fuse, max_case_time_s=5).outcome.kind == "error"
    samples_of(measure(settings(), max_case_time_s=0.3))
    assert len(started) == 2
    assert not any(sampler.is_running() for sampler in started)
    assert list(tmp_path.iterdir()) == []


def test_phases_one_by_one_tell_what_overlaps(device):
    """With a wait at each boundary the device works for nobody but the phase that asked it."""
    measurement = measure(settings(model=OnDevice, data=Delayed), max_case_time_s=0.6)
    assert measurement.facts is not None
    assert measurement.facts.clock == "host and device"
    assert measurement.serialised is not None
    serialised = measurement.serialised.host_ns
    assert tuple(serialised) == PHASES
    assert {len(times) for times in serialised.values()} <= set(range(1, 11))
    assert statistics.median(serialised["forward"]) >= OnDevice.work_ns
    assert statistics.median(serialised["data"]) < OnDevice.work_ns


def test_a_case_stops_on_the_devices_precision(device):
    """The host runs ahead and its steps scatter; the device's are all alike."""
    measurement = measure(settings(model=OnDevice, data=Delayed), max_case_time_s=5, precision=0.02)
    summary = summary_of(measurement)
    assert summary.value("precision") is not None
    assert summary.value("precision") <= 0.02
    assert "precision_not_reached" not in codes(measurement)


def test_what_has_no_deterministic_version_is_an_outcome():
    from factories import Unordered

    asked = measure(settings(model=Unordered, deterministic_algorithms=True))
    torch.use_deterministic_algorithms(False)
    assert (asked.outcome.kind, asked.outcome.phase) == ("nondeterministic", "forward")
    assert "put_" in (asked.outcome.message or "")
    assert measure(settings(model=Unordered), max_case_time_s=0.3).outcome.kind == "ok"


def test_what_a_model_switches_is_told_beside_what_was_asked():
    from factories import Switches

    facts = measure(settings(model=Switches), max_case_time_s=0.3).facts
    assert facts is not None
    assert facts.backends is not None
    assert facts.backends.cudnn_benchmark is True
