"""Data sets that worker processes can import, whatever the start method."""

import os
import random
import signal
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info


class Draws(Dataset):
    """Each sample draws from all random streams, so that a disturbed one shows."""

    def __init__(self, size=24):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), torch.rand(()).item(), np.random.rand()])


class DrawsAtOnce(Draws):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Stream(IterableDataset):
    """Worker w of W yields w, w+W, …, so that workers end after different numbers of batches."""

    def __init__(self, size=23):
        self.size = size

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        assert info is None or type(info.dataset) is Stream
        for index in range(first, self.size, step):
            yield torch.tensor([index, random.random(), torch.rand(()).item()])


class Named(Dataset):
    """Samples are called by strings; `slow` takes longer."""

    def __getitem__(self, name):
        time.sleep(0.02 if name == "slow" else 0.0002)
        return torch.tensor(len(name))


class Sleeps(Dataset):
    """Samples that take a while and no CPU."""

    def __init__(self, size=16, seconds=0.002):
        self.size, self.seconds = size, seconds

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.zeros(4), index


class Uneven(Sleeps):
    """Samples 7 and 11 take longer than all others."""

    def __getitem__(self, index):
        time.sleep({7: 0.02, 11: 0.03}.get(index, 0.0005))
        return index


class Fails(Sleeps):
    def __init__(self, bad, how):
        super().__init__()
        self.bad, self.how = bad, how

    def __getitem__(self, index):
        if index == self.bad:
            if self.how == "kill":
                time.sleep(0.05)  # what was made before is on its way
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("this sample")
        return super().__getitem__(index)


class Nested(IterableDataset):
    """A data set that itself loads its samples with a DataLoader."""

    def __iter__(self):
        for batch in DataLoader(Sleeps(4, 0), 2):
            yield batch[1].sum()


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


def collate_pair(samples):
    time.sleep(0.003)
    return Pair(torch.stack([sample[0] for sample in samples]), torch.tensor([sample[1] for sample in samples]))


def collate_dict(samples):
    return {"all": torch.stack(samples), "first": samples[0], "names": ["a"] * len(samples)}


def init_worker(worker):
    random.seed(1000 + worker)
    torch.manual_seed(2000 + worker)


def init_fails(worker):
    raise ValueError("no such luck")
