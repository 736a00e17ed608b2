import io
import re
import subprocess
import sys
import typing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bsprof.metrics import summarise
from bsprof.model import (
    AXES,
    PHASES,
    Accelerator,
    Block,
    Case,
    Counters,
    Environment,
    Facts,
    Measurement,
    Note,
    Outcome,
    OutcomeKind,
    Plan,
    Result,
    Samples,
    Settings,
    Startup,
    case_key,
)
from bsprof.report import figures
from bsprof.report.progress import Progress
from bsprof.report.terminal import render, render_cases, render_catalogue, render_environment
from bsprof.report.words import summary

OK = Outcome(kind="ok")
OOM = Outcome(
    kind="oom",
    message="CUDA out of memory in backward: 2.1 GiB asked for, 78.9 GiB of 80.0 GiB allocated",
    hint="a smaller --batch-size, or --amp bf16",
    phase="backward",
)

ENVIRONMENT = Environment(
    host="lab",
    os="Debian 12",
    kernel="6.1",
    hypervisor=None,
    cpu="Some CPU @ 2.60GHz",
    cores_logical=4,
    cores_physical=2,
    cores_usable=2,
    cpu_quota=2.0,
    memory_bytes=8 << 30,
    memory_limit_bytes=4 << 30,
    shm_bytes=64 << 20,
    accelerators=(),
    driver=None,
    python="3.11.7",
    torch="2.15.0",
    torchvision="0.30.0",
    cuda=None,
    cudnn=None,
    numpy="2.4.6",
    libc="glibc 2.36",
    bsprof="0.1.0",
    git_commit="0123456789abcdef0123456789abcdef01234567+",
    variables={"OMP_NUM_THREADS": "2"},
)

GPU = Accelerator(name="NVIDIA H200", kind="cuda", index=0, memory_bytes=139 << 30, capability="9.0")

WEIGHTS = {"data": 0.2, "forward": 0.3, "backward": 0.4, "optimizer": 0.09}


def samples(
    rng, batch, mean_s, weights=WEIGHTS, *, steps=100, noise=0.05, distortion=0.001, device_data=None, **fields
):
    """Lognormal phases around their shares of `mean_s`, a little `other`, and alternating blocks."""
    host = {
        phase: (mean_s * 1e9 * weight * rng.lognormal(0, noise, steps)).astype(int) for phase, weight in weights.items()
    }
    step = sum(host.values()) + (mean_s * 1e9 * 0.002 * rng.lognormal(0, noise, steps)).astype(int)
    blocks = []
    for start in range(0, steps, 10):
        wall = int(step[start : start + 10].sum())
        bare = int(wall / (1 + distortion) * rng.lognormal(0, noise / 5))
        blocks += [Block(kind="instrumented", steps=10, wall_ns=wall), Block(kind="bare", steps=10, wall_ns=bare)]
    device = {}
    if device_data is not None:
        ns = {**host, "data": (host["data"] * device_data).astype(int)}
        total = step - host["data"] + ns["data"]
        device = {
            "device_step_ns": total.tolist(),
            "device_ns": {phase: list(map(int, values)) for phase, values in ns.items()},
        }
    counters = Counters(
        wall_ns=int(step.sum()),
        cpu_ns=int(step.sum()),
        minor_faults=20 * steps,
        major_faults=0,
        voluntary_switches=9,
        involuntary_switches=3,
    )
    return Samples(
        **{
            "batch_size": batch,
            "step_ns": step.tolist(),
            "host_ns": {phase: values.tolist() for phase, values in host.items()},
            "blocks": blocks,
            "warmup_ns": [int(step[0] * 3), *step[:21].tolist()],
            "recorder_ns_per_step": 2100,
            "counters": counters,
            **device,
            **fields,
        }
    )


def measurement(settings, taken=None, outcome=OK, process=0, device="cpu", **fields):
    """A measurement as a sweep on a CPU would leave it."""
    case = Case(key=case_key(settings), settings=settings, process=process)
    startup = Startup(
        process_ns=15_000_000,
        build_ns=240_000_000,
        iterator_ns=31_000_000,
        first_batch_ns=410_000_000,
        epoch_end_ns=[21_000_000],
        epoch_start_ns=[380_000_000],
    )
    facts = Facts(
        device=device, threads=2, parameters=3_504_872, image_size=96, samples_in_dataset=1000, malloc="pinned"
    )
    known = {"facts": facts, "startup": startup} if outcome.kind == "ok" else {}
    return Measurement(case=case, outcome=outcome, wall_s=9.8, inside_s=9.5, samples=taken, **{**known, **fields})


def settings(**axes):
    """Settings of a CPU, where axes of an accelerator mean nothing, nor those of workers without any."""
    workers = axes.get("workers", 0)
    absent = {
        axis.name: None
        for axis in AXES.values()
        if axis.info.needs in ("accelerator", "cuda") or (axis.info.needs == "workers" and not workers)
    }
    return Settings(**{**absent, **axes})


def result(measurements, plan=None, environment=ENVIRONMENT, **fields):
    return Result(
        created="2031-01-01T00:00:00Z",
        plan=plan or Plan(),
        environment=environment,
        measurements=measurements,
        **fields,
    )


@pytest.fixture(scope="module")
def sweep():
    """9 cases of batch x workers, measured in another order; workers take load off the step; the largest ran out of memory."""
    rng = np.random.default_rng(0)
    measurements = []
    for batch in (128, 32, 64):
        for workers in (1, 0, 2):
            weights = {**WEIGHTS, "data": (0.35, 0.08, 0.02)[workers]}
            mean = 0.004 * batch + 0.020
            chosen = settings(batch_size=batch, workers=workers)
            if (batch, workers) == (128, 2):
                measurements.append(measurement(chosen, outcome=OOM))
                continue
            noted = (Note(code="no_steady_state", text="the step time was not steady when warm-up ended"),)
            is_steady = (batch, workers) != (32, 1)
            taken = samples(rng, batch, mean, weights, steady=is_steady)
            measurements.append(measurement(chosen, taken, notes=() if is_steady else noted))
    return result(measurements)


def text_of(what, width=100, renderer=render, **options):
    stream = io.StringIO()
    renderer(what, Console(file=stream, width=width, **options))
    return stream.getvalue()


if __name__ == "__main__":
    s = sweep.__wrapped__() if hasattr(sweep, "__wrapped__") else sweep._get_wrapped_function()()
    for w in (80, 100, 140):
        print("=" * w)
        print(text_of(s, w))
