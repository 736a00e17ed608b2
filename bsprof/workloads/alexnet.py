"""AlexNet in CIFAR form, as in the founding AdaBatch experiments.

Krizhevsky 2014 (arXiv 1404.5997) with its three linear layers replaced by one and its paddings widened, so that
32 px end as 256 features: the form of Wei Yang's pytorch-classification (github.com/bearpaw), 2.5 M parameters.
"""

from __future__ import annotations

from torch import nn

from bsprof.workloads.registration import ImageShape, expect_size, model


@model("alexnet_cifar", "AlexNet for 32 px images, one linear layer; 2.5 M parameters")
def alexnet_cifar(classes: int, shape: ImageShape) -> nn.Module:
    """Return the network; 32 px a side shrink to 8, 4, 2 and 1."""
    expect_size("alexnet_cifar", shape, 32)
    return nn.Sequential(
        nn.Conv2d(shape.channels, 64, kernel_size=11, stride=4, padding=5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, classes),
    )
