"""What `bsprof loader` does in its process: make the loader, consume it, and say what came of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bsprof import cgroup
from bsprof.diagnosis import diagnose
from bsprof.errors import BsprofError
from bsprof.loader.target import Target, changed, resolve
from bsprof.loader.watching import CACHED_SHARE, Pace, Step, Watching, cores_or_none, pause, steps_on, try_to_watch
from bsprof.loading import Consumer, LoaderRequest, Loading
from bsprof.measure.clock import host_clock, present_device, wait_for
from bsprof.measure.failures import abandon, classify
from bsprof.measure.loop import Stage, Training, build_optimizer
from bsprof.model import Case, Facts, Measurement, Outcome, Settings
from bsprof.workloads.registration import ImageShape
from bsprof.workloads.registry import build_model, described

Emit = Callable[[str, int, float | None], None]

FEWEST_IN_SHORT = 12
"""Batches that a case's loader is watched for at the least, where it is not looked at in full."""
COPIES = 10
FEWEST_CLASSES = 1000
"""Outputs of a model whose data set does not say how many classes it has."""


class OverdueError(Exception):
    """The loader was still at it when its time was up."""


def measure(
    request: LoaderRequest, cache: Path, emit: Emit, *, deadline_s: float, thorough: bool = True
) -> Measurement:
    """Watch the loader that `request` names and return the Measurement; a loader that fails is an outcome.

    `thorough` is false for a round of a verification: then neither capacity nor cached batches are measured, and the
    diagnosis has no predictions. A loader that is not done after `deadline_s` is given up, and what was seen of it is
    kept; for that SIGALRM is taken, so call it in the main thread. Raises BsprofError where there is nothing to
    measure.
    """
    started = host_clock()
    emit("build", 0, None)
    kills_before = cgroup.oom_kills() or 0
    outcome, loading = Outcome(kind="ok"), None
    stage = "build"
    try:
        _give_up_after(deadline_s)
        target = resolve(request, cache)
        step, consumer = _consumer(request, target)
        stage = "loader"
        emit("watching the loader", 0, None)
        loading, error = try_to_watch(
            target.loader, seconds=request.seconds, step=step, consumer=consumer, thorough=thorough
        )
        if error is not None:
            raise error
    except BsprofError:
        raise
    except OverdueError as error:
        abandon(error)
        outcome = Outcome(
            kind="timeout",
            message=f"still waiting for the loader after {deadline_s:g} s",
            hint="raise --deadline, or see below what its workers were last seen in",
            phase=stage,
            evidence={"deadline_s": deadline_s},
        )
    except Exception as error:
        abandon(error)
        outcome = classify(error, stage, oom_kills=(cgroup.oom_kills() or 0) - kills_before)
    finally:
        _give_up_after(0)
    emit("diagnosing", 0, None)
    return Measurement(
        case=Case(key="loader"),
        outcome=outcome,
        wall_s=0.0,
        inside_s=(host_clock() - started) / 1e9,
        facts=Facts(device=str(present_device()), threads=torch.get_num_threads()),
        loading=loading,
        diagnosis=diagnose(loading, predictions=thorough) if loading else None,
    )


def _give_up_after(seconds: float) -> None:
    """Raise OverdueError in the main thread after `seconds`; 0 takes that back."""

    def raise_overdue(number: int, frame: object) -> None:
        raise OverdueError

    signal.signal(signal.SIGALRM, raise_overdue if seconds else signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _consumer(request: LoaderRequest, target: Target) -> tuple[Step | None, Consumer]:
    """Return what takes the batches: nothing, a pause, or a model's training step."""
    if request.model is not None:
        return _training_step(request, target), Consumer(kind="model", model=request.model)
    if request.step_ms is not None:
        step_ns = round(request.step_ms * 1e6)
        return pause(step_ns), Consumer(kind="fixed", step_ns=step_ns)
    return None, Consumer(kind="fastest")


def _training_step(request: LoaderRequest, target: Target) -> Step:
    """Return a training step of the named model on batches of (images, labels), as `bench` takes it."""
    assert request.model is not None
    images, labels = _first_batch(request, target)
    known = getattr(target.dataset, "classes", None)
    classes = len(known) if known is not None else max(FEWEST_CLASSES, int(labels.max()) + 1)
    device = present_device()
    model = build_model(request.model, classes=classes, shape=ImageShape(*images.shape[1:]), seed=request.seed)
    model = model.to(device).train()
    settings = Settings()
    return Training(model, (), build_optimizer(settings, model), settings, device).train_on


def watch_training(
    training: Training, stages: Sequence[Stage], model: str, seconds: float, *, thorough: bool
) -> Loading:
    """Watch the loader of a case's own training, of `model`, for `seconds` from the first batch on.

    Each step ends with a synchronisation, so that a wait of the host is a stall of the device. An iterator that fails
    is left as it is (see `abandon`).
    """
    (_, fetch), *rest = stages
    device = training.device
    capacity = cores_or_none() if thorough else None
    with Watching(Consumer(kind="model", model=model)) as watching:
        training.start()
        pace = Pace(seconds) if thorough else Pace(seconds, FEWEST_IN_SHORT)
        while pace.goes_on():
            fetch()
            pace.count()
            for _, run in rest:
                run()
            wait_for(device)
        watching.close_window()
        batch = training.batch
        training.stop()
    cached = steps_on([batch], training.train_on, seconds * CACHED_SHARE)
    loading = watching.loading()
    return msgspec.structs.replace(
        loading, capacity_cores=capacity, cached_step_ns=cached, h2d_ns=_copies(batch, device, loading)
    )


def _copies(batch: Any, device: torch.device, loading: Loading) -> list[int] | None:
    """Return how long it takes to copy a batch of (images, labels) to the accelerator, each time alone."""
    if device.type == "cpu":
        return None
    parts = [part.cpu() for part in batch]
    if loading.settings.pinned:
        parts = [part.pin_memory() for part in parts]
    times = []
    for _ in range(COPIES + 1):
        wait_for(device)
        before = host_clock()
        for part in parts:
            part.to(device, non_blocking=True)
        wait_for(device)
        times.append(host_clock() - before)
    return times[1:]  # the first makes room for it


def _first_batch(request: LoaderRequest, target: Target) -> tuple[Tensor, Tensor]:
    loader = target.loader
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        loader = changed(loader, {"num_workers": 0})
    batch = next(iter(loader), None)
    match batch:
        case (Tensor() as images, Tensor() as labels) if images.ndim == 4 and not labels.is_floating_point():
            return images, labels
    raise BsprofError(
        f"--model {request.model}: the loader gives {described(batch)}, "
        "batches of (images, class numbers) are expected",
        hint="give the step's time with --step-ms instead",
    )
