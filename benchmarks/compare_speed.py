"""How long `bsprof compare` takes for two results with many cases, as a user waits for it.

    python benchmarks/compare_speed.py [--cases 1000] [--processes 5] [--steps 60] [--json FILE]

Two results are made up and saved, and the whole command is timed in a process of its own, `--rounds` times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from bsprof import store
from bsprof.model import Case, Environment, Facts, Measurement, Outcome, Result, Samples, Settings, case_key
from bsprof.sweep.runner import describe_environment

LIMIT_S = 2.0


def made_up(cases: int, processes: int, steps: int, seed: int, environment: Environment) -> Result:
    """Return a result of so many cases, each with phases that add up and medians that scatter between processes."""
    random = np.random.default_rng(seed)
    measurements = []
    for number in range(cases):
        settings = Settings(batch_size=number + 1)
        for process in range(processes):
            scale = 1e7 * random.lognormal(0, 0.02)
            phases = {
                name: (scale * share * random.lognormal(0, 0.05, steps)).astype(np.int64)
                for name, share in (("data", 0.2), ("forward", 0.3), ("backward", 0.4), ("optimizer", 0.1))
            }
            samples = Samples(
                batch_size=settings.batch_size,
                step_ns=sum(phases.values()).tolist(),
                host_ns={name: times.tolist() for name, times in phases.items()},
            )
            measurements.append(
                Measurement(
                    case=Case(key=case_key(settings), settings=settings, process=process),
                    outcome=Outcome(kind="ok"),
                    wall_s=1.0,
                    facts=Facts(device="cpu", threads=1),
                    samples=samples,
                )
            )
    return Result(created="2031-01-01T00:00:00Z", plan=None, environment=environment, measurements=measurements)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    environment = describe_environment()
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, name) for name in ("base.json", "new.json")]
        for seed, path in enumerate(paths):
            store.save(made_up(arguments.cases, arguments.processes, arguments.steps, seed, environment), path)
        size = sum(path.stat().st_size for path in paths)
        times = []
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            command = [sys.executable, "-m", "bsprof", "compare", *map(str, paths), "--format", "json"]
            done = subprocess.run(command, capture_output=True, check=False)
            times.append(time.perf_counter() - began)
            assert done.returncode in (0, 1), done.stderr.decode()
            assert len(json.loads(done.stdout)["cases"]) == arguments.cases
    median = statistics.median(times)
    reached = median <= LIMIT_S
    print(
        f"{arguments.cases} cases of {arguments.processes} processes and {arguments.steps} steps on either side, "
        f"{size / 2**20:.0f} MiB: {median:.2f} s ({min(times):.2f} to {max(times):.2f}) <= {LIMIT_S:g} s: "
        f"{'yes' if reached else 'NO'}"
    )
    if arguments.json:
        figures = {"cases": arguments.cases, "seconds": times, "bytes": size, "limit_s": LIMIT_S}
        machine = msgspec.to_builtins(environment)
        arguments.json.write_text(json.dumps({**figures, "environment": machine}, indent=1) + "\n")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
