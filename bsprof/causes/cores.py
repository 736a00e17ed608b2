"""Causes about how many workers there are, what they have to compute on, and how far ahead they work."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bsprof.attribution import mean, seconds
from bsprof.causes.rule import (
    Found,
    Judged,
    share,
    taken_at_once,
    time,
    workers_of,
)
from bsprof.evidence import Scene, limit
from bsprof.loading import Change
from bsprof.replay import (
    GOOD_ENOUGH,
    OTHER_THREADS,
    Load,
    Setting,
    evened,
    mean_step_s,
)


def cpu_contended(j: Judged) -> Iterator[Found]:
    """Yield what takes cores from this program: other programs, a quota, the hypervisor."""
    crowded, machine = j.scene.crowded, j.loading.machine
    if not crowded or machine is None:
        return
    names = {
        "foreign_cores": lambda v: f"other programs take {v:.2g} of {machine.cores:g} cores",
        "throttled_share": lambda v: f"the quota stops this program {share(v)} of the time",
        "stolen_share": lambda v: f"the hypervisor takes {share(v)} of the time",
        "capacity_cores": lambda v: f"of {machine.cores:g} cores only {v:.2g} could be had",
    }
    cores = max(machine.cores if j.scene.bound is None else j.scene.bound, j.setting.capacity)
    yield Found(
        label="cores taken by others",
        text=f"{_sentence([names[key](value) for key, value in crowded.items()])}; the workers wait for a core in "
        f"{share(j.scene.runqueue_share)} of a batch's time.",
        evidence={**crowded, "cores": machine.cores, "runqueue_share": j.scene.runqueue_share},
        prescription="Stop the other load, move to a machine of its own, or raise the quota; what is judged below is "
        "judged as without it.",
        remove=lambda load, setting: (taken_at_once(j.scene, load), setting._replace(capacity=cores)),
        even_if_free=j.scene.runqueue_share >= limit("crowded"),
    )


def _sentence(parts: list[str]) -> str:
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def affinity_shrunk(j: Judged) -> Iterator[Found]:
    """Yield workers that are bound to fewer cores than the program may use."""
    machine, bound = j.loading.machine, j.scene.bound
    if bound is None or machine is None:
        return
    clean = max(machine.cores if j.scene.crowded else j.scene.clean.capacity, j.setting.capacity)
    yield Found(
        label="workers bound to few cores",
        text=f"Workers may run on {bound} of {machine.cores:g} cores and wait for one in "
        f"{share(j.scene.runqueue_share)} of a batch's time.",
        evidence={"worker_cores": bound, "cores": machine.cores, "runqueue_share": j.scene.runqueue_share},
        prescription="Give the workers all cores again: some library or launcher bound the process when it was loaded.",
        code_change="def worker_init_fn(worker_id):\n    os.sched_setaffinity(0, range(os.cpu_count()))",
        remove=lambda load, setting: (load, setting._replace(capacity=clean)),
    )


def thread_oversubscription(j: Judged) -> Iterator[Found]:
    """Yield workers whose libraries compute with many threads each."""
    fetches = j.scene.fetches
    cpu, process = mean(fetches.cpu_s), mean(seconds(j.loading.batches.process_cpu_ns))
    threads = max((worker.threads for worker in workers_of(j) if worker.threads is not None), default=None)
    if not cpu or process is None or threads is None:
        return
    if process / cpu < limit("threads_cpu") or threads <= limit("threads"):
        return
    keep = min(1.0, cpu / float(j.load.cpu_s.mean())) if j.load.cpu_s.any() else 1.0

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        return load._replace(cpu_s=load.cpu_s * keep, worker_cores=1.0), setting

    yield Found(
        label="too many threads",
        text=f"A worker runs {threads} threads that take {process / cpu:.2g} times the CPU time of the one that makes "
        f"the batch. What it gives back is a bound: part of their work may be needed.",
        evidence={"threads": threads, "process_cpu_s": process, "thread_cpu_s": cpu},
        prescription="Let each worker compute with one thread.",
        code_change="def worker_init_fn(worker_id):\n    torch.set_num_threads(1)  # and OMP_NUM_THREADS=1, "
        "cv2.setNumThreads(0)",
        remove=remove,
        size_s=process - cpu,
    )


def _more_workers(j: Judged) -> tuple[int, float]:
    """Return the fewest more workers within 2 % of the best, and the step that the replay finds for them."""
    load, now = j.load, j.setting.workers
    cost, step = float((load.cpu_s + load.blocked_s).mean()), float((load.step_s + load.handoff_s).mean())
    wanted = cost / step if step > 0 else math.inf
    cores = j.loading.machine.cores if j.loading.machine is not None else now + 4
    most = int(min(max(2 * cores, now + 2, min(wanted, 31) + 1), now + 64))
    counts = {now + 1, now + 2, most, *(int(now + (most - now) * part) for part in (0.25, 0.5, 0.75))}
    if math.isfinite(wanted):
        counts.update((math.ceil(wanted), math.ceil(wanted) + 1))
    steps = {
        count: mean_step_s(load, j.setting._replace(workers=count)) for count in sorted(counts) if now < count <= most
    }
    best = min(steps.values())
    return next((count, at) for count, at in steps.items() if at <= best * (1 + GOOD_ENOUGH))


def no_workers(j: Judged) -> Iterator[Found]:
    """Yield loading in the training process itself."""
    if j.setting.workers != 0:
        return
    count, _ = _more_workers(j)
    yield Found(
        label="no workers",
        text=f"Batches are made in the training process itself: the step waits {time(j.scene.fetch_s)} for each.",
        evidence={"workers": 0, "fetch_s": j.scene.fetch_s, "workers_wanted": count},
        prescription=f"Load in {count} worker process{'es' if count > 1 else ''}: num_workers={count}.",
        change={"num_workers": count},
        remove=lambda load, setting: (load, setting._replace(workers=count, prefetch=2)),
        size_s=j.scene.fetch_s,
    )


def too_few_workers(j: Judged) -> Iterator[Found]:
    """Yield that more workers would deliver more."""
    if j.setting.workers == 0:
        return
    count, _ = _more_workers(j)
    now, load = j.setting.workers, j.load
    cost = float((load.cpu_s + load.blocked_s).mean())
    fastest = j.loading.consumer.kind == "fastest"
    yield Found(
        label="too few workers",
        text=f"A batch takes a worker {time(cost)}, so {now} deliver{'s' if now == 1 else ''} one in "
        f"{time(cost / now)}; {f'{count} deliver as many as any number' if fastest else f'{count} would be enough'}.",
        evidence={"workers": now, "batch_s": cost, "workers_wanted": count, "capacity_cores": _finite(j.setting)},
        prescription=f"num_workers={count}.",
        change={"num_workers": count},
        remove=lambda load, setting: (load, setting._replace(workers=count)),
        size_s=cost,
    )


def _finite(setting: Setting) -> float | None:
    return setting.capacity if math.isfinite(setting.capacity) else None


def small_prefetch(j: Judged) -> Iterator[Found]:
    """Yield batches so uneven that those in advance do not bridge a long one."""
    load, setting = j.load, j.setting
    if setting.workers == 0:
        return
    step = mean_step_s(load, setting)
    steady = float((load.step_s + load.handoff_s).mean())
    alike = mean_step_s(evened(load), setting)
    if step <= steady or alike - steady > limit("evened") * (step - steady):
        return
    trials = {setting.prefetch * k: setting._replace(prefetch=setting.prefetch * k) for k in (2, 4, 8)}
    steps = {prefetch: mean_step_s(load, trial) for prefetch, trial in trials.items()}
    prefetch = next(p for p, at in steps.items() if at <= min(steps.values()) * (1 + GOOD_ENOUGH))
    change: Change = {"prefetch_factor": prefetch}
    better = trials[prefetch]
    if setting.in_order and mean_step_s(load, setting._replace(in_order=False)) < steps[prefetch] * (1 - GOOD_ENOUGH):
        change, better = {"in_order": False}, setting._replace(in_order=False)
    made = load.cpu_s + load.blocked_s
    setting_text = ", ".join(f"{name}={value}" for name, value in change.items())
    yield Found(
        label="uneven batches behind a small prefetch",
        text=f"The workers suffice on average, but batches take {time(float(np.quantile(made, 0.1)))} to "
        f"{time(float(np.quantile(made, 0.9)))}, and {setting.prefetch} a worker in advance do not bridge a long one.",
        evidence={"prefetch": setting.prefetch, "p10_s": float(np.quantile(made, 0.1)),
                  "p90_s": float(np.quantile(made, 0.9)), "ordering_s": mean(j.scene.steps.ordering_s)},
        prescription=f"{setting_text}{'' if 'in_order' in change else '; or in_order=False where order is free'}.",
        change=change,
        remove=lambda load, old: (load, old._replace(prefetch=better.prefetch, in_order=better.in_order)),
        size_s=step - steady,
    )  # fmt: skip


def cpu_saturated(j: Judged) -> Iterator[Found]:
    """Yield more workers than there are cores for."""
    load, setting = j.load, j.setting
    threads = load.worker_cores if load.worker_cores > OTHER_THREADS else 1.0  # the pickling thread is no worker
    wanted = setting.workers * threads + load.consumer_cpu
    if setting.workers == 0 or wanted < setting.capacity + limit("beyond_capacity"):
        return
    if j.scene.runqueue_share < limit("runqueue"):
        return
    yield Found(
        label="saturated cores",
        text=f"{setting.workers} workers share {setting.capacity:.2g} cores and wait for one in "
        f"{share(j.scene.runqueue_share)} of a batch's time: more of them deliver no more.",
        evidence={"workers": setting.workers, "capacity_cores": _finite(setting),
                  "runqueue_share": j.scene.runqueue_share, "cpu_s": mean(j.scene.fetches.cpu_s)},
        prescription="Make a batch cheaper: decode and resize offline, a faster transform, or work on the device; or "
        f"more cores. More than {max(1, math.floor(setting.capacity))} workers are of no use here.",
        remove=lambda load, setting: _with_all_cores(j.scene, load, setting),
        size_s=mean(j.scene.fetches.cpu_s) or 0.0,
    )  # fmt: skip


def _with_all_cores(scene: Scene, load: Load, setting: Setting) -> tuple[Load, Setting]:
    """Return the same on cores without end, with the workers to use them."""
    load = taken_at_once(scene, load)
    step = float((load.step_s + load.handoff_s).mean())
    wanted = float((load.cpu_s + load.blocked_s).mean()) / step if step > 0 else 0.0
    return load, setting._replace(capacity=math.inf, workers=max(setting.workers, math.ceil(min(63.0, wanted)) + 1))
