"""What the suites measure on: small pictures that are really decoded, and results of many cases."""

from __future__ import annotations

from typing import Any

from benchmarks.compare_speed import made_up
from bsprof import cache
from bsprof.model import Plan, Result, Settings
from bsprof.sweep.runner import describe_environment

PICTURES = "jpeg:128x96,n=256"
"""Generated once, photo-like, read and decoded from the disk."""


def loader(workers: int, *, data: str = PICTURES, image_size: int = 64, batch_size: int = 16, **more: Any) -> Any:
    """Return the DataLoader that `bsprof bench` builds of these settings."""
    import torch

    from bsprof.measure.case import data_request
    from bsprof.workloads.loading import build_loader
    from bsprof.workloads.registry import build_data, prepare_data

    settings = Settings(
        data=data,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        pin_memory=torch.accelerator.is_available(),
    )
    request = data_request(settings, Plan(), cache.place())
    prepare_data(data, request)
    return build_loader(build_data(data, request), settings, seed=0, **more)


def results(cases: int, processes: int = 5, steps: int = 60) -> tuple[Result, Result]:
    """Return two made-up results of the same cases."""
    environment = describe_environment()
    base, new = (made_up(cases, processes, steps, seed, environment) for seed in (0, 1))
    return base, new
