"""Whatever becomes of a case, the others are kept, nothing stays behind, and the user is told in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from bsprof import store
from bsprof.model import Measurement, Result

TESTS = Path(__file__).parent
FAST = ("--max-case-time", "0.6", "--precision", "0.5", "--order", "listed", "--batch-size", "4")
TINY = ("--model", "factories:Perceptron", "--data", "factories:Pixels", "--workers", "0", *FAST)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bsprof", *arguments]


def surroundings(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(Path.cwd() / "cache"), "COLUMNS": "140", **more}


def run(directory: Path, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*prefix, *command(*arguments)],
        cwd=directory,
        env=surroundings(),
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def ended(pids: Sequence[int], within_s: float = 15.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
            return True
        time.sleep(0.05)
    return False


def only_result(directory: Path) -> Result:
    (path,) = directory.glob("bsprof-*.json")
    assert not list(directory.glob("*.journal"))
    return store.load(path)


def by_name(result: Result, axis: str) -> dict[str, Measurement]:
    return {str(getattr(m.case.settings, axis)).rpartition(":")[2]: m for m in result.measurements}


def test_failures_are_data_and_the_sweep_goes_on(tmp_path):
    models = "OutOfDeviceMemory,OutOfHostMemory,Killed,Hanging,FailsInBackward,Perceptron"
    done = run(
        tmp_path, "bench", "--data", "factories:Pixels", "--workers", "0", *FAST, "--deadline", "6",
        "--host-memory", "8GiB", "--model", ",".join(f"factories:{name}" for name in models.split(",")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = by_name(only_result(tmp_path), "model")
    assert {name: m.outcome.kind for name, m in found.items()} == {
        "OutOfDeviceMemory": "oom",
        "OutOfHostMemory": "host_oom",
        "Killed": "crash",
        "Hanging": "timeout",
        "FailsInBackward": "error",
        "Perceptron": "ok",
    }
    assert found["Perceptron"].samples is not None
    assert found["OutOfDeviceMemory"].outcome.phase == "forward"
    assert 2 * 2**30 in found["OutOfDeviceMemory"].outcome.evidence.values()
    assert 64 * 2**30 in found["OutOfHostMemory"].outcome.evidence.values()
    assert "SIGKILL" in (found["Killed"].outcome.message or "")
    assert "about to hang" in str(found["Hanging"].outcome.evidence["stderr"])
    assert found["FailsInBackward"].outcome.phase == "backward"
    assert "no gradient today" in (found["FailsInBackward"].outcome.traceback or "")
    for kind in ("oom", "host_oom", "crash", "timeout", "error"):
        assert kind in done.stdout


def test_workers_that_die_or_raise_name_what_happened(tmp_path):
    done = run(
        tmp_path, "bench", "--model", "factories:Perceptron", "--workers", "2", *FAST,
        "--data", "factories:Raising,factories:KillsItsWorker,factories:Pixels",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = by_name(only_result(tmp_path), "data")
    assert found["Raising"].outcome.kind == "error"
    assert "LookupError" in (found["Raising"].outcome.message or "")
    assert "has no label" in (found["Raising"].outcome.message or "")
    assert "__getitem__" in (found["Raising"].outcome.traceback or "")
    assert found["KillsItsWorker"].outcome.kind in ("crash", "host_oom")
    assert "worker" in (found["KillsItsWorker"].outcome.message or "")
    assert found["Pixels"].outcome.kind == "ok"


def test_a_corrupt_image_is_named(tmp_path):
    from PIL import Image

    for name, colour in (("red", "red"), ("blue", "blue")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (60, 40), colour).save(folder / f"{i}.jpg")
    broken = tmp_path / "images" / "red" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    done = run(
        tmp_path, "bench", "--model", "factories:Perceptron", "--data", f"imagefolder:{tmp_path / 'images'}",
        "--workers", "0,1", "--image-size", "32", *FAST,
    )  # fmt: skip
    result = only_result(tmp_path)
    assert done.returncode == 2
    for measurement in result.measurements:
        assert measurement.outcome.kind == "error"
        assert str(broken) in (measurement.outcome.message or "")
    assert "3.jpg" in done.stdout


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode != 0,
    reason="mounting a small /dev/shm takes rights that are missing here",
)
def test_shared_memory_that_is_too_small_is_an_outcome(tmp_path):
    prefix = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"', "sh")
    done = run(
        tmp_path, "bench", "--model", "factories:Perceptron", "--data", "factories:Large", "--workers", "0,1", *FAST,
        prefix=prefix,
    )  # fmt: skip
    found = by_name(only_result(tmp_path), "workers")
    assert found["0"].outcome.kind == "ok", done.stderr
    assert found["1"].outcome.kind == "shm"
    assert found["1"].outcome.hint


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode != 0,
    reason="mounting a small disk takes rights that are missing here",
)
def test_a_full_disk_is_known_before_measuring(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=64k tmpfs {disk} && cd {disk} && "$@"; code=$?; ls {disk} >&2; exit $code'
    done = run(tmp_path, "bench", *TINY, prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "hint:" in done.stderr
    assert done.stdout == ""


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        cwd=directory,
        env=surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def wait_for_journal(directory: Path, cases: int) -> Path:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in directory.glob("*.journal"):
            if path.read_bytes().count(b"\n") >= 1 + cases:
                return path
        time.sleep(0.02)
    raise AssertionError("no case was ever finished")


MANY = (
    "--model", "factories:Perceptron", "--data", "factories:Sleepy", "--workers", "1", "--precision", "0.0001",
    "--max-case-time", "1", "--batch-size", "1,2,3,4,5,6",
)  # fmt: skip


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--model", "mobilnet_v2"), "mobilenet_v2"),
        (("bench", "--model", "factories:Missing"), "Missing"),
        (("bench", "--data", "nowhere:make"), "nowhere"),
        (("bench", "--data", "imagefolder:/nonexistent"), "/nonexistent"),
        (("bench", "--data", "cifar10", "--data-root", "/nonexistent"), "/nonexistent"),
        (("bench", "--world-size", "1,2"), "not yet supported"),
        (("bench", *TINY, "-o", "missing/out.json"), "missing"),
        (("bench", *TINY, "--trace", "out.json", "-o", "./out.json"), "out.json: is where the result goes"),
        (("bench", *TINY, "--trace", "taken/x.json"), "taken is no folder"),
        (("bench", *TINY, "--trace", "folder.json"), "folder.json: is a folder"),
        (("bench", *TINY, "--trace", "x.json", "--batch-size", "1,2", "--dry-run"), "2 cases, one file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, arguments, message):
    (tmp_path / "taken").touch()
    (tmp_path / "folder.json").mkdir()
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in done.stderr
    assert any(line.startswith("hint: ") for line in lines)
    assert done.stdout == ""
    assert not list(tmp_path.glob("bsprof-*"))


def test_a_disk_of_no_use_leaves_the_table(tmp_path):
    """A directory that vanishes while measuring: the table is still printed."""
    target = tmp_path / "gone"
    target.mkdir()
    process = start(tmp_path, "bench", *MANY, "-o", "gone/out.json")
    wait_for_journal(target, 1)
    shutil.rmtree(target)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "gone" in err
    assert "batch" in out
