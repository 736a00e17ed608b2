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
from typing import NamedTuple

import commands
import psutil
import pytest

from bsprof import Recorder, cli, store
from bsprof.errors import Exit
from bsprof.model import Settings
from bsprof.sweep.process import Interpreter
from bsprof.sweep.turns import Side, can_share_a_process

TINY = ("--data", "factories:Pixels", "--threads", "1", "--seconds", "0.2")
PERCEPTRON = ("--model", "factories:Perceptron", *TINY)


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def told(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def ab(tmp_path, monkeypatch, capsys):
    """Return `bsprof ab`, run in this process in a folder of its own, what it keeps of the machine included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "140")

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["ab", *words])
        out, err = capsys.readouterr()
        return Done(ended.value.code, out, err)

    return run


# --- settings -----------------------------------------------------------------------------------------


def test_what_computes_more_is_slower_and_the_files_say_so_again(ab, tmp_path, capsys):
    sides = ("--a", "model=factories:Perceptron", "--b", "model=factories:Laborious")
    done = ab(*sides, *TINY, "--budget", "1", "--format", "json", "-o", "kept")
    assert done.code == Exit.VERDICT, done.err
    (case,) = done.told["cases"]
    (step,) = case["gated"]
    assert (done.told["paired"], case["verdict"], step["metric"]) == (True, "regressed", "step")
    assert 1 < step["low"] < step["ratio"] < step["high"]
    assert {one["metric"]: one["verdict"] for one in case["phases"]}["forward.time"] == "regressed"

    a, b = (store.load(tmp_path / "kept" / name) for name in ("a.json", "b.json"))
    assert a.turns is not None and b.turns is not None
    assert (a.turns.run, a.turns.side, b.turns.side, a.turns.together) == (b.turns.run, "a", "b", True)
    assert len(a.measurements) == len(b.measurements) >= 4
    for number, (one, other) in enumerate(zip(a.measurements, b.measurements, strict=True)):
        assert one.case.process == other.case.process == number
        assert one.samples is not None and other.samples is not None
        assert len(one.samples.blocks) == len(other.samples.blocks) >= 4
        assert one.samples.counters is not None and one.samples.counters.wall_ns > 0

    threshold = str(done.told["gate"]["threshold"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "kept/a.json", "kept/b.json", "--threshold", threshold, "--format", "json"])
    assert ended.value.code == Exit.VERDICT
    assert json.loads(capsys.readouterr().out)["cases"] == done.told["cases"]


def test_batches_of_two_sizes_are_compared_by_samples_a_second(ab):
    done = ab("--a", "batch_size=1", "--b", "batch_size=64", *PERCEPTRON, "--budget", "1", "--format", "json")
    assert done.code == Exit.DONE, done.err
    (case,) = done.told["cases"]
    assert [(one["metric"], one["verdict"]) for one in case["gated"]] == [("throughput", "improved")]
    assert all(one["label"].endswith(" a sample") for one in case["phases"])


def test_what_would_disturb_the_other_side_has_processes_of_its_own():
    here = Interpreter("python", "/home")

    def shared(a, b, **other):
        sides = (Side("a", here, Settings(**a)), Side("b", here._replace(**other), Settings(**b)))
        return can_share_a_process(*sides, here)

    assert shared({}, {"batch_size": 64, "threads": 1})
    assert not shared({}, {"workers": 1}) and not shared({"workers": 1}, {"workers": 1})
    assert not shared({}, {"world_size": 2})
    assert not shared({}, {"deterministic_algorithms": True})
    assert not shared({}, {}, directory="/elsewhere") and not shared({}, {}, python="other")
    assert not can_share_a_process(Side("a", here, script=("a.py",)), Side("b", here, script=("b.py",)), here)


def test_a_side_that_fails_ends_the_run_and_says_why(ab):
    sides = ("--a", "model=factories:Perceptron", "--b", "model=factories:FailsInBackward")
    done = ab(*sides, *TINY, "--format", "json")
    assert done.code == Exit.INCOMPARABLE
    assert "no gradient today" in done.err
    assert "[1/4 pairs]" in done.err and "[2/4 pairs]" not in done.err


# --- the noise floor ----------------------------------------------------------------------------------


def test_a_threshold_below_the_noise_floor_is_refused(ab, tmp_path):
    measured = ab("--aa", *PERCEPTRON, "--budget", "1", "--format", "json")
    assert measured.code == Exit.DONE, measured.err
    assert "noise floor, both sides in one process:" in measured.err
    (kept,) = (tmp_path / "cache").rglob("*-together.json")
    floor = json.loads(kept.read_text())
    assert (floor["together"], floor["pairs"] >= 4) == (True, True)
    kept.write_text(json.dumps({**floor, "floor": 0.031}))
    sides = ("--a", "batch_size=1", "--b", "batch_size=64", *PERCEPTRON, "--budget", "1", "--format", "json")
    refused = ab(*sides, "--threshold", "0.03")
    assert refused.code == Exit.USAGE
    assert "--threshold: 3.0% is below this machine's noise floor, 3.1%" in refused.err
    assert ab(*sides).told["gate"]["threshold"] == 0.031


# --- code, environments, scripts ----------------------------------------------------------------------

SCRIPT = "import sys, time\ntime.sleep({})\nprint(sys.argv)\n"


def git(directory, *words):
    identity = ("-c", "user.name=one", "-c", "user.email=one@example.org")
    done = subprocess.run(["git", *identity, *words], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout


def test_two_scripts_are_compared_by_their_whole_runs(ab, tmp_path):
    (tmp_path / "quick.py").write_text(SCRIPT.format(0.05))
    (tmp_path / "slow.py").write_text(SCRIPT.format(0.5))
    done = ab("--a", "quick.py", "--b", "slow.py --lr 1", "--budget", "1", "--format", "json")
    assert done.code == Exit.VERDICT, done.err
    (case,) = done.told["cases"]
    assert (case["verdict"], case["phases"]) == ("regressed", [])
    assert case["gated"][0]["new"] > 0.5 > case["gated"][0]["base"]


def test_a_script_that_saves_what_it_recorded_is_compared_by_its_steps(ab, tmp_path, monkeypatch):
    for name, seconds in (("quick", 0.002), ("slow", 0.01)):
        monkeypatch.setenv("BSPROF_RESULT", str(tmp_path / f"copy-{name}.json"))
        recorder = Recorder(batch_size=4)
        for _ in recorder.steps(range(12)):
            time.sleep(seconds)
            recorder.mark("forward")
        recorder.save(tmp_path / f"own-{name}.json")
        assert (tmp_path / f"copy-{name}.json").read_bytes() == (tmp_path / f"own-{name}.json").read_bytes()
        (tmp_path / f"{name}.py").write_text(
            f"import os, shutil\nshutil.copy('own-{name}.json', os.environ['BSPROF_RESULT'])\n"
        )
    done = ab("--a", "quick.py", "--b", "slow.py", "--budget", "1", "--format", "json")
    assert done.code == Exit.VERDICT, done.err
    (case,) = done.told["cases"]
    assert case["gated"][0]["ratio"] > 2
    assert [one["metric"] for one in case["phases"]] == ["forward.time"]


def test_a_script_that_fails_says_its_last_words(ab, tmp_path):
    (tmp_path / "good.py").write_text("")
    (tmp_path / "bad.py").write_text("raise SystemExit('there is no data')\n")
    done = ab("--a", "good.py", "--b", "bad.py")
    assert done.code == Exit.INCOMPARABLE
    assert "failed: crash: exited with code 1 in run: there is no data" in done.err


def test_commits_are_measured_in_worktrees_that_are_gone_afterwards(ab, tmp_path):
    git(tmp_path, "init", "-q")
    for seconds in (0.05, 0.3):
        (tmp_path / "train.py").write_text(SCRIPT.format(seconds))
        git(tmp_path, "add", "train.py")
        git(tmp_path, "commit", "-qm", f"{seconds}")
    (tmp_path / "train.py").write_text("raise SystemExit('what is not committed does not count')\n")
    done = ab("--a", "HEAD~1", "--b", "HEAD", "--budget", "1", "--format", "json", "-o", "kept", "--", "train.py")
    assert done.code == Exit.VERDICT, done.err
    assert done.told["verdict"] == "regressed"
    assert any(line.startswith("git_commit: ") for line in done.told["differences"])
    assert git(tmp_path, "worktree", "list").count("\n") == 1
    assert git(tmp_path, "status", "--porcelain", "--untracked-files=no").split() == ["M", "train.py"]


def test_two_folders_have_modules_of_their_own(ab, tmp_path, monkeypatch):
    for name, work in (("one", 10), ("two", 400_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.py").write_text(
            "import torch, factories\n\n\nclass Model(factories.Perceptron):\n    def forward(self, images):\n"
            f"        torch.tanh(torch.ones({work}))\n        return super().forward(images)\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(commands.TESTS), prepend=os.pathsep)
    done = ab(
        "--a", "one", "--b", "two", "--model", "own:Model", *TINY, "--budget", "1", "--format", "json", "-o", "kept"
    )
    assert done.code == Exit.VERDICT, done.err
    assert done.told["verdict"] == "regressed"
    a, b = (store.load(tmp_path / "kept" / name) for name in ("a.json", "b.json"))
    assert a.turns is not None and not a.turns.together
    assert [one.outcome.kind for one in (*a.measurements, *b.measurements)] == ["ok"] * 8


def test_two_environments_are_measured_by_their_own_interpreters(ab, tmp_path):
    venv.create(tmp_path / "other", with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "other" / "lib" / version / "site-packages"
    paths = (sysconfig.get_path("purelib"), str(commands.TESTS.parent))  # bsprof may be installed in place
    (packages / "parent.pth").write_text("\n".join(paths) + "\n")
    (tmp_path / "who.py").write_text("import sys, pathlib\npathlib.Path('seen').open('a').write(sys.prefix + '\\n')\n")
    other = str(tmp_path / "other" / "bin" / "python")
    done = ab("--a", sys.executable, "--b", other, "--budget", "1", "--", "who.py")
    assert done.code in (Exit.DONE, Exit.VERDICT), done.err
    seen = (tmp_path / "seen").read_text().split()
    assert seen[:4] == [sys.prefix, str(tmp_path / "other"), str(tmp_path / "other"), sys.prefix]


def test_an_environment_without_bsprof_says_what_it_lacks(ab, tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    empty = str(tmp_path / "empty" / "bin" / "python")
    done = ab("--a", sys.executable, "--b", empty, *PERCEPTRON)
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert "No module named" in done.err and f"hint: install it: {empty} -m pip install bsprof" in done.err


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


def test_a_script_past_its_deadline_is_ended_with_all_that_it_started(ab, tmp_path):
    (tmp_path / "good.py").write_text("")
    (tmp_path / "hangs.py").write_text(HANGS)
    done = ab("--a", "good.py", "--b", "hangs.py", "--deadline", "3")
    assert done.code == Exit.INCOMPARABLE
    assert "failed: timeout: still in run after 3 s; ended with all its processes" in done.err
    assert commands.ended([int((tmp_path / "pid").read_text())])


def test_no_interpreter_outlives_a_killed_parent(tmp_path):
    """Sides in processes of their own, as `--a workers=0 --b workers=1` has them."""
    sides = ("--a", "workers=0", "--b", "workers=1", "--seconds", "60")
    command = subprocess.Popen(
        commands.command("ab", *PERCEPTRON, *sides),
        cwd=tmp_path,
        env=commands.surroundings(),
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
    script = "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)\n"
    (tmp_path / "one.py").write_text(script)
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
        (("--aa", "--model", "factories:Nothing"), "factories"),
        (("--aa", "--", "nothing.py"), "nothing.py"),
        (("--aa", "-o", "file"), "--output file: is no folder"),
    ],
)
def test_bad_words_are_one_line(ab, tmp_path, words, said):
    (tmp_path / "file").write_text("")
    done = ab(*words)
    assert (done.code, done.out) == (Exit.USAGE, "")
    error, *hint = done.err.splitlines()
    assert error.startswith("error: ") and said in error
    assert len(hint) <= 1
