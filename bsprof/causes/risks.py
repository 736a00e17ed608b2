"""What costs no time yet and ends a training later."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bsprof.causes.rule import (
    Found,
    Judged,
    mean_of,
    size,
)
from bsprof.evidence import limit


def memory_growth(j: Judged) -> Iterator[Found]:
    """Yield private memory that goes on growing."""
    rates = []
    for worker in j.loading.workers:
        at, private = np.array(worker.memory_at_ns, np.float64), np.array(worker.private_bytes, np.float64)
        if at.size != private.size or at.size < limit("growth_readings"):
            continue
        half = at.size // 2
        early, late = private[half] - private[0], private[-1] - private[half]
        span = (at[-1] - at[half]) * 1e-9
        steady = np.mean(np.diff(private[half:]) > 0) > 0.5 and late >= early * 0.25
        if span > 0 and steady and late >= max(limit("growth_bytes"), limit("growth") * private[half]):
            rates.append((late / span, worker.id, private[-1]))
    if not rates:
        return
    rate, worker_id, last = max(rates)
    count = len({number for _, number, _ in rates})
    yield Found(
        label="memory that grows",
        text=f"Private memory of {count} worker{'s' if count > 1 else ''} grows, worker {worker_id}'s by {size(rate)} "
        f"a second, to {size(last)} so far.",
        evidence={"bytes_per_s": rate, "worker": worker_id, "private_bytes": last, "workers": count},
        prescription="Keep nothing from sample to sample, and hold large tables in arrays (numpy, torch) instead of "
        "Python objects, whose reference counts copy shared pages.",
    )


def shm_low(j: Judged) -> Iterator[Found]:
    """Yield shared memory that nearly ran out."""
    resources, settings = j.loading.resources, j.loading.settings
    if resources is None or not resources.shm_bytes or resources.shm_free_bytes is None or not settings.workers:
        return
    batch = mean_of(j.loading.batches.bytes) or 0.0
    flight = batch * settings.workers * (settings.prefetch or 2)
    if resources.shm_free_bytes >= max(limit("shm") * resources.shm_bytes, min(flight, resources.shm_bytes / 2)):
        return
    yield Found(
        label="little shared memory",
        text=f"Of {size(resources.shm_bytes)} shared memory {size(resources.shm_free_bytes)} were free; the batches in "
        f"flight take {size(flight)}.",
        evidence={"shm_bytes": resources.shm_bytes, "shm_free_bytes": resources.shm_free_bytes, "flight_bytes": flight},
        prescription="Give it more (docker run --shm-size, or remount /dev/shm), or prefetch less; a worker that finds "
        "none dies with a bus error.",
    )


def fds_low(j: Judged) -> Iterator[Found]:
    """Yield file descriptors that nearly ran out."""
    resources = j.loading.resources
    if resources is None or not resources.open_files_limit:
        return
    most = max([resources.open_files or 0, *(worker.open_files or 0 for worker in j.loading.workers)])
    if most < limit("files") * resources.open_files_limit:
        return
    yield Found(
        label="few file descriptors left",
        text=f"{most} of {resources.open_files_limit} file descriptors were open; each tensor in flight holds one.",
        evidence={"open_files": most, "open_files_limit": resources.open_files_limit, "sharing": resources.sharing},
        prescription="Raise the limit (ulimit -n), pack tensors, or share them by name.",
        code_change="torch.multiprocessing.set_sharing_strategy('file_system')",
    )
