"""Two sides measured in turns: a pilot tells how much pairs scatter, then their number is fixed.

Whatever slows the machine for a while slows both sides of a pair. Two settings of the same code take turns of some
milliseconds in one process; everything else runs in interpreters of its own that are started anew, A B, then B A. Both
sides of a shared process have the same layout of memory and the same imports, so that it may be forked from a server
that has torch already; two processes that are compared with each other may not.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bsprof import stats, store
from bsprof.model import Block, Case, Measurement, Outcome, Plan, Samples, Settings, case_key
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.process import Interpreter, Progressed, run
from bsprof.sweep.runner import death_outcome, measure_all

PILOT = 4
"""Pairs whose scatter says how many there must be. Even, as all numbers of pairs: each order comes as often."""

SURE = 0.8
"""The number of pairs is chosen for a scatter that the true one is below with this probability: four pairs say little
about it (Browne 1995, On the use of a pilot sample for sample size determination)."""

OF_THE_PROCESS = ("deterministic_algorithms",)
"""Axes that cannot be switched between two turns."""


class Side(NamedTuple):
    """What one of the two is: settings of bsprof's own step, or a script, under an interpreter in a directory."""

    name: str
    interpreter: Interpreter
    settings: Settings | None = None
    script: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The case's key in the result."""
        return case_key(self.settings) if self.settings else Path(self.script[0]).name


Pair = tuple[Measurement, Measurement]


def can_share_a_process(a: Side, b: Side, here: Interpreter) -> bool:
    """Whether both sides can take turns in one process: this code, one rank, no workers, nothing beyond switching."""
    if not a.interpreter == b.interpreter == here or a.settings is None or b.settings is None:
        return False
    alike = all(getattr(a.settings, axis) == getattr(b.settings, axis) for axis in OF_THE_PROCESS)
    return alike and all(one.workers == 0 and one.world_size == 1 for one in (a.settings, b.settings))


class Bench:
    """Measures pairs of two sides: `measure(pair)` in an order that changes from pair to pair."""

    def __init__(
        self, sides: tuple[Side, Side], plan: Plan, *, together: bool, stop: Interruption, heard: Callable[[str], None]
    ) -> None:
        self._sides, self._plan, self._together = sides, plan, together
        self._stop, self._heard = stop, heard

    def measure(self, pair: int) -> Pair:
        """Return the pair's two measurements, A first. Raises KeyboardInterrupt when the user stops it."""
        a, b = (Case(key=side.key, settings=side.settings, process=pair) for side in self._sides)
        if self._together:
            question = {"cases": (a, b), "plan": self._plan}
            both = measure_all("measure_pair", question, (a, b), self._plan.deadline_s, self._on_progress, self._stop)
            return both[0], both[1]
        first, second = ((0, a), (1, b)) if pair % 2 == 0 else ((1, b), (0, a))
        found = {place: self._alone(self._sides[place], case) for place, case in (first, second)}
        return found[0], found[1]

    def _alone(self, side: Side, case: Case) -> Measurement:
        if side.script:
            return self._run_script(side, case)
        question = {"case": case, "plan": self._plan}
        (measurement,) = measure_all(
            "measure", question, (case,), self._plan.deadline_s, self._on_progress, self._stop, side.interpreter
        )
        return measurement

    def _run_script(self, side: Side, case: Case) -> Measurement:
        """Run a script to its end. Where it leaves a Recorder's result its steps count, else the run is one step."""
        with tempfile.TemporaryDirectory(prefix="bsprof-") as folder:
            result = Path(folder, "result.json")
            reply = run(
                side.script,
                side.interpreter,
                {store.COPY_VARIABLE: str(result)},
                deadline_s=self._plan.deadline_s,
                on_tick=lambda: self._heard("running"),
                stop=self._stop,
            )
            if reply.death is not None:
                outcome = death_outcome(reply.death, "run", self._plan.deadline_s, 0)
                return Measurement(case=case, outcome=outcome, wall_s=reply.wall_s)
            if result.exists():
                recorded = store.load(result).measurements[0]
                return msgspec.structs.replace(recorded, case=case, wall_s=reply.wall_s)
        wall_ns = round(reply.wall_s * 1e9)
        block = Block(kind="bare", steps=1, wall_ns=wall_ns)
        samples = Samples(batch_size=None, step_ns=[wall_ns], host_ns={}, blocks=[block])
        return Measurement(case=case, outcome=Outcome(kind="ok"), wall_s=reply.wall_s, samples=samples)

    def _on_progress(self, message: Progressed | None) -> None:
        if message is not None:
            self._heard(message.stage)


# --- how many pairs ---------------------------------------------------------------------------------


class Protocol(NamedTuple):
    """What the number of pairs is to reach, and what it may take."""

    threshold: float
    """A change within it is none."""
    effect: float
    """Change that is to be found in 80 % of runs; beyond the threshold."""
    budget_s: float
    most: int = 200
    """Pairs."""


def pairs_asked(ratios: Sequence[float], protocol: Protocol) -> int:
    """Return how many pairs find `effect` in 80 % of runs, judged by the pilot's ratios (b / a of each pair).

    The pilot's standard deviation of the logarithms is raised to its upper one-sided `SURE` bound, s sqrt((n - 1) /
    chi2(1 - SURE, n - 1)). Even, and not fewer than the pilot.
    """
    upper = stats.upper_deviation([math.log(ratio) for ratio in ratios], SURE)
    asked = stats.pairs_needed(upper, protocol.effect, protocol.threshold)
    return max(PILOT, min(protocol.most, asked + asked % 2))


def affordable(pairs: int, pair_s: float, spent_s: float, protocol: Protocol) -> int:
    """Return how many of `pairs` the budget allows in all, even, and not fewer than the pilot."""
    left = max(0.0, protocol.budget_s - spent_s)
    more = int(left / pair_s) if pair_s > 0 else pairs
    return max(PILOT, min(pairs, PILOT + more - more % 2))


class Taken(NamedTuple):
    """The pairs that were measured, and how many there were to be."""

    pairs: list[Pair]
    asked: int
    """By the pilot's scatter; more than were measured where the budget ended before."""
    interrupted: bool


def take(
    measure: Callable[[int], Pair],
    ratio_of: Callable[[Pair], float | None],
    protocol: Protocol,
    on_pair: Callable[[list[Pair], int], None],
    clock: Callable[[], float] = time.monotonic,
) -> Taken:
    """Measure the pilot's pairs, fix their number, and measure the rest; nothing that is seen on the way ends it.

    Deciding while collecting would: looking after each pair, and stopping at the first verdict, lifts false verdicts
    from 4 % to 22 %. `ratio_of` gives b / a of a pair, None where a side failed, which ends the run: what failed once
    fails again. `on_pair` hears of each pair what there is and how many there are to be.
    """
    pairs: list[Pair] = []
    ratios: list[float] = []
    total = asked = PILOT
    began = clock()
    try:
        while len(pairs) < total:
            pairs.append(measure(len(pairs)))
            ratio = ratio_of(pairs[-1])
            if ratio is not None:
                ratios.append(ratio)
            if len(pairs) == PILOT and len(ratios) == PILOT:
                spent = clock() - began
                asked = pairs_asked(ratios, protocol)
                total = affordable(asked, spent / PILOT, spent, protocol)
            on_pair(pairs, total)
            if ratio is None:
                break
    except KeyboardInterrupt:
        return Taken(pairs, asked, True)
    return Taken(pairs, asked, False)
