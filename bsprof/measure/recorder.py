"""The same phases in a training loop of one's own."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from bsprof import stats, store
from bsprof.measure import environment, malloc
from bsprof.measure.clock import DeviceClock, HostClock, device_clock, host_clock, present_device
from bsprof.measure.counters import CounterWindow
from bsprof.measure.tape import OTHER, Steps, Tape, cost_per_step_ns
from bsprof.model import Case, Facts, Measurement, Outcome, Result, Samples, Startup
from bsprof.noun import Note

Batch = TypeVar("Batch")


class Recorder:
    """Splits each step of a training loop into phases, by one clock read at each boundary.

    In a loop of your own::

        recorder = Recorder(batch_size=64)
        for images, labels in recorder.steps(loader):       # the wait in next() is `data`
            images, labels = images.to(device), labels.to(device)
            recorder.mark("h2d")
            loss = loss_fn(model(images), labels)
            recorder.mark("forward")
            loss.backward()
            recorder.mark("backward")
            optimizer.step(), optimizer.zero_grad()
            recorder.mark("optimizer")
        recorder.save("run.json")                           # `bsprof show run.json`

    `mark(phase)` closes `phase`: the time since the boundary before it. Any name is a phase; what lies between the
    last mark and the next batch is `other`. On an accelerator each mark also records a timing event, and nothing ever
    synchronises until the result is asked for. `device` is found by itself; `batch_size` is needed for throughput.
    """

    def __init__(
        self,
        *,
        name: str = "loop",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        clock: HostClock = host_clock,
        events: DeviceClock | None = None,
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self.device = torch.device(device) if device is not None else present_device()
        self._tape = Tape(clock=clock, device_clock=events or device_clock(self.device))
        self.mark = self._tape.mark
        self._epochs: list[int] = []
        self._iterator_ns: list[int] = []
        self._first_batch_ns: list[int] = []
        self._epoch_end_ns: list[int] = []
        self._window: CounterWindow | None = None

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of one epoch; call it anew for each epoch.

        `iter()`, the first step of each epoch and the last `next()`, that ends it, are kept apart from steady steps.
        """
        tape, clock = self._tape, self._tape.clock
        self._window = self._window or CounterWindow()
        before = clock()
        iterator = iter(batches)
        self._iterator_ns.append(clock() - before)
        self._epochs.append(tape.step_at(len(tape)))
        tape.begin()
        first = len(tape)
        try:
            while True:
                asked = clock()
                try:
                    batch = next(iterator)
                except StopIteration:
                    self._epoch_end_ns.append(clock() - asked)
                    return
                tape.mark("data")
                if len(tape) == first + 1:
                    self._first_batch_ns.append(clock() - asked)
                yield batch
                tape.mark(OTHER)
        except GeneratorExit:
            # The loop was left early: its last step ends here.
            tape.mark(OTHER)
            raise

    def result(self) -> Result:
        """Return what was recorded as the Result of one case; waits for the device.

        Raises ValueError when no step was recorded.
        """
        host, device = self._tape.host_steps(), self._tape.device_steps()
        if not self._first_batch_ns:
            raise ValueError("no step was recorded: iterate over recorder.steps(loader)")
        notes = []
        steady_from = stats.steady_from((device or host).step_ns)
        if steady_from is None:
            notes.append(Note(code="no_steady_state", text=f"{len(host.step_ns)} steps and never steady"))
        cold = min(steady_from or 1, len(host.step_ns) - 1)
        counters = None
        if self._window is not None:
            self._window.close()
            counters = self._window.counters()
            notes.extend(self._window.notes(torch.get_num_threads()))
            notes.extend(malloc.fault_notes(counters, len(host.step_ns), pinned=False))
        warm_host, warm_device = _from(host, cold), device and _from(device, cold)
        samples = Samples(
            batch_size=self.batch_size,
            step_ns=warm_host.step_ns,
            host_ns=warm_host.phase_ns,
            device_step_ns=warm_device and warm_device.step_ns,
            device_ns=warm_device and warm_device.phase_ns,
            epoch_boundaries=[step - cold for step in self._epochs if cold <= step < len(host.step_ns)],
            warmup_ns=host.step_ns[:cold],
            steady=steady_from is not None,
            recorder_ns_per_step=cost_per_step_ns(
                [*host.phase_ns, OTHER], device_clock=device and device_clock(self.device)
            ),
            counters=counters,
        )
        epoch_starts = zip(self._iterator_ns[1:], self._first_batch_ns[1:], strict=False)
        startup = Startup(
            iterator_ns=self._iterator_ns[0],
            first_batch_ns=self._first_batch_ns[0],
            epoch_end_ns=self._epoch_end_ns,
            epoch_start_ns=[iterator + batch for iterator, batch in epoch_starts],
        )
        facts = Facts(device=str(self.device), threads=torch.get_num_threads())
        measurement = Measurement(
            case=Case(key=self.name),
            outcome=Outcome(kind="ok"),
            wall_s=sum(host.step_ns) / 1e9,
            facts=facts,
            startup=startup,
            samples=samples,
            notes=tuple(notes),
        )
        return Result(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            plan=None,
            environment=environment.collect(Path.cwd()),
            measurements=[measurement],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `result()` to `path` (.json or .json.gz); `bsprof show` prints it.

        A copy goes where the environment variable BSPROF_RESULT says: `bsprof ab` reads it from there.
        """
        result = self.result()
        store.save(result, Path(path))
        if copy := os.environ.get(store.COPY_VARIABLE):
            store.save(result, Path(copy))


def _from(steps: Steps, first: int) -> Steps:
    return Steps(steps.step_ns[first:], {phase: times[first:] for phase, times in steps.phase_ns.items()})
