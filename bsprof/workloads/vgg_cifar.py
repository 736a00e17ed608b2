"""VGG-19 with batch normalisation in CIFAR form, as in the founding AdaBatch experiments.

The sixteen convolutions of configuration E (Simonyan and Zisserman, arXiv 1409.1556), then one linear layer, as five
poolings leave one pixel of 32; 20.0 M parameters.
"""

from __future__ import annotations

from torch import nn

from bsprof.workloads.registration import ImageShape, expect_size, model

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and number of convolutions between two poolings."""


@model("vgg19_bn_cifar", "VGG-19 with batch norm for 32 px images, one linear layer; 20.0 M parameters")
def vgg19_bn_cifar(classes: int, shape: ImageShape) -> nn.Module:
    """Return the network, its convolutions initialised as in He et al., arXiv 1502.01852."""
    expect_size("vgg19_bn_cifar", shape, 32)
    layers: list[nn.Module] = []
    channels = shape.channels
    for width, depth in _STAGES:
        for _ in range(depth):
            convolution = nn.Conv2d(channels, width, kernel_size=3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))
