"""The ceilings of this machine, measured: copies, products, decoding, reading, cores that run at once, all-reduces.

Every rate is the median of repeats with its interval. The rates of one group take turns, so that what drifts meanwhile
(clocks, temperature, neighbours) drifts for all of them. What cannot be measured is named with its reason, and the
others go on.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from bsprof.measure.backends import lacks_tf32
from bsprof.measure.clock import host_clock, present_device
from bsprof.measure.collectives import measure_all_reduce
from bsprof.measure.crew import Crew, spin
from bsprof.measure.environment import cores_of_this_process
from bsprof.measure.failures import classify
from bsprof.measure.repeats import FULL, Extent, Rate, Seconds, Tally, count_for, timed
from bsprof.model import Ceilings
from bsprof.noun import Note
from bsprof.workloads import registry
from bsprof.workloads.imagefolder import decode_image
from bsprof.workloads.registration import DataRequest

Emit = Callable[[str, int, float | None], None]

COLD_SHARE = 0.8
"""A read at this share of the warm rate came from memory too: the system did not drop its cache."""
_LISTEN_S = 0.5
_QUIET = 0.1
_READ_BYTES = 2**20


def measure(identity: str, cache: Path, emit: Emit, extent: Extent = FULL) -> Ceilings:
    """Return the ceilings of this machine, kept under `identity`; `cache` is the folder whose disk is read.

    It takes all usable cores, the accelerator and, for a while, `extent.file_bytes` of disk. It leaves no file, no
    process and no switch of torch's behind. Calls `emit(stage, 0, None)` as each group begins.
    """
    started = host_clock()
    tally = Tally(extent)
    cores = cores_of_this_process()
    # Processes are started first, before torch has threads that a fork would leave behind.
    notes = _disturbance()
    emit("cores", 0, None)
    measure_cores(tally, cores)
    emit("JPEG decoding", 0, None)
    measure_decoding(tally, cores)
    emit("reading from disk", 0, None)
    measure_disk(tally, cache)
    with _threads(cores):
        emit("matrix products on the CPU", 0, None)
        measure_matrices(tally, torch.device("cpu"), {"fp32": "", "bf16": ""}, prefix="cpu_")
        device = present_device()
        if device.type == "cpu":
            for name in (*_COPIES, *(f"matrix_{dtype}" for dtype in _DTYPES)):
                tally.missing[name] = "no accelerator"
        else:
            emit("copies to the accelerator", 0, None)
            measure_copies(tally, device)
            emit("matrix products on the accelerator", 0, None)
            measure_matrices(tally, device, {"fp32": "", "tf32": lacks_tf32(device), "bf16": "", "fp16": ""})
    emit("all-reduces among ranks", 0, None)
    reduced = measure_all_reduce(tally, device, cores)
    return Ceilings(
        identity=identity,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        rates=tally.rates,
        all_reduce=reduced,
        missing=tally.missing,
        notes=notes,
        wall_s=(host_clock() - started) / 1e9,
    )


def _disturbance() -> tuple[Note, ...]:
    """Return that others keep the processor busy, where they do: a ceiling measured then is too low."""
    busy = psutil.cpu_percent(_LISTEN_S) / 100
    if busy <= _QUIET:
        return ()
    text = f"other programs kept {busy:.0%} of the cores busy: rates of the CPU are too low, `bsprof env --refresh`"
    return (Note(code="cpu_contended", text=text),)


# --- copies -----------------------------------------------------------------------------------------

_COPIES = ("h2d_pageable", "h2d_pinned", "d2d")


def measure_copies(tally: Tally, device: torch.device) -> None:
    """Measure copies from the host to `device`, pageable and pinned, and on it: there bytes read plus written."""
    size = tally.extent.copy_bytes

    def from_host(*, pinned: bool) -> Rate:
        # Written to: pages that never were are all one page of zeros, which a cache would hold.
        source = torch.empty(size, dtype=torch.uint8, pin_memory=pinned).fill_(1)
        target = torch.empty(size, dtype=torch.uint8, device=device)
        return tally.rate(timed(device, lambda: target.copy_(source, non_blocking=pinned)), size)

    def on_device() -> Rate:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return tally.rate(timed(device, lambda: target.copy_(source)), 2 * size)

    tally.measure(
        "B/s",
        {
            "h2d_pageable": functools.partial(from_host, pinned=False),
            "h2d_pinned": functools.partial(from_host, pinned=True),
            "d2d": on_device,
        },
    )


# --- matrix products --------------------------------------------------------------------------------

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure_matrices(tally: Tally, device: torch.device, dtypes: Mapping[str, str], *, prefix: str = "") -> None:
    """Measure square matrix products on `device`, 2 n^3 operations each, as `<prefix>matrix_<dtype>`.

    A dtype in `dtypes` is there with the reason why it cannot be measured, or with an empty text.
    """
    tally.missing |= {f"{prefix}matrix_{dtype}": reason for dtype, reason in dtypes.items() if reason}
    tally.measure(
        "FLOP/s",
        {
            f"{prefix}matrix_{dtype}": functools.partial(_products, tally, device, dtype)
            for dtype, reason in dtypes.items()
            if not reason
        },
    )


def _products(tally: Tally, device: torch.device, dtype: str) -> Rate:
    """Return the rate of the largest product that fits, or of one that takes a repeat's time if that is smaller."""
    extent = tally.extent
    side, found = extent.first_side, None
    while side <= extent.most_side:
        try:
            seconds = _product(side, device, dtype)
            seconds(1)
            taken = seconds(1)
        except RuntimeError as error:  # where the libraries run out of memory it is no OutOfMemoryError
            if found is None or classify(error).kind not in ("oom", "host_oom"):
                raise
            break
        found = seconds, 2.0 * side**3
        if taken >= extent.repeat_s:
            break
        side *= 2
    assert found is not None
    return tally.rate(*found)


def _product(side: int, device: torch.device, dtype: str) -> Seconds:
    # Random numbers: with zeros few transistors switch, so a GPU clocks higher than training ever lets it.
    generator = torch.Generator(device=device).manual_seed(0)
    draw = functools.partial(torch.randn, side, side, generator=generator, device=device, dtype=_DTYPES[dtype])
    left, right = draw(), draw()
    out = torch.empty_like(left)
    products = timed(device, lambda: torch.mm(left, right, out=out))

    def seconds(count: int) -> float:
        with _float32_products("high" if dtype == "tf32" else "highest"):
            return products(count)

    return seconds


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Let float32 matrix products be computed as `precision` says; this sets `allow_tf32` along with it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- processes --------------------------------------------------------------------------------------


def measure_cores(tally: Tally, cores: int) -> None:
    """Measure how many cores really run at once: the speeds of k copies of a loop, summed; that of one alone is 1.

    k is `cores`, the usable ones. Shared execution units, clocks that fall as more cores wake, a hypervisor that gives
    less than it shows: the result is what is left. Speeds are summed, and not taken from the slowest copy, because one
    core that somebody else uses as well must not count for all.
    """

    def together(crew: Crew) -> Rate:
        count = count_for(lambda count: crew.seconds(1, count)[0], tally.extent.repeat_s)

        def rate() -> float:
            (alone,) = crew.seconds(1, count)
            return sum(alone / taken for taken in crew.seconds(cores, count))

        return rate

    with tally.or_missing("cpu_cores"), Crew(cores, spin) as crew:
        tally.measure("cores", {"cpu_cores": functools.partial(together, crew)})


# --- decoding ---------------------------------------------------------------------------------------


def measure_decoding(tally: Tally, cores: int) -> None:
    """Measure images a second, read from the page cache and decoded: by one process, and by `cores` of them at once.

    The images are those of the data set `jpeg`, 500x375 pixels, made in a folder of their own.
    """
    with tally.or_missing("jpeg_core", "jpeg_all"), tempfile.TemporaryDirectory() as folder:
        images = tally.extent.images
        registry.prepare_data(f"jpeg:500x375,n={images}", DataRequest(cache=Path(folder)))
        paths = sorted(Path(folder).rglob("*.jpg"))
        with Crew(cores, functools.partial(_decode, paths)) as crew:

            def by(processes: int) -> Rate:
                count = count_for(lambda count: crew.seconds(1, count)[0], tally.extent.repeat_s)
                return lambda: sum(images * count / taken for taken in crew.seconds(processes, count))

            tally.measure("1/s", {"jpeg_core": lambda: by(1), "jpeg_all": lambda: by(cores)})


def _decode(paths: Sequence[Path], count: int) -> None:
    for _ in range(count):
        for path in paths:
            decode_image(path)


# --- disk -------------------------------------------------------------------------------------------


def measure_disk(tally: Tally, directory: Path) -> None:
    """Measure reading a file in `directory` from start to end, cold and warm.

    Cold means that this system has dropped the file from its page cache; what a hypervisor or the disk itself keeps is
    out of reach. A system that does not drop it (a file system in memory) betrays itself by the warm rate.
    """
    with tally.or_missing("disk_cold", "disk_warm"):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:  # it has no name: no way to end leaves it
            size = 0
            while size < tally.extent.file_bytes:
                size += file.write(os.urandom(_READ_BYTES))
            os.fsync(file.fileno())

            def warm() -> float:
                return size / _read_seconds(file)

            def cold() -> float:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return size / _read_seconds(file)

            reads: dict[str, Callable[[], Rate]] = {"disk_warm": lambda: warm}
            if hasattr(os, "posix_fadvise"):
                reads = {"disk_cold": lambda: cold, **reads}  # in this order: a cold read makes the next one warm
            else:
                tally.missing["disk_cold"] = "this system cannot be asked to drop a file from its cache"
            _read_seconds(file)
            tally.measure("B/s", reads)
    found = tally.rates
    if (
        "disk_cold" in found
        and "disk_warm" in found
        and found["disk_cold"].value > COLD_SHARE * found["disk_warm"].value
    ):
        del found["disk_cold"]
        tally.missing["disk_cold"] = "read as fast as from memory: the system did not drop the file from its cache"


def _read_seconds(file: io.RawIOBase) -> float:
    buffer = bytearray(_READ_BYTES)
    file.seek(0)
    start = host_clock()
    while file.readinto(buffer):
        pass
    return (host_clock() - start) / 1e9
