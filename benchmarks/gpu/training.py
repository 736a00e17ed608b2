"""Real training steps for checks that need no process of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu.device import Device
from bsprof.measure.loop import Training
from bsprof.model import Settings
from bsprof.workloads.registration import ImageShape
from bsprof.workloads.registry import build_model


class Repeating:
    """A loader that gives the same batch for ever, page-locked where there is a device: its copy need not wait."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self._batch = batch

    def __iter__(self) -> Repeating:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self._batch


def training_of(model: nn.Module, images: Tensor, device: Device, *, loader: object | None = None) -> Training:
    """Return the step loop of bsprof around `model`, its loader started."""
    labels = torch.randint(0, 10, (len(images),))
    if not device.rehearsed:
        images, labels = images.pin_memory(), labels.pin_memory()
    model = model.to(device.torch_device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    settings = Settings(batch_size=len(images))
    training = Training(model, loader or Repeating((images, labels)), optimizer, settings, device.torch_device)
    training.start()
    return training


def mobilenet(device: Device, *, batch_size: int, image_size: int, loaded: bool = False) -> Training:
    """Return MobileNetV2's step. `loaded` batches are collated by a DataLoader without workers, as users have them."""
    generator = torch.Generator().manual_seed(0)
    model = build_model("mobilenet_v2", classes=10, shape=ImageShape(3, image_size, image_size), seed=0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    loader = None
    if loaded:
        data = TensorDataset(images, torch.randint(0, 10, (batch_size,), generator=generator))
        endless = [index % batch_size for index in range(batch_size * 20_000)]
        loader = DataLoader(data, batch_size=batch_size, sampler=endless, pin_memory=not device.rehearsed)
    return training_of(model, images, device, loader=loader)


def real_training(device: Device, *, batch_size: int) -> Training:
    """Return MobileNetV2's step on the same batch again and again; a rehearsal makes do with less."""
    return mlp(device) if device.rehearsed else mobilenet(device, batch_size=batch_size, image_size=224)


def mlp(device: Device) -> Training:
    """Return the step of a tiny perceptron: hardly anything but launches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    return training_of(model, torch.randn(16, 32), device)
