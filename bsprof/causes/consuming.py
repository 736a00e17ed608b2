"""Causes about how the consuming process gets a batch that has been made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bsprof.attribution import COLLATE, mean, seconds
from bsprof.causes.rule import (
    Found,
    Judged,
    mean_of,
    size,
    time,
    without_stage,
)
from bsprof.evidence import limit
from bsprof.replay import (
    Load,
    Setting,
    without_handoff,
)


def gil_held(j: Judged) -> Iterator[Found]:
    """Yield another thread that keeps the interpreter's lock from the consumer."""
    late = j.loading.gil_overshoot_ns
    if not late:
        return
    median = float(np.median(late)) * 1e-9
    if median < limit("gil"):
        return
    fixed = j.loading.consumer.step_ns if j.loading.consumer.kind == "fixed" else None

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        step_s = load.step_s if fixed is None else np.minimum(load.step_s, fixed * 1e-9)
        return without_handoff(load)._replace(step_s=step_s), setting

    yield Found(
        label="the interpreter's lock",
        text=f"A thread of the consuming process that wants the interpreter's lock gets it {time(median)} too late: "
        "another one computes in Python beside the loop.",
        evidence={"overshoot_s": median, "switch_interval_s": 0.005},
        prescription="Move what that thread does into a process of its own.",
        remove=remove,
        size_s=float(j.load.handoff_s.mean()),
    )


def slow_h2d(j: Judged) -> Iterator[Found]:
    """Yield copies to the accelerator that the step waits for."""
    copy, settings = mean(seconds(list(j.loading.h2d_ns or []))), j.loading.settings
    if copy is None or not j.scene.step_s or copy < limit("h2d") * j.scene.step_s:
        return
    payload = mean_of(j.loading.batches.bytes)
    of = "" if payload is None else f" of {size(payload)}"

    yield Found(
        label="copies to the device",
        text=f"Copying a batch{of} to the device takes {time(copy)} of the step.",
        evidence={"h2d_s": copy, "bytes": payload, "pinned": None if settings.pinned is None else int(settings.pinned)},
        prescription="Copy from page-locked memory, without waiting, on a stream of its own while the step before it "
        "computes.",
        change=None if settings.pinned else {"pin_memory": True},
        code_change="with torch.cuda.stream(copies):\n    x = x.to(device, non_blocking=True)",
        gives_back=copy / j.scene.step_s,
        size_s=copy,
    )


def pinning(j: Judged) -> Iterator[Found]:
    """Yield page-locking that is awaited."""
    pin, steps = mean(seconds(j.loading.batches.pin_ns)), j.scene.steps
    wait, pinned = mean(steps.wait_s), mean(steps.pin_s)
    if pin is None or not wait or pinned is None or pinned < limit("pin") * wait:
        return
    tensors, payload = mean_of(j.loading.batches.tensors), mean_of(j.loading.batches.bytes)
    of = "" if tensors is None or payload is None else f" of {tensors:.0f} tensors and {size(payload)}"

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        return load._replace(relay_s=None), setting

    yield Found(
        label="pinning",
        text=f"Page-locking a batch{of} takes {time(pin)}, and the step waits for it although the batch is there.",
        evidence={"pin_s": pin, "pin_wait_s": pinned, "wait_s": wait, "tensors": tensors, "bytes": payload},
        prescription="Do without page-locking, or lock fewer and larger tensors.",
        change={"pin_memory": False},
        remove=remove,
        size_s=pin,
    )


def many_tensors(j: Judged) -> Iterator[Found]:
    """Yield batches of so many tensors that taking them apart is what is awaited."""
    tensors, unpickle = mean_of(j.loading.batches.tensors), mean(seconds(j.loading.batches.unpickle_ns))
    if tensors is None or unpickle is None or tensors < limit("tensors") or unpickle / tensors < limit("tensor"):
        return
    collate = j.scene.stages.get(COLLATE)
    packs = collate is not None and collate.wall_s / tensors < limit("tensors_collate")
    rest = 1 / tensors  # of one tensor where there are as many as fields

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        gone = unpickle * (1 - rest)
        relay = None if load.relay_s is None else np.maximum(load.relay_s - gone, 0.0)
        handoff = load.handoff_s if relay is not None else np.maximum(load.handoff_s - gone, 0.0)
        load = load._replace(handoff_s=handoff, relay_s=relay)
        return without_stage(j.scene, load, COLLATE, 1 - rest) if packs else load, setting

    yield Found(
        label=f"{tensors:.0f} tensors a batch",
        text=f"A batch of {tensors:.0f} tensors takes {time(unpickle)} to unpickle: each tensor comes through shared "
        "memory by itself.",
        evidence={"tensors": tensors, "unpickle_s": unpickle, "a_tensor_s": unpickle / tensors},
        prescription="Pack the fields into a few tensors in collate_fn and take them apart in the loop.",
        code_change="def collate(samples):\n    return torch.stack([torch.cat([f.flatten() for f in s.values()]) "
        "for s in samples])",
        takes=frozenset({COLLATE}) if packs else frozenset(),
        remove=remove,
        size_s=unpickle + (collate.wall_s if collate is not None and packs else 0.0),
    )
