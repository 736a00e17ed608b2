"""The nouns: what is varied, what was measured, and on what.

Every noun is a frozen, keyword-only msgspec struct whose fields *are* the JSON. Units are in the names
(`_s`, `_ns`, `_bytes`). `None` means 'not captured' or 'means nothing here'; `0` is a measurement.
"""

from __future__ import annotations

import hashlib
import types
import typing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bsprof.loading import Diagnosis, LoaderRequest, Loading, Verification
from bsprof.noun import Note, Noun

SCHEMA = 1

PHASES = ("data", "h2d", "forward", "backward", "optimizer")
"""The phases of bsprof's own step loop, in order. A user's loop may mark others: phases are keys, not fields."""

OutcomeKind = Literal[
    "ok", "oom", "host_oom", "shm", "nondeterministic", "timeout", "crash", "error", "interrupted", "skipped"
]

TOO_LARGE: tuple[OutcomeKind, ...] = ("oom", "host_oom", "shm", "crash")
"""Outcomes that say that a batch was too large. Libraries that get no memory may crash instead of saying so."""


# --- axes -------------------------------------------------------------------------------------------


Needs = Literal["accelerator", "cuda", "workers", "ranks", "cuda ranks"]
"""What must be there for an axis to mean anything: hardware, worker processes, more ranks than one."""


class AxisInfo(typing.NamedTuple):
    """How an axis shows itself: its column in a table, its line of help, and what it needs to mean anything."""

    column: str
    help: str
    needs: Needs | None = None


def _axis(column: str, help: str, needs: Needs | None = None) -> Meta:
    return Meta(description=help, extra={"axis": AxisInfo(column, help, needs)})


Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]


class Settings(Noun, frozen=True, kw_only=True):
    """One value for every axis. To add an axis, add a field here; flag, column, plan and JSON follow."""

    model: Annotated[str, _axis("model", "a name from `bsprof workloads`, or pkg.module:factory")] = "mobilenet_v2"
    data: Annotated[
        str, _axis("data", "jpeg[:WxH,n=N], synthetic, cifar10, …, imagefolder:PATH, or pkg.module:factory")
    ] = "jpeg"
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], _axis("optimizer", "sgd has momentum 0.9")] = "sgd"
    batch_size: Annotated[Positive, _axis("batch", "samples in a step, of each rank")] = 32
    image_size: Annotated[
        Annotated[int, Meta(ge=8)] | None, _axis("image", "pixels a side; by default the data set's own size")
    ] = None
    workers: Annotated[Natural, _axis("workers", "DataLoader worker processes; 0 loads in the main process")] = 0
    prefetch: Annotated[Positive | None, _axis("prefetch", "batches prepared ahead by each worker", "workers")] = 2
    pin_memory: Annotated[bool | None, _axis("pin", "page-locked batches", "accelerator")] = True
    persistent_workers: Annotated[bool | None, _axis("persistent", "workers outlive an epoch", "workers")] = False
    amp: Annotated[Literal["off", "bf16", "fp16"], _axis("amp", "automatic mixed precision")] = "off"
    channels_last: Annotated[bool, _axis("channels_last", "NHWC memory layout")] = False
    compile: Annotated[bool, _axis("compile", "torch.compile the model")] = False
    threads: Annotated[Positive | None, _axis("threads", "torch CPU threads; by default the usable cores")] = None
    cudnn_benchmark: Annotated[bool | None, _axis("bench", "torch.backends.cudnn.benchmark", "cuda")] = False
    cudnn_deterministic: Annotated[bool | None, _axis("determ", "torch.backends.cudnn.deterministic", "cuda")] = False
    deterministic_algorithms: Annotated[
        bool, _axis("determ_algos", "torch.use_deterministic_algorithms, which is more than cudnn's own switch")
    ] = False
    world_size: Annotated[Positive, _axis("world", "ranks: processes that train together by DDP")] = 1
    comm_hook: Annotated[
        str, _axis("hook", "DDP communication hook: none, fp16, bf16, or pkg.module:function", "ranks")
    ] = "none"
    sync_batchnorm: Annotated[
        bool, _axis("sync_bn", "batch norm over the batches of all ranks (SyncBatchNorm)", "cuda ranks")
    ] = False


class Axis(typing.NamedTuple):
    """A knob: its name, the plain type of one value, whether it may be null, its default and how it shows itself."""

    name: str
    type: Any
    nullable: bool
    default: Any
    info: AxisInfo


def _union_members(value_type: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(value_type) in (typing.Union, types.UnionType)
    return typing.get_args(value_type) if is_union else (value_type,)


def _read_axis(field: msgspec.structs.FieldInfo) -> Axis:
    value_type, meta = field.type.__origin__, field.type.__metadata__[-1]
    members = [arg for arg in _union_members(value_type) if arg is not type(None)]
    nullable = len(members) < len(_union_members(value_type))
    (plain,) = members
    plain = getattr(plain, "__origin__", plain) if typing.get_origin(plain) is Annotated else plain
    return Axis(field.name, plain, nullable, field.default, meta.extra["axis"])


AXES: dict[str, Axis] = {field.name: _read_axis(field) for field in msgspec.structs.fields(Settings)}
"""Every axis by name, in table order."""

Axes = msgspec.defstruct(
    "Axes",
    [
        (field.name, tuple[field.type, ...] | msgspec.UnsetType, msgspec.UNSET)  # type: ignore[name-defined]
        for field in msgspec.structs.fields(Settings)
    ],
    bases=(Noun,),
    frozen=True,
    kw_only=True,
    module=__name__,
)
"""The values to sweep: for each axis a tuple of values, or nothing where the default holds."""


# --- plan and case ----------------------------------------------------------------------------------


class Stop(Noun, frozen=True, kw_only=True):
    """When a case has been measured enough."""

    precision: Annotated[float, Meta(gt=0, lt=1, description="relative half-width of the median's interval")] = 0.02
    max_case_time_s: Annotated[float, Meta(gt=0, description="a case's time, warm-up included")] = 20.0
    min_steps: Annotated[int, Meta(ge=2, description="instrumented steps measured at the least")] = 10
    max_steps: Annotated[int, Meta(ge=2, description="instrumented steps measured at the most")] = 10_000


class LargestBatchSearch(Noun, frozen=True, kw_only=True):
    """Search the largest batch that fits, in place of an axis `batch_size`."""

    margin: Annotated[float, Meta(ge=0, lt=1, description="share of the memory that must stay free")] = 0.05
    steps: Annotated[int, Meta(ge=1, description="steps that it must survive")] = 50
    most: Annotated[Positive, Meta(description="no larger batch is tried")] = 2**20


class Plan(Noun, frozen=True, kw_only=True):
    """What to vary and how to stop.

    `axes` hold for all blocks, each block overrides them, and each block is a full factorial.
    """

    axes: Axes = msgspec.field(default_factory=Axes)  # type: ignore[valid-type]
    blocks: tuple[Axes, ...] = ()  # type: ignore[valid-type]
    stop: Stop = msgspec.field(default_factory=Stop)
    repeat: Annotated[int, Meta(ge=1, description="processes a case")] = 1
    scaling: Annotated[
        Literal["weak", "strong"],
        Meta(description="whether `batch_size` is that of each rank, or of all ranks together"),
    ] = "weak"
    nodes: Annotated[Positive, Meta(description="machines that share the ranks of each case")] = 1
    max_failures: Annotated[Positive, Meta(description="the sweep ends after so many failed cases")] | None = None
    seed: Annotated[int, Meta(ge=0, description="of the case order, the weights and the shuffling")] = 0
    order: Literal["shuffled", "listed"] = "shuffled"
    malloc: Literal["pinned", "default"] = "pinned"
    deadline_s: Annotated[float, Meta(gt=0, description="a case past it is ended")] = 300.0
    host_memory_bytes: Annotated[int, Meta(ge=1, description="private memory a case's process may have")] | None = None
    serialised_steps: Annotated[Natural, Meta(description="steps timed with a synchronisation at each boundary")] = 10
    profile_steps: Annotated[Natural, Meta(description="steps under torch.profiler, after the timed window")] = 5
    telemetry_hz: Annotated[float, Meta(ge=0, le=100, description="samples a second of clocks, power, memory")] = 10.0
    nvtx: Annotated[bool, Meta(description="an NVTX range around each phase, for Nsight Systems")] = False
    diagnose: Annotated[
        Literal["off", "short", "full"], Meta(description="watch each case's loader after the timed window")
    ] = "short"
    largest_batch: LargestBatchSearch | None = None
    data_root: str | None = None
    download: bool = False


class Case(Noun, frozen=True, kw_only=True):
    """One point of a plan, in one process. `settings` is null for a user's own loop."""

    key: str
    settings: Settings | None = None
    process: Annotated[int, Meta(ge=0, description="which of the plan's `repeat` processes")] = 0


def case_key(settings: Settings) -> str:
    """Return a short name for `settings` that stays the same when later versions add axes."""
    fields = {axis.name: value for axis in AXES.values() if (value := getattr(settings, axis.name)) != axis.default}
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()[:12]


# --- what was measured ------------------------------------------------------------------------------


class Block(Noun, frozen=True, kw_only=True):
    """A run of consecutive steps, timed from outside by two clock reads of its own."""

    kind: Literal["instrumented", "bare", "synchronised", "unsynchronised"]
    """With or without marks; of ranks that only lets some blocks exchange their gradients: which of these it was."""
    steps: int
    wall_ns: int
    device_wall_ns: int | None = None
    """The same by one pair of device events around the block, or null on a machine with one clock."""


class Counters(Noun, frozen=True, kw_only=True):
    """What the operating system counted while the steady steps ran, in the training process alone."""

    wall_ns: int
    cpu_ns: int
    minor_faults: int
    major_faults: int
    voluntary_switches: int
    involuntary_switches: int


class Samples(Noun, frozen=True, kw_only=True):
    """Raw times, one entry a step, in nanoseconds. Every statistic is derived from these.

    `step_ns[i]` runs from where step i's `data` begins to where step i + 1's begins, and
    `step_ns[i] = sum(phase[i] for phase in host_ns) + other[i]` defines the signed residual `other`.
    """

    batch_size: int | None
    step_ns: list[Natural]
    host_ns: dict[str, list[Natural]]
    device_step_ns: list[int] | None = None
    device_ns: dict[str, list[int]] | None = None
    blocks: list[Block] = []
    epoch_boundaries: list[int] = []
    """Indices of steps in which an epoch ended: kept, but no part of the steady state."""
    warmup_ns: list[int] = []
    """Every step before the steady state, the first (cold) one included."""
    steady: bool = True
    """Whether warm-up ended because the step time was steady (else because its time was up)."""
    recorder_ns_per_step: int | None = None
    """The recorder's own cost, measured alone with the same marks after the window."""
    counters: Counters | None = None
    final_loss: float | None = None


class Serialised(Noun, frozen=True, kw_only=True):
    """A few steps after the timed window with a synchronisation at each boundary: what each phase costs alone.

    Their sum less the timed step is the overlap that training really has. On a machine with one clock there is none,
    and the window is not run.
    """

    host_ns: dict[str, list[int]]
    """Nanoseconds, one entry a step, as in Samples."""


class Memory(Noun, frozen=True, kw_only=True):
    """What the training held, in bytes: by the device's allocator, or by the operating system on a CPU."""

    pool: Literal["device", "host"]
    allocated_peak: int
    """Highest sum of live tensors over the timed steps; on a CPU the highest resident set."""
    reserved_peak: int | None = None
    """Highest that the allocator held; what it holds beyond the live tensors is fragmentation or cache."""
    allocated_between: int | None = None
    """Live between steps: weights, gradients where they are kept, the optimizer's state."""
    phase_allocated_peak: dict[str, int] = {}
    """Highest while each phase ran, over a few steps apart from the timed ones."""
    phase_reserved_peak: dict[str, int] = {}
    inactive_split: int | None = None
    """Free pieces of blocks that are partly in use: cannot be given back."""
    retries: int | None = None
    """Times that the allocator emptied its cache to satisfy a request."""
    total: int | None = None
    """The device's memory, or the part of it that this process may have; on a CPU what the process may use."""
    outside: int | None = None
    """In use but not by this allocator: contexts, libraries, other processes."""


class Hotspot(Noun, frozen=True, kw_only=True):
    """All launches of one kernel, or calls of one operator, in the profiler window."""

    name: str
    calls: int
    ns: int
    """Kernels: time on the device. Operators: time of their own on the host, without the operators they call."""


class Copy(Noun, frozen=True, kw_only=True):
    """All memory copies of one direction in the profiler window."""

    direction: str
    """`HtoD`, `DtoH`, `DtoD` or `PtoP`, and behind it the host's memory where it is told: `HtoD pinned`."""
    calls: int
    ns: int
    bytes: int | None = None


class Profile(Noun, frozen=True, kw_only=True):
    """A few steps under `torch.profiler` after the timed window. Shares are its truth; its times are distorted."""

    steps: int
    wall_ns: int
    phase_ns: dict[str, int]
    """Host time of each phase over all steps, profiler included."""
    busy_ns: dict[str, int] | None = None
    """Time in which at least one kernel or copy that the phase launched ran; null where no device was traced."""
    busy_total_ns: int | None = None
    """Time in which at least one kernel or copy ran, whoever launched it."""
    launches: int | None = None
    kernels_ns: int | None = None
    """Sum over all kernels: their shares' denominator."""
    collectives_ns: int | None = None
    """Time in which at least one kernel of NCCL's (on ROCm RCCL's) ran; null where none did."""
    kernels: tuple[Hotspot, ...] = ()
    """The costliest kernels, most time first."""
    copies: tuple[Copy, ...] = ()
    operators_ns: int = 0
    """Sum of all operators' own host time: their shares' denominator."""
    operators: tuple[Hotspot, ...] = ()
    """The costliest operators by their own host time, most time first."""
    trace: str | None = None
    """The Chrome trace's file, where one was asked for."""


class Energy(Noun, frozen=True, kw_only=True):
    """Energy of the device while the timed steps ran. It includes idle power and whoever else used the device."""

    joules: float | None
    """Null where it cannot be resolved; `reason` says why."""
    source: Literal["counter", "power"] | None
    """The device's energy counter, or its power readings integrated."""
    window_ns: int
    """Time from the first to the last update that lies in the timed window."""
    steps: float
    """Steps in that time, a fraction included."""
    updates: int
    """Changes of the counter, or readings, in that time."""
    resolvable: bool
    reason: str | None = None


class ForeignProcess(Noun, frozen=True, kw_only=True):
    """Somebody else's process on the device."""

    pid: int
    name: str | None
    memory_bytes: int | None


class Telemetry(Noun, frozen=True, kw_only=True):
    """Clocks, power, temperature and memory, sampled by a process of its own while the timed steps ran.

    Columns have one entry a sample; null is 'not told then', and what the device never tells has no column.
    """

    source: str
    """`nvml`, `replay`, or `none` where no device tells anything."""
    device_uuid: str | None = None
    time_ns: list[int]
    """Since the timed window began; samples shortly before and after it are kept."""
    window_ns: int
    device: dict[str, list[int | float | None]] = {}
    host: dict[str, list[int | float | None]] = {}
    limits: dict[str, int | float | None] = {}
    """What does not change: largest clocks, power limit, slow-down temperature, widest PCIe link."""
    unsupported: tuple[str, ...] = ()
    """Fields that this device does not tell."""
    foreign: tuple[ForeignProcess, ...] = ()
    energy: Energy | None = None
    sampler_cpu_ns: int | None = None
    """Core time that the sampling process took from the first sample to the last."""


class Startup(Noun, frozen=True, kw_only=True):
    """What a case costs before its first steady step, and at each epoch's end."""

    process_ns: int | None = None
    """From the parent's request to the first line of the case's own code."""
    world_ns: int | None = None
    """From there to all ranks having joined."""
    build_ns: int | None = None
    """Building model, data set and optimizer."""
    iterator_ns: int | None = None
    """`iter(loader)`: starting the workers."""
    first_batch_ns: int | None = None
    """The first `next()`."""
    epoch_end_ns: list[int] | None = None
    """The last `next()` of an epoch, that raises StopIteration and joins the workers."""
    epoch_start_ns: list[int] | None = None
    """`iter()` and the first `next()` of the epoch that follows."""


class Outcome(Noun, frozen=True, kw_only=True):
    """How a case ended. A failure is data: what happened, where, and the evidence."""

    kind: OutcomeKind
    message: str | None = None
    hint: str | None = None
    phase: str | None = None
    """The phase that was running, or `build`, `warmup` or `loader`, where it is known."""
    traceback: str | None = None
    evidence: dict[str, int | float | str | None] = {}


class Backends(Noun, frozen=True, kw_only=True):
    """torch's switches as they were read back after the timed window."""

    cudnn_enabled: bool
    cudnn_version: int | None
    """Null where there is no cuDNN."""
    cudnn_benchmark: bool
    cudnn_deterministic: bool
    cudnn_allow_tf32: bool
    matmul_allow_tf32: bool
    deterministic_algorithms: Literal["off", "warn", "on"]
    cublas_workspace_config: str | None
    allocator_config: str | None
    """`PYTORCH_CUDA_ALLOC_CONF` or `PYTORCH_ALLOC_CONF`."""


class Facts(Noun, frozen=True, kw_only=True):
    """What was in force in the case, as against what was asked."""

    device: str
    clock: Literal["host", "host and device"] = "host"
    """Which clocks timed the steps."""
    backends: Backends | None = None
    dtype: Literal["fp32", "tf32", "bf16", "fp16"] | None = None
    """What the model's matrix products are computed in."""
    batch_bytes: int | None = None
    """What `h2d` moves a step."""
    flops_per_step: int | None = None
    """Floating-point operations of a step's matrix products and convolutions, forward and backward, a multiply-add
    counting as two (`torch.utils.flop_counter`)."""
    threads: int
    parameters: int | None = None
    image_size: int | None = None
    samples_in_dataset: int | None = None
    classes: int | None = None
    malloc: str = "default"


class Rank(Noun, frozen=True, kw_only=True):
    """One of the processes that trained a case together."""

    rank: int
    node: int
    host: str
    facts: Facts | None = None
    startup: Startup | None = None
    samples: Samples | None = None
    """Of this rank alone: `batch_size` is its own."""
    before_reduce_ns: list[Natural] | None = None
    """The part of each step's `backward` until its first gradients were ready to be exchanged, on the rank's primary
    clock. Up to there a rank waits for no other one."""
    blocks: list[Block] = []
    """Blocks after the timed window in turns, with and without an exchange of gradients."""


class Communication(Noun, frozen=True, kw_only=True):
    """What DDP exchanges in a step."""

    backend: str
    """`nccl` or `gloo`."""
    bucket_bytes: tuple[int, ...]
    """Sizes of the buckets in the order in which they are reduced."""
    reduce_ns: int | None = None
    """From a step's first bucket being ready to the last one's having been reduced, as DDP's own logger averages it."""
    overlap_ns: int | None = None
    """The part of it while backward still computed, by the same logger."""
    collectives_ns: int | None = None
    """Time a step in which at least one collective's kernel ran, in the profiler window; null where none was traced."""


class Measurement(Noun, frozen=True, kw_only=True):
    """One case: what it was, how it ended, what was measured.

    Of a case with several ranks `samples` and all else here are those of the slowest rank, but for the batch size,
    which is that of all ranks together, and the energy, which is that of all their devices.
    """

    case: Case
    outcome: Outcome
    wall_s: float
    """From the parent's request to the end of the case's process."""
    inside_s: float | None = None
    """The part of `wall_s` spent inside the case's own code."""
    facts: Facts | None = None
    startup: Startup | None = None
    samples: Samples | None = None
    serialised: Serialised | None = None
    memory: Memory | None = None
    profile: Profile | None = None
    telemetry: Telemetry | None = None
    loading: Loading | None = None
    """The loader, watched apart from the timed steps."""
    diagnosis: Diagnosis | None = None
    """Derived from `loading`."""
    ranks: tuple[Rank, ...] = ()
    """Where several processes trained together: all of them, in order."""
    communication: Communication | None = None
    notes: tuple[Note, ...] = ()


class LargestBatch(Noun, frozen=True, kw_only=True):
    """The largest batch that fits under `settings`, whose own `batch_size` means nothing here."""

    settings: Settings
    batch_size: int | None
    """Null where not even one sample fits."""
    margin: float
    steps: int
    """Steps that it survived, in a process of its own, with `margin` of the memory kept from it."""
    tried: dict[str, OutcomeKind]
    """Every batch size tried, as text, and how it ended."""
    memory_bytes: int | None = None
    """What the search let a process have."""
    predicted: float | None = None
    predicted_low: float | None = None
    predicted_high: float | None = None
    """The batch that the line through the smaller batches' peaks said would fit, and its 95 % interval."""
    complete: bool = True
    """Whether the next larger batch was seen to fail; false where `most` or an interruption ended the search."""


class Check(Noun, frozen=True, kw_only=True):
    """One delay planted in one phase: what was put in, what came back there, and what leaked elsewhere."""

    phase: str
    clock: Literal["host", "device"] = "host"
    """Where the delay was planted, and by which clock it was found."""
    planted_ns: int
    found_ns: int
    leaked_ns: int
    """The largest change of any other phase, signed."""
    leaked_into: str
    residual_ns: int
    """Per step: the block's own wall time less the phases."""
    tolerance_ns: int
    passed: bool


# --- on what ----------------------------------------------------------------------------------------


class Accelerator(Noun, frozen=True, kw_only=True):
    """A device that trains, as its driver names it."""

    name: str
    kind: str
    index: int
    uuid: str | None = None
    memory_bytes: int | None = None
    capability: str | None = None
    multiprocessors: int | None = None
    pcie: str | None = None
    """The widest link that card and slot agree on, as `gen5 x16`."""
    power_limit_w: float | None = None
    mig: bool | None = None
    """Whether this is a slice of a GPU, or null where nothing tells."""


class Environment(Noun, frozen=True, kw_only=True):
    """Hardware and software that numbers depend on."""

    host: str
    os: str
    kernel: str
    hypervisor: str | None
    cpu: str
    cores_logical: int
    cores_physical: int | None
    cores_usable: int
    """Cores this process may use: affinity and cgroup quota taken together."""
    cpu_quota: float | None
    """Cores granted by the cgroup, or null where it sets no limit."""
    memory_bytes: int
    memory_limit_bytes: int | None
    """The cgroup's limit, or null where it sets none."""
    shm_bytes: int | None
    accelerators: tuple[Accelerator, ...]
    driver: str | None
    python: str
    torch: str
    torchvision: str | None
    cuda: str | None
    cudnn: str | None
    numpy: str
    libc: str
    bsprof: str
    git_commit: str | None
    """Commit of the working directory, `+` behind it where there are changes."""
    variables: dict[str, str]
    """Environment variables that change the numbers (`OMP_*`, `MALLOC_*`, `CUDA_*`, …)."""


class Ceiling(Noun, frozen=True, kw_only=True):
    """The most that one part of this machine does, measured: median and 95 % interval."""

    value: float
    unit: Literal["B/s", "FLOP/s", "1/s", "cores"]
    low: float | None = None
    high: float | None = None


class AllReduce(Noun, frozen=True, kw_only=True):
    """How long an all-reduce of so many bytes takes here: median and 95 % interval, on the slowest rank."""

    backend: str
    world_size: int
    bytes: int
    seconds: float
    low: float | None = None
    high: float | None = None


class Ceilings(Noun, frozen=True, kw_only=True):
    """What this machine can do, measured by `bsprof env --measure` and kept under its hardware's identity."""

    identity: str
    """A hash of the hardware and software that the rates depend on."""
    created: str
    rates: dict[str, Ceiling]
    """By name: `h2d_pinned`, `h2d_pageable`, `d2d`, `matrix_fp32`, `matrix_tf32`, `matrix_bf16`, `matrix_fp16`,
    `cpu_matrix_fp32`, `cpu_matrix_bf16`, `jpeg_core`, `jpeg_all`, `disk_cold`, `disk_warm`, `cpu_cores`,
    `all_reduce`."""
    all_reduce: tuple[AllReduce, ...] = ()
    """By world size and bytes; the largest bus bandwidth among them is the rate `all_reduce`."""
    missing: dict[str, str] = {}
    """What could not be measured, and why."""
    notes: tuple[Note, ...] = ()
    """What a reader must know before trusting them."""
    wall_s: float | None = None


class Turns(Noun, frozen=True, kw_only=True):
    """One of two sides that were measured in turns: process i of both makes pair i."""

    run: str
    """The same in the results of both sides, and in no other's."""
    side: Literal["a", "b"]
    name: str
    """As it was asked for."""
    together: bool
    """Whether both took turns in one process, else each had processes of its own."""
    threshold: float
    effect: float
    """Change, beyond the threshold, that the number of pairs was chosen to find."""
    pilot: int
    """Pairs by whose scatter the number was chosen."""
    asked: int
    """Pairs that it takes; fewer were measured where the budget ended before."""


class NoiseFloor(Noun, frozen=True, kw_only=True):
    """How far a thing differed from itself on this machine: thresholds below cannot be told from noise."""

    identity: str
    """A hash of the hardware and software, as in Ceilings."""
    created: str
    together: bool
    """Whether both sides took turns in one process, else each had processes of its own."""
    floor: float
    """The farther end of the 95 % interval of b / a, less 1."""
    pairs: int


class Result(Noun, frozen=True, kw_only=True):
    """A whole sweep, reproducible from this file alone."""

    schema: int = SCHEMA
    created: str
    """UTC, ISO 8601."""
    plan: Plan | None
    """Null for a user's own loop."""
    environment: Environment
    measurements: list[Measurement]
    largest_batches: list[LargestBatch] = []
    loader: LoaderRequest | None = None
    """What `bsprof loader` was asked."""
    verifications: list[Verification] = []
    turns: Turns | None = None
    """Where this is one side of `bsprof ab`."""
    ceilings: Ceilings | None = None
    wall_s: float | None = None
    notes: tuple[Note, ...] = ()


# --- what a gate lets pass --------------------------------------------------------------------------

Threshold = Annotated[float, Meta(gt=0, lt=1, description="share by which a figure may change")]


class CaseGate(Noun, frozen=True, kw_only=True):
    """Another threshold for the cases that have these settings, by axis; of several that fit the last one counts."""

    settings: dict[str, Any]
    threshold: Threshold


class Gate(Noun, frozen=True, kw_only=True):
    """How much a comparison lets pass: `[tool.bsprof.gate]` of a pyproject.toml."""

    threshold: Threshold = 0.02
    """Of the step."""
    metrics: dict[str, Threshold] = {}
    """Metrics that are judged beside the step, each with its threshold, as `peak_memory = 0.05`."""
    cases: tuple[CaseGate, ...] = ()
    allow: tuple[str, ...] = ()
    """Differences between machines that are no reason to refuse, as `host` where CI gives each run another one."""
    strict: bool = False
    """Whether what could not be decided fails."""
