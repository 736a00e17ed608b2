"""A case that fails is a row of the table, and what cannot be measured is refused in one line."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from commands import FAST, MANY, TINY, by_name, only_result, run, run_apart, start, wait_for_journal


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
    done = run_apart(
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
    done = run_apart(tmp_path, "bench", *TINY, prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "hint:" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--model", "mobilnet_v2"), "mobilenet_v2"),
        (("bench", "--model", "factories:Missing"), "Missing"),
        (("bench", "--data", "nowhere:make"), "nowhere"),
        (("bench", "--data", "imagefolder:/nonexistent"), "/nonexistent"),
        (("bench", "--data", "cifar10", "--data-root", "/nonexistent"), "/nonexistent"),
        (("bench", "--world-size", "2", "--scaling", "strong", "--batch-size", "3"), "shared equally by 2 ranks"),
        (("bench", *TINY, "--world-size", "2", "--comm-hook", "nowhere:hook"), "nowhere"),
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
