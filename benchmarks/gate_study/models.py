"""A small convolutional network, and the same with more work in its forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = 8
AGAIN = {2: 10, 5: 26}
"""Samples of a batch of 32 that go through tanh for nothing, so that a step takes about so many percent longer. What
that really adds is what the study measures over all its runs."""


class Network(nn.Module):
    """Two convolutions; in front of them the first `again` samples of a batch go through tanh, for nothing."""

    def __init__(self, classes: int, again: int = 0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()
        )
        self.classify = nn.Linear(CHANNELS, classes)
        self.again = again

    def forward(self, images: Tensor) -> Tensor:
        if self.again:
            torch.tanh(images[: self.again])
        scores: Tensor = self.classify(self.features(images).mean(dim=(2, 3)))
        return scores


def plain(num_classes: int) -> nn.Module:
    return Network(num_classes)


def slower_2(num_classes: int) -> nn.Module:
    return Network(num_classes, AGAIN[2])


def slower_5(num_classes: int) -> nn.Module:
    return Network(num_classes, AGAIN[5])
