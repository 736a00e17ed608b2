"""Pure numbers in, pure numbers out: intervals that keep what they promise, and when a series is steady.

Steps of one process are not independent, so a series of n steps is worth fewer than n samples: within a
process every interval is taken at the *effective* size. Between processes the unit is the process.
Functions take lists or arrays of ints or floats, whatever the unit, and refuse what is empty or not finite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

# Not scipy.stats: it takes ten times as long to import, and `bsprof show` has to start at once.
from scipy.special import betainc, chdtri, ndtri, stdtr, stdtrit

Numbers: TypeAlias = Sequence[float] | NDArray[Any]


class Estimate(NamedTuple):
    """A value with its interval, in the unit of what was measured."""

    value: float
    low: float | None
    """Null, as `high` is, where there are too few samples for an interval at the level asked for."""
    high: float | None
    n: int
    """Samples."""
    effective: float
    """What they are worth, autocorrelation taken into account: at most `n`."""

    @property
    def precision(self) -> float | None:
        """The interval's longer side as a fraction of the value; None without an interval."""
        if self.low is None or self.high is None:
            return None
        side = max(self.high - self.value, self.value - self.low)
        if side == 0:
            return 0.0
        return side / abs(self.value) if self.value else math.inf


def _checked(values: Numbers) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"expected a series of numbers, got {numbers.ndim} dimensions")
    if numbers.size == 0:
        raise ValueError("no values")
    if not np.isfinite(numbers).all():
        raise ValueError("values must be finite")
    return numbers


def _logs(values: Numbers) -> list[float]:
    """Return logarithms as plain floats: of a few processes' figures numpy's calls cost more than the arithmetic."""
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("no values")
    if not all(map(math.isfinite, numbers)):
        raise ValueError("values must be finite")
    if min(numbers) <= 0:
        raise ValueError("values must be positive")
    return [math.log(number) for number in numbers]


def _exp(exponent: float) -> float:
    """Return e to that power, and infinity beyond all floats: processes may lie orders of magnitude apart."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


# --- within a process -------------------------------------------------------------------------------


def effective_size(values: Numbers) -> float:
    """Return how many independent samples the series is worth, between 1 and n: n / (1 + 2 Σ r_k) for long ones.

    r_k is the autocorrelation at a distance of k steps. The sum ends by Geyer's initial monotone sequence (Geyer
    1992, Practical Markov chain Monte Carlo, section 3.3): sums of neighbouring pairs, as long as they are positive,
    none larger than the one before. The ranks are correlated, not the values, so that one outlier hides nothing.

    Subtracting a sample's own mean lowers every autocovariance by the variance of that mean (Marriott & Pope 1954),
    which makes short correlated series look better than they are. That variance being the step's over the effective
    size sought, adding it back to the m terms of the sum gives (n - m) / (1 + 2 Σ r_k) + 1. What bias is left matters
    below some 40 steps: 95 % intervals of medians of AR(1) series with r_1 = 0.6 cover 93 % at 40 steps, 86 % at 20.

    Raises ValueError for a series that is empty or not finite.
    """
    return _effective_size(_checked(values))


def _effective_size(numbers: NDArray[np.float64]) -> float:
    n = numbers.size
    ranks = _ranks(numbers)
    if n < 4 or not ranks.any():
        return float(n)
    padded = 1 << (2 * n - 1).bit_length()  # zeros, so that the end does not correlate with the beginning
    covariance = np.fft.irfft(np.abs(np.fft.rfft(ranks, padded)) ** 2, padded)[:n]
    pairs = (covariance / covariance[0])[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    initial = np.minimum.accumulate(pairs[: ends[0]] if ends.size else pairs)
    correlated = 2 * float(initial.sum()) - 1
    if correlated <= 1:
        return float(n)
    terms = 4 * initial.size - 1  # each pair on either side of distance zero, which is one and not two
    return min(max((n - terms) / correlated + 1, 1.0), float(n))


def _ranks(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each value's rank less the mean rank, equal values sharing theirs."""
    _, index, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[index]
    return ranks - (numbers.size + 1) / 2


def median(values: Numbers, level: float = 0.95) -> Estimate:
    """Return the median with the interval between two order statistics, at the effective sample size.

    P(X_(d) <= median <= X_(m+1-d)) = 1 - 2 P(Binomial(m, 1/2) < d) holds for any distribution. Between two
    neighbouring d it is interpolated (Hettmansperger & Sheather 1986, Confidence intervals based on interpolated order
    statistics), so that the coverage is near `level` rather than anywhere above it. m is the effective size,
    not a whole number: the binomial is continued by the incomplete beta function, and the ranks found among m
    are stretched to the n samples there are.

    There is no interval where even the extremes cover less than `level` (at 95 %: worth fewer than 5.4 samples).
    Raises ValueError for a series that is empty or not finite.
    """
    ordered = np.sort(numbers := _checked(values))
    n = ordered.size
    size = _effective_size(numbers)
    rank = _lower_rank(size, level)
    if rank is None:
        return Estimate(_middle(ordered), None, None, n, size)
    position = (rank - 0.5) / size * n - 0.5
    low, high = np.interp([position, n - 1 - position], np.arange(n), ordered)
    return Estimate(_middle(ordered), float(low), float(high), n, size)


def middle(values: Numbers) -> float:
    """Return the median alone: without its interval, which takes a hundred times as long to find.

    Raises ValueError for a series that is empty or not finite.
    """
    return _middle(np.sort(_checked(values)))


def _middle(ordered: NDArray[np.float64]) -> float:
    half = ordered.size // 2
    return float(ordered[half] if ordered.size % 2 else (ordered[half - 1] + ordered[half]) / 2)


def _lower_rank(size: float, level: float) -> float | None:
    """Return the rank, from 1 and fractional, of the interval's lower end in `size` samples."""
    outside = 1 - level
    if not 0 < outside < 1:
        raise ValueError("level must lie between 0 and 1")
    depths = np.arange(1, math.floor(size / 2) + 1)
    outer = 2 * betainc(size - depths + 1, depths, 0.5)  # 2 P(Binomial(size, 1/2) < depth)
    usable = int(np.searchsorted(outer, outside, side="right"))
    if not usable:
        return None
    depth = float(depths[usable - 1])
    inner = 2 * float(betainc(size - depth, depth + 1, 0.5)) if depth < size else 1.0
    share = (outside - float(outer[usable - 1])) / (inner - float(outer[usable - 1]))
    return min(depth + (size - depth) * share / (depth + (size - 2 * depth) * share), (size + 1) / 2)


def quantile(values: Numbers, p: float) -> float:
    """Return the p-quantile, interpolated between order statistics (type 7 of Hyndman & Fan 1996).

    Raises ValueError for a series that is empty or not finite, and for p outside 0 … 1.
    """
    return float(np.quantile(_checked(values), p))


# --- between processes ------------------------------------------------------------------------------


def between(values: Numbers, level: float = 0.95) -> Estimate:
    """Return the geometric mean of several processes' medians of one case, with Student's t interval on the logs.

    A process is the unit of inference (Kalibera & Jones 2013, Rigorous benchmarking in reasonable time): what its
    steps scatter inside is contained in the scatter between processes. One process has no interval.
    Raises ValueError for values that are none, not finite or not positive.
    """
    return _t_on_logs(_logs(values), level)


def geometric_mean(values: Numbers) -> float:
    """Return the geometric mean alone, without the interval that `between` gives it.

    Raises ValueError for values that are none, not finite or not positive.
    """
    return _exp(statistics.fmean(_logs(values)))


def paired_ratio(a: Numbers, b: Numbers, level: float = 0.95) -> Estimate:
    """Return the geometric mean of a[i] / b[i], with the paired Student's t interval on the log ratio.

    One pair has no interval. Raises ValueError for lengths that differ and for values that are none, not finite
    or not positive.
    """
    return _t_on_logs(_log_ratios(a, b), level)


def _log_ratios(a: Numbers, b: Numbers) -> list[float]:
    if len(a) != len(b):
        raise ValueError(f"pairs need as many values on both sides, got {len(a)} and {len(b)}")
    return [above - below for above, below in zip(_logs(a), _logs(b), strict=True)]


def _t_on_logs(logs: Sequence[float], level: float) -> Estimate:
    if not 0 < level < 1:
        raise ValueError("level must lie between 0 and 1")
    n, mean = len(logs), statistics.fmean(logs)
    if n < 2:
        return Estimate(math.exp(mean), None, None, n, float(n))
    value, low, high = _t_interval(mean, math.sqrt(_squares(logs) / (n - 1) / n), n - 1, level)
    return Estimate(value, low, high, n, float(n))


def _squares(values: Sequence[float]) -> float:
    """Return the sum of squared deviations from the mean."""
    mean = statistics.fmean(values)
    return math.fsum((value - mean) ** 2 for value in values)


def _t_interval(mean: float, error: float, freedom: float, level: float = 0.95) -> tuple[float, float, float]:
    """Return exp of a mean logarithm and of the ends of its Student's t interval."""
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    return _exp(mean), _exp(mean - half), _exp(mean + half)


def spread(values: Numbers) -> float | None:
    """Return max / min - 1 of processes' medians, or None for fewer than two.

    Raises ValueError for values that are not finite or not positive.
    """
    if len(values) < 2:
        return None
    logs = _logs(values)
    return math.expm1(max(logs) - min(logs))


def mean(values: Numbers, level: float = 0.95) -> Estimate:
    """Return the mean of independent values of any sign, as differences are, with Student's t interval.

    One value has no interval. Raises ValueError for values that are none or not finite.
    """
    if not 0 < level < 1:
        raise ValueError("level must lie between 0 and 1")
    numbers = _checked(values).tolist()
    n, centre = len(numbers), math.fsum(numbers) / len(numbers)
    if n < 2:
        return Estimate(centre, None, None, n, float(n))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(_squares(numbers) / (n - 1) / n)
    return Estimate(centre, centre - half, centre + half, n, float(n))


# --- two sides --------------------------------------------------------------------------------------

POWER = 0.8
"""Share of changes of the detectable size that are found."""


class Ratio(NamedTuple):
    """How many times as large one side is as the other, with the interval in which that is to be expected.

    Both sides are processes' figures, one value a process. `low` and `high` bound the 95 % interval; they are null, as
    `error` and `freedom` are, where a side has too few processes to have a scatter.
    """

    value: float
    low: float | None
    high: float | None
    error: float | None
    """Standard error of ln(value)."""
    freedom: float | None
    """Degrees of freedom of Student's t."""

    def chance(self, threshold: float) -> float:
        """Return the p-value of 'the change is within the threshold', in the direction that was seen; 1 if unknown.

        One-sided Student's t of ln(value) against ln(1 + threshold): below 2.5 % exactly where the 95 % interval lies
        beyond the threshold.
        """
        if self.error is None or self.freedom is None:
            return 1.0
        beyond = abs(math.log(self.value)) - math.log1p(threshold)
        if self.error == 0:
            return 0.0 if beyond > 0 else 1.0
        return float(stdtr(self.freedom, -beyond / self.error))

    def is_within(self, threshold: float) -> bool:
        """Whether the whole interval lies within the threshold on either side of 1."""
        if self.low is None or self.high is None:
            return False
        return self.low >= 1 / (1 + threshold) and self.high <= 1 + threshold

    def detectable(self, threshold: float, power: float = POWER) -> float | None:
        """Return the smallest change, as a share, that would be found with that power beyond the threshold.

        exp(ln(1 + threshold) + (t(0.975) + t(power)) error) - 1, the error being the one that was seen (Cohen 1988,
        Statistical Power Analysis, 2.4, with t in the place of z).
        """
        if self.error is None or self.freedom is None:
            return None
        return math.expm1(math.log1p(threshold) + _reach(self.freedom, power) * self.error)


def _reach(freedom: float, power: float) -> float:
    return float(stdtrit(freedom, 0.975)) + float(stdtrit(freedom, power))


def change(new: Numbers, base: Numbers, *, paired: bool) -> Ratio:
    """Return the geometric mean of `new` over that of `base`, with a 95 % interval on the log ratio.

    Values are one a process, whose steps are no samples of their own. `paired`: new[i] and base[i] were measured in
    turns, so that what slows both is in neither; Student's t on the differences. Else Welch's t with the degrees of
    freedom of Welch and Satterthwaite (Welch 1947, The generalization of Student's problem).
    Raises ValueError for values that are none, not finite or not positive, and for pairs of unequal numbers.
    """
    scatter: tuple[float, float] | None = None
    if paired:
        ratios = _log_ratios(new, base)
        difference = statistics.fmean(ratios)
        if len(ratios) > 1:
            scatter = _squares(ratios) / (len(ratios) - 1) / len(ratios), len(ratios) - 1
    else:
        sides = _logs(new), _logs(base)
        difference = statistics.fmean(sides[0]) - statistics.fmean(sides[1])
        if min(map(len, sides)) > 1:
            parts = [(_squares(side) / (len(side) - 1) / len(side), len(side) - 1) for side in sides]
            variance = math.fsum(part for part, _ in parts)
            spent = math.fsum(part**2 / freedom for part, freedom in parts)
            scatter = variance, variance**2 / spent if spent else math.fsum(freedom for _, freedom in parts)
    if scatter is None:
        return Ratio(math.exp(difference), None, None, None, None)
    error, freedom = math.sqrt(scatter[0]), float(scatter[1])
    return Ratio(*_t_interval(difference, error, freedom), error, freedom)


def pairs_needed(scatter: float, effect: float, threshold: float, power: float = POWER) -> int:
    """Return how many pairs find a change of `effect` beyond `threshold` (shares) with that power; at least two.

    `scatter` is the standard deviation of the pairs' log ratios. The smallest K with K >= ((t(0.975) + t(power))
    scatter / (ln(1 + effect) - ln(1 + threshold)))^2, t having K - 1 degrees of freedom. Raises ValueError for an
    effect within the threshold: no number of pairs shows that.
    """
    if effect <= threshold:
        raise ValueError("an effect within the threshold cannot be found")
    ratio = scatter / (math.log1p(effect) - math.log1p(threshold))
    pairs = max(2, math.ceil((float(ndtri(0.975) + ndtri(power)) * ratio) ** 2))  # Student's t asks for some more
    while pairs < (_reach(pairs - 1, power) * ratio) ** 2:
        pairs += 1
    return pairs


def upper_deviation(values: Numbers, sure: float) -> float:
    """Return the one-sided upper bound of the standard deviation: the true one is below with probability `sure`.

    s sqrt((n - 1) / q), q being the 1 - `sure` quantile of chi-square with n - 1 degrees of freedom, for values that
    are normally distributed. Raises ValueError for fewer than two values and for values that are not finite.
    """
    numbers = _checked(values)
    if numbers.size < 2:
        raise ValueError("one value has no scatter")
    freedom = numbers.size - 1
    return float(numbers.std(ddof=1)) * math.sqrt(freedom / float(chdtri(freedom, sure)))


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values adjusted for how many there are, in the order given (Holm 1979).

    Rejecting those below a level keeps the probability of even one false rejection among all below that level.
    """
    adjusted = [0.0] * len(chances)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda index: chances[index])):
        worst = max(worst, min(1.0, chances[index] * (len(chances) - rank)))
        adjusted[index] = worst
    return adjusted


# --- a history --------------------------------------------------------------------------------------

SHORTEST_SEGMENT = 3
"""Values that make a segment: one outlier is none, and neither are two that come together."""

_STEP_PRICE = 7.0
_RESOLUTION = 1e-6
"""Scatter, as a share, below which values are alike: no machine holds still by so much."""


class Levels(NamedTuple):
    """A piecewise constant fit of a series: its level in each segment, and what scatters around them."""

    segments: tuple[range, ...]
    """The segments' indices, in order; one alone where there is no step."""
    means: tuple[float, ...]
    """The level of each segment: the geometric mean, outliers drawn in."""
    variance: float | None
    """Residual variance of the logarithms, on n - k degrees of freedom; null for a series of one."""
    n: int

    def change(self, after: int = -1, before: int = -2) -> Ratio:
        """Return the level of one segment over that of another, by their indices, with its 95 % interval.

        A contrast in the analysis of variance: Student's t with the scatter of all segments together, since one that
        has just begun is too short to tell its own. The place of a step has been sought: the interval holds the truth
        as often as it says where the step is clear, and flatters one that is not. Raises IndexError for a segment that
        there is not.
        """
        parts = self.segments[after], self.segments[before]
        difference = math.log(self.means[after]) - math.log(self.means[before])
        if self.variance is None:
            return Ratio(_exp(difference), None, None, None, None)
        error = math.sqrt(self.variance * math.fsum(1 / len(part) for part in parts))
        freedom = float(self.n - len(self.segments))
        return Ratio(*_t_interval(difference, error, freedom), error, freedom)


def fit_levels(values: Numbers) -> Levels:
    """Return the levels of a series, and where it steps from one to the next.

    A piecewise constant fit of the logarithms that pays for each step (the Potts functional, as in Weinmann, Storath &
    Demaret 2015, The L1-Potts functional for robust jump-sparse reconstruction; asv's `step_detect` has it too), the
    best of all there are by dynamic programming, O(n^2) for each number of segments. They are fitted by least squares,
    after outliers were drawn in (`_drawn_in`): absolute deviations are as robust, but take a run of one of two modes,
    which squares average out, for a step. The number k of segments has the least n ln(RSS / n) + k (3 ln n + 7), RSS
    being the sum of squares that the fit leaves: a Bayes information criterion for steps (Zhang & Siegmund 2007, A
    modified Bayes information criterion), dearer by 7, at which simulated noise that resembles its neighbour with
    r_1 = 0.3 is taken for a step in fewer than one of twenty constant series, and independent noise in fewer still.
    Not so noise that resembles its neighbour more (r_1 = 0.6: one of five), or that has two modes and fewer than 20
    values (one of ten): their runs are steps as far as figures can tell.

    No segment is shorter than `SHORTEST_SEGMENT`: fewer than twice as many values have no step. Raises ValueError for
    values that are none, not finite or not positive.
    """
    whole = np.array(_logs(values))
    n, centre = whole.size, float(whole.mean())
    logs = _drawn_in(whole - centre)
    segments = _segments(logs)
    pieces = [logs[part.start : part.stop].tolist() for part in segments]
    means = tuple(_exp(centre + statistics.fmean(piece)) for piece in pieces)
    freedom = n - len(segments)
    variance = math.fsum(map(_squares, pieces)) / freedom if freedom else None
    return Levels(tuple(segments), means, variance, n)


def _segments(logs: NDArray[np.float64]) -> list[range]:
    n = logs.size
    if n < 2 * SHORTEST_SEGMENT:
        return [range(n)]
    # costs[i, j]: sum of squares of logs[i:j] around their mean
    sums, squares = (np.concatenate([[0.0], np.cumsum(logs**power)]) for power in (1, 2))
    lengths = np.arange(n + 1) - np.arange(n + 1)[:, None]
    costs = squares - squares[:, None] - (sums - sums[:, None]) ** 2 / np.maximum(lengths, 1)
    costs[lengths < SHORTEST_SEGMENT] = math.inf

    counts = np.arange(1, n // SHORTEST_SEGMENT + 1)
    # Two neighbours in one segment leave half their squared difference at the least; k segments part k - 1 pairs.
    pairs = np.sort(np.diff(logs[: n // 2 * 2].reshape(-1, 2))[:, 0] ** 2 / 2)
    remaining = np.concatenate([[0.0], np.cumsum(pairs)])[np.maximum(pairs.size - counts + 1, 0)]
    promised = np.minimum.accumulate(_criterion(remaining, counts, n)[::-1])[::-1]  # by as many segments or more

    best = costs[0]  # best[j]: of logs[:j], in as many segments as were tried last
    origins: list[NDArray[np.intp]] = []  # where the last of them begins
    found = [float(_criterion(best[n], 1, n))]
    for count in counts[1:]:
        if promised[count - 1] >= min(found):
            break
        through = best[:, None] + costs
        origins.append(through.argmin(axis=0))
        best = through.min(axis=0)
        found.append(float(_criterion(best[n], count, n)))
    ends = [n]
    for origin in reversed(origins[: found.index(min(found))]):
        ends.append(int(origin[ends[-1]]))
    return [range(start, stop) for start, stop in pairwise([0, *reversed(ends)])]


def _criterion(squares: Any, count: Any, n: int) -> Any:
    return n * np.log(np.maximum(squares, 0) / n + _RESOLUTION**2) + (3 * math.log(n) + _STEP_PRICE) * count


def _drawn_in(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values no farther from the median of their neighbourhood than three standard deviations.

    A Hampel identifier (Pearson 2002, Outliers in process modeling and identification), its standard deviation from the
    0.9-quantile of the distances, not their median: of values in two modes a third may lie far away and be no outlier.
    In a neighbourhood of five a segment of three is the majority, so that no step is drawn in, at an end neither.
    """
    width = 2 * SHORTEST_SEGMENT - 1
    if logs.size < width:
        return logs
    medians = np.median(np.lib.stride_tricks.sliding_window_view(logs, width), axis=1)
    medians = medians[np.clip(np.arange(logs.size) - width // 2, 0, logs.size - width)]
    apart = logs - medians
    most = 3 / float(ndtri(0.95)) * float(np.quantile(np.abs(apart), 0.9, method="lower"))
    drawn: NDArray[np.float64] = medians + np.clip(apart, -most, most)
    return drawn


# --- a line -----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A straight line fitted by ordinary least squares: `y_mean + slope * (x - x_mean)`."""

    slope: float
    x_mean: float
    y_mean: float
    spread: float
    """Sum of (x - x_mean)^2."""
    variance: float | None
    """Residual variance, on n - 2 degrees of freedom; null for two points, that leave no residual."""
    n: int

    def at(self, x: float, level: float = 0.95) -> Estimate:
        """Return y at `x`, with the interval in which a *new observation* there is expected (the prediction interval).

        Half-width: t(n - 2) s sqrt(1 + 1/n + (x - x_mean)^2 / spread) (Draper & Smith 1998, Applied Regression
        Analysis, 1.4). It supposes scatter that is normal, independent and everywhere alike. Two points give no
        interval.
        """
        value = self.y_mean + self.slope * (x - self.x_mean)
        chance = self._chance(level)
        if chance is None:
            return Estimate(value, None, None, self.n, float(self.n))
        half = chance * math.sqrt(1 + 1 / self.n + (x - self.x_mean) ** 2 / self.spread)
        return Estimate(value, value - half, value + half, self.n, float(self.n))

    def solve(self, y: float, level: float = 0.95) -> Estimate | None:
        """Return the x at which a new observation is `y`: where the line reaches it, and the interval around that.

        The bounds are where the edges of `at`'s prediction band cross `y`: Fieller's interval for one new observation
        (Fieller 1954; Draper & Smith 1998, 3.2, 'inverse regression'). It holds the true x as often as `level` says,
        and is not symmetric. No interval for two points, and none where the slope cannot be told from zero: the
        band then never crosses `y` on one side. None where the line is level.
        """
        if self.slope == 0:
            return None
        rise = y - self.y_mean
        value = self.x_mean + rise / self.slope
        chance = self._chance(level)
        none = Estimate(value, None, None, self.n, float(self.n))
        if chance is None:
            return none
        # (rise - slope u)^2 = chance^2 (1 + 1/n + u^2 / spread), for u = x - x_mean and with g as below
        g = chance**2 / (self.slope**2 * self.spread)
        if g >= 1:
            return none
        centre = rise / self.slope
        half = chance / abs(self.slope) * math.sqrt(centre**2 / self.spread + (1 - g) * (1 + 1 / self.n))
        low, high = (self.x_mean + (centre + sign * half) / (1 - g) for sign in (-1, 1))
        return Estimate(value, low, high, self.n, float(self.n))

    def _chance(self, level: float) -> float | None:
        if not 0 < level < 1:
            raise ValueError("level must lie between 0 and 1")
        if self.variance is None:
            return None
        return float(stdtrit(self.n - 2, (1 + level) / 2)) * math.sqrt(self.variance)


def fit_line(x: Numbers, y: Numbers) -> Line | None:
    """Return the line of least squares through the points, or None where no two of them differ in `x`.

    Raises ValueError for lengths that differ, and for values that are none or not finite.
    """
    if len(x) != len(y):
        raise ValueError(f"points need as many values on both axes, got {len(x)} and {len(y)}")
    xs, ys = _checked(x), _checked(y)
    x_mean, y_mean = float(xs.mean()), float(ys.mean())
    across = xs - x_mean
    spread = float(across @ across)
    if spread == 0 or float(xs.min()) == float(xs.max()):  # the mean of equal values may be off by a rounding
        return None
    slope = float(across @ (ys - y_mean)) / spread
    residuals = ys - y_mean - slope * across
    n = int(xs.size)
    variance = float(residuals @ residuals) / (n - 2) if n > 2 else None
    return Line(slope, x_mean, y_mean, spread, variance, n)


# --- steady state -----------------------------------------------------------------------------------

_STANDARD_ERRORS = 2.5
"""How far two windows of one steady series may lie apart by chance alone."""


def is_steady(values: Numbers, *, window: int = 20) -> bool:
    """Return whether the *end* of the series is steady, by its last two windows of `window` steps each.

    Meant to be asked after every step of a warm-up: it looks at the last 2 x `window` values and no others, and
    takes some tens of microseconds. A shorter series is not steady.

    The test is pyperf's (`Runner`'s calibration of warm-ups): the first value is no outlier above the rest
    (<= Q3 + 1.5 IQR); from the first window to the second the mean shifts by -50 … +10 %, the median absolute
    deviation by 10 %, the quartiles by 5 %. pyperf's windows are long and its values calm; with few or noisy
    steps these limits would refuse most steady series. Each is therefore no narrower than 2.5 standard errors of
    the difference (asymptotic, normal: s sqrt(2/n) times 1 for a mean, 1.36 for a quartile, 0.79 for
    the median absolute deviation). s comes from successive differences (von Neumann 1941), to which a
    trend adds next to nothing, so a trend does not excuse itself.
    """
    if window < 2:
        raise ValueError("a window has at least 2 steps")
    if len(values) < 2 * window:
        return False
    # Plain floats: for some tens of values numpy's calls cost more than the arithmetic.
    return _windows_agree([float(value) for value in values[-2 * window :]], window)


def steady_from(values: Numbers, *, minimum: int = 0, window: int = 20) -> int | None:
    """Return the first step, not before `minimum`, at which a saved series is steady; None where it never is.

    It is the first step of the earliest two windows that pass the test of `is_steady`.
    """
    if window < 2:
        raise ValueError("a window has at least 2 steps")
    numbers = [float(value) for value in values]
    starts = range(max(minimum, 0), len(numbers) - 2 * window + 1)
    return next((start for start in starts if _windows_agree(numbers[start : start + 2 * window], window)), None)


def _windows_agree(values: list[float], window: int) -> bool:
    before, after = values[:window], values[window:]

    rest = sorted(values[1:])
    lower, upper = _sorted_quantile(rest, 0.25), _sorted_quantile(rest, 0.75)
    if values[0] > upper + 1.5 * (upper - lower):
        return False

    jumps = math.fsum((right - left) ** 2 for left, right in pairwise(values))
    chance = _STANDARD_ERRORS * math.sqrt(jumps / (2 * (2 * window - 1)) * 2 / window)

    mean = math.fsum(after) / window
    shift = math.fsum(before) / window - mean
    if not -max(0.5 * abs(mean), chance) <= shift <= max(0.1 * abs(mean), chance):
        return False

    before.sort()
    after.sort()
    for p in (0.25, 0.75):
        quartile = _sorted_quantile(after, p)
        if abs(_sorted_quantile(before, p) - quartile) > max(0.05 * abs(quartile), 1.36 * chance):
            return False
    deviation = _deviation(after)
    return abs(_deviation(before) - deviation) <= max(0.1 * deviation, 0.79 * chance)


def _sorted_quantile(ordered: list[float], p: float) -> float:
    whole, share = divmod(p * (len(ordered) - 1), 1)
    left = ordered[int(whole)]
    return left + share * (ordered[int(whole) + 1] - left) if share else left


def _deviation(ordered: list[float]) -> float:
    """Return the median absolute deviation."""
    middle = _sorted_quantile(ordered, 0.5)
    return _sorted_quantile(sorted(abs(value - middle) for value in ordered), 0.5)
