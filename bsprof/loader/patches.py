"""Attributes of other people's classes and modules, replaced for a while."""

from __future__ import annotations

from typing import Any

_MISSING = object()


class Patches:
    """Replaces attributes, and puts back the very objects that were there."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, object]] = []

    def put(self, holder: Any, name: str, value: object) -> None:
        """Set `holder.name` to `value` until `undo`; `holder` is a class or a module."""
        self._before.append((holder, name, vars(holder).get(name, _MISSING)))
        setattr(holder, name, value)

    def undo(self) -> None:
        """Put everything back, last first. Doing it again does nothing."""
        while self._before:
            holder, name, value = self._before.pop()
            if value is _MISSING:
                delattr(holder, name)
            else:
                setattr(holder, name, value)
