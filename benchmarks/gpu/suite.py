"""Run the checks one after another, each in a process of its own, say each verdict as it falls, and keep them all."""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces each window on stderr

import msgspec
import psutil
import torch

from benchmarks.gpu.cases import cudnn, memory, out_of_memory, profiler, sweep
from benchmarks.gpu.clocks import no_synchronisation, planted_delays, stall, sums
from benchmarks.gpu.command import ROOT, marked
from benchmarks.gpu.cost import distortion
from benchmarks.gpu.device import CudaDevice, Device, RehearsalDevice
from benchmarks.gpu.exchange import all_reduce, ddp
from benchmarks.gpu.power import energy
from benchmarks.gpu.vendor import ceilings
from benchmarks.gpu.verdict import Check, Line, Stand, Unable, fail, skip
from bsprof.model import Environment
from bsprof.sweep.runner import describe_environment

CHECKS = (
    Check(name="delays", expected_s=15, run=planted_delays),
    Check(name="stall", expected_s=8, run=stall),
    Check(name="sums", expected_s=8, run=sums),
    Check(name="sync", expected_s=6, run=no_synchronisation),
    Check(name="distortion", expected_s=40, run=distortion),
    Check(name="energy", expected_s=20, run=energy),
    Check(name="oom", expected_s=20, run=out_of_memory),
    Check(name="cudnn", expected_s=45, run=cudnn),
    Check(name="sweep", expected_s=80, run=sweep),
    Check(name="profiler", expected_s=30, run=profiler),
    Check(name="memory", expected_s=75, run=memory),
    Check(name="ceilings", expected_s=70, run=ceilings),
    Check(name="all_reduce", expected_s=25, run=all_reduce),
    Check(name="ddp", expected_s=30, run=ddp),
)
"""In this order; the expected seconds are those of an H100-class machine and only decide what still fits."""

BUDGET_S = 480.0
PATIENCE = 2.5
"""A check may take so many times what is expected, and 20 s more, before it is ended."""
SUITE = "BSPROF_ACCEPTANCE_CHECK"
"""An environment variable that every command of a check carries, so that none outlives it."""


@dataclass(kw_only=True)
class Report:
    """What was found so far."""

    device: str
    rehearsed: bool
    created: str
    environment: Environment
    wall_s: float = 0.0
    lines: list[tuple[str, Line]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, verdict: str) -> int:
        """Return how many lines have this verdict."""
        return sum(line.verdict == verdict for _, line in self.lines)

    @property
    def summary(self) -> str:
        """Verdicts in one line."""
        counts = f"{self.count('PASS')} passed, {self.count('FAIL')} failed, {self.count('SKIP')} skipped"
        return f"{'REHEARSED, no claim about any GPU: ' if self.rehearsed else ''}{counts} in {self.wall_s:.0f} s"

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "suite": "bsprof GPU acceptance",
            "created": self.created,
            "device": self.device,
            "rehearsed": self.rehearsed,
            "passed": None if self.rehearsed else self.count("FAIL") == 0,
            "wall_s": round(self.wall_s, 1),
            "seconds": self.seconds,
            "lines": [{"check": name, **asdict(line)} for name, line in self.lines],
            "environment": msgspec.to_builtins(self.environment),
        }

    def as_markdown(self, command: str) -> str:
        """Return the report for people, as reports/README.md asks for it."""
        env = self.environment
        rows = [
            [name, _word(line, self.rehearsed), line.what, line.figure, line.limit, line.reason]
            for name, line in self.lines
        ]
        table = ["| check | verdict | what | figure | limit | reason |", "|---|---|---|---|---|---|"]
        table += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
        machine = (
            f"{self.device} · {env.cpu} · {env.cores_usable} cores usable · driver {env.driver} · "
            f"torch {env.torch} · CUDA {env.cuda} · Python {env.python} · commit {env.git_commit}"
        )
        title = "# Rehearsal without a GPU: no claim" if self.rehearsed else f"# GPU acceptance on {self.device}"
        return (
            "\n\n".join(
                [
                    title,
                    "Does what bsprof says of this device hold against what is known to be true?",
                    machine,
                    f"    {command}",
                    self.summary + ".",
                    "\n".join(table),
                    "Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items()) + ".",
                ]
            )
            + "\n"
        )


def _word(line: Line, rehearsed: bool) -> str:
    return f"REHEARSED {line.verdict}" if rehearsed else line.verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for. Exit code 1 where a check failed, 2 where nothing could be checked."""
    options = _options(arguments)
    if options.list:
        for check in CHECKS:
            print(f"{check.name:12}{check.expected_s:4.0f} s  {check.about}")
        print(f"{'':12}{sum(check.expected_s for check in CHECKS):4.0f} s in all")
        return 0
    chosen = _chosen(options.only)
    environment = describe_environment()
    cuda = [one for one in environment.accelerators if one.kind == "cuda"]
    if not cuda and not options.rehearse:
        print("error: no CUDA device here\nhint: --rehearse runs the same code without one", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.UTC)
    report = Report(
        device=RehearsalDevice.name if options.rehearse else cuda[0].name,
        rehearsed=options.rehearse,
        created=now.isoformat(timespec="seconds"),
        environment=environment,
    )
    device: Device = RehearsalDevice() if options.rehearse else CudaDevice(report.device)
    target = _target(options, report.device, now)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bsprof-acceptance-") as name:
        folder = Path(name)
        for check in chosen:
            left_s = options.budget - (time.monotonic() - started)
            began = time.monotonic()
            lines = run_check(check, device, folder, left_s)
            for line in lines:
                print(f"{_word(line, options.rehearse)}  {check.name}: {line}", flush=True)
                report.lines.append((check.name, line))
            report.seconds[check.name] = round(time.monotonic() - began, 1)
            report.wall_s = time.monotonic() - started
            if target:
                _save(report, target)  # after each check: whatever ends the suite, what was found is there
    print(report.summary)
    if target:
        print(f"saved {target.with_suffix('.json')} and {target.with_suffix('.md').name}")
    return 1 if report.count("FAIL") else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the checks and what each expects, run nothing")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="run these checks")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds in all [%(default)g]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the two reports [reports/<device>]")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every check's code on the CPU with stand-ins; claims nothing"
    )
    options = parser.parse_args(arguments)
    if options.rehearse and options.out and options.out.resolve().is_relative_to(ROOT / "reports"):
        parser.error("--out: a rehearsal is no report")
    if options.only:
        unknown = set(options.only.split(",")) - {check.name for check in CHECKS}
        if unknown:
            parser.error(f"--only: no check named {', '.join(sorted(unknown))}; --list shows them")
    return options


def _chosen(only: str | None) -> list[Check]:
    names = only.split(",") if only else [check.name for check in CHECKS]
    return [check for check in CHECKS if check.name in names]


def _target(options: argparse.Namespace, device: str, now: datetime.datetime) -> Path | None:
    """Return where the two files go, without their suffix; None for a rehearsal that names no folder."""
    if options.rehearse and options.out is None:
        return None
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return (options.out or ROOT / "reports" / slug) / f"{now:%Y-%m-%d}-acceptance"


def _save(report: Report, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.gpu" + (" --rehearse" if report.rehearsed else "")
    for suffix, text in (
        (".json", json.dumps(report.as_json(), indent=1) + "\n"),
        (".md", report.as_markdown(command)),
    ):
        path = target.with_suffix(suffix)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


# --- one check --------------------------------------------------------------------------------------


def run_check(check: Check, device: Device, folder: Path, left_s: float) -> Iterator[Line]:
    """Yield the lines of `check` as they come from its process. It is ended when it takes too long."""
    if left_s < check.expected_s and not device.rehearsed:
        yield skip(check.name, f"expects {check.expected_s:.0f} s, and {max(0.0, left_s):.0f} s of the budget are left")
        return
    limit_s = min(PATIENCE * check.expected_s + 20, left_s)
    # A fork: torch is loaded already, and CUDA is first touched in the child, so that no check inherits another's.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    os.environ[SUITE] = uuid.uuid4().hex
    process = context.Process(target=_enter, args=(check, device, folder, sender), name=check.name)
    process.start()
    sender.close()
    deadline = time.monotonic() + limit_s
    complete = late = False
    found = 0
    try:
        while (left := deadline - time.monotonic()) > 0 and receiver.poll(left):
            line = receiver.recv()
            if line is None:
                complete = True
                break
            found += 1
            yield line
        else:
            yield fail(check.name, f"still running after {limit_s:.0f} s, ended")
            late = True
    except EOFError:
        pass  # it died in the middle
    finally:
        if complete:
            process.join(10)
        _end(process)
        receiver.close()
    if not complete and not late:
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        yield fail(check.name, f"its process died: {how}")
    elif not found and process.exitcode == 0:
        yield fail(check.name, "it checked nothing")


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End the check's process group and every command that it started, and reap it."""
    assert process.pid is not None
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # it has not got its own group yet
    process.join()
    for left in marked(os.environ[SUITE], variable=SUITE):
        try:
            left.kill()
        except psutil.Error:
            continue


def _enter(check: Check, device: Device, folder: Path, lines: Connection) -> None:
    """Run `check` in this process, a group of its own, and send what it says; None is its end."""
    os.setpgid(0, 0)
    if device.rehearsed:
        torch.set_num_threads(1)
    own = folder / check.name
    own.mkdir()
    try:
        for line in check.run(Stand(device=device, folder=own, cache=folder / "cache")):
            lines.send(line)
    except Unable as reason:
        lines.send(fail(check.name, str(reason)))
    except BaseException as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"crashed: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        lines.send(fail(check.name, " ".join(text.split())))
    lines.send(None)
    lines.close()
    shutil.rmtree(own, ignore_errors=True)
