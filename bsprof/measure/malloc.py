"""The C library's allocator, held still for measuring.

glibc hands large blocks back to the kernel as soon as they are freed, and gets them again with fresh, unmapped pages:
a step that allocates its activations anew pays a page fault for every 4 KiB of them, or not, depending on a threshold
that moves at run time. The same code then runs at one of two speeds. Pinned, freed memory stays with the process and a
steady step takes next to no faults.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from bsprof.model import Counters
from bsprof.noun import Note

FAULT_SHARE = 0.05
"""Part of a step that minor page faults must take to be worth a word: as much as a gate is to find."""

_FAULTED_PAGES = 512
"""Touched to learn what a fault costs: 2 MiB, some milliseconds at the most."""

# malloc.h's numbers for mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4

PINNED = {
    # No block gets a mapping of its own, which free() would hand back. Raising the threshold helps up to 32 MiB only.
    "mmap_max": (_MMAP_MAX, 0),
    # The top of the heap is never given back: mallopt takes an int, so this is 'never'.
    "trim_threshold": (_TRIM_THRESHOLD, 2**31 - 1),
    # The heap grows in large steps, so that growing is over after the first few.
    "top_pad": (_TOP_PAD, 64 * 2**20),
}

_OTHERS = re.compile(r"jemalloc|tcmalloc|mimalloc|hoard|snmalloc|tbbmalloc_proxy", re.IGNORECASE)


def pin() -> str:
    """Make glibc's malloc keep freed memory, in this process and those forked from it, and say what is in force.

    Returns `pinned: mmap_max=0 …`, or `default (why)` where the allocator is another one or does not let itself be set;
    that is no error. Memory that a process frees then stays with it to its end.
    """
    if other := _replaced_by(_loaded_libraries()):
        return f"default (malloc is {other}'s)"
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return "default (not glibc)"
    mallopt = libc.mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    refused = [name for name, (parameter, value) in PINNED.items() if mallopt(parameter, value) != 1]
    if refused:
        return f"default (mallopt refused {', '.join(refused)})"
    return "pinned: " + " ".join(f"{name}={value}" for name, (_, value) in PINNED.items())


def fault_cost_ns() -> float:
    """Return what a minor page fault costs in this process now: the first touch of a page of fresh memory, a median."""
    costs = []
    for _ in range(5):
        with mmap.mmap(-1, _FAULTED_PAGES * mmap.PAGESIZE) as memory:
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)  # else the first touch may bring all of them
            begun = time.perf_counter_ns()
            for place in range(0, len(memory), mmap.PAGESIZE):
                memory[place] = 1
            cold = time.perf_counter_ns()
            for place in range(0, len(memory), mmap.PAGESIZE):
                memory[place] = 2
            costs.append((cold - begun - (time.perf_counter_ns() - cold)) / _FAULTED_PAGES)
    return max(0.0, statistics.median(costs))


def fault_notes(counters: Counters, steps: int, *, pinned: bool) -> list[Note]:
    """Return a note where minor page faults took a share of the steps that is worth a word, with the figures behind it.

    `counters` are of `steps` steps. Faults in threads that work at the same time take less of the step than is said.
    """
    if not steps or counters.wall_ns <= 0 or counters.minor_faults < _FAULTED_PAGES:
        return []
    cost_ns = fault_cost_ns()
    share = counters.minor_faults * cost_ns / counters.wall_ns
    if share < FAULT_SHARE:
        return []
    cure = (
        ""
        if pinned
        else ": freed memory goes back to the kernel and is taken anew. MALLOC_MMAP_THRESHOLD_=1073741824 "
        "MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864 in the environment keep it (glibc)"
    )
    text = (
        f"{counters.minor_faults / steps:,.0f} minor page faults a step at {cost_ns / 1e3:.2g} us each here, about "
        f"{share:.0%} of the step{cure}"
    )
    return [Note(code="page_faults", text=text)]


def _replaced_by(libraries: Iterable[str]) -> str | None:
    """Return the allocator among `libraries` that stands in for glibc's, whose mallopt then changes nothing."""
    matches = (_OTHERS.search(Path(library).name) for library in libraries)
    return next((match[0].lower() for match in matches if match), None)


def _loaded_libraries() -> list[str]:
    """Return the files mapped into this process; where the system does not list them, those asked to be preloaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return re.split(r"[ :]+", os.environ.get("LD_PRELOAD", ""))
    return sorted({fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6})
