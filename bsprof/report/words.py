"""What a result says, in sentences. Each is derived from figures, and none claims what intervals do not support."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from bsprof import findings, scaling
from bsprof.findings import alike, differ
from bsprof.metrics import CaseSummary, summarise, varying_axes
from bsprof.model import Result
from bsprof.report.figures import case_name, ceiling_name, duration, energy, is_telling, percent, plural, rate
from bsprof.scaling import Scaled

# TensorFlow's input-pipeline analyzer calls a program highly or moderately input-bound from these shares on.
_HIGHLY, _MODERATELY = 0.20, 0.05
_MANY_FAULTS = 1000
"""Minor faults a step from which allocator settings alone are worth a test."""
_RESIDUAL = 0.01
"""Share of the wall time that may be left unexplained."""
_NEAR_CEILING = 0.8
"""Share of a measured ceiling from which little is left to gain but by doing less or doing it in another dtype."""
_SPARES = 0.05
"""Share of the energy a sample below which a difference is within what power meters of GPUs are good for."""
_LATE = 3
"""So many cases with a late rank are told."""
_WORTH_A_WORD = 0.01
"""Share of the step below which no cost of having more ranks is told."""
_THROTTLED = {"gpu_throttled_thermal": "heat", "gpu_throttled_power": "its power limit"}
"""Notes that say that the device's clocks were held back, and by what."""


def summary(result: Result, cases: Sequence[CaseSummary] | None = None) -> list[str]:
    """Return a result in plain words, one sentence or two a line.

    It says what is fastest, what bounds that, what more ranks bring and which of them is late, what the loader costs,
    what the device drew and what held it back, what to try next, how far the instrumentation bent the numbers, and what
    failed. `cases` are the result's summaries where the caller has them already.
    """
    cases = summarise(result) if cases is None else cases
    told = _Told(result, cases)
    first = [*told.fastest(), *told.bound(), *told.scaling(), *told.late()]
    first += [*told.loader(), *told.energy(), *told.throttled()]
    return [*first, *told.next(), *told.distortion(), *told.failures()]


class _Told:
    """One result being told: its usable cases, the fastest of them, and how cases are named."""

    def __init__(self, result: Result, cases: Sequence[CaseSummary]) -> None:
        self.result = result
        self.cases = cases
        self.ok = [case for case in cases if case.ok and case["step"] is not None]
        self.varying = varying_axes(case.settings for case in cases)
        self.best = findings.fastest(cases)
        self.unit = "img/s" if all(case.settings for case in cases) else "samples/s"
        self.scaled = scaling.scaled(result, cases)

    def name(self, case: CaseSummary) -> str:
        return case_name(case.case, self.varying)

    def _speed(self, case: CaseSummary) -> str:
        throughput = case.value("throughput")
        step = f"{duration(case.value('step'))} a step{_interval(case, 'step', duration)}"
        return step if throughput is None else f"{rate(throughput)} {self.unit}, {step}"

    # --- what is fastest, and why -----------------------------------------------------------------------

    def fastest(self) -> Iterator[str]:
        best = self.best
        if best is None:
            return
        if len(self.ok) == 1:
            yield f"{self.name(best)}: {self._speed(best)}, {_inference(best)}."
            return
        key = "throughput" if best["throughput"] is not None else "step"
        if best.interval(key) is None:
            yield f"Fastest: {self.name(best)} with {self._speed(best)}, {_inference(best)} and so for any comparison."
            return
        equals = [case for case in self.ok if case is not best and not differ(case, best, key)]
        if equals:
            names = _listed([self.name(case) for case in equals])
            yield (
                f"Fastest: {self.name(best)} with {self._speed(best)}, {_inference(best)}; "
                f"not distinguishable from {names}."
            )
        else:
            others = "the other case" if len(self.ok) == 2 else f"all {len(self.ok) - 1} others"
            yield (
                f"Fastest: {self.name(best)} with {self._speed(best)}, {_inference(best)}; "
                f"its interval is clear of {others}."
            )
        if all(len(case.readings) == 1 for case in self.ok):
            yield "These intervals hold within one process each; `--repeat 3` adds the spread between processes."

    def bound(self) -> Iterator[str]:
        best = self.best
        if best is None or not best.phases:
            return
        shares = {phase: best.value(f"{phase}.share") or 0.0 for phase in best.phases}
        largest = max(shares, key=lambda phase: shares[phase])
        stall = shares.get("data", 0.0)
        cost = f"{percent(shares[largest])} of the step ({duration(best.value(f'{largest}.time'))})"
        if largest == "backward" and best.readings[0].ranks:
            cost += ", the wait for the gradients of all ranks in it"
        waits = f"waiting for data is {percent(stall)} of the step ({duration(best.value('stall'))})"
        launching = findings.launching(best)
        if stall >= _MODERATELY:
            degree = "highly" if stall >= _HIGHLY else "moderately"
            rest = "" if largest == "data" else f"; the largest phase is {largest}, {cost}"
            yield f"It is {degree} input-bound: {waits}{rest}."
        elif launching is not None and launching.whole:
            yield (
                f"It is launch-bound: kernels run for {percent(launching.busy_share)} of the time that the computing "
                f"phases take on the device, and the host is in them for {percent(launching.host_share)} of it: "
                "the device waits to be given work."
            )
        elif largest == "h2d":
            yield f"It is bound by copying batches to the device: {cost}; {waits}."
        elif largest != "data":
            wait = f"; {waits}" if "data" in shares else ""
            yield f"It is bound by {largest}: {cost}{wait}."
        hidden, wait_s = best.value("hidden"), best.value("wait")
        if best.readings[0].has_device_clock and hidden is not None and wait_s and hidden > 0.01 * wait_s:
            yield f"Of {duration(wait_s)} of waiting in next(), {duration(hidden)} is hidden behind the device's queue."
        if launching is not None and launching.phases and not launching.whole:
            busy = [f"{phase} (busy for {percent(best.value(f'{phase}.busy_share'))})" for phase in launching.phases]
            yield f"Launch-bound in part, for there the device waits to be given work: {_listed(busy)}."
        yield from self._ceiling(best)

    def _ceiling(self, best: CaseSummary) -> Iterator[str]:
        binding, share, mfu = best.binding, best.value("ceiling_share"), best.value("mfu")
        if binding is None or share is None:
            return
        as_well = "" if mfu is None or binding.name == "compute" else f"; MFU is {percent(mfu)}"
        little = "; little is left to gain there" if share >= _NEAR_CEILING else ""
        yield (
            f"Nearest of the ceilings measured is {binding.name} ({ceiling_name(binding.rate)}), "
            f"which asks for {percent(share)} of the step at least{as_well}{little}."
        )

    # --- more ranks than one ----------------------------------------------------------------------------

    def scaling(self) -> Iterator[str]:
        """Say how well the largest world does, and what it loses the most by."""
        several = [row for row in self.scaled if any(reading.ranks for reading in row.case.readings)]
        held = [row for row in several if row.base is not None and row.efficiency is not None]
        if not held:
            if several:
                largest = max(several, key=_ranks_and_speed)
                yield (
                    f"There is no smaller world to hold {largest.world} ranks against "
                    f"(`--world-size 1,{largest.world}`){self._dearest(largest, None)}."
                )
            return
        row = max(held, key=_ranks_and_speed)
        found, base = row.efficiency, next((one for one in self.scaled if one.case is row.base), None)
        assert found is not None and base is not None
        times = found.value * row.world / base.world
        of = "one" if base.world == 1 else f"{base.world}, the smallest world measured"
        interval = ""
        if found.low is not None and found.high is not None:
            how = f"between {row.processes} and {base.processes} processes" if found.between else "within a process"
            interval = f" [{percent(found.low)}, {percent(found.high)}] {how}"
        loss = ""
        if found.low is not None and found.high is not None and found.low <= 1:
            loss = self._dearest(row, base) if found.high < 1 else "; it is not distinguishable from 100%"
        yield (
            f"{self._of_several(row)}{row.world} ranks have {times:.2f} times the {self.unit} of {of}, "
            f"an efficiency of {percent(found.value)}{interval}{loss}."
        )

    def _of_several(self, row: Scaled) -> str:
        """Name the settings of a case where others vary than the world."""
        others = [name for name in self.varying if name != "world_size"]
        return f"{case_name(row.case.case, others)}: " if others else ""

    def _dearest(self, row: Scaled, base: Scaled | None) -> str:
        """Say what surely costs a case the most of what it loses, if that is worth a word."""
        sure = {"communication": row.exposed is not None and (row.exposed.low or 0.0) > 0, "skew": row.uneven}
        costs = {part: cost for part, cost in scaling.costs(row, base).items() if sure.get(part, True)}
        step = row.split.step_s if row.split else 0.0
        dearest = max(costs, key=lambda part: costs[part], default=None)
        if row.split is None or row.split.compute_s is None:
            return ""
        cost = costs[dearest] if dearest else 0.0
        if dearest is None or cost < _WORTH_A_WORD * step:
            return f"; nothing surely costs more than {percent(_WORTH_A_WORD)} of the step"
        figure = f"{duration(cost)} ({percent(cost / step)} of the step)"
        match dearest:
            case "communication":
                more = "" if base is None or base.world == 1 else f" more than with {plural(base.world, 'rank')}"
                return f"; what costs the most is communication that no computing hides, {figure}{more}"
            case "skew":
                phase = max(row.skews, key=lambda name: row.skews[name], default=None)
                most = "" if phase is None else f", and they differ the most in {_phase(phase)}"
                return f"; what costs the most is that ranks are not equally fast, {figure}{most}"
            case _:
                of = "" if base is None else f" than with {plural(base.world, 'rank')}"
                what = "computing" if dearest == "compute" else "loading"
                return f"; what costs the most is {what}, which takes {figure} longer{of}"

    def late(self) -> Iterator[str]:
        """Say whom the others wait for, in the largest worlds first."""
        named = sorted((row for row in self.scaled if row.late), key=_ranks_and_speed, reverse=True)
        for row in named[:_LATE]:
            found = row.late
            assert found is not None
            where = f"{self.name(row.case)}: others" if len(self.ok) > 1 else "Others"
            node = f" on node {found.node}" if self.result.plan and self.result.plan.nodes > 1 else ""
            some = f" (in {row.named} of {row.processes} processes)" if row.processes > 1 else ""
            yield (
                f"{where} wait for rank {found.rank}{node} in {percent(found.share)} of the steps, "
                f"{duration(found.by.value)} a step in the median: its {_phase(found.phase)} takes "
                f"{duration(found.longer_s)} longer{some}."
            )

    # --- what the device drew, and what held it back ----------------------------------------------------

    def energy(self) -> Iterator[str]:
        best = self.best
        if best is None or best["energy_per_step"] is None:
            return
        a_sample = best.value("energy_per_sample")
        figure = f"{energy(best.value('energy_per_step'))} a step"
        figure += "" if a_sample is None else f", {energy(a_sample)} a sample"
        whose = "slowest rank's" if best.readings[0].ranks else "whole"
        text = f"It takes {figure}, of the {whose} device with its idle power"
        known = [case for case in self.ok if case["energy_per_sample"] is not None]
        least = min(known, key=lambda case: case.value("energy_per_sample") or 0.0, default=best)
        spared = 1 - (least.value("energy_per_sample") or 0.0) / a_sample if a_sample else 0.0
        if least is not best and spared >= _SPARES:
            text += f"; the least a sample is {energy(least.value('energy_per_sample'))}, in {self.name(least)}"
        yield text + "."

    def throttled(self) -> Iterator[str]:
        for code, cause in _THROTTLED.items():
            held = [case for case in self.ok if any(note.code == code for note in case.notes)]
            if held:
                names = _listed([self.name(case) for case in held])
                where = f" in {len(held)} of {plural(len(self.ok), 'case')} ({names})" if len(self.ok) > 1 else ""
                yield f"The device's clocks were held back by {cause}{where}: unhindered it would be faster."

    # --- the loader -------------------------------------------------------------------------------------

    def loader(self) -> Iterator[str]:
        best = self.best
        if best is None or best.settings is None or best["wait"] is None:
            return
        group = self._siblings(best, "workers")
        if len(group) < 2:
            return
        zero = group[0] if group[0].settings and group[0].settings.workers == 0 else None
        if zero is not None:
            yield self._cost_of_loading(zero, max(group[1:], key=lambda case: case.value("throughput") or 0.0))
        for fewer, more in pairwise(group):
            cut, longer = (fewer.value("wait") or 0.0) - (more.value("wait") or 0.0), _increase(fewer, more, "step")
            if cut > 0 and longer is not None and longer > 0 and differ(fewer, more, "step"):
                yield (
                    f"Going from {_workers(fewer)} to {_workers(more)} cut the wait by {duration(cut)} "
                    f"but lengthened the step by {duration(longer)}: loading and training compete for the same cores."
                )

    def _cost_of_loading(self, zero: CaseSummary, best: CaseSummary) -> str:
        share, with_workers = zero.value("stall_share"), best.value("stall_share")
        text = (
            f"Loading in the main process makes the step wait {duration(zero.value('stall'))} ({percent(share)}); "
            f"with {_workers(best)} it waits {duration(best.value('stall'))} ({percent(with_workers)})"
        )
        before, after = zero.value("step"), best.value("step")
        if before is None or after is None:
            return text + "."
        if not differ(zero, best, "step"):
            return f"{text}, and the steps are not distinguishable{self._eaten(zero, best)}."
        change = "shorter" if after < before else "longer"
        return f"{text}, and the step is {percent(abs(after / before - 1))} {change}."

    def _eaten(self, zero: CaseSummary, best: CaseSummary) -> str:
        """Say where the time went that workers should have saved: into phases that they slow down."""
        saved = (zero.value("stall") or 0.0) - (best.value("stall") or 0.0)
        growth = {
            phase: (best.value(f"{phase}.time") or 0.0) - (zero.value(f"{phase}.time") or 0.0)
            for phase in best.phases
            if phase != "data"
        }
        slowed = max(growth, key=lambda phase: growth[phase], default=None)
        if slowed is None or saved <= 0 or growth[slowed] < saved / 2:
            return ""
        return f": {slowed} takes {duration(growth[slowed])} longer, for loading and training share the same cores"

    def _siblings(self, case: CaseSummary, axis: str) -> list[CaseSummary]:
        """Return the cases that differ from `case` in nothing but `axis`, itself included, in the axis's order."""
        alikes = [other for other in self.ok if alike(case.settings, other.settings, axis)]
        return sorted(alikes, key=lambda other: getattr(other.settings, axis))

    # --- what to try next -------------------------------------------------------------------------------

    def next(self) -> Iterator[str]:
        if self.best is None:
            return
        best = self.best
        advice = [*self._more_workers(best), *self._fewer_threads(), *self._larger_batch(best)]
        advice += [*self._fewer_launches(best), *self._cheaper_steps(best), *self._surer(), *self._malloc()]
        if advice:
            yield "To try next: " + "; ".join(advice) + "."

    def _more_workers(self, best: CaseSummary) -> Iterator[str]:
        settings, facts, stall = best.settings, best.facts, best.value("stall_share")
        if settings is None or stall is None or stall < _MODERATELY:
            return
        group = [case.settings.workers for case in self._siblings(best, "workers") if case.settings]
        training = 1 if facts is None or facts.device != "cpu" else facts.threads
        usable = self.result.environment.cores_usable
        nodes = self.result.plan.nodes if self.result.plan else 1
        sharing = max(1, settings.world_size // nodes)  # ranks on this machine, each with workers of its own
        free = usable // sharing - training - settings.workers
        if settings.workers < max(group):
            return  # more were tried, and were no faster
        if free > 0:
            yield f"`--workers {settings.workers + free}` ({plural(free, 'more core')} may be free for loading)"
        elif settings.workers:
            yield (
                f"cheaper loading, as smaller or pre-resized images: {plural(sharing * training, 'thread')} training "
                f"and {plural(sharing * settings.workers, 'worker')} already share {plural(usable, 'usable core')}"
            )

    def _fewer_threads(self) -> Iterator[str]:
        crowded = [case for case in self.ok if any(note.code == "cpu_oversubscribed" for note in case.notes)]
        threads = max((case.facts.threads for case in crowded if case.facts), default=1)
        workers = max((case.settings.workers for case in crowded if case.settings), default=0)
        usable = self.result.environment.cores_usable
        fewer = max(1, usable - workers)
        if workers and fewer < threads:
            yield (
                f"`--threads {fewer},{threads}` ({threads} torch threads and up to {plural(workers, 'worker')} "
                f"compete for {plural(usable, 'core')})"
            )

    def _larger_batch(self, best: CaseSummary) -> Iterator[str]:
        if best.settings is None:
            return
        group = self._siblings(best, "batch_size")
        if len(group) < 2:
            return
        smaller, larger = group[-2:]
        gain = (larger.value("throughput") or 0.0) / (smaller.value("throughput") or 1.0) - 1
        batch, failed = larger.settings.batch_size if larger.settings else 0, self._failed_batches(best)
        grows = gain > 0 and differ(smaller, larger, "throughput")
        if grows and not any(size > batch for size in failed):
            yield (
                f"`--batch-size {2 * batch}` (from {smaller.settings.batch_size if smaller.settings else 0} "
                f"to {batch} throughput still grew by {percent(gain)})"
            )

    def _fewer_launches(self, best: CaseSummary) -> Iterator[str]:
        launching = findings.launching(best)
        if launching is None or not (launching.whole or launching.phases):
            return
        settings = best.settings
        if launching.whole and settings is not None:
            if self._untried(best, "batch_size") and not any(self._failed_batches(best)):
                yield f"`--batch-size {2 * settings.batch_size}` (the same launches would do twice the work)"
            if not settings.compile and self._untried(best, "compile"):
                yield "`--compile on` (fuses kernels, so that there are fewer to launch)"
            yield "CUDA graphs in your own training (one launch a step)"
        elif "optimizer" in launching.phases:
            yield "`fused=True` for the optimizer of your own training (one launch for many parameters)"
        elif settings is not None and not settings.compile and self._untried(best, "compile"):
            yield f"`--compile on` (fewer kernels to launch in {' and '.join(launching.phases)})"

    def _cheaper_steps(self, best: CaseSummary) -> Iterator[str]:
        """Advise what makes computing and copying on a CUDA device cheaper, where these are what the step takes."""
        settings, facts, launching = best.settings, best.facts, findings.launching(best)
        if settings is None or facts is None or not facts.device.startswith("cuda"):
            return
        if (best.value("h2d.share") or 0.0) >= _MODERATELY and settings.pin_memory is False:
            yield "`--pin-memory on` (page-locked batches are copied faster, and beside the computing)"
        if (best.value("stall_share") or 0.0) >= _MODERATELY or launching is None or launching.whole:
            return
        if settings.amp == "off" and self._untried(best, "amp"):
            yield "`--amp bf16` (a higher matrix rate and half the memory traffic; watch the loss)"
        if not settings.channels_last and self._untried(best, "channels_last"):
            yield "`--channels-last on` (the layout in which tensor cores convolve)"

    def _untried(self, best: CaseSummary, axis: str) -> bool:
        """Whether no other value of an axis stands beside the best case."""
        settings = [case.settings for case in self.cases if alike(best.settings, case.settings, axis)]
        return len({getattr(one, axis) for one in settings}) < 2

    def _failed_batches(self, best: CaseSummary) -> list[int]:
        failed = [case.settings for case in self.cases if not case.ok and case.settings is not None]
        return [one.batch_size for one in failed if alike(one, best.settings, "batch_size")]

    def _surer(self) -> Iterator[str]:
        plan = self.result.plan
        unsteady = [case for case in self.ok if not case.steady]
        if unsteady:
            yield (
                f"a longer `--max-case-time`: {plural(len(unsteady), 'case')} of {len(self.ok)} "
                f"{'was' if len(unsteady) == 1 else 'were'} not steady when warm-up ended"
            )
        if plan is None:
            return
        precisions = [case.value("precision") for case in self.ok]
        short = [value for value in precisions if value is None or value > plan.stop.precision]
        if short:
            worst = max((value for value in short if value is not None), default=None)
            reached = "no interval was reached" if worst is None else f"the widest is ±{percent(worst)}"
            cure = "`--repeat 3`" if plan.repeat < 3 else "a longer `--max-case-time`"
            yield (
                f"{cure}: {plural(len(short), 'case')} of {len(self.ok)} did not reach "
                f"the precision of {percent(plan.stop.precision)} ({reached})"
            )

    def _malloc(self) -> Iterator[str]:
        faulty = [case for case in self.ok if (case.value("minor_faults") or 0.0) > _MANY_FAULTS]
        if not faulty:
            return
        worst = max(faulty, key=lambda case: case.value("minor_faults") or 0.0)
        what = f"{worst.value('minor_faults') or 0:.0f} minor page faults a step in {self.name(worst)}"
        if worst.facts is not None and worst.facts.malloc == "pinned":
            yield f"fewer allocations a step: {what} although malloc was pinned"
        else:
            yield (
                f"`--malloc pinned`: {what}; if it is faster, set MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ and "
                "MALLOC_TOP_PAD_ for your own training as well"
            )

    # --- how far to trust it ----------------------------------------------------------------------------

    def distortion(self) -> Iterator[str]:
        parts = []
        costs = [case for case in self.ok if case["recorder"] is not None]
        if costs:
            worst = max(costs, key=lambda case: case.value("recorder_share") or 0.0)
            parts.append(
                f"The recorder itself costs {duration(worst.value('recorder'))} a step, "
                f"{percent(worst.value('recorder_share'))}{_at_most(costs)}"
            )
        samplers = [case.value("sampler_share") for case in self.ok]
        shares = [share for share in samplers if share is not None]
        if shares:
            parts.append(f"telemetry takes {percent(max(shares))} of one core{_at_most(self.ok, '')}")
        known = [case for case in self.ok if (seen := case.interval("distortion")) and is_telling(seen)]
        if known:
            clear = [case for case in known if _excludes_zero(case)]
            worst = max(clear or known, key=lambda case: abs(case.value("distortion") or 0.0))
            figure = percent(worst.value("distortion"), signed=True) + _interval(worst, "distortion", _signed)
            where = f" ({self.name(worst)})" if len(known) > 1 else ""
            if not clear:
                parts.append(
                    "instrumented and bare steps are not distinguishable"
                    + (f" in any of {len(known)} cases" if len(known) > 1 else "")
                    + f": {'the largest difference is ' if len(known) > 1 else ''}{figure}{where}"
                )
            else:
                parts.append(
                    f"instrumented steps differ from bare ones by {figure}{where}"
                    + (f"; intervals exclude 0 in {len(clear)} of {len(known)} cases" if len(known) > 1 else "")
                    + (", as 1 in 20 does by chance" if len(known) > 1 and len(clear) <= len(known) / 10 else "")
                )
        if parts:
            yield _capital("; ".join(parts)) + "."
        residuals = [case for case in self.ok if case["residual"] is not None]
        if residuals:
            worst = max(residuals, key=lambda case: abs(case.value("residual") or 0.0))
            value = worst.value("residual") or 0.0
            verdict = f", more than the {percent(_RESIDUAL)} it may be" if abs(value) > _RESIDUAL else ""
            where = f" ({self.name(worst)})" if len(residuals) > 1 else ""
            yield f"Phases account for the wall time to within {percent(value, signed=True)}{where}{verdict}."

    def failures(self) -> Iterator[str]:
        failed = [one for case in self.cases for one in case.failures]
        if not failed:
            if not self.cases:
                yield "Nothing was measured."
            elif not self.ok:
                yield "No steps were recorded."
            return
        processes = sum(len(case.measurements) for case in self.cases)
        noun = "process" if processes > len(self.cases) else "case"
        plurals = "processes" if noun == "process" else "cases"
        kinds: dict[str, list[Any]] = {}
        for one in failed:
            kinds.setdefault(one.outcome.kind, []).append(one)
        told = []
        for kind, members in kinds.items():
            names = _listed(list(dict.fromkeys(case_name(one.case, self.varying) for one in members)))
            message = (members[0].outcome.message or "").strip().partition("\n")[0].rstrip(".")
            count = f"{len(members)} " if len(kinds) > 1 else ""
            told.append(f"{count}{kind} ({names})" + (f": {message}" if message else ""))
        whole = "All" if len(failed) == processes and processes > 1 else f"{len(failed)} of"
        yield f"{whole} {plural(processes, noun, plurals)} failed: {'; '.join(told)}."


# --- what intervals support ------------------------------------------------------------------------------


def _increase(a: CaseSummary, b: CaseSummary, key: str) -> float | None:
    before, after = a.value(key), b.value(key)
    return None if before is None or after is None else after - before


def _excludes_zero(case: CaseSummary) -> bool:
    interval = case.interval("distortion")
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def _interval(case: CaseSummary, key: str, write: Callable[[float], str]) -> str:
    interval = case.interval(key)
    return "" if interval is None else f" [{write(interval[0])}, {write(interval[1])}]"


def _inference(case: CaseSummary) -> str:
    """Say what the interval is over: the unit of inference between runs is the process."""
    if case.interval("step") is None:
        return "too few steps for an interval"
    count = len(case.readings)
    return f"between {count} processes" if count > 1 else "within one process"


def _ranks_and_speed(row: Scaled) -> tuple[int, float]:
    return row.world, row.case.value("throughput") or 0.0


def _phase(name: str) -> str:
    """Name a phase of a rank by what was looked at of it."""
    return {"backward": "backward, up to its first gradients,", "other": "time between phases"}.get(name, name)


def _workers(case: CaseSummary) -> str:
    return plural(case.settings.workers, "worker") if case.settings else ""


def _at_most(cases: Sequence[CaseSummary], alone: str = " of it") -> str:
    return " at most" if len(cases) > 1 else alone


def _signed(share: float) -> str:
    return percent(share, signed=True)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(names: Sequence[str], most: int = 3) -> str:
    rest = len(names) - most
    shown = "; ".join(names[:most])
    return f"{shown} and {rest} more" if rest > 0 else shown
