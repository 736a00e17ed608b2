"""The C library's allocator, held still for measuring.

glibc hands large blocks back to the kernel as soon as they are freed, and gets them again with fresh, unmapped pages:
a step that allocates its activations anew pays a page fault for every 4 KiB of them, or not, depending on a threshold
that moves at run time. The same code then runs at one of two speeds. Pinned, freed memory stays with the process and a
steady step takes next to no faults.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable
from pathlib import Path

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
