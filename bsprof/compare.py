"""Two results side by side: whether they belong there at all, and what has changed beyond doubt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from bsprof import stats
from bsprof.findings import JUDGED
from bsprof.metrics import CaseSummary, Metric, Unit, find_metric, order_phases, summarise, varying_axes
from bsprof.model import Accelerator, Case, Environment, Gate, Result
from bsprof.noun import Note, Noun
from bsprof.readings import Reading

SIZE_TOLERANCE = 0.01
"""How far two sizes in bytes, or two quotas, may be apart and be the same: a kernel keeps a little more or less memory
to itself at each start, and container runtimes round."""

_SIZES = ("cpu_quota", "memory_bytes", "memory_limit_bytes", "shm_bytes")

_LOCATIONS = ("_HOME", "_PATH", "_DIR")
"""Endings of variables that say where something lies, not how fast it goes; versions are compared on their own."""

MACHINE = (
    "host",
    "hypervisor",
    "cpu",
    "cores_logical",
    "cores_physical",
    "cores_usable",
    "cpu_quota",
    "accelerators",
    "driver",
)
"""What makes it another machine. Two of one model differ by more than what a gate is to find."""

CONDITIONS = ("device", "clock", "threads", "malloc", "image_size")
"""Facts of a case that were not asked for and bend its figures: where they differ, so does what was measured."""

ONE_SIDED = 0.025
"""Chance, in either direction, of a verdict though nothing has changed: 5 % in both."""

DISTURBANCES = ("cpu_contended", "cpu_oversubscribed", "steal", "cpu_quota", "page_faults")
"""Notes of a case that say why an interval is wide, even where both sides carry them alike; others are worth a word
only where one side has more."""

MANY_FAULTS = 100.0
"""Minor faults a step from which twice as many on one side are worth a word. Pinned memory takes about one."""


# --- may they be compared ---------------------------------------------------------------------------


class Difference(NamedTuple):
    """One property of two environments, where they differ, as it is written."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} → {self.after}"


def environment_differences(before: Environment, after: Environment) -> list[Difference]:
    """Return what differs between two environments such that their numbers do not belong together.

    None means that a sweep begun in `before` may go on in `after`.

    Everything is compared, the host's name included since one result speaks of one machine, except for what says
    nothing about speed: sizes are the same within `SIZE_TOLERANCE`; variables that only name a place (`CUDA_HOME`) do
    not count; of `git_commit` the mark for uncommitted changes does not count, because editing a note sets it, and a
    commit that is unknown on either side (another working directory) is no difference.
    """
    left, right = msgspec.structs.asdict(before), msgspec.structs.asdict(after)
    differences = []
    for name, old in left.items():
        new = right[name]
        if name == "variables":
            differences += _variables(old, new)
        elif name == "git_commit":
            if old and new and old.rstrip("+") != new.rstrip("+"):
                differences.append(Difference(name, old, new))
        elif name in _SIZES and _close(old, new):
            continue
        elif old != new:
            differences.append(Difference(name, _show(old), _show(new)))
    return differences


def _variables(old: dict[str, str], new: dict[str, str]) -> list[Difference]:
    names = sorted(name for name in old.keys() | new.keys() if not name.endswith(_LOCATIONS))
    return [
        Difference(name, old.get(name, "unset"), new.get(name, "unset"))
        for name in names
        if old.get(name) != new.get(name)
    ]


def _close(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    return abs(old - new) <= SIZE_TOLERANCE * max(abs(old), abs(new))


def _show(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(_show(item) for item in value)
    if isinstance(value, Accelerator):
        detail = ", ".join(
            str(part) for part in (value.uuid, value.capability, _gib(value.memory_bytes)) if part is not None
        )
        return f"{value.name} ({detail})" if detail else value.name
    return str(value)


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.1f} GiB"


# --- what has changed -------------------------------------------------------------------------------

Verdict = Literal["regressed", "improved", "unchanged", "inconclusive", "incomparable"]


class Change(Noun, frozen=True, kw_only=True):
    """One figure of a case on both sides. Values are the geometric means of the processes' own, in `unit`."""

    metric: str
    label: str
    unit: Unit
    base: float
    new: float
    ratio: float
    """new / base."""
    low: float | None = None
    """Of the 95 % interval of `ratio`; null, as `high` and `detectable` are, with one process on a side."""
    high: float | None = None
    detectable: float | None = None
    """Share by which it would have had to change to be found in 80 % of such comparisons."""
    threshold: float
    verdict: Verdict


class CaseComparison(Noun, frozen=True, kw_only=True):
    """One case on both sides."""

    case: Case
    """On the base's side; on the new one other settings may be what is compared."""
    base_processes: int
    new_processes: int
    verdict: Verdict
    """The worst of what decides; `inconclusive` where nothing can be put into a ratio."""
    refused: tuple[str, ...] = ()
    """Why its figures do not belong side by side; then there are none."""
    gated: tuple[Change, ...] = ()
    """The step, and other metrics where the gate names them: these decide."""
    phases: tuple[Change, ...] = ()
    """Where a changed step changed. Phases vary more than the step, so that they decide nothing."""
    notes: tuple[Note, ...] = ()


class Absence(Noun, frozen=True, kw_only=True):
    """A case that has figures on one side only, and what became of it on the other."""

    case: Case
    reason: str


class Comparison(Noun, frozen=True, kw_only=True):
    """Two results side by side."""

    base: str
    new: str
    paired: bool
    """Whether processes were measured in turns, and are compared pair by pair."""
    gate: Gate
    verdict: Verdict
    """The worst of all cases; `incomparable` where nothing could be compared."""
    differences: tuple[str, ...] = ()
    """Between the environments."""
    refused: tuple[str, ...] = ()
    """Those of them that forbid a comparison; then no case is compared."""
    cases: tuple[CaseComparison, ...] = ()
    missing: tuple[Absence, ...] = ()
    """Cases that the base has and the new side has not."""
    added: tuple[Absence, ...] = ()
    """Cases that only the new side has."""


_ORDER: tuple[Verdict, ...] = ("incomparable", "regressed", "inconclusive", "improved", "unchanged")


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict that a reader must hear of first. Raises ValueError for none."""
    return min(verdicts, key=_ORDER.index)


def are_one_run(base: Result, new: Result) -> bool:
    """Whether these are the two sides of one `bsprof ab`, whose processes make pairs."""
    return base.turns is not None and new.turns is not None and base.turns.run == new.turns.run


def compare(
    base: Result, new: Result, gate: Gate, *, names: tuple[str, str] = ("base", "new"), paired: bool | None = None
) -> Comparison:
    """Compare two results case by case.

    The unit is the process: a case with one process on a side has a ratio, but no interval, and is inconclusive.
    `paired`: the processes of a case were measured in turns, the i-th of both sides together; by default that holds
    for the sides of one `bsprof ab`, whose cases belong together whatever their settings. A case regressed or
    improved where the 95 % interval of new / base lies beyond the threshold, after Holm's correction for how many
    figures decide (for phases: how many the case has), and is unchanged where the interval lies within. Where batch
    sizes differ it is samples a second that decide, and phases are told a sample.
    Raises KeyError for a metric of the gate that there is not.
    """
    one_run = are_one_run(base, new)
    how = _How(one_run if paired is None else paired, one_run and base.turns is not None and base.turns.together)
    metrics = {key: find_metric(key) for key in ("step", *gate.metrics)}
    differences = environment_differences(base.environment, new.environment)
    refused = [one for one in differences if one.name in MACHINE and one.name not in gate.allow]
    if one_run:
        base, new = _whole_pairs(base, new)
    before, after = ({case.case.key: case for case in summarise(result)} for result in (base, new))
    if one_run and len(before) == len(after) == 1:
        after = dict(zip(before, after.values(), strict=True))
    both = [key for key in before if before[key].ok and key in after and after[key].ok]
    facing = [] if refused else [_facing(before[key], after[key], metrics, gate, how) for key in both]
    cases = tuple(_decided(facing))
    return Comparison(
        base=names[0],
        new=names[1],
        paired=how.paired,
        gate=gate,
        verdict=worst([case.verdict for case in cases] or ["incomparable"]),
        differences=tuple(map(str, differences)),
        refused=tuple(map(str, refused)),
        cases=cases,
        missing=tuple(_absences(before, after)),
        added=tuple(_absences(after, before)),
    )


def _whole_pairs(base: Result, new: Result) -> tuple[Result, Result]:
    """Return both sides without what has figures on one of them only; failures stay."""
    well = [{one.case.process for one in side.measurements if one.outcome.kind == "ok"} for side in (base, new)]
    whole = well[0] & well[1]
    base, new = (
        msgspec.structs.replace(
            side,
            measurements=[one for one in side.measurements if one.outcome.kind != "ok" or one.case.process in whole],
        )
        for side in (base, new)
    )
    return base, new


def _absences(here: Mapping[str, CaseSummary], there: Mapping[str, CaseSummary]) -> Iterator[Absence]:
    for key, case in here.items():
        if not case.ok or (key in there and there[key].ok):
            continue
        failures = there[key].failures if key in there else []
        outcome = failures[0].outcome if failures else None
        reason = "was not measured" if outcome is None else f"{outcome.kind}: {outcome.message or 'no reason given'}"
        yield Absence(case=case.case, reason=reason)


class _Figure(NamedTuple):
    """A metric of a case on both sides, before it is decided upon."""

    metric: Metric
    base: float
    new: float
    ratio: stats.Ratio
    threshold: float

    def decided(self, chance: float) -> Change:
        """Return the Change, given the p-value that is left after correction."""
        ratio = self.ratio
        verdict: Verdict = "inconclusive"
        if chance < ONE_SIDED:
            verdict = "regressed" if (ratio.value > 1) == (self.metric.better != "higher") else "improved"
        elif ratio.is_within(self.threshold):
            verdict = "unchanged"
        return Change(
            metric=self.metric.key,
            label=self.metric.label,
            unit=self.metric.unit,
            base=self.base,
            new=self.new,
            ratio=ratio.value,
            low=ratio.low,
            high=ratio.high,
            detectable=ratio.detectable(self.threshold),
            threshold=self.threshold,
            verdict=verdict,
        )


class _How(NamedTuple):
    """How the processes of both sides belong together."""

    paired: bool
    """The i-th of both were measured in turns."""
    in_turns: bool
    """The i-th of both are one process."""


class _Facing(NamedTuple):
    """A case on both sides, before it is decided upon."""

    base: CaseSummary
    new: CaseSummary
    refused: list[str]
    gated: list[_Figure]
    phases: list[_Figure]


def _facing(base: CaseSummary, new: CaseSummary, metrics: Mapping[str, Metric], gate: Gate, how: _How) -> _Facing:
    refused = list(_conditions(base, new))
    if refused:
        return _Facing(base, new, refused, [], [])
    step = _threshold(gate, base.case)
    batches = tuple(case.readings[0].samples.batch_size or 1 for case in (base, new))
    if batches[0] != batches[1]:
        metrics = {"throughput": find_metric("throughput"), **{k: m for k, m in metrics.items() if k != "step"}}
    gated = [
        figure
        for key, metric in metrics.items()
        if (figure := _figure(metric, base, new, gate.metrics.get(key, step), how)) is not None
    ]
    phases = []
    for phase in order_phases([*base.phases, *new.phases]):
        if max(case.value(f"{phase}.share") or 0.0 for case in (base, new)) >= JUDGED:
            phases.append(_figure(find_metric(f"{phase}.time"), base, new, step, how, batches))
    return _Facing(base, new, refused, gated, [figure for figure in phases if figure is not None])


def _conditions(base: CaseSummary, new: CaseSummary) -> Iterator[str]:
    for name in CONDITIONS:
        before, after = (getattr(case.facts, name, None) for case in (base, new))
        asked = {getattr(case.settings, name, None) for case in (base, new)}
        if before != after and len(asked) == 1:  # else that is what is compared
            yield str(Difference(name, _show(before), _show(after)))


def _threshold(gate: Gate, case: Case) -> float:
    fitting = [
        one.threshold
        for one in gate.cases
        if all(getattr(case.settings, axis, None) == value for axis, value in one.settings.items())
    ]
    return fitting[-1] if fitting else gate.threshold


def _figure(
    metric: Metric,
    base: CaseSummary,
    new: CaseSummary,
    threshold: float,
    how: _How,
    batches: tuple[int, ...] = (1, 1),
) -> _Figure | None:
    """Return a metric on both sides, or None where a side has none, or no positive one: nothing has no ratio.

    Where `batches` differ it is told a sample.
    """
    before, after = (_values(metric, case.readings) for case in (base, new))
    if not before or not after or min(*before, *after) <= 0:
        return None
    if how.in_turns and len(before) == len(base.readings) == len(after) == len(new.readings):
        ratios = [_ratio_in_turns(metric, *both) for both in zip(base.readings, new.readings, strict=True)]
        after = [b if ratio is None else a * ratio for a, b, ratio in zip(before, after, ratios, strict=True)]
    if batches[0] != batches[1]:
        metric = metric._replace(label=f"{metric.label} a sample")
        before, after = ([one / batch for one in side] for side, batch in zip((before, after), batches, strict=True))
    ratio = stats.change(after, before, paired=how.paired and len(before) == len(after))
    return _Figure(metric, stats.geometric_mean(before), stats.geometric_mean(after), ratio, threshold)


def _ratio_in_turns(metric: Metric, base: Reading, new: Reading) -> float | None:
    """Return new / base of a time, or of samples a second, from turns that were neighbours; None for another metric.

    The median over the turns of the ratio of both sides' mean steps. What slows the machine for longer than a turn is
    in neither, where the ratio of the two medians has all of it.
    """
    phase, _, kind = metric.key.rpartition(".")
    if metric.key not in ("step", "throughput") and kind != "time":
        return None
    sides = [side.turns(phase or None) for side in (base, new)]
    ratios: list[float] = [b / a for a, b in zip(*sides, strict=False) if a and b]
    if not ratios:
        return None
    ratio = statistics.median(ratios)
    if metric.key == "throughput":
        return (new.samples.batch_size or 1) / (base.samples.batch_size or 1) / ratio
    return ratio


def _values(metric: Metric, readings: Sequence[Reading]) -> list[float]:
    return [value for value in map(metric.compute, readings) if value is not None]


def _decided(found: Sequence[_Facing]) -> Iterator[CaseComparison]:
    """Yield the cases with their verdicts, corrected for how many figures decide, and for the phases of each."""
    figures = [figure for one in found for figure in one.gated]
    chances = iter(_corrected(figures))
    for one in found:
        gated = tuple(figure.decided(next(chances)) for figure in one.gated)
        undecided: Verdict = "incomparable" if one.refused else "inconclusive"
        yield CaseComparison(
            case=one.base.case,
            base_processes=len(one.base.readings),
            new_processes=len(one.new.readings),
            verdict=worst([change.verdict for change in gated] or [undecided]),
            refused=tuple(one.refused),
            gated=gated,
            phases=tuple(map(_Figure.decided, one.phases, _corrected(one.phases))),
            notes=tuple(_notes(one.base, one.new)),
        )


def _corrected(figures: Sequence[_Figure]) -> list[float]:
    return stats.holm([figure.ratio.chance(figure.threshold) for figure in figures])


# --- what else differs ------------------------------------------------------------------------------


def _notes(base: CaseSummary, new: CaseSummary) -> Iterator[Note]:
    """Yield what must be known before a change is believed, each with the figure behind it."""
    if min(len(base.readings), len(new.readings)) < 2:
        sides = f"{len(base.readings)} in the base, {len(new.readings)} in the new"
        yield Note(
            code="one_process",
            text=f"{sides}: one process has no interval, its steps being no samples of their own; `--repeat 5`",
        )
    before, after = base.value("minor_faults"), new.value("minor_faults")
    if before is not None and after is not None and max(before, after) >= MANY_FAULTS:
        less, more = sorted((before, after))
        if more >= 2 * less:
            yield Note(
                code="faults_differ",
                text=f"minor page faults a step went from {before:.0f} to {after:.0f}: memory given back and taken "
                "again costs time; `--malloc pinned` takes it out of the comparison",
            )
    texts = {note.code: note.text for side in (new, base) for note in side.notes}
    for code in texts:
        counts = [sum(any(n.code == code for n in one.notes) for one in side.measurements) for side in (base, new)]
        if counts[0] != counts[1] or code in DISTURBANCES:
            yield Note(
                code=code,
                text=f"in {counts[0]} of {len(base.measurements)} processes of the base and {counts[1]} of "
                f"{len(new.measurements)} of the new: {texts[code]}",
            )


def varying(comparison: Comparison) -> list[str]:
    """Return the axes with more than one value among all cases of both sides, in table order."""
    here = [one.case for one in comparison.cases]
    absent = [one.case for one in (*comparison.missing, *comparison.added)]
    return varying_axes(case.settings for case in (*here, *absent))
