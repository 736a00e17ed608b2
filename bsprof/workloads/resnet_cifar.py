"""ResNet-20 for CIFAR: He et al., arXiv 1512.03385, section 4.2, with n = 3 and shortcuts of option A."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bsprof.workloads.registration import ImageShape, model

_WIDTHS = (16, 32, 64)
_BLOCKS = 3


def _convolution(channels: int, width: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight)  # arXiv 1502.01852, as the paper does
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut that has no parameters: every second pixel, new channels zero."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(channels, width, stride)
        self.second = _convolution(width, width, 1)
        self.stride = stride
        self.new_channels = width - channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1 or self.new_channels:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(self.second(F.relu(self.first(x))) + shortcut)


@model("resnet20", "ResNet-20 for CIFAR (He et al. 2015, section 4.2); 0.27 M parameters")
def resnet20(classes: int, shape: ImageShape) -> nn.Module:
    """Return the network; global average pooling lets it take images of any size."""
    layers: list[nn.Module] = [_convolution(shape.channels, _WIDTHS[0], 1), nn.ReLU()]
    channels = _WIDTHS[0]
    for stage, width in enumerate(_WIDTHS):
        for block in range(_BLOCKS):
            layers.append(_Residual(channels, width, stride=2 if stage and not block else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
