"""Models, images and hooks with which one of two ranks, or their exchange, takes longer by what is known."""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import Dataset

LATE_S = 0.020
HOOK_S = 0.010
BATCH = 8


def is_late() -> bool:
    return os.environ.get("RANK") == "1"


class Plain(nn.Module):
    """Two convolutions and a linear layer with most of the gradients: some ms a step."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.classify = nn.Sequential(nn.Flatten(), nn.Linear(16 * 32 * 32, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classify(self.features(images))
        return scores


class LateForward(Plain):
    """Rank 1 takes 20 ms longer."""

    def forward(self, images: Tensor) -> Tensor:
        if is_late():
            time.sleep(LATE_S)
        return super().forward(images)


class Images(Dataset[tuple[Tensor, int]]):
    classes = tuple("abcdefghij")

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 32, 32), index / 256), index % 10


class LateImages(Images):
    """A batch of 8 takes 20 ms longer on rank 1."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if is_late():
            time.sleep(LATE_S / BATCH)
        return super().__getitem__(index)


def prompt_hook(state, bucket):  # type: ignore[no-untyped-def]
    """Exchange a bucket as DDP itself does."""
    return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]


def slow_hook(state, bucket):  # type: ignore[no-untyped-def]
    """Do the same, with the first bucket of a step 10 ms later."""
    if bucket.index() == 0:
        time.sleep(HOOK_S)
    return prompt_hook(state, bucket)
