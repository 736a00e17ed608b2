"""The promises of `bsprof bench`, each measured on this machine and held against its limit.

    python benchmarks/truths.py [--json FILE]

Runs the default plan in a pseudo-terminal (so that the progress is really drawn), reads what it left, and times the
command line in pairs. About four minutes; nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import psutil

from bsprof import metrics, store
from bsprof.model import Case, Measurement, Outcome, Result, Samples, Settings
from bsprof.sweep.runner import describe_environment

BSPROF = (sys.executable, "-m", "bsprof")


class Verdicts:
    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, what: str, value: float, limit: float, unit: str, *, at_least: bool = False) -> None:
        passed = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        print(f"{'ok  ' if passed else 'FAIL'}  {what}: {value:.3g} {unit} ({sign} {limit:g})", flush=True)
        self.rows.append({"what": what, "value": value, "limit": limit, "unit": unit, "ok": passed})


def run_in_terminal(arguments: list[str], directory: Path) -> float:
    """Run bsprof in a pseudo-terminal and return the share of one core that the parent alone used while cases ran."""
    master, slave = pty.openpty()
    process = subprocess.Popen([*BSPROF, *arguments], cwd=directory, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    threading.Thread(target=_drain, args=(master,), daemon=True).start()
    readings: list[tuple[float, float]] = []
    while process.poll() is None:
        if list(directory.glob("*.journal")):
            used = psutil.Process(process.pid).cpu_times()
            readings.append((time.monotonic(), used.user + used.system))
        time.sleep(0.25)
    # The last second writes the result and the table: no case is running then.
    until = [r for r in readings if r[0] <= readings[-1][0] - 1.0]
    return (until[-1][1] - until[0][1]) / (until[-1][0] - until[0][0])


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        pass


def ratio_of_starts(command: list[str], pairs: int = 15) -> float:
    """Return the median over pairs of `command`'s wall time against that of an empty Python program."""
    ratios = []
    for _ in range(pairs):
        times = []
        for arguments in ([sys.executable, "-c", "pass"], command):
            start = time.perf_counter()
            subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
            times.append(time.perf_counter() - start)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def large_result(like: Result, cases: int, steps: int) -> Result:
    measurements = []
    for i in range(cases):
        step = [200_000_000 + (i * 7919 + j * 104729) % 50_000_000 for j in range(steps)]
        share = {"data": 20, "h2d": 1000, "forward": 4, "backward": 3, "optimizer": 50}
        samples = Samples(
            batch_size=32, step_ns=step, host_ns={phase: [t // d for t in step] for phase, d in share.items()}
        )
        case = Case(key=f"{i:012x}", settings=Settings(batch_size=i + 1))
        measurements.append(Measurement(case=case, outcome=Outcome(kind="ok"), wall_s=1.0, samples=samples))
    return msgspec.structs.replace(like, measurements=measurements)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    verdicts = Verdicts()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        started = time.monotonic()
        parent_share = run_in_terminal(["bench", "-o", "default.json"], directory)
        verdicts.add("default plan", time.monotonic() - started, 150, "s")
        result = store.load(directory / "default.json")
        ok = [m for m in result.measurements if m.outcome.kind == "ok"]
        verdicts.add("cases measured", len(ok), len(result.measurements), "cases", at_least=True)
        residuals = [case.value("residual") for case in metrics.summarise(result)]
        largest = max(float("inf") if residual is None else abs(residual) for residual in residuals)
        verdicts.add("largest residual, without its sign", 100 * largest, 1, "% of the step")
        starts = [m.startup.process_ns / 1e9 for m in ok if m.startup and m.startup.process_ns is not None]
        verdicts.add("slowest start of a case", max(starts), 0.5, "s")
        outside = [m.wall_s - (m.inside_s or 0) for m in ok]
        verdicts.add("most of a case's time outside its own code", max(outside), 0.5, "s")
        inside = sum(m.inside_s or 0 for m in result.measurements) / (result.wall_s or 1)
        verdicts.add("share of the sweep inside cases", 100 * inside, 80, "%", at_least=True)
        verdicts.add("parent's share of one core", 100 * parent_share, 2, "%")
        started = time.monotonic()
        run_in_terminal(["bench", "--quick", "-o", "quick.json"], directory)
        verdicts.add("quick plan", time.monotonic() - started, 45, "s")
        verdicts.add("--help against `python -c pass`", ratio_of_starts([*BSPROF, "--help"]), 6, "x")
        large = directory / "large.json"
        store.save(large_result(result, 1000, 1000), large)
        verdicts.add("1,000 cases x 1,000 steps on disk", large.stat().st_size / 1e6, 80, "MB")
        loads = []
        for _ in range(5):
            start = time.perf_counter()
            store.load(large)
            loads.append(time.perf_counter() - start)
        verdicts.add("loading it", statistics.median(loads), 1.5, "s")
    if arguments.json:
        found = {"verdicts": verdicts.rows, "environment": msgspec.to_builtins(describe_environment())}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if all(row["ok"] for row in verdicts.rows) else 1)


if __name__ == "__main__":
    main()
