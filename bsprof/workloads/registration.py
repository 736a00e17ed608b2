"""What a workload is, and how a file of this room makes one known by name.

A file registers its models with `@model(name, summary)` and its data sets with `data(DataSource(...))`;
`registry` imports every file of the room, so adding a workload touches nothing but its own file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import Dataset

from bsprof.errors import BsprofError


class ImageShape(NamedTuple):
    """The shape of one sample tensor: channels and pixels."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set ready to be loaded: map-style or iterable, of (float tensor of `shape`, int below `classes`)."""

    dataset: Dataset[Any]
    classes: int
    shape: ImageShape


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What a data set is built for.

    `image_size` is in pixels a side, None for the data set's own; `root` is where the user keeps data sets,
    None for a folder in the cache; `seed` fixes whatever is drawn at random; `cache` is the user's cache directory.
    """

    image_size: int | None = None
    root: Path | None = None
    download: bool = False
    seed: int = 0
    cache: Path

    @property
    def datasets(self) -> Path:
        """Where data sets that are not generated live."""
        return (self.root or self.cache / "datasets").expanduser()


ModelBuilder = Callable[[int, ImageShape], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by name: `build(classes, shape)` returns it with fresh weights drawn from torch's generator."""

    name: str
    summary: str
    build: ModelBuilder


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set by name; what follows the colon of its spec is `options` ("" where there is none).

    `check(options)` raises BsprofError where they are malformed and touches nothing; `prepare(options, request)`
    generates, downloads or validates, once; `build(options, request)` relies on it.
    """

    name: str
    summary: str
    check: Callable[[str], object]
    prepare: Callable[[str, DataRequest], object]
    build: Callable[[str, DataRequest], Data]


MODELS: dict[str, Model] = {}
DATA: dict[str, DataSource] = {}


def model(name: str, summary: str) -> Callable[[ModelBuilder], ModelBuilder]:
    """Register the decorated function as the builder of model `name`."""

    def register(build: ModelBuilder) -> ModelBuilder:
        if name in MODELS:
            raise ValueError(f"two models are named {name!r}")
        MODELS[name] = Model(name=name, summary=summary, build=build)
        return build

    return register


def data(source: DataSource) -> None:
    """Register a data set."""
    if source.name in DATA:
        raise ValueError(f"two data sets are named {source.name!r}")
    DATA[source.name] = source


def parse_size_and_count(name: str, options: str, *, sides: str) -> tuple[tuple[int, ...] | None, int | None]:
    """Read `AxB,n=N`, both parts optional, as a size with one number for each letter of `sides`, and a count.

    Raises BsprofError on anything else.
    """
    size, count = None, None
    for part in options.split(",") if options else ():
        if size is None and re.fullmatch("x".join([r"\d{1,6}"] * len(sides)), part):
            size = tuple(int(side) for side in part.split("x"))
        elif count is None and re.fullmatch(r"n=\d{1,9}", part):
            count = int(part[2:])
        else:
            size_form = "x".join(sides)
            raise BsprofError(
                f"data '{name}:{options}': {part!r} is neither a size {size_form} nor a count n=N",
                hint=f"write {name}[:{size_form},n=N]",
            )
    return size, count


def expect_size(name: str, shape: ImageShape, side: int) -> None:
    """Raise BsprofError unless images are `side` pixels square, as a model's linear layer may require."""
    if (shape.height, shape.width) != (side, side):
        raise BsprofError(
            f"{name} takes {side}x{side} images, the data gives {shape.height}x{shape.width}",
            hint=f"choose --image-size {side}, or a model for any size such as resnet20 or resnet18",
        )
