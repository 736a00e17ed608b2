"""How often a gate fires though nothing has changed, and how small a slow-down it finds.

    python -m benchmarks.gate_study [--quick] [--runs N] [--only SCENE[,SCENE]] [--json FILE]

Runs `bsprof ab` again and again on a small training loop: against itself, against itself with more work in the forward
pass (what that really adds is the geometric mean over all runs), and against itself beside a program that keeps a core
busy. The rules that people use are applied to the same processes, one process a side as they are used: side A of one
process against side B of the next. Nothing else may run meanwhile. The whole takes an hour, `--quick` 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, mannwhitneyu

from benchmarks.hogs import hogs
from bsprof import store
from bsprof.errors import Exit
from bsprof.readings import Reading
from bsprof.sweep.runner import describe_environment

ROOT = Path(__file__).parents[2]
FACTORY = "benchmarks.gate_study.models:"
LOOP = ["--data", "synthetic", "--image-size", "32", "--batch-size", "32", "--threads", "1"]
BUDGET_S = 24.0
MEAN_RULE = 0.05
"""pytest-benchmark's `--benchmark-compare-fail=mean:5%`."""
LEVEL = 0.05


class Scene(NamedTuple):
    """What is compared, how often, and what must come of it."""

    name: str
    b: str
    runs: int
    hogs: int = 0
    least_found: float | None = None
    """Share of runs that must find a slow-down; null where nothing has changed."""


SCENES = (
    Scene("A/A", "plain", 40),
    Scene("5 % slower", "slower_5", 20, least_found=0.95),
    Scene("2 % slower", "slower_2", 20, least_found=0.6),
    Scene("A/A beside a hog", "plain", 20, hogs=1),
)


class Run(NamedTuple):
    """One `bsprof ab`, and what other rules say of its processes."""

    scene: str
    verdict: str
    ratio: float
    low: float | None
    high: float | None
    detectable: float | None
    pairs: int
    asked: int
    wall_s: float
    mean_rule: tuple[int, int]
    """Times that it fired, of how many comparisons of one process a side."""
    mann_whitney: tuple[int, int]


def run(scene: Scene, budget_s: float) -> Run:
    """Carry `bsprof ab` out and apply the other rules to what it measured."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache, hogs(scene.hogs):
        sides = ["--aa", "--model", f"{FACTORY}plain"]
        if scene.least_found is not None:
            sides = ["--a", f"model={FACTORY}plain", "--b", f"model={FACTORY}{scene.b}"]
        command = [sys.executable, "-m", "bsprof", "ab", *sides, *LOOP]
        command += ["--budget", str(budget_s), "--format", "json", "-o", folder]
        began = time.monotonic()
        # A cache of its own: a floor that one run keeps must not refuse the next one's threshold.
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        wall_s = time.monotonic() - began
        if done.returncode not in (Exit.DONE, Exit.VERDICT):
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        (case,) = json.loads(done.stdout)["cases"]
        a, b = (store.load(Path(folder, f"{side}.json")) for side in "ab")
    (change,) = case["gated"]
    # How these rules are used: one process a side, so no two that took turns.
    steps = [[Reading(one.samples).step for one in side.measurements if one.samples] for side in (a, b)]
    crossed = [(steps[0][i], steps[1][(i + 1) % len(steps[1])]) for i in range(len(steps[0]))]
    assert a.turns is not None
    return Run(
        scene.name,
        case["verdict"],
        change["ratio"],
        change["low"],
        change["high"],
        change["detectable"],
        case["base_processes"],
        a.turns.asked,
        wall_s,
        (sum(mean_differs(*both) for both in crossed), len(crossed)),
        (sum(ranks_differ(*both) for both in crossed), len(crossed)),
    )


def mean_differs(base: NDArray[np.float64], new: NDArray[np.float64]) -> bool:
    return bool(abs(new.mean() / base.mean() - 1) > MEAN_RULE)


def ranks_differ(base: NDArray[np.float64], new: NDArray[np.float64]) -> bool:
    return bool(mannwhitneyu(base, new).pvalue < LEVEL)


class Row(NamedTuple):
    """What came of a scene."""

    scene: str
    runs: int
    slower: int
    faster: int
    unchanged: int
    inconclusive: int
    change: float
    """Geometric mean of all ratios, less 1."""
    half_width: float
    """Median half of the interval of ln(b / a)."""
    detectable: float
    pairs: float
    wall_s: float
    mean_rule: tuple[int, int]
    mann_whitney: tuple[int, int]
    reached: bool


def row(scene: Scene, runs: list[Run]) -> Row:
    counts = {verdict: sum(one.verdict == verdict for one in runs) for verdict in ("regressed", "improved")}
    false = counts["improved"] + (counts["regressed"] if scene.least_found is None else 0)
    reached = false <= LEVEL * len(runs)
    if scene.least_found is not None:
        reached &= counts["regressed"] >= scene.least_found * len(runs)
        reached &= not any(one.verdict == "unchanged" for one in runs)
    halves = [math.log(one.high / one.low) / 2 for one in runs if one.low and one.high]
    return Row(
        scene.name,
        len(runs),
        counts["regressed"],
        counts["improved"],
        sum(one.verdict == "unchanged" for one in runs),
        sum(one.verdict == "inconclusive" for one in runs),
        math.expm1(float(np.mean([math.log(one.ratio) for one in runs]))),
        float(np.median(halves)),
        float(np.median([one.detectable for one in runs if one.detectable is not None])),
        float(np.mean([one.pairs for one in runs])),
        float(np.mean([one.wall_s for one in runs])),
        _sum(one.mean_rule for one in runs),
        _sum(one.mann_whitney for one in runs),
        reached,
    )


def _sum(pairs: Iterator[tuple[int, int]]) -> tuple[int, int]:
    fired, of = zip(*pairs, strict=True)
    return sum(fired), sum(of)


def show(rows: list[Row]) -> None:
    print(
        f"\n{'':18}{'runs':>5}{'slower':>8}{'faster':>8}{'unchanged':>11}{'undecided':>11}{'change':>9}{'±':>7}"
        f"{'pairs':>7}{'time':>7}{'mean:5%':>10}{'M-W':>7}"
    )
    for one in rows:
        fired = [f"{100 * count / of:.0f} %" for count, of in (one.mean_rule, one.mann_whitney)]
        print(
            f"{one.scene:18}{one.runs:5}{one.slower:8}{one.faster:8}{one.unchanged:11}{one.inconclusive:11}"
            f"{100 * one.change:+8.2f}%{100 * one.half_width:6.2f}%{one.pairs:7.1f}{one.wall_s:5.0f} s"
            f"{fired[0]:>10}{fired[1]:>7}{'' if one.reached else '  NOT REACHED'}"
        )
        if one.slower + one.faster and "A/A" in one.scene:
            low, high = binomtest(one.slower + one.faster, one.runs).proportion_ci(method="wilson")
            print(f"{'':18}false verdicts: between {100 * low:.1f} and {100 * high:.1f} % (Wilson, 95 %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three runs a scene: shows that it works, decides little")
    parser.add_argument("--runs", type=int, help="of each scene, in place of its own number")
    parser.add_argument("--only", default="", help="scenes, with commas between")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="of each run, in seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    if unknown := only - {scene.name for scene in SCENES}:
        parser.error(f"--only: no such scene: {', '.join(sorted(unknown))}")
    scenes = [scene for scene in SCENES if not only or scene.name in only]
    runs: dict[str, list[Run]] = {scene.name: [] for scene in scenes}
    counts = {scene.name: arguments.runs or (3 if arguments.quick else scene.runs) for scene in scenes}
    # Scenes in turns, so that the machine's slow drift meets all of them.
    for number in range(max(counts.values())):
        for scene in scenes:
            if number * counts[scene.name] // max(counts.values()) < len(runs[scene.name]):
                continue
            one = run(scene, arguments.budget)
            runs[scene.name].append(one)
            interval = "" if one.low is None or one.high is None else f" [{one.low - 1:+.2%}, {one.high - 1:+.2%}]"
            print(
                f"{scene.name:18} {one.verdict:13} {one.ratio - 1:+.2%}{interval}"
                f" {one.pairs} pairs of {one.asked}, {one.wall_s:.0f} s",
                flush=True,
            )
    rows = [row(scene, runs[scene.name]) for scene in scenes]
    show(rows)
    if arguments.json:
        found = {"rows": [one._asdict() for one in rows], "budget_s": arguments.budget}
        found["runs"] = [one._asdict() for scene in scenes for one in runs[scene.name]]
        found["environment"] = msgspec.to_builtins(describe_environment())
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if all(one.reached for one in rows) else 1)


if __name__ == "__main__":
    main()
