"""Machines that tests are about."""

from __future__ import annotations

from typing import Any

from bsprof.model import Environment


def environment(**known: Any) -> Environment:
    """Return a plain machine of two cores without an accelerator, but for what is `known` of it."""
    plain: dict[str, Any] = {
        "host": "host",
        "os": "Debian GNU/Linux 12 (bookworm)",
        "kernel": "Linux 6.1",
        "hypervisor": None,
        "cpu": "a processor",
        "cores_logical": 2,
        "cores_physical": 2,
        "cores_usable": 2,
        "cpu_quota": None,
        "memory_bytes": 2**33,
        "memory_limit_bytes": None,
        "shm_bytes": 2**32,
        "accelerators": (),
        "driver": None,
        "python": "3.11.7",
        "torch": "2.15.0",
        "torchvision": "0.29.2",
        "cuda": None,
        "cudnn": None,
        "numpy": "2.4.6",
        "libc": "glibc 2.36",
        "bsprof": "0.1.0",
        "git_commit": None,
        "variables": {},
    }
    return Environment(**plain | known)
