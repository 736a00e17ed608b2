"""Whether two results may stand side by side at all."""

from __future__ import annotations

from typing import Any

import msgspec

from bsprof.model import Accelerator, Environment

SIZE_TOLERANCE = 0.01
"""How far two sizes in bytes, or two quotas, may be apart and be the same: a kernel keeps a little more or less memory
to itself at each start, and container runtimes round."""

_SIZES = ("cpu_quota", "memory_bytes", "memory_limit_bytes", "shm_bytes")

_LOCATIONS = ("_HOME", "_PATH", "_DIR")
"""Endings of variables that say where something lies, not how fast it goes; versions are compared on their own."""


def environment_differences(before: Environment, after: Environment) -> list[str]:
    """Return what differs between two environments such that their numbers do not belong together, in words.

    Each entry reads `torch: 2.15.0 → 2.14.0`; none means that a sweep begun in `before` may go on in `after`.

    Everything is compared, the host's name included since one result speaks of one machine, except for what says
    nothing about speed: sizes are the same within `SIZE_TOLERANCE`; variables that only name a place (`CUDA_HOME`) do
    not count; of `git_commit` the mark for uncommitted changes does not count, because editing a note sets it, and a
    commit that is unknown on either side (another working directory) is no difference.
    """
    left, right = msgspec.structs.asdict(before), msgspec.structs.asdict(after)
    differences = []
    for name, old in left.items():
        new = right[name]
        if name == "variables":
            differences += _variables(old, new)
        elif name == "git_commit":
            if old and new and old.rstrip("+") != new.rstrip("+"):
                differences.append(f"{name}: {old} → {new}")
        elif name in _SIZES and _close(old, new):
            continue
        elif old != new:
            differences.append(f"{name}: {_show(old)} → {_show(new)}")
    return differences


def _variables(old: dict[str, str], new: dict[str, str]) -> list[str]:
    names = sorted(name for name in old.keys() | new.keys() if not name.endswith(_LOCATIONS))
    return [
        f"{name}: {old.get(name, 'unset')} → {new.get(name, 'unset')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _close(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    return abs(old - new) <= SIZE_TOLERANCE * max(abs(old), abs(new))


def _show(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(_show(item) for item in value)
    if isinstance(value, Accelerator):
        detail = ", ".join(
            str(part) for part in (value.uuid, value.capability, _gib(value.memory_bytes)) if part is not None
        )
        return f"{value.name} ({detail})" if detail else value.name
    return str(value)


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**30:.1f} GiB"
