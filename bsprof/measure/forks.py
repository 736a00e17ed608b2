"""A fork server that is itself a fork: what comes from it finds the modules of this process loaded."""

from __future__ import annotations

import itertools
import os
import resource
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker, util
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
    """Run `program` with standard streams and `handles` as the only open files, as after an exec, and end."""
    code = 1
    try:
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        for below, above in itertools.pairwise([2, *sorted(handles), most]):
            os.closerange(below + 1, above)
        exec(program, {})
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)
