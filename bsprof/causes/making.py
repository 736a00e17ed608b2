"""Causes about how samples and batches are made: single slow ones, waiting for others, and slow work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bsprof.attribution import COLLATE, OWN, Row, mean
from bsprof.causes.rule import (
    Found,
    Judged,
    Remove,
    mean_of,
    share,
    size,
    takes_out,
    time,
    without_stage,
)
from bsprof.evidence import Scene, limit
from bsprof.loading import Loading, SlowSample
from bsprof.replay import (
    Load,
    Setting,
    scaled,
    without_blocked,
)

# --- single samples, single workers


def _hot(loading: Loading) -> list[SlowSample]:
    """Return the samples that are slow by themselves: each time they were made, or alone of all."""
    if loading.samples is None or not loading.samples.slowest:
        return []
    usual = loading.samples.quantiles_ns.get("p50", 0)
    slow = [one for one in loading.samples.slowest if one.times_ns and min(one.times_ns) > limit("hot") * usual]
    again = [one for one in slow if len(one.times_ns) >= 2]
    once = [one for one in slow if len(one.times_ns) == 1]
    return again + (once if len(slow) <= limit("hot_indices") else [])


def hot_sample(j: Judged) -> Iterator[Found]:
    """Yield single samples that are slow by themselves."""
    hot, samples = _hot(j.loading), j.loading.samples
    cost = j.load.cpu_s + j.load.blocked_s
    if not hot or samples is None or not cost.size:
        return
    excess = min(float(np.median(one.times_ns)) - samples.quantiles_ns["p50"] for one in hot) * 1e-9
    excess *= 1 - j.scene.runqueue_share  # a load holds no time that waited for a core
    usual = float(np.median(cost))
    hit = cost > usual + excess / 2

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        made = load.cpu_s + load.blocked_s
        keep = np.where(hit & (made > usual), usual / np.maximum(made, 1e-12), 1.0)
        return scaled(load, keep), setting

    first = max(hot, key=lambda one: float(np.median(one.times_ns)))
    others = f" and {len(hot) - 1} more" if len(hot) > 1 else ""
    median = samples.quantiles_ns["p50"] * 1e-9
    slowest = float(np.median(first.times_ns)) * 1e-9
    seen = "each of the " + str(len(first.times_ns)) + " times" if len(first.times_ns) > 1 else "the one time"
    yield Found(
        label=f"sample {first.index}",
        text=f"Sample {first.index}{others} takes {time(slowest)}, {seen} it was made; the median sample takes "
        f"{time(median)}.",
        evidence={
            "index": first.index,
            "samples": len(hot),
            "seen": len(first.times_ns),
            "sample_s": slowest,
            "median_s": median,
        },
        prescription=f"Look at sample {first.index}: make it smaller, convert it beforehand, or leave it out.",
        remove=remove,
        size_s=float(np.sum((cost - usual)[hit])) / cost.size,
    )


def uneven_workers(j: Judged) -> Iterator[Found]:
    """Yield a worker whose batches take longer than the others'."""
    medians = j.scene.uneven
    if j.setting.workers < 2 or not medians:
        return
    ordered = sorted(medians, key=medians.__getitem__)
    usual = medians[ordered[(len(ordered) - 1) // 2]]
    slow, fast = ordered[-1], ordered[0]

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        factors = {worker: min(1.0, usual / median) if median > 0 else 1.0 for worker, median in medians.items()}
        return scaled(load, np.array([factors.get(worker, 1.0) for worker in load.worker.tolist()])), setting

    yield Found(
        label=f"worker {slow}",
        text=f"Worker {slow} takes {time(medians[slow])} for a batch, worker {fast} {time(medians[fast])}, and batches "
        "come in turns: the others wait for the slow one.",
        evidence={"slow_worker": slow, "slow_s": medians[slow], "fast_worker": fast, "fast_s": medians[fast]},
        prescription="Deal the shards out so that each worker has the same work; where order does not matter, "
        "in_order=False lets the fast ones go ahead.",
        code_change="mine = shards[info.id :: info.num_workers]  # info = torch.utils.data.get_worker_info()",
        remove=remove,
        size_s=medians[slow] - usual,
    )


# --- blocked


def _blocked_s(j: Judged) -> float:
    return mean(j.scene.fetches.blocked_s) or 0.0


def _only_blocked(kept: float) -> Remove:
    return lambda load, setting: (load._replace(blocked_s=load.blocked_s * kept), setting)


def lock(j: Judged) -> Iterator[Found]:
    """Yield workers that wait for each other at a lock."""
    waits = j.scene.blocked_in
    locked = waits.get("lock", 0.0)
    if j.setting.workers < 2 or j.scene.blocked_share < limit("blocked") or locked < limit("wchan"):
        return
    yield Found(
        label="a lock",
        text=f"The workers are blocked for {share(j.scene.blocked_share)} of a batch's time, and {share(locked)} of "
        "the times that they were seen so, it was at a lock: they work one after another.",
        evidence={"blocked_share": j.scene.blocked_share, "lock_share": locked, "blocked_s": _blocked_s(j)},
        prescription="Open what they share in each worker anew (file, database, archive) instead of locking it; more "
        "workers only wait longer.",
        code_change="def __getitem__(self, index):\n    if self._file is None:  # after the fork: one handle a worker\n"
        "        self._file = open(self._path, 'rb')",
        remove=_only_blocked(1 - locked) if waits.get("sleep", 0.0) + waits.get("remote", 0.0) > 0 else _none_blocked,
        size_s=_blocked_s(j) * locked,
    )


def _none_blocked(load: Load, setting: Setting) -> tuple[Load, Setting]:
    return without_blocked(load), setting


def cold_disk(j: Judged) -> Iterator[Found]:
    """Yield reading from a disk what is not in memory."""
    b, waits = j.loading.batches, j.scene.blocked_in
    known = [blocks for blocks in b.blocks_in if blocks is not None]
    blocks, major = mean_of(b.blocks_in) or 0.0, mean_of(b.major_faults) or 0.0
    if not known or float(np.median(known)) < limit("blocks") or j.scene.blocked_share < limit("blocked"):
        return
    if waits and waits["disk"] < max(waits["lock"], waits["sleep"], waits["remote"]):
        return
    read = blocks * 512
    yield Found(
        label="cold disk",
        text=f"A batch reads {size(read)} from the disk and waits {time(_blocked_s(j))} for it "
        f"({share(j.scene.blocked_share)} of its time): the files are not in memory.",
        evidence={"blocks_in": blocks, "major_faults": major, "blocked_s": _blocked_s(j),
                  "blocked_share": j.scene.blocked_share},
        prescription="Copy the data to a local disk or into memory, or store it in large shards read in sequence; "
        "epochs after the first are fast where it fits into memory.",
        not_separable_from=() if waits else ("lock", "slow_storage"),
        remove=_none_blocked,
        size_s=_blocked_s(j),
    )  # fmt: skip


_READING = {"read", "load", "decode", OWN}
"""Stages in which a data set may wait for storage."""


def slow_storage(j: Judged) -> Iterator[Found]:
    """Yield waiting for something that is no disk."""
    waits, b = j.scene.blocked_in, j.loading.batches
    blocks = mean_of(b.blocks_in) or 0.0
    if j.scene.blocked_share < limit("blocked") or blocks >= limit("blocks"):
        return
    if waits and waits["remote"] <= max(waits["lock"], waits["sleep"], waits["disk"]):
        return
    where_most = max(j.scene.stages.values(), key=lambda row: row.blocked_s or 0.0, default=None)
    if not waits and where_most is not None and where_most.name not in _READING:
        return
    where = (
        f"{share(waits['remote'])} of the times that they were seen so, at a socket, pipe or remote file system"
        if waits
        else "what for was not to be seen"
    )
    yield Found(
        label="slow storage",
        text=f"The workers are blocked for {time(_blocked_s(j))} of a batch ({share(j.scene.blocked_share)}) and read "
        f"nothing from a disk: {where}.",
        evidence={"blocked_s": _blocked_s(j), "blocked_share": j.scene.blocked_share,
                  "remote_share": waits.get("remote"), "blocks_in": blocks},
        prescription="Read ahead, fetch many samples with one request, or store them in shards; more workers hide "
        "latency as long as the source keeps up.",
        not_separable_from=() if waits else ("lock", "slow_stage"),
        vague=not waits,
        remove=_none_blocked,
        size_s=_blocked_s(j),
    )  # fmt: skip


# --- slow work
def per_item_overhead(j: Judged) -> Iterator[Found]:
    """Yield so many tiny samples that calls are most of the work."""
    samples, own = j.loading.samples, j.scene.stages.get(OWN)
    count = mean_of(j.loading.batches.samples)
    if samples is None or own is None or count is None or j.loading.settings.getitems:
        return
    if j.loading.settings.style != "map" or count < limit("items_many"):
        return
    each = own.wall_s / count
    if samples.mean_ns * 1e-9 > limit("item") or (own.share or 0.0) < limit("items_share"):
        return
    if j.scene.cpu_share < limit("items_cpu"):
        return
    yield Found(
        label="per-item overhead",
        text=f"{count:.0f} samples of {time(each)} each make {share(own.share or 0.0)} of a batch's time: what they "
        "cost is calls, not work.",
        evidence={"samples": count, "sample_s": each, "share": own.share},
        prescription="Make the batch at once: DataLoader calls __getitems__(indices) where the data set has it.",
        code_change="def __getitems__(self, indices):\n    return list(zip(self.x[indices], self.y[indices]))",
        takes=frozenset({OWN}),
        remove=takes_out(j.scene, OWN),
        size_s=own.wall_s,
    )


def large_payload(j: Judged) -> Iterator[Found]:
    """Yield batches of so many bytes that copying them is what is awaited."""
    b, collate = j.loading.batches, j.scene.stages.get(COLLATE)
    payload, faults = mean_of(b.bytes), mean_of(b.minor_faults)
    if payload is None or collate is None or payload < limit("payload"):
        return
    if faults is not None and faults * 4096 < limit("payload_faults") * payload:
        return
    if collate.wall_s > 0 and payload / collate.wall_s < limit("payload_rate"):
        return
    floats = mean_of(b.float_bytes)
    if floats is not None and floats < payload / 2:  # it is what it is: there is nothing smaller to hand over
        return

    def remove(load: Load, setting: Setting) -> tuple[Load, Setting]:
        relay = None if load.relay_s is None else load.relay_s / 4  # uint8 is a quarter of float32 wherever it goes
        return without_stage(j.scene, load, COLLATE, 0.75)._replace(
            handoff_s=load.handoff_s / 4, relay_s=relay
        ), setting

    yield Found(
        label=f"payload of {size(payload)}",
        text=f"A batch is {size(payload)}, and copying it together takes {time(collate.wall_s)} "
        f"({share(collate.share or 0.0)} of its time).",
        evidence={"bytes": payload, "collate_s": collate.wall_s, "minor_faults": faults},
        prescription="Hand over uint8 and convert on the device: a quarter of float32.",
        code_change="x = x.to(device, non_blocking=True).float().div_(255)",
        takes=frozenset({COLLATE}),
        remove=remove,
        size_s=collate.wall_s,
    )


def slow_collate(j: Judged) -> Iterator[Found]:
    """Yield a slow collate function."""
    collate = j.scene.stages.get(COLLATE)
    if collate is None or COLLATE in j.taken or (collate.share or 0.0) < limit("collate"):
        return
    yield Found(
        label=_of_worker(j.scene, collate),
        text=f"Putting samples together takes {time(collate.wall_s)} a batch, {share(collate.share or 0.0)} of its "
        "time.",
        evidence={"collate_s": collate.wall_s, "share": collate.share},
        prescription="Do it with whole arrays, or move work on single samples into __getitem__.",
        code_change="def collate(samples):\n    x, y = zip(*samples)\n    return torch.stack(x), torch.as_tensor(y)",
        remove=takes_out(j.scene, COLLATE),
        size_s=collate.wall_s,
    )


def _of_worker(scene: Scene, row: Row) -> str:
    """Name a stage with its share of what the workers do most: `decode (71 % of worker CPU)`."""
    if scene.cpu_share >= 0.5 and row.cpu_s is not None:
        whole = sum(other.cpu_s or 0.0 for other in scene.stages.values())
        if whole > 0:
            return f"{row.name} ({share(row.cpu_s / whole)} of worker CPU)"
    return f"{row.name} ({share(row.share or 0.0)} of worker time)"


_STAGE_CURES = {
    "read": "Read fewer, larger files: shards read in sequence, or a copy in memory.",
    "decode": "Decode smaller images (resize once, offline), a faster decoder, or decode on the device.",
    OWN: "Profile __getitem__, and move what does not change from epoch to epoch offline.",
}


def slow_stage(j: Judged) -> Iterator[Found]:
    """Yield the stages that take most of a batch's time."""
    rows = [row for name, row in j.scene.stages.items() if name not in {COLLATE, *j.taken}]
    for row in sorted(rows, key=lambda row: -row.wall_s)[: int(limit("stages_named"))]:
        if (row.share or 0.0) < limit("slow_stage"):
            continue
        what = "The data set's own code" if row.name == OWN else row.name
        split = "" if row.cpu_s is None else f" ({time(row.cpu_s)} of it CPU)"
        sleeps = j.scene.blocked_in.get("sleep", 0.0) >= 0.5
        yield Found(
            label=_of_worker(j.scene, row),
            text=f"{what} takes {time(row.wall_s)}{split} a batch, {share(row.share or 0.0)} of its time"
            f"{'; what blocks the workers is sleeping' if sleeps else ''}.",
            evidence={"stage": row.name, "stage_s": row.wall_s, "cpu_s": row.cpu_s, "blocked_s": row.blocked_s,
                      "share": row.share},
            prescription=_STAGE_CURES.get(
                row.name, f"A faster {row.name}: transforms.v2 on uint8 tensors, or on the device, or offline."
            ),
            remove=takes_out(j.scene, row.name),
            size_s=row.wall_s,
        )  # fmt: skip
