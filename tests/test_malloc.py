"""The pin against page faults, counted by the kernel in a process of its own."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bsprof.measure import malloc

SCRIPT = """
import json, resource, sys
import torch
from bsprof.measure.malloc import pin

torch.set_num_threads(1)
said = pin() if sys.argv[1] == "pin" else "default"

def faults(mebibytes, steps=10):
    '''Allocate, fill and free as a training step does with its activations.'''
    def step():
        torch.ones(mebibytes * 2**20 // 4).sum().item()
    for _ in range(20):  # the heap finds its size within the first few
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps

print(json.dumps({"said": said, "8": faults(8), "48": faults(48)}))
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def run(mode: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, mode]
    return json.loads(subprocess.run(command, capture_output=True, check=True, env=environment, timeout=120).stdout)


@on_glibc
def test_pinned_memory_takes_no_faults_in_steady_steps():
    default, pinned = run("default"), run("pin")
    assert pinned["said"] == "pinned: mmap_max=0 trim_threshold=2147483647 top_pad=67108864"
    # 48 MiB lie above the largest threshold glibc moves to by itself: 12288 pages of 4 KiB, or fewer of the huge kind.
    assert default["48"] > 20
    assert pinned["48"] < default["48"] / 10
    assert pinned["8"] < 5


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc, "_loaded_libraries", lambda: ["/usr/lib/libc.so.6", "/usr/lib/libjemalloc.so.2"])
    assert malloc.pin() == "default (malloc is jemalloc's)"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(malloc, "_loaded_libraries", lambda: ["/lib/ld-musl-x86_64.so.1"])
    assert malloc.pin() == "default (not glibc)"


@pytest.mark.parametrize(
    ("library", "found"),
    [
        ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "tcmalloc"),
        ("/opt/mimalloc/libc.so.6", None),
        ("/usr/lib/libmimalloc.so.2.1", "mimalloc"),
        ("/usr/lib/libtorch_cpu.so", None),
    ],
)
def test_allocators_are_known_by_their_files(library, found):
    assert malloc._replaced_by([library]) == found


def test_mapped_files_are_listed_here():
    libraries = malloc._loaded_libraries()
    assert any("libc" in library or "python" in library for library in libraries)
