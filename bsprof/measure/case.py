"""One case, from nothing to raw samples: build, start, warm up, measure, price an epoch's end."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import torch

from bsprof import cgroup, stats
from bsprof.loading import Loading
from bsprof.measure import backends, flops, malloc, memory, profiling, telemetry
from bsprof.measure.clock import DeviceClock, device_clock, host_clock, present_device, wait_for
from bsprof.measure.companion import Companion
from bsprof.measure.counters import CounterWindow
from bsprof.measure.environment import cores_of_this_process
from bsprof.measure.failures import abandon, blame_a_worker, classify
from bsprof.measure.loop import Stage, Training, build_optimizer, run_block, run_serialised, running_phase
from bsprof.measure.tape import Steps, Tape, cost_per_step_ns
from bsprof.measure.world import BEFORE_REDUCE, Alone, World
from bsprof.model import (
    Block,
    Case,
    Counters,
    Facts,
    Measurement,
    Memory,
    Outcome,
    Plan,
    Profile,
    Samples,
    Serialised,
    Settings,
    Startup,
    Telemetry,
)
from bsprof.noun import Note
from bsprof.workloads.loading import build_loader
from bsprof.workloads.registry import Data, DataRequest, build_data, build_model

Emit = Callable[[str, int, float | None], None]
"""Tells the parent: stage, instrumented steps so far, precision so far."""


class Watch(Protocol):
    """Looks at the loader of a training for some seconds; `thorough` also asks what the machine could do."""

    def __call__(
        self, training: Training, stages: Sequence[Stage], model: str, seconds: float, *, thorough: bool
    ) -> Loading:
        """Return what was seen."""


WARMUP_SHARE = 0.3
"""Warm-up may take this share of `max_case_time_s`."""
STEADY_WINDOW = 20
"""Steps in each of the two windows that must agree; fewer where so many do not fit into the warm-up's share."""
SMALLEST_WINDOW = 4
BLOCK_SHARE = 1 / 50
"""A block lasts about this share of the time left to measure, so that there are some 25 pairs of blocks."""
LARGEST_BLOCK = 1000
"""Steps."""
LEAD_IN = 3
"""Steps that fill an accelerator's queue again after the last synchronisation of the warm-up: fewer where they would
take a quarter of the time left, and a block's worth where that is more, because the further the host gets ahead, the
more page-locked buffers are made for batches on their way."""
MEMORY_STEPS = 3
"""The caching allocator asks the driver for nothing new after a few steps."""
INSPECTION_SHARE = 0.25
"""What is looked at after the timed window may take this share of `max_case_time_s`."""
WATCH_SHARE = {"off": 0.0, "short": 0.1, "full": 0.4}
"""The loader is watched for this share of `max_case_time_s`."""
EXCHANGE_SHARE = 0.25
"""Blocks of ranks with and without an exchange of gradients may take this share of `max_case_time_s`."""
EXCHANGE_PAIRS = 20
"""Pairs of such blocks, where there is time for so many."""
EPOCH_SHARE = 0.1
"""A second epoch's end is priced while the first took less than this share of `max_case_time_s`."""


def data_request(settings: Settings, plan: Plan, cache: Path) -> DataRequest:
    """Return what a data set needs to know of `settings` and `plan`; `cache` is where generated data lies."""
    return DataRequest(
        image_size=settings.image_size,
        root=Path(plan.data_root) if plan.data_root else None,
        download=plan.download,
        seed=plan.seed,
        cache=cache,
    )


def measure(
    case: Case,
    plan: Plan,
    *,
    cache: Path,
    requested_ns: int,
    emit: Emit,
    trace: Path | None = None,
    watch: Watch | None = None,
) -> Measurement:
    """Measure `case` in this process and return what came of it; a failure is an outcome, never an exception.

    `requested_ns` is the parent's reading of the host clock when it asked for this process. The parent adds `wall_s`.
    The profiler's trace is kept in the file `trace`, if one is named, and `watch` looks at the loader.
    """
    run = CaseRun(case, plan, cache, emit, trace, watch)
    entered_ns = host_clock()
    with run.failing():
        run.go(requested_ns, entered_ns)
    return run.measurement(requested_ns, entered_ns)


class CaseRun:
    """The state of one case while it is measured. What is known survives a failure in a later stage."""

    def __init__(
        self,
        case: Case,
        plan: Plan,
        cache: Path,
        emit: Emit,
        trace: Path | None,
        watch: Watch | None = None,
        world: World | None = None,
    ) -> None:
        assert case.settings is not None
        self.case = case
        self.world = world or Alone()
        self.outcome = Outcome(kind="ok")
        self._watch = watch
        self.trace = trace
        self.settings, self.plan, self.cache, self.emit = case.settings, plan, cache, emit
        self.seed = plan.seed + case.process
        self.stage = "build"
        self.facts: Facts | None = None
        self.startup = Startup()
        self.notes: list[Note] = []
        self._training: Training | None = None
        self._data: Data | None = None
        self._device = present_device()
        self._device_clock: DeviceClock | None = device_clock(self._device)
        self.on_device = self._device.type != "cpu" or self._device_clock is not None
        self._tape = Tape(device_clock=self._device_clock)
        self._blocks: list[Block] = []
        self._block_stamps: list[tuple[int, int]] = []
        self._warmup_ns: list[int] = []
        self._steady = True
        self._step_ns: list[int] = []
        self._timed: Samples | None = None
        self._memory = memory.watch(self._device)
        self._sampler: Companion | None = None
        self._recording = Path(tempfile.gettempdir(), f"bsprof-telemetry-{os.getpid()}.jsonl")
        self._stages: tuple[Stage, ...] = ()
        self.serialised: Serialised | None = None
        self.profile: Profile | None = None
        self.telemetry: Telemetry | None = None
        self.loading: Loading | None = None
        self._epoch_marks: list[int] = []
        self._counters: Counters | None = None
        self._marking = False
        self.before_reduce_ns: list[int] | None = None
        """The part of each step's backward before its first gradients are exchanged, on the primary clock."""
        self.exchange_blocks: list[Block] = []
        """Blocks with and without an exchange of gradients, in turns."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the step, once they are built; `_stages` are the same with what is run around them."""
        return self._training.stages if self._training else ()

    @property
    def memory(self) -> Memory | None:
        """What the training held."""
        return self._memory.memory()

    @property
    def training(self) -> Training:
        """The built training step."""
        assert self._training is not None
        return self._training

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turn whatever the block raises into the outcome."""
        kills_before = cgroup.oom_kills() or 0
        try:
            yield
        except BaseException as error:  # a user's code may call sys.exit() as well
            abandon(error)
            oom_kills = (cgroup.oom_kills() or 0) - kills_before
            self.outcome = classify(error, running_phase(self.stages, error) or self.stage, oom_kills=oom_kills)

    def measurement(self, requested_ns: int, entered_ns: int) -> Measurement:
        """Return what is known of the case; `entered_ns` is when this process came to it."""
        samples = None
        try:
            samples = self.samples()
        except Exception as error:
            # After an asynchronous fault of the device even reading what it timed may fail.
            if self.outcome.kind == "ok":
                self.outcome = classify(error, self.stage)
        return Measurement(
            case=self.case,
            outcome=self.outcome,
            wall_s=0.0,
            inside_s=(host_clock() - entered_ns) / 1e9,
            facts=self.facts,
            startup=msgspec.structs.replace(self.startup, process_ns=entered_ns - requested_ns),
            samples=samples,
            serialised=self.serialised,
            memory=self.memory,
            profile=self.profile,
            telemetry=self.telemetry,
            loading=self.loading,
            notes=tuple(self.notes),
        )

    def go(self, requested_ns: int, entered_ns: int) -> None:
        """Run all stages. The case's time counts from `entered_ns`, less its first step: a compiler may run there."""
        if self.plan.host_memory_bytes is not None:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (self.plan.host_memory_bytes, hard))
        with self._stage("build"):
            if self.plan.largest_batch is not None:
                memory.withhold(self._device, self.plan.largest_batch.margin)
            self.build()
        try:
            with self._stage("warmup"):
                # Of ranks on a CPU one tells of the host for all.
                if self.plan.telemetry_hz and (self.on_device or self.world.local_rank == 0):
                    self._sampler = telemetry.record(self._device, self.plan.telemetry_hz, self._recording)
                self.start()
                end_ns = entered_ns + self._warmup_ns[0] + round(self.plan.stop.max_case_time_s * 1e9)
                self.warm_up(host_clock() + round((end_ns - host_clock()) * WARMUP_SHARE))
            with self._stage("measure"):
                self._measure(end_ns)
                self._timed = self._read()
            with self._stage("inspect"):
                self._inspect()
            if self.world.exchanges:
                with self._stage("exchange"):
                    self._exchange()
            self.training.stop()
            if self._watch is not None and self._watched_s:
                with self._stage("loader"):
                    self._watch_loader(self._watch)
            with self._stage("epoch"):
                self._price_epochs()
        except (OSError, EOFError):
            blame_a_worker()
            raise
        finally:
            if self._sampler:
                self._sampler.close()
            self._recording.unlink(missing_ok=True)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.stage = name
        self.emit(name, len(self._step_ns), None)
        yield

    def build(self) -> None:
        """Build the data, the model and the optimizer, under the switches that the case asks for."""
        settings = self.settings
        start = host_clock()
        malloc_state = malloc.pin() if self.plan.malloc == "pinned" else "default"
        torch.set_num_threads(settings.threads or max(1, cores_of_this_process() // self.world.local_size))
        backends.configure(settings)
        torch.manual_seed(self.seed)
        data = build_data(settings.data, data_request(settings, self.plan, self.cache))
        model = build_model(settings.model, classes=data.classes, shape=data.shape, seed=self.seed)
        model = model.to(self._device)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model.train()
        parameters = sum(p.numel() for p in model.parameters())
        model = self.world.join(model, settings)
        share = (self.world.rank, self.world.size)
        loader = build_loader(data, settings, seed=self.seed, share=share)
        self._training = Training(model, loader, build_optimizer(settings, model), settings, self._device)
        self._stages = profiling.ranged(self.stages, self._device) if self.plan.nvtx else self.stages
        self._training.on_epoch_end = self._epoch_ended
        self._data = data
        samples = len(data.dataset) if hasattr(data.dataset, "__len__") else None
        self.facts = Facts(
            device=str(self._device),
            threads=torch.get_num_threads(),
            parameters=parameters,
            image_size=data.shape.height if data.shape.height == data.shape.width else None,
            samples_in_dataset=samples,
            classes=data.classes,
            malloc=malloc_state,
            dtype=backends.compute_dtype(model, settings.amp, self._device),
            clock="host" if self._device_clock is None else "host and device",
        )
        self.startup = msgspec.structs.replace(self.startup, build_ns=host_clock() - start)
        if self.on_device and self._device_clock is None:
            self._note(
                "no_device_clock",
                f"{self._device.type} has no timing events here: phases are host times, and the device may lag behind",
            )
        if self.world.size > 1 and isinstance(data.dataset, torch.utils.data.IterableDataset):
            text = "an IterableDataset shares nothing out by itself: each rank may read all of it"
            self._note("iterable_not_shared", text)
        here, cores = self.world.local_size * settings.workers, cores_of_this_process()
        if self.world.size > 1 and here > cores:
            each = f"{self.world.local_size} ranks with {settings.workers} workers each"
            text = f"{each}: {here} processes on this machine load with {cores} cores"
            self._note("workers_beyond_cores", text)
        if samples is not None and samples < settings.batch_size:
            self._note("small_dataset", f"a batch of {settings.batch_size} repeats the {samples} samples there are")

    def start(self) -> None:
        """Start the workers and take the first, cold step apart: its batch, then the whole of it."""
        before = host_clock()
        self.training.start()
        started = host_clock()
        (_, fetch), *rest = self._stages
        fetch()
        fetched = host_clock()
        for _, run in rest:
            run()
        self.settle()
        self._warmup_ns.append(host_clock() - started)
        self.startup = msgspec.structs.replace(
            self.startup, iterator_ns=started - before, first_batch_ns=fetched - started
        )

    def warm_up(self, end_ns: int) -> None:
        """Step until the step time is steady, or until `end_ns`.

        At least `workers * prefetch + 1` steps: so many batches were prepared before the first one was used.
        """
        least = self.settings.workers * (self.settings.prefetch or 0) + 1
        if self.plan.largest_batch:
            end_ns = 0  # whether it fits is all that is asked
        scratch = Tape(device_clock=self._device_clock and device_clock(self._device))
        while True:
            start = host_clock()
            run_block(self._stages, 1, scratch)
            self.settle()
            now = host_clock()
            self._warmup_ns.append(now - start)
            if len(self._warmup_ns) < least:
                continue
            recent = sorted(self._warmup_ns[-5:])[len(self._warmup_ns[-5:]) // 2]
            fits = max(0, end_ns - now) // max(1, recent) + len(self._warmup_ns)
            window = min(STEADY_WINDOW, max(SMALLEST_WINDOW, fits // 3))
            if self.world.agree(stats.is_steady(self._warmup_ns, window=window)):
                break
            if self.world.agree(now > end_ns):
                self._steady = False
                if not self.plan.largest_batch:
                    self._note("no_steady_state", f"{len(self._warmup_ns)} warm-up steps and still not steady")
                break

    def _measure(self, end_ns: int) -> None:
        """Alternate blocks with and without marks, the order swapped from pair to pair, until precise or late."""
        stop = self.plan.stop
        end_ns -= self._inspection_ns()[0] + round(self._watched_s * 1e9) + self._exchange_ns
        size = self.world.agree(self._block_size(end_ns))
        if self.on_device:
            # While events are made the device runs dry: before it is given work, not inside the first block.
            self._tape.reserve(self._boundaries(size))
            fits = (end_ns - host_clock()) // self.recent_step_ns()
            run_block(self._stages, self.world.agree(max(min(LEAD_IN, fits // 4), size)), None)
        self._memory.begin()
        window = CounterWindow(session=self.world.size > 1)
        begin_ns = host_clock()
        pair = 0
        while True:
            size = min(size, stop.max_steps - len(self._step_ns))
            for kind in ("instrumented", "bare") if pair % 2 == 0 else ("bare", "instrumented"):
                self.take_block(kind, size)
            pair += 1
            seen = self._seen_step_ns()
            precision = _precision(seen)
            steps = len(self._step_ns)
            self.emit("measure", steps, precision)
            precise = precision is not None and precision <= stop.precision and steps >= stop.min_steps and pair >= 2
            # A host that is far ahead has given the device work beyond this moment: as many bare steps as these.
            # A try for the largest batch has to survive all its steps; the parent's deadline ends it.
            queued = 0 if self.plan.largest_batch else 2 * max(0, steps - len(seen) - 1)
            late = host_clock() + queued * self.recent_step_ns() > end_ns
            if self.world.agree(precise or steps >= stop.max_steps or late):
                break
        window.close()
        self._memory.end()
        self.settle()
        if not precise:  # on steps that the device had not passed yet as well
            precision = _precision(self._seen_step_ns())
            precise = precision is not None and precision <= stop.precision
        if not precise and not self.plan.largest_batch:
            reached = "no interval" if precision is None else f"±{precision:.1%}"
            text = f"{reached} after {steps} steps; asked for ±{stop.precision:.1%}"
            self._note("precision_not_reached", text)
        done_ns = host_clock()
        if self._device_clock is not None:
            # When the host began, the device may still have had the lead-in before it: energy is that of the blocks.
            first, last = self._block_stamps[0][0], self._block_stamps[-1][1]
            begin_ns = max(begin_ns, done_ns - self._device_clock.span_ns(first, last))
        self._read_telemetry(begin_ns, done_ns)
        self.conclude(window.counters(), window.notes(torch.get_num_threads() * self.world.local_size))

    def conclude(self, counters: Counters, notes: Sequence[Note]) -> None:
        """Keep what was counted while the steady steps ran, and what was in force then."""
        assert self.facts is not None
        self.facts = msgspec.structs.replace(
            self.facts, backends=backends.in_force(), batch_bytes=self.training.batch_bytes()
        )
        self._counters = counters
        self.notes.extend(notes)
        steps = sum(block.steps for block in self._blocks)
        self.notes.extend(malloc.fault_notes(counters, steps, pinned=self.facts.malloc.startswith("pinned")))
        loss = self.training.loss()
        if loss is not None and not math.isfinite(loss):
            self._note("loss_not_finite", f"the loss was {loss} at the end")

    def resume(self) -> None:
        """Make what this case asks of the whole process hold again, after another case had it."""
        assert self.facts is not None
        if torch.get_num_threads() != self.facts.threads:
            torch.set_num_threads(self.facts.threads)
        backends.configure(self.settings)

    def run_bare(self, steps: int) -> None:
        """Take steps that are not timed."""
        run_block(self._stages, steps, None)

    def _seen_step_ns(self) -> list[int]:
        """Return the steps timed so far; where the device has a clock those that it has passed. Never waits."""
        passed = self._tape.passed_step_ns()
        return self._step_ns if passed is None else passed

    def take_block(self, kind: str, size: int) -> None:
        """Take a block of steps, with marks (`instrumented`) or `bare`."""
        first, events = len(self._tape), self._device_clock
        self._tape.reserve(self._boundaries(size))
        before = events.stamp() if events else 0
        if kind == "instrumented":
            with self.world.marking(self._tape.mark):
                self._marking = True
                block = run_block(self._stages, size, self._tape)
                self._marking = False
            self._step_ns.extend(self._tape.host_steps(first + 1).step_ns)
        else:
            block = run_block(self._stages, size, None)
        if events:
            self._block_stamps.append((before, events.stamp()))
        self._blocks.append(block)

    def _boundaries(self, steps: int) -> int:
        """Return how many boundaries a block of so many steps has; ranks mark one more a step."""
        return steps * (len(self.stages) + self.world.exchanges) + 1

    def _block_size(self, end_ns: int) -> int:
        """Return steps a block: a small share of the time left, whole rounds of the workers where they fit."""
        size = round((end_ns - host_clock()) * BLOCK_SHARE / self.recent_step_ns())
        size = min(LARGEST_BLOCK, max(1, size), max(1, self.plan.stop.max_steps // 4))
        workers = max(1, self.settings.workers)
        whole_rounds = -(-size // workers) * workers
        return whole_rounds if whole_rounds <= 2 * size else size

    def _price_epochs(self) -> None:
        """Measure what an epoch's end costs, away from the steady window, on epochs of one batch a worker."""
        assert self._data is not None
        if isinstance(self._data.dataset, torch.utils.data.IterableDataset) or self.plan.largest_batch:
            return
        batches = max(1, self.settings.workers)
        length = batches * self.settings.batch_size
        loader = build_loader(self._data, self.settings, seed=self.seed, endless=False, length=length)
        late_ns = host_clock() + round(self.plan.stop.max_case_time_s * EPOCH_SHARE * 1e9)
        ends: list[int] = []
        starts: list[int] = []
        iterator = iter(loader)
        next(iterator)
        while not ends or (len(ends) < 2 and host_clock() < late_ns):
            for _ in range(batches - 1):
                next(iterator)
            before = host_clock()
            next(iterator, None)
            ended = host_clock()
            ends.append(ended - before)
            iterator = iter(loader)
            next(iterator)
            starts.append(host_clock() - ended)
        self.startup = msgspec.structs.replace(self.startup, epoch_end_ns=ends, epoch_start_ns=starts)

    def _read_telemetry(self, begin_ns: int, end_ns: int) -> None:
        """End the sampling and keep what it saw from `begin_ns` to `end_ns` of the host's clock."""
        if self._sampler is None:
            return
        own = [os.getpid(), self._sampler.pid, *(child.pid for child in multiprocessing.active_children())]
        self._sampler.close()
        with self._noted("telemetry"):
            self.telemetry, notes = telemetry.summarise(
                telemetry.read(self._recording),
                begin_ns=begin_ns,
                end_ns=end_ns,
                steps=sum(block.steps for block in self._blocks),
                own_pids=[pid for pid in own if pid is not None],
            )
            self.notes.extend(notes)

    @contextmanager
    def _noted(self, look: str) -> Iterator[None]:
        """Turn what fails beside the timed steps into a note: it never costs their result."""
        try:
            yield
        except Exception as error:
            if self.world.size > 1:
                raise  # the others wait for this rank
            abandon(error)
            failed = classify(error, "inspect")
            self._note("inspection_failed", f"{look}: {'; '.join(filter(None, (failed.message, failed.hint)))}")

    def _looks(self) -> list[tuple[str, int, Callable[[int], None]]]:
        """Return what is looked at after the timed window: its name, the steps that it asks for, and the look."""
        plan = self.plan
        looks: list[tuple[str, int, Callable[[int], None]]] = []
        if self.on_device and plan.serialised_steps:
            looks.append(("memory by phase", MEMORY_STEPS, partial(self._memory.measure_phases, self.stages)))
            looks.append(("serialised window", plan.serialised_steps, self._serialise))
        if plan.profile_steps:
            looks.append(("FLOPs", 1, self._count_flops))
            looks.append(("profiler window", plan.profile_steps, self._profile))  # last: it stays attached to CUDA
        return looks

    def recent_step_ns(self) -> int:
        """Return the time of a step at the end of the warm-up."""
        recent = sorted(self._warmup_ns[-SMALLEST_WINDOW:])
        return max(1, recent[len(recent) // 2])

    def _inspection_ns(self) -> tuple[int, int]:
        """Return the time to leave for what is looked at after the timed window, and what all of it would take."""
        wanted = sum(steps + 1 for _, steps, _ in self._looks()) * self.recent_step_ns()
        return min(wanted, round(self.plan.stop.max_case_time_s * 1e9 * INSPECTION_SHARE)), wanted

    def _inspect(self) -> None:
        """Learn what would have distorted the timed window.

        Where the steps asked for take longer than the time left for them, fewer are taken, of each look one at least.
        """
        left_ns, wanted_ns = self._inspection_ns()
        for name, steps, look in self._looks():
            with self._noted(name):
                look(self.world.agree(max(1, round(steps * left_ns / wanted_ns))))

    @property
    def _exchange_ns(self) -> int:
        """The time to leave for blocks with and without an exchange of gradients."""
        return round(self.plan.stop.max_case_time_s * 1e9 * EXCHANGE_SHARE) if self.world.exchanges else 0

    def _exchange(self) -> None:
        """Take blocks with and without an exchange of gradients, the order swapped from pair to pair.

        The ranks' weights drift apart meanwhile, so nothing is timed after it.
        """
        steps = self._exchange_ns // self.recent_step_ns() // (2 * EXCHANGE_PAIRS)
        size = self.world.agree(min(LARGEST_BLOCK, max(1, steps)))
        end_ns = host_clock() + self._exchange_ns
        kinds: tuple[Literal["synchronised", "unsynchronised"], ...] = ("synchronised", "unsynchronised")
        pair = 0
        while pair < 2 or self.world.agree(pair < EXCHANGE_PAIRS and host_clock() < end_ns):
            for kind in kinds if pair % 2 == 0 else kinds[::-1]:
                self.world.agree(pair)  # all begin together
                before = self._device_clock.stamp() if self._device_clock else 0
                with self.world.unsynchronised() if kind == "unsynchronised" else nullcontext():
                    block = run_block(self._stages, size, None)
                if self._device_clock:
                    span_ns = self._device_clock.span_ns(before, self._device_clock.stamp())
                    block = msgspec.structs.replace(block, device_wall_ns=span_ns)
                self.exchange_blocks.append(msgspec.structs.replace(block, kind=kind))
            pair += 1

    def _watch_loader(self, watch: Watch) -> None:
        """Learn why the loader is as slow as it is, from an iterator of its own."""
        thorough = self.plan.diagnose == "full"
        with self._noted("loader"):
            self.loading = watch(self.training, self.stages, self.settings.model, self._watched_s, thorough=thorough)

    @property
    def _watched_s(self) -> float:
        """For how long the loader is watched."""
        if self.plan.largest_batch or self.world.size > 1:
            return 0.0
        return self.plan.stop.max_case_time_s * WATCH_SHARE[self.plan.diagnose]

    def _serialise(self, steps: int) -> None:
        self.serialised = run_serialised(self._stages, steps, self.settle)

    def _count_flops(self, steps: int) -> None:
        assert self.facts is not None
        self.facts = msgspec.structs.replace(self.facts, flops_per_step=flops.count(self.stages))

    def _profile(self, steps: int) -> None:
        unkept: profiling.TraceNotKeptError | None = None
        try:
            self.profile = profiling.profile(self.stages, steps, self._device, self.trace)
        except profiling.TraceNotKeptError as error:
            self.profile, unkept = error.profile, error
        if note := profiling.untraced(self.profile, self._device):
            self.notes.append(note)
        if unkept:
            raise unkept

    def samples(self) -> Samples | None:
        """Return what was sampled, or None when no instrumented block was finished."""
        return self._timed or self._read()

    def _read(self) -> Samples | None:
        """Read both clocks; waits for the device, so never inside a window."""
        if not self._step_ns:
            return None
        host = self._tape.host_steps()
        device = self._tape.device_steps()
        marks = list(host.phase_ns)
        complete = len(self._step_ns)
        befores = [_joined(steps) for steps in (host, device) if steps is not None]
        self.before_reduce_ns = befores[-1] and befores[-1][:complete]
        blocks = self._blocks
        if events := self._device_clock:
            spans = [events.span_ns(*stamps) for stamps in self._block_stamps]
            blocks = [
                msgspec.structs.replace(block, device_wall_ns=span) for block, span in zip(blocks, spans, strict=True)
            ]
        return Samples(
            batch_size=self.settings.batch_size,
            step_ns=host.step_ns[:complete],
            host_ns={phase: times[:complete] for phase, times in host.phase_ns.items()},
            device_step_ns=device and device.step_ns[:complete],
            device_ns=device and {phase: times[:complete] for phase, times in device.phase_ns.items()},
            blocks=blocks,
            epoch_boundaries=[step for mark in self._epoch_marks if (step := self._tape.step_at(mark)) < complete],
            warmup_ns=self._warmup_ns,
            steady=self._steady,
            recorder_ns_per_step=cost_per_step_ns(marks, device_clock=device and device_clock(self._device)),
            counters=self._counters,
            final_loss=self.training.loss(),
        )

    def _epoch_ended(self) -> None:
        if self._marking:
            self._epoch_marks.append(len(self._tape))

    def settle(self) -> None:
        """Wait for the device: in the warm-up, where a cold step's whole cost is asked, and after the timed window."""
        wait_for(self._device)

    def _note(self, code: str, text: str) -> None:
        self.notes.append(Note(code=code, text=text))


def _joined(steps: Steps) -> list[int] | None:
    """Make one phase again of `backward` and what was marked in it, and return the latter."""
    before = steps.phase_ns.pop(BEFORE_REDUCE, None)
    if before is not None:
        rest = steps.phase_ns["backward"]
        steps.phase_ns["backward"] = [first + second for first, second in zip(before, rest, strict=True)]
    return before


def _precision(step_ns: list[int]) -> float | None:
    """Return the relative half-width of the median's interval, or None where there are too few steps for one."""
    return stats.median(step_ns).precision if step_ns else None


def throttled(emit: Emit, *, every_s: float = 0.5) -> Emit:
    """Return an `emit` that passes on a change of stage at once and anything else at most every `every_s`."""
    last: tuple[str, float] = ("", 0.0)

    def passing(stage: str, steps: int, precision: float | None) -> None:
        nonlocal last
        now = time.monotonic()
        if stage != last[0] or now - last[1] >= every_s:
            last = (stage, now)
            emit(stage, steps, precision)

    return passing
