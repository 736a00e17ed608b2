"""How far a thing differs from itself on this machine: where that is kept, once `bsprof ab --aa` has measured it."""

from __future__ import annotations

from pathlib import Path

from bsprof import cache
from bsprof.ceilings import identity
from bsprof.model import Environment, NoiseFloor


def path_of(identity: str, *, together: bool) -> Path:
    """Return where the noise floor of `identity` is kept, by how the two sides were measured."""
    return cache.place("noise", f"{identity}-{'together' if together else 'apart'}.json")


def cached(environment: Environment, *, together: bool) -> NoiseFloor | None:
    """Return the noise floor kept for this hardware and software, or None."""
    name = identity(environment)
    kept = cache.read(path_of(name, together=together), NoiseFloor)
    return kept if kept and (kept.identity, kept.together) == (name, together) else None


def keep(floor: NoiseFloor) -> Path:
    """Write `floor` where `cached` finds it and return the path. Raises BsprofError where that cannot be written."""
    return cache.write(path_of(floor.identity, together=floor.together), floor)
