"""Data sets, transforms and functions with a fault in them. All can be pickled, so that they work under spawn.

CPU work spins on the thread's CPU clock, so that other processes do not change its amount; blocked work sleeps.
"""

from __future__ import annotations

import hashlib
import multiprocessing.synchronize
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import v2

FEATURES = 16
"""Numbers in a sample whose size does not matter."""
BLOCK = bytes(1 << 16)
"""hashlib gives up the interpreter's lock for more than 2047 bytes."""


def spin(seconds: float) -> None:
    """Take so much CPU time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def spin_without_lock(seconds: float) -> None:
    """Take so much CPU time as image libraries do, without the interpreter's lock for most of it."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(BLOCK)


def block(seconds: float) -> None:
    if seconds > 0:
        time.sleep(seconds)


# --- transforms, collate and init functions ---------------------------------------------------------


@dataclass
class Spinning:
    """A transform of torchvision's first kind: any callable."""

    seconds: float

    def __call__(self, sample: Tensor) -> Tensor:
        spin(self.seconds)
        return sample


class Blur(Spinning):
    """Named, so that two transforms of a Compose can be told apart."""


class Jitter(Spinning):
    """The other one."""


class Warp(v2.Transform):
    """A transform of torchvision's second kind, that computes in C as most of them do."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, *inputs: Any) -> Any:
        spin_without_lock(self.seconds)
        return inputs[0] if len(inputs) == 1 else inputs


@dataclass
class SpinningCollate:
    seconds: float

    def __call__(self, samples: list[Any]) -> Any:
        spin(self.seconds)
        return default_collate(samples)


def as_made(batch: Any) -> Any:
    """Return a batch that the data set made whole."""
    return batch


@dataclass
class Sleeping:
    """A worker_init_fn that takes its time, as one that opens files or loads a model does."""

    seconds: float

    def __call__(self, worker: int) -> None:
        block(self.seconds)


@dataclass
class ManyThreads:
    threads: int

    def __call__(self, worker: int) -> None:
        torch.set_num_threads(self.threads)


def on_one_core(worker: int) -> None:
    """Pin each worker to the same core, as a launcher or a library that pins threads can."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# --- data sets --------------------------------------------------------------------------------------


@dataclass
class Planted(Dataset[Any]):
    """Samples of a few numbers that cost a planted time."""

    length: int
    cpu_s: float = 0.0
    blocked_s: float = 0.0
    hot: dict[int, float] = field(default_factory=dict)
    """CPU seconds more for these indices, each time."""
    rare_s: float = 0.0
    """Blocked seconds more for a sample now and then, never the same one."""
    rare_share: float = 0.0
    transform: Callable[[Tensor], Any] | None = None
    payload: tuple[Any, ...] = ()
    """Carried along: what a spawned worker must unpickle."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        spin(self.cpu_s + self.hot.get(index, 0.0))
        block(self.blocked_s)
        if self.rare_share and random.random() < self.rare_share:
            block(self.rare_s)
        sample = torch.full((FEATURES,), float(index))
        return sample if self.transform is None else self.transform(sample)


@dataclass
class Jpegs(Dataset[Tensor]):
    """Real JPEG files, decoded whole, of which a corner is kept."""

    paths: list[Path]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index % len(self.paths)]) as image:
            image.load()
            corner = image.crop((0, 0, 4, 4))
        return torch.frombuffer(bytearray(corner.tobytes()), dtype=torch.uint8)


@dataclass
class Lines(Dataset[tuple[Tensor, int]]):
    """Tiny samples, each made by a few Python calls: a line of text split, its fields made numbers."""

    lines: list[str]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        fields = self.lines[index % len(self.lines)].split(",")
        return torch.tensor([float(text) for text in fields[1:]]), int(fields[0])


@dataclass
class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The same samples, parsed beforehand and taken a batch at a time."""

    values: Tensor
    labels: Tensor
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.values[index % len(self.values)], self.labels[index % len(self.values)]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(indices) % len(self.values)
        return self.values[rows], self.labels[rows]


@dataclass
class Shards(IterableDataset[Tensor]):
    """A shard for each worker, each with its own blocked time a sample."""

    seconds: tuple[float, ...]
    length: int
    """Samples in each shard."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        shard = 0 if worker is None else worker.id % len(self.seconds)
        for i in range(self.length):
            block(self.seconds[shard])
            yield torch.full((FEATURES,), float(i))


@dataclass
class Files(Dataset[Tensor]):
    """Files read whole, in pieces at odd places, out of the page cache or, where it is emptied, from the disk."""

    paths: list[Path]
    length: int
    evict: bool
    piece_bytes: int = 1 << 16

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        file = os.open(self.paths[index % len(self.paths)], os.O_RDONLY)
        try:
            size, total = os.fstat(file).st_size, 0
            pieces = size // self.piece_bytes
            if self.evict:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            for i in range(pieces):
                place = i * 7 % pieces if pieces % 7 else i
                total += len(os.pread(file, self.piece_bytes, place * self.piece_bytes))
        finally:
            os.close(file)
        return torch.full((FEATURES,), float(total))


class Remote(Dataset[Tensor]):
    """Samples asked for over a socket, one connection a process."""

    def __init__(self, port: int, length: int) -> None:
        self.port, self.length = port, length
        self.connection: tuple[int, socket.socket] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if self.connection is None or self.connection[0] != os.getpid():
            self.connection = os.getpid(), socket.create_connection(("127.0.0.1", self.port))
        connection = self.connection[1]
        connection.sendall(b"?")
        answer = connection.recv(1)
        return torch.full((FEATURES,), float(answer[0]))


class Locked(Dataset[Tensor]):
    """A resource that one process at a time may use: all workers share one lock, or each has its own."""

    def __init__(
        self,
        length: int,
        locks: list[multiprocessing.synchronize.Lock],
        held_s: float,
        *,
        spinning: bool = False,
        before_s: float = 0.0,
    ) -> None:
        self.length, self.locks, self.held_s, self.spinning, self.before_s = length, locks, held_s, spinning, before_s

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        worker = get_worker_info()
        spin(self.before_s)
        with self.locks[(0 if worker is None else worker.id) % len(self.locks)]:
            (spin if self.spinning else block)(self.held_s)
        return torch.full((FEATURES,), float(index))


@dataclass
class Frames(Dataset[Tensor]):
    """Large samples that cost nothing to make: what they cost is being copied into a batch and sent."""

    values: int
    dtype: torch.dtype
    length: int

    def __post_init__(self) -> None:
        self.frame = torch.ones(self.values, dtype=self.dtype)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.frame


@dataclass
class Fields(Dataset[Any]):
    """Samples of many small tensors, or of one that holds the same numbers."""

    fields: int
    packed: bool
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        values = torch.full((self.fields, 4), float(index))
        return values if self.packed else {f"field_{i}": row.clone() for i, row in enumerate(values)}


@dataclass
class Growing(Dataset[Tensor]):
    """A data set that remembers everything it ever made."""

    length: int
    kept_bytes: int
    cpu_s: float = 0.0
    kept: list[bytes] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        spin(self.cpu_s)
        if self.kept_bytes:
            self.kept.append(os.urandom(4096) * (self.kept_bytes // 4096))
        return torch.full((FEATURES,), float(index))


@dataclass
class Arithmetic(Dataset[Tensor]):
    """Samples made by many short operations that torch spreads over its threads."""

    operations: int
    length: int
    values: int = 1 << 16
    """Above the 32,768 at which torch begins to use threads (at::internal::GRAIN_SIZE)."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        numbers = torch.zeros(self.values)
        for _ in range(self.operations):
            numbers.add_(1.0)
        return numbers[:FEATURES].clone()
