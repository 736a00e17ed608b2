"""What the children of test_process.py run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bsprof.errors import BsprofError

Emit = Callable[[str, int, float | None], None]


def echo(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    emit("echo", 3, 0.25)
    print("noise on stdout")
    print("noise on stderr", file=sys.stderr)
    return payload


def latency(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    return json.dumps(time.perf_counter_ns() - requested_ns).encode()


def refuse(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    raise BsprofError("cannot do that", hint="do something else")


def fail(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    raise LookupError("nothing here")


def die(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), json.loads(payload))
    time.sleep(60)
    return b"null"


def leave(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    os._exit(7)


def hang_with_family(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Start a child and a grandchild, tell their pids, ignore polite signals, and hang."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    script = (
        "import subprocess,sys,time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    Path(json.loads(payload)).write_text(json.dumps([os.getpid(), child.pid, grandchild]))
    emit("hanging", 0, None)
    time.sleep(600)
    return b"null"


def torch_loaded(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    return json.dumps("torch" in sys.modules).encode()
