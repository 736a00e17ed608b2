"""Two results side by side: what may be compared, what has changed beyond doubt, and what a gate makes of it."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from machines import environment
from rich.console import Console

from bsprof import cli, stats, store
from bsprof.compare import CONDITIONS, MACHINE, compare
from bsprof.comparing import exit_code, read
from bsprof.errors import BsprofError, Exit
from bsprof.model import (
    Accelerator,
    Case,
    CaseGate,
    Counters,
    Facts,
    Gate,
    Measurement,
    Memory,
    Outcome,
    Plan,
    Result,
    Samples,
    Settings,
    case_key,
)
from bsprof.noun import Note
from bsprof.report import comparison as report

POSITIVE = st.floats(min_value=1e-3, max_value=1e3)
SIDES = st.integers(2, 8).flatmap(lambda n: st.tuples(*[st.lists(POSITIVE, min_size=n, max_size=n)] * 2))


# --- the statistics ---------------------------------------------------------------------------------


def test_the_interval_of_pairs_is_students_t_on_logs():
    base, new = np.array([1.0, 1.1, 0.9, 1.3]), np.array([1.2, 1.2, 1.1, 1.4])
    found = stats.change(new, base, paired=True)
    logs = np.log(new / base)
    low, high = scipy.stats.t.interval(0.95, 3, loc=logs.mean(), scale=scipy.stats.sem(logs))
    assert found.value == pytest.approx(math.exp(logs.mean()))
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    expected = scipy.stats.ttest_1samp(logs, math.log1p(0.02), alternative="greater").pvalue
    assert found.chance(0.02) == pytest.approx(expected)


def test_the_interval_of_two_sides_is_welchs():
    base, new = np.array([1.0, 1.1, 0.9, 1.3, 1.2]), np.array([1.2, 1.6, 1.1])
    found = stats.change(new, base, paired=False)
    judged = scipy.stats.ttest_ind(np.log(new), np.log(base), equal_var=False)
    interval = judged.confidence_interval(0.95)
    assert found.value == pytest.approx(math.exp(np.log(new).mean() - np.log(base).mean()))
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    assert 2 * found.chance(1e-12) == pytest.approx(judged.pvalue)


@given(SIDES, st.booleans(), st.floats(min_value=0.01, max_value=100))
def test_a_change_has_no_unit_and_turns_round(sides, paired, factor):
    new, base = map(np.array, sides)
    found = stats.change(new, base, paired=paired)
    scaled = stats.change(new * factor, base * factor, paired=paired)
    turned = stats.change(base, new, paired=paired)
    assert scaled.value == pytest.approx(found.value, rel=1e-6)
    assert scaled.error == pytest.approx(found.error, rel=1e-4, abs=1e-9)
    assert turned.value == pytest.approx(1 / found.value, rel=1e-6)
    assert turned.error == pytest.approx(found.error, rel=1e-4, abs=1e-9)


@given(SIDES, st.booleans(), st.randoms())
def test_the_order_of_processes_says_nothing(sides, paired, luck):
    new, base = sides
    pairs = list(zip(new, base, strict=True))
    luck.shuffle(pairs)
    mixed = stats.change([a for a, _ in pairs], [b for _, b in pairs], paired=paired)
    found = stats.change(new, base, paired=paired)
    assert mixed.value == pytest.approx(found.value, rel=1e-6)
    assert mixed.error == pytest.approx(found.error, rel=1e-4, abs=1e-9)


def test_a_side_without_scatter_has_no_interval_and_equal_values_have_a_narrow_one():
    lone = stats.change([1.0], [2.0], paired=False)
    assert lone.value == 0.5 and lone.low is None and lone.detectable(0.02) is None and lone.chance(0.02) == 1
    assert not lone.is_within(0.02)
    still = stats.change([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], paired=False)
    assert (still.low, still.value, still.high) == (1, 1, 1)
    assert still.is_within(0.02) and still.detectable(0.02) == pytest.approx(0.02)
    moved = stats.change([1.1, 1.1], [1.0, 1.0], paired=True)
    assert moved.chance(0.02) == 0 and moved.chance(0.2) == 1
    with pytest.raises(ValueError, match="3 and 2"):
        stats.change([1.0] * 3, [1.0] * 2, paired=True)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("spread", ["normal", "bimodal", "heavy tails"])
def test_intervals_hold_the_truth_as_often_as_they_say(paired, spread):
    luck = np.random.default_rng(1)
    draw = {
        "normal": lambda shape: luck.normal(0, 0.05, shape),
        "bimodal": lambda shape: np.where(luck.random(shape) < 0.5, -0.05, 0.05) + luck.normal(0, 0.01, shape),
        "heavy tails": lambda shape: 0.03 * luck.standard_t(5, shape),
    }[spread]
    covered = 0
    for _ in range(2000):
        shared = draw(10) if paired else 0.0
        found = stats.change(1.05 * np.exp(draw(10) + shared), np.exp(draw(10) + shared), paired=paired)
        covered += found.low <= 1.05 <= found.high
    assert 0.92 <= covered / 2000 <= 0.98


def test_what_is_called_detectable_is_found_as_often_as_that_says():
    luck = np.random.default_rng(2)
    typical = stats.Ratio(1.0, None, None, 0.05 / math.sqrt(12), 11.0).detectable(0.02)
    found = 0
    for _ in range(2000):
        logs = luck.normal(math.log1p(typical), 0.05, 12)
        found += stats.change(np.exp(logs), np.ones(12), paired=True).low > 1.02
    assert 0.74 <= found / 2000 <= 0.86


@pytest.mark.parametrize("scatter", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("effect", [0.03, 0.05, 0.2])
def test_as_many_pairs_as_needed_detect_the_effect_and_one_fewer_does_not(scatter, effect):
    def detectable(pairs):
        return stats.Ratio(1.0, None, None, scatter / math.sqrt(pairs), pairs - 1.0).detectable(0.02)

    pairs = stats.pairs_needed(scatter, effect, 0.02)
    assert detectable(pairs) <= effect
    assert pairs == 2 or detectable(pairs - 1) > effect
    with pytest.raises(ValueError, match="within the threshold"):
        stats.pairs_needed(scatter, 0.02, 0.02)


def test_holms_correction():
    assert stats.holm([]) == []
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(min_value=0, max_value=1), min_size=1, max_size=20))
def test_a_correction_lowers_no_chance_and_keeps_their_order(chances):
    adjusted = stats.holm(chances)
    assert all(1 >= after >= before for before, after in zip(chances, adjusted, strict=True))
    order = sorted(range(len(chances)), key=chances.__getitem__)
    assert all(adjusted[a] <= adjusted[b] for a, b in pairwise(order))


# --- made-up results --------------------------------------------------------------------------------


def process(step_s, rng, *, batch=8, number=0, data=0.2, steps=60, noise=0.03, memory=None, faults=10, **chosen):
    """Return one process of a case, its steps around `step_s`: a share is `data`, the rest `forward`."""
    times = (step_s * 1e9 * rng.lognormal(0, noise, steps)).astype(int)
    waited = (times * data).astype(int)
    settings = Settings(batch_size=batch, **chosen.pop("settings", {}))
    facts = Facts(**{"device": "cpu", "threads": 2, **chosen.pop("facts", {})})
    return Measurement(
        case=Case(key=case_key(settings), settings=settings, process=number),
        outcome=Outcome(kind="ok"),
        wall_s=1.0,
        facts=facts,
        samples=Samples(
            batch_size=batch,
            step_ns=times.tolist(),
            host_ns={"data": waited.tolist(), "forward": (times - waited).tolist()},
            counters=Counters(
                wall_ns=int(times.sum()),
                cpu_ns=int(times.sum()),
                minor_faults=faults * steps,
                major_faults=0,
                voluntary_switches=0,
                involuntary_switches=0,
            ),
        ),
        memory=None if memory is None else Memory(pool="host", allocated_peak=memory),
        **chosen,
    )


def side(step_s=0.01, *, batches=(8,), processes=6, seed=0, scatter=0.01, where=None, **chosen):
    """Return a result: each batch size in several processes whose medians scatter."""
    rng = np.random.default_rng(seed)
    measurements = [
        process(step_s * batch / 8 * rng.lognormal(0, scatter), rng, batch=batch, number=number, **chosen)
        for number in range(processes)
        for batch in batches
    ]
    return Result(
        created="2031-01-01T00:00:00Z",
        plan=Plan(),
        environment=where or environment(),
        measurements=measurements,
    )


def only(comparison):
    (case,) = comparison.cases
    return case


def text_of(comparison, width=140):
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    report.render(comparison, console)
    return console.file.getvalue()


# --- verdicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.1, "regressed"), (0.9, "improved"), (1.0, "unchanged"), (1.02, "inconclusive")]
)
def test_a_step_is_judged_by_its_interval(factor, verdict):
    found = compare(side(seed=1, scatter=0.003), side(0.01 * factor, seed=2, scatter=0.003), Gate())
    case = only(found)
    assert case.verdict == found.verdict == verdict
    (step,) = case.gated
    assert step.low < factor < step.high
    assert step.ratio == pytest.approx(step.new / step.base)
    assert step.detectable > 0.02
    assert (case.base_processes, case.new_processes) == (6, 6)


def test_where_it_changed_stands_in_the_phases():
    found = compare(side(seed=1, scatter=0.003), side(0.0125, seed=2, data=0.36, scatter=0.003), Gate())
    verdicts = {phase.label: phase.verdict for phase in only(found).phases}
    assert verdicts == {"data": "regressed", "forward": "unchanged"}


def test_a_phase_that_is_next_to_nothing_is_not_judged():
    found = compare(side(data=0.01), side(data=0.02), Gate())
    assert [phase.label for phase in only(found).phases] == ["forward"]


def test_one_process_decides_nothing_and_says_so():
    found = compare(side(processes=1), side(0.02, processes=1), Gate())
    case = only(found)
    assert case.verdict == "inconclusive"
    assert case.gated[0].ratio == pytest.approx(2, rel=0.1) and case.gated[0].low is None
    assert [note.code for note in case.notes] == ["one_process"]
    assert exit_code(found) is Exit.DONE


def test_processes_measured_in_turns_are_compared_pair_by_pair():
    """The machine got slower all the time; each pair met it alike."""
    drift = [1.0, 1.2, 1.5, 1.9, 2.4, 3.0]
    rng = np.random.default_rng(0)
    base, new = (
        msgspec.structs.replace(
            side(), measurements=[process(0.01 * slow * factor, rng, number=i) for i, slow in enumerate(drift)]
        )
        for factor in (1.0, 1.1)
    )
    assert compare(base, new, Gate(), paired=True).verdict == "regressed"
    assert compare(base, new, Gate()).verdict == "inconclusive"


def test_many_cases_cry_wolf_no_more_often_than_one():
    """Of 60 cases without a change, each noisy, some interval lies beyond the threshold by chance; no verdict does."""
    batches = tuple(range(8, 68))
    wrong, clear = 0, 0
    for seed in range(6):
        sides = [side(batches=batches, seed=2 * seed + i, scatter=0.1, processes=4, steps=12) for i in (0, 1)]
        found = compare(*sides, Gate())
        wrong += any(case.verdict in ("regressed", "improved") for case in found.cases)
        clear += sum(case.gated[0].low > 1.02 or case.gated[0].high < 1 / 1.02 for case in found.cases)
    assert clear > 0
    assert wrong <= 1


def test_thresholds_of_metrics_and_of_cases():
    base = side(seed=1, batches=(8, 16), memory=1000, scatter=0.003)
    new = side(0.0105, seed=2, batches=(8, 16), memory=1100, scatter=0.003)
    plain = compare(base, new, Gate(metrics={"peak_memory": 0.05}))
    assert [[c.verdict for c in case.gated] for case in plain.cases] == [["regressed", "regressed"]] * 2
    lenient = Gate(metrics={"peak_memory": 0.2}, cases=(CaseGate(settings={"batch_size": 16}, threshold=0.2),))
    found = compare(base, new, lenient)
    assert [[c.verdict for c in case.gated] for case in found.cases] == [
        ["regressed", "unchanged"],
        ["unchanged", "unchanged"],
    ]
    assert [case.gated[0].threshold for case in found.cases] == [0.02, 0.2]


def test_more_of_what_is_better_is_an_improvement():
    found = compare(side(seed=1, scatter=0.003), side(0.008, seed=2, scatter=0.003), Gate(metrics={"throughput": 0.02}))
    assert [change.verdict for change in only(found).gated] == ["improved", "improved"]


# --- what may be compared ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINE)
def test_another_machine_is_refused_unless_it_is_allowed(name):
    gpu = Accelerator(name="NVIDIA L4", kind="cuda", index=0)
    other = {"cpu": "another", "host": "another", "hypervisor": "KVM", "driver": "550", "accelerators": (gpu,)}
    there = environment(**{name: other.get(name, 1)})
    found = compare(side(), side(where=there), Gate())
    assert found.cases == () and found.verdict == "incomparable"
    assert exit_code(found) is Exit.INCOMPARABLE
    assert name in text_of(found) and "Not compared" in text_of(found)
    allowed = compare(side(), side(where=there), Gate(allow=(name,)))
    assert allowed.cases and allowed.differences and not allowed.refused


def test_other_software_is_compared_and_listed():
    there = environment(torch="2.16.0", git_commit="abc", variables={"OMP_NUM_THREADS": "1"})
    found = compare(side(where=environment(git_commit="def")), side(where=there), Gate())
    assert found.cases
    assert found.differences == ("torch: 2.15.0 → 2.16.0", "git_commit: def → abc", "OMP_NUM_THREADS: unset → 1")
    assert "torch: 2.15.0 → 2.16.0" in text_of(found)


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_case_under_other_conditions_is_not_compared(name):
    other = {"device": "cuda:0", "clock": "host and device", "threads": 1, "malloc": "pinned", "image_size": 7}[name]
    found = compare(side(), side(facts={name: other}), Gate())
    assert only(found).refused and only(found).gated == ()
    assert found.verdict == "incomparable" and exit_code(found) is Exit.INCOMPARABLE
    assert name in text_of(found)


def test_cases_of_one_side_only_are_shown():
    base, new = side(batches=(8, 16, 32)), side(batches=(8, 64))
    failed = msgspec.structs.replace(
        side(batches=(16,)).measurements[0], outcome=Outcome(kind="oom", message="no room"), samples=None
    )
    new = msgspec.structs.replace(new, measurements=[*new.measurements, failed])
    found = compare(base, new, Gate())
    assert [(one.case.settings.batch_size, one.reason) for one in found.missing] == [
        (16, "oom: no room"),
        (32, "was not measured"),
    ]
    assert [one.case.settings.batch_size for one in found.added] == [64]
    assert exit_code(found) is Exit.MISSING
    assert "oom: no room" in text_of(found)


def test_what_disturbed_one_side_is_said_with_its_figure():
    note = Note(code="cpu_contended", text="others took the cores")
    found = compare(side(faults=5), side(faults=900, notes=(note,)), Gate())
    told = {one.code: one.text for one in only(found).notes}
    assert "from 5 to 900" in told["faults_differ"]
    assert "in 0 of 6 processes of the base and 6 of 6 of the new" in told["cpu_contended"]


# --- exit codes and formats -------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """Return a function that saves sides in `tmp_path` and gives their names."""

    def save(**sides):
        for name, result in sides.items():
            store.save(result, tmp_path / f"{name}.json")
        return [str(tmp_path / f"{name}.json") for name in sides]

    return save


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *arguments])
    return ended.value.code


QUIET = {"scatter": 0.003}


@pytest.mark.parametrize(
    ("new", "flags", "code"),
    [
        (side(seed=2, **QUIET), (), 0),
        (side(0.012, seed=2, **QUIET), (), 1),
        (side(0.012, seed=2, **QUIET), ("--threshold", "0.3"), 0),
        (side(0.0102, seed=2, **QUIET), (), 0),
        (side(0.0102, seed=2, **QUIET), ("--strict",), 4),
        (side(batches=(16,)), (), 5),
        (side(where=environment(cpu="another")), (), 3),
        (side(where=environment(cpu="another")), ("--allow", "cpu,host"), 0),
    ],
)
def test_a_gate_reads_the_exit_code(results, capsys, monkeypatch, tmp_path, new, flags, code):
    monkeypatch.chdir(tmp_path)
    assert run(*results(base=side(seed=1, **QUIET), new=new), *flags) == code
    assert capsys.readouterr().out


def test_the_gate_of_a_project_is_read_from_its_pyproject(results, capsys, monkeypatch, tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    both = results(base=side(seed=1, memory=100, **QUIET), new=side(0.0102, seed=2, memory=200, **QUIET))
    (tmp_path / "pyproject.toml").write_text("[tool.bsprof.gate]\nstrict = true\n")
    assert run(*both) == 4
    assert run(*both, "--no-strict") == 0
    (tmp_path / "pyproject.toml").write_text("[tool.bsprof.gate.metrics]\npeak_memory = 0.1\n")
    assert run(*both) == 1
    assert "peak memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[tool.bsprof.gate]\nthreshold = 2\n", "$.tool.bsprof.gate.threshold"),
        ("[tool.bsprof.gate]\nthresold = 0.1\n", "thresold"),
        ("[tool.bsprof.gates]\n", "gates"),
        ("[tool.bsprof.gate.metrics]\nspeed = 0.1\n", "metrics.speed: no such metric"),
        ("[tool.bsprof.gate.metrics]\nsteps = 0.1\n", "metrics.steps: neither more nor less"),
        ("[[tool.bsprof.gate.cases]]\nsettings = {batch = 8}\nthreshold = 0.1\n", "settings.batch: no such axis"),
        ('[tool.bsprof.gate]\nallow = ["torch"]\n', "'torch' is nothing that is refused"),
        ("[tool.bsprof\n", "pyproject.toml: "),
    ],
)
def test_a_gate_that_cannot_be_read_is_one_line(results, capsys, monkeypatch, tmp_path, table, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(table)
    assert run(*results(base=side(), new=side())) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and said in lines[0] and len(lines) <= 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--threshold", "0"), "--threshold: 0 is not between 0 and 1"),
        (("--threshold", "nan"), "--threshold: nan"),
        (("--allow", "torch"), "--allow: 'torch'"),
        (("--format", "html"), "html"),
    ],
)
def test_a_flag_that_makes_no_sense_is_one_line(results, capsys, monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    assert run(*results(base=side(), new=side()), *flags) == 2
    assert said in capsys.readouterr().err


def broken(kind):
    """Return the text of a result that is none."""
    text = store.encode(side(processes=2)).decode()
    whole = json.loads(text)
    first = whole["measurements"][0]["samples"]
    match kind:
        case "truncated":
            return text[: len(text) // 2]
        case "empty":
            return ""
        case "another schema":
            whole["schema"] = 99
        case "NaN":
            return re.sub(r'"wall_s":1.0', '"wall_s":NaN', text, count=1)
        case "not as many phases":
            first["host_ns"]["data"] = []
        case "text for a number":
            first["step_ns"][0] = "fast"
    return json.dumps(whole)


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "another schema", "NaN", "not as many phases", "text for a number"]
)
def test_a_damaged_result_is_one_line_that_names_it(capsys, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    store.save(side(), tmp_path / "base.json")
    (tmp_path / "new.json").write_text(broken(kind))
    assert run("base.json", "new.json") == 2
    (line, *hints) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: new.json: ") and len(hints) <= 1


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_few_steps_or_none_are_no_reason_to_fall_over(capsys, monkeypatch, tmp_path, steps, processes):
    monkeypatch.chdir(tmp_path)
    store.save(side(seed=1), tmp_path / "base.json")
    store.save(side(seed=2, steps=steps, processes=processes), tmp_path / "new.json")
    assert run("base.json", "new.json") == (5 if steps == 0 else 0)
    assert capsys.readouterr().err == ""


def test_steps_that_took_no_time_have_no_ratio(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = compare(side(0.0), side(0.0), Gate())
    assert only(found).gated == ()
    assert only(found).verdict == "inconclusive"
    assert text_of(found)


def test_a_folder_is_one_side(capsys, monkeypatch, tmp_path):
    for number in range(3):
        (tmp_path / "base").mkdir(exist_ok=True)
        store.save(side(processes=2, seed=number), tmp_path / "base" / f"{number}.json.gz")
    assert len(read(tmp_path / "base").measurements) == 6
    (tmp_path / "none").mkdir()
    with pytest.raises(BsprofError, match="no results there"):
        read(tmp_path / "none")
    store.save(side(where=environment(torch="1.0")), tmp_path / "base" / "other.json")
    with pytest.raises(BsprofError, match="of different environments: torch") as refused:
        read(tmp_path / "base")
    assert refused.value.exit_code is Exit.INCOMPARABLE


def test_folders_whose_results_were_measured_in_turns_are_compared_pair_by_pair(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        slow_day = 1 + 0.4 * number  # what both sides of a pair have in common
        for name, slower in (("base", 1.0), ("head", 1.1)):
            (tmp_path / name).mkdir(exist_ok=True)
            one = side(0.01 * slow_day * slower, processes=1, seed=number)
            store.save(one, tmp_path / name / f"{number}.json")
    verdicts = {}
    for flag in ("--paired", "--no-paired"):
        run("base", "head", flag, "--format", "json")
        found = json.loads(capsys.readouterr().out)
        verdicts[flag] = (found["paired"], found["verdict"])
    assert verdicts == {"--paired": (True, "regressed"), "--no-paired": (False, "inconclusive")}


def test_json_holds_all_of_it(results, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(*results(base=side(seed=1), new=side(0.012, seed=2)), "--format", "json")
    found = json.loads(capsys.readouterr().out)
    (case,) = found["cases"]
    assert found["verdict"] == case["verdict"] == "regressed"
    assert case["gated"][0]["metric"] == "step" and case["gated"][0]["verdict"] == "regressed"
    assert found["gate"]["threshold"] == 0.02
    assert {phase["label"] for phase in case["phases"]} == {"data", "forward"}


def test_markdown_is_a_table_that_nothing_breaks_out_of(results, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    odd = {"model": "my|own<b>\x1b[31m:make"}
    both = results(base=side(seed=1, settings=odd), new=side(0.012, seed=2, settings=odd))
    run(*both, "--format", "markdown")
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "my\\|own" in text and "<b>" not in text and "\x1b" not in text
    assert "🔴 regressed" in text and "<details>" in text


def test_github_gets_annotations_and_a_summary(results, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    both = results(base=side(seed=1, batches=(8, 16), **QUIET), new=side(0.012, seed=2, **QUIET))
    assert run(*both, "--format", "github") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines[:2]] == ["::error", "::error"]
    assert "+20" in lines[0] and "%25" in lines[0]
    assert (tmp_path / "summary.md").read_text().startswith("### bsprof: 🔴")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_its_terminal(width):
    found = compare(side(seed=1, batches=(8, 16)), side(0.012, seed=2, batches=(8, 16, 32)), Gate())
    text = text_of(found, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "regressed" in text


def test_compare_needs_no_torch(results, tmp_path):
    both = results(base=side(), new=side())
    code = f"""
import sys
from bsprof import cli
try:
    cli.main(["compare", *{both!r}])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    paths = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
