"""What all nouns share."""

from __future__ import annotations

import msgspec


class Noun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Immutable, named fields, and no unknown ones. The fields *are* the JSON."""


class Note(Noun, frozen=True, kw_only=True):
    """Something a reader must know before trusting a number."""

    code: str
    text: str
