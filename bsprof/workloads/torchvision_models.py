"""Every classification model of torchvision, by its own name, with fresh weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from bsprof.errors import BsprofError
from bsprof.workloads.registration import ImageShape, model


def _runs(built: nn.Module, shape: ImageShape) -> bool:
    """Whether a batch of `shape` passes through, tried on the meta device: shapes alone, no arithmetic."""
    state = {**dict(built.named_parameters()), **dict(built.named_buffers())}
    state = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    try:
        torch.func.functional_call(built, state, (torch.empty(2, *shape, device="meta"),))
    except (RuntimeError, ValueError):
        return False
    return True


def _build(name: str, smallest: int, classes: int, shape: ImageShape) -> nn.Module:
    if shape.channels != 3:
        raise BsprofError(
            f"{name} takes images of 3 channels, the data has {shape.channels}",
            hint="choose other data, or a model for any number of channels such as resnet20 or mnist_cnn",
        )
    options: dict[str, Any] = {}
    family = name.partition("_")[0]
    # These two are built for one image size and check it themselves.
    if family == "vit":
        if shape.height != shape.width:
            raise BsprofError(f"{name} takes square images, the data gives {shape.height}x{shape.width}")
        options["image_size"] = shape.height
    elif family == "maxvit":
        options["input_size"] = (shape.height, shape.width)
    # Without auxiliary heads the output in training is one tensor; naming the initialisation avoids a warning.
    elif family in ("googlenet", "inception"):
        options |= {"aux_logits": False, "init_weights": True}

    try:
        built: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    except (AssertionError, ValueError) as error:
        if not {"image_size", "input_size"} & options.keys():
            raise
        raise BsprofError(
            f"{name} cannot be built for {shape.height}x{shape.width} images: {error}",
            hint="--image-size 224 works",
        ) from error
    # The documented size is sometimes that of the published weights, so it is doubted before it is enforced.
    if not options.keys() & {"image_size", "input_size"} and min(shape[1:]) < smallest and not _runs(built, shape):
        raise BsprofError(
            f"{name} takes images of at least {smallest} px, the data gives {shape.height}x{shape.width}",
            hint=f"choose --image-size {smallest} or more",
        )
    return built


def _register_all() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        # Looking up the documentation of weights, none is loaded.
        facts = torchvision.models.get_model_weights(name).DEFAULT.meta
        smallest = max(facts["min_size"])
        summary = f"torchvision; {facts['num_params'] / 1e6:.1f} M parameters at 1000 classes"
        model(name, summary)(partial(_build, name, smallest))


_register_all()
