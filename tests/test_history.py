"""A history of results: a step and a slow drift are found where they are, noise and outliers are not taken for one."""

from __future__ import annotations

import io
import json
import re

import msgspec
import numpy as np
import pytest
from machines import environment
from rich.console import Console

from bsprof import cli, store
from bsprof.compare import MACHINE
from bsprof.history import history, moment
from bsprof.metrics import METRICS
from bsprof.model import Accelerator, Case, Facts, Measurement, Memory, Outcome, Result, Samples, Settings, case_key
from bsprof.report import history as report


def result(
    day, step_s=0.01, *, batches=(8,), processes=3, noise=0.002, where=None, facts=None, memory=None, **settings
):
    """Return a result of that day of 2031: each case in several processes, of which each has a few steps."""
    rng = np.random.default_rng(day)
    measurements = []
    for batch in batches:
        chosen = Settings(batch_size=batch, **settings)
        for number in range(processes):
            times = (step_s * batch / 8 * 1e9 * rng.lognormal(0, noise) * rng.lognormal(0, 0.01, 9)).astype(int)
            measurements.append(
                Measurement(
                    case=Case(key=case_key(chosen), settings=chosen, process=number),
                    outcome=Outcome(kind="ok"),
                    wall_s=1.0,
                    facts=Facts(**{"device": "cpu", "threads": 2, **(facts or {})}),
                    samples=Samples(batch_size=batch, step_ns=times.tolist(), host_ns={"forward": times.tolist()}),
                    memory=None if memory is None else Memory(pool="host", allocated_peak=memory),
                )
            )
    created = f"2031-{1 + day // 28:02d}-{1 + day % 28:02d}T06:00:00+00:00"
    return Result(created=created, plan=None, environment=where or environment(), measurements=measurements)


def told(results, metric="step", threshold=0.02):
    moments = [moment(f"{index}.json", one, METRICS[metric]) for index, one in enumerate(results)]
    return history(moments, METRICS[metric], threshold)


def only(found):
    (case,) = found.cases
    return case


def nights(*factors, **chosen):
    """Return a result a night, each with its factor."""
    return [result(day, 0.01 * factor, **chosen) for day, factor in enumerate(factors)]


CREEPING = [1.01**night for night in range(12)]
STEPPED = [1.0] * 6 + [1.1] * 4


# --- what is found ----------------------------------------------------------------------------------


def test_a_step_is_told_by_when_and_how_much():
    found = told(nights(*STEPPED))
    case = only(found)
    assert found.verdict == case.verdict == "regressed"
    assert [(one.since[:10], one.until[:10], one.results) for one in case.segments] == [
        ("2031-01-01", "2031-01-06", 6),
        ("2031-01-07", "2031-01-10", 4),
    ]
    before, after = case.segments
    assert before.value == pytest.approx(0.01, rel=0.01) and after.value == pytest.approx(0.011, rel=0.01)
    assert before.change is None
    assert after.change.ratio == pytest.approx(after.value / before.value)
    assert after.change.low < 1.1 < after.change.high
    assert case.drift.change == after.change and case.drift.steps == 1 and case.drift.since == after.since


def test_a_drift_that_no_two_nights_show_is_seen():
    """Each night is 1 % slower than the one before, half of what a comparison lets pass."""
    found = told(nights(*CREEPING))
    assert found.verdict == "regressed"
    assert only(found).drift.change.low > 1.02


def test_steps_that_each_stay_below_the_threshold_add_up():
    """Twice 1.5 %: neither decides; both together do."""
    found = told(nights(*[1.0] * 10, *[1.015] * 10, *[1.03] * 10, noise=0.0005))
    case = only(found)
    assert [one.results for one in case.segments] == [10, 10, 10]
    assert all(one.change.high < 1.02 for one in case.segments[1:])
    assert case.drift.steps == 2 and case.drift.since[:10] == "2031-01-11"
    assert case.verdict == "regressed"
    assert "in 2 steps" in text_of(found)


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([1.0] * 10, "steady"),
        ([1.0] * 6 + [0.9] * 4, "improved"),
        ([1.0] * 6 + [1.01] * 6, "steady"),
        ([1.0] * 6 + [1.1] * 4 + [1.0] * 4, "improved"),
        ([1.0] * 6 + [1.1] + [1.0] * 6, "steady"),
        ([1.0] * 6 + [1.1, 1.1] + [1.0] * 6, "steady"),
        ([1.0] * 11 + [1.5], "steady"),
        ([1.0] * 2 + [1.1] * 3, "steady"),
    ],
    ids=["level", "faster", "a small step", "back again", "one outlier", "two", "one in the end", "too few"],
)
def test_the_newest_level_is_judged_by_the_one_before_it(factors, verdict):
    assert told(nights(*factors, noise=0.001)).verdict == verdict


def test_a_step_about_as_large_as_the_threshold_is_left_undecided():
    found = told(nights(*[1.0] * 8, *[1.02] * 8, noise=0.003))
    assert len(only(found).segments) == 2
    assert found.verdict == "inconclusive"


def test_more_of_what_is_better_is_an_improvement_and_memory_is_not_slow():
    assert told(nights(*STEPPED), "throughput").verdict == "regressed"
    grown = [result(day, memory=1000 if day < 6 else 1200) for day in range(12)]
    found = told(grown, "peak_memory")
    assert found.verdict == "regressed"
    assert "drifted worse" in text_of(found) and "slower" not in text_of(found)


def test_results_are_taken_in_the_order_of_their_making_and_processes_in_none():
    results = nights(*STEPPED)
    shuffled = [msgspec.structs.replace(one, measurements=one.measurements[::-1]) for one in results]
    mixed = [shuffled[index] for index in np.random.default_rng(0).permutation(len(results))]
    assert told(mixed) == told(results)


def test_a_time_of_another_zone_is_put_in_its_place():
    late, early = result(0), msgspec.structs.replace(result(1, 0.02), created="2031-01-01T07:00:00+02:00")
    found = told([late, early])
    assert (found.since, found.until) == ("2031-01-01T05:00:00Z", "2031-01-01T06:00:00Z")


def test_one_case_of_many_does_not_hide_another():
    results = [result(day, batches=(8, 16)) for day in range(6)]
    results += [
        msgspec.structs.replace(
            result(day), measurements=[*result(day, 0.011).measurements, *result(day, batches=(16,)).measurements]
        )
        for day in range(6, 12)
    ]
    assert [case.verdict for case in told(results).cases] == ["regressed", "steady"]


# --- what is not followed ---------------------------------------------------------------------------


def test_a_case_that_the_newest_result_lacks_is_named_and_decides_nothing():
    results = [*[result(day, batches=(8, 16)) for day in range(4)], result(4)]
    found = told(results)
    assert [case.case.settings.batch_size for case in found.cases] == [8]
    (ended,) = found.ended
    assert ended.case.settings.batch_size == 16 and "2031-01-04" in ended.reason and "3.json" in ended.reason
    assert "last measured" in text_of(found)


def test_a_case_under_other_conditions_is_not_followed():
    found = told([result(0, facts={"threads": 1}), *[result(day) for day in range(1, 8)]])
    case = only(found)
    assert case.verdict == found.verdict == "incomparable"
    assert case.refused == ("threads: 1 → 2, from 0.json to 7.json",) and case.segments == ()
    assert "threads: 1 → 2" in text_of(found) and "threads: 1 → 2" in report.markdown(found)


def test_a_newest_result_without_figures_is_incomparable():
    broken = msgspec.structs.replace(
        result(9).measurements[0], outcome=Outcome(kind="oom", message="no room"), samples=None
    )
    found = told([*nights(1, 1), msgspec.structs.replace(result(9), measurements=[broken])])
    assert found.verdict == "incomparable" and len(found.ended) == 1
    assert "has no case with figures" in text_of(found)


# --- the command ------------------------------------------------------------------------------------


def text_of(found, width=120):
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    report.render(found, console)
    return console.file.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a function that saves results in a folder of the working directory, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def save(*results):
        (tmp_path / "nights").mkdir()
        for index, one in enumerate(results):
            store.save(one, tmp_path / "nights" / f"{index}.json.gz")
        return "nights"

    return save


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["history", *arguments])
    return ended.value.code


@pytest.mark.parametrize(
    ("factors", "flags", "code"),
    [
        (STEPPED, (), 1),
        (CREEPING, (), 1),
        (STEPPED, ("--threshold", "0.2"), 0),
        ([1 / one for one in STEPPED], (), 0),
        ([1.0] * 8, (), 0),
        (STEPPED, ("--metric", "forward.time"), 1),
    ],
)
@pytest.mark.parametrize("output", ["rich", "markdown", "json"])
def test_a_gate_reads_the_exit_code(folder, capsys, factors, flags, code, output):
    assert run(folder(*nights(*factors)), "--format", output, *flags) == code
    told = capsys.readouterr()
    assert told.out and not told.err


def test_files_and_folders_are_one_history_and_a_file_counts_once(folder, tmp_path, capsys):
    name = folder(*nights(1, 1, 1))
    store.save(result(3), tmp_path / "last.json")
    assert run(name, "last.json", f"{name}/0.json.gz", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["results"] == 4


@pytest.mark.parametrize("output", ["rich", "markdown"])
def test_one_result_is_one_line(folder, capsys, output):
    assert run(folder(result(0)), "--format", output) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "One result" in line and "2031-01-01" in line


def test_a_few_results_say_how_many_it_takes(folder, capsys):
    assert run(folder(*nights(1, 1))) == 0
    assert "takes 6 results" in capsys.readouterr().out


@pytest.mark.parametrize("name", MACHINE)
def test_another_machine_is_refused_by_its_file(folder, capsys, name):
    gpu = Accelerator(name="NVIDIA L4", kind="cuda", index=0)
    other = {"cpu": "another", "host": "another", "hypervisor": "KVM", "driver": "550", "accelerators": (gpu,)}
    there = environment(**{name: other.get(name, 1)})
    assert run(folder(result(0), result(1, where=there))) == 3
    (line, hint) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nights/1.json.gz: ") and name in line and "nights/0.json.gz" in line
    assert hint.startswith("hint: ")


def test_other_software_is_what_a_history_is_for(folder):
    assert run(folder(result(0), result(1, where=environment(torch="2.16.0", git_commit="abc")))) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--threshold", "0"), "--threshold: 0 is not between 0 and 1"),
        (("--threshold", "nan"), "--threshold: nan"),
        (("--metric", "speed"), "--metric: there is no metric 'speed'"),
        (("--metric", "steps"), "--metric: neither more nor less of steps"),
        (("--format", "github"), "github"),
    ],
)
def test_a_flag_that_makes_no_sense_is_one_line(folder, capsys, flags, said):
    assert run(folder(result(0), result(1)), *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0] and len(lines) <= 2


def test_what_cannot_be_read_is_one_line_that_names_it(folder, tmp_path, capsys):
    name = folder(result(0), msgspec.structs.replace(result(1), created="yesterday"))
    assert run(name) == 2
    assert capsys.readouterr().err.startswith("error: nights/1.json.gz: $.created: 'yesterday' is no time")
    (tmp_path / "empty").mkdir()
    assert run("empty") == 2
    assert "empty: no results there" in capsys.readouterr().err
    assert run("nowhere.json") == 2
    assert "nowhere.json: no such file" in capsys.readouterr().err
    assert run() == 2


# --- how it is shown --------------------------------------------------------------------------------


def test_each_segment_is_a_row_and_the_newest_has_the_verdict():
    rows = [line for line in text_of(told(nights(*STEPPED, batches=(8, 16)))).splitlines() if "2031-" in line]
    assert len(rows) == 4
    assert re.match(r" +8 +2031-01-01 +6 +[\d.]+ ms +\S +\S$", rows[0])
    assert re.search(r"2031-01-07 +4 +1[01]\.\d ms +\+10% +\+\d.*drifted slower$", rows[1])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_its_terminal(width):
    text = text_of(told(nights(*STEPPED, batches=(8, 16))), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "drifted slower" in text


def test_segments_that_begin_on_one_day_show_the_hour():
    results = [
        msgspec.structs.replace(one, created=f"2031-01-01T{hour:02d}:00:00+00:00")
        for hour, one in enumerate(nights(*STEPPED))
    ]
    assert "2031-01-01 06:00" in text_of(told(results))


def test_markdown_is_a_table_that_nothing_breaks_out_of(folder, capsys):
    run(folder(*nights(*STEPPED, model="my|own<b>\x1b[31m:make")), "--format", "markdown")
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "my\\|own" in text and "<b>" not in text and "\x1b" not in text
    assert "🔴 drifted slower" in text


def test_json_holds_all_of_it(folder, capsys):
    run(folder(*nights(*STEPPED)), "--format", "json")
    found = json.loads(capsys.readouterr().out)
    (case,) = found["cases"]
    assert found["verdict"] == case["verdict"] == "regressed"
    assert (found["metric"], found["threshold"], found["results"]) == ("step", 0.02, 10)
    assert [one["results"] for one in case["segments"]] == [6, 4]
    assert case["drift"]["steps"] == 1 and case["drift"]["change"]["low"] > 1.02
