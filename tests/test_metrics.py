from typing import get_args

import msgspec
import numpy as np
import pytest
from worlds import world

from bsprof import findings, stats
from bsprof.metrics import METRICS, CaseSummary, Unit, find_metric, phase_metrics, summarise, varying_axes
from bsprof.model import (
    AXES,
    Backends,
    Block,
    Case,
    Ceiling,
    Ceilings,
    Copy,
    Counters,
    Energy,
    Environment,
    Facts,
    Measurement,
    Memory,
    Outcome,
    Profile,
    Result,
    Samples,
    Serialised,
    Settings,
    Startup,
    Telemetry,
    case_key,
)
from bsprof.readings import Reading
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


def test_no_interval_is_sought_inside_processes_that_are_several(monkeypatch):
    """It takes a hundred times as long as the median that it surrounds, and nobody would see it."""
    monkeypatch.setattr(stats, "median", None)
    several = CaseSummary([one(taken(), process=number) for number in range(3)])
    for key in ("step", "throughput", "train_and_load", "recorder_share", "warmup_excess", "ceiling_share", "mfu"):
        several.value(key)
    assert several.value("step") == pytest.approx(0.010)
    assert several.spread == pytest.approx(0)
    monkeypatch.undo()
    assert summary(taken())["step"].effective == 9


def test_a_value_is_that_in_the_middle_of_its_interval():
    rng = np.random.default_rng(1)
    times = (rng.lognormal(0, 0.1, 100) * 10 * MS).astype(int).tolist()
    ranks = world(2)
    readings = Reading(taken(step_ns=times, host_ns={})), Reading(ranks.samples, measurement=ranks)
    with_intervals = [metric for metric in METRICS.values() if metric.within is not None]
    named = {"step", "throughput", "train_and_load", "distortion", "exposed", "skew"}
    assert {metric.key for metric in with_intervals} == named
    for metric in with_intervals:
        for reading in readings:
            within = metric.within(reading)
            assert metric.compute(reading) == (None if within is None else within.value)


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


# --- what the device did ----------------------------------------------------------------------------------


PHASES_MS = {"data": 1, "h2d": 1, "forward": 4, "backward": 8, "optimizer": 2}


def on_device(*, host=PHASES_MS, device=PHASES_MS, busy=PHASES_MS, **fields):
    """Ten steps on two clocks, and two profiled steps, each phase by its milliseconds."""
    samples = Samples(
        batch_size=32,
        step_ns=[sum(host.values()) * MS] * 10,
        host_ns={phase: [ms * MS] * 10 for phase, ms in host.items()},
        device_step_ns=[sum(device.values()) * MS] * 10,
        device_ns={phase: [ms * MS] * 10 for phase, ms in device.items()},
        warmup_ns=[500 * MS, *[sum(device.values()) * MS] * 9],
    )
    profile = Profile(
        steps=2,
        wall_ns=64 * MS,
        phase_ns={},
        busy_ns={phase: round(2 * ms * MS) for phase, ms in busy.items()},
        busy_total_ns=round(2 * sum(busy.values()) * MS),
        launches=1000,
        copies=(Copy(direction="HtoD pinned", calls=2, ns=2 * MS, bytes=10**8),),
    )
    return one(samples, **{"profile": profile, **fields})


def case_of(**fields):
    return CaseSummary([on_device(**fields)])


def test_overlap_is_what_phases_alone_take_longer_than_the_step():
    alone = Serialised(host_ns={"data": [3 * MS, 5 * MS], "forward": [16 * MS] * 2})
    case = case_of(serialised=alone)
    assert case.value("data.serialised") == pytest.approx(0.004)
    assert case.value("overlap") == pytest.approx(0.020 - 0.016)
    assert case.value("overlap_share") == pytest.approx(4 / 20)
    assert case_of()["overlap"] is None  # not captured is no overlap of 0


def test_overlap_keeps_its_sign():
    assert case_of(serialised=Serialised(host_ns={"forward": [15 * MS]})).value("overlap") == pytest.approx(-0.001)


def test_busy_time_is_a_share_of_the_timed_step_and_of_the_profiled_window():
    case = case_of(busy={**PHASES_MS, "backward": 4})
    assert case.value("busy") == pytest.approx(0.012)
    assert case.value("busy_of_step") == pytest.approx(12 / 16)
    assert case.value("busy_share") == pytest.approx(24 / 64)
    assert case.value("backward.busy_share") == pytest.approx(0.5)
    assert case.value("launches") == 500
    assert case.value("copying") == pytest.approx(0.001)


def test_a_profile_of_a_cpu_has_no_busy_time_and_no_launches():
    case = case_of(profile=Profile(steps=2, wall_ns=1, phase_ns={}, operators_ns=5))
    for key in ("busy", "busy_share", "busy_of_step", "launches", "copying", "forward.busy", "forward.busy_share"):
        assert case[key] is None
    assert findings.launching(case) is None


def test_memory_is_the_highest_of_all_processes_and_fragmentation_its_rest():
    held = [
        Memory(pool="device", allocated_peak=peak, reserved_peak=800, phase_allocated_peak={"forward": peak // 2})
        for peak in (600, 400)
    ]
    case = CaseSummary([on_device(memory=memory, process=index) for index, memory in enumerate(held)])
    assert case["peak_memory"] == 600 and case["reserved_memory"] == 800
    assert case["forward.peak_memory"] == 300 and case["backward.peak_memory"] is None
    assert case_of(memory=held[0])["fragmentation"] == pytest.approx(0.25)
    assert case_of(memory=Memory(pool="host", allocated_peak=5, reserved_peak=9))["fragmentation"] is None


def telemetry(energy=None, **columns):
    times = [-50 * MS, 50 * MS, 100 * MS, 260 * MS]
    return Telemetry(
        source="replay", time_ns=times, window_ns=200 * MS, device=columns, energy=energy, sampler_cpu_ns=31 * MS // 10
    )


def energy(**fields):
    known = {"joules": 40.0, "source": "counter", "window_ns": 100 * MS, "steps": 8.0, "updates": 12}
    return Energy(**{**known, "resolvable": True, **fields})


def test_telemetry_counts_within_the_timed_window_and_where_it_told():
    case = case_of(telemetry=telemetry(power_w=[9.0, 200.0, 300.0, 9.0], sm_mhz=[1, None, 1500, 1]))
    assert case["power"] == 250 and case["sm_clock"] == 1500
    assert case["sampler_share"] == pytest.approx(0.01)
    assert case_of(telemetry=telemetry())["power"] is None
    assert case_of(telemetry=telemetry(power_w=[1, None, None, 1]))["power"] is None


def test_power_comes_from_the_counter_before_it_comes_from_readings():
    columns = {"power_w": [1.0] * 4, "power_instant_w": [2.0] * 4}
    assert case_of(telemetry=telemetry(energy(), **columns))["power"] == pytest.approx(400)
    assert case_of(telemetry=telemetry(energy(joules=None, resolvable=False), **columns))["power"] == 2
    assert case_of(telemetry=telemetry(power_w=[1.0] * 4))["power"] == 1


def test_energy_is_given_a_step_and_a_sample_only_where_it_is_resolved():
    case = case_of(telemetry=telemetry(energy()))
    assert case.value("energy_per_step") == pytest.approx(5)
    assert case.value("energy_per_sample") == pytest.approx(5 / 32)
    unresolved = case_of(telemetry=telemetry(energy(resolvable=False, reason="3 updates")))
    assert unresolved["energy_per_step"] is None and unresolved["energy_per_sample"] is None


def test_a_step_is_held_against_the_machines_ceilings():
    rates = Ceilings(
        identity="",
        created="",
        rates={"matrix_bf16": Ceiling(value=1e12, unit="FLOP/s"), "h2d_pinned": Ceiling(value=1e9, unit="B/s")},
    )
    facts = Facts(device="cuda:0", threads=1, dtype="bf16", flops_per_step=4_000_000_000, batch_bytes=8_000_000)
    case = CaseSummary([on_device(facts=facts)], rates)
    assert case.value("mfu") == pytest.approx(4 / 16)
    assert case.binding.rate == "h2d_pinned" and case.value("ceiling_share") == pytest.approx(8 / 16)
    bare = CaseSummary([on_device(facts=facts)])
    assert bare.binding is None and bare["mfu"] is None and bare["ceiling_share"] is None


# --- findings -------------------------------------------------------------------------------------------


def test_small_kernels_under_a_busy_host_are_launch_bound():
    found = findings.launching(case_of(busy={**PHASES_MS, "forward": 1, "backward": 2, "optimizer": 0.5}))
    assert found.whole and found.phases == ("forward", "backward", "optimizer")
    assert found.busy_share == pytest.approx(3.5 / 14) and found.host_share == pytest.approx(1)


def test_a_host_that_runs_ahead_is_not_what_the_device_waits_for():
    quick = {**PHASES_MS, "forward": 1, "backward": 2, "optimizer": 1}
    found = findings.launching(case_of(host=quick, busy={**PHASES_MS, "forward": 1}))
    assert found.phases == () and not found.whole


def test_a_busy_device_is_not_launch_bound_and_a_single_phase_may_be():
    assert findings.launching(case_of()).phases == ()
    found = findings.launching(case_of(busy={**PHASES_MS, "optimizer": 0.2}))
    assert found.phases == ("optimizer",) and not found.whole


def test_a_stall_is_not_slow_launching():
    stalled = {**PHASES_MS, "data": 40, "h2d": 9}
    found = findings.launching(case_of(host=stalled, device=stalled, busy={**PHASES_MS, "data": 0, "h2d": 0}))
    assert found.phases == () and not found.whole


def test_a_negligible_phase_is_not_judged():
    tiny = {**PHASES_MS, "optimizer": 0.5}
    found = findings.launching(
        case_of(
            host={key: round(value * 2) for key, value in tiny.items()},
            device={key: round(value * 100) for key, value in tiny.items()},
            busy={**tiny, "optimizer": 0.0},
        )
    )
    assert found.phases == ()


def searched(on, warmup, step, *, noise=0.001, **settings):
    """A case with or without cudnn's search: its warm-up in ms, and its steps in ms, a little scattered."""
    steps = [round(step * MS * (1 + noise * (index % 5 - 2))) for index in range(50)]
    samples = Samples(batch_size=32, step_ns=steps, host_ns={"forward": steps}, warmup_ns=[ms * MS for ms in warmup])
    return CaseSummary([one(samples, settings=Settings(cudnn_benchmark=on, **settings))])


def test_the_search_has_paid_when_both_have_taken_the_same_time():
    off, on = searched(False, [100, 20, 20], 10), searched(True, [1000, 16, 16, 16, 16], 8)
    (pair,) = findings.paybacks([on, off])
    assert (pair.off, pair.on) == (off, on) and pair.sure
    assert pair.cost_s == pytest.approx((1064 - 5 * 8 - (140 - 3 * 10)) / 1000)
    assert pair.saved_s == pytest.approx(0.002)
    total_on = 1.064 + 0.008 * (pair.steps - 5)
    total_off = 0.140 + 0.010 * (pair.steps - 3)
    assert total_on == pytest.approx(total_off)


def test_a_search_that_saves_nothing_never_pays():
    slower = findings.paybacks([searched(False, [100], 10), searched(True, [900], 12)])
    assert slower[0].steps is None and slower[0].sure
    alike = findings.paybacks([searched(False, [100], 10), searched(True, [900], 9.99, noise=0.01)])
    assert alike[0].steps is None and not alike[0].sure
    assert findings.paybacks([searched(False, [900], 10), searched(True, [100], 8)])[0].steps == 0


def test_only_cases_that_differ_in_the_search_alone_are_paired():
    cases = [
        searched(on, [100], 10, batch_size=batch, cudnn_deterministic=strict)
        for on in (False, True)
        for batch in (8, 16)
        for strict in (False, True)
    ]
    pairs = findings.paybacks(cases)
    assert len(pairs) == 4
    assert findings.paybacks(cases[:4]) == []
    failed = CaseSummary([one(outcome="error", settings=Settings(cudnn_benchmark=True))])
    assert findings.paybacks([searched(False, [100], 10), failed]) == []


def holding(batch, peak, **settings):
    memory = Memory(pool="device", allocated_peak=peak, total=10_000, outside=1_000)
    return CaseSummary([on_device(memory=memory, settings=Settings(batch_size=batch, **settings))])


def test_larger_batches_are_estimated_by_a_line_through_the_smaller_ones():
    scatter = (4, -3, -3, 4)
    cases = [holding(b, 500 + 10 * b + e) for b, e in zip((64, 16, 32, 128), scatter, strict=True)]
    (growth,) = findings.memory_growth(cases)
    assert growth.a_sample == pytest.approx(10, rel=0.02)
    assert growth.batch_size == 256 and growth.peak.low < 500 + 2560 < growth.peak.high
    assert growth.limit == 9_000 and growth.largest.low < 850 < growth.largest.high


def test_no_line_is_drawn_through_two_batch_sizes_or_through_other_settings():
    assert findings.memory_growth([holding(16, 600), holding(32, 800)]) == []
    mixed = [holding(16, 600), holding(32, 800), holding(64, 900, amp="bf16")]
    assert findings.memory_growth(mixed) == []


def backends(**fields):
    known = {
        "cudnn_enabled": True,
        "cudnn_version": 9,
        "cudnn_benchmark": False,
        "cudnn_deterministic": False,
        "cudnn_allow_tf32": True,
        "matmul_allow_tf32": False,
        "deterministic_algorithms": "off",
        "cublas_workspace_config": None,
        "allocator_config": None,
    }
    return Facts(device="cuda:0", threads=1, backends=Backends(**{**known, **fields}))


def test_what_was_in_force_is_held_against_what_was_asked():
    asked = Settings(cudnn_benchmark=True, cudnn_deterministic=None, deterministic_algorithms=True)
    case = CaseSummary([on_device(settings=asked, facts=backends(deterministic_algorithms="warn"))])
    assert findings.disagreements(case) == [
        findings.Disagreement("cudnn_benchmark", True, False),
        findings.Disagreement("deterministic_algorithms", True, "warn"),
    ]
    assert findings.disagreements(CaseSummary([on_device(facts=backends())])) == []
    assert findings.disagreements(case_of()) == []
