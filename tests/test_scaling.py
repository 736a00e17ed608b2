"""Where the step of several ranks goes, who is late, how efficient a world is, and what larger ones would do."""

from __future__ import annotations

import math
import random

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import BUCKETS, MS, OWN_MS, all_reduces, result, settings, world

from bsprof import exchange
from bsprof.metrics import METRICS, CaseSummary, find_metric, summarise
from bsprof.model import AllReduce, Block, Measurement, Outcome
from bsprof.readings import Reading
from bsprof.scaling import Ring, checked, costs, efficiency, fit, outlooks, scaled

replace = msgspec.structs.replace
OWN_S = sum(OWN_MS.values()) / 1e3
PHASES = ("data", "h2d", "forward", "before", "optimizer", "other")
"""In which a rank can be late; `before` is the part of backward until its first gradients."""


def read(measurement: Measurement) -> Reading:
    assert measurement.samples is not None
    return Reading(measurement.samples, measurement=measurement)


def each_rank(measurement, change):
    """Return a measurement with `change(rank)` in the place of each rank."""
    return replace(measurement, ranks=tuple(change(rank) for rank in measurement.ranks))


def rows_of(*measurements, **fields):
    made = result(*measurements, **fields)
    return scaled(made, summarise(made))


# --- where a step goes --------------------------------------------------------------------------------


@hypothesis.settings(deadline=None)
@given(
    exposed_ms=st.floats(-3, 30),
    late_ms=st.floats(0, 30),
    loading_ms=st.floats(0, 30),
    size=st.integers(2, 5),
)
def test_four_parts_add_up_to_the_mean_step(exposed_ms, late_ms, loading_ms, size):
    more = {0: {"forward": late_ms}, size - 1: {"data": loading_ms}}
    reading = read(world(size, exposed_ms=exposed_ms, more_ms=more, steps=20, pairs=2))
    found = exchange.split(reading)
    assert found.step_s == reading.mean
    parts = (found.compute_s, found.exposed_s, found.skew_s, found.loading_s)
    assert sum(parts) == pytest.approx(found.step_s, rel=1e-12)


def test_planted_communication_comes_back_with_its_interval():
    found = exchange.exposed(read(world(3, exposed_ms=6.0, jitter=0.01)))
    assert found.low < 6e-3 < found.high
    assert found.value == pytest.approx(6e-3, abs=0.5e-3)
    assert found.n == 8


def test_intervals_of_the_communication_hold_it_95_times_in_100():
    held = [
        (found := exchange.exposed(read(world(2, exposed_ms=5.0, jitter=0.02, seed=seed, steps=4)))).low
        <= 5e-3
        <= found.high
        for seed in range(150)
    ]
    assert 0.88 <= np.mean(held) <= 1.0


def test_a_slow_rank_is_skew_and_no_communication():
    reading = read(world(4, exposed_ms=2.0, more_ms={2: {"forward": 12.0}}))
    found = exchange.split(reading)
    assert found.skew_s == pytest.approx(9e-3, abs=0.3e-3)  # 12 ms above three equals: 12 - 12 / 4
    assert found.exposed_s == pytest.approx(2e-3, abs=0.3e-3)
    # What all ranks have to do in the mean, less their loading: 3 of 12 ms are spread over four ranks.
    assert found.compute_s == pytest.approx(OWN_S - 1e-3 + 3e-3, abs=0.5e-3)


def test_loading_is_the_mean_over_the_ranks():
    found = exchange.split(read(world(4, more_ms={1: {"data": 8.0}}, jitter=0.0)))
    assert found.loading_s == pytest.approx(3e-3, rel=1e-3)


@pytest.mark.parametrize("size", [2, 8])
def test_equal_ranks_are_rarely_called_uneven(size):
    sure = [
        exchange.skew(read(world(size, jitter=0.05, seed=seed, steps=2, pairs=6, block=5))).low > 0
        for seed in range(200)
    ]
    assert np.mean(sure) < 0.1
    assert exchange.skew(read(world(size, more_ms={0: {"rest": 9.0}}, jitter=0.01))).low > 0


def test_communication_below_zero_keeps_its_sign():
    found = exchange.split(read(world(2, exposed_ms=-1.5, jitter=0.0)))
    assert found.exposed_s == pytest.approx(-1.5e-3, rel=1e-3)


def test_a_world_without_unsynchronised_blocks_has_loading_alone():
    bare = each_rank(world(2), lambda rank: replace(rank, blocks=[]))
    found = exchange.split(read(bare))
    assert (found.compute_s, found.exposed_s, found.skew_s) == (None, None, None)
    assert found.loading_s is not None
    assert exchange.exposed(read(bare)) is None and exchange.skew(read(bare)) is None


def test_one_pair_has_no_interval():
    found = exchange.exposed(read(world(2, pairs=1)))
    assert found.value == pytest.approx(4e-3, rel=0.1) and found.low is None and found.n == 1


def test_blocks_that_ranks_do_not_share_are_left_out():
    whole = world(2, pairs=4, jitter=0.0)
    first, second = whole.ranks
    other = [*second.blocks[:6], *(replace(block, steps=3) for block in second.blocks[6:])]
    found = exchange.exposed(read(replace(whole, ranks=(first, replace(second, blocks=other)))))
    assert found.n == 3


def test_the_devices_clock_is_taken_where_there_is_one():
    def on_device(rank):
        return replace(
            rank, blocks=[replace(block, device_wall_ns=block.wall_ns, wall_ns=10**12) for block in rank.blocks]
        )

    assert exchange.exposed(read(each_rank(world(2), on_device))) == exchange.exposed(read(world(2)))


def test_one_rank_computes_and_loads_and_nothing_else():
    found = exchange.split(read(world(1)))
    assert (found.exposed_s, found.skew_s) == (None, None)
    assert found.compute_s + found.loading_s == pytest.approx(found.step_s, rel=1e-12)


def test_what_is_missing_of_one_rank_is_known_of_none():
    first, second = world(2).ranks
    lost = replace(world(2), ranks=(first, replace(second, samples=None)))
    assert exchange.loading(read(lost)) is None and exchange.late(read(lost)) is None
    unmarked = replace(world(2), ranks=(first, replace(second, before_reduce_ns=None)))
    assert exchange.late(read(unmarked)) is None and exchange.skew_by_phase(read(unmarked)) == {}


# --- who is late --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_planted_straggler_is_named_with_its_phase_and_by_how_much(phase, rank):
    found = exchange.late(read(world(3, more_ms={rank: {phase: 20.0}}, block=30)))
    assert found.rank == rank
    assert found.phase == {"before": "backward"}.get(phase, phase)
    assert found.by.value == pytest.approx(20e-3, abs=0.5e-3)
    assert found.longer_s == pytest.approx(20e-3, abs=0.5e-3)
    # Before the first step of a block the end of the last one does not count.
    assert found.share >= (0.9 if phase in ("optimizer", "other") else 1.0)


def test_a_slow_rest_of_backward_names_nobody_by_the_whole_of_it():
    """Everybody's backward lasts until the last has come: what follows the first gradients cannot be told apart."""
    assert exchange.late(read(world(3, more_ms={1: {"rest": 20.0}}))) is None


@pytest.mark.parametrize("seed", range(12))
def test_of_equal_ranks_none_is_named(seed):
    assert exchange.late(read(world(4, jitter=0.05, seed=seed))) is None


def test_a_rank_that_is_late_in_few_steps_is_not_named():
    whole = world(2, steps=60)
    first, second = whole.ranks
    data = [ns + (50 * MS if step % 3 == 0 else 0) for step, ns in enumerate(second.samples.host_ns["data"])]
    late = replace(second, samples=replace(second.samples, host_ns={**second.samples.host_ns, "data": data}))
    assert exchange.late(read(replace(whole, ranks=(first, late)))) is None


def test_less_than_a_hundredth_of_the_step_is_not_worth_a_name():
    assert exchange.late(read(world(2, more_ms={1: {"forward": 0.4}}, jitter=0.0001))) is None
    assert exchange.late(read(world(2, more_ms={1: {"forward": 1.0}}, jitter=0.0001))).rank == 1


def test_too_few_steps_name_nobody():
    assert exchange.late(read(world(2, more_ms={1: {"forward": 20.0}}, steps=4))) is None
    assert exchange.late(read(world(2, more_ms={1: {"forward": 20.0}}, steps=1))) is None


def test_ranks_may_come_in_any_order():
    whole = world(5, more_ms={3: {"data": 9.0}}, jitter=0.01)
    found = exchange.late(read(whole)), exchange.split(read(whole)), exchange.skew_by_phase(read(whole))
    for seed in range(5):
        ranks = list(whole.ranks)
        random.Random(seed).shuffle(ranks)
        other = read(replace(whole, ranks=tuple(ranks)))
        assert exchange.late(other) == found[0]
        assert exchange.split(other) == pytest.approx(found[1], rel=1e-12)
        assert exchange.skew_by_phase(other) == pytest.approx(found[2], rel=1e-12)


def test_all_ranks_begin_a_block_together():
    """Where each step is a block of its own, what a rank does after its exchange makes nobody wait."""
    assert exchange.late(read(world(2, more_ms={1: {"optimizer": 20.0}}, block=1))) is None


def test_steps_in_which_an_epoch_ended_do_not_count():
    whole = world(2, more_ms={1: {"data": 20.0}}, steps=40)

    def boundaries(rank):
        return replace(rank, samples=replace(rank.samples, epoch_boundaries=list(range(20, 40))))

    assert exchange.late(read(each_rank(whole, boundaries))).by.n == 20
    all_of_them = each_rank(
        whole, lambda rank: replace(rank, samples=replace(rank.samples, epoch_boundaries=list(range(40))))
    )
    assert exchange.late(read(all_of_them)) is None


def test_lateness_is_told_by_the_devices_clock_where_there_is_one():
    def on_device(rank):
        taken = rank.samples
        idle = {phase: [0] * len(ns) for phase, ns in taken.host_ns.items()}
        moved = {"host_ns": idle, "device_ns": taken.host_ns, "device_step_ns": taken.step_ns}
        return replace(rank, samples=replace(taken, **moved))

    whole = world(3, more_ms={1: {"before": 9.0}})
    assert exchange.late(read(each_rank(whole, on_device))) == exchange.late(read(whole))


def test_a_late_rank_0_is_named_where_the_others_wait_for_its_buffers():
    """Their forward waits, and so takes longer than the late one's: they are not to be blamed for it."""
    found = exchange.late(read(world(3, more_ms={0: {"data": 15.0}}, buffers=True)))
    assert (found.rank, found.phase) == (0, "data")
    assert found.by.value == pytest.approx(15e-3, abs=0.5e-3)


def test_another_late_rank_is_named_beside_rank_0s_buffers():
    found = exchange.late(read(world(3, more_ms={1: {"data": 15.0}}, buffers=True)))
    assert (found.rank, found.phase) == (1, "data")
    both = exchange.late(read(world(3, more_ms={0: {"data": 15.0}, 2: {"forward": 10.0}}, buffers=True)))
    assert (both.rank, both.phase) == (2, "forward")


def test_under_sync_batchnorm_only_what_comes_before_forward_is_looked_at():
    assert exchange.late(read(world(2, more_ms={1: {"forward": 20.0}}, sync_batchnorm=True))) is None
    found = exchange.late(read(world(2, more_ms={1: {"data": 20.0}}, sync_batchnorm=True)))
    assert (found.rank, found.phase) == (1, "data")


def test_skew_is_told_by_phase():
    found = exchange.skew_by_phase(read(world(4, more_ms={1: {"data": 8.0}, 2: {"before": 4.0}}, jitter=0.0)))
    assert found["data"] == pytest.approx(6e-3, rel=1e-3)
    assert found["backward"] == pytest.approx(3e-3, rel=1e-3)
    assert found["forward"] == pytest.approx(0.0, abs=1e-9)
    assert set(found) == {"data", "h2d", "forward", "backward", "optimizer", "other"}


# --- what is exchanged --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_bus_bandwidth_is_that_of_nccls_tests(size):
    found = exchange.exchange(read(world(size, steps=4, pairs=1)))
    assert found.bytes == sum(BUCKETS)
    assert found.bus_bandwidth == pytest.approx(2 * (size - 1) / size * 14e6 / 20e-3)
    assert found.hidden == pytest.approx(0.8)


def test_traced_collectives_go_before_what_ddp_says():
    found = exchange.exchange(read(world(2, exposed_ms=4.0, jitter=0.0, told={"collectives_ns": 16 * MS})))
    assert found.seconds == pytest.approx(16e-3)
    assert found.hidden == pytest.approx(1 - 4 / 16, rel=1e-3)


def test_hooks_change_what_travels():
    assert exchange.exchange(read(world(2, comm_hook="fp16"))).bytes == sum(BUCKETS) // 2
    own = exchange.exchange(read(world(2, comm_hook="mine.hooks:sparse")))
    assert own.bytes is None and own.bus_bandwidth is None and own.hidden == pytest.approx(0.8)


def test_an_exchange_that_was_not_told_is_none():
    assert exchange.exchange(read(replace(world(2), communication=None))) is None
    assert exchange.exchange(read(world(1))) is None
    untimed = exchange.exchange(read(world(2, told={"reduce_ns": None, "overlap_ns": None})))
    assert untimed.seconds is None and untimed.bus_bandwidth is None and untimed.hidden is None


# --- as metrics ---------------------------------------------------------------------------------------


def test_metrics_of_ranks_can_be_asked_for():
    case = CaseSummary([world(2, exposed_ms=5.0)])
    assert case.value("exposed") == pytest.approx(5e-3, abs=0.4e-3)
    assert case.interval("exposed") is not None
    assert case.value("exposed_share") == pytest.approx(5e-3 / case.value("step_mean"), rel=0.1)
    assert case.value("skew") >= 0
    assert case.value("hidden_communication") == pytest.approx(0.8)
    assert case.value("bus_bandwidth") == pytest.approx(14e6 / 20e-3)
    assert {find_metric(key).better for key in ("exposed", "exposed_share", "skew")} == {"lower"}
    assert {find_metric(key).better for key in ("hidden_communication", "bus_bandwidth")} == {"higher"}


def test_one_rank_has_none_of_them():
    case = CaseSummary([world(1)])
    for key in ("exposed", "exposed_share", "skew", "hidden_communication", "bus_bandwidth"):
        assert case[key] is None
    assert case.phases == ["data", "h2d", "forward", "backward", "optimizer"]


def test_of_several_processes_the_interval_is_between_them():
    case = CaseSummary([world(2, exposed_ms=ms, process=process) for process, ms in enumerate((4.0, 5.0, 6.0))])
    assert case.value("exposed") == pytest.approx(5e-3, abs=0.2e-3)
    low, high = case.interval("exposed")
    assert high - low == pytest.approx(2 * 4.303 * 1e-3 / math.sqrt(3), rel=0.2)


def test_throughput_is_that_of_all_ranks_together():
    one, four = CaseSummary([world(1)]), CaseSummary([world(4, exposed_ms=0.0)])
    assert four.value("throughput") == pytest.approx(4 * one.value("throughput"), rel=0.02)


# --- efficiency ---------------------------------------------------------------------------------------


def test_without_ranks_there_is_no_scaling():
    assert rows_of(world(1)) == []
    failed = replace(world(2), outcome=Outcome(kind="crash"), samples=None)
    assert rows_of(world(1), failed) == []


def test_efficiency_of_weak_scaling():
    one, two, four = rows_of(world(1), world(2, exposed_ms=OWN_S * 1e3 / 9), world(4, exposed_ms=OWN_S * 1e3 / 3))
    assert (one.world, two.world, four.world) == (1, 2, 4)
    assert one.base is None and one.efficiency is None
    assert two.efficiency.value == pytest.approx(0.9, rel=0.01)
    assert four.efficiency.value == pytest.approx(0.75, rel=0.01)
    assert four.base is one.case and not four.efficiency.between
    assert four.efficiency.low < four.efficiency.value < four.efficiency.high


def test_efficiency_of_strong_scaling():
    """Two ranks have half the batch each, and in this world half the work."""
    one, two = world(1, batch_size=64, exposed_ms=0), world(2, batch_size=32, scale=0.5, exposed_ms=OWN_S * 1e3 / 2)
    _, found = sorted(rows_of(one, two, scaling="strong"), key=lambda row: row.world)
    assert found.efficiency.value == pytest.approx(0.5, rel=0.01)
    weak = rows_of(one, two)
    assert [row.base for row in weak] == [None]


def test_without_a_world_of_one_the_smallest_is_the_base():
    two, four = rows_of(world(2), world(4, exposed_ms=20.0))
    assert two.base is None and two.efficiency is None
    assert four.base is two.case
    assert four.efficiency.value == pytest.approx((OWN_S + 4e-3) / (OWN_S + 20e-3), rel=0.01)


def test_cases_differ_in_the_world_alone():
    rows = rows_of(world(1), world(1, batch_size=64), world(2), world(2, batch_size=64), world(2, amp="bf16"))
    bases = [(row.case.settings.batch_size, row.case.settings.amp, row.base and row.base.settings) for row in rows]
    assert (32, "off", settings()) in bases and (64, "off", settings(batch_size=64)) in bases
    assert (32, "bf16", None) in bases


def test_what_one_rank_has_no_use_for_is_no_difference():
    rows = rows_of(world(1), world(2, comm_hook="fp16"), world(4, comm_hook="fp16"), world(4, comm_hook="none"))
    assert len({row.base.case.key for row in rows if row.base}) == 1
    assert {row.base.settings.world_size for row in rows if row.base} == {1}


def test_without_one_rank_hooks_are_a_difference():
    rows = rows_of(world(2, comm_hook="fp16"), world(4, comm_hook="fp16"), world(4))
    assert {(row.world, row.case.settings.comm_hook): row.base is not None for row in rows} == {
        (2, "fp16"): False,
        (4, "fp16"): True,
        (4, "none"): False,
    }


def test_between_processes_it_is_welchs_interval():
    def cases(size, scales):
        return CaseSummary([world(size, scale=s, exposed_ms=0.0, process=i) for i, s in enumerate(scales)])

    found = efficiency(cases(2, (1.0, 1.02, 0.98)), cases(1, (1.0, 1.01, 0.99)))
    assert found.between
    assert found.value == pytest.approx(1.0, abs=0.01)
    assert 0.02 < found.high - found.low < 0.1
    assert not efficiency(cases(2, (1.0, 1.02)), cases(1, (1.0,))).between


@hypothesis.settings(deadline=None, max_examples=20)
@given(st.floats(0.2, 5.0))
def test_efficiency_has_no_unit(scale):
    """A machine that is faster in everything scales as well as before."""
    pair = [world(p, steps=12, pairs=1, exposed_ms=3.0 * scale, scale=scale) for p in (1, 2)]
    plain = [world(p, steps=12, pairs=1, exposed_ms=3.0) for p in (1, 2)]
    found, other = (efficiency(CaseSummary([two]), CaseSummary([one])) for one, two in (pair, plain))
    assert found.value == pytest.approx(other.value, rel=1e-4)


def test_costs_add_up_to_what_is_lost():
    one, two = rows_of(world(1), world(2, exposed_ms=6.0, more_ms={1: {"data": 4.0}}))
    found = costs(two, one)
    assert sum(found.values()) == pytest.approx(two.split.step_s - one.split.step_s, rel=1e-9)
    assert max(found, key=found.get) == "communication"
    assert set(costs(two, None)) == {"communication", "skew"}


def test_costs_of_strong_scaling_are_against_the_share_of_the_work():
    pair = world(1, batch_size=64), world(2, batch_size=32, scale=0.5, exposed_ms=5.0)
    one, two = sorted(rows_of(*pair, scaling="strong"), key=lambda row: row.world)
    found = costs(two, one)
    assert found["communication"] == pytest.approx(5e-3, rel=0.1)
    assert found["compute"] == pytest.approx(0.0, abs=0.5e-3)


def test_the_rank_that_most_processes_name_is_the_late_one():
    late = [world(2, more_ms={rank: {"forward": 9.0}}, process=i) for i, rank in enumerate((1, 0, 1))]
    (row,) = rows_of(*late)
    assert row.late.rank == 1 and row.named == 2 and row.processes == 3


# --- the ring -----------------------------------------------------------------------------------------


@given(st.floats(1e-7, 1e-2), st.floats(1e6, 1e12))
def test_times_that_follow_the_model_give_it_back(alpha_s, beta):
    ring = fit(all_reduces(alpha_s, beta))
    for point in all_reduces(alpha_s, beta, worlds=(2, 16)):
        assert ring.seconds([point.bytes], point.world_size) == pytest.approx(point.seconds, rel=1e-5)


def test_alpha_and_beta_are_found():
    ring = fit(all_reduces(40e-6, 1.5e9))
    assert ring.alpha_s == pytest.approx(40e-6, rel=1e-9)
    assert ring.beta == pytest.approx(1.5e9, rel=1e-9)
    assert ring.scatter == pytest.approx(0.0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(2, 16), st.integers(1, 2**30), st.floats(1e-6, 10)), min_size=3, max_size=12))
def test_neither_latency_nor_bandwidth_is_negative(measured):
    points = [AllReduce(backend="gloo", world_size=p, bytes=n, seconds=t) for p, n, t in measured]
    ring = fit(points)
    if len({one.bytes for one in points}) < 2:
        assert ring is None
        return
    assert ring.alpha_s >= 0 and ring.s_per_byte >= 0 and math.isfinite(ring.scatter)
    assert ring.alpha_s + ring.s_per_byte > 0
    found = ring.at(2**20, 4)
    assert found.low <= found.value <= found.high


def test_no_other_pair_fits_better():
    points = all_reduces(noise=0.2, seed=3)
    best = fit(points)

    def squares(alpha, s_per_byte):
        ring = best._replace(alpha_s=alpha, s_per_byte=s_per_byte)
        return sum((ring.seconds([one.bytes], one.world_size) / one.seconds - 1) ** 2 for one in points)

    least = squares(best.alpha_s, best.s_per_byte)
    for a in (0.97, 1.0, 1.03):
        for b in (0.97, 1.0, 1.03):
            assert squares(best.alpha_s * a, best.s_per_byte * b) >= least


def test_intervals_hold_a_new_measurement_95_times_in_100():
    held = []
    for seed in range(300):
        points = all_reduces(noise=0.05, seed=seed)
        found = fit(points[:-1]).at(points[-1].bytes, points[-1].world_size)
        held.append(found.low <= points[-1].seconds <= found.high)
    assert 0.91 <= np.mean(held) <= 0.99


def test_too_little_gives_no_model():
    assert fit([]) is None
    assert fit(all_reduces()[:2]) is None
    assert fit([one for one in all_reduces(worlds=(2, 4, 8)) if one.bytes == 2**10]) is None
    assert checked([]) is None and checked(all_reduces()[:3]) is None


def test_the_check_has_not_seen_what_it_predicts():
    points = all_reduces(noise=0.02)
    doubled = [replace(one, seconds=one.seconds * 2) if one.bytes == 2**26 else one for one in points]
    plain, found = checked(points), checked(doubled)
    assert plain.predicted == found.predicted
    assert plain.holds and not found.holds
    assert (found.world, found.bytes) == (4, 2**26)
    assert plain.error == pytest.approx(plain.predicted.value / plain.measured - 1)


@given(st.integers(2, 32), st.integers(2, 8))
def test_exchanges_grow_with_the_world(size, times):
    ring = fit(all_reduces(noise=0.03))
    found = ring.growth(BUCKETS, size, times * size)
    assert found.value == pytest.approx(ring.seconds(BUCKETS, times * size) / ring.seconds(BUCKETS, size))
    assert found.low <= found.value <= found.high and found.value > 1


def test_without_latency_an_exchange_grows_to_twice_that_of_two_ranks():
    ring = Ring(0.0, 1e-9, 0.0, 10, (0.0, 0.0, 0.0))
    assert ring.growth([10**6], 2, 2**20).value == pytest.approx(2.0, rel=1e-5)


# --- larger worlds ------------------------------------------------------------------------------------


def outlook(*measurements, **fields):
    made = result(*measurements, **fields)
    return outlooks(made, scaled(made, summarise(made)))


def test_larger_worlds_are_predicted_from_the_largest_measured():
    points = all_reduces(noise=0.01)
    (found,) = outlook(world(1), world(2), world(4, exposed_ms=8.0), all_reduce=points)
    assert found.start.world == 4 and found.points == len(points)
    assert [one.world for one in found.worlds] == [8, 16, 32]
    split, estimate = found.start.split, found.start.exposed
    for one in found.worlds:
        grown = estimate.value * found.ring.growth(BUCKETS, 4, one.world).value
        assert one.exposed_s == pytest.approx(grown)
        assert one.step.value == pytest.approx(split.compute_s + split.loading_s + split.skew_s + grown)
        assert one.step.low < one.step.value < one.step.high
        assert one.efficiency == pytest.approx(found.start.efficiency.value * split.step_s / one.step.value)
        assert one.throughput == pytest.approx(
            found.start.case.value("throughput") * one.world / 4 * split.step_s / one.step.value
        )
    assert found.check is not None and found.check.holds


def test_a_prediction_is_less_sure_the_farther_it_is_and_the_less_its_parts_are():
    (plain,) = outlook(world(2, exposed_ms=8.0), all_reduce=all_reduces(noise=0.01))
    widths = [one.step.high - one.step.low for one in plain.worlds]
    assert widths == sorted(widths)
    (noisy,) = outlook(world(2, exposed_ms=8.0), all_reduce=all_reduces(noise=0.2))
    (loose,) = outlook(world(2, exposed_ms=8.0, jitter=0.05), all_reduce=all_reduces(noise=0.01))
    for other in (noisy, loose):
        assert other.worlds[0].step.high - other.worlds[0].step.low > widths[0]


def test_nothing_is_predicted_without_a_source():
    assert outlook(world(2)) == []
    nccl = tuple(replace(one, backend="nccl") for one in all_reduces())
    assert outlook(world(2), all_reduce=nccl) == []
    assert outlook(replace(world(2), communication=None), all_reduce=all_reduces()) == []
    (hidden,) = outlook(world(2, exposed_ms=-2.0), all_reduce=all_reduces())
    assert hidden.worlds == ()
    (one_pair,) = outlook(world(2, pairs=1), all_reduce=all_reduces())
    assert one_pair.worlds == ()


def test_under_strong_scaling_no_efficiency_is_predicted():
    (found,) = outlook(
        world(1, batch_size=64), world(2, scale=0.5, batch_size=32), all_reduce=all_reduces(), scaling="strong"
    )
    assert {one.efficiency for one in found.worlds} == {None}


def test_every_metric_of_ranks_is_in_the_registry():
    assert {"exposed", "exposed_share", "skew", "hidden_communication", "bus_bandwidth"} <= set(METRICS)


def test_blocks_of_other_kinds_do_not_disturb_the_distortion():
    measured = world(2)
    mixed = replace(
        measured.samples,
        blocks=[*measured.samples.blocks, Block(kind="synchronised", steps=5, wall_ns=10**12)],
    )
    assert Reading(mixed).distortion == Reading(measured.samples).distortion
