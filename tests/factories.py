"""Models and data sets of one's own: small healthy ones, and one for each way to fail."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from torch import nn
from torch.utils.data import Dataset, get_worker_info


class Pixels(Dataset[tuple[torch.Tensor, int]]):
    classes = tuple("abcdefghij")

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 8, 8), index / 64), index % 10


class Raising(Pixels):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index > 3:
            raise LookupError(f"sample {index} has no label")
        return super().__getitem__(index)


class KillsItsWorker(Pixels):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if get_worker_info() is not None and index > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Large(Pixels):
    """8 MiB a sample: a batch does not fit into a small /dev/shm."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.ones(3, 836, 836), index % 10


class Sleepy(Pixels):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.002)
        return super().__getitem__(index)


class Perceptron(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, num_classes))


class Laborious(Perceptron):
    """Computes more than its result needs: its steps take several times as long."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.tanh(torch.ones(200_000))
        return super().forward(images)


class Unordered(Perceptron):
    """Writes to one place twice: which value stays is left open."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().forward(images)


class Switches(Perceptron):
    """Sets what is not its own, as some libraries do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.backends.cudnn.benchmark = True
        return super().forward(images)


class OutOfDeviceMemory(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.25 GiB "
            "is free. Process 1 has 77.89 GiB memory in use. Of the allocated memory 76.00 GiB is allocated by "
            "PyTorch, and 1.20 GiB is reserved by PyTorch but unallocated."
        )


class OutOfHostMemory(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.hoard = torch.ones(64 * 2**30 // 4)
        return super().forward(images)


class Killed(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


class Hanging(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        print("about to hang", file=sys.stderr, flush=True)
        time.sleep(600)
        return super().forward(images)


class FailsInBackward(Perceptron):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out = super().forward(images)
        out.register_hook(_refuse)
        return out


def _refuse(gradient: torch.Tensor) -> torch.Tensor:
    raise ArithmeticError("no gradient today")


class Hungry(Perceptron):
    """Maps 32 MiB a sample in each forward pass and touches none of it: what a limit on private memory counts."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.scratch = torch.empty(len(images), 2**25, dtype=torch.uint8)
        return super().forward(images)
