"""Rates measured for real, small, on the CPU; the accelerator's path runs on CPU tensors with a fake clock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable

import pytest
import torch

from bsprof.measure import backends, rates, repeats
from bsprof.measure.crew import Crew
from bsprof.measure.repeats import Extent, Tally
from bsprof.model import AllReduce

SMALL = Extent(
    copy_bytes=2**20,
    file_bytes=4 * 2**20,
    images=10,
    first_side=32,
    most_side=64,
    repeat_s=0.002,
    repeats=8,
    group_s=0.3,
)
CPU = torch.device("cpu")
FLOPS = ["matrix_fp32", "matrix_tf32", "matrix_bf16", "matrix_fp16"]


@pytest.fixture
def tally() -> Tally:
    return Tally(SMALL)


# --- all of it --------------------------------------------------------------------------------------


def test_a_whole_measurement_on_this_machine(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    torch.set_float32_matmul_precision("high")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reduced = AllReduce(backend="gloo", world_size=2, bytes=1024, seconds=1e-4)
    # Ranks are started by test_collectives.py: the launcher takes the signals of the process that it is called in.
    monkeypatch.setattr(rates, "measure_all_reduce", lambda tally, device, cores: (reduced,))
    stages: list[str] = []
    try:
        found = rates.measure("here", tmp_path / "data", lambda stage, *_: stages.append(stage), SMALL)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(threads)
    assert found.identity == "here"
    assert {"cpu_cores", "jpeg_core", "jpeg_all", "disk_warm", "cpu_matrix_fp32", "cpu_matrix_bf16"} <= set(found.rates)
    units = {name: ceiling.unit for name, ceiling in found.rates.items()}
    assert units["disk_warm"] == "B/s"
    assert units["jpeg_all"] == "1/s"
    assert units["cpu_cores"] == "cores"
    assert units["cpu_matrix_bf16"] == "FLOP/s"
    for ceiling in found.rates.values():
        assert ceiling.value > 0
        assert ceiling.low is None or ceiling.low <= ceiling.value <= (ceiling.high or 0)
    assert found.rates.keys().isdisjoint(found.missing)
    assert "disk_cold" in {**found.rates, **found.missing}
    assert found.all_reduce == (reduced,)
    if not torch.accelerator.is_available():
        assert {name for name, reason in found.missing.items() if reason == "no accelerator"} == {
            "h2d_pageable",
            "h2d_pinned",
            "d2d",
            *FLOPS,
        }
    assert stages[0].startswith("cores")
    assert len(stages) >= 4
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "data", scratch]
    assert multiprocessing.active_children() == []


# --- the accelerator, played by the CPU -------------------------------------------------------------


def a_millisecond(device: torch.device, work: Callable[[], object]) -> float:
    """A device that takes a millisecond for whatever it is given, and does nothing of it."""
    return 1e-3


MOST = repeats.MOST_COUNT
"""Pieces of work in a repeat on such a device, for no number of them takes as long as a repeat should."""


def test_copies_count_what_they_move(tally, monkeypatch):
    monkeypatch.setattr(repeats, "seconds_on", a_millisecond)
    rates.measure_copies(tally, CPU)
    pageable, on_device = tally.rates["h2d_pageable"], tally.rates["d2d"]
    assert pageable.value == pytest.approx(SMALL.copy_bytes * MOST / 1e-3)
    assert on_device.value == pytest.approx(2 * pageable.value)  # read and written
    assert pageable.unit == "B/s"
    if not torch.accelerator.is_available():  # nothing can lock pages then, and that is said
        assert tally.missing.keys() == {"h2d_pinned"}
        assert tally.missing["h2d_pinned"]


def test_copies_really_copy(tally):
    rates.measure_copies(tally, CPU)
    assert {"h2d_pageable", "d2d"} <= set(tally.rates)


def test_out_of_memory_in_one_leaves_the_others(tally, monkeypatch):
    real = torch.randn

    def short_of_memory(*size: int, dtype: torch.dtype, **options: object) -> torch.Tensor:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")
        return real(*size, dtype=dtype, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "randn", short_of_memory)
    rates.measure_matrices(tally, CPU, {"fp32": "", "tf32": "the device has no TF32", "bf16": "", "fp16": ""})
    assert set(tally.rates) == {"matrix_bf16", "matrix_fp16"}
    assert "out of memory" in tally.missing["matrix_fp32"].lower()
    assert tally.missing["matrix_tf32"] == "the device has no TF32"


def test_out_of_memory_at_a_larger_side_keeps_the_smaller(tally, monkeypatch):
    real = torch.randn

    def short_of_memory(rows: int, columns: int, **options: object) -> torch.Tensor:
        if rows > SMALL.first_side:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(rows, columns, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "randn", short_of_memory)
    monkeypatch.setattr(repeats, "seconds_on", a_millisecond)
    rates.measure_matrices(tally, CPU, {"fp32": ""})
    assert tally.rates["matrix_fp32"].value == pytest.approx(2 * SMALL.first_side**3 * MOST / 1e-3)


def test_a_fault_in_the_middle_loses_that_rate_alone(tally):
    calls = 0

    def failing() -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return 1.0

    measured = tally.measure("B/s", {"bad": lambda: failing, "good": lambda: lambda: 2.0})
    assert measured == {"good": [2.0] * SMALL.repeats}
    assert calls == 3
    assert "illegal memory access" in tally.missing["bad"]
    assert "\n" not in tally.missing["bad"]


def test_rates_of_a_group_take_turns(tally):
    order: list[str] = []

    def noted(name: str) -> repeats.Rate:
        return lambda: order.append(name) or 1.0  # type: ignore[func-returns-value]

    tally.measure("B/s", {"a": lambda: noted("a"), "b": lambda: noted("b")})
    assert order == ["a", "b"] * SMALL.repeats


def test_tf32_is_asked_for_only_where_it_is_meant_and_restored(monkeypatch):
    seen: list[tuple[str, bool]] = []

    def watched(device: torch.device, work: Callable[[], object]) -> float:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        return 1e-3

    monkeypatch.setattr(repeats, "seconds_on", watched)
    before = torch.get_float32_matmul_precision()
    rates.measure_matrices(Tally(SMALL), CPU, {"tf32": ""})
    assert set(seen) == {("high", True)}
    seen.clear()
    rates.measure_matrices(Tally(SMALL), CPU, {"fp32": ""})
    assert set(seen) == {("highest", False)}
    assert torch.get_float32_matmul_precision() == before


def test_what_has_no_tf32_says_so(monkeypatch):
    assert backends.lacks_tf32(torch.device("xpu"))
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert backends.lacks_tf32(torch.device("cuda"))
    capability = (9, 0)
    assert backends.lacks_tf32(torch.device("cuda")) == ""


# --- repeats ----------------------------------------------------------------------------------------


def test_a_repeat_is_as_long_as_asked():
    assert repeats.count_for(lambda count: count * 1e-3, 0.05) == 50
    assert repeats.count_for(lambda count: 1.0, 0.05) == 1
    assert repeats.count_for(lambda count: 0.0, 0.05) == repeats.MOST_COUNT
    assert repeats.count_for(lambda count: 0.04 + count * 1e-4, 0.05) >= 100


# --- processes --------------------------------------------------------------------------------------


def test_a_process_that_dies_is_an_error_and_no_hang():
    with Crew(2, _end) as crew, pytest.raises(RuntimeError, match="died"):
        crew.seconds(2, 7)
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_at_once_leaves_no_other():
    with pytest.raises(RuntimeError, match="died"):
        Crew(2, _end_at_once)
    assert multiprocessing.active_children() == []


def _end(count: int) -> None:
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def _end_at_once(count: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_decoding_that_fails_is_missing_with_its_reason(tally, monkeypatch):
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rates.registry, "prepare_data", no_room)
    rates.measure_decoding(tally, 1)
    assert tally.rates == {}
    assert tally.missing.keys() == {"jpeg_core", "jpeg_all"}
    assert "No space left" in tally.missing["jpeg_core"]


# --- disk -------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_missing(tally, tmp_path):
    (tmp_path / "file").write_text("")
    rates.measure_disk(tally, tmp_path / "file")
    assert tally.missing.keys() == {"disk_cold", "disk_warm"}
    assert tally.rates == {}


def test_a_cache_that_is_not_dropped_betrays_itself(tally, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "_read_seconds", lambda file: 1.0)
    rates.measure_disk(tally, tmp_path)
    assert tally.rates.keys() == {"disk_warm"}
    assert "cache" in tally.missing["disk_cold"]
    assert tally.rates["disk_warm"].value == SMALL.file_bytes


def test_cold_is_read_after_the_cache_was_dropped(tally, tmp_path, monkeypatch):
    cold = False

    def drop(*_: object) -> None:
        nonlocal cold
        cold = True

    def read(file: object) -> float:
        nonlocal cold
        taken, cold = (1.0 if cold else 0.25), False
        return taken

    monkeypatch.setattr(os, "posix_fadvise", drop, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(rates, "_read_seconds", read)
    rates.measure_disk(tally, tmp_path)
    assert tally.rates["disk_cold"].value == SMALL.file_bytes
    assert tally.rates["disk_warm"].value == 4 * SMALL.file_bytes


def test_a_system_without_the_call_has_no_cold_rate(tally, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    rates.measure_disk(tally, tmp_path)
    assert tally.rates.keys() == {"disk_warm"}
    assert "disk_cold" in tally.missing
