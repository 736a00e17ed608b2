"""The small CNN with which the founding experiments studied batch size on MNIST."""

from __future__ import annotations

from torch import nn

from bsprof.workloads.registration import ImageShape, expect_size, model


@model("mnist_cnn", "three convolutions and a linear layer for 28 px digits; 13 k parameters")
def mnist_cnn(classes: int, shape: ImageShape) -> nn.Module:
    """Return the network: kernels 5, 5, 3 with 10, 20, 40 channels, each pooled by 2.

    Without padding 28 px shrink to 24, 12, 8, 4, 2 and 1, which leaves the 40 features of the linear layer.
    """
    expect_size("mnist_cnn", shape, 28)
    layers: list[nn.Module] = []
    channels = shape.channels
    for kernel, width in ((5, 10), (5, 20), (3, 40)):
        layers += [nn.Conv2d(channels, width, kernel), nn.MaxPool2d(2), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))
