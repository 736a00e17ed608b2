"""How many pairs are measured, and what neighbours in time say that medians do not."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from machines import environment

from bsprof import stats
from bsprof.compare import compare
from bsprof.model import Block, Case, Facts, Gate, Measurement, Outcome, Result, Samples, Settings, Turns, case_key
from bsprof.readings import Reading
from bsprof.sweep.turns import PILOT, Protocol, affordable, pairs_asked, take

PROTOCOL = Protocol(threshold=0.005, effect=0.02, budget_s=100.0)


def measuring(ratios, *, seconds=1.0, fails_at=None):
    """Return a measure and a ratio_of over planned ratios, and the clock that measuring moves."""
    now = [0.0]

    def measure(pair):
        now[0] += seconds
        return pair, pair

    def ratio_of(pair):
        return None if pair[0] == fails_at else ratios[pair[0] % len(ratios)]

    return measure, ratio_of, lambda: now[0]


def test_the_number_is_fixed_after_the_pilot_whatever_comes_then():
    told = []
    measure, ratio_of, clock = measuring([1.0, 1.004, 0.996, 1.0, 2.0, 0.5, 2.0, 0.5])
    taken = take(measure, ratio_of, PROTOCOL, lambda pairs, total: told.append((len(pairs), total)), clock)
    assert taken.asked == pairs_asked([1.0, 1.004, 0.996, 1.0], PROTOCOL) == len(taken.pairs)
    assert told == [(n, PILOT if n < PILOT else taken.asked) for n in range(1, taken.asked + 1)]


def test_pairs_that_agree_need_no_more_than_the_pilot():
    measure, ratio_of, clock = measuring([1.2])
    assert len(take(measure, ratio_of, PROTOCOL, lambda *_: None, clock).pairs) == PILOT


def test_the_budget_ends_it_before_and_each_order_comes_as_often():
    measure, ratio_of, clock = measuring([1.0, 1.2], seconds=7.0)
    taken = take(measure, ratio_of, PROTOCOL, lambda *_: None, clock)
    assert taken.asked == PROTOCOL.most
    assert len(taken.pairs) == 14 and clock() <= PROTOCOL.budget_s


def test_a_side_that_fails_ends_it():
    measure, ratio_of, clock = measuring([1.0], fails_at=1)
    taken = take(measure, ratio_of, PROTOCOL, lambda *_: None, clock)
    assert (len(taken.pairs), taken.interrupted) == (2, False)


def test_what_was_measured_before_an_interruption_is_kept():
    def measure(pair):
        if pair == 2:
            raise KeyboardInterrupt
        return pair, pair

    taken = take(measure, lambda _: 1.0, PROTOCOL, lambda *_: None)
    assert (taken.pairs, taken.interrupted) == ([(0, 0), (1, 1)], True)


def test_the_asked_number_reaches_the_power_it_is_chosen_for():
    """Of 400 simulated runs with a true change of `effect`, more than 80 % find it: the pilot's bound is on top."""
    random = np.random.default_rng(5)
    found = 0
    for _ in range(400):
        logs = random.normal(math.log1p(PROTOCOL.effect), 0.01, PROTOCOL.most)
        pairs = pairs_asked(list(np.exp(logs[:PILOT])), PROTOCOL)
        ratio = stats.change(np.exp(logs[:pairs]), np.ones(pairs), paired=True)
        found += ratio.value > 1 and ratio.chance(PROTOCOL.threshold) < 0.025
    assert found / 400 > 0.8


@pytest.mark.parametrize("sure", [0.5, 0.8, 0.95])
def test_the_upper_deviation_is_above_the_true_one_as_often_as_it_says(sure):
    random = np.random.default_rng(3)
    above = sum(stats.upper_deviation(random.normal(0, 2.0, 4), sure) > 2.0 for _ in range(2000))
    assert above / 2000 == pytest.approx(sure, abs=0.03)


def test_one_value_has_no_scatter():
    with pytest.raises(ValueError, match="no scatter"):
        stats.upper_deviation([1.0], 0.8)


def test_no_budget_is_too_small_for_the_pilot():
    assert affordable(50, pair_s=10.0, spent_s=500.0, protocol=PROTOCOL) == PILOT


# --- neighbours ---------------------------------------------------------------------------------------


def side(letter, times, turn, *, together=True, batch=8, **settings):
    """Return one side of a run of processes whose steps took `times` ns, a row a process, in turns of `turn` steps."""
    asked = Settings(batch_size=batch, **settings)
    measurements = [
        Measurement(
            case=Case(key=case_key(asked), settings=asked, process=number),
            outcome=Outcome(kind="ok"),
            wall_s=1.0,
            facts=Facts(device="cpu", threads=asked.threads or 1),
            samples=Samples(
                batch_size=batch,
                step_ns=[int(t) for t in row],
                host_ns={"forward": [int(t) for t in row]},
                blocks=[
                    Block(kind="instrumented", steps=turn, wall_ns=int(row[i : i + turn].sum()))
                    for i in range(0, len(row), turn)
                ],
            ),
        )
        for number, row in enumerate(times)
    ]
    turns = Turns(
        run="1", side=letter, name=letter, together=together, threshold=0.005, effect=0.02, pilot=4, asked=len(times)
    )
    return Result(
        created="2026-11-21T00:00:00+00:00",
        plan=None,
        environment=environment(),
        measurements=measurements,
        turns=turns,
    )


def noisy(seed, processes=4, turns=60, turn=2):
    """Return the slowness of a machine that changes its speed by half from turn to turn, the same for neighbours."""
    random = np.random.default_rng(seed)
    speed = random.choice([1.0, 1.5], (processes, turns)).repeat(turn, axis=1)
    return speed * random.lognormal(0, 0.01, speed.shape) * 1e7


def test_neighbours_tell_what_medians_hide():
    machine = noisy(1)
    again = machine * np.random.default_rng(2).lognormal(0, 0.01, machine.shape)
    together, apart = (
        compare(side("a", machine, 2, together=how), side("b", 1.02 * again, 2, together=how), Gate(threshold=0.005))
        for how in (True, False)
    )
    (step,), (medians,) = together.cases[0].gated, apart.cases[0].gated
    assert step.ratio == pytest.approx(1.02, abs=0.003) and step.verdict == "regressed"
    assert step.high - step.low < (medians.high - medians.low) / 3
    assert [one.verdict for one in together.cases[0].phases] == ["regressed"]


def test_batches_of_two_sizes_are_told_a_sample():
    machine = noisy(3)
    found = compare(side("a", machine, 2, batch=8), side("b", 1.5 * machine, 2, batch=16), Gate())
    (throughput,) = found.cases[0].gated
    assert (throughput.metric, throughput.verdict) == ("throughput", "improved")
    assert throughput.ratio == pytest.approx(2 / 1.5, rel=0.01)
    (forward,) = found.cases[0].phases
    assert forward.label == "forward a sample" and forward.ratio == pytest.approx(1.5 / 2, rel=0.01)


def test_what_is_compared_is_no_reason_to_refuse():
    machine = noisy(4)
    a, b = side("a", machine, 2, threads=1), side("b", machine, 2, threads=2)
    assert compare(a, b, Gate()).cases[0].refused == ()
    strangers = (msgspec.structs.replace(one, turns=None) for one in (a, b))
    assert compare(*strangers, Gate()).cases == ()


def test_a_process_without_its_other_half_does_not_count():
    machine = noisy(5)
    a, b = side("a", machine, 2), side("b", machine, 2)
    failed = msgspec.structs.replace(b.measurements[1], outcome=Outcome(kind="crash"), samples=None)
    b = msgspec.structs.replace(b, measurements=[b.measurements[0], failed, *b.measurements[2:]])
    (case,) = compare(a, b, Gate()).cases
    assert (case.base_processes, case.new_processes) == (3, 3)
    assert case.gated[0].ratio == pytest.approx(1.0)


def test_turns_are_the_steady_steps_of_each_instrumented_block():
    samples = Samples(
        batch_size=1,
        step_ns=[10, 20, 30, 40, 50],
        host_ns={"data": [1, 2, 3, 4, 5]},
        blocks=[
            Block(kind="instrumented", steps=2, wall_ns=30),
            Block(kind="bare", steps=2, wall_ns=30),
            Block(kind="instrumented", steps=1, wall_ns=30),
            Block(kind="instrumented", steps=2, wall_ns=90),
        ],
        epoch_boundaries=[1, 2],
    )
    reading = Reading(samples)
    assert reading.turns() == pytest.approx([10e-9, None, 45e-9])
    assert reading.turns("data") == pytest.approx([1e-9, None, 4.5e-9])
