"""Images in class folders, really read and decoded: `imagefolder:PATH`, and what `jpeg` is loaded with."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torchvision import datasets, transforms

from bsprof.errors import BsprofError
from bsprof.workloads.registration import Data, DataRequest, DataSource, ImageShape, data

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_SIDE = 224


class CorruptImageError(Exception):
    """An image file that cannot be read or decoded; the message names it.

    It takes one string, so that a DataLoader can raise it again in the main process as it was.
    """


def decode_image(path: str | Path) -> Image.Image:
    """Read and decode one file as RGB. Raises CorruptImageError, naming the file."""
    try:
        with Path(path).open("rb") as file:
            return Image.open(file).convert("RGB")
    except UnidentifiedImageError as error:  # its own message shows a file object
        raise CorruptImageError(f"cannot decode {path}: not in a known image format") from error
    # What Pillow's decoders raise on damaged files, see PIL.ImageFile and the format plug-ins.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise CorruptImageError(f"cannot decode {path}: {error}") from error


def training_transform(side: int) -> transforms.Compose:
    """Return the augmentation of the PyTorch ImageNet example: random resized crop, flip, tensor, normalise."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def open_folder(path: Path, image_size: int | None) -> Data:
    """Return the images below `path`, one subfolder a class. Raises BsprofError where there are none."""
    side = image_size or DEFAULT_SIDE
    try:
        dataset = datasets.ImageFolder(path, transform=training_transform(side), loader=decode_image)
    except FileNotFoundError as error:
        reason = "no such folder" if not path.exists() else str(error)
    except (NotADirectoryError, PermissionError) as error:
        reason = error.strerror or str(error)
    else:
        return Data(dataset=dataset, classes=len(dataset.classes), shape=ImageShape(3, side, side))
    raise BsprofError(
        f"imagefolder {path}: {reason}", hint="a folder with one subfolder of images for each class is expected"
    )


def _folder(options: str) -> Path:
    if not options:
        raise BsprofError("data 'imagefolder' needs a path", hint="write imagefolder:PATH")
    return Path(options).expanduser()


def _build(options: str, request: DataRequest) -> Data:
    return open_folder(_folder(options), request.image_size)


data(
    DataSource(
        name="imagefolder",
        summary="your own images, imagefolder:PATH with one subfolder a class; 224 px unless --image-size",
        check=_folder,
        prepare=_build,
        build=_build,
    )
)
