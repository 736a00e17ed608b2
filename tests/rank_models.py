"""Models, data sets and hooks for ranks: what goes wrong, or takes longer, on rank 1 alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from factories import Perceptron, Pixels
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


def is_rank(rank: int) -> bool:
    return os.environ.get("RANK") == str(rank)


class _OnOne(Perceptron):
    """Does something once, in its sixth forward pass on rank 1."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 6 and is_rank(1):
            self.act()
        return super().forward(images)

    def act(self) -> None:
        raise NotImplementedError


class Killed(_OnOne):
    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(_OnOne):
    def act(self) -> None:
        raise LookupError("no weights today")


class Leaves(_OnOne):
    def act(self) -> None:
        os._exit(5)


class OutOfMemory(_OnOne):
    def act(self) -> None:
        torch.empty(2**60, dtype=torch.uint8)


class Hangs(_OnOne):
    def act(self) -> None:
        time.sleep(600)


class Marking(Perceptron):
    """Touches the file $BSPROF_TEST_MARK once rank 0 has taken some steps, and waits a little in each."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 6 and is_rank(0):
            Path(os.environ["BSPROF_TEST_MARK"]).touch()
        time.sleep(0.01)
        return super().forward(images)


class Late(Perceptron):
    """Takes 20 ms longer in its forward pass on rank 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if is_rank(1):
            time.sleep(0.02)
        return super().forward(images)


class LatePixels(Pixels):
    """A sample takes 5 ms longer on rank 1."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if is_rank(1):
            time.sleep(0.005)
        return super().__getitem__(index)


def slow_hook(state, bucket):  # DDP reads annotations, and strings are none to it
    """Exchange a bucket as DDP does, 10 ms late."""
    time.sleep(0.01)
    return default_hooks.allreduce_hook(None, bucket)
