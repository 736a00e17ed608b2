"""Loaders that tests point `bsprof loader` at: importable by name, and by workers that are spawned."""

import os
import time
from collections.abc import Iterator

import torch
from loader_datasets import Sleeps
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler


class Sleepy(Sleeps):
    """Each sample is one tensor."""

    def __init__(self, size: int = 64) -> None:
        super().__init__(size)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(super().__getitem__(index)[1]))


class Pictures(Dataset):
    """Small labelled images."""

    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 32, 32), index % 2


class Broken(Sleepy):
    """Its 20th sample cannot be read."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 20:
            raise ValueError("sample 20 is damaged")
        return super().__getitem__(index)


class Deadly(Sleepy):
    """Its 20th sample ends the process."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 20:
            os.kill(os.getpid(), 9)
        return super().__getitem__(index)


class Stuck(Sleepy):
    """Its 20th sample never comes."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 20:
            time.sleep(600)
        return super().__getitem__(index)


class Stream(IterableDataset):
    """Numbers, one after another."""

    def __iter__(self) -> Iterator[int]:
        yield from range(40)


class Fussy(DataLoader):
    """A loader with arguments of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(Sleepy(size), batch_size=4)


def numbers() -> Iterator[int]:
    for number in range(50):
        time.sleep(0.001)
        yield number


def make_loader(num_workers: int = 1) -> DataLoader:
    return DataLoader(Sleepy(), batch_size=4, num_workers=num_workers)


def make_nothing() -> DataLoader:
    return DataLoader(Sleepy(0), batch_size=4)


loader = DataLoader(Sleepy(), batch_size=4, num_workers=1)
spawned = DataLoader(Sleepy(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
by_batches = DataLoader(Sleepy(), batch_sampler=BatchSampler(SequentialSampler(range(64)), 8, drop_last=False))
whole = DataLoader(Sleepy(), batch_size=None)
stream = DataLoader(Stream(), batch_size=4)
pictures = DataLoader(Pictures(), batch_size=8)
fussy = Fussy(64)
broken = DataLoader(Broken(), batch_size=4, num_workers=1)
deadly = DataLoader(Deadly(), batch_size=4, num_workers=1)
stuck = DataLoader(Stuck(), batch_size=4, num_workers=1)
number = 5
