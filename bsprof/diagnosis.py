"""What is wrong with a loader: the verdict, its causes ranked by what each would give back, and what would help.

A pure function of one Loading. What the causes are and what shows them is in `causes`, by which figures they are judged
in `evidence`; here it is found out what each costs, and what to say first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from scipy.special import stdtrit

from bsprof.attribution import attribution, mean, seconds
from bsprof.causes import RULES
from bsprof.causes.rule import Found, Judged, Rule, share, time
from bsprof.evidence import THRESHOLDS, Scene, limit
from bsprof.loading import Cause, Diagnosis, Loading, Prediction
from bsprof.replay import (
    MODEL_ERROR,
    RESAMPLES,
    Load,
    Setting,
    grid,
    load_of,
    mean_step_s,
    predict,
    replay,
    scaled,
    setting_of,
    smallest_best,
)

__all__ = ["RULES", "THRESHOLDS", "attribution", "diagnose"]

Verdict: TypeAlias = Literal["not_input_bound", "moderately_input_bound", "highly_input_bound", "no_step", "unknown"]


def diagnose(loading: Loading, *, predictions: bool = True) -> Diagnosis:
    """Return what is wrong with a loader, from what was recorded of it; a pure function that holds for any recording.

    The verdict compares the wait of a steady step with the step. The causes stand in the order of the step time that
    removing each would give back, by the same replay with the cause removed; those that cost no time yet stand behind.
    `predictions=False` leaves out what other numbers of workers would deliver, which takes most of the time.
    """
    scene = Scene(loading)
    causes = _ranked(_judged(scene))
    found: tuple[Prediction, ...] = ()
    best = None
    if predictions and scene.load is not None:
        cores = loading.machine.cores if loading.machine is not None else max(1.0, scene.setting.workers)
        found = predict(scene.load, scene.setting, grid(scene.setting, cores))
        best = smallest_best(found)
    steps = scene.steps
    samples = [count for count in loading.batches.samples if count is not None]
    each = sum(samples) / len(samples) if samples else 1.0
    waits = {
        name: value
        for name, times in (
            ("production", steps.production_s),
            ("ordering", steps.ordering_s),
            ("handoff", steps.handoff_s),
        )
        if (value := mean(times)) is not None
    }
    epoch = _epoch_s(scene)
    if epoch is not None:
        waits["epoch"] = epoch
    stepping = loading.consumer.kind != "fastest"
    diagnosis = Diagnosis(
        verdict=_verdict(scene),
        sentence="",
        step_s=scene.step_s,
        wait_s=scene.wait_s,
        busy_s=scene.busy_s,
        wait_share=scene.wait_share,
        delivered_per_s=each / scene.step_s if scene.step_s else None,
        possible_per_s=each / scene.busy_s if scene.busy_s and stepping else None,
        contention_s=scene.contention_s if stepping else None,
        waits_s=waits,
        causes=tuple(one.cause() for one in causes),
        predictions=found,
        best=best,
    )
    return _with_sentence(diagnosis, scene, causes)


def _verdict(scene: Scene) -> Verdict:
    if scene.wait_share is None:
        return "unknown"
    if scene.loading.consumer.kind == "fastest":
        return "no_step"
    if scene.wait_share < limit("moderately"):
        return "not_input_bound"
    return "moderately_input_bound" if scene.wait_share < limit("highly") else "highly_input_bound"


def _epoch_s(scene: Scene) -> float | None:
    """Return what starts and ends of epochs cost, spread over all batches: iter(), first batches, StopIteration."""
    loading, passes = scene.loading, scene.passes
    count = sum(len(one.starting) + len(one.steady) for one in passes)
    if not count or not loading.epochs:
        return None
    asked, got = seconds(loading.batches.asked_at_ns), seconds(loading.batches.got_at_ns)
    cost = sum(max(0.0, float(got[i] - asked[i])) for one in passes for i in one.starting)
    for epoch in loading.epochs:
        cost += (epoch.ready_at_ns - epoch.began_at_ns) * 1e-9
        if epoch.ended_at_ns is not None and epoch.last_asked_at_ns is not None:
            cost += (epoch.ended_at_ns - epoch.last_asked_at_ns) * 1e-9
    return max(0.0, cost / count)


# --- what each cause costs --------------------------------------------------------------------------


class _Judgement(NamedTuple):
    """A cause, and what removing it gives back as a share of the step: None where it is a risk."""

    rule: Rule
    found: Found
    gain: float | None
    low: float | None = None
    high: float | None = None

    def explains(self, other: Rule) -> bool:
        """Whether the other is to be judged with this cause taken away."""
        return not self.found.vague and bool({other.code, "*"} & set(self.rule.explains))

    def cause(self) -> Cause:
        """Return it as the noun that a result holds."""
        found = self.found
        return Cause(
            code=self.rule.code,
            text=found.text,
            evidence={
                name: value.item() if isinstance(value, np.generic) else value for name, value in found.evidence.items()
            },
            gives_back=self.gain,
            gives_back_low=self.low,
            gives_back_high=self.high,
            prescription=found.prescription,
            change=found.change,
            code_change=found.code_change,
            not_separable_from=found.not_separable_from,
        )


_NOTHING = Load(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0, np.int64))


def _judged(scene: Scene) -> list[_Judgement]:
    """Return all causes for which there is evidence and that are worth being named."""
    raised: list[_Judgement] = []
    waits = scene.loading.consumer.kind == "fastest" or (scene.wait_share or 0.0) >= limit("moderately")
    slowed = (scene.contention_s or 0.0) >= limit("moderately") * (scene.step_s or math.inf)
    replayed = scene.load is not None and mean_step_s(scene.load, scene.setting) > 0
    load = scene.load if scene.load is not None else _NOTHING
    for rule in RULES:
        if rule.rank not in ("start", "beside", "risk") and not (replayed and (waits or slowed)):
            continue
        removed = [one for one in raised if one.gain is not None and one.explains(rule)]
        here = _without((load, scene.setting), removed)
        taken = frozenset(stage for one in raised for stage in one.found.takes)
        for found in rule.find(Judged(scene, *here, taken)):
            if rule.rank == "risk":
                raised.append(_Judgement(rule, found, None))
            elif found.remove is None:
                gain = min(1.0, max(0.0, found.gives_back or 0.0))
                raised.append(_Judgement(rule, found, gain))
            else:
                gain = _gain(scene, rule, found, here, raised)
                low, high = _interval(scene, found, here, gain) if gain >= limit("worth") else (0.0, 0.0)
                # Some stage is always the longest, and more workers always fit: for these only the gain speaks.
                if low > 0 or (gain >= limit("worth") and rule.rank == "specific"):
                    raised.append(_Judgement(rule, found, gain, low, high))
                elif found.even_if_free and waits:
                    raised.append(_Judgement(rule, found, None))
    return raised


def _without(here: tuple[Load, Setting], removed: Sequence[_Judgement]) -> tuple[Load, Setting]:
    for one in removed:
        if one.found.remove is not None:
            here = one.found.remove(*here)
    return here


def _gain(scene: Scene, rule: Rule, found: Found, here: tuple[Load, Setting], raised: Sequence[_Judgement]) -> float:
    """Return the share of the step that the load `here` would give back without the cause.

    Workers and consumer work side by side, so that the slower hides the other's trouble. Where both have some, a cause
    gives back the mean of what it does alone and of what it does once the other side's is gone (the Shapley value of
    two players, whose parts add up to what removing both gives back).
    """
    assert scene.load is not None
    whole = mean_step_s(scene.load, scene.setting)

    def alone(start: tuple[Load, Setting]) -> float:
        assert found.remove is not None
        return (mean_step_s(*start) - mean_step_s(*found.remove(*start))) / whole

    gains = [alone(here)]
    if rule.side != "worker":
        gains.append(alone((scaled(here[0], 0.0), here[1])))
    elif across := [one for one in raised if one.rule.side != "worker" and not one.explains(rule)]:
        gains.append(alone(_without(here, across)))
    return min(1.0, max(0.0, sum(gains) / len(gains)))


def _interval(scene: Scene, found: Found, here: tuple[Load, Setting], gain: float) -> tuple[float, float]:
    """Return a 95 % interval: other batches could have been recorded, and the model errs (as in `replay.predict`)."""
    assert scene.load is not None and found.remove is not None
    whole = mean_step_s(scene.load, scene.setting)
    there = found.remove(*here)
    logs = [
        math.log(max(1e-12, replay(*there, seed=seed).step_s) / max(1e-12, replay(*here, seed=seed).step_s))
        for seed in range(RESAMPLES)
    ]
    chance = float(stdtrit(RESAMPLES - 1, 0.975)) * float(np.std(logs, ddof=1))
    half = math.hypot(chance, 1.96 * MODEL_ERROR)
    left = mean_step_s(*there) / whole
    return max(0.0, gain - left * math.expm1(half)), min(1.0, gain - left * math.expm1(-half))


# --- what to say first ------------------------------------------------------------------------------

_RANKS = ("specific", "beside", "setting", "start", "general", "risk")


def _ranked(judged: Sequence[_Judgement]) -> list[_Judgement]:
    """Return the causes with the largest gain first, and risks behind them.

    Among gains that the replay cannot tell apart stands what the evidence points at before what is only general, a
    setting before code, and what is about more time before the other.
    """
    left = sorted((one for one in judged if one.gain is not None), key=lambda one: -(one.gain or 0.0))
    ranked: list[_Judgement] = []
    while left:
        most = left[0].gain or 0.0
        near = most - max(limit("tie"), limit("tie_relative") * most)
        alike = [one for one in left if (one.gain or 0.0) >= near]
        first = min(alike, key=_precedence)
        ranked.append(first)
        left = [one for one in left if one is not first]
    return ranked + [one for one in judged if one.gain is None]


def _precedence(one: _Judgement) -> tuple[int, float]:
    rank = "general" if one.found.vague else one.rule.rank
    return _RANKS.index(rank), -one.found.size_s


def _with_sentence(diagnosis: Diagnosis, scene: Scene, causes: Sequence[_Judgement]) -> Diagnosis:
    parts = [_verdict_sentence(diagnosis, scene)]
    costly = [one for one in causes if one.gain is not None]
    if costly:
        labels = list(dict.fromkeys(one.found.label for one in costly))[:2]
        for of in (" of worker CPU)", " of worker time)"):  # said once
            if all(label.endswith(of) for label in labels):
                labels[1:] = [label.replace(of, ")") for label in labels[1:]]
        name = "Limited by" if diagnosis.verdict == "no_step" else "Cause"
        parts.append(f"{name}: {', then '.join(labels)}.")
    elif diagnosis.verdict in ("moderately_input_bound", "highly_input_bound"):
        unseen = scene.load is None
        parts.append(
            "What makes its batches was not seen: a torch DataLoader, or a wrapper of one, tells more."
            if unseen
            else "No cause stands out."
        )
    better = diagnosis.best
    if better is not None and diagnosis.verdict != "not_input_bound" and better.speedup_low > 1:
        changed = _changes(better, scene.setting)
        if changed:
            parts.append(
                f"Try {changed}: predicted {better.speedup:.2g}\N{MULTIPLICATION SIGN} "
                f"[{better.speedup_low:.2g}, {better.speedup_high:.2g}]."
            )
    return msgspec.structs.replace(diagnosis, sentence=" ".join(parts))


def _changes(better: Prediction, setting: Setting) -> str:
    changes = []
    if better.workers != setting.workers:
        changes.append(f"workers={better.workers}")
    if better.workers and better.prefetch is not None and better.prefetch != setting.prefetch:
        changes.append(f"prefetch={better.prefetch}")
    if better.in_order != setting.in_order:
        changes.append(f"in_order={better.in_order}")
    return ", ".join(changes)


def _verdict_sentence(diagnosis: Diagnosis, scene: Scene) -> str:
    wait, step, delivered = diagnosis.wait_s, diagnosis.step_s, diagnosis.delivered_per_s
    if wait is None or step is None or diagnosis.verdict == "unknown":
        return "Not known whether input-bound: no step after the first of an epoch was seen."
    unit = "samples/s" if any(scene.loading.batches.samples) else "batches/s"
    who = _who(scene.loading)
    if diagnosis.verdict == "no_step":
        return f"No step to compare with: {who} {_rate(delivered)} {unit}, one batch in {time(step)}."
    if diagnosis.verdict == "not_input_bound":
        return f"Not input-bound: the step waits {time(wait)} of {time(step)} ({share(diagnosis.wait_share or 0.0)})."
    head = "Moderately input-bound" if diagnosis.verdict == "moderately_input_bound" else "Input-bound"
    could = f", the step could take {_rate(diagnosis.possible_per_s)}" if diagnosis.possible_per_s else ""
    return f"{head}: the step waits {time(wait)} of {time(step)}; {who} {_rate(delivered)} {unit}{could}."


def _who(loading: Loading) -> str:
    workers = setting_of(loading).workers
    if load_of(loading) is None and not workers:
        return "it delivers"
    if workers == 0:
        return "the main process delivers"
    return f"{workers} worker{'s deliver' if workers > 1 else ' delivers'}"


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
