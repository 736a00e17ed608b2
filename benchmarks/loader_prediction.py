"""How well the replay of one recording predicts other settings: real DataLoaders, predicted and then measured.

    python benchmarks/loader_prediction.py [--quick] [--batches 200] [--rounds 2] [--json FILE]

Each kind of batches (constant, exponential, bimodal; computing, blocked, both) is recorded once, with two workers that
prefetch two. From that recording alone every other setting is predicted, and then measured: other numbers of workers,
prefetch, in order or not. Each measurement takes the same batches in another order, as a shuffled epoch does: what is
judged is the model, and not which batches happened to be recorded. Each setting is measured `--rounds` times, one
round over all settings after the other; their geometric mean is what the prediction is held against, and how far the
rounds lie apart says how much of an error is the measurement's. How many speed-ups fall into their interval is printed
as well.

CPU work spins on the thread's CPU clock, so it takes longer where cores are shared; blocked work sleeps. The cores that
run at once are measured on the same clock, before and after each recording. Others at work on the machine between the
recording and a measurement show as errors of the rows that compute.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import torch
from msgspec.structs import replace
from torch.utils.data import DataLoader, Dataset

from bsprof.loader.watching import steps_on, watch_loaders
from bsprof.loading import Loading, Rate
from bsprof.measure.crew import Crew, spin
from bsprof.measure.environment import cores_of_this_process
from bsprof.replay import Load, Setting, load_of, predict, setting_of
from bsprof.sweep.runner import describe_environment

MEAN_LIMIT = 0.08
"""Mean absolute error of predicted throughput that the replay has to keep."""

WORST_LIMIT = 0.20

BATCH_S = 0.020
"""Mean time to make a batch."""

CHUNKS = 4
"""Samples in a batch: it computes and blocks by turns, once each."""

RECORDED = Setting(2, 2)

SETTINGS = (
    Setting(0),
    Setting(1, 1),
    Setting(1, 4),
    Setting(2, 8),
    Setting(3, 1),
    Setting(4, 2),
    Setting(6, 4),
    Setting(2, 1, in_order=False),
    Setting(4, 2, in_order=False),
)


class Kind(NamedTuple):
    """Batches of one kind, and who takes them."""

    name: str
    spread: str
    computing: float
    """Share of making a batch that computes; the rest is blocked."""
    step_s: float
    consumer_cpu: float = 0.0
    """Share of the consumer's own part of the step that computes; the rest sleeps."""


KINDS = (
    Kind("constant, computing", "constant", 1.0, 0.004),
    Kind("constant, blocked", "constant", 0.0, 0.004),
    Kind("exponential, computing", "exponential", 1.0, 0.009),
    Kind("exponential, blocked", "exponential", 0.0, 0.006),
    Kind("bimodal, computing", "bimodal", 1.0, 0.009),
    Kind("bimodal, blocked", "bimodal", 0.0, 0.006),
    Kind("exponential, half blocked", "exponential", 0.5, 0.004),
    Kind("exponential, computing consumer", "exponential", 0.7, 0.008, 1.0),
)


# --- batches of known cost --------------------------------------------------------------------------


def compute(seconds: float) -> None:
    """Compute for so much CPU time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Planted(Dataset[torch.Tensor]):
    """Each item is a whole batch that takes as long as it is told to."""

    def __init__(self, cost_s: list[float], computing: float) -> None:
        self.cost_s = cost_s
        self.computing = computing

    def __len__(self) -> int:
        return len(self.cost_s)

    def __getitem__(self, index: int) -> torch.Tensor:
        part_s = self.cost_s[index] / CHUNKS
        for _ in range(CHUNKS):
            if self.computing < 1:
                time.sleep(part_s * (1 - self.computing))
            if self.computing > 0:
                compute(part_s * self.computing)
        return torch.zeros(CHUNKS, 1024)


def costs(spread: str, batches: int, random: np.random.Generator) -> list[float]:
    """Return the seconds that each batch takes, of `BATCH_S` on average."""
    if spread == "exponential":
        drawn = random.exponential(1.0, batches)
    elif spread == "bimodal":
        drawn = np.where(np.arange(batches) % 10 == 3, 5.5, 0.5)
        random.shuffle(drawn)
    else:
        drawn = np.ones(batches)
    return (drawn * BATCH_S / drawn.mean()).tolist()


# --- driving a real loader --------------------------------------------------------------------------


def loader_of(kind: Kind, setting: Setting, cost_s: list[float], order: list[int]) -> DataLoader[torch.Tensor]:
    workers: dict[str, Any] = {"num_workers": setting.workers, "in_order": setting.in_order}
    if setting.workers:
        workers["prefetch_factor"] = setting.prefetch
    return DataLoader(Planted(cost_s, kind.computing), batch_size=None, sampler=order, **workers)


def step_of(kind: Kind) -> Callable[[Any], None]:
    def step(_: Any) -> None:
        if kind.consumer_cpu:
            compute(kind.step_s * kind.consumer_cpu)
        if kind.consumer_cpu < 1:
            time.sleep(kind.step_s * (1 - kind.consumer_cpu))

    return step


def measure(kind: Kind, setting: Setting, cost_s: list[float], order: list[int]) -> float:
    """Return the mean step over one pass over the batches, between a beginning and an end that do not count."""
    first = setting.workers * (setting.prefetch + 1)
    last = first + len(order)
    looped = np.resize(order, last + first + 1).tolist()
    step, got = step_of(kind), []
    batches = iter(loader_of(kind, setting, cost_s, looped))
    for _ in range(last + 1):
        batch = next(batches)
        got.append(time.perf_counter())
        step(batch)
    del batches  # ends the workers
    return growth(got, setting, first, last)


def growth(got_s: list[float], setting: Setting, first: int, last: int) -> float:
    """Return the mean step between two batches. Workers in step deliver in bursts: either end is a mean over one."""
    many = max(setting.workers, 1)
    early, late = (float(np.mean(got_s[end - many + 1 : end + 1])) for end in (first, last))
    return (late - early) / (last - first)


def record(kind: Kind, cost_s: list[float], order: list[int]) -> Loading:
    """Return a recording of one pass."""
    before = capacity_cores()
    primed = RECORDED.workers * RECORDED.prefetch + 1  # not used: see `load_of`
    step, kept = step_of(kind), None
    loader = loader_of(kind, RECORDED, cost_s, np.resize(order, len(order) + primed).tolist())
    with watch_loaders() as probe:
        for batch in loader:
            kept = batch
            step(batch)
        probe.close_window()
    capacity = (before + capacity_cores()) / 2
    return replace(probe.loading(), capacity_cores=Rate(value=capacity), cached_step_ns=steps_on([kept], step, 1.0))


def capacity_cores() -> float:
    """Return how much CPU time as many processes as cores get in a second, in cores.

    `cores_to_be_had` counts work instead, as is right where work is what a batch takes. Planted work is CPU time.
    """
    cores = cores_of_this_process()
    with Crew(cores, spin) as crew:
        rounds = [sum(spent.cpu_s / spent.wall_s for spent in crew.spend(cores, 150)) for _ in range(5)]
    return float(np.median(rounds))


# --- the table --------------------------------------------------------------------------------------


def judge(kind: Kind, settings: tuple[Setting, ...], batches: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    """Record once, predict all, measure all `rounds` times."""
    random = np.random.default_rng(seed)
    cost_s = costs(kind.spread, batches, random)
    order = list(range(batches))
    loading = record(kind, cost_s, order)
    load, base = load_of(loading), setting_of(loading)
    assert load is not None, "a recording that cannot be replayed"
    print(f"{kind.name}: {said(load)}, {base.capacity:.2f} cores", flush=True)
    predicted = predict(load, base, [base, *(setting._replace(capacity=base.capacity) for setting in settings)])
    measured_s: dict[Setting, list[float]] = {setting: [] for setting in (RECORDED, *settings)}
    for _ in range(rounds):
        for setting, times in measured_s.items():
            random.shuffle(order)
            times.append(measure(kind, setting, cost_s, order))
    recorded_s = geometric_mean(measured_s[RECORDED])
    rows = []
    for (setting, times), prediction in zip(measured_s.items(), predicted, strict=True):
        step_s = geometric_mean(times)
        row = {
            "kind": kind.name,
            "workers": setting.workers,
            "prefetch": prediction.prefetch,
            "in_order": setting.in_order,
            "predicted_step_s": prediction.step_s,
            "measured_step_s": times,
            "error": step_s / prediction.step_s - 1,
            "apart": max(times) / min(times) - 1,
            "predicted_speedup": [prediction.speedup_low, prediction.speedup, prediction.speedup_high],
            "measured_speedup": recorded_s / step_s,
            "in_interval": prediction.speedup_low <= recorded_s / step_s <= prediction.speedup_high,
            "load_average": psutil.getloadavg()[0],
        }
        rows.append(row)
        order_name = "yes" if setting.in_order else "no"
        print(
            f"{setting.workers:9} {prediction.prefetch or '':>8} {order_name:>8} {1 / prediction.step_s:11.1f}"
            f" {1 / step_s:9.1f} {row['apart']:8.1%} {row['error']:+8.1%}"
            f"{'' if row['in_interval'] else '  outside its interval'}",
            flush=True,
        )
    return rows


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def said(load: Load) -> str:
    """Return what was recorded, in a line."""
    parts = {"computing": load.cpu_s, "blocked": load.blocked_s, "hand-off": load.handoff_s, "step": load.step_s}
    means = ", ".join(f"{name} {value.mean() * 1e3:.2f}" for name, value in parts.items())
    return f"{means}, way {load.latency_s * 1e3:.2f} ms, consumer {load.consumer_cpu:.2f} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer kinds, settings and batches: about a minute")
    parser.add_argument("--batches", type=int, help="batches of a measurement; 200, or 100 if quick")
    parser.add_argument("--rounds", type=int, help="measurements of each setting; 2, or 1 if quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    batches = arguments.batches or (100 if arguments.quick else 200)
    rounds = arguments.rounds or (1 if arguments.quick else 2)
    kinds, settings = KINDS, SETTINGS
    if arguments.quick:
        kinds, settings = KINDS[:6], (Setting(0), Setting(4, 2), Setting(6, 4), Setting(2, 1, in_order=False))
    warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")

    began = time.perf_counter()
    print(f"load average {psutil.getloadavg()[0]:.2f}; {batches} batches each, in batches a second:\n")
    print(f"{'workers':>9} {'prefetch':>8} {'in order':>8} {'predicted':>11} {'measured':>9} {'apart':>8} {'error':>8}")
    rows = [row for i, kind in enumerate(kinds) for row in judge(kind, settings, batches, rounds, arguments.seed + i)]

    errors = np.array([abs(row["error"]) for row in rows])
    mean, worst, inside = float(errors.mean()), float(errors.max()), sum(row["in_interval"] for row in rows) / len(rows)
    logs = np.array([np.log(1 + row["error"]) for row in rows])
    figures = {
        "configurations": len(rows),
        "mean_error": mean,
        "worst_error": worst,
        "standard_deviation_of_log": float(np.sqrt(np.mean(logs**2))),
        "inside_interval": inside,
        "batches": batches,
        "rounds": rounds,
        "median_apart": float(np.median([row["apart"] for row in rows])),
        "wall_s": time.perf_counter() - began,
    }
    print(f"\n{len(rows)} configurations in {figures['wall_s']:.0f} s")
    print(f"{rounds} measurements of one setting lie {figures['median_apart']:.1%} apart in the median")
    print(f"speed-ups inside their interval: {inside:.0%}")
    print(f"standard deviation of ln(predicted / measured): {figures['standard_deviation_of_log']:.3f}")
    print(f"mean error {mean:.1%} <= {MEAN_LIMIT:.0%}: {'yes' if mean <= MEAN_LIMIT else 'NO'}")
    print(f"worst error {worst:.1%} <= {WORST_LIMIT:.0%}: {'yes' if worst <= WORST_LIMIT else 'NO'}")
    if arguments.json:
        machine = msgspec.to_builtins(describe_environment())
        arguments.json.write_text(json.dumps({**figures, "rows": rows, "environment": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
