"""The step loop: what a stage does, and that marking it changes nothing but what is known."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from factories import FailsInBackward, Perceptron, Pixels, Raising
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bsprof.errors import BsprofError
from bsprof.measure import loop
from bsprof.measure.loop import Training, run_block, running_phase
from bsprof.measure.tape import Tape
from bsprof.metrics import METRICS
from bsprof.model import PHASES, Samples, Settings
from bsprof.readings import Reading

CPU = torch.device("cpu")


def training(
    *, model: nn.Module | None = None, loader: Any = None, optimizer: Any = torch.optim.SGD, **settings: Any
) -> Training:
    torch.manual_seed(0)
    model = model or Perceptron()
    loader = DataLoader(Pixels(), batch_size=8) if loader is None else loader
    made = Training(model, loader, optimizer(model.parameters(), lr=0.1), Settings(batch_size=8, **settings), CPU)
    made.start()
    return made


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


class Batches(IterableDataset[tuple[torch.Tensor, int]]):
    """So many samples, and then no more."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for i in range(self.samples):
            yield torch.full((3, 8, 8), i / 64), i % 10


# --- what a step does -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("tape", [None, Tape()])
def test_every_step_trains(optimizer, amp, tape):
    model = Perceptron()
    trained = training(model=model, optimizer=optimizer, amp=amp)
    assert trained.loss() is None
    before = weights(model)
    for _ in range(4):
        run_block(trained.stages, 1, tape)
        after = weights(model)
        assert not torch.equal(before, after)
        before = after
    loss = trained.loss()
    assert loss is not None
    assert 0 < loss < 100


def test_training_learns():
    """Not just moved: the loss on the same batch falls."""
    trained = training(loader=[next(iter(DataLoader(Pixels(), batch_size=8)))])
    losses = []
    for _ in range(30):
        run_block(trained.stages, 1, None)
        losses.append(trained.loss())
    assert losses[-1] < losses[0]


def test_marks_change_nothing_but_what_is_known():
    models = [Perceptron(), Perceptron()]
    models[1].load_state_dict(models[0].state_dict())
    order: list[list[str]] = []
    for model, tape in zip(models, (None, Tape()), strict=True):
        trained = training(model=model)
        seen: list[str] = []
        block = run_block([(phase, noting(seen, phase, run)) for phase, run in trained.stages], 7, tape)
        assert block.steps == 7
        assert block.kind == ("bare" if tape is None else "instrumented")
        order.append(seen)
    assert order[0] == order[1] == list(PHASES) * 7
    assert torch.equal(weights(models[0]), weights(models[1]))


def noting(seen: list[str], phase: str, run: Callable[[], None]) -> Callable[[], None]:
    def stage() -> None:
        seen.append(phase)
        run()

    return stage


class Seeing(Perceptron):
    """Keeps what it was given and what it made of it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        self.logits = super().forward(images)
        return self.logits


def test_bf16_computes_in_bf16_and_keeps_full_weights():
    model = Seeing()
    trained = training(model=model, amp="bf16")
    run_block(trained.stages, 2, None)
    assert model.images.dtype == torch.float32
    assert model.logits.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_reaches_the_model(channels_last):
    model = Seeing()
    run_block(training(model=model, channels_last=channels_last).stages, 1, None)
    assert model.images.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_fp16_goes_through_a_gradient_scaler():
    trained = training(amp="fp16")
    assert [phase for phase, _ in trained.stages] == list(PHASES)
    model = Perceptron()
    trained = training(model=model, amp="fp16")
    before = weights(model)
    # The first scales may overflow: such a step is skipped, and a smaller scale comes next.
    run_block(trained.stages, 20, None)
    assert not torch.equal(before, weights(model))
    assert torch.isfinite(weights(model)).all()


# --- a loader that ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_finite_loader_starts_over_and_tells(workers):
    trained = training(loader=DataLoader(Batches(24), batch_size=8, num_workers=workers))
    steps, ends = 0, []

    def counted() -> None:
        nonlocal steps
        steps += 1

    trained.on_epoch_end = lambda: ends.append(steps)
    (data, fetch), *rest = trained.stages
    run_block([(data, fetch), *rest, ("count", counted)], 10, None)
    trained.stop()
    assert ends == [3, 6, 9]


def test_a_loader_without_a_full_batch_says_so():
    trained = training(loader=DataLoader(Batches(5), batch_size=8, drop_last=True))
    with pytest.raises(BsprofError, match="no full batch") as raised:
        run_block(trained.stages, 1, None)
    assert "--batch-size" in (raised.value.hint or "")


# --- where an exception came from -------------------------------------------------------------------


class Refusing(torch.optim.SGD):
    def step(self, *_: Any, **__: Any) -> None:
        raise ArithmeticError("no step today")


class Immovable:
    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        raise ArithmeticError("cannot be moved")


class RaisesInForward(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no output today")


FAILING: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("data", lambda: {"loader": DataLoader(Raising(), batch_size=8)}),
    ("data", lambda: {"loader": DataLoader(Raising(), batch_size=8, num_workers=1)}),
    ("data", lambda: {"loader": DataLoader(Batches(0), batch_size=8)}),
    ("h2d", lambda: {"loader": [(Immovable(), Immovable())]}),
    ("forward", lambda: {"model": RaisesInForward()}),
    ("forward", lambda: {"model": RaisesInForward(), "amp": "bf16"}),
    ("forward", lambda: {"model": RaisesInForward(), "amp": "fp16"}),
    ("backward", lambda: {"model": FailsInBackward()}),
    ("backward", lambda: {"model": FailsInBackward(), "amp": "fp16"}),
    ("optimizer", lambda: {"optimizer": Refusing}),
    ("optimizer", lambda: {"optimizer": Refusing, "amp": "fp16"}),
]


@pytest.mark.parametrize(("phase", "broken"), FAILING, ids=[f"{phase}-{i}" for i, (phase, _) in enumerate(FAILING)])
@pytest.mark.parametrize("tape", [None, Tape()], ids=["bare", "instrumented"])
def test_an_exception_names_its_phase(phase, broken, tape):
    trained = training(**broken())
    found = None
    try:
        run_block(trained.stages, 20, tape)
    except Exception as error:
        found = running_phase(trained.stages, error)
        # Else the workers live in it until garbage is collected, which then waits for them.
        traceback.clear_frames(error.__traceback__)
    trained.stop()
    assert found == phase


def test_an_exception_from_elsewhere_has_no_phase():
    stages = training().stages
    assert running_phase(stages, ValueError("never raised")) is None
    with pytest.raises(ZeroDivisionError) as raised:
        run_block([*stages, ("mine", lambda: 1 / 0)], 1, None)  # type: ignore[list-item]
    assert running_phase(stages, raised.value) is None


# --- the outside check ------------------------------------------------------------------------------


class Time:
    """A clock that stands still unless it is read or work is done."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 1
        return self.now

    def work(self, nanoseconds: int) -> Callable[[], None]:
        def stage() -> None:
            self.now += nanoseconds

        return stage


class Leaky(Tape):
    """Forgets what passed between a phase and the mark after it."""

    def __init__(self, clock: Time) -> None:
        super().__init__(clock=clock)
        mark = self.mark

        def forgetful(phase: str) -> None:
            if phase == "backward":
                mark("")
            else:
                mark(phase)

        self.mark = forgetful


def residual(tape_of: Callable[[Time], Tape], monkeypatch: pytest.MonkeyPatch) -> tuple[int, float]:
    """Return the wall time that no phase claims, in ns and as the metric that is shown."""
    time = Time()
    monkeypatch.setattr(loop, "host_clock", time)
    tape = tape_of(time)
    block = run_block([(phase, time.work(1000 * (i + 1))) for i, phase in enumerate(PHASES)], 50, tape)
    steps = tape.host_steps()
    samples = Samples(batch_size=8, step_ns=steps.step_ns, host_ns=steps.phase_ns, blocks=[block])
    shown = METRICS["residual"].compute(Reading(samples))
    assert isinstance(shown, float)
    return block.wall_ns - sum(map(sum, steps.phase_ns.values())), shown


def test_phases_account_for_the_blocks_own_wall_time(monkeypatch):
    # What is left are the block's own two readings.
    left, shown = residual(lambda time: Tape(clock=time), monkeypatch)
    assert left == 2
    assert 0 < shown < 1e-4


def test_time_that_no_phase_claims_is_found(monkeypatch):
    left, shown = residual(Leaky, monkeypatch)
    assert left >= 50 * 4000
    assert shown > 0.2
