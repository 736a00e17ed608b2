"""Tensors in memory, `synthetic[:CxHxW,n=N]`: what training costs when nothing is read or decoded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bsprof.errors import BsprofError
from bsprof.workloads.registration import Data, DataRequest, DataSource, ImageShape, data, parse_size_and_count

CLASSES = 10
DEFAULT_SHAPE = ImageShape(3, 224, 224)
DEFAULT_COUNT = 1024
BANK_BYTES = 32 * 1024**2
"""Memory the distinct tensors may take; more samples than fit share them. Past the last-level cache of most CPUs."""


class SyntheticDataset(Dataset[tuple[Tensor, int]]):
    """`count` samples of noise, the i-th always the same; all are views into one bank of bounded size."""

    def __init__(self, shape: ImageShape, count: int, seed: int) -> None:
        sample_bytes = 4 * shape.channels * shape.height * shape.width
        distinct = max(1, min(count, BANK_BYTES // sample_bytes))
        self._bank = torch.randn(distinct, *shape, generator=torch.Generator().manual_seed(seed))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._bank[index % len(self._bank)], index % CLASSES


def _parse(options: str) -> tuple[ImageShape, int]:
    size, count = parse_size_and_count("synthetic", options, sides="CHW")
    shape = ImageShape(*size) if size else DEFAULT_SHAPE
    count = DEFAULT_COUNT if count is None else count
    if count < 1 or min(shape) < 1 or 4 * shape.channels * shape.height * shape.width > 1024**3:
        raise BsprofError(
            f"data 'synthetic:{options}': a sample has 1 byte to 1 GiB, and there is at least one",
            hint="for example synthetic:3x224x224,n=1024",
        )
    return shape, count


def _build(options: str, request: DataRequest) -> Data:
    shape, count = _parse(options)
    if request.image_size is not None:
        shape = ImageShape(shape.channels, request.image_size, request.image_size)
    return Data(dataset=SyntheticDataset(shape, count, request.seed), classes=CLASSES, shape=shape)


data(
    DataSource(
        name="synthetic",
        summary=(
            f"noise held in memory, nothing decoded; synthetic[:CxHxW,n=N], by default {DEFAULT_SHAPE},"
            f"n={DEFAULT_COUNT} ({BANK_BYTES // 1024**2} MiB of distinct samples at the most, repeated)"
        ),
        check=_parse,
        prepare=lambda options, request: _parse(options),
        build=_build,
    )
)
