"""What is measured once for a machine and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
import platformdirs

from bsprof.errors import BsprofError
from bsprof.files import write_whole
from bsprof.noun import Noun

Kept = TypeVar("Kept", bound=Noun)


def place(*parts: str) -> Path:
    """Return a path in bsprof's part of the user's cache."""
    return platformdirs.user_cache_path("bsprof").joinpath(*parts)


def read(path: Path, kind: type[Kept]) -> Kept | None:
    """Return what is kept at `path`, or None. A damaged file is as good as none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def write(path: Path, noun: Noun) -> Path:
    """Keep `noun` at `path`, whole or not at all, and return the path. Raises BsprofError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(noun))
    except OSError as error:
        raise BsprofError(
            f"{path}: {error.strerror or error}", hint="set XDG_CACHE_HOME to a folder that can be written and has room"
        ) from error
    return path
