"""A DataLoader for a data set and the settings of a case."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from bsprof.model import Settings
from bsprof.workloads.registration import Data


class EndlessSampler(Sampler[int]):
    """Indices below `size` in passes without end, each pass a new permutation; the same order for the same seed.

    No epoch ends inside a measured window, and every batch is full even where the data set is smaller than one.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("nothing to sample from")
        self._size = size
        self._seed = seed

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from torch.randperm(self._size, generator=generator).tolist()


def build_loader(
    data: Data, settings: Settings, *, seed: int, endless: bool = True, length: int | None = None
) -> DataLoader[Any]:
    """Return a DataLoader of shuffled full batches with the batch size, workers and buffers of `settings`.

    `endless` never raises StopIteration. `endless=False` gives an epoch of `length` samples (by default the whole
    set once; longer than the set wraps around) that can be iterated again, a last incomplete batch dropped. An
    IterableDataset brings its own order and end, so for it both are ignored.
    """
    workers_only: dict[str, Any] = {}
    if settings.workers:
        workers_only["persistent_workers"] = bool(settings.persistent_workers)
        if settings.prefetch is not None:
            workers_only["prefetch_factor"] = settings.prefetch
    return DataLoader(
        data.dataset,
        batch_size=settings.batch_size,
        sampler=_sampler(data, seed, endless, length),
        num_workers=settings.workers,
        pin_memory=bool(settings.pin_memory),
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),  # of the workers' own seeds, hence of the augmentation
        **workers_only,
    )


def _sampler(data: Data, seed: int, endless: bool, length: int | None) -> Sampler[int] | list[int] | None:
    if isinstance(data.dataset, IterableDataset):
        return None
    size = len(cast(Any, data.dataset))
    order = EndlessSampler(size, seed)
    if endless:
        if length is not None:
            raise ValueError("an endless loader has no length")
        return order
    return list(islice(order, size if length is None else length))
