"""A DataLoader for a data set and the settings of a case."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from bsprof.model import Settings
from bsprof.workloads.registration import Data


class EndlessSampler(Sampler[int]):
    """Indices below `size` in passes without end, each pass a new permutation; the same order for the same seed.

    No epoch ends inside a measured window, and every batch is full even where the data set is smaller than one.
    Of `share` = (rank, ranks) each rank gets an equal part of the one permutation that all ranks share in a pass.
    """

    def __init__(self, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        if size < 1:
            raise ValueError("nothing to sample from")
        self._size = size
        self._seed = seed
        self._share = share

    def __iter__(self) -> Iterator[int]:
        rank, ranks = self._share
        if ranks > 1:
            sampler = DistributedSampler(range(self._size), ranks, rank, seed=self._seed)  # type: ignore[arg-type, var-annotated]
            for epoch in count():
                sampler.set_epoch(epoch)
                yield from sampler
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from torch.randperm(self._size, generator=generator).tolist()


def build_loader(
    data: Data,
    settings: Settings,
    *,
    seed: int,
    endless: bool = True,
    length: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> DataLoader[Any]:
    """Return a DataLoader of shuffled full batches with the batch size, workers and buffers of `settings`.

    `endless` never raises StopIteration. `endless=False` gives an epoch of `length` samples (by default the whole
    set once; longer than the set wraps around) that can be iterated again, a last incomplete batch dropped. An
    IterableDataset brings its own order and end, so for it both are ignored.

    `share` is this rank and the number of ranks: they draw from one shuffle, in batches of equal size, while each has
    random numbers of its own for augmentation.
    """
    workers_only: dict[str, Any] = {}
    if settings.workers:
        workers_only["persistent_workers"] = bool(settings.persistent_workers)
        if settings.prefetch is not None:
            workers_only["prefetch_factor"] = settings.prefetch
    return DataLoader(
        data.dataset,
        batch_size=settings.batch_size,
        sampler=_sampler(data, seed, endless, length, share),
        num_workers=settings.workers,
        pin_memory=bool(settings.pin_memory),
        drop_last=True,
        generator=torch.Generator().manual_seed(
            seed * share[1] + share[0]
        ),  # of the workers' own seeds, hence of the augmentation
        **workers_only,
    )


def _sampler(
    data: Data, seed: int, endless: bool, length: int | None, share: tuple[int, int]
) -> Sampler[int] | list[int] | None:
    if isinstance(data.dataset, IterableDataset):
        return None
    size = len(cast(Any, data.dataset))
    order = EndlessSampler(size, seed, share)
    if endless:
        if length is not None:
            raise ValueError("an endless loader has no length")
        return order
    return list(islice(order, size if length is None else length))
