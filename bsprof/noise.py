"""How far a thing differs from itself on this machine: where that is kept, once `bsprof ab --aa` has measured it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import platformdirs

from bsprof.ceilings import identity
from bsprof.errors import BsprofError
from bsprof.files import write_whole
from bsprof.model import Environment, NoiseFloor


def path_of(identity: str, *, together: bool) -> Path:
    """Return where the noise floor of `identity` is kept, by how the two sides were measured."""
    how = "together" if together else "apart"
    return platformdirs.user_cache_path("bsprof") / "noise" / f"{identity}-{how}.json"


def cached(environment: Environment, *, together: bool) -> NoiseFloor | None:
    """Return the noise floor kept for this hardware and software, or None. A damaged file is as good as none."""
    name = identity(environment)
    try:
        kept = msgspec.json.decode(path_of(name, together=together).read_bytes(), type=NoiseFloor)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return kept if (kept.identity, kept.together) == (name, together) else None


def keep(floor: NoiseFloor) -> Path:
    """Write `floor` where `cached` finds it, whole or not at all, and return the path.

    Raises BsprofError where that cannot be written.
    """
    path = path_of(floor.identity, together=floor.together)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, msgspec.json.encode(floor))
    except OSError as error:
        raise BsprofError(
            f"{path}: {error.strerror or error}", hint="set XDG_CACHE_HOME to a folder that can be written and has room"
        ) from error
    return path
