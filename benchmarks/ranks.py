"""Whether what is said of ranks is true: a late one is named, a slower exchange is found as exposed communication.

    python -m benchmarks.ranks [--quick] [--repeats N] [--only CHECK[,CHECK]] [--json FILE]

Worlds of 1 and 2 with gloo on this machine, one thread a rank. Nothing else may run meanwhile. It takes 25 minutes,
`--quick` five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.rank_models import BATCH, HOOK_S
from bsprof import stats, store
from bsprof.errors import Exit
from bsprof.exchange import late
from bsprof.metrics import CaseSummary, summarise
from bsprof.model import Result
from bsprof.scaling import scaled
from bsprof.sweep.runner import describe_environment

ROOT = Path(__file__).parents[1]
MODELS = "benchmarks.rank_models:"
REPEATS, QUICK_REPEATS = 20, 3
LEAST_NAMED = 0.95
MOST_NAMED_FOR_NOTHING = 0.05
HOOK_TOLERANCE = 0.10


class Found(NamedTuple):
    """What a check found, whether that is enough, and the figures behind it."""

    said: str
    reached: bool
    figures: dict[str, Any]


def bench(*arguments: str) -> Result:
    """Run `bsprof bench` on the plain model, where nothing else is asked, and return its result."""
    given = {"--model": f"{MODELS}Plain", "--data": f"{MODELS}Images", "--batch-size": str(BATCH), "--world-size": "2"}
    given |= {"--workers": "0", "--threads": "1", "--max-case-time": "4", "--telemetry-hz": "0", "--profile-steps": "0"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "r.json")
        flags = [word for pair in given.items() for word in pair]
        command = [sys.executable, "-m", "bsprof", "bench", *flags, "-o", str(output)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != Exit.DONE:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}{done.stdout}")
        return store.load(output)


def named(repeats: int, *arguments: str) -> Counter[str]:
    """Return how often which rank was named as the one that others wait for, and for which phase."""
    found: Counter[str] = Counter()
    for _ in range(repeats):
        (case,) = summarise(bench(*arguments))
        late_one = late(case.readings[0])
        found[f"rank {late_one.rank} in {late_one.phase}" if late_one else "nobody"] += 1
    return found


def check_late_forward(repeats: int) -> Found:
    """Rank 1 takes 20 ms longer in its forward pass."""
    return _all_named("rank 1 in forward", named(repeats, "--model", f"{MODELS}LateForward"))


def check_late_loader(repeats: int) -> Found:
    """Rank 1 takes 20 ms longer for its batch."""
    return _all_named("rank 1 in data", named(repeats, "--data", f"{MODELS}LateImages"))


def check_nobody_late(repeats: int) -> Found:
    """Both ranks do the same: nobody is named, however the machine's cores differ meanwhile."""
    found = named(repeats)
    wrong = repeats - found["nobody"]
    return Found(_told(found), wrong <= MOST_NAMED_FOR_NOTHING * repeats, dict(found))


def _all_named(right: str, found: Counter[str]) -> Found:
    return Found(_told(found), found[right] >= LEAST_NAMED * found.total(), dict(found))


def _told(found: Counter[str]) -> str:
    return ", ".join(f"{name}: {count} of {found.total()}" for name, count in found.most_common())


def check_hook(repeats: int) -> Found:
    """Plant 10 ms in a hook: as much more of exposed communication must come back."""
    more = []
    for _ in range(max(3, repeats // 4)):
        hooks = f"{MODELS}prompt_hook,{MODELS}slow_hook"
        cases = summarise(bench("--comm-hook", hooks, "--max-case-time", "8"))
        exposed = {str(case.settings and case.settings.comm_hook).rpartition(":")[2]: _exposed(case) for case in cases}
        more.append(exposed["slow_hook"] - exposed["prompt_hook"])
    middle = statistics.median(more)
    said = f"{1e3 * middle:.2f} ms of {1e3 * HOOK_S:.0f} ms ({', '.join(f'{1e3 * one:.2f}' for one in more)})"
    return Found(said, abs(middle / HOOK_S - 1) <= HOOK_TOLERANCE, {"more_s": more, "planted_s": HOOK_S})


def _exposed(case: CaseSummary) -> float:
    value = case.value("exposed")
    assert value is not None
    return value


def check_worlds(repeats: int) -> Found:
    """Worlds of 1 and 2 on this machine; what their starts take lies outside the window."""
    result = bench(
        *("--model", "mobilenet_v2", "--data", "synthetic", "--image-size", "64", "--world-size", "1,2"),
        *("--max-case-time", "10", "--repeat", str(max(2, repeats // 4))),
    )
    (both,) = [row for row in scaled(result, summarise(result)) if row.world == 2]
    assert both.efficiency is not None and both.split is not None
    starts = [one.startup.world_ns / 1e9 for one in result.measurements if one.startup and one.startup.world_ns]
    ends = (both.efficiency.low, both.efficiency.high)
    interval = f" [{ends[0]:.0%}, {ends[1]:.0%}]" if ends[0] is not None and ends[1] is not None else ""
    figures = {
        "efficiency": both.efficiency._asdict(),
        "split": both.split._asdict(),
        "world_start_s": starts,
        "steps": {one.case.key: stats.middle(one.samples.step_ns) for one in result.measurements if one.samples},
    }
    said = f"efficiency {both.efficiency.value:.0%}{interval}; a world takes {statistics.median(starts):.1f} s to start"
    return Found(said, bool(starts), figures)


CHECKS: dict[str, Callable[[int], Found]] = {
    "late forward": check_late_forward,
    "late loader": check_late_loader,
    "nobody late": check_nobody_late,
    "slower exchange": check_hook,
    "worlds": check_worlds,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three repeats: shows that it works, decides little")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--only", default="", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    repeats = arguments.repeats or (QUICK_REPEATS if arguments.quick else REPEATS)
    only = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(CHECKS)
    if unknown := set(only) - CHECKS.keys():
        parser.error(f"--only: no such check: {', '.join(sorted(unknown))}")
    found = {}
    for name in only:
        found[name] = CHECKS[name](repeats)
        print(f"{name:16} {found[name].said}{'' if found[name].reached else '  NOT REACHED'}", flush=True)
    if arguments.json:
        told = {"repeats": repeats, "checks": {name: one._asdict() for name, one in found.items()}}
        told["environment"] = msgspec.to_builtins(describe_environment())
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(0 if all(one.reached for one in found.values()) else 1)


if __name__ == "__main__":
    main()
