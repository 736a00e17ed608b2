"""What all tests of a process share: a cache of their own, and the fork server."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver
from unittest import mock

import pytest

from bsprof.sweep.process import PRELOAD

_CACHE = "BSPROF_TESTS_CACHE"

if _CACHE not in os.environ:  # xdist's workers inherit it
    os.environ[_CACHE] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bsprof-cache-")
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)

# Whichever test starts the server, the commands of all others want torch to be there.
forkserver.set_forkserver_preload(list(PRELOAD))


@pytest.fixture(autouse=True)
def variables_stay() -> Iterator[None]:
    """Undo what a test does to the environment: a command of a later one would run in another."""
    with mock.patch.dict(os.environ):
        yield
