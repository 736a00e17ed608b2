"""One fault, watched and diagnosed in this process: what `zoo` runs, one process a time.

    python -m benchmarks.loader.one NAME --out FILE [--method fork|spawn] [--scale S] [--healthy] [--seconds T]
                                    [--plain] [--keep FILE]

FILE gets one JSON object. With `--plain` nothing of bsprof runs: a bare loop and a stopwatch, for what the planted
fault really costs. `--keep` saves the recorded Loading, to be diagnosed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils.data import DataLoader

from benchmarks.loader.scenes import FAULTS, FORK, SPAWN, Scene, Unable, built


def pause(seconds: float) -> Callable[[Any], None]:
    """Return a training step that computes nothing on this machine."""

    def step(batch: Any) -> None:
        time.sleep(seconds)

    return step


def stopwatch(loader: DataLoader[Any], seconds: float, step: Callable[[Any], None]) -> dict[str, float]:
    """Return seconds a batch from the first batch on, restarts included, and seconds until that first batch."""
    began = time.perf_counter()
    first: float | None = None
    batches = 0
    while first is None or time.perf_counter() - first < seconds:
        for batch in loader:
            now = time.perf_counter()
            if first is None:
                first = now
            else:
                batches += 1
            if now - first >= seconds:
                break
            step(batch)
    if first is None or not batches:
        raise SystemExit(f"no two batches within {seconds:g} s")
    return {"batch_s": (now - first) / batches, "start_s": first - began}


def diagnosed(scene: Scene, seconds: float, step: Callable[[Any], None], keep: Path | None) -> dict[str, Any]:
    """Watch it and return what the diagnosis says."""
    from bsprof.diagnosis import diagnose
    from bsprof.loader.watching import watch
    from bsprof.loading import Consumer

    consumer = Consumer(kind="fixed", step_ns=round(scene.step_s * 1e9))
    loading = watch(scene.loader, seconds=seconds, step=step, consumer=consumer)
    if keep is not None:
        keep.write_bytes(msgspec.json.encode(loading))
    diagnosis = diagnose(loading, predictions=False)
    return {
        "verdict": diagnosis.verdict,
        "sentence": diagnosis.sentence,
        "wait_share": diagnosis.wait_share,
        "causes": msgspec.to_builtins(diagnosis.causes),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[fault.name for fault in FAULTS], metavar="NAME")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", choices=(FORK, SPAWN), default=FORK)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--seconds", type=float, help="to watch it; by default as long as the fault needs")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args(words)
    # A process that has used OpenMP's threads and forks leaves its workers without them, and stuck at the first use.
    torch.set_num_threads(1)
    fault = next(fault for fault in FAULTS if fault.name == arguments.name)
    seconds = fault.seconds if arguments.seconds is None else arguments.seconds
    found: dict[str, Any]
    with tempfile.TemporaryDirectory(prefix="zoo-") as directory:
        try:
            with built(fault, arguments.method, arguments.scale, arguments.healthy, Path(directory)) as scene:
                step = pause(scene.step_s)
                if arguments.plain:
                    found = dict(stopwatch(scene.loader, seconds, step))
                else:
                    found = diagnosed(scene, seconds, step, arguments.keep)
                found["step_s"] = scene.step_s
                del scene  # and with it the loader's workers, while what they need is there
        except Unable as reason:
            found = {"unable": str(reason)}
    arguments.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
