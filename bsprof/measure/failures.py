"""Exceptions turned into outcomes: what ran out, where, and the evidence.

What torch and the C libraries raise is mostly `RuntimeError` with a sentence, so sentences are what is read here; the
wordings are those of torch 2.11 to 2.15. What kills the process itself leaves no exception: its parent sees to that.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bsprof.errors import BsprofError
from bsprof.model import Outcome, OutcomeKind

Evidence = dict[str, int | float | str | None]

SMALLER_STEP = "a smaller --batch-size or --image-size, or --amp bf16, needs less"
SMALLER_LOADER = "fewer --workers, a smaller --prefetch or a smaller --batch-size need less"
MORE_SHM = (
    "give /dev/shm more room (in a container: --shm-size=8g or --ipc=host), "
    "or use fewer --workers, a smaller --prefetch, or --workers 0, which needs none"
)

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 2**10, "MB": 2**20, "GB": 2**30}
_SIZE = r"(\d+(?:\.\d+)?) (bytes|[KMGT]i?B)"


_ABANDONED: list[BaseException] = []


def abandon(error: BaseException) -> None:
    """Keep `error` until the process ends, and through its traceback the loader's iterator too.

    When a worker dies, torch raises from its SIGCHLD handler, wherever the main thread happens to be. Where that is
    inside a queue's lock, the lock stays taken, and tearing the iterator down waits for it for ever (seen in 1 of 200
    such deaths beside busy cores). The process ends with all its workers anyway.
    """
    _ABANDONED.append(error)


def blame_a_worker() -> None:
    """Raise torch's own error if a DataLoader worker has died: what it was handing over breaks off in many ways."""
    end = time.monotonic() + 0.5
    while time.monotonic() < end:  # its sockets close before it has quite ended
        torch._C._error_if_any_worker_fails()
        time.sleep(0.05)


def classify(error: BaseException, phase: str | None = None, *, oom_kills: int = 0) -> Outcome:
    """Return how a case ended that `error` ended.

    `phase` is what was running; a killed DataLoader worker interrupts whatever runs, so its phase is `loader`.
    `oom_kills` is by how much the count of the kernel's out-of-memory kills grew since the case began
    (`cgroup.oom_kills`): a worker that got SIGKILL died of that, if there was one. Sizes in the evidence are bytes.
    """
    if isinstance(error, KeyboardInterrupt):
        return Outcome(kind="interrupted", message="interrupted by the user", phase=phase)
    failure = _read_failure(error)
    return (
        _worker_death(failure, oom_kills)
        or _shm(failure, phase)
        or _device_memory(failure, phase)
        or _host_memory(failure, phase)
        or _descriptors(failure, phase)
        or _compilation(failure, phase)
        or _nondeterministic(failure, phase)
        or _other(failure, phase)
    )


class _Failure(NamedTuple):
    """An exception, seen through torch's relaying of it from a worker process or the pinning thread."""

    error: BaseException
    name: str
    text: str
    """The message; of a relayed exception the original one."""
    where: str
    """` in DataLoader worker 0`, or nothing where it was raised here."""
    traceback: str

    @property
    def headline(self) -> str:
        """`Type in DataLoader worker 0: first line of the message`, what there is of it."""
        first = next(iter(self.text.strip().splitlines()), "")
        return f"{self.name}{self.where}" + (f": {first}" if first else "")


_RELAYED = re.compile(r"\s*Caught (?P<name>\S+) in (?P<where>.+?)\.\nOriginal (?P<traceback>.*)", re.DOTALL)


def _read_failure(error: BaseException) -> _Failure:
    """Undo `torch._utils.ExceptionWrapper`, which keeps the type where it can and makes the traceback the message."""
    relayed = _RELAYED.fullmatch(_said(error))
    if relayed is None:
        formatted = "".join(traceback.format_exception(error))
        return _Failure(error, type(error).__name__, _said(error), "", formatted)
    name, original = relayed["name"], relayed["traceback"].strip()
    # The last line that names the type begins the message; module and enclosing class stand before the name.
    *_, last = [None, *re.finditer(rf"^[\w.<>]*?{re.escape(name)}(?::[ ]?|$)", original, re.MULTILINE)]
    text = original[last.end() :].strip() if last else ""
    where = relayed["where"].replace("worker process", "worker")
    return _Failure(error, name, text, f" in {where}", original)


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # anything may stand in the `__str__` of a user's exception
        return "(it cannot say what)"


# --- workers ----------------------------------------------------------------------------------------

_KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: (.+?)\.(?: |$)")
_EXITED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly(?: with exit code (\d+))?")


def _worker_death(failure: _Failure, oom_kills: int) -> Outcome | None:
    """Tell a worker that was killed from one that left by itself; torch says which in the exception or its cause."""
    messages = [_said(error) for error in _chain(failure.error)]
    if killed := next((match for text in messages if (match := _KILLED.search(text))), None):
        pid, said = int(killed[1]), killed[2]
        name = _signal_name(said)
        message = f"DataLoader worker (pid {pid}) was killed by {name or said}"
        evidence: Evidence = {"worker_pid": pid, "signal": name or said, "oom_kills": oom_kills}
        if name == "SIGBUS":  # what a write to a full /dev/shm ends in
            evidence |= _shm_evidence()
            return _outcome("shm", f"{message}: shared memory ran out", MORE_SHM, "loader", failure, evidence)
        if name == "SIGKILL" and oom_kills > 0:
            text = f"{message}: the kernel ran out of memory"
            return _outcome("host_oom", text, SMALLER_LOADER, "loader", failure, evidence)
        return _outcome("crash", message, None, "loader", failure, evidence)
    matches = [match for text in messages if (match := _EXITED.search(text))]
    if not matches:
        return None
    exited = next((match for match in matches if match[2]), matches[0])
    code = f" with exit code {exited[2]}" if exited[2] else ""
    message = f"DataLoader worker (pid {exited[1]}) exited unexpectedly{code}"
    evidence = {"worker_pid": exited[1] if "," in exited[1] else int(exited[1])}
    if exited[2]:
        evidence["exit_code"] = int(exited[2])
    return _outcome("crash", message, None, "loader", failure, evidence)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _signal_name(said: str) -> str | None:
    """Return `SIGKILL` for `Killed`: torch gives the C library's words."""
    return next((number.name for number in signal.valid_signals() if _has_words(number, said)), None)


def _has_words(number: int, said: str) -> bool:
    return isinstance(number, signal.Signals) and signal.strsignal(number) == said


# --- shared memory ----------------------------------------------------------------------------------

_SHM = re.compile(
    r"unable to (?:allocate shared memory|(?:write to|resize) file </?torch_).*|.*insufficient shared memory.*"
    r"|.*out of shared memory.*"
)
_SHM_CALLERS = re.compile(r"multiprocessing[/\\](?:synchronize|shared_memory|heap)\.py")


def _shm(failure: _Failure, phase: str | None) -> Outcome | None:
    spoken = _SHM.search(failure.text)
    # A lock or a shared array of multiprocessing's is a file in /dev/shm as well, but the message does not say so.
    full = getattr(failure.error, "errno", None) == errno.ENOSPC or f"[Errno {errno.ENOSPC}]" in failure.text
    in_shm = full and ("/dev/shm" in failure.text or _SHM_CALLERS.search(failure.traceback))
    if not spoken and not in_shm:
        return None
    said = spoken[0].strip() if spoken else failure.text.strip().splitlines()[0]
    message = f"shared memory ran out{failure.where}: {said}"
    return _outcome("shm", message, MORE_SHM, phase, failure, _shm_evidence())


def _shm_evidence() -> Evidence:
    """Return the room in /dev/shm; what is free now can be more than when it ran out, since workers clean up."""
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return {}
    return {"shm_total_bytes": stats.f_frsize * stats.f_blocks, "shm_free_bytes": stats.f_frsize * stats.f_bavail}


# --- the accelerator's memory -----------------------------------------------------------------------

_LIBRARY = re.compile(r"\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_(?:STATUS_)?(?:\w*DEVICE_)?ALLOC(?:ATION)?_FAILED\b")
_LIBRARIES = {
    "CUBLAS": "cuBLAS",
    "CUDNN": "cuDNN",
    "CUSOLVER": "cuSOLVER",
    "CUSPARSE": "cuSPARSE",
    "CUFFT": "cuFFT",
}
_DRIVER = re.compile(r"(CUDA|HIP|XPU|MPS)\b(?: error| backend| ran)?:? out of memory")

_DEVICE_SIZES = {
    "asked_bytes": rf"(?:Tried to allocate|Requested size:) {_SIZE}",
    "total_bytes": rf"has a total capacity of {_SIZE}",
    "free_bytes": rf"of which {_SIZE} is free",
    "process_bytes": rf"this process has {_SIZE} memory in use",
    "allowed_bytes": rf"(?:{_SIZE} allowed;|max allowed: {_SIZE})",
    "allocated_bytes": rf"(?:{_SIZE} is allocated by PyTorch|MPS allocated: {_SIZE})",
    "unused_bytes": rf"{_SIZE} is reserved by PyTorch but unallocated",
}


def _device_memory(failure: _Failure, phase: str | None) -> Outcome | None:
    by_library, by_driver = _LIBRARY.search(failure.text), _DRIVER.search(failure.text)
    from_torch = isinstance(failure.error, torch.OutOfMemoryError)
    if not (from_torch or by_library or by_driver):
        return None
    evidence: Evidence = {key: _size(pattern, failure.text) for key, pattern in _DEVICE_SIZES.items()}
    evidence = {key: size for key, size in evidence.items() if size is not None}
    unused, allocated = evidence.pop("unused_bytes", None), evidence.get("allocated_bytes")
    if isinstance(unused, int) and isinstance(allocated, int):
        evidence["reserved_bytes"] = allocated + unused
    evidence = _ask_device() | evidence
    evidence["library"] = _LIBRARIES[by_library[1]] if by_library else by_driver[1] if by_driver else "torch"
    if index := re.search(r"\bGPU (\d+) has a total", failure.text):
        evidence["device"] = int(index[1])
    message = f"{evidence['library']} out of memory{failure.where}"
    asked, free, total = (evidence.get(key) for key in ("asked_bytes", "free_bytes", "total_bytes"))
    if isinstance(asked, int):
        message += f": {_words(asked)} asked"
        if isinstance(free, int) and isinstance(total, int):
            message += f", {_words(free)} of {_words(total)} free"
    return _outcome("oom", message, SMALLER_STEP, phase, failure, evidence)


def _ask_device() -> Evidence:
    """Return what torch's CUDA allocator holds now: a library's failure says nothing of it itself."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    try:
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    except RuntimeError:  # a context that an error has broken answers nothing any more
        return {}
    return {"free_bytes": free, "total_bytes": total, "allocated_bytes": allocated, "reserved_bytes": reserved}


# --- the host's memory ------------------------------------------------------------------------------

_HOST = re.compile(r"DefaultCPUAllocator: (?:can't|not enough)|unable to mmap|Cannot allocate memory|std::bad_alloc")
_HOST_ASKED = (
    r"tried to (?:allocate|mmap) (\d+) (bytes)",
    r"unable to mmap (\d+) (bytes)",
    rf"Unable to allocate {_SIZE}",  # numpy
)


_ONEDNN = re.compile(r"could not create a (?:primitive|memory object)(?! descriptor)")
"""All that oneDNN says when an allocation of its own failed. It may mean something else, but hardly under a limit."""


def _host_memory(failure: _Failure, phase: str | None) -> Outcome | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limited = limit != resource.RLIM_INFINITY
    no_memory = isinstance(failure.error, MemoryError) or getattr(failure.error, "errno", None) == errno.ENOMEM
    in_onednn = limited and _ONEDNN.search(failure.text)
    if not (no_memory or in_onednn or _HOST.search(failure.text)):
        return None
    asked = next((size for pattern in _HOST_ASKED if (size := _size(pattern, failure.text)) is not None), None)
    evidence: Evidence = {} if asked is None else {"asked_bytes": asked}
    if limited:
        evidence["limit_bytes"] = limit
    message = f"host memory ran out{failure.where}"
    if in_onednn:
        evidence["library"] = "oneDNN"
        message += f": oneDNN {in_onednn[0]} under a limit of {_words(limit)}"
    elif asked is not None:
        message += f": {_words(asked)} asked"
        message += f" under a limit of {_words(limit)}" if limited else ""
    return _outcome("host_oom", message, SMALLER_LOADER, phase, failure, evidence)


# --- file descriptors -----------------------------------------------------------------------------------

_BROKEN_OFF = ("received 0 items of ancdata", "recvfds")


def _descriptors(failure: _Failure, phase: str | None) -> Outcome | None:
    """Tell a batch that broke off on its way from a worker: each tensor on that way takes an open file."""
    spoken = getattr(failure.error, "errno", None) == errno.EMFILE or "Too many open files" in failure.text
    broken_off = any(sign in failure.text or sign in failure.traceback for sign in _BROKEN_OFF)
    if not (spoken or broken_off):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = (
        f"too many open files{failure.where}"
        if spoken
        else f"a batch broke off on its way from a worker{failure.where}"
    )
    hint = f"raise the limit of open files (`ulimit -n`, now {limit}), or use a smaller --prefetch or fewer --workers"
    return _outcome("error", f"{said}: {failure.headline}", hint, phase, failure, {"open_files_limit": limit})


# --- compilation ---------------------------------------------------------------------------------------

_COMPILERS = ("torch._inductor", "torch._dynamo")


def _compilation(failure: _Failure, phase: str | None) -> Outcome | None:
    if not type(failure.error).__module__.startswith(_COMPILERS):
        return None
    compiler = "install a C++ compiler, or name it in CXX; " if "compiler" in failure.headline.lower() else ""
    return _outcome("error", failure.headline, f"{compiler}--compile off does without", phase, failure, {})


# --- determinism ---------------------------------------------------------------------------------------

_NO_DETERMINISTIC = re.compile(r"(\S+)(?: \w+)? does not have a deterministic implementation")
_CUBLAS_CONFIG = re.compile(r"[Dd]eterministic behavior was enabled with .*CUBLAS_WORKSPACE_CONFIG", re.DOTALL)
_NO_ENGINE = re.compile(
    r"unable to find an engine to execute this computation|[Uu]nable to find a valid cuDNN algorithm"
    r"|CUDNN_STATUS_NOT_SUPPORTED"
)


def _nondeterministic(failure: _Failure, phase: str | None) -> Outcome | None:
    """Tell what fails only because determinism was asked for."""
    if found := _NO_DETERMINISTIC.search(failure.text):
        switch, message = "--deterministic-algorithms", f"{found[1]} has no deterministic version"
    elif _CUBLAS_CONFIG.search(failure.text):
        switch, message = "--deterministic-algorithms", "cuBLAS is not deterministic with its workspace of now"
    elif _NO_ENGINE.search(failure.text) and torch.backends.cudnn.deterministic:
        switch, message = "--cudnn-deterministic", "cuDNN has no deterministic algorithm for this"
    else:
        return None
    evidence: Evidence = {"asked": switch, "operator": found[1] if found else None}
    return _outcome("nondeterministic", message + failure.where, f"{switch} off", phase, failure, evidence)


# --- all else ---------------------------------------------------------------------------------------


def _other(failure: _Failure, phase: str | None) -> Outcome:
    if isinstance(failure.error, BsprofError):
        # Relaying rebuilds the exception from its text alone, so there a hint is lost and the place is worth saying.
        message = failure.headline if failure.where else failure.error.message
        return _outcome("error", message, failure.error.hint, phase, failure, {})
    return _outcome("error", failure.headline, None, phase, failure, {})


def _outcome(
    kind: OutcomeKind, message: str, hint: str | None, phase: str | None, failure: _Failure, evidence: Evidence
) -> Outcome:
    return Outcome(
        kind=kind,
        message=message,
        hint=hint,
        phase=phase,
        traceback=failure.traceback,
        evidence=evidence,
    )


def _size(pattern: str, text: str) -> int | None:
    """Return the first size in bytes that `pattern` finds: a number and its unit, in its first groups that matched."""
    match = re.search(pattern, text)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group is not None)
    return round(float(number) * _UNITS[unit])


def _words(size: int) -> str:
    """Return `1.50 GiB` as torch writes it."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.2f} {unit}"
    return f"{size} bytes"
