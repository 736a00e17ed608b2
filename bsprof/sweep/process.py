"""The process a case runs in: started from a fork server or by exec, watched, ended with all that it started."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import getpass
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple

import msgspec

from bsprof import store
from bsprof.errors import BsprofError
from bsprof.sweep.interruption import SIGNALS, Interruption

PRELOAD = ("bsprof.sweep.process", "bsprof.cli", "bsprof.sweep.child")
"""Imported once by the fork server, so that a child has torch without waiting for it."""

TICK_S = 1.0
"""The parent wakes this often to draw; otherwise it sleeps."""

_LOG = "output"

_FOLDER = "BSPROF_FORK_SERVERS_FOLDER"

STDERR_TAIL = 4000
"""Bytes of a dead child's last words that are kept."""


class Message(msgspec.Struct, tag_field="kind", tag=str.lower):
    """What a child says to its parent."""


class Progressed(Message):
    """Where the case is."""

    stage: str
    steps: int
    precision: float | None


class Returned(Message):
    """The target's value, as JSON."""

    value: msgspec.Raw


class Refused(Message):
    """The target raised a BsprofError."""

    message: str
    hint: str | None


class Raised(Message):
    """The target raised anything else."""

    message: str
    traceback: str


_Messages = Progressed | Returned | Refused | Raised


class ChildError(RuntimeError):
    """A defect: the target raised what nobody expected of it."""

    def __init__(self, target: str, text: str, trace: str) -> None:
        super().__init__(f"{target}: {text}\n{trace}")
        self.text = text
        self.trace = trace


class Death(NamedTuple):
    """A child that ended without a word."""

    signal: signal.Signals | None
    exit_code: int | None
    timed_out: bool
    last_words: str


class Interpreter(NamedTuple):
    """What runs a child that is to share nothing with another one: a fresh start lays its memory out anew."""

    python: str
    """The executable."""
    directory: str
    """Where the child works, and where the user's modules are imported from before anywhere else."""

    def variables(self) -> dict[str, str]:
        """Return the environment variables of such a child: its directory's modules go before what is installed."""
        roots = [self.directory, str(Path(self.directory, "src")), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}


class Reply(NamedTuple):
    """How a child ended: with a `value`, or with a `death`."""

    value: bytes | None
    death: Death | None
    wall_s: float


def call(
    target: str,
    payload: bytes,
    *,
    deadline_s: float | None = None,
    on_progress: Callable[[Progressed | None], None] = lambda _: None,
    stop: Interruption | None = None,
    interpreter: Interpreter | None = None,
) -> Reply:
    """Call `target` ('module:function' of `(payload, emit) -> bytes`) in a process of its own and wait for it.

    The process is forked from a server that has its imports already, or started anew by `interpreter`, if one is given.
    `on_progress` is called with each message, and with None once a second. Whatever happens, the child and every
    process that it started are gone when this returns. Raises KeyboardInterrupt when `stop` is requested meanwhile, and
    BsprofError and ChildError as the target raised them.
    """
    context = multiprocessing.get_context("forkserver")
    directory = interpreter.directory if interpreter else current_directory()
    scratch = Path(tempfile.mkdtemp(prefix="bsprof-")) if interpreter else _start_server()
    ours, theirs = context.Pipe()
    started = time.perf_counter_ns()
    process: multiprocessing.process.BaseProcess | _Program
    if interpreter:
        arguments = [str(theirs.fileno()), target, str(started), str(scratch)]
        process = _Program(
            [interpreter.python, "-P", "-m", "bsprof.sweep.fresh", *arguments],
            directory,
            interpreter.variables(),
            scratch / _LOG,
            inherited=[theirs.fileno()],
        )
    else:
        process = context.Process(target=_enter, args=(theirs, target, payload, started, str(scratch), directory))
    try:
        try:
            process.start()
            theirs.close()
            if interpreter:
                with contextlib.suppress(OSError):  # it has died already, which is seen below
                    ours.send_bytes(payload)
            message = _await(process, ours, deadline_s, on_progress, stop)
        finally:
            _end(process)
            ours.close()
        wall_s = (time.perf_counter_ns() - started) / 1e9
        return Reply(*_understand(message, process.exitcode, scratch / _LOG, target), wall_s)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run(
    command: Sequence[str],
    interpreter: Interpreter,
    variables: Mapping[str, str],
    *,
    deadline_s: float,
    on_tick: Callable[[], None] = lambda: None,
    stop: Interruption | None = None,
) -> Reply:
    """Run a Python program with that interpreter to its end; a `death` is told unless it ended well.

    `variables` are added to its environment. `on_tick` is called once a second. Whatever happens, the program and every
    process that it started are gone when this returns. Raises KeyboardInterrupt when `stop` is requested meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="bsprof-") as scratch:
        log = Path(scratch, _LOG)
        environment = {**interpreter.variables(), **variables}
        program = _Program([interpreter.python, *command], interpreter.directory, environment, log)
        started = time.perf_counter_ns()
        end = time.monotonic() + deadline_s
        timed_out = False
        try:
            program.start()
            while program.exitcode is None and not timed_out:
                program.wait(TICK_S, stop)
                if stop and stop.requested:
                    raise KeyboardInterrupt
                on_tick()
                timed_out = time.monotonic() >= end and program.exitcode is None
        finally:
            wall_s = (time.perf_counter_ns() - started) / 1e9
            _end(program)
        _, death = _understand(_TimedOut() if timed_out else None, program.exitcode, log, "")
        return Reply(None, death if timed_out or program.exitcode else None, wall_s)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def _die_with_parent() -> None:
    """Ask the kernel to end this process when its parent has ended, even by SIGKILL; Linux alone can (prctl(2))."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Program:
    """A program started by exec in a session of its own, in the shape of a multiprocessing process."""

    def __init__(
        self,
        command: Sequence[str],
        directory: str,
        variables: Mapping[str, str],
        log: Path,
        *,
        inherited: Sequence[int] = (),
    ) -> None:
        self._command, self._directory, self._variables = list(command), directory, dict(variables)
        self._log, self._inherited = log, tuple(inherited)
        self._popen: subprocess.Popen[bytes] | None = None
        self._descriptor: int | None = None

    def start(self) -> None:
        """Start it; raises BsprofError where it cannot be."""
        try:
            with self._log.open("wb") as log:
                self._popen = subprocess.Popen(
                    self._command,
                    cwd=self._directory,
                    env=self._variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=self._inherited,
                    start_new_session=True,
                    # Who has a pipe of ours sees our end by it, and cleans up.
                    preexec_fn=None if self._inherited else _die_with_parent,
                )
        except OSError as error:
            raise BsprofError(f"{self._command[0]}: {error.strerror or error}", hint="is it a Python?") from error
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._descriptor = os.pidfd_open(self._popen.pid)

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen else None

    @property
    def sentinel(self) -> int | None:
        """What becomes readable when it ends; None where the system has no such thing, and it must be asked."""
        return self._descriptor

    @property
    def exitcode(self) -> int | None:
        return self._popen.poll() if self._popen else None

    def wait(self, timeout: float, stop: Interruption | None) -> None:
        """Return when it has ended, a stop was asked for, or the time is up."""
        assert self._popen is not None
        if self._descriptor is not None:
            wait([self._descriptor, *([stop.fileno()] if stop else [])], timeout)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout)

    def join(self, timeout: float | None = None) -> None:
        if self._popen:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout)
        if self._descriptor is not None and self.exitcode is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def kill(self) -> None:
        if self._popen:
            self._popen.kill()


def current_directory() -> str:
    """Return the current directory, or raise BsprofError where it is gone."""
    try:
        return str(Path.cwd())
    except OSError as error:
        raise BsprofError(f"the current directory: {error.strerror}", hint="cd to one that exists") from error


def _start_server() -> Path:
    """Start the fork server unless it runs, and return a new folder for a child's files inside the server's own.

    What a terminal sends to all its processes (Ctrl-C, hanging up) is its parent's to hear. The server ends when its
    parent has gone, even by SIGKILL, and removes its folder then.
    """
    forkserver.set_forkserver_preload(list(PRELOAD))
    resource_tracker.ensure_running()  # the fork server would start it too, but that unblocks signals
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        folder = os.environ[_FOLDER] = get_temp_dir()
        scratch = Path(tempfile.mkdtemp(dir=folder))
        forkserver.ensure_running()
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "point TMPDIR to a folder with room and a short name: sockets are made in it"
        raise BsprofError(f"temporary files: {reason}", hint=hint) from error
    finally:
        os.environ.pop(_FOLDER, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    return scratch


def _remove(folder: str, owner: int) -> None:
    """Remove `folder` when the process `owner` ends, not when a child of its does; others may still write there."""
    end = time.monotonic() + 2.0
    while os.getpid() == owner and Path(folder).exists() and time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)


if _FOLDER in os.environ:  # in the fork server, which preloads this module
    atexit.register(_remove, os.environ.pop(_FOLDER), os.getpid())


class _TimedOut(NamedTuple):
    pass


def _await(
    process: multiprocessing.process.BaseProcess | _Program,
    pipe: Connection,
    deadline_s: float | None,
    on_progress: Callable[[Progressed | None], None],
    stop: Interruption | None,
) -> _Messages | _TimedOut | None:
    """Return the child's last message, or None when it died without one."""
    end = None if deadline_s is None else time.monotonic() + deadline_s
    awaited: list[Connection | int] = [pipe, *([stop.fileno()] if stop else [])]
    if process.sentinel is not None:
        awaited.append(process.sentinel)
    while True:
        timeout = TICK_S if end is None else min(TICK_S, max(0.0, end - time.monotonic()))
        ready = wait(awaited, timeout)
        if stop and stop.requested:
            raise KeyboardInterrupt
        if pipe in ready:
            try:
                message: _Messages = msgspec.json.decode(pipe.recv_bytes(), type=_Messages)
            except (EOFError, OSError):
                process.join(TICK_S)
                return None
            if not isinstance(message, Progressed):
                return message
            on_progress(message)
        elif ready:
            return None
        else:
            on_progress(None)
        if end is not None and time.monotonic() >= end:
            return _TimedOut()


def _end(process: multiprocessing.process.BaseProcess | _Program) -> None:
    """End the child's whole session: its workers, and whatever they started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        # It may not have reached setsid yet.
        process.kill()
    process.join()


def _understand(
    message: _Messages | _TimedOut | None, exit_code: int | None, log: Path, target: str
) -> tuple[bytes | None, Death | None]:
    match message:
        case Returned(value=value):
            return bytes(value), None
        case Refused(message=text, hint=hint):
            raise BsprofError(text, hint=hint)
        case Raised(message=text, traceback=trace):
            raise ChildError(target, text, trace)
        case _:
            killed = None
            if exit_code is not None and -exit_code in set(signal.Signals):  # real-time signals have no names
                killed = signal.Signals(-exit_code)
            return None, Death(killed, exit_code, isinstance(message, _TimedOut), _last_words(log))


def _last_words(log: Path) -> str:
    """Return the end of what the child wrote, which may have been anything and much of it."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - STDERR_TAIL))
        return file.read().decode(errors="replace").strip()


# --- in the child -----------------------------------------------------------------------------------


def enter_fresh(handle: int, target: str, requested_ns: int, scratch: str) -> None:
    """Be the child that an interpreter was started for: the question comes through the pipe that it inherited."""
    pipe = Connection(handle)
    os.set_inheritable(handle, False)
    _enter(pipe, target, pipe.recv_bytes(), requested_ns, scratch, str(Path.cwd()))


def _enter(pipe: Connection, target: str, payload: bytes, requested_ns: int, scratch: str, directory: str) -> None:
    """Run `target` in a session of its own and end when the parent does; output and temporary files go to `scratch`."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if pipe.poll():  # a parent sends nothing, so this is its end: it left before the fork server came to this child
        os._exit(0)
    # A fork server's children would start their own workers from a fork server too, as no user's script does.
    multiprocessing.set_start_method(None, force=True)
    # Compiled kernels outlive a case, as they outlive a training: they stay where torch would have put them.
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        kernels = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    handle = os.open(Path(scratch, _LOG), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    threading.Thread(target=_outlive_nobody, args=(pipe, scratch), daemon=True).start()

    def say(message: Message) -> None:
        pipe.send_bytes(store.to_json(message))

    def emit(stage: str, steps: int, precision: float | None) -> None:
        say(Progressed(stage, steps, precision))

    module, _, function = target.partition(":")
    try:
        value = getattr(importlib.import_module(module), function)(payload, requested_ns, emit)
        say(Returned(msgspec.Raw(value)))
    except BsprofError as error:
        say(Refused(error.message, error.hint))
    except Exception as error:
        say(Raised(traceback.format_exception_only(error)[-1].strip(), traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing torch down takes longer than starting did, and nothing is left to save.
    os._exit(0)


def _outlive_nobody(pipe: Connection, scratch: str) -> None:
    """Wait for the parent's end of the pipe to close, as it does even when the parent is killed; then end all."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
