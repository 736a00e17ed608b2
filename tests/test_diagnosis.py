"""A diagnosis names what was planted, says what it costs, and says nothing where nothing is wrong."""

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loadings import MIB, OWN, Cost, consumer_only, loading

import bsprof
from bsprof import diagnosis as module
from bsprof.attribution import attribution, passes_of, ready_depths, steps_of, worker_rows
from bsprof.causes import RULES, Rule
from bsprof.diagnosis import diagnose
from bsprof.evidence import THRESHOLDS
from bsprof.loading import MAIN, Batches, Diagnosis, Loading, Resources, Stage, Worker

TWO = {"cores": 2, "capacity": 2.0}
SLEEP = {"hrtimer_nanosleep": 60}


def codes(seen: Diagnosis) -> list[str]:
    return [cause.code for cause in seen.causes]


def named(**planted: Any) -> list[str]:
    found = diagnose(loading(**planted), predictions=False)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Diagnosis) == found  # it goes into a file
    return codes(found)


# --- one fault -------------------------------------------------------------------------------------------

FAULTS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "no_workers": [
        ({**TWO, "workers": 0}, {"workers": 2}),
        ({"workers": 0, "stages": {"decode": Cost(0.02)}, "step_s": 0.03}, {"workers": 1}),
    ],
    "too_few_workers": [
        ({**TWO, "workers": 1, "stages": {OWN: Cost(0.001, 0.04)}, "blocked_in": SLEEP}, {"workers": 6}),
        ({"workers": 2, "stages": {"decode": Cost(0.05)}, "step_s": 0.015}, {"workers": 6}),
    ],
    "cpu_saturated": [
        ({**TWO, "workers": 6, "stages": {OWN: Cost(0.06)}}, {"stages": {OWN: Cost(0.012)}}),
        ({"workers": 16, "stages": {"decode": Cost(0.2)}}, {"stages": {"decode": Cost(0.05)}}),
    ],
    "cpu_contended": [
        (
            {"cores": 2, "capacity": 1.0, "foreign_cores": 1.0, "stages": {OWN: Cost(0.016)}},
            {"capacity": 2.0, "foreign_cores": 0.02},
        ),
        (
            {"cores": 8, "capacity": 3.0, "throttled_share": 0.5, "workers": 6, "stages": {"decode": Cost(0.05)}},
            {"capacity": 8.0, "throttled_share": 0.0},
        ),
        (
            {"cores": 2, "capacity": 0.6, "capacity_seen": 1.0, "foreign_cores": 1.4, "workers": 1, "step_s": 0.009},
            {"capacity": 2.0, "capacity_seen": 2.0, "foreign_cores": 0.02},
        ),
    ],
    "affinity_shrunk": [
        (
            {"cores": 2, "capacity": 1.0, "capacity_seen": 1.95, "worker_cores": 1, "stages": {OWN: Cost(0.016)}},
            {"capacity": 2.0, "worker_cores": 2},
        ),
    ],
    "thread_oversubscription": [
        ({**TWO, "stages": {OWN: Cost(0.02)}, "process_cpu": 4.0, "threads": 9}, {"process_cpu": 1.0, "threads": 2}),
    ],
    "slow_stage": [
        ({**TWO, "stages": {"decode": Cost(0.06), "read": Cost(0.002)}}, {"stages": {"decode": Cost(0.01)}}),
        ({**TWO, "stages": {OWN: Cost(0.05), "RandomCrop": Cost(0.01)}}, {"stages": {OWN: Cost(0.01)}}),
    ],
    "per_item_overhead": [
        ({**TWO, "batch_size": 512, "stages": {OWN: Cost(0.04)}}, {"getitems": True, "stages": {OWN: Cost(0.002)}}),
    ],
    "slow_collate": [({**TWO, "collate": Cost(0.04)}, {"collate": Cost(0.002)})],
    "hot_sample": [
        ({**TWO, "slow_index": (17, 0.5), "epochs": 3}, {"slow_index": None, "epochs": 1}),
        ({**TWO, "slow_index": (3, 0.8)}, {"slow_index": None}),
    ],
    "small_prefetch": [
        ({**TWO, "prefetch": 1, "factors": (1, 1, 1, 1, 1, 1, 8), "stages": {OWN: Cost(0.007)}}, {"prefetch": 8}),
    ],
    "uneven_workers": [({**TWO, "worker_factors": {1: 5.0}, "style": "iterable"}, {"worker_factors": None})],
    "cold_disk": [
        (
            {**TWO, "stages": {"read": Cost(0.002, 0.03)}, "blocks_in": 2000, "blocked_in": {"folio_wait_bit": 40}},
            {"stages": {"read": Cost(0.002)}, "blocks_in": 0, "blocked_in": {}},
        ),
        ({**TWO, "stages": {"read": Cost(0.002, 0.05)}, "blocks_in": 500}, {"stages": {"read": Cost(0.002)}}),
    ],
    "slow_storage": [
        (
            {**TWO, "stages": {OWN: Cost(0.002, 0.03)}, "blocked_in": {"pipe_read": 30, "hrtimer_nanosleep": 4}},
            {"stages": {OWN: Cost(0.002)}},
        ),
    ],
    "lock": [
        (
            {"workers": 3, "stages": {OWN: Cost(0.02, 0.04)}, "blocked_in": {"futex_wait_queue": 40}},
            {"stages": {OWN: Cost(0.02)}, "blocked_in": {"futex_wait_queue": 1}},
        ),
        (
            {"workers": 2, "stages": {OWN: Cost(0.001, 0.04)}, "blocked_in": {"futex_do_wait": 30, **SLEEP}},
            {"stages": {OWN: Cost(0.001, 0.01)}},
        ),
    ],
    "large_payload": [
        (
            {**TWO, "batch_bytes": 64 * MIB, "minor_faults": 17000, "collate": Cost(0.05)},
            {"batch_bytes": 16 * MIB, "collate": Cost(0.008)},
        ),
    ],
    "many_tensors": [({**TWO, "tensors": 400, "unpickle_s": 0.04}, {"tensors": 2, "unpickle_s": 1e-4})],
    "gil_held": [({"gil_overshoot_s": 0.005, "unpickle_s": 0.02}, {"gil_overshoot_s": 1e-4, "unpickle_s": 1e-4})],
    "slow_h2d": [({"h2d_s": 0.006}, {"h2d_s": 0.0005})],
    "pinning": [({"pin_s": 0.03, "batch_bytes": 64 * MIB}, {"pin_s": 0.002})],
    "epoch_restart": [
        ({"epochs": 5, "batches": 10, "iter_s": 0.05, "end_s": 0.05, "enter_s": 0.05}, {"persistent": True}),
        ({"epochs": 4, "batches": 30, "init_s": 0.2}, {"persistent": True, "batches": 90}),
        ({"epochs": 4, "batches": 20, "enter_s": 2.0, "start_method": "spawn"}, {"epochs": 1, "batches": 600}),
    ],
    "slow_start": [
        (
            {"iter_s": 0.3, "enter_s": 2.0, "start_method": "spawn", "pickled_epoch_bytes": 200 * MIB, "batches": 100},
            {"iter_s": 0.03, "enter_s": 0.1, "pickled_epoch_bytes": 4000},
        ),
        ({"init_s": 1.0, "batches": 100}, {"init_s": 0.0}),
        ({"init_s": 2.0, "batches": 30, "epochs": 4, "persistent": True}, {"init_s": 0.0}),
    ],
    "memory_growth": [({"memory_growth": 2 * MIB}, {"memory_growth": 2000.0})],
    "shm_low": [({"resources": Resources(shm_bytes=64 * MIB, shm_free_bytes=5 * MIB)}, {"resources": Resources()})],
    "fds_low": [
        ({"resources": Resources(open_files=1000, open_files_limit=1024)}, {"resources": Resources(open_files=1000)}),
    ],
}
"""For each cause what to plant, and what makes the healthy twin of it."""

PLANTED = [
    pytest.param(code, fault, cure, id=f"{code}-{i}")
    for code, pairs in FAULTS.items()
    for i, (fault, cure) in enumerate(pairs)
]


@pytest.mark.parametrize(("code", "fault", "cure"), PLANTED)
def test_what_was_planted_is_named_first_and_its_healthy_twin_is_not(code, fault, cure):
    assert named(**fault)[0] == code
    assert named(**{**fault, **cure}) == []


def test_every_rule_has_its_fault():
    assert {rule.code for rule in RULES} == set(FAULTS)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("code", ["no_workers", "cpu_saturated", "slow_stage", "slow_collate", "lock", "hot_sample"])
def test_other_sizes_of_the_same_fault_are_named_too(code, scale):
    fault = {"step_s": 0.01, **FAULTS[code][0][0]}
    fault["step_s"] *= scale
    fault["stages"] = {
        name: Cost(cost.cpu * scale, cost.blocked * scale)
        for name, cost in fault.get("stages", {"decode": Cost(0.006), OWN: Cost(0.001)}).items()
    }
    fault["collate"] = Cost(fault.get("collate", Cost(0.0002)).cpu * scale)
    if "slow_index" in fault:
        fault["slow_index"] = (17, 0.5 * scale)
    assert named(**fault)[0] == code


# --- faults upon faults ----------------------------------------------------------------------------------

BOTH = {
    ("slow_collate", "slow_stage"): {**TWO, "stages": {"decode": Cost(0.03)}, "collate": Cost(0.05)},
    ("slow_stage", "slow_collate"): {**TWO, "stages": {"decode": Cost(0.06)}, "collate": Cost(0.03)},
    ("many_tensors", "slow_stage"): {
        **TWO, "stages": {"decode": Cost(0.06)}, "tensors": 300, "unpickle_s": 0.05, "step_s": 0.005,
    },
    ("slow_stage", "many_tensors"): {
        **TWO, "stages": {"decode": Cost(0.2)}, "tensors": 300, "unpickle_s": 0.03, "step_s": 0.005,
    },
    ("hot_sample", "slow_stage"): {**TWO, "stages": {"decode": Cost(0.03)}, "slow_index": (9, 2.0), "epochs": 2},
    ("slow_stage", "hot_sample"): {**TWO, "stages": {"decode": Cost(0.06)}, "slow_index": (9, 0.5), "epochs": 2},
    ("cold_disk", "slow_collate"): {
        **TWO, "stages": {"read": Cost(0.001, 0.06)}, "blocks_in": 900, "collate": Cost(0.03),
    },
    ("cpu_contended", "slow_stage"): {
        "cores": 2, "capacity": 1.0, "foreign_cores": 1.0, "stages": {"decode": Cost(0.05), OWN: Cost(0.002)},
    },
    ("slow_collate", "memory_growth"): {**TWO, "collate": Cost(0.04), "memory_growth": 2.0 * MIB},
}  # fmt: skip


@pytest.mark.parametrize("both", BOTH, ids="+".join)
def test_two_faults_at_once_are_both_named_the_larger_first(both):
    found = named(**BOTH[both])
    assert found[0] == both[0]
    assert both[1] in found


def test_an_outside_load_is_no_cause_where_nobody_waits_for_a_core():
    hogged = {"cores": 2, "capacity": 1.0, "foreign_cores": 1.8, "workers": 1, "blocked_in": SLEEP}
    found = named(**hogged, stages={OWN: Cost(0.001, 0.05)})
    assert found[0] == "too_few_workers"
    assert "cpu_contended" not in found


def test_more_workers_come_before_a_faster_stage_only_where_they_cure_as_much():
    slow = {"decode": Cost(0.03)}
    assert named(workers=1, stages=slow, step_s=0.02)[0] == "too_few_workers"
    assert named(workers=1, stages={"decode": Cost(0.09)}, step_s=0.01, **TWO)[0] == "slow_stage"


def test_blocked_time_of_unknown_kind_is_said_not_to_be_separable():
    found = diagnose(loading(**TWO, stages={OWN: Cost(0.002, 0.05)}), predictions=False)
    storage = next(cause for cause in found.causes if cause.code == "slow_storage")
    assert "lock" in storage.not_separable_from
    assert codes(found)[0] == "too_few_workers"  # which the replay knows to help, whatever it is


def test_sleeping_is_neither_a_lock_nor_storage():
    found = named(**TWO, workers=2, stages={OWN: Cost(0.002, 0.05)}, blocked_in=SLEEP)
    assert not {"lock", "slow_storage", "cold_disk"} & set(found)


def test_once_slow_samples_without_an_index_of_their_own_are_no_hot_sample():
    planted = loading(**TWO, factors=(1, 1, 1, 1, 1, 1, 8), prefetch=1, stages={OWN: Cost(0.007)})
    assert "hot_sample" not in codes(diagnose(planted, predictions=False))


# --- what it says ----------------------------------------------------------------------------------------


def test_a_healthy_loader_is_left_alone():
    found = diagnose(loading(**TWO))
    assert found.verdict == "not_input_bound"
    assert found.causes == ()
    assert re.fullmatch(r"Not input-bound: the step waits [\d.]+ ms of 10 ms \([\d.]+ %\)\.", found.sentence)


def test_the_sentence_says_verdict_rate_causes_and_what_to_try():
    planted = {
        "stages": {"decode": Cost(0.05), "RandomCrop": Cost(0.015)},
        "step_s": 0.02,
        "workers": 2,
        "cores": 4,
        "capacity": 4.0,
    }
    found = diagnose(loading(**planted))
    assert re.fullmatch(
        r"Input-bound: the step waits \d+ ms of \d+ ms; 2 workers deliver \d+ samples/s, the step could take \d+\. "
        r"Cause: too few workers, then decode \(77 % of worker CPU\)\. "
        r"Try workers=4(, prefetch=\d)?: predicted 1\.\d× \[1\.\d, [12](\.\d)?\]\.",  # noqa: RUF001
        found.sentence,
    )
    assert found.best is not None
    assert found.best in found.predictions
    assert found.wait_share == pytest.approx(found.wait_s / found.step_s)


@pytest.mark.parametrize(
    ("work_s", "verdict"),
    [(0.012, "not_input_bound"), (0.0224, "moderately_input_bound"), (0.04, "highly_input_bound")],
)
def test_the_verdict_follows_the_share_of_the_step_that_waits(work_s, verdict):
    found = diagnose(loading(**TWO, stages={"decode": Cost(work_s)}, jitter=0.0), predictions=False)
    assert found.verdict == verdict


def test_without_a_step_the_causes_are_what_limits_the_rate():
    found = diagnose(loading(kind="fastest", workers=1, **TWO))
    assert found.verdict == "no_step"
    assert found.possible_per_s is None
    assert found.contention_s is None
    assert found.sentence.startswith("No step to compare with: 1 worker delivers ")
    assert "Limited by: " in found.sentence


def test_of_a_loader_that_cannot_be_looked_into_only_the_wait_is_known():
    found = diagnose(consumer_only(wait_s=0.03, step_s=0.01))
    assert found.verdict == "highly_input_bound"
    assert found.wait_share == pytest.approx(0.75)
    assert found.causes == ()
    assert found.predictions == ()
    assert "not seen" in found.sentence
    assert set(found.waits_s) == {"epoch"}


def test_too_little_to_judge_is_unknown():
    for batches in (0, 1):
        found = diagnose(loading(batches=batches), predictions=False)
        assert found.verdict == "unknown"
        assert found.wait_share is None


def test_what_workers_take_from_the_step_is_told():
    found = diagnose(loading(step_s=0.012, cached_step_s=0.010, cpu_share=1.0), predictions=False)
    assert found.contention_s == pytest.approx(0.002)


def test_the_waits_of_a_step_add_up():
    for planted in ({**TWO, "stages": {OWN: Cost(0.03)}}, {"pin_s": 0.03}, {"workers": 0}, {"tensors": 99}):
        found = diagnose(loading(**planted), predictions=False)
        split = sum(found.waits_s[part] for part in ("production", "ordering", "handoff"))
        assert split == pytest.approx(found.wait_s)


def test_awaiting_a_slow_batch_while_later_ones_lie_there_is_ordering():
    found = diagnose(loading(worker_factors={1: 5.0}, style="iterable"), predictions=False)
    assert found.waits_s["ordering"] > 0.5 * found.wait_s


# --- where the time goes ---------------------------------------------------------------------------------


def test_planted_times_come_back():
    planted = {"read": Cost(0.001, 0.002), "decode": Cost(0.008), "Resize": Cost(0.003), OWN: Cost(0.002)}
    rows = {row.name: row for row in attribution(loading(stages=planted, collate=Cost(0.004), jitter=0.0))}
    for name, cost in planted.items():
        row = rows["own code" if name == OWN else name]
        assert row.wall_s == pytest.approx(cost.cpu + cost.blocked, rel=1e-3)
        assert row.cpu_s == pytest.approx(cost.cpu, rel=1e-2)
        assert row.cpu_s + row.runqueue_s + row.blocked_s == pytest.approx(row.wall_s)
    assert rows["collate"].wall_s == pytest.approx(0.004)
    assert sum(row.share for row in rows.values() if row.where == "worker") == pytest.approx(1.0)


def test_what_was_not_captured_is_no_row():
    assert attribution(consumer_only()) == ()
    assert {row.name for row in attribution(loading(workers=0))}.isdisjoint({"serialise", "in pipe", "unpickle", "pin"})


def test_ready_batches_are_counted_when_one_is_asked_for():
    assert set(ready_depths(loading(stages={OWN: Cost(0.1)}))) <= {0, 1}
    deep = ready_depths(loading(workers=2, prefetch=4))
    assert len(deep) == 60
    assert np.median(deep) == 8
    assert ready_depths(loading(workers=0)) == []


def test_each_worker_has_a_row():
    rows = worker_rows(loading(workers=3, worker_factors={2: 2.0}, memory_growth=1000.0, epochs=2))
    assert [row.id for row in rows] == [0, 1, 2]
    assert {row.starts for row in rows} == {2}
    assert rows[2].fetch_s == pytest.approx(2 * rows[0].fetch_s, rel=0.1)
    assert all(row.bytes_per_s > 0 for row in rows)


def test_starts_are_no_steps():
    recorded = loading(workers=4, epochs=3, batches=40, enter_s=1.0)
    assert [len(one.starting) for one in passes_of(recorded)] == [4, 4, 4]
    assert steps_of(recorded).wait_s.size == 3 * 36
    assert diagnose(recorded, predictions=False).wait_s < 0.001


# --- any recording ---------------------------------------------------------------------------------------

moments = st.none() | st.integers(0, 10**10)


@st.composite
def recordings(draw: st.DrawFn) -> Loading:
    """Anything that the schema allows: nulls everywhere, moments in any order, times of nothing."""
    count = draw(st.integers(0, 12))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        gone = draw(st.booleans())
        return [None] * count if gone else draw(st.lists(values, min_size=count, max_size=count))

    def whole(values: st.SearchStrategy[int]) -> list[int]:
        return draw(st.lists(values, min_size=count, max_size=count))

    fields: dict[str, Any] = {name: column(moments) for name in Batches.__struct_fields__ if name.endswith("_ns")}
    rest = (
        "samples",
        "minor_faults",
        "major_faults",
        "blocks_in",
        "switches",
        "tensors",
        "bytes",
        "float_bytes",
        "pickled_bytes",
    )
    fields |= {name: column(st.none() | st.integers(0, 10**8)) for name in rest}
    fields |= {
        "epoch": whole(st.integers(0, 2)),
        "order": whole(st.integers(0, 20)),
        "worker": whole(st.integers(-1, 2)),
    }
    fields["stage_ns"] = {name: whole(st.integers(0, 10**9)) for name in draw(st.sets(st.sampled_from("ab")))}
    like = loading(
        workers=draw(st.integers(0, 3)),
        batches=draw(st.integers(0, 4)),
        epochs=draw(st.integers(1, 2)),
        step_s=draw(st.sampled_from([0.0, 0.01])),
        foreign_cores=draw(st.sampled_from([0.0, 7.0])),
        worker_cores=draw(st.sampled_from([1, 8])),
        threads=draw(st.sampled_from([1, 20])),
        kind=draw(st.sampled_from(["fixed", "fastest", "loop"])),
        gil_overshoot_s=draw(st.sampled_from([None, 0.0, 0.006])),
        cpu_share=draw(st.sampled_from([0.0, 1.0])),
        cores=2,
    )
    never = Stage(calls=0, ns=0, closely_ns=0, closely_cpu_ns=0, closely_calls=0)
    change: dict[str, Any] = {"batches": Batches(**fields)}
    nulls = dict.fromkeys(("machine", "resources", "capacity_cores", "cached_step_ns", "samples"))
    for name, empty in {**nulls, "workers": (), "epochs": (), "stages": {"a": never}}.items():
        if draw(st.booleans()):
            change[name] = empty
    if draw(st.booleans()):
        change["settings"] = msgspec.structs.replace(like.settings, workers=None, prefetch=None, in_order=None)
    return msgspec.structs.replace(like, **change)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(recordings(), st.integers(0, 9))
def test_any_recording_can_be_diagnosed(recorded, dice):
    found = diagnose(recorded, predictions=dice == 0)
    shares = [found.wait_share, *(row.share for row in attribution(recorded))]
    for cause in found.causes:
        shares += [cause.gives_back, cause.gives_back_low, cause.gives_back_high]
        assert (cause.gives_back_low or 0) <= (cause.gives_back or 0) <= (cause.gives_back_high or 1)
    assert all(0 <= share <= 1 for share in shares if share is not None)
    assert found.sentence.endswith(".")
    assert msgspec.json.decode(msgspec.json.encode(found), type=Diagnosis) == found
    worker_rows(recorded)
    ready_depths(recorded)


@settings(max_examples=15, deadline=None)
@given(
    workers=st.integers(1, 4),
    step_s=st.floats(0.002, 0.1),
    load=st.floats(0.1, 0.8),
    blocked=st.floats(0, 1),
    prefetch=st.integers(2, 4),
)
def test_a_loader_that_keeps_up_has_no_cause(workers, step_s, load, blocked, prefetch):
    work_s = load * step_s * workers
    made = {"decode": Cost(work_s * (1 - blocked), work_s * blocked)}
    healthy = loading(
        workers=workers,
        prefetch=prefetch,
        step_s=step_s,
        stages=made,
        collate=Cost(),
        unpickle_s=step_s / 100,
        serialise_s=step_s / 100,
        iter_s=step_s,
        end_s=step_s,
        enter_s=step_s,
    )
    assert codes(diagnose(healthy, predictions=False)) == []


def scaled(recorded: Loading, factor: int) -> Loading:
    """The same recording by a clock that runs faster."""

    def longer(value: Any, name: str = "") -> Any:
        if isinstance(value, msgspec.Struct):
            fields = {key: longer(getattr(value, key), key) for key in value.__struct_fields__}
            return type(value)(**fields)
        if isinstance(value, dict):
            return {key: longer(one, name or key) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(longer(one, name) for one in value)
        return value * factor if name.endswith("ns") and isinstance(value, int | float) else value

    return longer(recorded)


@pytest.mark.parametrize("code", ["slow_stage", "too_few_workers", "cpu_saturated", "slow_collate", "lock"])
def test_a_slower_clock_changes_neither_causes_nor_shares(code):
    recorded = loading(**FAULTS[code][0][0])
    first, second = (diagnose(one, predictions=False) for one in (recorded, scaled(recorded, 7)))
    assert codes(first) == codes(second)
    assert second.wait_share == pytest.approx(first.wait_share)
    for a, b in zip(first.causes, second.causes, strict=True):
        assert b.gives_back == pytest.approx(a.gives_back, rel=0.01, abs=1e-3)
    assert second.step_s == pytest.approx(7 * first.step_s)


# --- the table -------------------------------------------------------------------------------------------


def test_rules_explain_what_stands_below_them():
    places = {rule.code: i for i, rule in enumerate(RULES)}
    assert len(places) == len(RULES)
    for rule in RULES:
        assert isinstance(rule, Rule)
        for code in set(rule.explains) - {"*"}:
            assert places[code] > places[rule.code]


def test_every_threshold_has_its_reason_and_is_used():
    root = Path(bsprof.__file__).parent
    rooms = [root / "evidence.py", root / "diagnosis.py", *(root / "causes").glob("*.py")]
    text = "".join(room.read_text() for room in rooms)
    for name, threshold in THRESHOLDS.items():
        assert threshold.unit
        assert len(threshold.reason) > 10
        assert f'limit("{name}")' in text, f"{name} decides nothing"
    assert set(re.findall(r'limit\("(\w+)"\)', text)) == set(THRESHOLDS)


def test_a_worker_that_is_the_main_process_is_none():
    alone = loading(workers=0)
    here = Worker(id=MAIN, pid=1, epoch=0, entered_at_ns=0, ready_at_ns=0, cores=1, torch_threads=8, threads=30)
    found = diagnose(msgspec.structs.replace(alone, workers=(here,)), predictions=False)
    assert codes(found)[0] == "no_workers"
    assert module.RULES is RULES
