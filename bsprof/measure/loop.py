"""The one step loop: a training step as a chain of stages, run bare or with marks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bsprof.errors import BsprofError
from bsprof.measure.clock import host_clock, wait_for
from bsprof.measure.tape import Tape
from bsprof.model import Block, Serialised, Settings

Stage = tuple[str, Callable[[], None]]
"""A phase and the code that is it."""

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run_block(stages: Sequence[Stage], steps: int, tape: Tape | None) -> Block:
    """Run `steps` steps, with a mark after each stage when there is a `tape`, bare otherwise.

    The block's wall time comes from two clock reads of its own, so that the marks can be held against it. Reserve
    the tape's device events first: `tape.reserve`.
    """
    if tape is None:
        start = host_clock()
        for _ in range(steps):
            for _, run in stages:
                run()
        return Block(kind="bare", steps=steps, wall_ns=host_clock() - start)
    mark, clock = tape.mark, tape.clock
    start = clock()
    tape.begin()
    for _ in range(steps):
        for phase, run in stages:
            run()
            mark(phase)
    return Block(kind="instrumented", steps=steps, wall_ns=clock() - start)


def followed(stages: Sequence[Stage], behind: Mapping[str, Callable[[], None]]) -> list[Stage]:
    """Return `stages` with what stands `behind` a phase run right after it, before its mark."""

    def both(run: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
        def stage() -> None:
            run()
            then()

        return stage

    return [(phase, both(run, behind[phase]) if phase in behind else run) for phase, run in stages]


def run_serialised(stages: Sequence[Stage], steps: int, wait: Callable[[], None]) -> Serialised:
    """Run `steps` steps with a `wait` for the device at the end of each stage, so that nothing overlaps."""
    tape = Tape()
    wait()
    run_block(followed(stages, {phase: wait for phase, _ in stages}), steps, tape)
    return Serialised(host_ns=tape.host_steps().phase_ns)


class Training:
    """Model, loader and optimizer joined into the stages of a step.

    `forward` includes the loss and `optimizer` includes `zero_grad`. `settings` choose precision, memory layout and
    compilation; `device` is where the model lives. An epoch that ends inside `fetch` (a loader that cannot be made
    endless) starts over and calls `on_epoch_end`.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self._step_model: Callable[[Any], Any] = torch.compile(model) if settings.compile else model
        self._loader = loader
        self._optimizer = optimizer
        self.device = device
        self._layout = torch.channels_last if settings.channels_last else torch.preserve_format
        self._loss_fn = nn.CrossEntropyLoss()
        self._precision: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        self._scaler: torch.amp.GradScaler | None = None
        if settings.amp != "off":
            self._precision = torch.autocast(device.type, dtype=AMP_DTYPES[settings.amp])
        if settings.amp == "fp16":
            self._scaler = torch.amp.GradScaler(device.type)
        self._iterator: Any = None
        self._batch: Any = None
        self._loss: Any = None
        self.on_epoch_end: Callable[[], None] = lambda: None
        scaled = self._scaler is not None
        self.stages: tuple[Stage, ...] = (
            ("data", self.fetch),
            ("h2d", self.transfer),
            ("forward", self.forward if settings.amp == "off" else self.forward_mixed),
            ("backward", self.backward_scaled if scaled else self.backward),
            ("optimizer", self.update_scaled if scaled else self.update),
        )

    def start(self) -> None:
        """Create the loader's iterator, and with it the workers."""
        self._iterator = iter(self._loader)

    def stop(self) -> None:
        """Let go of the iterator, and with it of the workers."""
        self._iterator = None
        self._batch = None

    def fetch(self) -> None:
        """Wait for the next batch."""
        try:
            self._batch = next(self._iterator)
        except StopIteration:
            self.on_epoch_end()
            self._iterator = iter(self._loader)
            self._batch = next(self._iterator, None)
            if self._batch is None:
                raise BsprofError(
                    "the data has no full batch to give", hint="a smaller --batch-size, or more samples"
                ) from None

    def train_on(self, batch: Any) -> None:
        """Take a step on a batch of (images, labels) that came from elsewhere, and wait until it is done."""
        self._batch = batch
        for _, run in self.stages[1:]:
            run()
        wait_for(self.device)  # else the host runs ahead, and asks for batches that the device does not need yet

    def transfer(self) -> None:
        """Copy the batch to the device; with pinned memory the copy is asynchronous."""
        images, labels = self._batch
        self._batch = (
            images.to(self.device, non_blocking=True, memory_format=self._layout),
            labels.to(self.device, non_blocking=True),
        )

    def forward(self) -> None:
        """Compute the loss."""
        images, labels = self._batch
        self._loss = self._loss_fn(self._step_model(images), labels)

    def forward_mixed(self) -> None:
        """Compute the loss under autocast."""
        with self._precision:
            self.forward()

    def backward(self) -> None:
        """Compute the gradients."""
        self._loss.backward()

    def backward_scaled(self) -> None:
        """Compute the gradients of the scaled loss, so that fp16 does not underflow."""
        assert self._scaler is not None
        self._scaler.scale(self._loss).backward()

    def update(self) -> None:
        """Step the optimizer and drop the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def update_scaled(self) -> None:
        """Step the optimizer through the gradient scaler and drop the gradients."""
        assert self._scaler is not None
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def batch(self) -> Any:
        """The last batch, where it was taken to."""
        return self._batch

    def batch_bytes(self) -> int | None:
        """Return the size of the last batch in bytes, labels included: what `h2d` moves."""
        return None if self._batch is None else sum(part.nbytes for part in self._batch)

    def loss(self) -> float | None:
        """Return the last step's loss. Waits for the device: never inside a window."""
        return None if self._loss is None else float(self._loss.detach())


def build_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that `settings` name, for what `model` trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    match settings.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        case "adam":
            return torch.optim.Adam(parameters, lr=1e-3)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=1e-3)


def running_phase(stages: Sequence[Stage], error: BaseException) -> str | None:
    """Return the phase whose stage `error` came through, read from its traceback, or None."""
    by_code = {getattr(run, "__code__", None): phase for phase, run in stages}
    traceback = error.__traceback__
    while traceback is not None:
        if (phase := by_code.get(traceback.tb_frame.f_code)) is not None:
            return phase
        traceback = traceback.tb_next
    return None
