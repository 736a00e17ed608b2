"""A commit's files in a folder of their own, beside the user's working tree."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bsprof.errors import BsprofError


def is_commit(name: str) -> bool:
    """Whether git knows a commit by this name here."""
    return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").returncode == 0


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[str]:
    """Yield the folder of a new git worktree at `commit` that corresponds to the current directory, and remove it.

    The user's own files, index and branches stay as they are. Raises BsprofError where git cannot make one.
    """
    prefix = _git("rev-parse", "--show-prefix").stdout.strip()
    with tempfile.TemporaryDirectory(prefix="bsprof-") as folder:
        place = Path(folder, "tree")
        made = _git("worktree", "add", "--detach", "--force", str(place), commit)
        try:
            if made.returncode:
                *_, last = ["", *made.stderr.strip().splitlines()]
                raise BsprofError(f"{commit}: git made no worktree: {last}", hint="see `git worktree list`")
            here = place / prefix
            if not here.is_dir():
                raise BsprofError(f"{commit}: has no {prefix}", hint="start it in a folder that both commits have")
            yield str(here)
        finally:
            _git("worktree", "remove", "--force", str(place))


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BsprofError("git is not installed", hint="give a folder instead of a commit") from None
