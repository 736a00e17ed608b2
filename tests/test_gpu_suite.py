"""The GPU acceptance suite without a GPU: its code runs, and what it must find it finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from machines import environment
from msgspec.structs import replace
from worlds import BUCKETS, world

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks.gpu import cases, clocks, cost, exchange, power, suite, vendor  # noqa: E402
from benchmarks.gpu.device import RehearsalDevice, VirtualHost  # noqa: E402
from benchmarks.gpu.verdict import Check, Stand, Unable, judge  # noqa: E402
from bsprof.measure.collectives import Found  # noqa: E402
from bsprof.measure.repeats import Extent  # noqa: E402
from bsprof.model import (  # noqa: E402
    AllReduce,
    Backends,
    Block,
    Case,
    Energy,
    Facts,
    LargestBatch,
    Measurement,
    Memory,
    Outcome,
    Plan,
    Profile,
    Result,
    Samples,
    Serialised,
    Settings,
    Telemetry,
)
from bsprof.noun import Note  # noqa: E402


def verdicts(lines):
    return {line.what: line.verdict for line in lines}


def failed(lines):
    return [line.what for line in lines if line.verdict == "FAIL"]


# --- the whole of it, as it is run ------------------------------------------------------------------


def run_suite(*arguments, timeout=600):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "reports").rglob("*")}
    folder = tmp_path_factory.mktemp("rehearsal")
    done = run_suite("--rehearse", "--out", str(folder))
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "reports").rglob("*")} == before
    return done, folder


def test_a_rehearsal_exercises_every_check_and_none_crashes(rehearsal):
    done, folder = rehearsal
    (path,) = folder.glob("*.json")
    report = json.loads(path.read_text())
    assert {line["check"] for line in report["lines"]} == {check.name for check in suite.CHECKS}
    broken = [
        line for line in report["lines"] if line["reason"].startswith(("crashed", "its process", "still running"))
    ]
    assert broken == [], done.stderr
    judged = {line["check"] for line in report["lines"] if line["figure"] or line["verdict"] == "FAIL"}
    assert judged == {check.name for check in suite.CHECKS}


def test_a_rehearsal_claims_nothing(rehearsal):
    done, folder = rehearsal
    (path,) = folder.glob("*.json")
    report = json.loads(path.read_text())
    assert report["rehearsed"] is True
    assert report["passed"] is None
    *lines, summary, _ = done.stdout.splitlines()
    assert lines
    assert all(line.startswith("REHEARSED ") for line in lines)
    assert summary.startswith("REHEARSED, no claim")
    (page,) = folder.glob("*.md")
    text = page.read_text()
    assert "no claim" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| verdict |" not in line]
    assert len(rows) == len(report["lines"])
    assert all("| REHEARSED " in row for row in rows)


def test_a_rehearsal_is_never_written_to_reports(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        suite.main(["--rehearse", "--out", "reports/somewhere"])
    assert ended.value.code == 2
    assert "no report" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys):
    assert suite.main([]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device" in said
    assert "--rehearse" in said


def test_the_list_fits_into_the_budget(capsys):
    assert suite.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{check.name} " in listed for check in suite.CHECKS)
    assert sum(check.expected_s for check in suite.CHECKS) <= suite.BUDGET_S <= 480


def test_an_unknown_check_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--only", "stall,wishes"])
    assert "wishes" in capsys.readouterr().err


# --- checks that go wrong ---------------------------------------------------------------------------


def crashes(stand):
    yield judge("before", True, "1", "1")
    raise LookupError("nothing there")


def dies(stand):
    yield judge("before", True, "1", "1")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(stand):
    yield judge("before", True, "1", "1")
    time.sleep(600)


def cannot(stand):
    raise Unable("no such feature")
    yield


def says_nothing(stand):
    yield from ()


@pytest.mark.parametrize(
    ("run", "reason", "before"),
    [
        (crashes, "crashed: LookupError: nothing there", 1),
        (dies, "its process died: SIGKILL", 1),
        (hangs, "still running after 1 s", 1),
        (cannot, "no such feature", 0),
        (says_nothing, "it checked nothing", 0),
    ],
)
def test_a_check_that_goes_wrong_fails_with_its_reason(run, reason, before, tmp_path):
    check = Check(name="odd", expected_s=1, run=run)
    lines = list(suite.run_check(check, RehearsalDevice(), tmp_path, left_s=1.0 if run is hangs else 60.0))
    assert [line.verdict for line in lines] == ["PASS"] * before + ["FAIL"]
    assert lines[-1].reason.startswith(reason)


def test_what_does_not_fit_into_the_budget_is_skipped_with_the_reason(tmp_path):
    class Real(RehearsalDevice):
        rehearsed = False

    (line,) = suite.run_check(Check(name="long", expected_s=50, run=crashes), Real(), tmp_path, left_s=10.0)
    assert line.verdict == "SKIP"
    assert "50 s" in line.reason
    assert "10 s" in line.reason


# --- planted faults: in virtual time, where nothing is left to chance -------------------------------


def stand(tmp_path, **faults):
    return Stand(device=RehearsalDevice(host=VirtualHost(), **faults), folder=tmp_path, cache=tmp_path)


@pytest.mark.parametrize("check", [clocks.planted_delays, clocks.stall, clocks.sums, clocks.no_synchronisation])
def test_a_true_clock_passes(check, tmp_path):
    found = verdicts(check(stand(tmp_path)))
    assert found
    assert "FAIL" not in found.values()
    assert "PASS" in found.values()


def test_a_clock_that_is_10_percent_off_fails(tmp_path):
    found = failed(clocks.planted_delays(stand(tmp_path, rate=1.1)))
    assert "a second is a second on both clocks" in found
    assert {f"delay in {phase}, device" for phase in clocks.PHASES} <= set(found)
    assert failed(clocks.stall(stand(tmp_path, rate=1.1)))
    assert len(failed(clocks.sums(stand(tmp_path, rate=1.1)))) == 2


def test_a_stage_that_leaks_fails(tmp_path):
    found = failed(clocks.planted_delays(stand(tmp_path, leak=0.2)))
    assert {f"delay in {phase}, device" for phase in clocks.PHASES[:-1]} <= set(found)


def test_a_recorder_that_waits_fails(tmp_path):
    found = failed(clocks.no_synchronisation(stand(tmp_path, waits=True)))
    assert "the host runs ahead of a full queue" in found


def test_a_stall_that_is_taken_for_the_wait_fails():
    """What a host-only tool would say of a loader at half the step time."""
    steps = 20
    wait, work = 5_000_000, 10_000_000
    host = {"data": [wait] * steps, "forward": [20_000] * steps}
    right = {"data": [0] * steps, "forward": [work] * steps}
    wrong = {"data": [wait] * steps, "forward": [work - wait] * steps}

    def judged(device):
        samples = Samples(
            batch_size=None,
            step_ns=[wait + 20_000] * steps,
            host_ns=host,
            device_step_ns=[work] * steps,
            device_ns=device,
        )
        return clocks.judge_stall(samples, wait + 20_000, work).verdict

    assert judged(right) == "PASS"
    assert judged(wrong) == "FAIL"


def rounds(bare, added, scatter=0.0):
    return [
        {
            "bare": bare,
            "bsprof": bare + added + (scatter if i % 2 else -scatter),
            "torch.profiler": bare + 500.0,
        }
        for i in range(30)
    ]


@pytest.mark.parametrize(
    ("times", "limit", "verdict"),
    [
        (rounds(10_000.0, 15.0), {"share": 0.002}, "PASS"),
        (rounds(10_000.0, 15.0, 50.0), {"share": 0.002}, "PASS"),
        (rounds(10_000.0, 60.0), {"share": 0.002}, "FAIL"),
        (rounds(10_000.0, 0.0, 500.0), {"share": 0.002}, "FAIL"),  # too wide to tell
        (rounds(200.0, 25.0), {"limit_us": 40.0}, "PASS"),
        (rounds(200.0, 45.0), {"limit_us": 40.0}, "FAIL"),
    ],
)
def test_distortion_is_held_against_its_limit(times, limit, verdict):
    assert cost.judge_added("a model", times, **limit).verdict == verdict


# --- judges of results ------------------------------------------------------------------------------


def telemetry(*, joules=3600.0, watts=300.0, source="counter", resolvable=True, cpu_ns=50_000_000):
    times = [i * 100_000_000 for i in range(-3, 124)]
    return Telemetry(
        source="nvml",
        time_ns=times,
        window_ns=12_000_000_000,
        device={"power_w": [watts if t >= 0 else 5.0 for t in times]},
        energy=Energy(
            joules=joules,
            source=source,
            window_ns=12_000_000_000,
            steps=1000.0,
            updates=120,
            resolvable=resolvable,
            reason=None if resolvable else "3 updates are too few",
        ),
        sampler_cpu_ns=cpu_ns,
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (telemetry(), "PASS"),
        (telemetry(joules=3000.0), "FAIL"),
        (telemetry(joules=None), "FAIL"),
        (telemetry(source="power"), "FAIL"),
        (telemetry(watts=None), "FAIL"),
    ],
)
def test_energy_is_held_against_power(found, verdict):
    assert power.judge_energy(found).verdict == verdict


def test_power_before_the_window_is_no_part_of_it():
    assert power.mean_power_w(telemetry()) == pytest.approx(300.0)


def test_unresolvable_energy_and_a_dear_sampler_fail():
    assert power.judge_resolution(telemetry()).verdict == "PASS"
    line = power.judge_resolution(telemetry(resolvable=False))
    assert (line.verdict, line.reason) == ("FAIL", "3 updates are too few")
    assert power.judge_sampler(telemetry()).verdict == "PASS"
    assert power.judge_sampler(telemetry(cpu_ns=200_000_000)).verdict == "FAIL"
    assert power.judge_sampler(telemetry(cpu_ns=None)).verdict == "FAIL"


def result(*measurements):
    return Result(
        created="2026-01-01T00:00:00Z", plan=Plan(), environment=environment(), measurements=list(measurements)
    )


def measured(kind="ok", settings=None, *, phase=None, evidence=None, **captured):
    case = Case(key="0" * 12, settings=settings or Settings())
    outcome = Outcome(kind=kind, phase=phase, evidence=evidence or {})
    return Measurement(case=case, outcome=outcome, wall_s=1.0, **captured)


EVIDENCE = {"asked_bytes": 2**40, "allocated_bytes": 2**30, "reserved_bytes": 2**31, "library": "torch"}


@pytest.mark.parametrize(
    ("large", "small", "wrong"),
    [
        (measured("oom", phase="forward", evidence=EVIDENCE), measured(), []),
        (measured("crash", phase="forward", evidence=EVIDENCE), measured(), ["a batch too large"]),
        (measured("oom", evidence=EVIDENCE), measured(), ["its evidence"]),
        (measured("oom", phase="forward", evidence={**EVIDENCE, "library": None}), measured(), ["its evidence"]),
        (measured("oom", phase="forward", evidence=EVIDENCE), measured("oom"), ["the case after it"]),
    ],
)
def test_a_failure_is_held_against_what_was_asked_of_it(large, small, wrong):
    assert failed(cases.judge_oom(result(large, small))) == wrong


def test_what_is_left_on_the_device_fails():
    before = (100 * 2**30, frozenset({10}))
    assert cases.judge_left(before, (100 * 2**30, frozenset({10}))).verdict == "PASS"
    assert cases.judge_left(before, (99 * 2**30, frozenset({10}))).verdict == "FAIL"
    assert cases.judge_left(before, (100 * 2**30, frozenset({10, 11}))).verdict == "FAIL"


def backends(benchmark, deterministic):
    return Backends(
        cudnn_enabled=True,
        cudnn_version=91900,
        cudnn_benchmark=benchmark,
        cudnn_deterministic=deterministic,
        cudnn_allow_tf32=True,
        matmul_allow_tf32=False,
        deterministic_algorithms="off",
        cublas_workspace_config=None,
        allocator_config=None,
    )


def grid(in_force=lambda benchmark, deterministic: (benchmark, deterministic), kind="ok"):
    both = [(a, b) for a in (False, True) for b in (False, True)]
    return [
        measured(
            kind if (a, b) == (True, True) else "ok",
            Settings(cudnn_benchmark=a, cudnn_deterministic=b),
            facts=Facts(device="cuda:0", threads=1, backends=backends(*in_force(a, b))),
        )
        for a, b in both
    ]


def test_switches_not_in_force_or_missing_fail():
    assert failed(cases.judge_cudnn(grid())) == []
    assert failed(cases.judge_cudnn(grid(lambda a, b: (a, a)))) == ["in force as asked"]
    assert failed(cases.judge_cudnn(grid(kind="nondeterministic"))) == ["four settings of cuDNN"]
    assert failed(cases.judge_cudnn(grid()[:3])) == ["four settings of cuDNN"]
    assert failed(cases.judge_cudnn([])) == ["four settings of cuDNN", "in force as asked"]


def test_one_bit_of_difference_fails():
    assert cases.judge_bits(["0x1.0p+0", "0x1.8p+0"], ["0x1.0p+0", "0x1.8p+0"]).verdict == "PASS"
    assert cases.judge_bits(["0x1.0p+0", "0x1.8p+0"], ["0x1.0p+0", "0x1.80001p+0"]).verdict == "FAIL"
    assert cases.judge_bits([], []).verdict == "FAIL"


def whole(**changes):
    """A case in which a device told everything."""
    steps = 10
    captured = {
        "samples": Samples(
            batch_size=32,
            step_ns=[10_000_000] * steps,
            host_ns={"data": [500_000] * steps, "forward": [9_500_000] * steps},
            device_step_ns=[10_000_000] * steps,
            device_ns={"data": [0] * steps, "forward": [10_000_000] * steps},
            blocks=[Block(kind="instrumented", steps=steps, wall_ns=100_000_000, device_wall_ns=100_100_000)],
        ),
        "serialised": Serialised(host_ns={"data": [1], "forward": [2]}),
        "memory": Memory(pool="device", allocated_peak=2**30),
        "telemetry": telemetry(),
        "profile": Profile(
            steps=5,
            wall_ns=60_000_000,
            phase_ns={"forward": 55_000_000},
            busy_ns={"data": 0, "forward": 48_000_000},
            busy_total_ns=48_000_000,
        ),
        "facts": Facts(device="cuda:0", clock="host and device", threads=1, backends=backends(False, False)),
    }
    return measured(**{**captured, **changes})


def test_a_sweep_in_which_all_is_captured_passes():
    assert failed(cases.judge_sweep([whole(), whole()], 2)) == []


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"kind": "crash"}, "cases"),
        ({"memory": None}, "memory captured"),
        ({"telemetry": None}, "telemetry captured"),
        ({"serialised": None}, "serialised captured"),
        ({"profile": None}, "profile captured"),
        ({"facts": Facts(device="cuda:0", threads=1)}, "clocks"),
    ],
)
def test_a_sweep_with_a_gap_fails(changes, wrong):
    assert wrong in failed(cases.judge_sweep([whole(), whole(**changes)], 2))


def test_a_trace_without_kernels_or_that_does_not_parse_fails():
    kernels = {"traceEvents": [{"cat": "kernel", "ph": "X"}, {"cat": "user_annotation", "ph": "X"}]}
    assert cases.judge_trace(json.dumps(kernels).encode()).verdict == "PASS"
    assert cases.judge_trace(json.dumps({"traceEvents": [{"cat": "cpu_op"}]}).encode()).verdict == "FAIL"
    assert cases.judge_trace(json.dumps(kernels).encode()[:-9]).verdict == "FAIL"
    assert cases.judge_trace(b"[]").verdict == "FAIL"


def profiled(total, **busy):
    profile = Profile(steps=5, wall_ns=60_000_000, phase_ns={}, busy_ns=busy, busy_total_ns=total)
    return result(whole(profile=profile))


def test_busy_time_that_does_not_add_up_or_belies_the_model_fails():
    busy = profiled(48_000_000, data=2_000_000, forward=46_000_000)
    assert "busy time of m's phases" not in failed(cases.judge_profile(busy, "m", launch_bound=False))
    assert "busy share of m" not in failed(cases.judge_profile(busy, "m", launch_bound=False))
    assert "busy share of m" in failed(cases.judge_profile(busy, "m", launch_bound=True))
    found = cases.judge_profile(busy, "m", launch_bound=False)
    assert failed(found) == []
    assert "bsprof's verdict on m" in failed(cases.judge_profile(busy, "m", launch_bound=True))
    idle = profiled(10_000_000, data=0, forward=10_000_000)
    assert failed(cases.judge_profile(idle, "m", launch_bound=True)) == []
    assert "bsprof's verdict on m" in failed(cases.judge_profile(idle, "m", launch_bound=False))
    twice = profiled(48_000_000, forward=48_000_000, backward=48_000_000)
    assert "busy time of m's phases" in failed(cases.judge_profile(twice, "m", launch_bound=False))
    nothing = result(whole(profile=Profile(steps=5, wall_ns=1, phase_ns={}), notes=(Note(code="x", text="no CUPTI"),)))
    (line,) = cases.judge_profile(nothing, "m", launch_bound=False)
    assert line.verdict == "FAIL"
    assert "no CUPTI" in line.reason


def test_memory_off_the_line_fails():
    def peaks(*peaks):
        return [
            measured(settings=Settings(batch_size=32 * (i + 1)), memory=Memory(pool="device", allocated_peak=peak))
            for i, peak in enumerate(peaks)
        ]

    assert cases.judge_line(peaks(1100, 2100, 3100, 4100)).verdict == "PASS"
    assert cases.judge_line(peaks(1100, 2100, 4400, 4100)).verdict == "FAIL"
    assert cases.judge_line(peaks(4100, 3100, 2100, 1100)).verdict == "FAIL"
    assert cases.judge_line(peaks(1100, 2100)).verdict == "FAIL"


@pytest.mark.parametrize(
    ("batch", "tried", "wrong"),
    [
        (13, {"8": "ok", "13": "ok", "14": "oom"}, []),
        (13, {"8": "ok", "13": "ok", "16": "oom"}, ["the next larger batch"]),
        (13, {"8": "ok", "13": "ok"}, ["the next larger batch"]),
        (13, {"8": "ok", "13": "oom", "14": "oom"}, ["the largest batch"]),
        (None, {"1": "oom"}, ["the largest batch"]),
        (640, {"640": "ok", "650": "oom"}, []),
    ],
)
def test_a_largest_batch_that_is_not_the_largest_fails(batch, tried, wrong):
    found = LargestBatch(settings=Settings(), batch_size=batch, margin=0.05, steps=50, tried=tried)
    assert failed(cases.judge_largest([found])) == wrong


def test_rates_outside_what_a_vendor_makes_possible_fail():
    figures = vendor.FIGURES["NVIDIA H200"]

    def rates(share):
        return {name: {"value": share * most} for name, most in figures.rates.items()}

    assert failed(vendor.judge_rates(rates(0.75), figures)) == []
    assert set(failed(vendor.judge_rates(rates(0.4), figures))) == set(figures.rates)
    assert set(failed(vendor.judge_rates(rates(1.1), figures))) == set(figures.rates)
    assert failed(vendor.judge_rates({}, figures)) == list(figures.rates)
    nested = {"environment": {"host": "x"}, "ceilings": {"rates": rates(0.75)}}
    assert vendor.find_rates(nested) == rates(0.75)
    assert vendor.find_rates({"environment": {}}) is None


def test_a_size_that_was_not_reduced_or_another_backend_fails():
    extent = Extent(all_reduce_bytes=(1024, 4096))

    def reduced(*sizes, backend="nccl"):
        return Found(
            found=[AllReduce(backend=backend, world_size=1, bytes=size, seconds=1e-5) for size in sizes],
            left_out={size: "CUDA out of memory" for size in extent.all_reduce_bytes if size not in sizes},
        )

    assert failed(exchange.judge_sizes(reduced(1024, 4096), extent, "nccl")) == []
    (line,) = (one for one in exchange.judge_sizes(reduced(1024), extent, "nccl") if one.verdict == "FAIL")
    assert line.reason == "CUDA out of memory"
    gloo = reduced(1024, 4096, backend="gloo")
    assert failed(exchange.judge_sizes(gloo, extent, "nccl")) == ["by the device's own backend"]


def test_a_rank_whose_marks_buckets_or_clocks_are_wrong_fails():
    both = world(2)
    facts = replace(both.facts, parameters=sum(BUCKETS) // 4)
    (rank, _) = both.ranks
    spans = rank.samples.host_ns
    device = replace(rank.samples, device_ns=spans)
    blocks = [replace(block, device_wall_ns=block.wall_ns) for block in rank.blocks]
    nccl = replace(both.communication, backend="nccl")

    def verdicts(*, communication=nccl, facts=facts, on_device=True, **changed):
        mine = replace(rank, **{"samples": device, "blocks": blocks, **changed})
        alone = replace(both, ranks=(mine,), facts=facts, communication=communication)
        return failed(exchange.judge_rank(alone, on_device=on_device))

    late = [whole + 1 for whole in spans["backward"]]
    assert verdicts() == []
    assert verdicts(communication=both.communication, samples=rank.samples, blocks=rank.blocks, on_device=False) == []
    assert verdicts(communication=both.communication) == ["by the device's own backend"]
    assert verdicts(communication=None) == ["what is exchanged"]
    assert verdicts(facts=replace(facts, parameters=1)) == ["its buckets hold all gradients"]
    marks = ["a mark inside each backward, before the first all-reduce"]
    for wrong in (None, late, [0] * len(late), rank.before_reduce_ns[1:]):
        assert verdicts(before_reduce_ns=wrong) == marks
    assert verdicts(samples=rank.samples) == marks
    assert verdicts(samples=None) == marks
    for wrong in (rank.blocks, blocks[1:], []):
        assert verdicts(blocks=wrong) == ["blocks with and without an exchange"]
    lost = replace(both, outcome=Outcome(kind="crash", message="rank 0: killed by SIGKILL"))
    assert failed(exchange.judge_rank(lost, on_device=True)) == ["a rank trains under DDP"]
