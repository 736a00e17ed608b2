"""Data sets that torchvision reads and can download: cifar10, cifar100, mnist, places365.

Augmentation is what these sets are usually trained with. Where `image_size` differs from a set's own, images are
resized to it as the last step before the tensor, so that MobileNetV2 may see CIFAR at 224 px.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch.utils.data import Dataset
from torchvision import datasets, transforms

from bsprof.errors import BsprofError
from bsprof.workloads.imagefolder import DEFAULT_SIDE, decode_image, training_transform
from bsprof.workloads.registration import Data, DataRequest, DataSource, ImageShape, data

Open = Callable[[Path, int, bool], Dataset[Any]]
"""`(root, side, download)`: open a set whose images come out `side` pixels square, downloading it if asked to."""


def _pipeline(
    augment: Sequence[Any], mean: Sequence[float], std: Sequence[float], *, natural: int, side: int
) -> transforms.Compose:
    resize = [] if side == natural else [transforms.Resize((side, side))]
    return transforms.Compose([*augment, *resize, transforms.ToTensor(), transforms.Normalize(mean, std)])


def _cifar(kind: Callable[..., Dataset[Any]], root: Path, side: int, download: bool) -> Dataset[Any]:
    # Padding, crop and flip of He et al., arXiv 1512.03385, section 4.2; per-channel statistics of the training set.
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    pipeline = _pipeline(augment, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), natural=32, side=side)
    return kind(root, train=True, transform=pipeline, download=download)


def _mnist(root: Path, side: int, download: bool) -> Dataset[Any]:
    pipeline = _pipeline([], (0.1307,), (0.3081,), natural=28, side=side)
    dataset: Dataset[Any] = datasets.MNIST(root, train=True, transform=pipeline, download=download)
    return dataset


def _places365(root: Path, side: int, download: bool) -> Dataset[Any]:
    dataset = datasets.Places365(
        root, small=True, transform=training_transform(side), loader=decode_image, download=download
    )
    images = Path(dataset.images_dir)
    if not images.is_dir():  # torchvision looks at the lists alone
        raise RuntimeError(f"no images in {images}")
    opened: Dataset[Any] = dataset
    return opened


def _check(name: str, options: str) -> None:
    if options:
        raise BsprofError(f"data '{name}' takes no options, not {options!r}", hint=f"write --data {name}")


def _open(name: str, open_dataset: Open, root: Path, side: int, *, download: bool) -> Dataset[Any]:
    """Open the set, turning each way in which its files can be absent or damaged into a BsprofError."""
    try:
        return open_dataset(root, side, download)
    # torchvision: RuntimeError where files are absent or fail their checksum, URLError (an OSError) from a download,
    # and whatever its parsers stumble over in files without a checksum.
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        reason = " ".join(str(error).split()).partition(" You can ")[0]  # it goes on about torchvision's own argument
        if download:
            message, hint = f"cannot download {name} into {root}: {reason}", "put its files there by other means"
        else:
            message, hint = (
                f"{name} is not in {root}: {reason}",
                "--download fetches it, --data-root DIR names its place",
            )
        raise BsprofError(message, hint=hint) from error


def _prepare(name: str, open_dataset: Open, natural: int, options: str, request: DataRequest) -> None:
    _check(name, options)
    root = request.datasets
    if not request.download:
        _open(name, open_dataset, root, natural, download=False)
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Some versions of torchvision print to stdout, which is kept for results.
        with FileLock(root / f".{name}.lock"), contextlib.redirect_stdout(sys.stderr):
            try:
                _open(name, open_dataset, root, natural, download=False)
            except BsprofError:
                _open(name, open_dataset, root, natural, download=True)
    except OSError as error:
        raise BsprofError(f"cannot download {name} into {root}: {error.strerror or error}") from error


def _build(
    name: str, open_dataset: Open, channels: int, classes: int, natural: int, options: str, request: DataRequest
) -> Data:
    _check(name, options)
    side = request.image_size or natural
    dataset = _open(name, open_dataset, request.datasets, side, download=False)
    return Data(dataset=dataset, classes=classes, shape=ImageShape(channels, side, side))


def _register(name: str, summary: str, open_dataset: Open, *, channels: int, classes: int, natural: int) -> None:
    data(
        DataSource(
            name=name,
            summary=summary,
            check=partial(_check, name),
            prepare=partial(_prepare, name, open_dataset, natural),
            build=partial(_build, name, open_dataset, channels, classes, natural),
        )
    )


_register(
    "cifar10", "50,000 images, 32 px, 10 classes", partial(_cifar, datasets.CIFAR10), channels=3, classes=10, natural=32
)
_register(
    "cifar100",
    "50,000 images, 32 px, 100 classes",
    partial(_cifar, datasets.CIFAR100),
    channels=3,
    classes=100,
    natural=32,
)
_register("mnist", "60,000 digits, 1x28x28, 10 classes", _mnist, channels=1, classes=10, natural=28)
_register(
    "places365",
    "1.8 million scenes as 256 px files, 365 classes; cropped to 224 px",
    _places365,
    channels=3,
    classes=365,
    natural=DEFAULT_SIDE,
)
