"""Causes about how long an epoch takes to begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bsprof.attribution import seconds
from bsprof.causes.rule import (
    Found,
    Judged,
    size,
    time,
    workers_of,
)
from bsprof.evidence import Scene, limit
from bsprof.loading import MAIN


class _Starts(NamedTuple):
    """What the starts of the epochs cost, in seconds over all that was watched."""

    epochs: int
    launches: int
    """Epochs that started workers."""
    whole_s: float
    """Of all epochs, the last one as long as it would have become."""
    start_s: float
    """iter(), the first next() beyond a usual batch, and the end."""
    excess_s: float
    """Part of it that is special: a large data set on its way, a slow worker_init_fn, first batches."""
    parts: dict[str, float]
    pickled: int


def _starts(scene: Scene) -> _Starts | None:
    loading, step = scene.loading, scene.step_s
    b, epochs = loading.batches, loading.epochs
    if step is None or not epochs:
        return None
    asked, got = seconds(b.asked_at_ns), seconds(b.got_at_ns)
    fetch = scene.fetches.wall_s
    order, of_epoch, maker = np.array(b.order), np.array(b.epoch), scene.fetches.worker
    usual = float(np.nanmedian(fetch)) if np.any(~np.isnan(fetch)) else 0.0
    wait = scene.wait_s or 0.0
    whole, count = 0.0, 0
    parts = dict.fromkeys(("iter", "first", "end", "arrival", "init", "first_fetch"), 0.0)
    for one in scene.passes:
        if not 0 <= one.epoch < len(epochs):
            continue
        number, epoch, own = one.epoch, epochs[one.epoch], [*one.starting, *one.steady]
        waited = sum(max(0.0, float(got[i] - asked[i])) for i in one.starting)
        parts["first"] += max(0.0, waited - usual - wait * (len(one.starting) - 1))
        parts["iter"] += (epoch.ready_at_ns - epoch.began_at_ns) * 1e-9
        if epoch.ended_at_ns is not None and epoch.last_asked_at_ns is not None:
            parts["end"] += (epoch.ended_at_ns - epoch.last_asked_at_ns) * 1e-9
        expected = loading.settings.batches_per_epoch or 0
        whole += step * max(len(own), expected if epoch.ended_at_ns is None else 0)
        started = [w for w in loading.workers if w.epoch == number and w.id != MAIN]
        count += bool(started)
        for name, times in (
            ("arrival", [_span(epoch.ready_at_ns, w.entered_at_ns) for w in started]),
            ("init", [_span(w.entered_at_ns, w.ready_at_ns) for w in started]),
        ):
            parts[name] += max(times, default=0.0)
        firsts = [
            float(fetch[mine[np.argmin(order[mine])]])
            for w in started
            if (mine := np.flatnonzero((of_epoch == number) & (maker == w.id))).size
        ]
        late = [time for time in firsts if time > limit("first_fetch") * usual > 0]
        parts["first_fetch"] += min(late) - usual if late and len(late) == len(firsts) else 0.0
    start = parts["iter"] + parts["first"] + parts["end"]
    pickled = max((epoch.pickled_bytes or 0 for epoch in epochs), default=0)
    excess = parts["init"] + parts["first_fetch"]
    if pickled >= limit("pickled"):
        excess += parts["iter"] + parts["arrival"]
    return _Starts(len(epochs), max(1, count), whole + start, start, min(start, excess), parts, pickled)


def _span(begin: int | None, end: int | None) -> float:
    return 0.0 if begin is None or end is None else max(0, end - begin) * 1e-9


def _matters(starts: _Starts, cost_s: float, scene: Scene) -> bool:
    # Held against steps that wait for nothing: a start is no smaller for a slow loader behind it.
    stepping = scene.loading.consumer.kind != "fastest"
    step_s = (scene.busy_s if stepping else scene.step_s) or 0.0
    return 0 < cost_s >= limit("start") * starts.whole_s and cost_s >= limit("start_steps") * step_s * starts.launches


def _restarts(j: Judged, starts: _Starts) -> bool:
    return starts.launches > 1 and not j.loading.settings.persistent_workers


def slow_start(j: Judged) -> Iterator[Found]:
    """Yield a start that is slow by what the data set brings along."""
    starts = _starts(j.scene)
    if starts is None or j.setting.workers == 0 or starts.excess_s < starts.start_s / 2:
        return
    pickles, again = starts.pickled >= limit("pickled"), _restarts(j, starts)
    if not _matters(starts, starts.excess_s, j.scene) or (again and not pickles):  # then a setting mends it
        return
    each = starts.excess_s / starts.launches
    special = ("init", "first_fetch", "arrival", "iter") if pickles else ("init", "first_fetch")
    text = {
        "init": "worker_init_fn takes it",
        "first_fetch": "the first batch of each worker takes it",
        "arrival": f"{size(starts.pickled)} are pickled and unpickled for the workers",
        "iter": f"{size(starts.pickled)} are pickled for the workers",
    }[max(special, key=lambda name: starts.parts[name])]
    yield Found(
        label="a slow start",
        text=f"Before the first batch of new workers {time(each)} pass: {text}.",
        evidence={"start_s": starts.start_s / starts.launches, "excess_s": each, "starts": starts.launches,
                  "pickled_bytes": starts.pickled,
                  **{f"{name}_s": value / starts.launches for name, value in starts.parts.items()}},
        prescription="Give the data set little state: paths in an array, files opened in the worker, tables in shared "
        "memory." + (" persistent_workers=True pays it once." if again else ""),
        change={"persistent_workers": True} if again else None,
        code_change="def __getstate__(self):\n    return {**self.__dict__, '_table': None}  # loaded again when needed",
        gives_back=starts.excess_s / starts.whole_s,
        size_s=each,
    )  # fmt: skip


def epoch_restart(j: Judged) -> Iterator[Found]:
    """Yield workers that are started anew for each epoch."""
    starts = _starts(j.scene)
    if starts is None or j.setting.workers == 0 or not _restarts(j, starts):
        return
    if not _matters(starts, starts.start_s, j.scene):
        return
    if starts.pickled >= limit("pickled") and starts.excess_s >= starts.start_s / 2:  # that is a slow start
        return
    each, epoch = starts.start_s / starts.launches, starts.whole_s / starts.epochs
    yield Found(
        label="workers started for each epoch",
        text=f"Each of {starts.launches} epochs starts its workers anew, which takes {time(each)} of {time(epoch)}.",
        evidence={"epochs": starts.epochs, "starts": len(workers_of(j)), "start_s": each, "epoch_s": epoch,
                  **{f"{name}_s": value / starts.launches for name, value in starts.parts.items()}},
        prescription="Keep the workers: persistent_workers=True.",
        change={"persistent_workers": True},
        gives_back=each * (starts.launches - 1) / starts.whole_s,
        size_s=each,
    )  # fmt: skip
