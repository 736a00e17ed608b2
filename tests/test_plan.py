"""A plan becomes the cases that mean something on the machine at hand."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import environment

from bsprof import store
from bsprof.errors import BsprofError
from bsprof.metrics import varying_axes
from bsprof.model import AXES, Accelerator, Axes, Environment, Plan, Settings, case_key
from bsprof.sweep.plan import (
    case_time_s,
    collapse,
    default_axes,
    expand,
    make_plan,
    parse_values,
)


def machine_of(cores: int = 2, *accelerators: Accelerator) -> Environment:
    known = {"cores_logical": cores, "cores_physical": cores, "cores_usable": cores}
    return environment(memory_bytes=2**34, shm_bytes=2**33, accelerators=accelerators, **known)


CPU = machine_of()
GPU = machine_of(16, Accelerator(name="H200", kind="cuda", index=0, memory_bytes=2**37))
MPS = machine_of(8, Accelerator(name="M3", kind="mps", index=0))


def test_full_factorial_in_an_order_that_the_seed_decides():
    plan = Plan(axes=Axes(batch_size=(1, 2, 4), workers=(0, 1)))
    cases = expand(plan, CPU).cases
    assert len(cases) == 6
    assert {(c.settings.batch_size, c.settings.workers) for c in cases} == {(b, w) for b in (1, 2, 4) for w in (0, 1)}
    assert expand(plan, CPU).cases == cases
    other = expand(msgspec.structs.replace(plan, seed=1), CPU).cases
    assert other != cases
    assert sorted(c.key for c in other) == sorted(c.key for c in cases)
    listed = expand(msgspec.structs.replace(plan, order="listed"), CPU).cases
    assert [c.settings.batch_size for c in listed] == [1, 1, 2, 2, 4, 4]


def test_blocks_override_the_common_axes_and_do_not_repeat_a_case():
    plan = Plan(
        axes=Axes(model=("resnet20",), data=("cifar10",), batch_size=(256,)),
        blocks=(Axes(batch_size=(64, 128, 256), workers=(4,)), Axes(workers=(1, 4, 8))),
        order="listed",
    )
    points = [(c.settings.batch_size, c.settings.workers) for c in expand(plan, CPU).cases]
    assert points == [(64, 4), (128, 4), (256, 4), (256, 1), (256, 8)]
    assert {c.settings.model for c in expand(plan, CPU).cases} == {"resnet20"}


def test_each_process_of_a_case_comes_once_a_round():
    cases = expand(Plan(axes=Axes(batch_size=(1, 2, 4)), repeat=3), CPU).cases
    assert [c.process for c in cases] == [0] * 3 + [1] * 3 + [2] * 3
    assert len({c.key for c in cases}) == 3
    assert [c.key for c in cases[:3]] != [c.key for c in cases[3:6]] or [c.key for c in cases[:3]] != [
        c.key for c in cases[6:]
    ]


def test_cudnn_means_nothing_on_a_cpu_and_is_measured_once():
    plan = Plan(axes=Axes(cudnn_benchmark=(True, False), cudnn_deterministic=(True, False)))
    expansion = expand(plan, CPU)
    assert len(expansion.cases) == 1
    assert expansion.cases[0].settings.cudnn_benchmark is None
    assert expansion.varying == ()
    assert [note.text for note in expansion.notes] == [
        "cudnn_benchmark means nothing without a CUDA device: 4 cases are measured as 1",
        "cudnn_deterministic means nothing without a CUDA device: 4 cases are measured as 1",
    ]
    assert len(expand(plan, GPU).cases) == 4
    assert expand(plan, GPU).notes == []


def test_an_axis_of_one_value_makes_no_cases_equal():
    plan = Plan(axes=Axes(cudnn_benchmark=(True, False), cudnn_deterministic=(True,)))
    assert [note.text for note in expand(plan, CPU).notes] == [
        "cudnn_benchmark means nothing without a CUDA device: 2 cases are measured as 1",
        "cudnn_deterministic means nothing without a CUDA device",
    ]


def test_prefetch_means_nothing_without_workers():
    expansion = expand(Plan(axes=Axes(workers=(0, 2), prefetch=(2, 4))), CPU)
    assert {(c.settings.workers, c.settings.prefetch) for c in expansion.cases} == {(0, None), (2, 2), (2, 4)}
    assert expansion.varying == ("workers", "prefetch")
    assert [note.text for note in expansion.notes] == [
        "prefetch means nothing with 0 workers: 2 cases are measured as 1"
    ]


def test_defaults_that_mean_nothing_are_collapsed_without_a_word():
    assert expand(Plan(axes=Axes(workers=(0, 1))), CPU).notes == []
    assert collapse(Settings(workers=1), MPS).pin_memory is True
    assert collapse(Settings(workers=1), MPS).cudnn_benchmark is None
    assert collapse(Settings(workers=1), CPU).pin_memory is None


def test_no_values_are_refused():
    with pytest.raises(BsprofError, match=r"\$\.axes\.workers: no values"):
        expand(Plan(axes=Axes(workers=())), CPU)


@pytest.mark.parametrize("machine", [CPU, GPU, MPS, machine_of(64), machine_of(1)])
@pytest.mark.parametrize("quick", [False, True])
def test_the_default_plan_fits_the_machine(machine, quick):
    axes = default_axes(machine, quick=quick)
    assert max(axes["workers"]) <= machine.cores_usable
    assert axes["workers"][0] == 0
    plan = make_plan({}, machine, quick=quick, stop={})
    cases = expand(plan, machine).cases
    budget = len(cases) * plan.stop.max_case_time_s
    assert budget <= (30 if quick else 120)
    assert len(cases) >= (2 if quick else 4)


def test_what_the_user_names_is_not_overridden():
    plan = make_plan({"batch_size": (7,), "data": ("cifar10",)}, CPU, quick=False, stop={"precision": 0.05})
    assert plan.axes.batch_size == (7,)
    assert plan.axes.workers == (0, 1, 2)
    assert plan.axes.image_size is msgspec.UNSET
    assert plan.stop.precision == 0.05
    assert make_plan({}, CPU, quick=False, stop={"max_case_time_s": 3.0}).stop.max_case_time_s == 3.0


def test_a_plan_survives_the_file():
    plan = make_plan({"prefetch": (None, 2)}, CPU, quick=True, stop={})
    assert msgspec.json.decode(msgspec.json.encode(plan), type=Plan) == plan


@pytest.mark.parametrize(
    ("axis", "text", "values"),
    [
        ("batch_size", "64,128", (64, 128)),
        ("workers", "0, 2", (0, 2)),
        ("cudnn_benchmark", "on,OFF,auto", (True, False, None)),
        ("amp", "off,bf16", ("off", "bf16")),
        ("image_size", "auto,64", (None, 64)),
        ("data", "jpeg:64x48,n=20,synthetic,pkg.mod:make", ("jpeg:64x48,n=20", "synthetic", "pkg.mod:make")),
        ("model", "resnet18,resnet20", ("resnet18", "resnet20")),
    ],
)
def test_values_of_a_flag(axis, text, values):
    assert parse_values(AXES[axis], text, "--x") == values


@pytest.mark.parametrize(
    ("axis", "text", "message"),
    [
        ("batch_size", "64,x", r"--f: expected a whole number, got 'x'$"),
        ("batch_size", "0", r"--f: expected a whole number, got '0' \(expected int >= 1\)"),
        ("batch_size", "-3", r"expected int >= 1"),
        ("image_size", "4", r"expected int >= 8"),
        ("workers", "1.5", r"got '1.5'"),
        ("amp", "bf17", r"'bf17' is none of off, bf16, fp16"),
        ("cudnn_benchmark", "maybe", r"neither on nor off"),
        ("batch_size", "1,,2", r"empty value"),
        ("batch_size", "", r"empty value"),
    ],
)
def test_bad_values_name_the_flag(axis, text, message):
    with pytest.raises(BsprofError, match=message) as caught:
        parse_values(AXES[axis], text, "--f")
    assert caught.value.hint


settings = st.builds(
    Settings,
    batch_size=st.integers(1, 512),
    workers=st.integers(0, 8),
    prefetch=st.none() | st.integers(1, 8),
    amp=st.sampled_from(["off", "bf16", "fp16"]),
    compile=st.booleans(),
    model=st.text(min_size=1, max_size=8),
)


@given(settings, settings)
def test_the_key_tells_settings_apart(a, b):
    assert (case_key(a) == case_key(b)) == (a == b)


def test_the_key_does_not_change_when_an_axis_is_added():
    # Defaults are no part of the key: these are the keys of schema 1 for ever.
    assert case_key(Settings()) == "44136fa355b3"
    assert case_key(Settings(batch_size=64, workers=2)) == "7f43271e6983"


@given(st.lists(settings, min_size=1, max_size=5))
def test_collapsing_twice_changes_nothing(many):
    for machine in (CPU, GPU, MPS):
        once = [collapse(s, machine) for s in many]
        assert [collapse(s, machine) for s in once] == once
        assert set(varying_axes(once)) <= set(AXES)


def test_time_for_a_case_shrinks_with_their_number_but_not_below_what_warming_up_takes():
    assert case_time_s(9, quick=False) > case_time_s(12, quick=False) >= case_time_s(1000, quick=False) == 5.0


# --- plans that come along ----------------------------------------------------------------------------

PLANS = Path(__file__).parents[1] / "benchmarks" / "plans"


def test_the_founding_table_has_its_fourteen_rows():
    assert len(expand(store.read_plan(PLANS / "founding.toml"), GPU).cases) == 14


def test_cudnns_switches_are_never_varied_together_alone():
    """All four combinations at each batch size: the effect of one switch cannot be taken for the other's."""
    plan = store.read_plan(PLANS / "cudnn_grid.toml")
    found: dict[int, set[tuple[bool | None, bool | None]]] = {}
    for case in expand(plan, GPU).cases:
        assert case.settings is not None
        switches = (case.settings.cudnn_benchmark, case.settings.cudnn_deterministic)
        found.setdefault(case.settings.batch_size, set()).add(switches)
    assert set(found) == {32, 128}
    for combinations in found.values():
        assert combinations == {(False, False), (False, True), (True, False), (True, True)}
    on_cpu = expand(plan, CPU)
    assert {case.settings.batch_size for case in on_cpu.cases if case.settings} == {32, 128}
    assert len(on_cpu.cases) == 2 * plan.repeat
    assert {note.code for note in on_cpu.notes} == {"axis_collapsed"}


@pytest.mark.parametrize("machine", [CPU, MPS])
def test_ranges_for_nsight_need_cuda(machine):
    with pytest.raises(BsprofError, match="nvtx: there is no CUDA device"):
        expand(Plan(nvtx=True), machine)
    assert expand(Plan(nvtx=True), GPU).cases
