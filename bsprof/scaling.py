"""How training gets faster with more ranks, what holds it back, and what a model of the exchange says of larger worlds.

Everything is derived from a result's cases and can be derived again from a saved one. A prediction is never put in the
place of a measurement, and there is none without the scatter of what it rests on.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scipy.special import stdtrit

from bsprof import stats
from bsprof.exchange import Exchange, Late, Split, exchange, late, skew, skew_by_phase, split
from bsprof.metrics import METRICS, CaseSummary
from bsprof.model import AXES, AllReduce, Result
from bsprof.stats import Estimate

FARTHER = (2, 4, 8)
"""Multiples of the largest world measured that are predicted."""

# --- each case, and the one it is held against --------------------------------------------------------


class Efficiency(NamedTuple):
    """Samples a second of a world, as a share of what as many times the base's ranks would deliver if nothing was lost.

    (samples/s / samples/s of the base) / (ranks / ranks of the base), with its 95 % interval.
    """

    value: float
    low: float | None
    high: float | None
    between: bool
    """Whether the interval is between processes, Welch's t on logarithms; else it joins those of two medians."""


class Scaled(NamedTuple):
    """A case of any number of ranks, and what follows from it."""

    case: CaseSummary
    world: int
    base: CaseSummary | None
    """The case of the smallest world that is alike otherwise; None where this is it."""
    efficiency: Efficiency | None
    split: Split | None
    """Means over the processes."""
    exposed: Estimate | None
    exchange: Exchange | None
    """Of the first process that told."""
    skews: dict[str, float]
    """By phase, in the first process that told."""
    uneven: bool
    """Whether the skew is surely above zero, in each process."""
    late: Late | None
    """The rank that was named in the most processes, as it was in the first of these."""
    named: int
    """So many."""

    @property
    def processes(self) -> int:
        """How many times the world was started."""
        return len(self.case.readings)


def scaled(result: Result, cases: Sequence[CaseSummary]) -> list[Scaled]:
    """Return every case of several ranks and those of one rank that they are held against; none where none has ranks.

    Under weak scaling cases belong together that have the same batch of a rank, under strong scaling those with the
    same batch of all ranks together; in all other settings they agree.
    """
    usable = [case for case in cases if case.ok and case.settings is not None and case["step"] is not None]
    if not any(reading.ranks for case in usable for reading in case.readings):
        return []
    strong = is_strong(result)
    found = []
    for case, relatives in _with_relatives(usable, strong):
        if any(reading.ranks for relative in relatives for reading in relative.readings):
            base = min(relatives, key=_world)
            found.append(_scaled(case, base if _world(base) < _world(case) else None))
    return found


def _scaled(case: CaseSummary, base: CaseSummary | None) -> Scaled:
    exchanges = [told for reading in case.readings if (told := exchange(reading))]
    skews = [phases for reading in case.readings if (phases := skew_by_phase(reading))]
    lates = [one for reading in case.readings if (one := late(reading))]
    splits = [whole for reading in case.readings if (whole := split(reading))]
    uneven = [estimate for reading in case.readings if (estimate := skew(reading))]
    exposed = case["exposed"]
    named = Counter(one.rank for one in lates).most_common(1)
    return Scaled(
        case=case,
        world=_world(case),
        base=base,
        efficiency=efficiency(case, base) if base else None,
        split=_mean_split(splits),
        exposed=exposed if isinstance(exposed, Estimate) else None,
        exchange=exchanges[0] if exchanges else None,
        skews=skews[0] if skews else {},
        uneven=bool(uneven) and all(estimate.low is not None and estimate.low > 0 for estimate in uneven),
        late=next((one for one in lates if one.rank == named[0][0]), None),
        named=named[0][1] if named else 0,
    )


def _mean_split(splits: Sequence[Split]) -> Split | None:
    """Return the mean of each part; None for a part that one process does not know."""
    if not splits:
        return None
    means = []
    for values in zip(*splits, strict=True):
        known = [value for value in values if value is not None]
        means.append(statistics.fmean(known) if len(known) == len(values) else None)
    step, compute, exposed, skew, loading = means
    return Split(step or 0.0, compute, exposed, skew, loading)


def _world(case: CaseSummary) -> int:
    return case.settings.world_size if case.settings else 1


def is_strong(result: Result) -> bool:
    """Whether all ranks together have the batch that was asked for, and not each of them."""
    return result.plan is not None and result.plan.scaling == "strong"


_OF_RANKS = tuple(name for name, axis in AXES.items() if axis.info.needs in ("ranks", "cuda ranks"))
"""Axes that one rank alone has no use for."""


def _family(case: CaseSummary, strong: bool) -> tuple[object, ...]:
    """Return what cases have in common that may be held against each other: all but the world, and what needs one."""
    settings = case.settings
    names = [name for name in AXES if name not in ("world_size", *_OF_RANKS)]
    if settings is None:
        return ()
    scale = {"batch_size": settings.batch_size * settings.world_size} if strong else {}
    return tuple(scale.get(name, getattr(settings, name)) for name in names)


def _with_relatives(cases: Sequence[CaseSummary], strong: bool) -> Iterator[tuple[CaseSummary, list[CaseSummary]]]:
    """Yield each case with those that differ from it in the number of ranks alone, itself among them."""
    families: dict[tuple[object, ...], list[CaseSummary]] = {}
    for case in cases:
        families.setdefault(_family(case, strong), []).append(case)

    def ways(one: CaseSummary) -> list[object]:
        return [getattr(one.settings, name) for name in _OF_RANKS]

    for case in cases:
        family = families[_family(case, strong)]
        yield case, [one for one in family if 1 in (_world(one), _world(case)) or ways(one) == ways(case)]


def efficiency(case: CaseSummary, base: CaseSummary) -> Efficiency | None:
    """Return how well `case` uses its ranks against `base`; None where one has no throughput.

    Where both have two processes or more the interval is between them (Welch's t on logarithms). Else it joins the
    intervals of the two medians, each within a process, on a logarithmic scale: the distances to their ends add up as
    squares (MOVER; Zou & Donner 2008, Construction of confidence limits about effect measures).
    """
    times = _world(case) / _world(base)
    new, old = ([value for one in each.readings if (value := _THROUGHPUT(one))] for each in (case, base))
    if not new or not old:
        return None
    if min(len(new), len(old)) > 1:
        ratio = stats.change(new, old, paired=False)
        low, high = (None if end is None else end / times for end in (ratio.low, ratio.high))
        return Efficiency(ratio.value / times, low, high, between=True)
    value = stats.geometric_mean(new) / stats.geometric_mean(old) / times
    ends = case.interval("throughput"), base.interval("throughput")
    if ends[0] is None or ends[1] is None or min(ends[0][0], ends[1][0]) <= 0:
        return Efficiency(value, None, None, between=False)
    (new_low, new_high), (old_low, old_high) = ([math.log(end) for end in pair] for pair in ends if pair)
    middle = [math.log(stats.geometric_mean(side)) for side in (new, old)]
    down = math.hypot(middle[0] - new_low, old_high - middle[1])
    up = math.hypot(new_high - middle[0], middle[1] - old_low)
    return Efficiency(value, value * math.exp(-down), value * math.exp(up), between=False)


_THROUGHPUT = METRICS["throughput"].compute


def costs(one: Scaled, base: Scaled | None) -> dict[str, float]:
    """Return what each part of the mean step costs beyond what it should take, in seconds, signed.

    It should take the base's time, times the samples that a rank now has over those that it had there: all of it under
    weak scaling, half of it for twice the ranks under strong scaling. Together the costs are what keeps the efficiency
    from 100 %. Without a base, compute and loading have nothing to be held against and are left out.
    """
    whole = one.split
    if whole is None:
        return {}
    parts = {
        "compute": whole.compute_s,
        "communication": whole.exposed_s,
        "skew": whole.skew_s,
        "loading": whole.loading_s,
    }
    if base is None or base.split is None or one.case.settings is None or base.case.settings is None:
        return {name: value for name in ("communication", "skew") if (value := parts[name]) is not None}
    share = one.case.settings.batch_size / base.case.settings.batch_size
    before = dict(zip(parts, base.split[1:], strict=True))
    return {name: value - share * (before[name] or 0.0) for name, value in parts.items() if value is not None}


# --- a model of the exchange --------------------------------------------------------------------------


class Ring(NamedTuple):
    """How long an all-reduce takes, by a latency and a bandwidth: t(n, p) = 2 (p - 1) alpha + 2 (p - 1) / p x n / beta.

    Each of p ranks passes n / p bytes on 2 (p - 1) times: the ring algorithm for long messages (Thakur, Rabenseifner &
    Gropp 2005, Optimization of collective communication operations in MPICH) in the model of a fixed cost for a message
    and one for a byte (Hockney 1994, The communication challenge for MPP). The time for adding up is in beta.
    """

    alpha_s: float
    s_per_byte: float
    """1 / beta."""
    scatter: float
    """Standard deviation of measured / fitted - 1, on n - 2 degrees of freedom."""
    freedom: int
    covariance: tuple[float, float, float]
    """Of alpha and 1 / beta over the squared scatter: its diagonal and what is off it, last."""

    @property
    def beta(self) -> float | None:
        """Bytes a second, or None where bytes cost nothing that could be measured."""
        return 1 / self.s_per_byte if self.s_per_byte else None

    def seconds(self, sizes: Sequence[int], world: int) -> float:
        """Return how long all-reduces of these sizes take one after the other."""
        messages, volume = _demand(sizes, world)
        return messages * self.alpha_s + volume * self.s_per_byte

    def at(self, size: int, world: int) -> Estimate:
        """Return the time of one all-reduce, with the interval in which a new measurement of it is expected.

        Weighted least squares with a scatter that is proportional to the time (Draper & Smith 1998, Applied Regression
        Analysis, chapter 9): half-width t(n - 2) s sqrt(y^2 + x' C x).
        """
        value = self.seconds([size], world)
        half = self._reach * math.sqrt(value**2 + self._variance(*_demand([size], world)))
        return Estimate(value, value - half, value + half, self.freedom + 2, float(self.freedom + 2))

    def growth(self, sizes: Sequence[int], world: int, larger: int) -> Estimate:
        """Return how many times as long all-reduces take in a larger world, with a 95 % interval.

        The errors of alpha and beta are carried over to first order (the delta method); what measurements scatter about
        the model is added twice, for either world's time.
        """
        now, then = self.seconds(sizes, world), self.seconds(sizes, larger)
        value = then / now
        ahead, here = _demand(sizes, larger), _demand(sizes, world)
        slope = [(a - value * b) / now for a, b in zip(ahead, here, strict=True)]
        half = self._reach * math.sqrt(2 * value**2 + self._variance(slope[0], slope[1]))
        return Estimate(value, value - half, value + half, self.freedom + 2, float(self.freedom + 2))

    @property
    def _reach(self) -> float:
        return float(stdtrit(self.freedom, 0.975)) * self.scatter

    def _variance(self, messages: float, volume: float) -> float:
        first, second, both = self.covariance
        return max(0.0, messages**2 * first + volume**2 * second + 2 * messages * volume * both)


def _demand(sizes: Sequence[int], world: int) -> tuple[float, float]:
    """Return how many messages follow each other, and how many bytes they carry."""
    return 2.0 * (world - 1) * len(sizes), 2 * (world - 1) / world * sum(sizes)


def fit(points: Sequence[AllReduce]) -> Ring | None:
    """Return the model that fits measured all-reduces best, by least squares of measured / fitted - 1.

    Relative errors, since times span orders of magnitude. Neither alpha nor 1 / beta may be negative: where the best
    fit has it so, the better of those with one of them at zero is taken. None for fewer than three measurements, that
    leave no scatter to be seen, and for such as do not differ in size.
    """
    usable = [one for one in points if one.world_size > 1 and one.seconds > 0 and one.bytes > 0]
    if len(usable) < 3 or len({one.bytes for one in usable}) < 2:
        return None
    rows = [[each / one.seconds for each in _demand([one.bytes], one.world_size)] for one in usable]
    aa, bb, ab = (math.fsum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (1, 1), (0, 1)))
    a, b = (math.fsum(row[i] for row in rows) for i in (0, 1))
    freedom = len(usable) - 2

    def made(alpha: float, s_per_byte: float, covariance: tuple[float, float, float]) -> Ring:
        squares = math.fsum((row[0] * alpha + row[1] * s_per_byte - 1) ** 2 for row in rows)
        return Ring(alpha, s_per_byte, math.sqrt(squares / freedom), freedom, covariance)

    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        alpha, s_per_byte = (bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant
        if alpha >= 0 and s_per_byte >= 0:
            return made(alpha, s_per_byte, (bb / determinant, aa / determinant, -ab / determinant))
    one_sided = made(a / aa, 0.0, (1 / aa, 0.0, 0.0)), made(0.0, b / bb, (0.0, 1 / bb, 0.0))
    return min(one_sided, key=lambda ring: ring.scatter)


class Checked(NamedTuple):
    """What the model said of a size that it had not been shown."""

    world: int
    bytes: int
    predicted: Estimate
    measured: float

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted.value / self.measured - 1

    @property
    def holds(self) -> bool:
        """Whether the measurement lies in the interval."""
        low, high = self.predicted.low, self.predicted.high
        return low is not None and high is not None and low <= self.measured <= high


def checked(points: Sequence[AllReduce]) -> Checked | None:
    """Fit all but the largest size and predict that, in the largest world it was measured in; None with too few."""
    usable = [one for one in points if one.world_size > 1 and one.seconds > 0]
    if not usable:
        return None
    largest = max(one.bytes for one in usable)
    ring = fit([one for one in usable if one.bytes < largest])
    asked = max((one for one in usable if one.bytes == largest), key=lambda one: one.world_size)
    if ring is None:
        return None
    return Checked(asked.world_size, largest, ring.at(largest, asked.world_size), asked.seconds)


# --- larger worlds ------------------------------------------------------------------------------------


class Predicted(NamedTuple):
    """What a world that was not measured would do, at the same batch of each rank."""

    world: int
    step: Estimate
    """Mean step in seconds with its 95 % interval."""
    exposed_s: float
    throughput: float | None
    efficiency: float | None
    """Against the same base as the measured world's; None where there is none, and under strong scaling."""


class Outlook(NamedTuple):
    """Predictions that start from one measured case."""

    start: Scaled
    ring: Ring
    points: int
    """All-reduces that the model was fitted to."""
    check: Checked | None
    worlds: tuple[Predicted, ...]
    """Empty where the case has no exposed communication that could grow."""


def outlooks(result: Result, rows: Sequence[Scaled]) -> list[Outlook]:
    """Return predictions from the largest world of each family of cases; none where no all-reduces were measured."""
    strong = is_strong(result)
    measured = result.ceilings.all_reduce if result.ceilings else ()
    found = []
    for row, (_, relatives) in zip(rows, _with_relatives([row.case for row in rows], strong), strict=True):
        if row.exchange is None or row.exposed is None or row.world < max(map(_world, relatives)):
            continue
        points = [one for one in measured if one.backend == row.exchange.backend]
        ring = fit(points)
        if ring is not None:
            worlds = tuple(predict(row, ring, strong=strong))
            found.append(Outlook(row, ring, len(points), checked(points), worlds))
    return found


def predict(row: Scaled, ring: Ring, *, strong: bool = False) -> list[Predicted]:
    """Return 2, 4 and 8 times the ranks of a measured world, each with the batch that it has there.

    Compute, loading and skew stay as they were measured; exposed communication E grows as the ring does. What is hidden
    is supposed to grow in proportion. The mean step T contains E, so that T' = T + E (growth - 1), and the half-width
    of the 95 % interval joins E's, times growth - 1, with the growth's, times E, as squares. Nothing is predicted where
    there is no exposed communication above zero, or where its interval or its parts are not known.
    """
    estimate, whole, told = row.exposed, row.split, row.exchange
    if estimate is None or whole is None or told is None or not told.buckets:
        return []
    if estimate.value <= 0 or estimate.high is None or ring.seconds(told.buckets, row.world) <= 0:
        return []
    found = []
    for times in FARTHER:
        growth = ring.growth(told.buckets, row.world, times * row.world)
        step = whole.step_s + estimate.value * (growth.value - 1)
        side = (estimate.high - estimate.value) * (growth.value - 1)
        half = math.hypot(side, estimate.value * ((growth.high or growth.value) - growth.value))
        throughput, share = row.case.value("throughput"), row.efficiency.value if row.efficiency else None
        found.append(
            Predicted(
                world=times * row.world,
                step=Estimate(step, step - half, step + half, estimate.n, estimate.effective),
                exposed_s=estimate.value * growth.value,
                throughput=throughput * times * whole.step_s / step if throughput is not None else None,
                efficiency=share * whole.step_s / step if share is not None and not strong else None,
            )
        )
    return found
