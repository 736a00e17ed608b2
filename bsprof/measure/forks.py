"""A fork server that is itself a fork: what comes from it finds the modules of this process loaded."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import NoReturn


def serve() -> None:
    """Start this process' fork server as a fork of it, unless it has one.

    multiprocessing would start an interpreter, which imports torch all over again: seconds for each case. Call this
    before CUDA starts, and before there are threads that might hold a lock: neither survives a fork.
    """
    resource_tracker.ensure_running()  # below it would be forked as well
    start = util.spawnv_passfds
    # The one place where multiprocessing starts an interpreter for its server; it does all else as ever.
    setattr(util, "spawnv_passfds", _fork)  # noqa: B010 - an assignment, mypy says, is none to a function
    try:
        forkserver.ensure_running()
    finally:
        setattr(util, "spawnv_passfds", start)  # noqa: B010


def _fork(executable: bytes, arguments: Sequence[str], handles: Sequence[int]) -> int:
    """Fork, and run in the child what an interpreter would be given by `-c`; return the child's process number."""
    pid = os.fork()
    if pid == 0:
        _become(arguments[-1], handles)
    return pid


def _become(program: str, handles: Sequence[int]) -> NoReturn:
    """Run `program` with no more files open than after an exec, and end."""
    code = 1
    try:
        close_files(handles)
        exec(program, {})
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def close_files(but: Collection[int] = ()) -> None:
    """Close all files of this process but the standard streams and these."""
    for handle in [int(entry.name) for entry in Path("/dev/fd").iterdir()]:
        if handle > 2 and handle not in but:
            with contextlib.suppress(OSError):  # the one by which they were listed is closed already
                os.close(handle)
