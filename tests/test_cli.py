"""The command line without any measuring: help, usage errors, saved results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden" / "result-schema-1.json"


def bsprof(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bsprof", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_help_names_every_command_and_bench_names_every_axis():
    from bsprof.model import AXES

    top = bsprof("--help")
    assert top.returncode == 0
    for name in ("bench", "show", "env", "selftest", "workloads"):
        assert name in top.stdout
    bench = bsprof("bench", "--help").stdout
    for name in AXES:
        assert "--" + name.replace("_", "-") in bench


def test_version():
    from importlib.metadata import version

    assert bsprof("--version").stdout.split()[-1] == version("bsprof")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--batch-size", "64,x"), "--batch-size: expected a whole number, got 'x'"),
        (("bench", "--amp", "bf17"), "--amp: 'bf17' is none of off, bf16, fp16"),
        (("bench", "--batchsize", "64"), "--batchsize"),
        (("bench", "--host-memory", "lots"), "--host-memory: 'lots' is no size"),
        (("bench", "-o", "out.txt"), "--output out.txt"),
        (("bench", "--resume", "missing.json"), "missing.json"),
        (("bench", "--plan", "missing.toml"), "missing.toml"),
        (("show", "missing.json"), "missing.json"),
        (("show",), "RESULT"),
        (("bnech",), "bnech"),
    ],
)
def test_usage_errors_are_one_line_and_a_hint(arguments, message, tmp_path):
    done = bsprof(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("[axes]\nbatch_size = [64, 'x']\n", ["$.axes.batch_size[1]", "expected int"]),
        ("[axes]\nbatchsize = [64]\n", ["batchsize", "batch_size"]),
        ("[axes\nbatch_size = [64]\n", ["line 1"]),
        ("[stop]\nprecision = 7\n", ["$.stop.precision"]),
        ("repeat = 0\n", ["$.repeat"]),
    ],
)
def test_a_malformed_plan_names_line_or_path(text, messages, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    done = bsprof("bench", "--plan", str(plan))
    assert done.returncode == 2
    assert str(plan) in done.stderr
    for message in messages:
        assert message in done.stderr


def test_axes_beside_a_plan_are_refused(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text("[axes]\nbatch_size = [4]\n")
    done = bsprof("bench", "--plan", str(plan), "--workers", "1")
    assert done.returncode == 2
    assert "--workers" in done.stderr


def test_show_prints_a_saved_result():
    done = bsprof("show", str(GOLDEN))
    assert done.returncode == 0, done.stderr
    assert "forward" in done.stdout
    assert "\x1b[" not in done.stdout


def test_show_refuses_a_newer_schema(tmp_path):
    newer = json.loads(GOLDEN.read_text())
    newer["schema"] = 99
    path = tmp_path / "newer.json"
    path.write_text(json.dumps(newer))
    done = bsprof("show", str(path))
    assert done.returncode == 2
    assert "99" in done.stderr
    assert "hint:" in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m bsprof show {GOLDEN} | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""
