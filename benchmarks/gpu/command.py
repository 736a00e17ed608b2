"""The real command line, run as a user runs it, and what it leaves behind."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import traceback
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil

from benchmarks.gpu.verdict import Stand, Unable
from bsprof import store
from bsprof.measure import forks
from bsprof.model import Measurement, Result

ROOT = Path(__file__).resolve().parents[2]
MARK = "BSPROF_ACCEPTANCE"
"""An environment variable that every process below one command carries, however its parents ended."""


class Finished(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str
    mark: str

    @property
    def complaint(self) -> str:
        """The last lines of standard error that say something, in one line."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("error:", "hint:"))] or lines[-2:]
        return " ".join(told) or f"exit code {self.code}"


def python(stand: Stand, arguments: Sequence[str], *, timeout_s: float) -> Finished:
    """Run Python from the repository's root. What runs longer is ended, with all that it started.

    It is an interpreter of its own, but for a rehearsal, where it is a fork of this process.
    """
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "XDG_CACHE_HOME": str(stand.cache),
        "KINETO_LOG_LEVEL": "99",
        MARK: mark,
    }
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A rehearsal has no device that would mind, and most of its time would be spent on importing torch.
        preexec_fn=partial(_be_python, arguments, environment) if stand.rehearsed else None,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as error:
        process.send_signal(signal.SIGINT)  # bsprof ends its cases, then itself
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in marked(mark):
            left.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unable(f"still running after {timeout_s:.0f} s: {' '.join(arguments)}") from None
        raise
    return Finished(process.returncode, out, err, mark)


def _be_python(arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do, in a fork of this process, what an interpreter with these arguments would do, and end."""
    code: object = 1
    try:
        forks.close_files()
        os.environ.clear()
        os.environ.update(environment)
        server = forkserver._forkserver  # type: ignore[attr-defined]
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None  # our parent's
        forks.serve()
        option, what, *rest = arguments
        if option == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [option, *rest]
            exec(what, {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def marked(mark: str, *, variable: str = MARK) -> list[psutil.Process]:
    """Return the processes that carry `mark` in their environment's `variable` and still live."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(variable) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def bench(stand: Stand, name: str, arguments: Sequence[str], *, timeout_s: float) -> tuple[Result, Finished]:
    """Run `bsprof bench` and return its result. Raises Unable, with what it said, where it left none."""
    target = stand.folder / f"{name}.json"
    finished = python(stand, ["-m", "bsprof", "bench", *arguments, "--output", str(target)], timeout_s=timeout_s)
    if not target.exists():
        raise Unable(f"bsprof bench: {finished.complaint}")
    return store.load(target), finished


def told(measurement: Measurement) -> str:
    """Return how a case ended, in words."""
    outcome = measurement.outcome
    return outcome.kind if outcome.kind == "ok" else f"{outcome.kind}: {outcome.message or ''}"[:160]
