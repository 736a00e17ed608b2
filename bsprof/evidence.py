"""The evidence that causes of slow loading are judged by, and the thresholds that decide.

A Scene derives from one Loading all that more than one rule looks at. All thresholds stand in `THRESHOLDS`, each with
its unit and its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from bsprof.attribution import Fetches, Pass, Row, Steps, fetches_of, mean, passes_of, seconds, steps_of, worker_stages
from bsprof.loading import MAIN, Loading
from bsprof.replay import Load, Setting, load_of, mean_step_s, setting_of

# --- thresholds -------------------------------------------------------------------------------------


class Threshold(NamedTuple):
    """A figure that decides, what it is measured in, and why it is this one."""

    value: float
    unit: str
    reason: str


THRESHOLDS: Mapping[str, Threshold] = {
    "moderately": Threshold(0.05, "of the step", "TensorFlow's input-pipeline analyzer: 'moderately input-bound' from"),
    "highly": Threshold(0.20, "of the step", "TensorFlow's input-pipeline analyzer: 'highly input-bound' from"),
    "worth": Threshold(0.03, "of the step", "half of what makes a loop input-bound: less is not worth a change"),
    "tie": Threshold(0.03, "of the step", "the replay cannot tell cures apart that are closer than this"),
    "tie_relative": Threshold(0.10, "of the larger gain", "a cure by workers leaves some hand-off that a faster stage "
                              "in the main process does not have"),
    "runqueue": Threshold(0.20, "of a fetch", "one batch in five waits for a core; two busy threads on two cores show "
                          "up to a tenth"),
    "beyond_capacity": Threshold(0.5, "cores", "half a worker more than the cores that really run: that is measured "
                                 "to about a tenth"),
    "foreign_cores": Threshold(0.15, "of the cores", "an idle desktop or a monitoring agent takes a few per cent"),
    "crowded": Threshold(0.05, "of a fetch", "whoever never waits for a core is not disturbed by others on them"),
    "throttled": Threshold(0.05, "of the time", "a quota that bites now and then costs little"),
    "stolen": Threshold(0.05, "of the time", "as for a quota"),
    "capacity": Threshold(0.60, "of the cores", "two threads of one core run at 0.6 to 0.7 each"),
    "threads_cpu": Threshold(1.5, "process CPU / thread CPU", "the feeder thread's pickling stays below a fifth"),
    "threads": Threshold(3.0, "threads", "a worker's own are two, the main and the feeder, and one that watches the "
                         "parent"),
    "slow_stage": Threshold(0.15, "of a batch's time", "a smaller stage is named in the table, and no cause"),
    "stages_named": Threshold(3.0, "stages", "more would not be read"),
    "item": Threshold(100e-6, "seconds a sample", "a Python call with its indexing costs 1 to 10 microseconds; real "
                      "decoding costs more than this"),
    "items_many": Threshold(32.0, "samples a batch", "with fewer, calls cannot be most of the time"),
    "items_share": Threshold(0.60, "of a fetch", "making the samples is most of it"),
    "items_cpu": Threshold(0.80, "of a fetch off the run-queue", "it computes, and waits for nothing"),
    "collate": Threshold(0.30, "of a fetch", "stacking is a copy, and a copy takes a small part of making the samples"),
    "payload": Threshold(8 * 2**20, "bytes a batch", "beyond a core's own caches each byte is copied at memory speed"),
    "payload_rate": Threshold(200e6, "bytes a second", "a copy into fresh shared memory, page faults included, runs at "
                              "0.5 to 5 GB/s: slower than this, it is the collate function"),
    "payload_faults": Threshold(0.25, "of the pages", "a page of a fresh block is faulted in once; huge pages fewer"),
    "tensors": Threshold(16.0, "tensors a batch", "a batch of a few fields has fewer"),
    "tensor": Threshold(0.02e-3, "seconds a tensor", "unpickling takes 0.03 ms with file_system, 0.12 ms with "
                        "file_descriptor"),
    "tensors_collate": Threshold(2e-3, "seconds a tensor", "what a small tensor's own shared-memory block may cost in "
                                 "collate; more is the stacking itself"),
    "hot": Threshold(5.0, "times the median sample", "sizes of images differ by 2 to 3"),
    "hot_indices": Threshold(3.0, "samples", "slow once each, more than this are a wide distribution and no index's "
                             "fault"),
    "uneven": Threshold(1.5, "times the fastest worker's median", "workers that share cores differ by some tens of per "
                        "cent"),
    "uneven_errors": Threshold(4.0, "standard errors", "batches that scatter make no worker slow"),
    "evened": Threshold(0.5, "of the wait", "with all batches alike, most of the wait is gone: the workers suffice on "
                        "average"),
    "blocked": Threshold(0.20, "of a fetch", "as for the run-queue"),
    "blocks": Threshold(8.0, "blocks of 512 bytes a batch", "one page: less is noise of the file system"),
    "wchan": Threshold(0.25, "of the looks at which it was blocked", "of two workers at one lock, one waits for it and "
                       "the other may sleep inside"),
    "looks": Threshold(5.0, "looks", "with fewer a share means nothing"),
    "gil": Threshold(4e-3, "seconds", "the interpreter's switch interval is 5 ms: whoever asks waits that long"),
    "pin": Threshold(0.5, "of the wait", "most of the wait is for page-locking"),
    "h2d": Threshold(0.10, "of the step", "a copy that takes less is not worth a stream of its own"),
    "start": Threshold(0.10, "of an epoch", "short loops show several per cent of start-up that a real epoch makes up "
                       "for"),
    "start_steps": Threshold(4.0, "steps without their wait", "a start that costs less is not felt"),
    "pickled": Threshold(16 * 2**20, "bytes for all workers", "pickling and piping run at some 0.1 to 1 GB/s"),
    "first_fetch": Threshold(5.0, "times the median fetch", "caches are cold once: a few times as long is usual"),
    "growth": Threshold(0.02, "of private memory", "in the second half of the time alone: allocators level off"),
    "growth_bytes": Threshold(4 * 2**20, "bytes", "an allocator's arenas come in steps of this size"),
    "growth_readings": Threshold(4.0, "readings", "fewer make no trend"),
    "shm": Threshold(0.10, "of shared memory", "free at the least; the next larger batch may be the one too many"),
    "files": Threshold(0.80, "of the limit", "file_descriptor sharing holds one a tensor in flight"),
}  # fmt: skip


def limit(name: str) -> float:
    """Return a threshold's value."""
    return THRESHOLDS[name].value


# --- what the rules look at -------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """One recording, and what is derived from it for all rules."""

    loading: Loading

    @cached_property
    def load(self) -> Load | None:
        """What is replayed; None where nothing says what making the batches took."""
        load = load_of(self.loading)
        if load is None or not all(np.isfinite(times).all() for times in load[:4]):
            return None
        cpu, blocked, handoff, step = (np.maximum(times, 0.0) for times in load[:4])
        return load._replace(cpu_s=cpu, blocked_s=blocked, handoff_s=handoff, step_s=step)

    @cached_property
    def clean(self) -> Setting:
        """The settings as found, on the cores that were free for them."""
        return setting_of(self.loading)

    @cached_property
    def setting(self) -> Setting:
        """The same on the cores that the workers really had.

        How many a thread beside others gets is not in the capacity that as many threads as cores had, and one that is
        bound to a core does not have all. Then it is the capacity at which the replay takes as long as was measured.
        """
        if self.load is None or not (self.crowded or self.bound) or self.runqueue_share < limit("runqueue") / 2:
            return self.clean
        step_s, load = self.step_s or 0.0, self.load
        most = min(self.clean.capacity, float(max(1, self.clean.workers)))
        low, high = most / 16, most
        if not math.isfinite(most) or mean_step_s(load, self.clean._replace(capacity=high)) >= step_s:
            return self.clean
        for _ in range(6):
            middle = math.sqrt(low * high)
            slower = mean_step_s(load, self.clean._replace(capacity=middle)) > step_s
            low, high = (middle, high) if slower else (low, middle)
        return self.clean._replace(capacity=math.sqrt(low * high))

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        """The passes over the loader."""
        return tuple(passes_of(self.loading))

    @cached_property
    def steps(self) -> Steps:
        """The steady steps."""
        return steps_of(self.loading)

    @cached_property
    def fetches(self) -> Fetches:
        """What each batch took to make."""
        return fetches_of(self.loading)

    @cached_property
    def stages(self) -> dict[str, Row]:
        """What a mean fetch consists of."""
        return {row.name: row for row in worker_stages(self.loading)}

    @cached_property
    def wait_s(self) -> float | None:
        """Mean wait of a steady step, in seconds; None where there is no such step."""
        return mean(self.steps.wait_s)

    @cached_property
    def busy_s(self) -> float | None:
        """Mean time of the consumer's own part."""
        return mean(self.steps.busy_s)

    @cached_property
    def step_s(self) -> float | None:
        """Both together."""
        return None if self.wait_s is None or self.busy_s is None else self.wait_s + self.busy_s

    @cached_property
    def wait_share(self) -> float | None:
        """The wait's share of the step."""
        return None if self.wait_s is None or not self.step_s else min(1.0, self.wait_s / self.step_s)

    @cached_property
    def contention_s(self) -> float | None:
        """What the workers add to the consumer's own part: it on live batches less it on cached ones."""
        cached = mean(seconds(self.loading.cached_step_ns or []))
        return None if cached is None or self.busy_s is None else self.busy_s - cached

    @cached_property
    def fetch_s(self) -> float:
        """Mean time to make a batch, in seconds; 0 where it is not known."""
        return mean(self.fetches.wall_s) or 0.0

    @cached_property
    def runqueue_share(self) -> float:
        """Share of a fetch that waited for a core; 0 where it is not known."""
        return self._share("runqueue_s")

    @cached_property
    def blocked_share(self) -> float:
        """Share of a fetch that was blocked; 0 where it is not known."""
        return self._share("blocked_s")

    @cached_property
    def cpu_share(self) -> float:
        """Share of a fetch, waiting for a core left out, in which it computed."""
        return self._share("cpu_s") / max(1e-12, 1 - self.runqueue_share)

    def _share(self, part: str) -> float:
        value = mean(getattr(self.fetches, part))
        return min(1.0, max(0.0, value / self.fetch_s)) if value is not None and self.fetch_s > 0 else 0.0

    @cached_property
    def crowded(self) -> dict[str, float]:
        """What takes the cores away from this program, with how much; empty where nothing does."""
        machine, capacity, found = self.loading.machine, self.loading.capacity_cores, {}
        if machine is None:
            return {}
        foreign, cores = machine.foreign_cores, machine.cores
        if foreign is not None and foreign >= limit("foreign_cores") * cores:
            found["foreign_cores"] = foreign
        if (machine.throttled_share or 0.0) >= limit("throttled"):
            found["throttled_share"] = machine.throttled_share or 0.0
        if (machine.stolen_share or 0.0) >= limit("stolen"):
            found["stolen_share"] = machine.stolen_share or 0.0
        if capacity is not None and 0 < capacity.value < limit("capacity") * cores:
            found["capacity_cores"] = capacity.value
        return found

    @cached_property
    def bound(self) -> int | None:
        """Cores that the workers are bound to, where that is fewer than the program may use."""
        cores = [worker.cores for worker in self.loading.workers if worker.cores is not None and worker.id != MAIN]
        machine = self.loading.machine
        return min(cores) if cores and machine is not None and min(cores) < math.floor(machine.cores) else None

    @cached_property
    def blocked_in(self) -> dict[str, float]:
        """Share of what the workers were seen blocked in: `lock`, `sleep`, `remote`, `disk`; empty if not looked at."""
        counts = dict.fromkeys(KERNEL_WAITS, 0)
        for worker in self.loading.workers:
            for function, count in worker.blocked_in.items():
                for kind, names in KERNEL_WAITS.items():
                    if any(name in function for name in names):
                        counts[kind] += count
                        break
        total = sum(sum(worker.blocked_in.values()) for worker in self.loading.workers)
        return {kind: count / total for kind, count in counts.items()} if total >= limit("looks") else {}

    @cached_property
    def uneven(self) -> dict[int, float]:
        """Median fetch of each worker in seconds, where they differ beyond chance; else empty."""
        fetches, medians, errors = self.fetches, {}, {}
        for worker in set(fetches.worker.tolist()):
            times = fetches.wall_s[(fetches.worker == worker) & ~np.isnan(fetches.wall_s)]
            if times.size >= 5:
                middle = float(np.median(times))
                spread = 1.4826 * float(np.median(np.abs(times - middle)))
                medians[worker], errors[worker] = middle, 1.2533 * spread / math.sqrt(times.size)
        if len(medians) < 2:
            return {}
        slow, fast = max(medians, key=medians.__getitem__), min(medians, key=medians.__getitem__)
        apart = medians[slow] - medians[fast] > limit("uneven_errors") * math.hypot(errors[slow], errors[fast])
        return medians if apart and medians[slow] > limit("uneven") * medians[fast] else {}


KERNEL_WAITS: Mapping[str, tuple[str, ...]] = {
    "lock": ("futex", "locks_lock", "flock", "fcntl_setlk", "posix_lock", "semtimedop"),
    "sleep": ("nanosleep",),
    "remote": ("pipe_", "unix_stream", "unix_dgram", "sk_wait", "inet_", "tcp_", "sock_", "wait_woken",
               "schedule_timeout", "poll", "select", "nfs", "rpc_", "fuse",
               "request_wait_answer", "cifs", "ceph", "p9_", "splice"),
    "disk": ("folio", "wait_on_page", "io_schedule", "blk_", "bio_", "filemap", "wait_on_bit", "wait_on_buffer",
             "ext4", "xfs", "btrfs", "submit_"),
}  # fmt: skip
"""Parts of the names of kernel functions that a thread is blocked in (proc_pid_wchan(5)), by what they wait for. What
is in none of them counts as blocked, and as nothing of these."""
