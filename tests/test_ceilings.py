"""Ceilings: kept under the hardware's identity, holding steps to what the machine can do, and printed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from machines import environment
from rich.console import Console

from bsprof import ceilings
from bsprof.cli import commands
from bsprof.errors import BsprofError
from bsprof.model import Accelerator, AllReduce, Ceiling, Ceilings, Environment, Facts, Settings
from bsprof.report import ceilings as rendering
from bsprof.sweep import runner

H200 = Accelerator(
    name="NVIDIA H200",
    kind="cuda",
    index=0,
    uuid="8b3c1f0c-0000-0000-0000-000000000001",
    memory_bytes=141 * 2**30,
    multiprocessors=132,
)
HERE = environment(
    host="here",
    cores_logical=16,
    cores_physical=16,
    cores_usable=16,
    memory_bytes=2**37,
    accelerators=(H200,),
    driver="580.65.06",
    python="3.12.3",
    torch="2.11.0+cu130",
    torchvision="0.26.0",
    cuda="13.0",
    cudnn="9.15.1",
)
MEASURED = Ceilings(
    identity=ceilings.identity(HERE),
    created="2026-11-21T05:00:00+00:00",
    rates={
        "h2d_pinned": Ceiling(value=50e9, unit="B/s", low=49e9, high=51e9),
        "h2d_pageable": Ceiling(value=10e9, unit="B/s", low=9e9, high=11e9),
        "matrix_fp32": Ceiling(value=50e12, unit="FLOP/s", low=49e12, high=51e12),
        "matrix_bf16": Ceiling(value=800e12, unit="FLOP/s"),
        "cpu_matrix_fp32": Ceiling(value=200e9, unit="FLOP/s", low=190e9, high=210e9),
        "jpeg_core": Ceiling(value=800.0, unit="1/s", low=790.0, high=810.0),
        "cpu_cores": Ceiling(value=3.5, unit="cores", low=3.4, high=3.6),
    },
    missing={"matrix_fp16": "no luck\x1b[31m", "disk_cold": "no luck\x1b[31m", "d2d": "CUDA out of memory"},
    wall_s=31.4,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ceilings.path_of("x").parent


# --- kept -------------------------------------------------------------------------------------------


def test_what_is_kept_is_found_again(cache):
    assert ceilings.cached(HERE) is None
    path = ceilings.keep(MEASURED)
    assert ceilings.cached(HERE) == MEASURED
    assert list(cache.iterdir()) == [path]


def test_a_later_measurement_replaces_the_earlier():
    ceilings.keep(MEASURED)
    later = msgspec.structs.replace(MEASURED, created="2027-01-01T00:00:00+00:00")
    ceilings.keep(later)
    assert ceilings.cached(HERE) == later


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"identity": 3}', b'"' + b"\xff" * 9 + b'"'])
def test_a_damaged_file_is_as_good_as_none(content):
    ceilings.keep(MEASURED).write_bytes(content)
    assert ceilings.cached(HERE) is None


def test_a_file_of_another_machine_is_as_good_as_none():
    path = ceilings.keep(MEASURED)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(MEASURED, identity="another")))
    assert ceilings.cached(HERE) is None


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(BsprofError, match=str(cache)):
        ceilings.keep(MEASURED)
    assert ceilings.cached(HERE) is None


@pytest.mark.parametrize(
    "other",
    [
        {"host": "there"},
        {"git_commit": "abc"},
        {"variables": {"OMP_NUM_THREADS": "1"}},
        {"accelerators": (msgspec.structs.replace(H200, index=3, uuid="another"),)},
    ],
)
def test_identity_is_the_hardwares_and_not_the_hosts(other):
    assert ceilings.identity(msgspec.structs.replace(HERE, **other)) == ceilings.identity(HERE)


@pytest.mark.parametrize(
    "other",
    [
        {"cpu": "another"},
        {"cores_usable": 8},
        {"accelerators": ()},
        {"accelerators": (H200, msgspec.structs.replace(H200, index=1))},
        {"accelerators": (msgspec.structs.replace(H200, name="NVIDIA H100"),)},
        {"accelerators": (msgspec.structs.replace(H200, memory_bytes=18 * 2**30),)},
        {"accelerators": (msgspec.structs.replace(H200, multiprocessors=16),)},
        {"torch": "2.15.0"},
        {"cuda": None},
        {"driver": "570.1"},
    ],
)
def test_identity_changes_with_what_the_rates_depend_on(other):
    assert ceilings.identity(msgspec.structs.replace(HERE, **other)) != ceilings.identity(HERE)


def test_ceilings_from_before_all_reduces_were_measured_are_still_read():
    path = ceilings.keep(MEASURED)
    kept = msgspec.json.decode(path.read_bytes())
    kept.pop("all_reduce", None)
    path.write_bytes(msgspec.json.encode(kept))
    assert ceilings.cached(HERE) == MEASURED


# --- all-reduces ------------------------------------------------------------------------------------


def reduced(world_size: int, size: int, seconds: float, spread: float | None = None) -> AllReduce:
    low, high = (None, None) if spread is None else (seconds - spread, seconds + spread)
    return AllReduce(backend="nccl", world_size=world_size, bytes=size, seconds=seconds, low=low, high=high)


@pytest.mark.parametrize(("world_size", "share"), [(1, 0.0), (2, 1.0), (4, 1.5), (8, 1.75)])
def test_bus_bandwidth_is_what_each_rank_must_send(world_size, share):
    found = ceilings.bus_bandwidth(reduced(world_size, 10**9, 0.5))
    assert found == Ceiling(value=pytest.approx(share * 2e9), unit="B/s")


def test_the_longest_time_is_the_least_bandwidth():
    found = ceilings.bus_bandwidth(reduced(2, 10**9, 0.5, 0.1))
    assert (found.low, found.value, found.high) == pytest.approx((1e9 / 0.6, 2e9, 2.5e9))


# --- bounds -----------------------------------------------------------------------------------------


def facts(**fields) -> Facts:
    given = {"device": "cuda", "threads": 16, "dtype": "bf16", "flops_per_step": 8 * 10**12, "batch_bytes": 10**9}
    return Facts(**{**given, **fields})


def test_each_bound_is_work_over_rate_and_the_longest_comes_first():
    settings = Settings(batch_size=64, workers=2, pin_memory=True)
    found = ceilings.bounds(settings, facts(), 0.1, MEASURED)
    assert [(bound.name, bound.rate) for bound in found] == [
        ("decode", "jpeg_core"),
        ("transfer", "h2d_pinned"),
        ("compute", "matrix_bf16"),
    ]
    assert [bound.floor_s for bound in found] == pytest.approx([64 / 1600, 1 / 50, 1 / 100])
    assert [bound.share for bound in found] == pytest.approx([0.4, 0.2, 0.1])


def by_name(settings: Settings, given: Facts) -> dict[str, ceilings.Bound]:
    return {bound.name: bound for bound in ceilings.bounds(settings, given, 0.1, MEASURED)}


def test_pageable_batches_go_at_the_pageable_rate():
    bound = by_name(Settings(pin_memory=False), facts())["transfer"]
    assert (bound.rate, bound.floor_s) == ("h2d_pageable", pytest.approx(0.1))


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (1, 1), (3, 3), (12, 3.5)])
def test_decoding_goes_as_fast_as_workers_and_cores_allow(workers, processes):
    bound = by_name(Settings(batch_size=80, workers=workers), facts())["decode"]
    assert bound.floor_s == pytest.approx(80 / (800 * processes))


@pytest.mark.parametrize("data", ["jpeg", "jpeg:n=64", "jpeg:500x375", "jpeg:500x375,n=64"])
def test_the_decoding_rate_is_that_of_the_generated_files(data):
    assert "decode" in by_name(Settings(data=data), facts())


@pytest.mark.parametrize(
    "data", ["jpeg:64x64", "jpeg:1500x375,n=9", "synthetic", "cifar10", "imagefolder:jpeg", "a.b:jpeg"]
)
def test_other_data_is_not_held_to_it(data):
    assert "decode" not in by_name(Settings(data=data), facts())


def test_on_a_cpu_the_cpus_products_bind_and_nothing_is_transferred():
    bounds = by_name(Settings(data="synthetic"), facts(device="cpu", dtype="fp32", flops_per_step=10**10))
    assert {name: bound.rate for name, bound in bounds.items()} == {"compute": "cpu_matrix_fp32"}
    assert bounds["compute"].floor_s == pytest.approx(0.05)


@pytest.mark.parametrize(
    "unknown", [{"flops_per_step": None}, {"dtype": None}, {"dtype": "fp16"}, {"device": "cpu", "dtype": "bf16"}]
)
def test_what_is_not_known_bounds_nothing(unknown):
    assert "compute" not in by_name(Settings(), facts(**unknown))
    assert ceilings.mfu(facts(**unknown), 0.1, MEASURED) is None


def test_without_any_rate_there_is_no_bound():
    nothing = Ceilings(identity="x", created="", rates={})
    assert ceilings.bounds(Settings(), facts(), 0.1, nothing) == []


def test_mfu_is_the_share_of_the_measured_rate_and_is_not_clamped():
    assert ceilings.mfu(facts(), 0.1, MEASURED) == pytest.approx(0.1)
    assert ceilings.mfu(facts(dtype="fp32"), 0.1, MEASURED) == pytest.approx(1.6)


# --- printed ----------------------------------------------------------------------------------------


def printed(known: Ceilings | None, path: Path | None, width: int) -> str:
    stream = io.StringIO()
    rendering.render(known, path, Console(file=stream, width=width, no_color=True))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_units_intervals_and_what_is_missing(width):
    text = printed(MEASURED, Path("/cache/x.json"), width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "copy to the accelerator, pinned 50.0 49.0 … 51.0 GB/s" in words
    assert "matrix product, fp32 50.0 49.0 … 51.0 TFLOP/s" in words
    assert "matrix product, bf16 800 – TFLOP/s" in words  # noqa: RUF001 - not captured
    assert "matrix product on the CPU, fp32 200 190 … 210 GFLOP/s" in words
    assert "800 790 … 810 img/s" in words
    assert "3.50 3.40 … 3.60 cores" in words
    assert "not measured (CUDA out of memory): copy on the accelerator" in words
    assert "2026-11-21T05:00:00+00:00" in words
    assert "/cache/x.json" in words
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_sizes_of_the_largest_world_are_listed(width):
    known = msgspec.structs.replace(
        MEASURED,
        rates={"all_reduce": Ceiling(value=400e9, unit="B/s", low=390e9, high=410e9)},
        all_reduce=(
            reduced(2, 2**10, 7e-6),
            reduced(4, 2**28, 1e-3, 1e-5),
            reduced(4, 2**10, 12.34e-6),
        ),
        missing={"all_reduce_8": "rank 3: killed by SIGKILL", "all_reduce_4_67108864": "CUDA out of memory"},
    )
    text = printed(known, None, width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    assert "all-reduce, largest bus bandwidth 400 390 … 410 GB/s" in words
    assert "all-reduce in 4 ranks, nccl" in words
    assert "1.0 KiB 12.3 µs – 124 MB/s 256 MiB 1.00 ms 1.0% 403 GB/s" in words  # noqa: RUF001 - not captured
    assert "7.00" not in words
    assert "not measured (rank 3: killed by SIGKILL): all-reduce in 8 ranks" in words
    assert "not measured (CUDA out of memory): all-reduce in 4 ranks, 64.0 MiB" in words


def test_without_all_reduces_there_is_no_table_of_them():
    assert "all-reduce" not in printed(MEASURED, None, 80)


def test_a_rate_of_a_later_version_is_shown_by_its_key():
    later = msgspec.structs.replace(MEASURED, rates={"nvlink": Ceiling(value=4e8, unit="B/s")}, missing={})
    assert "nvlink 400 – MB/s" in " ".join(printed(later, None, 80).split())  # noqa: RUF001 - not captured


def test_without_ceilings_it_says_how_to_get_them():
    assert "bsprof env --measure" in printed(None, None, 80)


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def env(monkeypatch, capsys):
    """Run `bsprof env` in this process, on the machine `HERE`; measuring returns `MEASURED` and is counted."""
    measured: list[str] = []

    def measure(identity: str, on_stage: Callable[[str], None]) -> Ceilings:
        measured.append(identity)
        on_stage("cores")
        return msgspec.structs.replace(MEASURED, created=f"measurement {len(measured)}")

    monkeypatch.setattr(runner, "describe_environment", lambda: HERE)
    monkeypatch.setattr(runner, "measure_ceilings", measure)

    def run(*arguments: str) -> tuple[str, str, int]:
        commands.main(["env", *arguments], standalone_mode=False)
        return *capsys.readouterr(), len(measured)

    return run


def test_env_measures_once_keeps_it_and_measures_again_when_asked(env):
    out, err, times = env()
    assert "bsprof env --measure" in out
    assert (err, times) == ("", 0)
    out, err, times = env("--measure")
    assert "NVIDIA H200" in out
    assert "measurement 1" in out
    assert (err, times) == ("measuring cores\n", 1)
    for arguments in ((), ("--measure",)):
        out, err, times = env(*arguments)
        assert "measurement 1" in out
        assert (err, times) == ("", 1)
    out, _, times = env("--refresh")
    assert "measurement 2" in out
    assert times == 2


def test_env_as_json_has_the_environment_and_the_ceilings(env):
    whole = json.loads(env("--json")[0])
    assert whole.pop("ceilings") is None
    assert msgspec.convert(whole, Environment) == HERE
    whole = json.loads(env("--measure", "--json")[0])
    assert msgspec.convert(whole["ceilings"], Ceilings).rates == MEASURED.rates


def test_what_cannot_be_kept_is_printed_all_the_same(env, cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    with pytest.raises(BsprofError, match=str(cache)):
        env("--measure")
    out = capsys.readouterr().out
    assert "TFLOP/s" in out
    assert "not kept" in out


def test_ctrl_c_ends_the_measuring_and_leaves_nothing(cache):
    command = [sys.executable, "-m", "bsprof", "env", "--measure"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("measuring cores")
        members = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "error: interrupted" in err
    assert "Traceback" not in err
    assert [path for path in cache.parent.rglob("*") if path.is_file()] == []
    assert members
    end = time.monotonic() + 10  # the fork server ends by itself
    while any(map(psutil.pid_exists, members)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, members))
