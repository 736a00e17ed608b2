"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`, gzipped if the name ends in `.gz`: the whole file, safe on disk, or nothing.

    What stood at `path` stays until the new file is complete; a symbolic link is followed. Raises OSError.
    """
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=5, mtime=0)  # no time: equal contents, equal files
    target = path.resolve()
    draft = target.with_name(f".bsprof-{secrets.token_hex(8)}")
    try:
        with draft.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Make a new name in `directory` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        file = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
