"""Whatever becomes of a case, the others are kept, nothing stays behind, and the user is told in one line."""

from __future__ import annotations

import json
import random
import signal
import time

import psutil
from commands import MANY, TINY, ended, run, start, wait_for_journal

from bsprof import store


def test_ctrl_c_keeps_what_was_measured_and_the_rest_can_follow(tmp_path):
    process = start(tmp_path, "bench", *MANY, "-o", "out.json")
    wait_for_journal(tmp_path, 2)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert ended(family)
    assert "--resume out.json" in err
    result = store.load(tmp_path / "out.json")
    kinds = [m.outcome.kind for m in result.measurements]
    assert len(kinds) == 6
    assert kinds.count("ok") >= 2
    assert {"interrupted", "skipped"} <= set(kinds)
    assert "interrupted" in out
    before = {m.case.key: m for m in result.measurements if m.outcome.kind == "ok"}

    done = run(tmp_path, "bench", "--resume", "out.json")
    assert done.returncode == 0, done.stderr
    after = store.load(tmp_path / "out.json")
    assert [m.outcome.kind for m in after.measurements] == ["ok"] * 6
    assert {m.case.key: m for m in after.measurements if m.case.key in before} == before
    assert not list(tmp_path.glob("*.journal"))


def test_ctrl_c_twice_leaves_at_once_and_loses_nothing_finished(tmp_path):
    process = start(tmp_path, "bench", *MANY, "-o", "out.json")
    wait_for_journal(tmp_path, 1)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert ended(family)
    assert run(tmp_path, "bench", "--resume", "out.json").returncode == 0
    assert [m.outcome.kind for m in store.load(tmp_path / "out.json").measurements] == ["ok"] * 6


def test_sigkill_at_any_moment_loses_one_case_at_most(tmp_path):
    process = start(tmp_path, "bench", *MANY, "-o", "out.json")
    journal = wait_for_journal(tmp_path, 1)
    time.sleep(random.uniform(0, 2.5))
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.communicate()
    assert ended(family)
    kept = [json.loads(line) for line in journal.read_bytes().split(b"\n")[1:-1]]
    refused = run(tmp_path, "bench", *MANY, "-o", "out.json")
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    elsewhere = run(tmp_path, "bench", "--resume", "out.json", "--seed", "9")
    assert elsewhere.returncode == 2
    assert "another plan" in elsewhere.stderr
    done = run(tmp_path, "bench", "--resume", "out.json")
    assert done.returncode == 0, done.stderr
    result = store.load(tmp_path / "out.json")
    assert [m.outcome.kind for m in result.measurements] == ["ok"] * 6
    finished = {m.case.key: m.samples.step_ns for m in result.measurements if m.samples}
    for line in kept:
        assert finished[line["case"]["key"]] == line["samples"]["step_ns"]


def test_resume_is_refused_on_another_machine(tmp_path):
    run(tmp_path, "bench", *TINY, "-o", "out.json")
    text = (tmp_path / "out.json").read_text()
    torch_version = store.load(tmp_path / "out.json").environment.torch
    (tmp_path / "out.json").write_text(text.replace(f'"torch":"{torch_version}"', '"torch":"1.0.0"'))
    done = run(tmp_path, "bench", "--resume", "out.json")
    assert done.returncode == 2
    assert "torch" in done.stderr
    assert "1.0.0" in done.stderr


def test_two_at_once_in_one_directory_do_not_meet(tmp_path):
    first = start(tmp_path, "bench", *TINY)
    second = start(tmp_path, "bench", *TINY)
    outs = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outs
    assert len([store.load(path) for path in tmp_path.glob("bsprof-*.json")]) == 2


def test_two_at_once_do_not_write_one_file(tmp_path):
    hanging = ("--model", "factories:Hanging", "--data", "factories:Pixels", "--workers", "0", "--batch-size", "4")
    first = start(
        tmp_path, "bench", *hanging, "-o", "out.json"
    )  # it ends when it is told to, however slow the second is
    wait_for_journal(tmp_path, 0)
    second = run(tmp_path, "bench", *TINY, "-o", "out.json")
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert second.returncode == 2
    assert "another bsprof" in second.stderr
    assert first.returncode == 130
