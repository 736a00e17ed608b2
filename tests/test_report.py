import io
import re
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from synthetic import GOLDEN, cuda_result

from bsprof import store
from bsprof.metrics import summarise
from bsprof.model import (
    AXES,
    PHASES,
    Accelerator,
    Block,
    Case,
    Check,
    Counters,
    Environment,
    Facts,
    Hotspot,
    Measurement,
    Memory,
    Outcome,
    OutcomeKind,
    Plan,
    Profile,
    Result,
    Samples,
    Settings,
    Startup,
    case_key,
)
from bsprof.noun import Note
from bsprof.report import figures
from bsprof.report.progress import Progress
from bsprof.report.terminal import render, render_cases, render_catalogue, render_environment, render_selftest
from bsprof.report.words import summary

OK = Outcome(kind="ok")
OOM = Outcome(
    kind="oom",
    message="CUDA out of memory in backward: 2.1 GiB asked for, 78.9 GiB of 80.0 GiB allocated",
    hint="a smaller --batch-size, or --amp bf16",
    phase="backward",
)

ENVIRONMENT = Environment(
    host="lab",
    os="Debian 12",
    kernel="6.1",
    hypervisor=None,
    cpu="Some CPU @ 2.60GHz",
    cores_logical=4,
    cores_physical=2,
    cores_usable=2,
    cpu_quota=2.0,
    memory_bytes=8 << 30,
    memory_limit_bytes=4 << 30,
    shm_bytes=64 << 20,
    accelerators=(),
    driver=None,
    python="3.11.7",
    torch="2.15.0",
    torchvision="0.30.0",
    cuda=None,
    cudnn=None,
    numpy="2.4.6",
    libc="glibc 2.36",
    bsprof="0.1.0",
    git_commit="0123456789abcdef0123456789abcdef01234567+",
    variables={"OMP_NUM_THREADS": "2"},
)

GPU = Accelerator(name="NVIDIA H200", kind="cuda", index=0, memory_bytes=139 << 30, capability="9.0")

WEIGHTS = {"data": 0.2, "forward": 0.3, "backward": 0.4, "optimizer": 0.09}


def samples(
    rng, batch, mean_s, weights=WEIGHTS, *, steps=100, noise=0.05, distortion=0.001, device_data=None, **fields
):
    """Lognormal phases around their shares of `mean_s`, a little `other`, and alternating blocks."""
    host = {
        phase: (mean_s * 1e9 * weight * rng.lognormal(0, noise, steps)).astype(int) for phase, weight in weights.items()
    }
    step = sum(host.values()) + (mean_s * 1e9 * 0.002 * rng.lognormal(0, noise, steps)).astype(int)
    blocks = []
    for start in range(0, steps, 10):
        wall = int(step[start : start + 10].sum())
        bare = int(wall / (1 + distortion) * rng.lognormal(0, noise / 5))
        blocks += [Block(kind="instrumented", steps=10, wall_ns=wall), Block(kind="bare", steps=10, wall_ns=bare)]
    device = {}
    if device_data is not None:
        ns = {**host, "data": (host["data"] * device_data).astype(int)}
        total = step - host["data"] + ns["data"]
        device = {
            "device_step_ns": total.tolist(),
            "device_ns": {phase: list(map(int, values)) for phase, values in ns.items()},
        }
    counters = Counters(
        wall_ns=int(step.sum()),
        cpu_ns=int(step.sum()),
        minor_faults=20 * steps,
        major_faults=0,
        voluntary_switches=9,
        involuntary_switches=3,
    )
    return Samples(
        **{
            "batch_size": batch,
            "step_ns": step.tolist(),
            "host_ns": {phase: values.tolist() for phase, values in host.items()},
            "blocks": blocks,
            "warmup_ns": [int(step[0] * 3), *step[:21].tolist()],
            "recorder_ns_per_step": 2100,
            "counters": counters,
            **device,
            **fields,
        }
    )


def measurement(settings, taken=None, outcome=OK, process=0, device="cpu", **fields):
    """A measurement as a sweep on a CPU would leave it."""
    case = Case(key=case_key(settings), settings=settings, process=process)
    startup = Startup(
        process_ns=15_000_000,
        build_ns=240_000_000,
        iterator_ns=31_000_000,
        first_batch_ns=410_000_000,
        epoch_end_ns=[21_000_000],
        epoch_start_ns=[380_000_000],
    )
    facts = Facts(
        device=device, threads=2, parameters=3_504_872, image_size=96, samples_in_dataset=1000, malloc="pinned"
    )
    known = {"facts": facts, "startup": startup} if outcome.kind == "ok" else {}
    return Measurement(case=case, outcome=outcome, wall_s=9.8, inside_s=9.5, samples=taken, **{**known, **fields})


def settings(**axes):
    """Settings of a CPU, where axes of an accelerator mean nothing, nor those of workers without any."""
    workers = axes.get("workers", 0)
    absent = {
        axis.name: None
        for axis in AXES.values()
        if axis.info.needs in ("accelerator", "cuda") or (axis.info.needs == "workers" and not workers)
    }
    return Settings(**{**absent, **axes})


def result(measurements, plan=None, environment=ENVIRONMENT, **fields):
    return Result(
        created="2031-01-01T00:00:00Z",
        plan=plan or Plan(),
        environment=environment,
        measurements=measurements,
        **fields,
    )


@pytest.fixture(scope="module")
def sweep():
    """9 cases of batch x workers, measured in another order; the largest ran out of memory."""
    rng = np.random.default_rng(0)
    measurements = []
    for batch in (128, 32, 64):
        for workers in (1, 0, 2):
            weights = {**WEIGHTS, "data": (0.35, 0.08, 0.02)[workers]}
            mean = 0.004 * batch + 0.020
            chosen = settings(batch_size=batch, workers=workers)
            if (batch, workers) == (128, 2):
                measurements.append(measurement(chosen, outcome=OOM))
                continue
            noted = (Note(code="no_steady_state", text="the step time was not steady when warm-up ended"),)
            is_steady = (batch, workers) != (32, 1)
            taken = samples(rng, batch, mean, weights, steady=is_steady)
            measurements.append(measurement(chosen, taken, notes=() if is_steady else noted))
    return result(measurements)


def text_of(what, width=100, renderer=render, **options):
    stream = io.StringIO()
    renderer(what, Console(file=stream, width=width, **options))
    return stream.getvalue()


def flat(text):
    """Text as one line, wherever it was wrapped."""
    return " ".join(text.split())


def gpu_result():
    """Two processes a case on a device with a clock of its own, where most of the wait is hidden."""
    rng = np.random.default_rng(1)
    weights = {"data": 0.4, "h2d": 0.01, "forward": 0.2, "backward": 0.3, "optimizer": 0.08}
    measurements = [
        measurement(
            Settings(batch_size=batch, workers=8),
            samples(rng, batch, (0.0004 * batch + 0.002) * rng.lognormal(0, 0.01), weights, device_data=0.1),
            process=process,
            device="cuda",
        )
        for batch in (128, 64, 256)
        for process in (0, 1, 2)
    ]
    environment = msgspec.structs.replace(ENVIRONMENT, accelerators=(GPU,), cuda="13.2", cudnn="9.26", driver="580.1")
    return result(measurements, plan=Plan(repeat=3), environment=environment)


def own_loop(**fields):
    """What a Recorder in a user's own loop leaves: no plan, no settings, phases of its own."""
    rng = np.random.default_rng(2)
    taken = samples(rng, 16, 0.0009, {"data": 0.1, "forward": 0.5, "clip": 0.3}, blocks=[], warmup_ns=[], **fields)
    one = Measurement(case=Case(key="train.py"), outcome=OK, wall_s=3.0, samples=taken)
    return Result(created="2031-01-01T00:00:00Z", plan=None, environment=ENVIRONMENT, measurements=[one])


# --- the tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_line_fits_the_terminal(sweep, width):
    for one in (sweep, gpu_result(), own_loop()):
        lines = text_of(one, width).splitlines()
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)


def test_numbers_stand_under_each_other(sweep):
    lines = text_of(sweep).partition("step: median")[0].splitlines()
    (header,) = (line for line in lines if "forward" in line and "workers" in line)
    rows = [line for line in lines if re.match(r"\s+(32|64|128)\s+[012]\s.*%", line)]
    assert len(rows) == 8
    assert len({row.index("%") for row in rows}) == 1
    assert {len(row) for row in rows} == {len(header)}


def test_times_stand_beside_shares_at_100_columns_and_give_way_at_80(sweep):
    assert re.search(r"52\.2 31%", text_of(sweep, 100))
    narrow = text_of(sweep, 80)
    assert " 31%" in narrow and "52.2 31%" not in narrow
    assert "where a step goes" in text_of(sweep, 140)


def test_rows_are_ordered_by_settings_not_as_measured(sweep):
    rows = re.findall(r"^ +(\d+) +(\d)  .*(?:img/s|%|oom)", text_of(sweep), re.M)[:9]
    assert rows == [(str(batch), str(workers)) for batch in (32, 64, 128) for workers in (0, 1, 2)]


def test_only_axes_that_vary_are_columns_and_others_are_in_the_caption(sweep):
    caption, header = text_of(sweep, 140).splitlines()[0], text_of(sweep, 140).splitlines()[2]
    assert header.split()[:2] == ["batch", "workers"]
    assert "prefetch" not in header  # null at 0 workers and 2 elsewhere: it does not vary
    assert "mobilenet_v2 on jpeg" in caption and "2 threads" in caption and "malloc pinned" in caption


def test_a_failed_case_is_a_row_with_its_outcome_message_and_hint(sweep):
    text = text_of(sweep, 140)
    assert re.search(r"128 +2 +oom +CUDA out of memory in backward: 2.1 GiB asked for", text)
    assert "oom hint: a smaller --batch-size" in text


def test_no_message_is_cut_on_a_narrow_terminal(sweep):
    assert "78.9 GiB of 80.0 GiB allocated" in flat(text_of(sweep, 80))


def test_notes_are_marked_in_the_row_and_explained_beneath(sweep):
    text = text_of(sweep)
    assert re.search(r"^ +32 +1 .*ᵃ", text, re.M)
    assert "ᵃ the step time was not steady" in text
    assert text.count("ᵃ") == 2


def test_piped_output_has_no_escape_codes_and_a_terminal_has_colour(sweep, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" not in text_of(sweep)
    assert "\x1b[" in text_of(sweep, force_terminal=True)


def test_no_color_is_honoured(sweep, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert not re.search(r"\x1b\[[\d;]*3\d", text_of(sweep, force_terminal=True))


def test_what_was_not_captured_is_a_dash_or_no_column_and_never_zero():
    rng = np.random.default_rng(3)
    with_blocks = measurement(settings(batch_size=8), samples(rng, 8, 0.01))
    without = measurement(settings(batch_size=16), samples(rng, 16, 0.01, blocks=[], counters=None))
    text = text_of(result([with_blocks, without]))
    assert re.search(rf"^ +16 +.*{figures.MISSING}$", text, re.M)
    assert "distortion" not in text_of(result([without]))
    assert "faults" not in text_of(result([without]))


def test_a_phase_that_takes_no_time_gets_words_instead_of_a_column():
    rng = np.random.default_rng(4)
    taken = samples(rng, 8, 0.01, {**WEIGHTS, "h2d": 0.00005})
    text = flat(text_of(result([measurement(settings(batch_size=8), taken)])))
    assert "h2d: under 0.05% in every case" in text


def test_processes_of_a_case_are_one_row_with_the_spread_between_them():
    text = text_of(gpu_result(), 100)
    assert len(re.findall(r"^ +64 ", text, re.M)) == 2  # one in each of the two tables
    assert "spread" in text and "between processes" in text
    assert "hidden ms" in text and "data is the stall" in flat(text)


def test_a_case_whose_second_process_died_keeps_its_numbers_and_says_so():
    rng = np.random.default_rng(5)
    chosen = settings(batch_size=8)
    crash = Outcome(kind="crash", message="killed by SIGKILL")
    text = text_of(
        result([measurement(chosen, samples(rng, 8, 0.01)), measurement(chosen, outcome=crash, process=1)]), 140
    )
    assert re.search(r"img/s", text) and re.search(r"crash in 1 of 2 processes +killed by SIGKILL", text)


@pytest.mark.parametrize("kind", typing.get_args(OutcomeKind))
def test_a_result_of_nothing_but_one_outcome_is_printed(kind):
    text = text_of(result([measurement(settings(), outcome=Outcome(kind=kind, message="why"))]))
    assert "mobilenet_v2" in text
    assert kind == "ok" or re.search(rf"{kind} +why", text)


def test_an_empty_result_is_printed():
    assert "Nothing was measured" in text_of(result([]))


def test_many_axes_and_odd_names_do_not_break_the_table():
    rng = np.random.default_rng(6)
    measurements = [
        measurement(settings(model=model, batch_size=8, amp=amp, channels_last=nhwc), samples(rng, 8, 0.01))
        for model in ("my.package:factory[bold]", "resnet20")
        for amp in ("off", "bf16")
        for nhwc in (False, True)
    ]
    text = text_of(result(measurements), 100)
    assert "my.package:factory[bold]" in text
    assert max(map(len, text.splitlines())) <= 100


def test_environment_prints_every_field():
    text = text_of(ENVIRONMENT, renderer=render_environment)
    for field in msgspec.structs.fields(Environment):
        assert field.name.removesuffix("_bytes").replace("_", " ") in text
    assert "8.0 GiB" in text and "OMP_NUM_THREADS=2" in text


def test_cases_are_listed_with_their_settings_and_the_expected_time(sweep):
    cases = [one.case for one in sweep.measurements]
    stream = io.StringIO()
    render_cases(cases, "1 min 40 s", Console(file=stream, width=100))
    text = stream.getvalue()
    assert "9 cases, expected to take 1 min 40 s" in text
    rows = re.findall(r"^ +(\d) +(\d+) +(\d)$", text, re.M)
    assert rows == [
        (str(i + 1), str(one.settings.batch_size), str(one.settings.workers)) for i, one in enumerate(cases)
    ]


def test_catalogue_is_grouped_by_kind():
    entries = [("model", "resnet20", "CIFAR form"), ("model", "vgg19_bn", "CIFAR form"), ("data", "jpeg", "files")]
    text = text_of(entries, renderer=render_catalogue)
    assert re.search(r"^model\n  resnet20 +CIFAR form\n  vgg19_bn +CIFAR form\n\ndata\n  jpeg", text)


# --- what the device did ----------------------------------------------------------------------------------


def profiled_on_cpu():
    """A case with a profile of operators, as a CPU gives it, and nothing else beside its steps."""
    profile = Profile(
        steps=5,
        wall_ns=1,
        phase_ns={},
        operators_ns=400_000_000,
        operators=(Hotspot(name="aten::mkldnn_convolution", calls=10, ns=100_000_000),),
    )
    taken = samples(np.random.default_rng(13), 8, 0.1)
    return result([measurement(settings(batch_size=8), taken, profile=profile)])


def changed(one, index=None, **fields):
    """A result with fields of its measurements replaced: of one of them, or of all."""
    measurements = [
        msgspec.structs.replace(measured, **fields) if index in (None, place) else measured
        for place, measured in enumerate(one.measurements)
    ]
    return msgspec.structs.replace(one, measurements=measurements)


def device_block(one, width=200):
    text = text_of(one, width)
    return text[text.index("What the device did") :]


def test_the_golden_cuda_result_is_what_its_generator_makes_and_says_that_it_is_made_up():
    golden = store.load(GOLDEN)
    assert golden == cuda_result()
    assert "synthetic" in golden.environment.host and "never measured" in golden.environment.host


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
def test_the_devices_tables_fit_and_lose_no_column(width):
    text = text_of(cuda_result(), width)
    assert max(map(len, text.splitlines())) <= width
    for header in (
        "busy",
        "launch-bound",
        "launches",
        "overlap ms",
        "peak GiB",
        "reserved GiB",
        "frag",
        "power W",
        "SM MHz",
        "J/step",
        "mJ/sample",
        "MFU",
        "ceiling",
        "host ms",
        "alone ms",
        "has paid after",
    ):
        assert re.search(rf"(^|  ){re.escape(header)}(  |$)", text, re.M), header


def test_each_case_shows_how_busy_it_was_and_where_it_waited_for_launches():
    block = device_block(cuda_result())
    assert re.search(r"^ +32 +off +28% +step +930 ", block, re.M)
    assert re.search(r"^ +256 +on +91% +optimizer +910 .* 28% compute$", block, re.M)
    assert re.search(r"^ +optimizer .* 25% +launch-bound", block, re.M)


def test_energy_that_cannot_be_resolved_is_a_dash_with_its_reason():
    block = device_block(cuda_result())
    assert re.search(rf"^ +64 +on .* {figures.MISSING} +{figures.MISSING} ", block, re.M)
    assert "no energy: 4 updates of the energy counter in the timed window; 10 are needed" in block


def test_the_fastest_cases_kernels_and_copies_are_shown_with_their_rates():
    block = device_block(cuda_result())
    assert "Costliest kernels of batch 256, bench on" in block
    assert re.search(r"^ +31% +4\.44 +52 +sm90_xmma_fprop", block, re.M)
    assert "HtoD pinned 768 µs a step at 48.0 GB/s, 96% of the rate measured here · DtoD" in block


def test_two_cases_both_show_their_phases():
    both = msgspec.structs.replace(cuda_result(), measurements=cuda_result().measurements[:2])
    assert re.findall(r"^Phases of (.*)$", text_of(both), re.M) == ["bench off", "bench on"]


def test_the_search_is_told_with_its_pay_back():
    block = device_block(cuda_result())
    assert re.search(r"^ +32 .* never: no sure gain$", block, re.M)
    assert re.search(r"^ +256 +18.14 +16.64 +1.50 ms +1.75 s +\d+ steps$", block, re.M)


def test_memory_of_a_larger_batch_is_estimated_with_its_interval():
    block = flat(device_block(cuda_result()))
    assert re.search(
        r"bench on: 38\.\d MiB a sample; batch 512 would take 19\.\d GiB \(.*? to .*?\); 79.0 GiB would hold", block
    )


def test_switches_that_were_not_in_force_are_told_and_so_are_those_that_were():
    whole = cuda_result()
    assert "--cudnn-benchmark: in force as asked, read back in all 8 cases" in device_block(whole)
    facts = whole.measurements[0].facts
    ignored = msgspec.structs.replace(facts, backends=msgspec.structs.replace(facts.backends, cudnn_benchmark=True))
    block = device_block(changed(whole, 0, facts=ignored))
    assert "! --cudnn-benchmark: asked off, in force on (batch 32, bench off)" in block
    assert "in force as asked" not in block


@pytest.mark.parametrize(
    ("field", "absent"),
    [
        ("profile", ["busy", "launches", "launch-bound", "Costliest", "copies:"]),
        ("memory", ["peak", "reserved", "frag", "Memory by batch size"]),
        ("telemetry", ["power W", "SM MHz", "J/step", "no energy"]),
        ("serialised", ["overlap", "alone"]),
    ],
)
def test_what_was_not_captured_has_no_column(field, absent):
    block = device_block(changed(cuda_result(), **{field: None}))
    tables = block[: block.index("synthetic CPU")]
    assert [word for word in absent if word in tables] == []


def test_a_device_of_which_nothing_was_captured_has_no_block_at_all():
    bare = changed(cuda_result(), profile=None, memory=None, telemetry=None, serialised=None)
    text = text_of(msgspec.structs.replace(bare, ceilings=None))
    assert "What the device did" not in text and not re.search("^Phases", text, re.M)


def test_a_cpu_shows_the_shares_of_operators_and_nothing_of_a_device(sweep):
    text = text_of(profiled_on_cpu())
    assert re.search(r"^ +25% +20\.0 +2 +aten::mkldnn_convolution$", text, re.M)
    assert not re.search("^(What the|Phases)", text, re.M)
    assert not any(word in text for word in ("busy", "launch", "copies"))
    assert "Costliest" not in text_of(sweep)


def test_a_ceiling_of_zero_divides_nothing():
    whole = cuda_result()
    rates = {name: msgspec.structs.replace(rate, value=0.0) for name, rate in whole.ceilings.rates.items()}
    text = text_of(msgspec.structs.replace(whole, ceilings=msgspec.structs.replace(whole.ceilings, rates=rates)))
    assert "HtoD pinned 768 µs a step at 48.0 GB/s · DtoD" in text


def test_it_is_said_where_the_trace_is(sweep):
    kept = "/a folder/of a long name that no terminal is wide enough for/" + 100 * "x" + "/trace.json"
    profile = profiled_on_cpu().measurements[0].profile
    text = text_of(changed(profiled_on_cpu(), 0, profile=msgspec.structs.replace(profile, trace=kept)))
    assert f"  trace: {kept}\n" in text
    assert "trace:" not in text_of(profiled_on_cpu())


def test_memory_of_a_cpu_is_called_resident():
    rng = np.random.default_rng(14)
    held = Memory(pool="host", allocated_peak=3 << 30)
    text = text_of(result([measurement(settings(batch_size=8), samples(rng, 8, 0.01), memory=held)]))
    assert "What the machine did" in text and "most memory resident" in text and "3.00" in text


def test_the_names_of_kernels_cannot_steer_a_terminal():
    whole = cuda_result()
    profile = whole.measurements[7].profile
    odd = msgspec.structs.replace(profile, kernels=(Hotspot(name="evil\x1b[2Jkernel", calls=1, ns=1000),))
    text = text_of(changed(whole, profile=odd))
    assert "\x1b" not in text and "kernel" in text


# --- words ----------------------------------------------------------------------------------------------


def told(one):
    return "\n".join(summary(one))


def test_words_name_the_fastest_case_what_bounds_it_and_what_the_loader_costs(sweep):
    text = told(sweep)
    assert "Fastest: batch 64, workers 2 with 286 img/s" in text
    assert "bound by backward: 50% of the step" in text
    assert "Loading in the main process makes the step wait 96.6 ms (31%)" in text
    assert "1 of 9 cases failed: oom (batch 128, workers 2)" in text


@pytest.mark.parametrize(("share", "words"), [(0.3, "highly input-bound"), (0.1, "moderately"), (0.02, "bound by")])
def test_words_use_the_analyzers_thresholds(share, words):
    taken = samples(np.random.default_rng(7), 8, 0.01, {**WEIGHTS, "data": share})
    assert words in told(result([measurement(settings(batch_size=8), taken)]))


def test_words_do_not_rank_cases_whose_intervals_overlap():
    measurements = [
        measurement(settings(batch_size=8, threads=threads), samples(np.random.default_rng(threads), 8, 0.01))
        for threads in (1, 2)
    ]
    assert "not distinguishable from threads" in told(result(measurements))


def test_words_claim_nothing_of_too_few_steps():
    measurements = [
        measurement(settings(batch_size=8, threads=threads), samples(np.random.default_rng(1), 8, mean, steps=3))
        for threads, mean in ((1, 0.01), (2, 0.05))
    ]
    text = told(result(measurements))
    assert "too few steps for an interval and so for any comparison" in text
    assert "clear of" not in text
    assert "`--repeat 3`: 2 cases of 2 did not reach the precision" in text


def test_words_say_when_a_worker_cuts_the_wait_and_lengthens_the_step():
    rng = np.random.default_rng(8)
    measurements = [
        measurement(settings(batch_size=8, workers=workers), samples(rng, 8, mean, {**WEIGHTS, "data": share}))
        for workers, mean, share in ((0, 0.010, 0.2), (1, 0.014, 0.01))
    ]
    assert re.search(
        r"from 0 workers to 1 worker cut the wait by \S+ ms but lengthened the step", told(result(measurements))
    )


def test_words_advise_a_larger_batch_only_while_throughput_grows():
    def sweep_of(base):
        rng = np.random.default_rng(9)
        return result(
            [measurement(settings(batch_size=b), samples(rng, b, base + 0.001 * b, noise=0.01)) for b in (16, 32)]
        )

    assert "`--batch-size 64`" in told(sweep_of(0.05))
    assert "--batch-size" not in told(sweep_of(0.0))


def test_words_advise_workers_only_where_cores_are_free():
    taken = samples(np.random.default_rng(10), 8, 0.01, {**WEIGHTS, "data": 0.4})
    one = [measurement(settings(batch_size=8), taken)]
    many_cores = msgspec.structs.replace(ENVIRONMENT, cores_usable=8)
    assert "`--workers 6`" in told(result(one, environment=many_cores))
    assert "--workers" not in told(result(one))


def test_words_name_page_faults_that_pinned_malloc_would_cure():
    counters = Counters(
        wall_ns=1, cpu_ns=1, minor_faults=400_000, major_faults=0, voluntary_switches=0, involuntary_switches=0
    )
    taken = samples(np.random.default_rng(11), 8, 0.01, counters=counters)
    facts = Facts(device="cpu", threads=2, parameters=1, malloc="default")
    text = told(result([measurement(settings(), taken, facts=facts)]))
    assert "`--malloc pinned`: 2000 minor page faults a step" in text and "MALLOC_TRIM_THRESHOLD_" in text


def test_words_give_the_distortion_with_its_interval_and_do_not_claim_what_it_does_not_show():
    bent = samples(np.random.default_rng(12), 8, 0.01, distortion=0.2)
    straight = samples(np.random.default_rng(12), 8, 0.01, distortion=0.0)
    assert re.search(r"differ from bare ones by \+(19|20)% \[\+", told(result([measurement(settings(), bent)])))
    assert "not distinguishable" in told(result([measurement(settings(), straight)]))


def test_words_of_a_device_say_how_much_of_the_wait_is_hidden():
    text = told(gpu_result())
    assert "moderately input-bound" in text and "hidden behind the device's queue" in text
    assert "between 3 processes" in text


def test_words_say_that_the_fastest_case_waits_for_launches_and_what_would_help():
    small = msgspec.structs.replace(cuda_result(), measurements=cuda_result().measurements[:1])
    text = told(small)
    assert "It is launch-bound: kernels run for 27% of the time that the computing phases take" in text
    assert "`--batch-size 64` (the same launches would do twice the work)" in text and "`--compile on`" in text
    assert "CUDA graphs" in text and "bound by backward" not in text


def test_words_of_a_busy_device_name_its_ceiling_its_energy_and_what_computes_faster():
    text = told(cuda_result())
    assert "It is bound by backward" in text and "Launch-bound in part" in text and "optimizer (busy for 25%)" in text
    assert "Nearest of the ceilings measured is compute (matrix tf32), which asks for 28% of the step at least." in text
    assert "It takes 6.75 J a step, 26.4 mJ a sample" in text and "the least a sample is 21.8 mJ, in batch 128" in text
    assert "`--amp bf16`" in text and "`--channels-last on`" in text and "`--compile on`" not in text


def test_words_say_what_telemetry_itself_cost():
    assert "telemetry takes 0.53% of one core at most" in told(cuda_result())


def test_words_do_not_advise_what_was_tried():
    whole = cuda_result()
    last = whole.measurements[7]
    tried = msgspec.structs.replace(last.case.settings, amp="bf16")
    case = Case(key=case_key(tried), settings=tried)
    failed = Measurement(case=case, outcome=OOM, wall_s=1.0)
    assert "--amp bf16" not in told(msgspec.structs.replace(whole, measurements=[last, failed])).replace(
        OOM.hint or "", ""
    )


def test_words_say_when_clocks_were_held_back():
    note = Note(code="gpu_throttled_power", text="the power limit held clocks back in 40% of the samples")
    text = told(changed(cuda_result(), 7, notes=(note,)))
    assert "held back by its power limit in 1 of 8 cases (batch 256, bench on)" in text


def test_words_call_a_step_that_mostly_copies_bound_by_copying():
    weights = {"data": 0.01, "h2d": 0.6, "forward": 0.2, "backward": 0.1, "optimizer": 0.05}
    taken = samples(np.random.default_rng(15), 64, 0.01, weights, device_data=1.0)
    one = result([measurement(Settings(batch_size=64, pin_memory=False), taken, device="cuda:0")])
    text = told(one)
    assert "bound by copying batches to the device: 6" in text and "`--pin-memory on`" in text


def test_words_of_a_users_own_loop_and_of_no_samples():
    assert told(own_loop()).startswith("train.py: 19796 samples/s")
    assert told(own_loop(batch_size=None)).startswith("train.py: 808 µs a step")
    assert told(result([measurement(settings())])) == "No steps were recorded."
    failing = [measurement(settings(batch_size=b), outcome=OOM) for b in (8, 16)]
    assert told(result(failing)).startswith("All 2 cases failed: oom (batch 8; batch 16): CUDA out of memory")


# --- progress -------------------------------------------------------------------------------------------


def drive(sweep, console):
    cases = [one.case for one in sweep.measurements]
    with Progress(console, len(cases), ["batch_size", "workers"], 90.0, target=0.02) as progress:
        for one in sweep.measurements:
            progress.started(one.case)
            for steps in range(40):
                progress.advanced(one.case, "measure", steps, 0.031)
            progress.tick()
            progress.finished(one)
        progress.note("interrupted")


def test_progress_that_is_piped_is_one_plain_line_a_case(sweep):
    stream = io.StringIO()
    drive(sweep, Console(file=stream, width=60))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10 and "\x1b" not in stream.getvalue()
    assert re.fullmatch(r"\[1/9\] batch 128, workers 1: 462 ms ±0\.\d+%, 277 samples/s in 100 steps, 10 s", lines[0])
    assert lines[2].startswith("[3/9] batch 128, workers 2: oom: CUDA out of memory")
    assert lines[-1] == "interrupted"


def test_progress_on_a_terminal_shows_the_case_the_precision_and_the_time_left(sweep, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bsprof.report.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None)
    cases = [one.case for one in sweep.measurements]
    with Progress(console, len(cases), ["batch_size", "workers"], 90.0, target=0.02) as progress:
        progress.started(cases[0])
        now[0] = 4.0
        before = len(stream.getvalue())
        progress.advanced(cases[0], "measure", 46, 0.031)
        drawn = stream.getvalue()[before:]
        assert "batch 128, workers 1" in drawn and "46 steps" in drawn and "±3.1% of ±2.0% asked" in drawn
        assert "0/9 cases" in drawn and "0:04 elapsed, about 1:26 left" in drawn
        now[0] = 4.5
        before = len(stream.getvalue())
        progress.advanced(cases[0], "measure", 50, 0.030)
        progress.tick()
        assert len(stream.getvalue()) == before  # at most one drawing a second
        now[0] = 10.0
        progress.finished(sweep.measurements[0])
        assert "462 ms" in stream.getvalue()[before:]


# --- what the house asks ----------------------------------------------------------------------------------


def test_report_loads_neither_torch_nor_scipy_stats():
    code = (
        "import sys, bsprof.report.terminal, bsprof.report.progress;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy.stats')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, figures.MISSING),
        (0.0, "0.00 µs"),
        (2.1e-6, "2.10 µs"),
        (0.0382, "38.2 ms"),
        (1.42, "1.42 s"),
        (125, "2 min 05 s"),
        (-0.0382, "-38.2 ms"),
    ],
)
def test_durations(seconds, text):
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(None, figures.MISSING), (0.0, "0%"), (1e-6, "<0.01%"), (0.0012, "0.12%"), (0.042, "4.2%"), (0.31, "31%")],
)
def test_percentages(share, text):
    assert figures.percent(share) == text


CONCEPTS = Path(__file__).parent.parent / "docs" / "concepts.md"


def test_concepts_name_every_axis_phase_outcome_and_column(sweep):
    text = CONCEPTS.read_text(encoding="utf-8")
    for name in AXES:
        assert f"| `--{name.replace('_', '-')}` |" in text
    for name in (*PHASES, *typing.get_args(OutcomeKind), "other"):
        assert f"| `{name}` |" in text
    results = (sweep, gpu_result(), cuda_result(), profiled_on_cpu())
    tables = [line for one in results for line in text_of(one, 200).splitlines() if line.strip()]
    headers = [tables[i - 1] for i, line in enumerate(tables) if set(line.strip()) == {"─"}]
    assert len(headers) == 4 + 6 + 3
    names = {header for line in headers for header in re.split(r" {2,}", line.strip())}
    columns = {re.sub(r" (ms|µs|s|GiB|MiB|KiB)$", "", name).replace("µs/step", "ms/step") for name in names}
    axes = {axis.info.column for axis in AXES.values()}
    for column in columns - axes - {*PHASES, "case", ""}:
        assert f"| {column} |" in text, column


def test_pictures_in_concepts_exist():
    pictures = re.findall(r"\]\((images/[^)]+\.svg)\)", CONCEPTS.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert (CONCEPTS.parent / picture).read_text(encoding="utf-8").startswith("<svg")


def test_summaries_are_shared_between_table_and_words(sweep):
    assert summary(sweep, summarise(sweep)) == summary(sweep)


def test_a_sweep_of_nothing_but_failures_shows_no_phases_of_any():
    whole = cuda_result()
    text = text_of(changed(whole, outcome=Outcome(kind="timeout", message="past its deadline")))
    assert "Phases of" not in text and "Costliest" not in text


def test_a_self_test_on_two_clocks_says_which():
    def check(clock, passed):
        return Check(
            phase="forward",
            clock=clock,
            planted_ns=5_000_000,
            found_ns=5_000_000,
            leaked_ns=0,
            leaked_into="data",
            residual_ns=0,
            tolerance_ns=100_000,
            passed=passed,
        )

    def printed(checks):
        console = Console(file=io.StringIO(), width=100)
        render_selftest(checks, console)
        return console.file.getvalue()

    assert "clock" not in printed([check("host", True)])
    both = printed([check("host", True), check("device", False)])
    assert re.search(r"^ +forward +host .* ok$", both, re.MULTILINE)
    assert re.search(r"^ +forward +device .* WRONG$", both, re.MULTILINE)
    assert "wrong in forward (device)" in both
