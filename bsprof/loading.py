"""The nouns of data loading: what a loader did, batch by batch, and what is wrong with it.

As in `model`, the fields are the JSON, `None` means 'not captured' and `0` is a measurement. A moment ends in `_at_ns`
and counts from the moment at which watching began, on the one monotonic clock that all processes of a machine share; a
duration ends in `_ns`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from bsprof.noun import Note, Noun

MAIN = -1
"""The `worker` of a batch that was made in the consuming process itself."""


# --- what was watched -------------------------------------------------------------------------------


class LoaderSettings(Noun, frozen=True, kw_only=True):
    """A loader as it was found. All but `kind` are null where it does not tell."""

    kind: str
    """The class of the loader: `DataLoader`, `StatefulDataLoader`, `generator` …"""
    dataset: str | None = None
    """The class of its data set."""
    style: Literal["map", "iterable"] | None = None
    batch_size: int | None = None
    """Null as well where a sampler makes the batches."""
    workers: int | None = None
    prefetch: int | None = None
    start_method: str | None = None
    persistent_workers: bool | None = None
    pin_memory: bool | None = None
    """Whether it was asked for."""
    pinned: bool | None = None
    """Whether it happens: without an accelerator it does not."""
    in_order: bool | None = None
    getitems: bool | None = None
    """Whether the data set makes whole batches (`__getitems__`), so that one sample's time is not to be had."""
    batches_per_epoch: int | None = None


class Batches(Noun, frozen=True, kw_only=True):
    """One entry a batch, in the order in which the consumer got them; those it never got stand at the end.

    Where a batch's time goes, in order: `dispatched_at_ns` its indices are given to a worker, `begun_at_ns` the worker
    takes them up, `produced_at_ns` its fetch is done, `sent_at_ns` it is pickled and put into the pipe,
    `received_at_ns` it is out of the pipe and unpickled, `pinned_at_ns` it is page-locked, `got_at_ns` next() has it.
    """

    epoch: list[int]
    """Which pass over the loader."""
    order: list[int]
    """Place in its epoch."""
    worker: list[int]
    """`MAIN` where there are no workers, or the loader does not tell."""
    samples: list[int | None]

    asked_at_ns: list[int | None]
    """next() was called; null for a batch that was never asked for."""
    got_at_ns: list[int | None]
    dispatched_at_ns: list[int | None]
    begun_at_ns: list[int | None]
    produced_at_ns: list[int | None]
    sent_at_ns: list[int | None]
    received_at_ns: list[int | None]
    pinned_at_ns: list[int | None]

    items_ns: list[int | None]
    """Part of the fetch that made the samples."""
    collate_ns: list[int | None]
    """Part of the fetch that made a batch of them."""
    serialise_ns: list[int | None]
    """Pickling, in the worker's feeder thread."""
    unpickle_ns: list[int | None]
    pin_ns: list[int | None]
    ordering_ns: list[int | None]
    """Part of next() after a later batch had come and this one was still awaited."""

    cpu_ns: list[int | None]
    """CPU time of the worker's main thread over the fetch."""
    runqueue_ns: list[int | None]
    """Time of the fetch in which that thread could run and waited for a core. The rest of the fetch it was blocked."""
    process_cpu_ns: list[int | None]
    """CPU time of all the worker's threads over the fetch."""
    minor_faults: list[int | None]
    major_faults: list[int | None]
    blocks_in: list[int | None]
    """Blocks read from a disk, 512 bytes each (getrusage(2))."""
    switches: list[int | None]
    """Times that the worker's main thread gave up its core by itself."""

    tensors: list[int | None]
    bytes: list[int | None]
    """Of all tensors and arrays in the batch."""
    float_bytes: list[int | None]
    """The part of them that is floating-point numbers."""
    pickled_bytes: list[int | None]
    """What went through the pipe: tensors travel in shared memory and leave only their names here."""

    stage_ns: dict[str, list[int]]
    """Part of `items_ns` spent in each stage itself, without stages inside it. What is left of `items_ns` is the data
    set's own code. Names: `read`, `decode`, a transform's class, and what else has a hook."""


class Stage(Noun, frozen=True, kw_only=True):
    """One stage of making a sample, over everything that was watched."""

    calls: int
    ns: int
    closely_ns: int
    """The part of `ns` during which CPU time was read too."""
    closely_cpu_ns: int
    """CPU time in `closely_ns`."""
    closely_calls: int


class SlowSample(Noun, frozen=True, kw_only=True):
    """One of the slowest samples."""

    index: str
    """What the sampler gave the data set; for an iterable data set the sample's place in its worker's stream."""
    worker: int
    times_ns: list[int]
    """Each time that it was made, in order."""


class SampleTimes(Noun, frozen=True, kw_only=True):
    """How long single samples took."""

    count: int
    mean_ns: float
    quantiles_ns: dict[str, int]
    """`p10`, `p50`, `p90`, `p99`, `max`."""
    slowest: tuple[SlowSample, ...]


class Worker(Noun, frozen=True, kw_only=True):
    """One worker process, or the consuming process where there are none (`id` is `MAIN`)."""

    id: int
    pid: int
    epoch: int
    """The pass over the loader that started it."""
    entered_at_ns: int | None
    """The data set had arrived in it."""
    ready_at_ns: int | None
    """The user's `worker_init_fn` had returned."""
    cores: int | None
    """Cores that it may run on."""
    torch_threads: int | None
    threads: int | None
    """The most that were seen in it, bsprof's own not among them."""
    open_files: int | None = None
    memory_at_ns: list[int] = []
    private_bytes: list[int] = []
    """Memory that it shares with no other process, at those moments."""
    blocked_in: dict[str, int] = {}
    """Kernel functions that it was seen blocked in while it made batches (proc_pid_wchan(5)), and how often."""
    looks: int = 0
    """How often it was looked at while it made batches; `running` or waiting for a core the rest of the time."""
    last_seen_in: str | None = None
    """What it was blocked in when it was looked at last; empty where it ran."""
    ended: Literal["ok", "died"] | None = None


class Epoch(Noun, frozen=True, kw_only=True):
    """One pass over the loader."""

    began_at_ns: int
    """iter() was called."""
    ready_at_ns: int
    """iter() had returned."""
    last_asked_at_ns: int | None = None
    """The next() that found the end was called."""
    ended_at_ns: int | None = None
    """It had raised StopIteration; null where the loop was left before."""
    pickled_bytes: int | None = None
    """What was pickled for all new workers together; null where they were forked or already there."""


class Rate(Noun, frozen=True, kw_only=True):
    """A measured figure with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


class MachineUse(Noun, frozen=True, kw_only=True):
    """What the whole machine did while the loader was watched."""

    cores: float
    """Cores that this program may use."""
    own_cores: float | None = None
    """Cores' worth of CPU time that the consuming process and its workers took."""
    foreign_cores: float | None = None
    """The same for everybody else."""
    stolen_share: float | None = None
    throttled_share: float | None = None
    pressure_share: float | None = None
    """Share of the time in which something runnable waited for a core."""


class Resources(Noun, frozen=True, kw_only=True):
    """What a loader can run out of."""

    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    """The least that was seen."""
    open_files: int | None = None
    """The most that the consuming process was seen to have open."""
    open_files_limit: int | None = None
    sharing: str | None = None
    """torch's sharing strategy: `file_descriptor` or `file_system`."""


class ProbeCost(Noun, frozen=True, kw_only=True):
    """What watching cost, measured on this machine with the same code."""

    batch_ns: float
    """For each batch that is accounted for whole."""
    brief_ns: float | None = None
    """For each of the others, where batches come fast: of these it is known when they were begun and done."""
    sample_ns: float
    """For each sample of a batch that is accounted for whole."""
    stage_ns: float
    """For each call of a stage that has a hook."""


class Consumer(Noun, frozen=True, kw_only=True):
    """Who took the batches."""

    kind: Literal["fastest", "fixed", "model", "loop"]
    """As fast as possible; with a pause of `step_ns` after each batch; a model's training step; somebody's own loop."""
    step_ns: int | None = None
    """The pause asked for."""
    model: str | None = None
    cpu_share: float | None = None
    """CPU time of the consuming process over its own part of the steps, in cores: 0 for one that sleeps."""


class Loading(Noun, frozen=True, kw_only=True):
    """What was seen of a loader. Everything that a diagnosis says is derived from this."""

    settings: LoaderSettings
    consumer: Consumer
    window_ns: int
    """How long it was watched."""
    batches: Batches
    workers: tuple[Worker, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    stages: dict[str, Stage] = {}
    samples: SampleTimes | None = None
    machine: MachineUse | None = None
    resources: Resources | None = None
    capacity_cores: Rate | None = None
    """Cores that really ran at once when as many processes computed as there are cores, others' load included."""
    cached_step_ns: list[int] | None = None
    """Steps of the consumer on batches that were already there, while no worker ran: the step with a perfect loader."""
    h2d_ns: list[int] | None = None
    """Copying a batch that is already there to the accelerator, each alone; null where there is none."""
    gil_overshoot_ns: list[int] | None = None
    """How much too late a thread of the consuming process that sleeps for 1 ms got the interpreter's lock."""
    probe: ProbeCost | None = None
    dropped: int = 0
    """Batches that were not recorded because the recording was full."""
    notes: tuple[Note, ...] = ()


# --- what is wrong with it --------------------------------------------------------------------------

Change = dict[str, int | bool | str | None]
"""Arguments of DataLoader and the values to give them."""


class Cause(Noun, frozen=True, kw_only=True):
    """Why loading is slow, with the evidence, what it costs, and what to do."""

    code: str
    """As in the documentation: `too_few_workers`, `slow_stage`, `hot_sample` …"""
    text: str
    """One sentence with its figures."""
    evidence: dict[str, float | int | str | None]
    gives_back: float | None
    """Share of the step's time that removing it would give back; null for what is a risk and costs no time yet."""
    gives_back_low: float | None = None
    gives_back_high: float | None = None
    prescription: str
    change: Change | None = None
    """The same as DataLoader arguments, where it is one: what `--verify` applies."""
    code_change: str | None = None
    """The same as code."""
    not_separable_from: tuple[str, ...] = ()
    """Causes that the same evidence would show."""


class Prediction(Noun, frozen=True, kw_only=True):
    """What a loader with other settings would deliver, by replaying the recorded batches."""

    workers: int
    prefetch: int | None
    in_order: bool = True
    step_s: float
    samples_per_s: float | None
    speedup: float
    """Step time of the replay of what was measured / step time of this one's."""
    speedup_low: float
    speedup_high: float


class Diagnosis(Noun, frozen=True, kw_only=True):
    """Derived from one Loading: the verdict, where a batch's time goes, the causes, and what would help."""

    verdict: Literal["not_input_bound", "moderately_input_bound", "highly_input_bound", "no_step", "unknown"]
    """By the share of the step that waits for data: below 5 %, below 20 %, more; `no_step` where the consumer had
    nothing else to do."""
    sentence: str
    step_s: float | None
    wait_s: float | None
    busy_s: float | None
    """The consumer's own part of the step."""
    wait_share: float | None
    delivered_per_s: float | None
    """Samples a second that came, or batches where samples are not known."""
    possible_per_s: float | None
    """The same if no step had waited."""
    contention_s: float | None = None
    """What the workers add to the consumer's own part of the step: `busy_s` less the step on cached batches."""
    waits_s: dict[str, float] = {}
    """The wait of a mean step by what was awaited: `production`, `ordering`, `handoff`, `epoch`."""
    causes: tuple[Cause, ...] = ()
    """Most time given back first; risks behind them."""
    predictions: tuple[Prediction, ...] = ()
    best: Prediction | None = None
    """The smallest setting within 2 % of the best."""


class Verification(Noun, frozen=True, kw_only=True):
    """A change, applied and measured against what was, in turns."""

    change: Change
    predicted: Rate
    """Speed-up: step time before / after."""
    measured: Rate
    before_s: list[float]
    """Mean step of each round."""
    after_s: list[float]
    agrees: bool
    """Whether the two intervals overlap."""


class LoaderRequest(Noun, frozen=True, kw_only=True):
    """What `bsprof loader` was asked to watch."""

    target: str
    """`pkg.module:name`, or a data set's name as `bench --data` takes it."""
    arguments: Change = {}
    """DataLoader arguments given as flags."""
    seconds: Annotated[float, Meta(gt=0)] = 10.0
    step_ms: Annotated[float, Meta(ge=0)] | None = None
    model: str | None = None
    seed: Annotated[int, Meta(ge=0)] = 0
    data_root: str | None = None
