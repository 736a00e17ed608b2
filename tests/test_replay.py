import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loadings import OWN, Cost, consumer_only, loading
from msgspec.structs import replace

from bsprof.loading import MAIN, Prediction
from bsprof.replay import (
    MODEL_ERROR,
    PREFETCHES,
    Load,
    Setting,
    evened,
    grid,
    load_of,
    mean_step_s,
    predict,
    replay,
    scaled,
    setting_of,
    smallest_best,
    without_blocked,
    without_handoff,
)


def load(cpu_s=0.0, blocked_s=0.0, handoff_s=0.0, step_s=0.0, *, batches=60, worker=0, **more):
    def column(values):
        return np.resize(np.asarray(values, dtype=np.float64), batches)

    workers = np.resize(np.asarray(worker, dtype=np.int64), batches)
    return Load(column(cpu_s), column(blocked_s), column(handoff_s), column(step_s), workers, **more)


def exponential(mean_s, batches=60, seed=0):
    return np.random.default_rng(seed).exponential(mean_s, batches)


# --- closed forms -----------------------------------------------------------------------------------


def test_without_workers_one_thing_is_done_after_another():
    alone = load(exponential(0.010), exponential(0.005), 0.5, exponential(0.020))
    expected = alone.cpu_s.mean() + alone.blocked_s.mean() + alone.step_s.mean()
    assert mean_step_s(alone, Setting(0)) == pytest.approx(expected)


def test_with_many_workers_the_consumer_is_what_is_left():
    fast = load(exponential(0.010), exponential(0.010), 0.001, 0.020)
    assert mean_step_s(fast, Setting(12, prefetch=4)) == pytest.approx(0.021, rel=0.005)


def test_one_worker_that_never_has_to_wait_makes_one_batch_after_another():
    slow = load(exponential(0.010), exponential(0.005), 0.0001, 0.001)
    assert mean_step_s(slow, Setting(1, prefetch=8)) == pytest.approx(0.015, rel=0.2)
    assert mean_step_s(load(0.010, 0.005, 0.0001, 0.001), Setting(1)) == pytest.approx(0.015)


@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_computing_workers_share_the_cores(workers):
    assert mean_step_s(load(0.010), Setting(workers, capacity=2)) == pytest.approx(0.005)
    assert mean_step_s(load(0.010), Setting(workers, capacity=1.5)) == pytest.approx(0.010 / 1.5)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_blocked_workers_need_no_core(workers):
    assert mean_step_s(load(0.0, 0.010), Setting(workers, capacity=0.5)) == pytest.approx(0.010 / workers)


def test_computing_and_blocking_overlap_between_workers():
    """Two cores, four workers that block half of their time: they come near the two cores' worth."""
    assert 0.005 <= mean_step_s(load(0.010, 0.010), Setting(4, capacity=2)) < 0.0062


def test_a_consumer_that_computes_takes_a_core_from_the_workers():
    asleep = load(0.010, step_s=0.005)
    at_work = asleep._replace(consumer_cpu=1.0)
    assert mean_step_s(asleep, Setting(2, capacity=2)) == pytest.approx(0.005)
    assert mean_step_s(at_work, Setting(2, capacity=2)) == pytest.approx(0.0075, rel=0.02)
    assert mean_step_s(at_work, Setting(2, capacity=4)) == pytest.approx(0.005)


def test_a_consumer_with_four_threads_on_two_cores_takes_twice_as_long():
    assert mean_step_s(load(0.001, step_s=0.010, consumer_cpu=4.0), Setting(0, capacity=2)) == pytest.approx(0.021)


def test_workers_with_more_threads_fill_the_cores_sooner():
    assert mean_step_s(load(0.010, worker_cores=2.0), Setting(2, capacity=2)) == pytest.approx(0.010)


def test_a_pin_thread_takes_one_batch_after_another():
    pinned = load(0.001, relay_s=np.full(60, 0.008))
    assert mean_step_s(pinned, Setting(4)) == pytest.approx(0.008)
    assert mean_step_s(without_handoff(pinned), Setting(4)) == pytest.approx(0.00025)


def test_a_long_way_counts_only_where_nothing_is_prefetched():
    far = load(0.0, 0.010, latency_s=0.005)
    assert mean_step_s(far, Setting(1, prefetch=1)) == pytest.approx(0.015)
    assert mean_step_s(far, Setting(1, prefetch=2)) == pytest.approx(0.010)


def test_a_worker_that_idles_hands_over_at_once():
    """With one batch ahead it has made its own when that is taken; with more it is at the next."""
    locked = load(0.0, 0.010, 0.005, idle_handoff_s=0.001)
    assert mean_step_s(locked, Setting(1, prefetch=1)) == pytest.approx(0.011)
    assert mean_step_s(locked, Setting(1, prefetch=4)) == pytest.approx(0.010)
    assert mean_step_s(locked._replace(step_s=locked.step_s + 0.020), Setting(1, prefetch=2)) == pytest.approx(0.021)


def test_the_part_of_a_step_that_waits():
    assert replay(load(0.0, 0.030, step_s=0.010), Setting(1)).wait_s == pytest.approx(0.020)
    assert replay(load(0.0, 0.001, step_s=0.010), Setting(1)).wait_s == pytest.approx(0.0)
    assert replay(load(0.0, 0.030, step_s=0.010), Setting(0)).wait_s == pytest.approx(0.030)


# --- the scheduler ----------------------------------------------------------------------------------


HOT = [0.080] + [0.010] * 7


def test_one_slow_batch_idles_the_workers_that_have_made_theirs():
    """Two workers, one batch ahead each: while one is at the slow batch, the other makes one and stops."""
    assert mean_step_s(load(0.0, HOT, batches=64), Setting(2, prefetch=1)) == pytest.approx((0.080 + 3 * 0.010) / 8)


def test_prefetch_makes_up_for_slow_batches_that_all_workers_meet_in_turn():
    hot = load(0.0, [*HOT, 0.010], batches=63)
    shallow, deep = (mean_step_s(hot, Setting(2, prefetch)) for prefetch in (1, 8))
    assert shallow > 0.012
    assert deep == pytest.approx(0.160 / 9 / 2, rel=0.02)


def test_out_of_order_no_batch_is_awaited_while_another_is_there():
    hot = load(0.0, HOT, batches=64)
    ordered, unordered = (mean_step_s(hot, Setting(2, 1, in_order)) for in_order in (True, False))
    assert unordered == pytest.approx(0.150 / 8 / 2, rel=0.02)
    assert unordered < ordered


def test_equal_batches_come_in_order_anyhow():
    same = load(0.004, 0.006, 0.0005, 0.003)
    for workers in (1, 2, 4):
        ordered, unordered = (mean_step_s(same, Setting(workers, 2, in_order)) for in_order in (True, False))
        assert unordered == pytest.approx(ordered, rel=0.05)


def test_uneven_workers_draw_their_own_batches_as_long_as_there_are_as_many():
    """In order, the slow worker of two sets the pace of both; drawn from all, a third would share its burden."""
    uneven = load(0.0, [0.010, 0.030], worker=[0, 1])
    shifted = uneven._replace(blocked_s=np.roll(uneven.blocked_s, 1), worker=np.roll(uneven.worker, 1))
    assert mean_step_s(uneven, Setting(2)) == mean_step_s(shifted, Setting(2)) == pytest.approx(0.015)
    assert mean_step_s(uneven, Setting(4, prefetch=8)) == pytest.approx(0.0075, rel=0.01)


def test_batches_that_scatter_do_not_make_a_worker_uneven():
    """Six batches a worker, means 40 % apart by chance: with a seed, either worker still gets every batch."""
    luck = load(0.0, exponential(0.010, 12, seed=3), worker=[0, 1], batches=12)
    everybody = luck._replace(worker=np.arange(12) % 3)
    assert mean_step_s(luck, Setting(2)) == mean_step_s(everybody, Setting(2))


# --- what must hold whatever was recorded -----------------------------------------------------------

SOME_MS = st.lists(st.floats(0, 0.050), min_size=1, max_size=12)


@settings(deadline=None)
@given(SOME_MS, SOME_MS, st.floats(0, 0.020), st.integers(1, 5), st.sampled_from(PREFETCHES), st.booleans())
def test_bounds(cpu_s, blocked_s, step_s, workers, prefetch, in_order):
    """No schedule is faster than any of its parts, and none slower than all of them in turn."""
    some = load(cpu_s, blocked_s, 0.0003, step_s, batches=12)
    capacity = 2.0
    took = mean_step_s(some, Setting(workers, prefetch, in_order, capacity))
    making = some.cpu_s.mean() + some.blocked_s.mean()
    # Over a window of some hundred batches, what is under way at either end blurs the bounds.
    blur = (workers * prefetch + 1) * float((some.cpu_s + some.blocked_s).max()) / 256 * max(
        workers / capacity, 1
    ) + 1e-9
    assert took >= 0.0003 * (1 - workers * prefetch / 256) + step_s - 1e-9  # some were unpickled early
    assert took >= max(making / workers, some.cpu_s.mean() / capacity) - blur
    assert took <= making * max(workers / capacity, 1) + 0.0003 + step_s + blur


@settings(deadline=None)
@given(SOME_MS, st.floats(0, 0.020), st.sampled_from(PREFETCHES), st.booleans())
def test_a_worker_more_does_no_harm_where_there_are_cores_enough(blocked_s, step_s, prefetch, in_order):
    some = load(0.0, blocked_s, 0.0002, step_s, batches=12)
    steps = [mean_step_s(some, Setting(workers, prefetch, in_order)) for workers in (1, 2, 4, 8)]
    blur = 8 * prefetch * max(blocked_s) / 256 + 1e-9
    assert all(more <= fewer * 1.02 + blur for fewer, more in pairwise(steps))


@settings(deadline=None)
@given(SOME_MS, SOME_MS, st.integers(0, 4), st.floats(0.1, 10))
def test_a_machine_at_another_speed_takes_all_times_alike(cpu_s, blocked_s, workers, factor):
    setting = Setting(workers, capacity=1.5)
    some = load(cpu_s, blocked_s, 0.0002, 0.003, batches=12, consumer_cpu=0.5)
    other = scaled(some, factor)._replace(handoff_s=some.handoff_s * factor, step_s=some.step_s * factor)
    assert mean_step_s(other, setting) == pytest.approx(factor * mean_step_s(some, setting), rel=0.02)


def test_names_of_workers_do_not_matter():
    some = load(exponential(0.010), exponential(0.005), worker=[0, 1, 2])
    renamed = some._replace(worker=np.array([7, 2, 5])[some.worker])
    assert mean_step_s(some, Setting(3)) == mean_step_s(renamed, Setting(3))


def test_where_in_the_recording_it_begins_hardly_matters():
    some = load(exponential(0.010, 200), exponential(0.010, 200), 0.0, 0.004, batches=200)
    later = some._replace(cpu_s=np.roll(some.cpu_s, 77), blocked_s=np.roll(some.blocked_s, 77))
    setting = Setting(2, capacity=2)
    assert mean_step_s(some, setting) == pytest.approx(mean_step_s(later, setting), rel=0.02)


def test_the_same_seed_gives_the_same_and_another_resamples():
    some = load(exponential(0.010))
    setting = Setting(2, capacity=2)
    assert replay(some, setting, seed=1) == replay(some, setting, seed=1)
    assert replay(some, setting, seed=1) != replay(some, setting, seed=2)
    assert replay(some, setting) == replay(some, setting)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_degenerate_recordings(workers):
    setting = Setting(workers, capacity=2)
    assert mean_step_s(load(batches=1), setting) == 0.0
    assert mean_step_s(load(0.010, batches=1), setting) == pytest.approx(0.010 / min(max(workers, 1), 2))
    assert replay(load(0.010), setting, batches=1).step_s >= 0


def test_what_is_no_setting_is_refused():
    for setting in (Setting(-1), Setting(1, prefetch=0), Setting(1, capacity=0), Setting(1, capacity=math.nan)):
        with pytest.raises(ValueError, match="no such setting"):
            mean_step_s(load(0.010), setting)
    with pytest.raises(ValueError, match="no batches"):
        mean_step_s(load(batches=0), Setting(1))
    with pytest.raises(ValueError, match="at least one"):
        replay(load(0.010), Setting(1), batches=0)


# --- what removing something gives back -------------------------------------------------------------


def test_counterfactuals():
    slow = load(0.010, 0.020, 0.001, 0.005)
    alone = Setting(1, prefetch=4)
    assert mean_step_s(scaled(slow, 0.5), alone) == pytest.approx(0.015)
    assert mean_step_s(scaled(slow, np.resize([0.0, 1.0], 60)), alone) == pytest.approx(0.015)
    assert mean_step_s(without_blocked(slow), alone) == pytest.approx(0.010)
    assert mean_step_s(without_handoff(load(0.001, 0.0, 0.010)), alone) == pytest.approx(0.001)
    hot = load(0.0, HOT, worker=[0, 1], batches=64)
    assert mean_step_s(evened(hot), Setting(2)) == pytest.approx(0.150 / 8 / 2)
    assert mean_step_s(evened(hot), Setting(2)) < mean_step_s(hot, Setting(2))


# --- from a recording -------------------------------------------------------------------------------


def test_a_recording_gives_back_what_its_batches_cost():
    seen = loading(
        workers=2, stages={"read": Cost(0.0, 0.004), OWN: Cost(0.006)}, collate=Cost(0.001), jitter=0.0, step_s=0.003,
        unpickle_s=2e-4, serialise_s=1e-4,
    )  # fmt: skip
    found = load_of(seen)
    assert found is not None
    assert found.cpu_s.size == 60 - 5  # two workers, two batches ahead, and one
    assert found.cpu_s == pytest.approx(0.007)
    assert found.blocked_s == pytest.approx(0.004)
    assert found.handoff_s == pytest.approx(2e-4)
    assert found.step_s == pytest.approx(0.003)
    assert found.latency_s == pytest.approx(1e-4)
    assert found.worker_cores == 1.0
    assert found.relay_s is None
    assert found.samples == 16
    assert setting_of(seen) == Setting(2, 2, True, 8.0)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"workers": 3, "prefetch": 4},
        {"workers": 0},
        {"factors": (1.0, 1.0, 1.0, 6.0)},
        {"factors": (1.0, 1.0, 1.0, 6.0), "in_order": False},
        {"worker_factors": {0: 3.0}},
        {"step_s": 0.0005},
        {"unpickle_s": 0.006},
        {"pin_s": 0.006, "step_s": 0.001},
        {"stages": {OWN: Cost(0.002, 0.01)}},
    ],
    ids=str,
)
def test_the_replay_of_what_was_recorded_takes_as_long(more):
    seen = loading(batches=200, **more)
    found = load_of(seen)
    assert found is not None
    asked = np.array(seen.batches.asked_at_ns)[20:] / 1e9
    assert mean_step_s(found, setting_of(seen)) == pytest.approx((asked[-1] - asked[0]) / (asked.size - 1), rel=0.03)


def test_prediction_from_a_recording_is_what_another_recording_shows():
    """Nothing but the schedule differs between these, so the model's own error is all there is."""
    how = {"batches": 200, "factors": (1.0, 0.5, 2.5, 0.7, 1.1, 0.3, 0.8), "step_s": 0.002}
    found = load_of(loading(workers=2, **how))
    assert found is not None
    for workers, prefetch in ((0, 2), (1, 1), (1, 4), (3, 1), (4, 2), (6, 4)):
        seen = loading(workers=workers, prefetch=prefetch, **how)
        asked = np.array(seen.batches.asked_at_ns)[40:] / 1e9
        measured = (asked[-1] - asked[0]) / (asked.size - 1)
        assert mean_step_s(found, setting_of(seen)) == pytest.approx(measured, rel=0.05)


def test_time_in_which_a_worker_waited_for_a_core_is_not_its_own():
    crowded = loading(workers=4, capacity=2.0, step_s=0.0005, jitter=0.0, batches=200)
    assert max(crowded.batches.runqueue_ns) > 0
    found = load_of(crowded)
    assert found is not None
    assert found.cpu_s == pytest.approx(0.0072)
    assert found.blocked_s == pytest.approx(0.0, abs=1e-6)
    assert mean_step_s(found, setting_of(crowded)) == pytest.approx(0.0036, rel=0.05)


def test_what_was_not_captured():
    seen = loading(workers=2, stages={OWN: Cost(0.006, 0.004)}, collate=Cost(), jitter=0.0)
    null = [None] * len(seen.batches.order)
    no_queue = load_of(replace(seen, batches=replace(seen.batches, runqueue_ns=null, process_cpu_ns=null)))
    assert no_queue is not None
    assert no_queue.blocked_s == pytest.approx(0.004)
    no_cpu = load_of(replace(seen, batches=replace(seen.batches, runqueue_ns=null, process_cpu_ns=null, cpu_ns=null)))
    assert no_cpu is not None
    assert (no_cpu.cpu_s, no_cpu.blocked_s) == (pytest.approx(0.010), pytest.approx(0.0))
    unnamed = {"sent_at_ns": null, "received_at_ns": null, "unpickle_ns": null, "dispatched_at_ns": null}
    no_pipe = load_of(replace(seen, batches=replace(seen.batches, samples=null, **unnamed)))
    assert no_pipe is not None
    assert (no_pipe.latency_s, no_pipe.samples) == (0.0, None)
    assert predict(no_pipe, Setting(2), [Setting(2)])[0].samples_per_s is None


def test_what_hand_off_takes_while_a_worker_idles():
    slow = [900_000 if i % 4 == 0 else 100_000 for i in range(60)]
    seen = loading(workers=1, prefetch=1, batches=60)  # one batch ahead: it is taken before the next is begun
    idle = load_of(replace(seen, batches=replace(seen.batches, unpickle_ns=slow)))
    assert idle is not None
    assert idle.handoff_s.max() > 8e-4
    assert idle.idle_handoff_s < 2e-4
    seen = loading(workers=1, prefetch=4, step_s=0.0001, batches=60)
    slow = [100_000 if i % 4 == 0 else 900_000 for i in range(60)]
    never = load_of(replace(seen, batches=replace(seen.batches, unpickle_ns=slow)))
    assert never is not None
    assert np.median(never.handoff_s) > 8e-4
    assert never.idle_handoff_s < 2e-4


def test_batches_that_nobody_took_are_left_out():
    seen = loading(workers=2, batches=40)
    asked = [*seen.batches.asked_at_ns[:-4], *[None] * 4]
    found = load_of(replace(seen, batches=replace(seen.batches, asked_at_ns=asked, got_at_ns=asked)))
    assert found is not None
    assert found.cpu_s.size == 40 - 5 - 4


def test_a_short_recording_is_used_as_far_as_it_goes():
    found = load_of(loading(workers=4, prefetch=4, batches=20))
    assert found is not None
    assert found.cpu_s.size == 19
    tiny = load_of(loading(workers=1, batches=3))
    assert tiny is not None
    assert tiny.cpu_s.size == 3


def test_a_long_recording_is_read_in_part_from_end_to_end():
    found = load_of(loading(workers=1, batches=3000, factors=np.linspace(1, 2, 3000)))
    assert found is not None
    assert found.cpu_s.size <= 400
    assert found.cpu_s[0] == pytest.approx(0.0072, rel=0.2)
    assert found.cpu_s[-1] == pytest.approx(0.0142, rel=0.2)
    assert found.cpu_s.mean() == pytest.approx(0.0107, rel=0.02)


def test_nothing_to_replay():
    assert load_of(consumer_only()) is None
    assert setting_of(consumer_only()).workers == 0
    assert setting_of(consumer_only()).capacity == math.inf


def test_threads_that_compute_beside_a_workers_main_thread():
    """All of its threads took three times what the first took, which computed from end to end: three cores."""
    busy = load_of(loading(workers=1, process_cpu=3.0, capacity=8.0, stages={OWN: Cost(0.009)}, collate=Cost()))
    assert busy is not None
    assert busy.worker_cores == pytest.approx(3.0)
    assert busy.cpu_s.mean() == pytest.approx(0.009, rel=0.02)
    # Here the first waited for the others, for two thirds of its time.
    behind = load_of(loading(workers=1, process_cpu=6.0, stages={OWN: Cost(0.003, 0.006)}, collate=Cost()))
    assert behind is not None
    assert behind.worker_cores == pytest.approx(2.0)
    assert behind.cpu_s.mean() == pytest.approx(0.009, rel=0.02)
    assert behind.blocked_s == pytest.approx(0.0, abs=1e-6)


def test_the_feeder_threads_pickling_makes_no_batch_longer_but_takes_cores():
    found = load_of(loading(workers=1, process_cpu=1.05, jitter=0.0))
    assert found is not None
    assert found.worker_cores == pytest.approx(1.05)
    assert found.cpu_s == pytest.approx(0.0072)
    assert mean_step_s(found, Setting(4, 2, True, 8.0)) == pytest.approx(
        mean_step_s(found._replace(worker_cores=1.0), Setting(4, 2, True, 8.0))
    )
    assert mean_step_s(found._replace(step_s=0 * found.step_s), Setting(8, 2, True, 2.0)) == pytest.approx(
        0.0072 * 1.05 / 2, rel=0.1
    )


def test_a_worker_that_only_waits_holds_no_batch_up():
    """What hand-off takes beside a worker that computes is partly that worker's doing; beside one that sleeps it is all
    there is to it."""
    seen = loading(stages={OWN: Cost(0.0005, 0.02)}, unpickle_s=1e-3, step_s=1e-3)
    sleeping = load_of(seen)
    assert sleeping is not None
    assert sleeping.idle_handoff_s == pytest.approx(1e-3, rel=0.1)
    computing = load_of(loading(stages={OWN: Cost(0.02)}, unpickle_s=1e-3, step_s=1e-3))
    assert computing is not None
    assert computing.idle_handoff_s < 3e-4


def test_a_step_that_workers_slow_down_is_replayed_from_what_it_takes_without_them():
    seen = loading(step_s=0.015, cached_step_s=0.010, cpu_share=0.6, kind="model")
    found = load_of(seen)
    assert found is not None
    assert found.step_s == pytest.approx(0.010)
    assert found.consumer_cpu == pytest.approx(0.9)  # 9 ms of CPU time, in 10 ms rather than 15


def test_a_loader_without_workers_hands_nothing_over_yet():
    found = load_of(loading(workers=0, tensors=3))
    assert found is not None
    assert (found.worker == MAIN).all()
    assert found.handoff_s == pytest.approx(3 * 0.12e-3)


def test_capacity_is_what_was_measured_or_what_others_leave():
    seen = loading(capacity=1.7, cores=4, foreign_cores=1.5)
    assert setting_of(seen).capacity == 1.7
    assert setting_of(replace(seen, capacity_cores=None)).capacity == 2.5
    assert setting_of(replace(seen, capacity_cores=None, machine=None)).capacity == 4


# --- predictions ------------------------------------------------------------------------------------


def test_the_interval_holds_the_value_and_widens_with_the_luck_of_the_recording():
    even, lucky = load(0.010), load(exponential(0.010, 20, seed=5), batches=20)
    base = Setting(1, 2, True, 2.0)
    twice = Setting(2, 2, True, 2.0)
    (known,) = predict(even, base, [twice])
    assert known.speedup == pytest.approx(2.0)
    assert (known.speedup_low, known.speedup_high) == pytest.approx(
        (2.0 * math.exp(-1.96 * MODEL_ERROR), 2.0 * math.exp(1.96 * MODEL_ERROR)), rel=1e-3
    )
    (guessed,) = predict(lucky, base, [twice])
    assert guessed.speedup_low < guessed.speedup < guessed.speedup_high
    assert guessed.speedup_high / guessed.speedup_low > known.speedup_high / known.speedup_low


def test_a_setting_against_itself_gains_nothing():
    base = Setting(2, 2, True, 2.0)
    (same,) = predict(load(exponential(0.010)), base, [base])
    assert (same.speedup, same.speedup_low, same.speedup_high) == (1.0, 1.0, 1.0)


def test_predictions_say_what_comes_of_it():
    some = load(0.010, step_s=0.004, samples=32.0)
    none, two = predict(some, Setting(1), [Setting(0), Setting(2, 4, False)])
    assert (none.workers, none.prefetch) == (0, None)
    assert none.step_s == pytest.approx(0.014)
    assert none.samples_per_s == pytest.approx(32 / 0.014)
    assert (two.workers, two.prefetch, two.in_order) == (2, 4, False)
    assert two.speedup == pytest.approx(2.0)


def test_what_a_recorded_step_took_beyond_its_replay_the_others_take_too():
    some = load(0.010, step_s=0.004, samples=32.0, recorded_step_s=0.011)
    one, none = predict(some, Setting(1), [Setting(1), Setting(0)])
    assert one.step_s == pytest.approx(0.011)
    assert none.step_s == pytest.approx(0.014 * 1.1)
    assert none.samples_per_s == pytest.approx(32 / 0.0154)
    assert none.speedup == pytest.approx(10 / 14)
    # A step that took thrice as long was held up by something else.
    assert predict(some._replace(recorded_step_s=0.030), Setting(1), [Setting(1)])[0].step_s == pytest.approx(0.0125)


def test_a_recorded_step_is_from_batch_to_batch_within_an_epoch():
    found = load_of(loading(workers=1, step_s=0.020, stages={OWN: Cost(0.001)}, jitter=0.0, epochs=3, end_s=1.0))
    assert found is not None
    assert found.recorded_step_s == pytest.approx(0.020, rel=0.02)


def test_a_recording_without_any_work_can_be_predicted():
    assert all(one.speedup == 1.0 for one in predict(load(), Setting(1), [Setting(0), Setting(2)]))


@pytest.mark.parametrize(("workers", "cores"), [(0, 1), (2, 2), (7, 2), (4, 16), (3, 128)])
def test_the_grid_goes_around_what_was_recorded(workers, cores):
    base = Setting(workers, 3 if workers else 2, False, 1.5)
    around = grid(base, cores)
    counts = {setting.workers for setting in around}
    assert counts >= {0, 1, workers} and max(counts) == max(2 * cores, workers + 2)
    assert len(set(around)) == len(around) <= 80
    assert len([setting for setting in around if setting.workers == 0]) == 1
    assert all((setting.in_order, setting.capacity) == (False, 1.5) for setting in around)
    assert base in around or workers == 0


def prediction(workers, prefetch, step_s, in_order=True):
    return Prediction(
        workers=workers, prefetch=prefetch, in_order=in_order, step_s=step_s, samples_per_s=None, speedup=1.0,
        speedup_low=0.9, speedup_high=1.1,
    )  # fmt: skip


def test_the_smallest_setting_near_the_best():
    rows = [
        prediction(8, 2, 0.0100),
        prediction(4, 8, 0.0101),
        prediction(4, 4, 0.0102),
        prediction(4, 2, 0.0103),
        prediction(2, 8, 0.0150),
        prediction(0, None, 0.0300),
    ]
    best = smallest_best(rows)
    assert (best.workers, best.prefetch) == (4, 4)
    assert smallest_best([*rows, prediction(0, None, 0.0101)]).workers == 0
    assert smallest_best([prediction(1, 2, 0.01, in_order=False), prediction(1, 2, 0.01)]).in_order
    with pytest.raises(ValueError, match="no predictions"):
        smallest_best([])
