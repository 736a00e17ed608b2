"""The command line, run as a user runs it: in a directory of its own, and where it matters in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import psutil
import pytest

from bsprof import cli, store
from bsprof.model import Measurement, Result
from bsprof.sweep.process import call

TESTS = Path(__file__).parent
FAST = ("--max-case-time", "0.6", "--precision", "0.5", "--order", "listed", "--batch-size", "4")
TINY = ("--model", "factories:Perceptron", "--data", "factories:Pixels", "--workers", "0", *FAST)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bsprof", *arguments]


def surroundings(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": paths, "COLUMNS": "140", **more}


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, whose fork server has torch already: a case's own process is as real as ever."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        contextlib.chdir(directory),
        mock.patch.dict(os.environ, surroundings()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main(list(arguments))
    told, complained = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert "Traceback" not in complained, complained
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), told, complained)


def run_apart(directory: Path, *arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, below the command `prefix` if one is given."""
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


def interpret(code: str, *arguments: str, **variables: str) -> bytes:
    """Return what a program prints in a process of its own; it comes from the fork server, which has torch already."""
    question = json.dumps({"code": code, "arguments": arguments, "variables": variables}).encode()
    reply = call("commands:_interpret", question, deadline_s=120)
    assert reply.value is not None, reply.death
    return json.loads(reply.value).encode("latin-1")


def _interpret(payload: bytes, requested_ns: int, emit: object) -> bytes:
    asked = json.loads(payload)
    os.environ |= asked["variables"]
    sys.argv = ["program", *asked["arguments"]]
    sys.modules["__main__"] = ModuleType("__main__")  # what the program defines is found there by name, as by pickle
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), write_through=True)) as out:
        exec(asked["code"], vars(sys.modules["__main__"]))
    return json.dumps(out.buffer.getvalue().decode("latin-1")).encode()


def eventually(holds: Callable[[], bool], within_s: float = 15.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False


def ended(pids: Sequence[int], within_s: float = 15.0) -> bool:
    return eventually(
        lambda: not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"],
        within_s,
    )


def only_result(directory: Path) -> Result:
    (path,) = directory.glob("bsprof-*.json")
    assert not list(directory.glob("*.journal"))
    return store.load(path)


def by_name(result: Result, axis: str) -> dict[str, Measurement]:
    return {str(getattr(m.case.settings, axis)).rpartition(":")[2]: m for m in result.measurements}


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
    "--max-case-time", "0.7", "--batch-size", "1,2,3,4,5,6",
)  # fmt: skip
