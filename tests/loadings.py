"""Recordings of loaders that never were, for tests: a schedule worked out on paper, and what a probe makes of it."""

import heapq
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from bsprof.loading import (
    MAIN,
    Batches,
    Consumer,
    Epoch,
    LoaderSettings,
    Loading,
    MachineUse,
    ProbeCost,
    Rate,
    Resources,
    SampleTimes,
    SlowSample,
    Stage,
    Worker,
)

MIB = 1 << 20
OWN = "own"
"""The data set's own code, which no hook splits: a part of `items_ns` and no stage of the recording."""


class Cost(NamedTuple):
    """What something takes for a batch, in seconds."""

    cpu: float = 0.0
    blocked: float = 0.0


class _Made(NamedTuple):
    """A batch as its worker left it, in seconds."""

    epoch: int
    order: int
    worker: int
    dispatched: float
    begun: float
    produced: float
    sent: float
    items: float
    collate: float
    cpu: float
    queued: float
    stages: dict[str, float]


class _Taken(NamedTuple):
    """And as the consumer got it."""

    made: _Made
    asked: float
    received: float
    pinned: float | None
    got: float
    ordering: float | None


def loading(
    *,
    workers: int = 2,
    prefetch: int = 2,
    in_order: bool = True,
    style: str = "map",
    batch_size: int = 16,
    batches: int = 60,
    epochs: int = 1,
    step_s: float = 0.010,
    stages: Mapping[str, Cost] | None = None,
    collate: Cost = Cost(0.0002),  # noqa: B008 - immutable
    factors: Sequence[float] = (1.0,),
    jitter: float = 0.02,
    worker_factors: Mapping[int, float] | None = None,
    slow_index: tuple[int, float] | None = None,
    serialise_s: float = 5e-5,
    unpickle_s: float = 1e-4,
    pin_s: float | None = None,
    capacity: float = 8.0,
    capacity_seen: float | None = None,
    cores: int = 8,
    iter_s: float = 0.004,
    enter_s: float = 0.004,
    init_s: float = 0.0,
    end_s: float = 0.002,
    persistent: bool = False,
    start_method: str = "fork",
    pickled_epoch_bytes: int | None = None,
    tensors: int = 2,
    batch_bytes: int = 2 * MIB,
    minor_faults: int = 20,
    blocks_in: int = 0,
    major_faults: int = 0,
    getitems: bool = False,
    process_cpu: float = 1.0,
    threads: int = 2,
    worker_cores: int | None = None,
    blocked_in: Mapping[str, int] | None = None,
    memory_bytes: int = 100 * MIB,
    memory_growth: float = 0.0,
    foreign_cores: float = 0.05,
    stolen_share: float = 0.0,
    throttled_share: float = 0.0,
    resources: Resources | None = None,
    gil_overshoot_s: float | None = 1e-4,
    h2d_s: float | None = None,
    cached_step_s: float | None = None,
    kind: str = "fixed",
    cpu_share: float = 0.0,
    seed: int = 0,
) -> Loading:
    """Return what a probe would have recorded of such a loader.

    Costs are seconds a batch; `stages` names them (`read`, `decode`, a transform, and `OWN` for what no hook sees).
    `factors` multiply the cost of samples batch after batch, `worker_factors` that of a worker's, `jitter` is the
    relative spread of both. `slow_index` is an index and the seconds of its sample, met once an epoch. `capacity`
    cores are shared: where the workers want more, their batches take longer and the difference is run-queue time;
    `capacity_seen` is what a probe of it found, if that is another figure.
    `memory_growth` is in bytes a batch, `process_cpu` the CPU time of all threads over that of the first.
    """
    costs = dict(stages if stages is not None else {"decode": Cost(0.006), OWN: Cost(0.001)})
    step_s = 0.0 if kind == "fastest" else step_s

    def attempt(stretch: float) -> tuple[list[_Taken], list[Epoch], list[Worker], float, list[int]]:
        return _schedule(
            workers, prefetch, in_order, batches, epochs, step_s, costs, collate, factors, jitter, worker_factors or {},
            slow_index, serialise_s, unpickle_s, pin_s, iter_s, enter_s, init_s, end_s, persistent, pickled_epoch_bytes,
            batch_size, stretch, seed,
        )  # fmt: skip

    stretch = 1.0
    for _ in range(30):  # until the workers take no more than there is
        taken, passes, started, ends, met = attempt(stretch)
        wanted = process_cpu * sum(t.made.cpu for t in taken) / ends if workers else 0.0
        if abs(wanted - capacity) < 0.005 * capacity or (wanted < capacity and stretch == 1.0):
            break
        stretch = max(1.0, stretch * wanted / capacity)

    def ns(seconds: float | None) -> int | None:
        return None if seconds is None else round(seconds * 1e9)

    count = len(taken)
    many = workers > 0
    own = process_cpu * sum(t.made.cpu for t in taken) / ends
    everything = [t.made for t in taken]
    names = [name for name in costs if name != OWN]
    sums = {name: sum(m.stages[name] for m in everything) for name in names}
    shares = {name: cost.cpu / max(cost.cpu * stretch + cost.blocked, 1e-12) for name, cost in costs.items()}
    sample = sorted(m.items / batch_size for m in everything)
    slow = () if slow_index is None else (SlowSample(
        index=str(slow_index[0]), worker=0, times_ns=[round(slow_index[1] * 1e9)] * len(met)
    ),)  # fmt: skip
    ordinary = [
        SlowSample(index=str(1000 + i), worker=i % max(1, workers), times_ns=[round(s * 1e9)])
        for i, s in enumerate(sorted(sample, reverse=True)[:4])
    ]

    def at(p: float) -> int:
        usual = [max(0.0, s - (slow_index[1] / batch_size if i in met else 0.0)) for i, s in
                 enumerate(m.items / batch_size for m in everything)] if slow_index else sample  # fmt: skip
        return round(sorted(usual)[min(count - 1, int(p * count))] * 1e9)

    return Loading(
        settings=LoaderSettings(
            kind="DataLoader",
            dataset="Images",
            style=style,  # type: ignore[arg-type]
            batch_size=batch_size,
            workers=workers,
            prefetch=prefetch if many else None,
            start_method=start_method if many else None,
            persistent_workers=persistent,
            pin_memory=pin_s is not None,
            pinned=pin_s is not None,
            in_order=in_order,
            getitems=getitems,
            batches_per_epoch=batches,
        ),
        consumer=Consumer(
            kind=kind,  # type: ignore[arg-type]
            step_ns=ns(step_s) if kind == "fixed" else None,
            cpu_share=cpu_share,
        ),
        window_ns=round(ends * 1e9),
        batches=Batches(
            epoch=[m.epoch for m in everything],
            order=[m.order for m in everything],
            worker=[m.worker for m in everything],
            samples=[batch_size] * count,
            asked_at_ns=[ns(t.asked) for t in taken],
            got_at_ns=[ns(t.got) for t in taken],
            dispatched_at_ns=[ns(m.dispatched) for m in everything],
            begun_at_ns=[ns(m.begun) for m in everything],
            produced_at_ns=[ns(m.produced) for m in everything],
            sent_at_ns=[ns(m.sent) if many else None for m in everything],
            received_at_ns=[ns(t.received) if many else None for t in taken],
            pinned_at_ns=[ns(t.pinned) for t in taken],
            items_ns=[ns(m.items) for m in everything],
            collate_ns=[ns(m.collate) for m in everything],
            serialise_ns=[ns(serialise_s) if many else None] * count,
            unpickle_ns=[ns(unpickle_s) if many else None] * count,
            pin_ns=[ns(pin_s)] * count,
            ordering_ns=[ns(t.ordering) for t in taken],
            cpu_ns=[ns(m.cpu) for m in everything],
            runqueue_ns=[ns(m.queued) for m in everything],
            process_cpu_ns=[ns(m.cpu * process_cpu) for m in everything],
            minor_faults=[minor_faults] * count,
            major_faults=[major_faults] * count,
            blocks_in=[blocks_in] * count,
            switches=[3] * count,
            tensors=[tensors] * count,
            bytes=[batch_bytes] * count,
            float_bytes=[batch_bytes] * count,
            pickled_bytes=[200 * tensors if many else None] * count,
            stage_ns={name: [round(m.stages[name] * 1e9) for m in everything] for name in names},
        ),
        workers=tuple(
            Worker(
                id=w.id,
                pid=1000 + w.id,
                epoch=w.epoch,
                entered_at_ns=w.entered_at_ns,
                ready_at_ns=w.ready_at_ns,
                cores=cores if worker_cores is None else worker_cores,
                torch_threads=1,
                threads=threads,
                open_files=20,
                memory_at_ns=[ns(m.produced) or 0 for m in everything if (m.worker, m.epoch) in ((w.id, w.epoch),)],
                private_bytes=[
                    round(memory_bytes + i * memory_growth)
                    for i, _ in enumerate(m for m in everything if (m.worker, m.epoch) == (w.id, w.epoch))
                ],
                blocked_in=dict(blocked_in or {}),
                looks=100 if blocked_in is not None else 0,
                ended="ok",
            )
            for w in started
        ),
        epochs=tuple(passes),
        stages={
            name: Stage(
                calls=count * batch_size,
                ns=round(sums[name] * 1e9),
                closely_ns=round(sums[name] * 1e9),
                closely_cpu_ns=round(sums[name] * shares[name] * 1e9),
                closely_calls=count * batch_size,
            )
            for name in names
        },
        samples=None
        if getitems or not count
        else SampleTimes(
            count=count * batch_size,
            mean_ns=sum(m.items for m in everything) * 1e9 / (count * batch_size),
            quantiles_ns={
                "p10": at(0.1),
                "p50": at(0.5),
                "p90": at(0.9),
                "p99": at(0.99),
                "max": max([at(1.0), *(time for one in slow for time in one.times_ns)]),
            },
            slowest=(*slow, *ordinary),
        ),
        machine=MachineUse(
            cores=cores,
            own_cores=own,
            foreign_cores=foreign_cores,
            stolen_share=stolen_share,
            throttled_share=throttled_share,
            pressure_share=0.0 if stretch == 1.0 else 0.5,
        ),
        resources=resources
        or Resources(
            shm_bytes=8 << 30, shm_free_bytes=7 << 30, open_files=60, open_files_limit=1024, sharing="file_descriptor"
        ),
        capacity_cores=Rate(value=capacity_seen or capacity, low=None, high=None),
        cached_step_ns=None
        if kind == "fastest"
        else [ns(step_s if cached_step_s is None else cached_step_s) or 0] * 20,
        gil_overshoot_ns=None if gil_overshoot_s is None else [round(gil_overshoot_s * 1e9)] * 50,
        h2d_ns=None if h2d_s is None else [round(h2d_s * 1e9)] * 10,
        probe=ProbeCost(batch_ns=6000.0, sample_ns=90.0, stage_ns=130.0),
    )


def _schedule(
    workers, prefetch, in_order, batches, epochs, step_s, costs, collate, factors, jitter, worker_factors, slow_index,
    serialise_s, unpickle_s, pin_s, iter_s, enter_s, init_s, end_s, persistent, pickled_epoch_bytes, batch_size,
    stretch, seed,
):  # fmt: skip
    """Work out who does what when: torch's scheduler, one batch after another."""
    luck = random.Random(seed)
    taken, passes, started, met = [], [], [], []
    now = 0.0
    for epoch in range(epochs):
        began = now
        anew = workers and (epoch == 0 or not persistent)
        now += iter_s if anew or not workers else iter_s / 10
        ready = now
        free = dict.fromkeys(range(workers), now)
        if anew:
            for worker in range(workers):
                free[worker] = now + enter_s + init_s
                started.append(_worker(worker, epoch, now + enter_s, free[worker]))
        unlucky = luck.randrange(batches // 3, batches) if slow_index and batches else None
        load = dict.fromkeys(range(workers), 0)
        turn = dispatched = 0
        pipe: list[tuple[float, int, _Made]] = []
        here: dict[int, tuple[_Made, float, float | None]] = {}
        pin_free = main_free = now

        def make(order, worker, begun, at, epoch=epoch, unlucky=unlucky):
            factor = factors[order % len(factors)] * worker_factors.get(worker, 1.0)
            factor *= max(0.2, luck.gauss(1.0, jitter))
            cpu = {name: cost.cpu * factor for name, cost in costs.items()}
            wall = {name: (cost.cpu * stretch + cost.blocked) * factor for name, cost in costs.items()}
            if order == unlucky:
                last = list(costs)[-1]
                cpu[last] += slow_index[1]
                wall[last] += slow_index[1] * stretch
            items, gather = sum(wall.values()), collate.cpu * stretch + collate.blocked
            used = sum(cpu.values()) + collate.cpu
            produced = begun + items + gather
            sent = produced + (serialise_s if worker != MAIN else 0.0)
            return _Made(
                epoch, order, worker, at, begun, produced, sent, items, gather, used, used * (stretch - 1.0), wall
            )

        def put(at, free=free, load=load, pipe=pipe, make=make):
            nonlocal turn, dispatched
            if dispatched >= batches:
                return
            for _ in range(workers):
                worker = turn % workers
                turn += 1
                if in_order or load[worker] < prefetch:
                    break
            made = make(dispatched, worker, max(at, free[worker]), at)
            free[worker] = made.produced
            load[worker] += 1
            heapq.heappush(pipe, (made.sent, dispatched, made))
            dispatched += 1

        for _ in range(workers * prefetch):
            put(now)
        for order in range(batches):
            asked = now
            if not workers:
                made = make(order, MAIN, now, now)
                now = made.produced
                taken.append(_Taken(made, asked, now, None, now, None))
            else:
                first = None
                while not (order in here if in_order else here):
                    sent, index, made = heapq.heappop(pipe)
                    if pin_s is None:
                        now = main_free = max(now, main_free, sent) + unpickle_s
                        received, pinned = now, None
                    else:
                        received = max(pin_free, sent) + unpickle_s
                        pinned = pin_free = received + pin_s
                        now = max(now, pinned)
                    here[index] = made, received, pinned
                    if in_order and index != order and first is None:
                        first = now
                index = order if in_order else min(here)
                made, received, pinned = here.pop(index)
                load[made.worker] -= 1
                if pinned is not None:
                    now = max(now, pinned)
                taken.append(_Taken(made, asked, received, pinned, now, now - (now if first is None else first)))
                put(now)
            if order == unlucky:
                met.append(len(taken) - 1)
            now += step_s
        last = now
        now += end_s if workers and not persistent else end_s / 10
        passes.append(
            Epoch(
                began_at_ns=round(began * 1e9),
                ready_at_ns=round(ready * 1e9),
                last_asked_at_ns=round(last * 1e9),
                ended_at_ns=round(now * 1e9),
                pickled_bytes=pickled_epoch_bytes if anew else None,
            )
        )
    return taken, passes, started, max(now, 1e-9), met


class _worker(NamedTuple):
    id: int
    epoch: int
    entered: float
    ready: float

    @property
    def entered_at_ns(self) -> int:
        return round(self.entered * 1e9)

    @property
    def ready_at_ns(self) -> int:
        return round(self.ready * 1e9)


def consumer_only(*, batches: int = 60, wait_s: float = 0.01, step_s: float = 0.01) -> Loading:
    """Return what is seen of an iterable that is no DataLoader: only when it was asked, and when it gave."""
    asked = [round(i * (wait_s + step_s) * 1e9) for i in range(batches)]
    got = [at + round(wait_s * 1e9) for at in asked]
    unknown: list[int | None] = [None] * batches
    hidden = {name: unknown for name in Batches.__struct_fields__}
    known = {
        "epoch": [0] * batches, "order": list(range(batches)), "worker": [MAIN] * batches, "samples": unknown,
        "asked_at_ns": asked, "got_at_ns": got, "stage_ns": {},
    }  # fmt: skip
    end = round(batches * (wait_s + step_s) * 1e9)
    return Loading(
        settings=LoaderSettings(kind="generator"),
        consumer=Consumer(kind="loop"),
        window_ns=max(end, 1),
        batches=Batches(**{**hidden, **known}),  # type: ignore[arg-type]
        epochs=(Epoch(began_at_ns=0, ready_at_ns=0, last_asked_at_ns=end, ended_at_ns=end),),
    )


def with_holes(found: Loading, luck: random.Random, *chances: float) -> Loading:
    """Return a recording in which batches lack times and counts; each field draws one of the chances to lack one."""
    fields = {}
    for name in Batches.__struct_fields__:
        if name not in ("epoch", "order", "worker", "stage_ns"):
            chance = luck.choice(chances)
            fields[name] = [None if luck.random() < chance else one for one in getattr(found.batches, name)]
    return msgspec.structs.replace(found, batches=msgspec.structs.replace(found.batches, **fields))
