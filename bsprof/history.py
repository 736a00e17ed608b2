"""Many results of one machine, in order of time: where each case's level stepped, and which way it drifts."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from bsprof import stats
from bsprof.compare import CONDITIONS, ONE_SIDED, Absence, Difference
from bsprof.metrics import Metric, Unit, summarise, varying_axes
from bsprof.model import Case, Environment, Result
from bsprof.noun import Noun

# --- what is kept of a result -----------------------------------------------------------------------


class Figure(NamedTuple):
    """A metric of one case in one result."""

    case: Case
    value: float
    """Geometric mean of the processes' own."""
    conditions: dict[str, Any]


class Moment(NamedTuple):
    """All that a history needs of a result: thousands of them fit where a few whole ones would."""

    name: str
    """The file's."""
    created: datetime.datetime
    environment: Environment
    figures: dict[str, Figure]
    """By the case's key: of cases that ended well and whose figure is positive, so that it has a ratio."""


def moment(name: str, result: Result, metric: Metric) -> Moment:
    """Return what a history of `metric` needs of a result. Raises ValueError where `created` is no time."""
    try:
        created = datetime.datetime.fromisoformat(result.created)
    except ValueError:
        raise ValueError(f"$.created: '{result.created}' is no time (ISO 8601)") from None
    if created.tzinfo is None:
        created = created.replace(tzinfo=datetime.UTC)
    figures = {}
    for summary in summarise(result):
        values = [value for value in map(metric.compute, summary.readings) if value is not None]
        if summary.ok and values and min(values) > 0:
            conditions = {condition: getattr(summary.facts, condition, None) for condition in CONDITIONS}
            figures[summary.case.key] = Figure(summary.case, stats.geometric_mean(values), conditions)
    return Moment(name, created.astimezone(datetime.UTC), result.environment, figures)


# --- what has become of a case ----------------------------------------------------------------------

Verdict = Literal["incomparable", "regressed", "inconclusive", "improved", "steady"]
"""In the order in which a reader must hear of them."""

_ORDER: tuple[Verdict, ...] = ("incomparable", "regressed", "inconclusive", "improved", "steady")


class Shift(Noun, frozen=True, kw_only=True):
    """How many times as large a level is as an earlier one, with the 95 % interval."""

    ratio: float
    low: float | None = None
    high: float | None = None


class Segment(Noun, frozen=True, kw_only=True):
    """Results in a row that share one level."""

    since: str
    """When its first result was made (UTC, ISO 8601), and its last."""
    until: str
    results: int
    value: float
    """Geometric mean of the results, outliers drawn in."""
    change: Shift | None = None
    """From the segment before; null for the first."""


class Drift(Noun, frozen=True, kw_only=True):
    """The last step, together with those right before it that went the same way."""

    since: str
    """When the first of the steps was seen."""
    steps: int
    change: Shift
    """From the level before the first of them to the newest."""


class CaseHistory(Noun, frozen=True, kw_only=True):
    """One case over all results that have it."""

    case: Case
    results: int
    verdict: Verdict
    segments: tuple[Segment, ...] = ()
    drift: Drift | None = None
    """Null where there is no step."""
    refused: tuple[str, ...] = ()
    """Why its results do not belong side by side; then there are no segments."""


class History(Noun, frozen=True, kw_only=True):
    """A metric of every case of the newest result, followed over all results."""

    metric: str
    label: str
    unit: Unit
    threshold: float
    results: int
    since: str
    until: str
    verdict: Verdict
    """The worst of all cases; `incomparable` where the newest result has none."""
    cases: tuple[CaseHistory, ...] = ()
    ended: tuple[Absence, ...] = ()
    """Cases of earlier results that the newest has no figure of: they decide nothing."""


def history(moments: Sequence[Moment], metric: Metric, threshold: float) -> History:
    """Follow a metric over results, one or more, of one machine.

    The unit is the result: processes of one result share what the machine was like just then. What is judged is the
    *drift*: the newest segment against the one that the last steps in one direction began from. So a case that creeps,
    each step smaller than the threshold, is found as one that stepped once. It regressed or improved where the 95 %
    interval of that lies beyond the threshold, after Holm's correction for how many cases there are, and is steady
    without a step, or where the interval lies within.
    """
    moments = sorted(moments, key=lambda one: (one.created, one.name))
    newest = moments[-1]
    followed = [_follow(moments, key) for key in newest.figures]
    chances = stats.holm([1.0 if one.drift is None else one.drift.ratio.chance(threshold) for one in followed])
    cases = tuple(one.judged(metric, threshold, chance) for one, chance in zip(followed, chances, strict=True))
    return History(
        metric=metric.key,
        label=metric.label,
        unit=metric.unit,
        threshold=threshold,
        results=len(moments),
        since=_written(moments[0]),
        until=_written(newest),
        verdict=min((case.verdict for case in cases), key=_ORDER.index, default="incomparable"),
        cases=cases,
        ended=tuple(_ended(moments)),
    )


def _ended(moments: Sequence[Moment]) -> Iterator[Absence]:
    last = {key: one for one in moments for key in one.figures}
    for key, one in last.items():
        if one is not moments[-1]:
            yield Absence(case=one.figures[key].case, reason=f"last measured {_written(one)}, in {one.name}")


def _written(one: Moment) -> str:
    return one.created.isoformat(timespec="seconds").replace("+00:00", "Z")


class _Drift(NamedTuple):
    """A drift before it is judged: from which segment on, and how far."""

    begin: int
    ratio: stats.Ratio


class _Followed(NamedTuple):
    """A case over the results that have it, before it is judged."""

    case: Case
    moments: list[Moment]
    refused: list[str]
    levels: stats.Levels
    drift: _Drift | None

    def judged(self, metric: Metric, threshold: float, chance: float) -> CaseHistory:
        """Return the CaseHistory, given the p-value that is left after correction."""
        return CaseHistory(
            case=self.case,
            results=len(self.moments),
            verdict="incomparable" if self.refused else self._verdict(metric, threshold, chance),
            segments=() if self.refused else tuple(map(self._segment, range(len(self.levels.segments)))),
            drift=None if self.refused else self._told_drift(),
            refused=tuple(self.refused),
        )

    def _verdict(self, metric: Metric, threshold: float, chance: float) -> Verdict:
        if self.drift is None or self.drift.ratio.is_within(threshold):
            return "steady"
        if chance >= ONE_SIDED:
            return "inconclusive"
        return "regressed" if (self.drift.ratio.value > 1) == (metric.better != "higher") else "improved"

    def _segment(self, index: int) -> Segment:
        part = self.levels.segments[index]
        return Segment(
            since=_written(self.moments[part.start]),
            until=_written(self.moments[part.stop - 1]),
            results=len(part),
            value=self.levels.means[index],
            change=_shift(self.levels.change(index, index - 1)) if index else None,
        )

    def _told_drift(self) -> Drift | None:
        if self.drift is None:
            return None
        begin, ratio = self.drift
        segments = self.levels.segments
        first = self.moments[segments[begin + 1].start]
        return Drift(since=_written(first), steps=len(segments) - 1 - begin, change=_shift(ratio))


def _follow(moments: Sequence[Moment], key: str) -> _Followed:
    having = [one for one in moments if key in one.figures]
    figures = [one.figures[key] for one in having]
    levels = stats.fit_levels([figure.value for figure in figures])
    begin = len(levels.means) - 1
    while begin and (begin == len(levels.means) - 1 or _rises(levels, begin) == _rises(levels, begin + 1)):
        begin -= 1
    drift = _Drift(begin, levels.change(-1, begin)) if len(levels.means) > 1 else None
    return _Followed(figures[-1].case, having, list(_refused(having, key)), levels, drift)


def _rises(levels: stats.Levels, index: int) -> bool:
    """Whether the step into a segment goes up."""
    return levels.means[index] > levels.means[index - 1]


def _refused(having: Sequence[Moment], key: str) -> Iterator[str]:
    """Yield which results measured the case under other conditions than the newest did, each condition once."""
    newest = having[-1]
    for name, now in newest.figures[key].conditions.items():
        other = next((one for one in reversed(having) if one.figures[key].conditions[name] != now), None)
        if other is not None:
            difference = Difference(name, str(other.figures[key].conditions[name]), str(now))
            yield f"{difference}, from {other.name} to {newest.name}"


def _shift(ratio: stats.Ratio) -> Shift:
    return Shift(ratio=ratio.value, low=ratio.low, high=ratio.high)


def varying(told: History) -> list[str]:
    """Return the axes with more than one value among all cases, in table order."""
    return varying_axes(
        case.settings for case in [*(one.case for one in told.cases), *(one.case for one in told.ended)]
    )
