"""A training step that its owner has built: model, loader and optimizer, measured in the process that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bsprof import stats
from bsprof.errors import BsprofError
from bsprof.measure import backends, malloc
from bsprof.measure.clock import device_clock, host_clock, present_device, wait_for
from bsprof.measure.counters import CounterWindow
from bsprof.measure.loop import Training, run_block
from bsprof.measure.tape import Tape, cost_per_step_ns
from bsprof.model import Block, Case, Facts, Measurement, Outcome, Samples, Settings, Startup
from bsprof.noun import Note

LossFunction = Callable[[Any, torch.Tensor], torch.Tensor]
"""(what the model returns, targets) -> the loss, a tensor of one value."""

WARMUP_SHARE = 0.3
"""Warm-up may take this share of the time that a measurement has."""
STEADY_WINDOW = 20
"""Steps in each of the two windows that must agree; fewer where so many do not fit into the warm-up's share."""
SMALLEST_WINDOW = 4
LEAST_STEPS = 10
"""So many are timed even where time is up."""
LARGEST_BLOCK = 50
"""Steps between two looks at the clock."""
LEAD_IN = 3
"""Steps that fill an accelerator's queue again after the last synchronisation of the warm-up."""


class OwnTraining(Training):
    """The one step loop around what its owner has built, trained as it is: precision and layout are the model's own.

    A batch is a pair (inputs, targets) of tensors. `loss_fn` is cross entropy unless another is given. The model is put
    into training mode, and moved to `device` where one is given; otherwise it stays where its parameters are.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        loss_fn: LossFunction | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        home = next((parameter.device for parameter in model.parameters()), None)
        where = torch.device(device) if device is not None else home or present_device()
        super().__init__(model.to(where).train(), loader, optimizer, Settings(), where)
        self.model = model
        self.loader = loader
        self._own_loss_fn = loss_fn or self._loss_fn

    def forward(self) -> None:
        """Compute the loss."""
        inputs, targets = self._batch
        self._loss = self._own_loss_fn(self._step_model(inputs), targets)

    def fetch_first(self) -> None:
        """Fetch, and raise BsprofError where a batch is no pair of tensors."""
        self.fetch()
        batch = self._batch
        is_sequence = isinstance(batch, tuple | list)
        if not (is_sequence and len(batch) == 2 and all(isinstance(part, torch.Tensor) for part in batch)):
            said = f"a {type(batch).__name__} of {len(batch)}" if is_sequence else f"a {type(batch).__name__}"
            raise BsprofError(
                f"training_step: a batch of the loader is {said}, not a pair (inputs, targets) of tensors",
                hint="give it a loader with a collate_fn that makes such pairs",
            )


def step_once(training: OwnTraining) -> None:
    """Take one step and measure nothing. Raises what the step raises."""
    training.start()
    try:
        training.fetch_first()
        for _, run in training.stages[1:]:
            run()
        wait_for(training.device)
    finally:
        training.stop()


def measure(
    training: OwnTraining,
    *,
    key: str,
    steps: int = 100,
    warmup: int | None = None,
    seconds: float = 20.0,
    pin: bool = True,
) -> Measurement:
    """Measure `steps` steps after a warm-up, and return them as one case named `key`.

    `warmup` steps are left out, the cold first one included; without it as many as it takes until the step time is
    steady (`stats.is_steady`; those in which an epoch ends are not asked), for 30 % of `seconds` at the most, and the
    measurement has the note `no_steady_state` where it never was. After `seconds`, which count from the end of the
    first step because a compiler may run there, no further step is begun, but `LEAST_STEPS` are always taken.
    `pin` keeps malloc from handing memory back, in this process and for good (`malloc.pin`).

    An exception of the user's code passes through. Raises BsprofError for batches that are no pairs, and where every
    step would end an epoch.
    """
    entered_ns = host_clock()
    malloc_state = malloc.pin() if pin else "default"
    device, stages = training.device, training.stages
    events = device_clock(device)
    tape = Tape(device_clock=events)
    ends: list[int] = []
    training.on_epoch_end = lambda: ends.append(len(tape))
    notes: list[Note] = []
    try:
        startup, warmup_ns = _start(training)
        end_ns = host_clock() + round(seconds * 1e9)
        steady = _warm_up(training, warmup_ns, ends, warmup, host_clock() + round(seconds * 1e9 * WARMUP_SHARE))
        if not steady:
            text = f"{len(warmup_ns)} warm-up steps and still not steady"
            notes.append(Note(code="no_steady_state", text=text))
        recent_ns = _recent(warmup_ns)
        if events is not None:
            tape.reserve(LARGEST_BLOCK * len(stages) + 1)
            run_block(stages, LEAD_IN, None)
        ends.clear()
        window = CounterWindow()
        blocks: list[Block] = []
        done = 0
        while done < steps and (done < LEAST_STEPS or host_clock() < end_ns):
            fitting = max(0, end_ns - host_clock()) // recent_ns
            size = min(steps - done, LARGEST_BLOCK, max(1, fitting // 4))
            tape.reserve(size * len(stages) + 1)
            blocks.append(run_block(stages, size, tape))
            done += size
        window.close()
        wait_for(device)
        batch_bytes = training.batch_bytes()
        batch_size = int(training.batch[0].shape[0]) if training.batch[0].ndim else None
        loss = training.loss()
    finally:
        training.stop()
    host, on_device = tape.host_steps(), tape.device_steps()
    boundaries = [tape.step_at(end) for end in ends]
    if len(boundaries) == len(host.step_ns):
        raise BsprofError(
            "training_step: an epoch of the loader is one batch, so that every step begins a new one",
            hint="a loader with more batches; a list will do: [batch] * 100",
        )
    cost_ns = cost_per_step_ns(host.phase_ns, device_clock=on_device and device_clock(device))
    return Measurement(
        case=Case(key=key),
        outcome=Outcome(kind="ok"),
        wall_s=(host_clock() - entered_ns) / 1e9,
        facts=Facts(
            device=str(device),
            clock="host" if events is None else "host and device",
            backends=backends.in_force(),
            dtype=backends.compute_dtype(training.model, "off", device),
            batch_bytes=batch_bytes,
            threads=torch.get_num_threads(),
            parameters=sum(parameter.numel() for parameter in training.model.parameters()),
            malloc=malloc_state,
        ),
        startup=startup,
        samples=Samples(
            batch_size=batch_size,
            step_ns=host.step_ns,
            host_ns=host.phase_ns,
            device_step_ns=on_device and on_device.step_ns,
            device_ns=on_device and on_device.phase_ns,
            blocks=blocks,
            epoch_boundaries=boundaries,
            warmup_ns=warmup_ns,
            steady=steady,
            recorder_ns_per_step=cost_ns,
            counters=window.counters(),
            final_loss=loss,
        ),
        notes=(*notes, *window.notes()),
    )


def _start(training: OwnTraining) -> tuple[Startup, list[int]]:
    """Start the workers and take the cold step; return what starting cost, and that step's time in ns."""
    before = host_clock()
    training.start()
    started = host_clock()
    training.fetch_first()
    fetched = host_clock()
    for _, run in training.stages[1:]:
        run()
    wait_for(training.device)
    startup = Startup(iterator_ns=started - before, first_batch_ns=fetched - started)
    return startup, [host_clock() - started]


def _warm_up(training: OwnTraining, warmup_ns: list[int], ends: list[int], count: int | None, end_ns: int) -> bool:
    """Step, adding to `warmup_ns`, and return whether it ended because the step time was steady, or as asked.

    Where no count is asked for at least `workers * prefetch + 1` steps are taken: so many batches were prepared before
    the first one was used.
    """
    workers = getattr(training.loader, "num_workers", 0)
    least = workers * (getattr(training.loader, "prefetch_factor", None) or 0) + 1
    calm: list[int] = []
    while count is None or len(warmup_ns) < count:
        epochs = len(ends)
        start = host_clock()
        run_block(training.stages, 1, None)
        wait_for(training.device)
        now = host_clock()
        warmup_ns.append(now - start)
        if len(ends) == epochs:
            calm.append(now - start)
        if count is not None or len(warmup_ns) < least:
            continue
        fitting = max(0, end_ns - now) // _recent(warmup_ns) + len(calm)
        window = min(STEADY_WINDOW, max(SMALLEST_WINDOW, fitting // 3))
        if stats.is_steady(calm, window=window):
            return True
        if now > end_ns:
            return False
    return True


def _recent(step_ns: list[int]) -> int:
    """Return about what a step takes now, in ns, at least one."""
    last = sorted(step_ns[-5:])
    return max(1, last[len(last) // 2])
