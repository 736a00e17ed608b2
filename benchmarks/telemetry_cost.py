"""What the telemetry sampler costs: core time a sample, and the share of one core at 10 Hz.

    python benchmarks/telemetry_cost.py [--seconds 20] [--hz 10] [--json FILE]

A real sampling process is started as a case starts it, on the accelerator that is there, and says itself what core time
it took. Start-up comes apart: it is paid before a case's timed window. Then each NVML question is timed on its own,
where there is NVML, so that a costly one is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from bsprof import stats
from bsprof.measure import nvml, telemetry
from bsprof.measure.clock import present_device

LIMIT = 0.01
"""Share of one core that the sampler may take at 10 Hz."""


def measure(device: torch.device, hz: float, seconds: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "telemetry.jsonl")
        asked_ns = time.perf_counter_ns()
        with telemetry.record(device, hz, path):
            time.sleep(seconds)
        recording = telemetry.read(path)
    assert recording.header is not None, "the sampler wrote nothing"
    samples = recording.samples
    costs = [b.cpu_ns - a.cpu_ns for a, b in pairwise(samples)]
    wall_ns = samples[-1].t - samples[0].t
    gaps = stats.median([b.t - a.t for a, b in pairwise(samples)])
    return {
        "source": recording.header.source,
        "device_uuid": recording.header.device_uuid,
        "problem": recording.header.problem,
        "unsupported": list(recording.header.unsupported),
        "columns": sorted({column for sample in samples for column in (*sample.device, *sample.host)}),
        "samples": len(samples),
        "hz": len(costs) / wall_ns * 1e9,
        "period_ms": gaps.value / 1e6,
        "cpu_ns_per_sample_mean": sum(costs) / len(costs),
        "cpu_ns_per_sample_median": stats.median(costs).value,
        "cpu_ns_per_sample_max": max(costs),
        "share_of_a_core": sum(costs) / wall_ns,
        "startup_cpu_ns": samples[0].cpu_ns,
        "startup_wall_ns": recording.header.t - asked_ns,
    }


def questions(device: torch.device, rounds: int = 50) -> dict[str, dict[str, float]]:
    """Return median core and wall time of each NVML question in ns, by column; nothing without NVML."""
    source = nvml.open_source(telemetry.cuda_gpu(device), os.environ)
    found = {}
    try:
        for column, ask in source.questions() if isinstance(source, nvml.NvmlSource) else ():
            cpu, wall = [], []
            for _ in range(rounds):
                before_cpu, before = time.process_time_ns(), time.perf_counter_ns()
                ask()
                wall.append(time.perf_counter_ns() - before)
                cpu.append(time.process_time_ns() - before_cpu)
                time.sleep(0.01)
            found[column] = {"cpu_ns": stats.median(cpu).value, "wall_ns": stats.median(wall).value}
    finally:
        source.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--hz", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = present_device()
    if device.type == "cuda":
        torch.cuda.init()  # a case has started CUDA too: the device is known by its UUID
    found = measure(device, arguments.hz, arguments.seconds)
    share = float(str(found["share_of_a_core"]))
    for name, value in found.items():
        print(f"{name:26} {value}")
    asked = questions(device)
    for column, cost in asked.items():
        print(f"  {column:24} {cost['cpu_ns'] / 1e3:9.1f} us core {cost['wall_ns'] / 1e3:9.1f} us wall")
    limit = LIMIT * arguments.hz / 10
    print(f"\n{share:.3%} of a core <= {limit:.1%}: {'yes' if share <= limit else 'NO'}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "questions": asked}, indent=1) + "\n")


if __name__ == "__main__":
    main()
