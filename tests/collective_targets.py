"""What the children and the ranks of test_collectives.py run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import msgspec
import psutil
import torch
import torch.distributed as dist

from bsprof.measure import collectives, forks, roll
from bsprof.measure.collectives import Found
from bsprof.measure.repeats import Extent, Tally
from bsprof.model import AllReduce, Ceiling

Emit = Callable[[str, int, float | None], None]

SIZES = (2**10, 2**14, 2**16)
SMALL = Extent(all_reduce_bytes=SIZES, all_reduce_s=0.3, repeat_s=0.002, repeats=7)


class Told(msgspec.Struct):
    found: tuple[AllReduce, ...]
    rates: dict[str, Ceiling]
    missing: dict[str, str]
    left: list[int]
    """Processes that are still there afterwards."""


def measure(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Measure all-reduces on the CPU, with `work` in each rank if the payload names one."""
    forks.serve()
    asked = json.loads(payload)
    if work := asked.get("work"):
        collectives.reduce_all = globals()[work]
    if asked.get("refused"):
        roll.TCPStore = refuse
    collectives.DEADLINE_S = asked.get("deadline_s", 60.0)
    tally = Tally(SMALL)
    found = collectives.measure_all_reduce(tally, torch.device("cpu"), 2)
    left = [child.pid for child in psutil.Process().children(recursive=True)]
    return msgspec.json.encode(Told(found, tally.rates, tally.missing, left))


def refuse(*_: object, **__: object) -> None:
    raise dist.DistNetworkError("The server socket has failed to listen on any local network address.")


# --- in a rank --------------------------------------------------------------------------------------


def die(question: str) -> str:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return collectives.reduce_all(question)


def hang(question: str) -> str:
    time.sleep(600)
    return ""


def sum_wrongly(question: str) -> str:
    real = collectives.check_sum

    def beside_it(buffer, rank, size, reduce):
        real(buffer, rank + 1 if rank == 1 else rank, size, reduce)

    collectives.check_sum = beside_it
    return collectives.reduce_all(question)


def crowded(question: str) -> str:
    """Leave too little memory for the largest size, on one rank alone."""
    if dist.get_rank() == 1:
        collectives.host_bytes_free = lambda: 2 * collectives.COPIES * SIZES[-1] - 1
    return collectives.reduce_all(question)


def shares(question: str) -> str:
    """Tell this rank's threads in place of a time."""
    found = msgspec.json.decode(collectives.reduce_all(question), type=Found)
    found.left_out = {dist.get_rank(): str(torch.get_num_threads())}
    return msgspec.json.encode(found).decode()
