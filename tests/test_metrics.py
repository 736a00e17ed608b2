from typing import get_args

import msgspec
import numpy as np
import pytest

from bsprof.metrics import METRICS, CaseSummary, Reading, Unit, find_metric, phase_metrics, summarise, varying_axes
from bsprof.model import (
    AXES,
    Block,
    Case,
    Counters,
    Environment,
    Measurement,
    Outcome,
    Result,
    Samples,
    Settings,
    Startup,
    case_key,
)
from bsprof.stats import Estimate

MS = 1_000_000


def taken(**fields):
    """Ten steps whose figures can be worked out by hand: 10 ms each, one of them 110 ms at an epoch's end."""
    data = [2 * MS] * 9 + [102 * MS]
    known = {
        "batch_size": 32,
        "step_ns": [10 * MS] * 9 + [110 * MS],
        "host_ns": {"data": data, "forward": [3 * MS] * 10, "backward": [4 * MS] * 10},
        "epoch_boundaries": [9],
        "blocks": [Block(kind="instrumented", steps=10, wall_ns=200 * MS), Block(kind="bare", steps=10, wall_ns=1)],
    }
    return Samples(**{**known, **fields})


def one(samples=None, startup=None, outcome="ok", process=0, settings=None, **fields):
    settings = settings or Settings()
    case = Case(key=case_key(settings), settings=settings, process=process)
    return Measurement(case=case, outcome=Outcome(kind=outcome), wall_s=1.0, samples=samples, startup=startup, **fields)


def summary(*args, **fields):
    return CaseSummary([one(*args, **fields)])


def result(measurements):
    types = {field.name: field.type for field in msgspec.structs.fields(Environment)}
    empty = {str: "", int: 1, tuple: (), dict: {}}
    fields = {
        name: next((value for kind, value in empty.items() if kind is getattr(type_, "__origin__", type_)), None)
        for name, type_ in types.items()
    }
    return Result(created="", plan=None, environment=Environment(**fields), measurements=measurements)


def test_steady_steps_are_all_but_those_in_which_an_epoch_ended():
    case = summary(taken())
    assert case.value("steps") == 9
    assert case.value("step") == pytest.approx(0.010)
    assert case.value("step_mean") == pytest.approx(0.010)
    assert case.value("wait") == pytest.approx(0.002)


def test_phases_and_other_add_up_to_the_mean_step():
    rng = np.random.default_rng(0)
    host = {phase: rng.lognormal(15, 1, 200).astype(int) for phase in ("data", "forward", "clip")}
    step = sum(host.values()) + rng.integers(-900, 900, 200)
    case = summary(
        taken(step_ns=step.tolist(), host_ns={k: v.tolist() for k, v in host.items()}, epoch_boundaries=[3, 77])
    )
    assert case.phases == ["data", "forward", "clip"]
    total = sum(case.value(f"{phase}.time") for phase in case.phases) + case.value("other")
    assert total == pytest.approx(case.value("step_mean"), rel=1e-12)
    shares = sum(case.value(f"{phase}.share") for phase in case.phases) + case.value("other_share")
    assert shares == pytest.approx(1, rel=1e-12)


def test_other_keeps_its_sign():
    assert summary(taken()).value("other") == pytest.approx(0.001)
    over_attributed = taken(step_ns=[8 * MS] * 9 + [110 * MS])
    assert summary(over_attributed).value("other") == pytest.approx(-0.001)


def test_throughput_comes_from_the_median_and_its_interval():
    rng = np.random.default_rng(1)
    case = summary(taken(step_ns=(rng.lognormal(0, 0.1, 100) * 10 * MS).astype(int).tolist(), host_ns={}))
    step, throughput = case["step"], case["throughput"]
    assert throughput.value == pytest.approx(32 / step.value)
    assert (throughput.low, throughput.high) == pytest.approx((32 / step.high, 32 / step.low))
    assert throughput.low < throughput.value < throughput.high
    assert summary(taken(batch_size=None))["throughput"] is None


def test_device_clock_is_primary_and_the_difference_is_hidden():
    device = taken(
        device_step_ns=[9 * MS] * 10, device_ns={"data": [MS] * 10, "forward": [3 * MS] * 10, "backward": [5 * MS] * 10}
    )
    case = summary(device)
    assert case.value("step") == pytest.approx(0.009)
    assert case.value("wait") == pytest.approx(0.002)
    assert case.value("stall") == pytest.approx(0.001)
    assert case.value("hidden") == pytest.approx(0.001)
    assert case.value("backward.time") == case.value("backward.device") == pytest.approx(0.005)
    assert case.value("backward.host") == pytest.approx(0.004)
    assert case.value("load") == case.value("wait")


def test_on_one_clock_wait_is_stall_and_nothing_is_hidden():
    case = summary(taken())
    assert case["wait"] == case["stall"]
    assert case["hidden"] == 0.0
    assert case["backward.device"] is None


def test_residual_holds_phases_against_the_blocks_own_wall_time():
    phases = 9 * 9 + 109  # ms, the step at the epoch's end included
    assert summary(taken()).value("residual") == pytest.approx((200 - phases) / 200)
    short = [Block(kind="instrumented", steps=10, wall_ns=100 * MS)]
    assert summary(taken(blocks=short)).value("residual") == pytest.approx((100 - phases) / 100)
    assert summary(taken(blocks=[]))["residual"] is None


def test_distortion_pairs_each_instrumented_block_with_its_neighbour():
    def blocks(order, drift):
        wall = {"A": 1.1 * MS, "B": 1.0 * MS}
        kinds = {"A": "instrumented", "B": "bare"}
        return [
            Block(kind=kinds[name], steps=10, wall_ns=int(10 * wall[name] * drift**place))
            for place, name in enumerate(order)
        ]

    plain = summary(taken(blocks=blocks("ABABABAB", 1.0)))["distortion"]
    assert plain.value == pytest.approx(0.1) and plain.n == 4
    # A drift of 2 % a block cancels where the order swaps from pair to pair.
    swapped = summary(taken(blocks=blocks("ABBAABBA", 1.02)))["distortion"]
    assert swapped.value == pytest.approx(0.1, abs=1e-6) and swapped.n == 4
    assert swapped.low < 0.1 < swapped.high
    assert summary(taken(blocks=blocks("AAA", 1.0)))["distortion"] is None


def test_blocks_of_different_length_are_compared_by_the_step():
    blocks = [Block(kind="instrumented", steps=10, wall_ns=11 * MS), Block(kind="bare", steps=5, wall_ns=5 * MS)]
    distortion = summary(taken(blocks=blocks))["distortion"]
    assert distortion.value == pytest.approx(0.1) and distortion.low is None


def test_recorder_cost_is_given_absolute_and_as_a_share():
    case = summary(taken(recorder_ns_per_step=2_000))
    assert case.value("recorder") == pytest.approx(2e-6)
    assert case.value("recorder_share") == pytest.approx(2e-4)


def test_faults_are_over_the_steps_of_all_blocks():
    counters = Counters(
        wall_ns=1, cpu_ns=1, minor_faults=500, major_faults=0, voluntary_switches=0, involuntary_switches=0
    )
    assert summary(taken(counters=counters)).value("minor_faults") == 25
    assert summary(taken(counters=counters, blocks=[])).value("minor_faults") == 50


def test_start_up_and_epoch_boundary():
    startup = Startup(
        process_ns=15 * MS,
        build_ns=0,
        first_batch_ns=400 * MS,
        epoch_end_ns=[10 * MS, 20 * MS, 90 * MS],
        epoch_start_ns=[100 * MS, 200 * MS],
    )
    case = summary(taken(warmup_ns=[30 * MS, 11 * MS, 9 * MS]), startup)
    assert case.value("process") == pytest.approx(0.015)
    assert case["build"] == 0.0  # measured
    assert case["iterator"] is None  # not captured
    assert case.value("epoch_boundary") == pytest.approx((0.110 + 0.220) / 2)
    assert case.value("first_step") == pytest.approx(0.030)
    assert case.value("warmup") == pytest.approx(0.050)
    assert case.value("warmup_steps") == 3


def test_what_was_not_captured_is_none_for_every_metric():
    case = summary(None, outcome="crash")
    assert all(case[key] is None for key in (*METRICS, *phase_metrics("data")))
    bare = summary(Samples(batch_size=None, step_ns=[10 * MS], host_ns={}))
    absent = ["throughput", "wait", "hidden", "residual", "distortion", "recorder", "minor_faults", "first_step"]
    assert all(bare[key] is None for key in (*absent, "precision", "epoch_boundary", "data.time"))


def test_an_epoch_boundary_in_every_step_leaves_no_steady_step():
    case = summary(taken(epoch_boundaries=list(range(10))))
    assert case["step"] is None and case["wait"] is None and case["other"] is None
    assert case["steps"] == 0.0


def test_processes_of_one_case_are_combined_between_processes():
    steps = (10, 11, 12)
    case = CaseSummary(
        [one(taken(step_ns=[ms * MS] * 10), process=process) for process, ms in reversed(list(enumerate(steps)))]
    )
    step = case["step"]
    assert isinstance(step, Estimate) and step.n == 3
    assert step.value == pytest.approx((0.010 * 0.011 * 0.012) ** (1 / 3))
    assert step.low < 0.010 and step.high > 0.012
    assert case.spread == pytest.approx(0.2)
    assert case["steps"] == 27
    assert case.value("throughput") == pytest.approx(32 / step.value)
    assert [one.case.process for one in case.measurements] == [0, 1, 2]


def test_distortion_of_several_processes_may_be_negative():
    def blocks(ratio):
        wall = int(ratio * 10 * MS)
        return [Block(kind="instrumented", steps=1, wall_ns=wall), Block(kind="bare", steps=1, wall_ns=10 * MS)]

    case = CaseSummary([one(taken(blocks=blocks(ratio)), process=i) for i, ratio in enumerate((0.98, 0.99))])
    assert case.value("distortion") == pytest.approx((0.98 * 0.99) ** 0.5 - 1)
    assert case.interval("distortion") is not None


def test_one_process_has_no_spread_and_its_own_interval():
    case = summary(taken())
    assert case.spread is None
    assert case["step"].n == 9


def test_figures_come_from_the_processes_that_ended_well():
    good, bad = taken(), taken(step_ns=[99 * MS] * 10)
    case = CaseSummary([one(good), one(bad, outcome="timeout", process=1)])
    assert case.value("step") == pytest.approx(0.010) and case.ok
    assert [failure.outcome.kind for failure in case.failures] == ["timeout"]
    only_bad = CaseSummary([one(bad, outcome="interrupted")])
    assert only_bad.value("step") == pytest.approx(0.099) and not only_bad.ok


def test_cases_are_grouped_by_key_and_ordered_by_settings():
    chosen = [Settings(batch_size=batch, workers=workers) for batch in (128, 8) for workers in (2, 0)]
    cases = summarise(result([one(settings=settings, process=p) for p in (0, 1) for settings in chosen]))
    assert [(case.settings.batch_size, case.settings.workers) for case in cases] == [(8, 0), (8, 2), (128, 0), (128, 2)]
    assert all(len(case.measurements) == 2 for case in cases)


def test_an_axis_varies_only_if_two_values_mean_something():
    none = Settings(workers=0, prefetch=None)
    assert varying_axes([none, Settings(workers=2, prefetch=2)]) == ["workers"]
    assert varying_axes([none, Settings(workers=2), Settings(workers=2, prefetch=4)]) == ["workers", "prefetch"]
    assert varying_axes([Settings(threads=None), Settings(threads=1)]) == ["threads"]  # here null is a value
    assert varying_axes([None, Settings()]) == []


def test_the_registry_says_of_each_metric_what_it_is():
    for key, metric in (*METRICS.items(), *phase_metrics("clip").items()):
        assert metric.key == key and metric.label and metric.describe
        assert metric.unit in get_args(Unit) and metric.better in ("lower", "higher", None)
        assert find_metric(key).key == key
    with pytest.raises(KeyError):
        find_metric("speed")
    with pytest.raises(KeyError):
        find_metric("data.speed")


def test_raw_samples_are_not_changed_by_reading_them():
    samples = taken()
    before = msgspec.json.encode(samples)
    reading = Reading(samples)
    assert all(metric.compute(reading) is not None or metric for metric in METRICS.values())
    assert msgspec.json.encode(samples) == before
    assert set(AXES) == {field.name for field in msgspec.structs.fields(Settings)}
