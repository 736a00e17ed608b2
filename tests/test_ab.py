"""`bsprof ab`: two things measured in turns, as a user does it: real processes, real git, real environments."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv

import commands
import psutil
import pytest

from bsprof import store
from bsprof.errors import Exit

TINY = ("--data", "factories:Pixels", "--threads", "1", "--seconds", "0.2")
PERCEPTRON = ("--model", "factories:Perceptron", *TINY)


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    """A noise floor that one test keeps must not be another's."""
    monkeypatch.chdir(tmp_path)


def told(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (Exit.USAGE, ""), done
    return done.stderr


# --- settings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slower(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slower")
    sides = ("--a", "model=factories:Perceptron", "--b", "model=factories:Laborious")
    done = commands.run(directory, "ab", *sides, *TINY, "--budget", "1", "--format", "json", "-o", "kept")
    return directory, done


def test_what_computes_more_is_slower_in_its_forward_pass(slower):
    _, done = slower
    assert done.returncode == Exit.VERDICT, done.stderr
    comparison = told(done)
    (case,) = comparison["cases"]
    (step,) = case["gated"]
    assert (comparison["paired"], case["verdict"], step["metric"]) == (True, "regressed", "step")
    assert 1 < step["low"] < step["ratio"] < step["high"]
    assert {one["metric"]: one["verdict"] for one in case["phases"]}["forward.time"] == "regressed"


def test_both_sides_take_turns_in_processes_that_build_them_in_either_order(slower):
    directory, _ = slower
    a, b = (store.load(directory / "kept" / name) for name in ("a.json", "b.json"))
    assert a.turns is not None and b.turns is not None
    assert (a.turns.run, a.turns.side, b.turns.side, a.turns.together) == (b.turns.run, "a", "b", True)
    assert len(a.measurements) == len(b.measurements) >= 4
    for number, (one, other) in enumerate(zip(a.measurements, b.measurements, strict=True)):
        assert one.case.process == other.case.process == number
        assert one.samples is not None and other.samples is not None
        assert len(one.samples.blocks) == len(other.samples.blocks) >= 4
        assert one.samples.counters is not None and one.samples.counters.wall_ns > 0
        builds = [m.startup.build_ns for m in (one, other) if m.startup]
        assert None not in builds


def test_the_files_say_the_same_again(slower):
    directory, done = slower
    threshold = str(told(done)["gate"]["threshold"])
    again = commands.run(
        directory, "compare", "kept/a.json", "kept/b.json", "--threshold", threshold, "--format", "json"
    )
    assert again.returncode == Exit.VERDICT
    assert told(again)["cases"] == told(done)["cases"]


def test_batches_of_two_sizes_are_compared_by_samples_a_second(tmp_path):
    sides = ("--a", "batch_size=1", "--b", "batch_size=64")
    done = commands.run(tmp_path, "ab", *sides, *PERCEPTRON, "--budget", "1", "--format", "json")
    assert done.returncode == Exit.DONE, done.stderr
    (case,) = told(done)["cases"]
    assert [(one["metric"], one["verdict"]) for one in case["gated"]] == [("throughput", "improved")]
    assert all(one["label"].endswith(" a sample") for one in case["phases"])


def test_loaders_with_workers_are_measured_in_processes_of_their_own(tmp_path):
    sides = ("--a", "workers=0", "--b", "workers=1")
    done = commands.run(
        tmp_path, "ab", *sides, *PERCEPTRON, "--batch-size", "4", "--budget", "1", "--format", "json", "-o", "kept"
    )
    assert done.returncode in (Exit.DONE, Exit.VERDICT), done.stderr
    a, b = (store.load(tmp_path / "kept" / name) for name in ("a.json", "b.json"))
    assert a.turns is not None and not a.turns.together
    assert [one.outcome.kind for one in (*a.measurements, *b.measurements)] == ["ok"] * 8
    assert {one.case.settings.workers for one in b.measurements if one.case.settings} == {1}


def test_a_side_that_fails_ends_the_run_and_says_why(tmp_path):
    sides = ("--a", "model=factories:Perceptron", "--b", "model=factories:FailsInBackward")
    done = commands.run(tmp_path, "ab", *sides, *TINY, "--format", "json")
    assert done.returncode == Exit.INCOMPARABLE
    assert "no gradient today" in done.stderr
    assert "[1/4 pairs]" in done.stderr and "[2/4 pairs]" not in done.stderr


# --- the noise floor ----------------------------------------------------------------------------------


def test_a_threshold_below_the_noise_floor_is_refused(tmp_path):
    measured = commands.run(tmp_path, "ab", "--aa", *PERCEPTRON, "--budget", "1", "--format", "json")
    assert measured.returncode == Exit.DONE, measured.stderr
    assert "noise floor, both sides in one process:" in measured.stderr
    (kept,) = (tmp_path / "cache").rglob("*-together.json")
    floor = json.loads(kept.read_text())
    assert (floor["together"], floor["pairs"] >= 4) == (True, True)
    kept.write_text(json.dumps({**floor, "floor": 0.031}))
    sides = ("--a", "batch_size=1", "--b", "batch_size=64")
    refused = complaint(commands.run(tmp_path, "ab", *sides, *PERCEPTRON, "--threshold", "0.03"))
    assert "--threshold: 3.0% is below this machine's noise floor, 3.1%" in refused
    raised = commands.run(tmp_path, "ab", *sides, *PERCEPTRON, "--budget", "1", "--format", "json")
    assert told(raised)["gate"]["threshold"] == 0.031


# --- code, environments, scripts ----------------------------------------------------------------------

SCRIPT = "import sys, time\ntime.sleep({})\nprint(sys.argv)\n"
RECORDED = """
import time
from bsprof import Recorder
recorder = Recorder(batch_size=4)
for batch in recorder.steps(range(12)):
    time.sleep({})
    recorder.mark("forward")
recorder.save("own.json")
"""


def git(directory, *words):
    identity = ("-c", "user.name=one", "-c", "user.email=one@example.org")
    done = subprocess.run(["git", *identity, *words], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout


def test_two_scripts_are_compared_by_their_whole_runs(tmp_path):
    (tmp_path / "quick.py").write_text(SCRIPT.format(0.05))
    (tmp_path / "slow.py").write_text(SCRIPT.format(0.5))
    done = commands.run(tmp_path, "ab", "--a", "quick.py", "--b", "slow.py --lr 1", "--budget", "1", "--format", "json")
    assert done.returncode == Exit.VERDICT, done.stderr
    (case,) = told(done)["cases"]
    assert (case["verdict"], case["phases"]) == ("regressed", [])
    assert case["gated"][0]["new"] > 0.5 > case["gated"][0]["base"]


def test_a_script_that_fails_says_its_last_words(tmp_path):
    (tmp_path / "good.py").write_text("")
    (tmp_path / "bad.py").write_text("raise SystemExit('there is no data')\n")
    done = commands.run(tmp_path, "ab", "--a", "good.py", "--b", "bad.py")
    assert done.returncode == Exit.INCOMPARABLE
    assert "failed: crash: exited with code 1 in run: there is no data" in done.stderr


def test_commits_are_measured_in_worktrees_that_are_gone_afterwards(tmp_path):
    git(tmp_path, "init", "-q")
    for seconds in (0.002, 0.02):
        (tmp_path / "train.py").write_text(RECORDED.format(seconds))
        git(tmp_path, "add", "train.py")
        git(tmp_path, "commit", "-qm", f"{seconds}")
    (tmp_path / "train.py").write_text("raise SystemExit('what is not committed does not count')\n")
    sides = ("--a", "HEAD~1", "--b", "HEAD", "--budget", "1", "--format", "json", "-o", "kept")
    done = commands.run(tmp_path, "ab", *sides, "--", "train.py")
    assert done.returncode == Exit.VERDICT, done.stderr
    (case,) = told(done)["cases"]
    assert case["verdict"] == "regressed"
    assert [one["metric"] for one in case["phases"]] == ["forward.time"]
    assert any(line.startswith("git_commit: ") for line in told(done)["differences"])
    assert git(tmp_path, "worktree", "list").count("\n") == 1
    assert git(tmp_path, "status", "--porcelain", "--untracked-files=no").split() == ["M", "train.py"]


def test_two_folders_have_modules_of_their_own(tmp_path):
    for name, work in (("one", 10), ("two", 400_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(
            "import torch, factories\n\n\nclass Model(factories.Perceptron):\n    def forward(self, images):\n"
            f"        torch.tanh(torch.ones({work}))\n        return super().forward(images)\n"
        )
    done = commands.run(
        tmp_path, "ab", "--a", "one", "--b", "two", "--model", "own:Model", *TINY, "--budget", "1", "--format", "json"
    )
    assert done.returncode == Exit.VERDICT, done.stderr
    assert told(done)["verdict"] == "regressed"


def test_two_environments_are_measured_by_their_own_interpreters(tmp_path):
    venv.create(tmp_path / "other", with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "other" / "lib" / version / "site-packages"
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "who.py").write_text("import sys, pathlib\npathlib.Path('seen').open('a').write(sys.prefix + '\\n')\n")
    other = str(tmp_path / "other" / "bin" / "python")
    done = commands.run(tmp_path, "ab", "--a", sys.executable, "--b", other, "--budget", "1", "--", "who.py")
    assert done.returncode in (Exit.DONE, Exit.VERDICT), done.stderr
    seen = (tmp_path / "seen").read_text().split()
    assert seen[:4] == [sys.prefix, str(tmp_path / "other"), str(tmp_path / "other"), sys.prefix]


def test_an_environment_without_bsprof_says_what_it_lacks(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    empty = str(tmp_path / "empty" / "bin" / "python")
    said = complaint(commands.run(tmp_path, "ab", "--a", sys.executable, "--b", empty, *PERCEPTRON))
    assert "No module named" in said and "install" in said


# --- stopping -----------------------------------------------------------------------------------------


def test_a_stopped_run_keeps_its_pairs_and_leaves_nobody(tmp_path):
    command = commands.start(
        tmp_path, "ab", "--aa", *PERCEPTRON, "--seconds", "1", "--budget", "300", "--threshold", "0.0001", "-o", "kept"
    )
    end = time.monotonic() + 120
    while not (tmp_path / "kept" / "b.json").exists():
        assert command.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    children = [child.pid for child in psutil.Process(command.pid).children(recursive=True)]
    os.kill(command.pid, signal.SIGINT)
    _, errors = command.communicate(timeout=60)
    assert command.returncode == Exit.INTERRUPTED, errors
    assert "stopped by the user" in errors
    assert commands.ended(children)
    a, b = (store.load(tmp_path / "kept" / name) for name in ("a.json", "b.json"))
    assert len(a.measurements) == len(b.measurements) >= 1


HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("pid").write_text(str(child.pid))
time.sleep(600)
"""


def test_a_script_past_its_deadline_is_ended_with_all_that_it_started(tmp_path):
    (tmp_path / "good.py").write_text("")
    (tmp_path / "hangs.py").write_text(HANGS)
    done = commands.run(tmp_path, "ab", "--a", "good.py", "--b", "hangs.py", "--deadline", "3")
    assert done.returncode == Exit.INCOMPARABLE
    assert "failed: timeout: still in run after 3 s; ended with all its processes" in done.stderr
    assert commands.ended([int((tmp_path / "pid").read_text())])


def test_no_interpreter_outlives_a_killed_parent(tmp_path):
    """Sides in processes of their own, as `--a workers=0 --b workers=1` has them."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    sides = ("--a", "workers=0", "--b", "workers=1", "--seconds", "60")
    command = subprocess.Popen(
        commands.command("ab", *PERCEPTRON, *sides),
        cwd=tmp_path,
        env=commands.surroundings(TMPDIR=str(scratch)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    fresh: list[int] = []

    def started() -> bool:
        for child in psutil.Process(command.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "bsprof.sweep.child:measure" in child.cmdline():
                    fresh.append(child.pid)
        return bool(fresh)

    assert commands.eventually(started, within_s=120)
    command.kill()
    command.wait()
    assert commands.ended(fresh)


def test_no_script_outlives_a_killed_parent(tmp_path):
    (tmp_path / "one.py").write_text("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)\n")
    command = commands.start(tmp_path, "ab", "--aa", "--a", "one.py")
    assert commands.eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), within_s=120)
    command.kill()
    command.communicate()
    assert commands.ended([int((tmp_path / "pid").read_text())])


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--a: missing"),
        (("--a", "batch_size=2"), "--b: missing"),
        (("--a", "batch_size=2", "--b", "nothing-of-that-name"), "--b nothing-of-that-name: neither settings"),
        (("--a", "batch_size=2", "--b", "it's"), "--b it's: no closing quotation"),
        (("--a", "batch_size=2", "--b", "bathc_size=2"), "there is no axis 'bathc_size'"),
        (("--a", "batch_size=2", "--b", "batch_size=two"), "--b batch_size: expected a whole number, got 'two'"),
        (("--a", "batch_size=2", "--b", "batch_size=2"), "are the same"),
        (("--a", "batch_size=2", "--b", "."), "are not alike"),
        (("--aa", "--b", "batch_size=2"), "--aa and --b"),
        (("--aa", "--batch-size", "2,4"), "--batch-size: 2,4 are 2 values"),
        (("--aa", "--budget", "0"), "--budget: 0 is no time"),
        (("--aa", "--seconds", "nan"), "--seconds: nan is no time"),
        (("--aa", "--threshold", "2"), "--threshold: 2 is not between 0 and 1"),
        (("--aa", "--threshold", "0.05", "--effect", "0.04"), "--effect: 4.0% lies within the threshold"),
        (("--aa", "--world-size", "2"), "world_size"),
        (("--aa", "--model", "factories:Nothing"), "factories"),
        (("--aa", "--", "nothing.py"), "nothing.py"),
        (("--aa", "-o", "file"), "--output file: is no folder"),
    ],
)
def test_bad_words_are_one_line(tmp_path, words, said):
    (tmp_path / "file").write_text("")
    error, *hint = complaint(commands.run(tmp_path, "ab", *words)).splitlines()
    assert error.startswith("error: ") and said in error
    assert len(hint) <= 1
