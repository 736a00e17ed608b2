"""Real JPEG files without a download: `jpeg[:WxH,n=N]`, photo-like images generated once into the cache.

What decoding costs depends on what is in a file, so flat or purely random images would mislead. Each image here
has what photographs have: a 1/f amplitude spectrum (Field 1987, "Relations between the statistics of natural
images"), occluding objects with edges and textures of their own (the dead-leaves model, Lee et al. 2001), shading,
one colour cast a class, and sensor noise. At 500x375 and quality 90 a file has 40 to 80 kB.

The files depend on the options alone; the same versions of NumPy and Pillow write the same bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bsprof.errors import BsprofError
from bsprof.workloads.imagefolder import open_folder
from bsprof.workloads.registration import Data, DataRequest, DataSource, data, parse_size_and_count

CLASSES = 10
QUALITY = 90
DEFAULT_SIZE = (500, 375)
DEFAULT_COUNT = 512
VERSION = 1
"""Part of the cache's name; to be raised whenever the images change."""

_MANIFEST = "manifest.json"
_OBJECTS = 14
_PERIOD = 1024
_SENSOR_NOISE = 3.0
"""Standard deviation in grey levels, that of a small sensor in fair light."""

Floats = NDArray[np.float32]


# --- one image --------------------------------------------------------------------------------------


def _texture(rng: np.random.Generator, power: float) -> Floats:
    """Return a periodic texture with amplitude 1/f^power, mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(_PERIOD)[:, None], np.fft.rfftfreq(_PERIOD)[None, :])
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(rng.standard_normal((_PERIOD, _PERIOD)))
    texture = np.fft.irfft2(spectrum / frequency**power, s=(_PERIOD, _PERIOD))
    scaled: Floats = (texture / texture.std()).astype(np.float32)
    return scaled


class _Camera:
    """Takes one photograph after another; textures are made once and looked at through moving windows."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        rng = np.random.default_rng(VERSION)
        self._light = self._extend(_texture(rng, power=2.0))
        self._relief = self._extend(_texture(rng, power=1.0))
        self._noise = self._extend(rng.normal(0.0, _SENSOR_NOISE, (_PERIOD, _PERIOD)).astype(np.float32))

    def _extend(self, tile: Floats) -> Floats:
        """Repeat a periodic tile so far that a window may start anywhere in the first period."""
        return np.pad(tile, ((0, self.height), (0, self.width)), mode="wrap")

    def _window(self, source: Floats, rng: np.random.Generator) -> Floats:
        top, left = rng.integers(0, _PERIOD, 2)
        return source[top : top + self.height, left : left + self.width]

    def _objects(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Return which object each pixel shows, 0 being the background; later objects hide earlier ones."""
        labels = Image.new("L", (self.width, self.height))
        draw = ImageDraw.Draw(labels)
        for label in range(1, _OBJECTS + 1):
            centre = rng.uniform(0, (self.width, self.height))
            # Sizes fall off as a power law: few large objects, many small ones.
            radius = max(2.0, max(self.width, self.height) * 0.06 * rng.uniform(0.08, 1.0) ** -0.8)
            corners = int(rng.integers(3, 12))
            angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
            reach = radius * rng.uniform(0.6, 1.0, corners)
            outline = centre + np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach[:, None]
            if label % 3:
                draw.polygon([(float(x), float(y)) for x, y in outline], fill=label)
            else:
                (left, top), (right, bottom) = centre - reach[:2], centre + reach[:2]
                draw.ellipse((float(left), float(top), float(right), float(bottom)), fill=label)
        return np.asarray(labels)

    def photograph(self, index: int) -> Image.Image:
        """Return image `index`, the same at every call on the same versions of NumPy and Pillow."""
        rng = np.random.default_rng((VERSION, index))
        cast = np.random.default_rng((VERSION, CLASSES, index % CLASSES)).uniform(-20, 20, 3)

        # Colours of natural scenes vary mostly in brightness, less in hue.
        brightness = rng.normal(118, 45, (_OBJECTS + 1, 1))
        colour = (brightness + rng.normal(0, 12, (_OBJECTS + 1, 3)) + cast).astype(np.float32)
        roughness = rng.gamma(2.0, 6.0, _OBJECTS + 1).astype(np.float32)

        objects = self._objects(rng)
        light = 25 * self._window(self._light, rng)
        relief = roughness[objects] * self._window(self._relief, rng)
        grey = light + relief + self._window(self._noise, rng)
        pixels = colour[objects] + grey[:, :, None]
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


# --- the folder -------------------------------------------------------------------------------------


def _generate(folder: Path, width: int, height: int, count: int) -> None:
    camera = _Camera(width, height)
    sizes = {}
    for index in range(count):
        path = folder / f"class_{index % CLASSES}" / f"img_{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        camera.photograph(index).save(path, quality=QUALITY)
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    (folder / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds exactly the files, with the sizes, that its manifest (written last) lists."""
    try:
        expected = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    present = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.glob("*/*")}
    return bool(present == expected)


def _ensure(folder: Path, width: int, height: int, count: int) -> None:
    """Make `folder` complete. Of several processes one generates, the others wait for it."""
    if _is_complete(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if _is_complete(folder):
                return
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _generate(partial, width, height, count)
            except BaseException:  # a full disk would stay full
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
    except OSError as error:
        raise BsprofError(
            f"cannot write images to {folder}: {error.strerror or error}",
            hint="set XDG_CACHE_HOME to a folder that can be written and has room",
        ) from error


def _parse(options: str) -> tuple[int, int, int]:
    size, count = parse_size_and_count("jpeg", options, sides="WH")
    width, height = size or DEFAULT_SIZE
    count = DEFAULT_COUNT if count is None else count
    if not (8 <= width <= 8192 and 8 <= height <= 8192):
        raise BsprofError(f"data 'jpeg:{options}': an image is 8 to 8192 pixels a side")
    if count < CLASSES:
        raise BsprofError(f"data 'jpeg:{options}': at least one image for each of {CLASSES} classes", hint="n=10")
    return width, height, count


def _prepare(options: str, request: DataRequest) -> Path:
    width, height, count = _parse(options)
    folder = request.cache / f"jpeg-{width}x{height}-n{count}-v{VERSION}"
    _ensure(folder, width, height, count)
    return folder


def _build(options: str, request: DataRequest) -> Data:
    return open_folder(_prepare(options, request), request.image_size)


data(
    DataSource(
        name="jpeg",
        summary=(
            "photo-like JPEG files, generated once, read and decoded; jpeg[:WxH,n=N], by default "
            f"{DEFAULT_SIZE[0]}x{DEFAULT_SIZE[1]},n={DEFAULT_COUNT}"
        ),
        check=_parse,
        prepare=_prepare,
        build=_build,
    )
)
