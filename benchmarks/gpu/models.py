"""Models with a known character, for `--model benchmarks.gpu.models:NAME`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HUNGRY_FLOATS = 2**25
"""Numbers that one sample becomes in `hungry`: 128 MiB, and as much again in its backward pass."""


class Hungry(nn.Module):
    """Memory that grows by a known amount a sample, in one piece, from a small input."""

    def __init__(self, num_classes: int, floats: int = HUNGRY_FLOATS) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.full((floats,), 1e-3))
        self.head = nn.Linear(1, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        wide = images.flatten(1).mean(1, keepdim=True) * self.spread
        return self.head(wide.mean(1, keepdim=True))


def hungry(num_classes: int) -> nn.Module:
    return Hungry(num_classes)


def nibbling(num_classes: int) -> nn.Module:
    """As `hungry`, a thousandth of it: for a rehearsal."""
    return Hungry(num_classes, HUNGRY_FLOATS // 1024)


class Capped(nn.Module):
    """Fails as the CPU's allocator does above `most` samples: what a search for the largest batch meets."""

    def __init__(self, num_classes: int, most: int = 11) -> None:
        super().__init__()
        self.most = most
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes.")
        return self.net(images)


def capped(num_classes: int) -> nn.Module:
    model = Capped(num_classes)
    model(torch.zeros(1, 3, 8, 8))
    return model


def tiny_mlp(num_classes: int) -> nn.Module:
    """Twenty layers of a few microseconds each: launching them takes longer than running them."""
    layers: list[nn.Module] = [nn.Flatten(), nn.LazyLinear(64)]
    for _ in range(20):
        layers += [nn.ReLU(), nn.Linear(64, 64)]
    model = nn.Sequential(*layers, nn.Linear(64, num_classes))
    model(torch.zeros(1, 3, 8, 8))
    return model


class Matmuls(nn.Module):
    """One large layer, applied again and again: the device is busy from end to end."""

    def __init__(self, num_classes: int, width: int = 8192, times: int = 8) -> None:
        super().__init__()
        self.widen = nn.Linear(192, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)
        self.times = times

    def forward(self, images: Tensor) -> Tensor:
        wide = self.widen(images.flatten(1))
        for _ in range(self.times):
            wide = self.layer(wide).tanh()
        return self.head(wide)


def large_matmuls(num_classes: int) -> nn.Module:
    return Matmuls(num_classes)


def small_matmuls(num_classes: int) -> nn.Module:
    """As `large_matmuls`, for a rehearsal."""
    return Matmuls(num_classes, 256, 4)


def normalised(num_classes: int) -> nn.Module:
    """Return a small convolutional network with batch norm: what SyncBatchNorm takes the place of."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )
