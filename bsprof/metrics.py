"""Everything that is derived from raw samples, as one registry.

A metric is one entry of `METRICS`: its unit, which way is better, what it means and how it is computed from
one process's samples. `summarise` groups the processes of each case and combines their values. All times are
in seconds, sizes in bytes, energy in joules, all shares and ratios are fractions; `None` means 'not captured' and
never stands for 0.

Medians and their intervals describe the *step*. Phases are *means* over the steady steps, because only means
add up: phases + other = mean step. (A wait that falls on every fourth step has a median of zero.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np

from bsprof import exchange, stats
from bsprof.ceilings import Bound
from bsprof.model import AXES, PHASES, Backends, Case, Ceilings, Facts, Measurement, Memory, Profile, Result, Settings
from bsprof.noun import Note
from bsprof.readings import Reading, excess
from bsprof.stats import Estimate

Number = float | None
Value = Estimate | float | None
Unit = Literal["s", "1/s", "share", "count", "B", "B/s", "J", "W", "MHz"]


# --- how each metric is computed from one process ------------------------------------------------------


def _between_excesses(values: list[float]) -> Estimate:
    return excess(stats.between([1 + value for value in values]))


def _quantile(p: float, reading: Reading) -> Number:
    return float(stats.quantile(reading.step, p)) if reading.step.size else None


def _throughput(reading: Reading) -> Number:
    step, batch = reading.median_s, reading.samples.batch_size
    return batch / step if batch is not None and step is not None and step > 0 else None


def _throughput_within(reading: Reading) -> Estimate | None:
    step, batch = reading.median, reading.samples.batch_size
    if step is None or batch is None or step.value <= 0:
        return None
    return step._replace(
        value=batch / step.value,
        low=batch / step.high if step.high else None,
        high=batch / step.low if step.low else None,
    )


def _other(reading: Reading) -> Number:
    return None if reading.mean is None else reading.mean - sum(reading.phases.values())


def _hidden(reading: Reading) -> Number:
    wait, stall = reading.host.get("data"), reading.phases.get("data")
    return None if wait is None or stall is None else wait - stall


def _of_mean_step(seconds: Number, reading: Reading) -> Number:
    return float(seconds) / reading.mean if seconds is not None and reading.mean else None


def _residual(reading: Reading) -> Number:
    """Outside check: the blocks are timed by clock reads of their own, so phases must account for all of it."""
    samples = reading.samples
    blocks = [block for block in samples.blocks if block.kind == "instrumented"]
    wall = sum(block.device_wall_ns or block.wall_ns for block in blocks)
    if not wall or sum(block.steps for block in blocks) != len(samples.step_ns):
        return None
    phases = samples.host_ns if samples.device_ns is None else samples.device_ns
    return (wall - sum(map(sum, phases.values()))) / wall


def _recorder(reading: Reading) -> Number:
    cost = reading.samples.recorder_ns_per_step
    return None if cost is None else cost * 1e-9


def _recorder_share(reading: Reading) -> Number:
    cost = _recorder(reading)
    return cost / reading.median_s if cost is not None and reading.median_s else None


def _faults(reading: Reading) -> Number:
    samples = reading.samples
    steps = sum(block.steps for block in samples.blocks) or len(samples.step_ns)
    return samples.counters.minor_faults / steps if samples.counters and steps else None


def _warmup(reading: Reading) -> Number:
    return sum(reading.samples.warmup_ns) * 1e-9 if reading.samples.warmup_ns else None


def _first_step(reading: Reading) -> Number:
    return reading.samples.warmup_ns[0] * 1e-9 if reading.samples.warmup_ns else None


def _warmup_excess(reading: Reading) -> Number:
    warmup, step = reading.samples.warmup_ns, reading.median_s
    return sum(warmup) * 1e-9 - len(warmup) * step if warmup and step is not None else None


def _startup(field: str, reading: Reading) -> Number:
    ns = getattr(reading.startup, field) if reading.startup else None
    return None if ns is None else ns * 1e-9


def _epoch_boundary(reading: Reading) -> Number:
    startup = reading.startup
    if startup is None or not startup.epoch_end_ns or not startup.epoch_start_ns:
        return None
    pairs = zip(startup.epoch_end_ns, startup.epoch_start_ns, strict=False)  # the last end may have no start after it
    return float(np.median([end + start for end, start in pairs])) * 1e-9


# --- what the device did ---------------------------------------------------------------------------------


def _serialised(reading: Reading) -> Number:
    return sum(reading.serialised.values()) if reading.serialised else None


def _overlap(reading: Reading) -> Number:
    alone = sum(reading.serialised.values())
    return alone - reading.mean if reading.serialised and reading.mean is not None else None


def _overlap_share(reading: Reading) -> Number:
    overlap, alone = _overlap(reading), sum(reading.serialised.values())
    return overlap / alone if overlap is not None and alone else None


def _a_step(field: str, reading: Reading) -> Number:
    """Return a total of the profiler window, divided by its steps."""
    total = getattr(reading.profile, field) if reading.profile else None
    return total / reading.profile.steps if total is not None and reading.profile and reading.profile.steps else None


def _busy(reading: Reading) -> Number:
    ns = _a_step("busy_total_ns", reading)
    return ns * 1e-9 if ns is not None else None


def _busy_share(reading: Reading) -> Number:
    profile = reading.profile
    if profile is None or profile.busy_total_ns is None or not profile.wall_ns:
        return None
    return profile.busy_total_ns / profile.wall_ns


def _copying(reading: Reading) -> Number:
    profile = reading.profile
    if profile is None or profile.busy_ns is None or not profile.steps:
        return None
    return sum(copy.ns for copy in profile.copies) * 1e-9 / profile.steps


def _held(field: str, reading: Reading) -> Number:
    held = getattr(reading.memory, field) if reading.memory else None
    return None if held is None else float(held)


def _fragmentation(reading: Reading) -> Number:
    memory = reading.memory
    if memory is None or memory.pool != "device" or not memory.reserved_peak:
        return None  # what a process has mapped and never touched is no fragmentation
    return 1 - memory.allocated_peak / memory.reserved_peak


def _told(column: str, reading: Reading) -> Number:
    values = reading.during(column)
    return statistics.fmean(values) if values else None


def _power(reading: Reading) -> Number:
    """Return the mean draw in watts, by the best that there is.

    The energy counter counts all the time. Readings are points in it, and `power_w` on A100 and H100 is the mean of
    the quarter of the time only that the driver samples (arXiv 2312.02741), so it comes last.
    """
    energy = reading.telemetry.energy if reading.telemetry else None
    if energy is not None and energy.source == "counter" and energy.joules is not None and energy.window_ns:
        return energy.joules / (energy.window_ns * 1e-9)
    now = _told("power_instant_w", reading)
    return _told("power_w", reading) if now is None else now


def _energy(reading: Reading) -> Number:
    energy = reading.telemetry.energy if reading.telemetry else None
    if energy is None or energy.joules is None or not energy.resolvable or not energy.steps:
        return None
    return energy.joules / energy.steps


def _energy_per_sample(reading: Reading) -> Number:
    energy, batch = _energy(reading), reading.samples.batch_size
    return energy / batch if energy is not None and batch else None


def _sampler(reading: Reading) -> Number:
    told = reading.telemetry
    if told is None or told.sampler_cpu_ns is None or len(told.time_ns) < 2:
        return None
    span = told.time_ns[-1] - told.time_ns[0]
    return told.sampler_cpu_ns / span if span > 0 else None


# --- what ranks cost each other --------------------------------------------------------------------------


def _value_of(estimate: Callable[[Reading], Estimate | None], reading: Reading) -> Number:
    found = estimate(reading)
    return found.value if found else None


def _told_of_exchange(field: str, reading: Reading) -> Number:
    found = exchange.exchange(reading)
    value: Number = getattr(found, field) if found else None
    return value


# --- the registry --------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """One derived quantity: how it is named, read, computed in one process, and combined over several.

    `across` says what the values of several processes become: an estimate whose unit of inference is the process,
    a total, or by default the plain mean (for what may be zero or negative, and for context). `within` is for what has
    an interval inside a process: the same value with it. It is asked for only where there is no other process, because
    it takes far longer than the value.
    """

    key: str
    label: str
    unit: Unit
    better: Literal["lower", "higher"] | None
    describe: str
    compute: Callable[[Reading], Number]
    across: Callable[[list[float]], Value] = statistics.fmean
    within: Callable[[Reading], Estimate | None] | None = None


_METRICS = (
    Metric(
        "step",
        "step",
        "s",
        "lower",
        "median time of a steady step",
        lambda r: r.median_s,
        stats.between,
        lambda r: r.median,
    ),
    Metric("step_mean", "mean step", "s", "lower", "mean time of a steady step: phases + other", lambda r: r.mean),
    Metric("step_p10", "p10", "s", "lower", "10 % of steady steps are faster", partial(_quantile, 0.1)),
    Metric("step_p90", "p90", "s", "lower", "10 % of steady steps are slower", partial(_quantile, 0.9)),
    Metric("step_min", "min", "s", "lower", "the fastest steady step", partial(_quantile, 0.0)),
    Metric(
        "throughput",
        "samples/s",
        "1/s",
        "higher",
        "batch size / median step",
        _throughput,
        stats.between,
        _throughput_within,
    ),
    Metric("wait", "data wait", "s", "lower", "host time in next()", lambda r: r.host.get("data")),
    Metric("stall", "data stall", "s", "lower", "time the device ran dry for data", lambda r: r.phases.get("data")),
    Metric("hidden", "hidden wait", "s", None, "wait the device did not feel: wait - stall", _hidden),
    Metric(
        "stall_share",
        "stall",
        "share",
        "lower",
        "stall as a share of the mean step",
        lambda r: _of_mean_step(r.phases.get("data"), r),
    ),
    Metric("other", "other", "s", None, "mean step - sum of its phases, signed", _other),
    Metric(
        "other_share",
        "other",
        "share",
        None,
        "other as a share of the mean step, signed",
        lambda r: _of_mean_step(_other(r), r),
    ),
    Metric("residual", "residual", "share", None, "(outside wall time - all phases) / wall time, signed", _residual),
    Metric(
        "distortion",
        "distortion",
        "share",
        "lower",
        "instrumented / bare - 1, over neighbouring blocks",
        lambda r: r.distortion.value if r.distortion else None,
        _between_excesses,
        lambda r: r.distortion,
    ),
    Metric("recorder", "recorder", "s", "lower", "the recorder's own cost in a step, measured alone", _recorder),
    Metric("recorder_share", "recorder", "share", "lower", "the recorder's own cost / median step", _recorder_share),
    Metric(
        "precision",
        "precision",
        "share",
        "lower",
        "relative half-width of the step's interval within a process",
        lambda r: r.median.precision if r.median else None,
    ),
    Metric("steps", "steps", "count", None, "steady steps measured", lambda r: float(r.step.size), math.fsum),
    Metric(
        "effective_steps",
        "effective steps",
        "count",
        None,
        "independent steps they are worth",
        lambda r: float(r.median.effective) if r.median else None,
        math.fsum,
    ),
    Metric("minor_faults", "faults/step", "count", "lower", "minor page faults a step", _faults),
    Metric("first_step", "first step", "s", "lower", "the first, cold step", _first_step),
    Metric(
        "warmup_steps",
        "warm-up steps",
        "count",
        "lower",
        "steps before the steady state",
        lambda r: float(len(r.samples.warmup_ns)) or None,
    ),
    Metric("warmup", "warm-up", "s", "lower", "time before the steady state", _warmup),
    Metric(
        "warmup_excess",
        "warm-up cost",
        "s",
        "lower",
        "warm-up less the time that as many steady steps take",
        _warmup_excess,
    ),
    Metric("process", "process", "s", "lower", "from request to the case's own code", partial(_startup, "process_ns")),
    Metric("build", "build", "s", "lower", "building model, data set and optimizer", partial(_startup, "build_ns")),
    Metric("iterator", "iterator", "s", "lower", "iter(loader): starting workers", partial(_startup, "iterator_ns")),
    Metric("first_batch", "first batch", "s", "lower", "the first next()", partial(_startup, "first_batch_ns")),
    Metric("epoch_boundary", "epoch end", "s", "lower", "last next() + iter() + first next()", _epoch_boundary),
    Metric("serialised", "serialised", "s", "lower", "sum of the phases with a synchronisation at each", _serialised),
    Metric("overlap", "overlap", "s", "higher", "serialised phases - mean step", _overlap),
    Metric("overlap_share", "overlap", "share", "higher", "overlap / serialised phases", _overlap_share),
    Metric("busy", "GPU busy", "s", "lower", "time a step in which a kernel or copy ran", _busy),
    Metric(
        "busy_of_step",
        "busy",
        "share",
        "higher",
        "GPU busy time in a profiled step / mean step of the timed window",
        lambda r: _of_mean_step(_busy(r), r),
    ),
    Metric("busy_share", "busy", "share", "higher", "GPU busy time / wall time of the profiler window", _busy_share),
    Metric("launches", "launches/step", "count", "lower", "kernel launches a step", partial(_a_step, "launches")),
    Metric("copying", "copies", "s", "lower", "time a step in memory copies", _copying),
    Metric(
        "peak_memory", "peak memory", "B", "lower", "highest sum of live tensors", partial(_held, "allocated_peak"), max
    ),
    Metric(
        "reserved_memory",
        "reserved",
        "B",
        "lower",
        "highest that the allocator held",
        partial(_held, "reserved_peak"),
        max,
    ),
    Metric("fragmentation", "fragmentation", "share", "lower", "1 - peak memory / reserved", _fragmentation),
    Metric("power", "power", "W", "lower", "mean power draw of the device", _power),
    Metric("sm_clock", "SM clock", "MHz", "higher", "mean clock of the multiprocessors", partial(_told, "sm_mhz")),
    Metric("energy_per_step", "J/step", "J", "lower", "the device's energy in a step, idle power included", _energy),
    Metric(
        "energy_per_sample", "J/sample", "J", "lower", "the device's energy in a step / batch size", _energy_per_sample
    ),
    Metric("mfu", "MFU", "share", "higher", "FLOP/s of a step / measured matrix rate of its dtype", lambda r: r.mfu),
    Metric(
        "ceiling_share",
        "ceiling",
        "share",
        "higher",
        "least time that the binding ceiling leaves / median step",
        lambda r: r.bounds[0].share if r.bounds else None,
    ),
    Metric(
        "exposed",
        "exposed communication",
        "s",
        "lower",
        "what exchanging gradients adds to a step, signed",
        partial(_value_of, exchange.exposed),
        stats.mean,
        exchange.exposed,
    ),
    Metric(
        "exposed_share",
        "exposed communication",
        "share",
        "lower",
        "exposed communication / mean step, signed",
        lambda r: _of_mean_step(_value_of(exchange.exposed, r), r),
    ),
    Metric(
        "skew",
        "skew",
        "s",
        "lower",
        "slowest rank - mean of the ranks, without an exchange",
        partial(_value_of, exchange.skew),
        within=exchange.skew,
    ),
    Metric(
        "hidden_communication",
        "hidden communication",
        "share",
        "higher",
        "share of the exchange beside which backward computed",
        partial(_told_of_exchange, "hidden"),
    ),
    Metric(
        "bus_bandwidth",
        "bus bandwidth",
        "B/s",
        "higher",
        "2 (p - 1) / p x bytes of a step's exchange / its time",
        partial(_told_of_exchange, "bus_bandwidth"),
        stats.between,
    ),
    Metric("sampler_share", "sampler", "share", "lower", "telemetry's own share of one core", _sampler),
    # What the founding experiments printed, by their names: train-and-load time and load time, a batch.
    Metric(
        "train_and_load",
        "time per batch",
        "s",
        "lower",
        "the step by its name",
        lambda r: r.median_s,
        stats.between,
        lambda r: r.median,
    ),
    Metric("load", "load time", "s", "lower", "data wait by its name", lambda r: r.host.get("data")),
)

METRICS: dict[str, Metric] = {metric.key: metric for metric in _METRICS}
"""Every metric by key, but for those of single phases: see `phase_metrics`."""


@cache
def phase_metrics(phase: str) -> Mapping[str, Metric]:
    """Return the metrics of one phase, by key: `NAME.time`, `NAME.share`, `NAME.host`, `NAME.device` and more."""

    def share(reading: Reading) -> Number:
        return _of_mean_step(reading.phases.get(phase), reading)

    def busy(reading: Reading) -> Number:
        profile = reading.profile
        if profile is None or profile.busy_ns is None or phase not in profile.busy_ns or not profile.steps:
            return None
        return profile.busy_ns[phase] * 1e-9 / profile.steps

    def busy_share(reading: Reading) -> Number:
        seconds, elapsed = busy(reading), reading.device.get(phase)
        return seconds / elapsed if seconds is not None and elapsed else None

    def held(peaks: Callable[[Memory], dict[str, int]], reading: Reading) -> Number:
        peak = peaks(reading.memory).get(phase) if reading.memory else None
        return None if peak is None else float(peak)

    live, reserved = partial(held, lambda m: m.phase_allocated_peak), partial(held, lambda m: m.phase_reserved_peak)
    entries = (
        Metric(f"{phase}.time", phase, "s", "lower", "mean, primary clock", lambda r: r.phases.get(phase)),
        Metric(f"{phase}.share", phase, "share", None, "share of the mean step", share),
        Metric(f"{phase}.host", f"{phase} host", "s", "lower", "mean, host clock", lambda r: r.host.get(phase)),
        Metric(f"{phase}.device", f"{phase} device", "s", "lower", "mean, device", lambda r: r.device.get(phase)),
        Metric(f"{phase}.serialised", f"{phase} alone", "s", "lower", "mean, alone", lambda r: r.serialised.get(phase)),
        Metric(f"{phase}.busy", f"{phase} busy", "s", "lower", "its kernels and copies, a step", busy),
        Metric(f"{phase}.busy_share", f"{phase} busy", "share", "higher", "busy / device time", busy_share),
        Metric(f"{phase}.peak_memory", f"{phase} peak", "B", "lower", "most live memory", live, max),
        Metric(f"{phase}.reserved_memory", f"{phase} reserved", "B", "lower", "most held", reserved, max),
    )
    return {metric.key: metric for metric in entries}


def find_metric(key: str) -> Metric:
    """Return the metric named `key`, of a step or of a phase. Raises KeyError for an unknown one."""
    if key in METRICS:
        return METRICS[key]
    return phase_metrics(key.rpartition(".")[0])[key]


# --- cases ---------------------------------------------------------------------------------------------


class CaseSummary:
    """The processes of one case, and every metric of it, computed when asked for.

    Figures come from the processes that ended well; where none did, from whatever steps were recorded before
    the end (`ok` tells them apart). `rates` are what the machine can do, where that was measured.
    """

    def __init__(self, measurements: Sequence[Measurement], rates: Ceilings | None = None) -> None:
        self.measurements = tuple(sorted(measurements, key=lambda one: one.case.process))
        self.case: Case = self.measurements[0].case
        self.failures = [one for one in self.measurements if one.outcome.kind != "ok"]
        usable = [one for one in self.measurements if one.samples is not None and one.samples.step_ns]
        self.ok = any(one.outcome.kind == "ok" for one in usable)
        measured = [one for one in usable if one.outcome.kind == "ok"] or usable
        self.readings = [Reading(one.samples, one.startup, one, rates) for one in measured if one.samples is not None]
        self._values: dict[str, Value] = {}

    @property
    def settings(self) -> Settings | None:
        """The case's settings; `None` for a user's own loop."""
        return self.case.settings

    @property
    def facts(self) -> Facts | None:
        """What was in force in the first process that told."""
        return next((one.facts for one in self.measurements if one.facts is not None), None)

    @property
    def backends(self) -> Backends | None:
        """Switches of torch as read back in the first process that told."""
        return next((one.facts.backends for one in self.measurements if one.facts and one.facts.backends), None)

    @property
    def profile(self) -> Profile | None:
        """The profiler window of the first process that has one: names cannot be averaged."""
        return next((reading.profile for reading in self.readings if reading.profile), None)

    @property
    def binding(self) -> Bound | None:
        """The ceiling that leaves the step the least room, in the first process where one is known."""
        return next((reading.bounds[0] for reading in self.readings if reading.bounds), None)

    @property
    def has_device_clock(self) -> bool:
        """Whether the device timed the steps itself."""
        return any(reading.has_device_clock for reading in self.readings)

    @property
    def notes(self) -> list[Note]:
        """The distinct notes of all its processes, in order."""
        return list(dict.fromkeys(note for one in self.measurements for note in one.notes))

    @property
    def steady(self) -> bool:
        """Whether every process reached a steady state."""
        return all(reading.samples.steady for reading in self.readings)

    @cached_property
    def phases(self) -> list[str]:
        """The phases recorded, bsprof's own first and in their order."""
        return order_phases(phase for reading in self.readings for phase in reading.phases)

    @cached_property
    def spread(self) -> float | None:
        """Spread of the median step between processes, as a fraction; `None` with fewer than two."""
        medians = [reading.median_s for reading in self.readings if reading.median_s is not None]
        return stats.spread(medians) if len(medians) > 1 else None

    def __getitem__(self, key: str) -> Value:
        """Return a metric over all processes: between them where there are two or more, else within the one.

        Raises KeyError for an unknown metric.
        """
        if key not in self._values:
            self._values[key] = self._combine(find_metric(key))
        return self._values[key]

    def _combine(self, metric: Metric) -> Value:
        found = [(value, reading) for reading in self.readings if (value := metric.compute(reading)) is not None]
        if not found:
            return None
        (value, reading), *others = found
        if others:
            return metric.across([value for value, _ in found])
        return value if metric.within is None else metric.within(reading)

    def value(self, key: str) -> float | None:
        """Return a metric's value without its interval."""
        value = self[key]
        return None if value is None else point(value)

    def interval(self, key: str) -> tuple[float, float] | None:
        """Return a metric's 95 % interval, or `None` where it has none."""
        value = self[key]
        if not isinstance(value, Estimate) or value.low is None or value.high is None:
            return None
        return value.low, value.high


def point(value: Estimate | float) -> float:
    """Return the value of an estimate, or the plain number."""
    return value.value if isinstance(value, Estimate) else value


def order_phases(phases: Iterable[str]) -> list[str]:
    """Return distinct phases: bsprof's own in their order, then a user's in order of appearance."""
    found = dict.fromkeys(phases)
    return [phase for phase in PHASES if phase in found] + [phase for phase in found if phase not in PHASES]


def varying_axes(settings: Iterable[Settings | None]) -> list[str]:
    """Return the axes with more than one value, in table order.

    Null is no value of an axis that means nothing everywhere (`prefetch` at 0 workers), so it does not make one vary.
    """
    known = [one for one in settings if one is not None]
    return [name for name in AXES if len(axis_values(name, known)) > 1]


def axis_values(name: str, settings: Iterable[Settings]) -> set[Any]:
    """Return the distinct values of an axis, without the null that says it means nothing there."""
    values = {getattr(one, name) for one in settings}
    return values - {None} if AXES[name].info.needs else values


def _place(summary: CaseSummary) -> list[tuple[int, float, str]]:
    """Where a case stands in a table: by its settings, numbers by size, nulls first."""

    def rank(value: object) -> tuple[int, float, str]:
        if value is None:
            return 0, 0.0, ""
        return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))

    return [rank(getattr(summary.settings, name)) for name in AXES] if summary.settings else []


def summarise(result: Result) -> list[CaseSummary]:
    """Return one summary a case, its processes together, ordered by settings and not as they were measured."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in result.measurements:
        groups.setdefault(measurement.case.key, []).append(measurement)
    return sorted((CaseSummary(group, result.ceilings) for group in groups.values()), key=_place)
