"""Plants faults in data loaders and counts how often `bsprof` names them first, and stays silent without them.

    python -m benchmarks.loader.zoo [--quick] [--only CODE,…] [--methods fork,spawn] [--repeats N] [--json FILE]
                                    [--keep DIR] [--plain]

Every fault of `scenes.FAULTS` runs under each way of starting workers that applies, `--repeats` times, at a scale that
changes from one to the next; and as often without the fault. Each run has a process of its own and a deadline. A run
is right when the planted cause is ranked first (of two, both named and the larger first; beside a CPU hog, both named),
and one without a fault when nothing is raised. `--quick`: once, fork only. `--plain` takes no diagnosis but a
stopwatch: what the planted fault costs in a bare loop, to check the zoo itself. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.hogs import hogs
from benchmarks.loader import one
from benchmarks.loader.scenes import FAULTS, FORK, SPAWN, Fault
from bsprof.sweep.runner import describe_environment

ROOT = Path(__file__).parents[2]
SCALES = (1.0, 0.5, 2.0)
REPEATS = 5
WANTED = 0.95
"""Share of runs with a fault that must be right."""
DEADLINE_S = 120.0
PLAIN_COST = 1.15
"""A planted fault must make a batch take at least so many times as long as without it, and the twin at most so many
times as long as its step: handing a batch over and going round an epoch are not free."""


class Run(NamedTuple):
    """One process: a fault or its twin under some conditions."""

    fault: Fault
    method: str
    scale: float
    healthy: bool

    def __str__(self) -> str:
        return f"{self.fault.name} {self.method} x{self.scale:g}{' healthy' if self.healthy else ''}"


class Told(NamedTuple):
    """What came of it."""

    run: Run
    right: bool | None
    """None where this machine cannot have the fault."""
    said: str
    found: dict[str, Any]
    wall_s: float


def judge(fault: Fault, healthy: bool, found: dict[str, Any]) -> tuple[bool | None, str]:
    """Return whether the diagnosis is right, and what it said in short."""
    if "unable" in found:
        return None, found["unable"]
    if "failed" in found:
        return False, found["failed"]
    causes = found["causes"]
    said = ", ".join(f"{c['code']} {_percent(c['gives_back'])}" for c in causes) or f"nothing ({found['verdict']})"
    if healthy:
        return not causes, said
    places = [
        next((i for i, cause in enumerate(causes) if _is_named(cause, wanted.code, wanted.names)), None)
        for wanted in fault.causes
    ]
    if None in places:
        return False, said
    if fault.hogged and len(places) > 1:
        return True, said
    return places[0] == 0 and places == sorted(places), said  # type: ignore[type-var]


def _is_named(cause: dict[str, Any], code: str, names: str) -> bool:
    return cause["code"] == code and names in f"{cause['text']} {cause['evidence']}"


def _percent(share: float | None) -> str:
    return "risk" if share is None else f"{100 * share:.0f} %"


def command_of(run: Run, out: Path, extra: list[str]) -> list[str]:
    """Return the command for one run, in a mount namespace where its shared memory is limited."""
    command = [sys.executable, "-m", "benchmarks.loader.one", run.fault.name, "--out", str(out)]
    command += ["--method", run.method, "--scale", str(run.scale), *(["--healthy"] if run.healthy else []), *extra]
    if run.fault.shm_mb is None:
        return command
    size = round(run.fault.shm_mb[run.healthy] * run.scale)
    mount = f'mount -t tmpfs -o size={size}m tmpfs /dev/shm && exec "$@"'
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", *as_root, "sh", "-c", mount, "sh", *command]


def _enter(words: list[str], output: str) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method(None, force=True)  # a forked server's child would start workers as it was started
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    one.main(words)


def in_a_fork(words: list[str], out: Path, deadline_s: float) -> dict[str, Any]:
    """Do what `in_a_process` does with `benchmarks.loader.one`, in a child that has its imports already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.loader.one", "bsprof.loader.watching", "torchvision"])
    output = out.with_suffix(".txt")
    process = context.Process(target=_enter, args=(words, str(output)))
    process.start()
    assert process.pid is not None
    try:
        process.join(deadline_s)
        code = process.exitcode
        failed = f"not done after {deadline_s:g} s" if code is None else f"exit code {code}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return _found(out, failed, output.read_text(errors="replace") if output.exists() else "")


def _found(out: Path, failed: str, said: str) -> dict[str, Any]:
    if out.exists():
        found: dict[str, Any] = json.loads(out.read_text())
        return found
    return {"failed": ": ".join([failed, *said.strip().splitlines()[-1:]])}


def in_a_process(command: list[str], out: Path, deadline_s: float) -> dict[str, Any]:
    """Run a command that writes JSON to `out`; a hang or a crash is a result as well, and nothing of it is left."""
    with tempfile.TemporaryFile() as output:
        # A process group, for the workers, and no session: the scheduler shares cores out by session first.
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, process_group=0)
        try:
            process.wait(deadline_s)
            failed = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {deadline_s:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return _found(out, failed, output.read().decode(errors="replace"))


def can_limit_shm() -> bool:
    """Whether a mount namespace may be made."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    mount = ["unshare", "--mount", *as_root, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def carry_out(run: Run, extra: list[str], deadline_s: float = DEADLINE_S) -> tuple[dict[str, Any], float]:
    if run.fault.shm_mb is not None and not can_limit_shm():
        return {"unable": "no mount namespace may be made here"}, 0.0
    started = time.monotonic()
    hogged = run.fault.hogged and not run.healthy
    with tempfile.TemporaryDirectory() as directory, hogs(len(os.sched_getaffinity(0)) if hogged else 0):
        out = Path(directory) / "found.json"
        command = command_of(run, out, extra)
        if run.fault.shm_mb is None:
            found = in_a_fork(command[3:], out, deadline_s)
        else:
            found = in_a_process(command, out, deadline_s)
    return found, time.monotonic() - started


def planned(only: set[str], methods: set[str], repeats: int) -> list[Run]:
    """Return the runs, repeats outermost, so that a machine's slow drift meets all faults alike."""
    return [
        Run(fault, method, SCALES[repeat % len(SCALES)], healthy)
        for repeat in range(repeats)
        for fault in FAULTS
        if not only or fault.name in only or any(cause.code in only for cause in fault.causes)
        for method in fault.methods
        if method in methods
        for healthy in (False, True)
    ]


def diagnose_all(runs: list[Run], extra: list[str], keep: Path | None) -> list[Told]:
    told = []
    for i, run in enumerate(runs):
        saved = [] if keep is None else ["--keep", str(keep / f"{str(run).replace(' ', '_')}_{i}.json")]
        found, wall_s = carry_out(run, extra + saved)
        right, said = judge(run.fault, run.healthy, found)
        mark = {True: "ok  ", False: "MISS", None: "n/a "}[right]
        print(f"{mark} {i + 1:4}/{len(runs)} {wall_s:4.0f} s  {run!s:46} {said}", flush=True)
        told.append(Told(run, right, said, found, wall_s))
    return told


def summarise(told: list[Told]) -> bool:
    """Print a row for each fault and the totals; return whether both are reached."""
    print(f"\n{'fault':24}{'named':>9}{'twin silent':>13}   said instead")
    for fault in FAULTS:
        rows = [t for t in told if t.run.fault.name == fault.name]
        if not rows:
            continue
        counts = []
        for healthy in (False, True):
            judged = [t.right for t in rows if t.run.healthy == healthy and t.right is not None]
            counts.append(f"{sum(judged)}/{len(judged)}" if judged else "n/a")
        instead = sorted({t.said for t in rows if t.right is not True})
        print(f"{fault.name:24}{counts[0]:>9}{counts[1]:>13}   {'; '.join(instead)}")
    reached = True
    for what, healthy, wanted in (("faults named first", False, WANTED), ("twins without a cause", True, WANTED)):
        judged = [t.right for t in told if t.run.healthy == healthy and t.right is not None]
        share = sum(judged) / len(judged) if judged else 0.0
        reached &= share >= wanted
        print(f"{what}: {sum(judged)} of {len(judged)} ({100 * share:.1f} %, wanted {100 * wanted:g} %)")
    return reached


def check_with_stopwatch(runs: list[Run], extra: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """Print what each fault costs in a bare loop; return the rows and whether each costs enough, its twin nothing."""
    print(f"{'run':46}{'step':>9}{'with':>9}{'without':>9}{'ratio':>7}{'first batch':>16}")
    rows, all_right = [], True
    for run in runs:
        if run.healthy:
            continue
        with_fault, _ = carry_out(run, ["--plain", *extra])
        without, _ = carry_out(run._replace(healthy=True), ["--plain", *extra])
        missing = [found[key] for found in (with_fault, without) for key in ("unable", "failed") if key in found]
        if missing:
            all_right &= "failed" not in with_fault and "failed" not in without
            print(f"{run!s:46}{missing[0]}", flush=True)
            rows.append({"run": str(run), "with": with_fault, "without": without})
            continue
        ratio = with_fault["batch_s"] / without["batch_s"]
        twin = without["batch_s"] / without["step_s"]
        right = twin <= PLAIN_COST and (ratio >= PLAIN_COST or not run.fault.costs_steps)
        all_right &= right
        first = f"{with_fault['start_s']:.2f} / {without['start_s']:.2f} s"
        figures = (without["step_s"], with_fault["batch_s"], without["batch_s"])
        cells = "".join(f"{1e3 * s:6.1f} ms" for s in figures)
        print(f"{run!s:46}{cells}{ratio:7.2f}{first:>16}{'' if right else '  NOT AS PLANTED'}", flush=True)
        rows.append({"run": str(run), "with": with_fault, "without": without, "ratio": ratio, "right": right})
    return rows, all_right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat, fork only")
    parser.add_argument("--only", default="", help="names of faults or codes of causes, with commas between")
    parser.add_argument("--methods", default=f"{FORK},{SPAWN}", help="of starting workers, with a comma between")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--seconds", type=float, help="to watch each, without the start of its workers")
    parser.add_argument("--plain", action="store_true", help="a stopwatch instead of a diagnosis")
    parser.add_argument("--keep", type=Path, help="a folder for what was recorded")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    unknown = only - {f.name for f in FAULTS} - {cause.code for f in FAULTS for cause in f.causes}
    if unknown:
        parser.error(f"--only: no such fault: {', '.join(sorted(unknown))}")
    methods = {FORK} if arguments.quick else set(arguments.methods.split(","))
    if not methods <= {FORK, SPAWN}:
        parser.error(f"--methods: {arguments.methods}: expected {FORK}, {SPAWN} or both")
    runs = planned(only, methods, 1 if arguments.quick else arguments.repeats)
    extra = [] if arguments.seconds is None else ["--seconds", str(arguments.seconds)]
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing stays behind
    found: dict[str, Any]
    if arguments.plain:
        rows, reached = check_with_stopwatch(runs, extra)
        found = {"stopwatch": rows}
    else:
        if arguments.keep is not None:
            arguments.keep = arguments.keep.absolute()
            arguments.keep.mkdir(parents=True, exist_ok=True)
        told = diagnose_all(runs, extra, arguments.keep)
        reached = summarise(told)
        found = {"runs": [{**t._asdict(), "run": str(t.run), "fault": t.run.fault.name} for t in told]}
    if arguments.json:
        found["environment"] = msgspec.to_builtins(describe_environment())
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
