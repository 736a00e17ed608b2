"""Each phase of a training step of two networks: an entry a phase, by the fixture that users have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.suites.workloads import loader
from bsprof.workloads.registration import ImageShape
from bsprof.workloads.registry import build_model


@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet20"])
def test_step(network: str, training_step: Any) -> None:
    model = build_model(network, classes=10, shape=ImageShape(3, 64, 64), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    training_step(model, loader(0), optimizer)
