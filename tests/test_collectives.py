"""All-reduces, measured for real by two processes with gloo; how ranks fail, and what is left of them."""

from __future__ import annotations

import json
import time

import msgspec
import psutil
import pytest
import torch
from collective_targets import SIZES, SMALL, Told

from bsprof.ceilings import bus_bandwidth
from bsprof.measure import collectives
from bsprof.measure.collectives import Found, check_sum, worlds_of
from bsprof.measure.repeats import FULL, Tally
from bsprof.sweep.process import call

CPU = torch.device("cpu")


def measured(**asked: object) -> Told:
    """Measure in a process of its own, as `bsprof env --measure` does: the launcher takes a process' signals."""
    value = call("collective_targets:measure", json.dumps(asked).encode(), deadline_s=120).value
    assert value is not None
    told = msgspec.json.decode(value, type=Told)
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, told.left)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, told.left))
    return told


# --- for real ---------------------------------------------------------------------------------------


def test_two_processes_reduce_every_size():
    told = measured()
    assert told.missing == {}
    assert [(one.backend, one.world_size, one.bytes) for one in told.found] == [("gloo", 2, size) for size in SIZES]
    for one in told.found:
        assert one.seconds > 0
        assert one.low is None or one.low <= one.seconds <= one.high
    bandwidths = [bus_bandwidth(one) for one in told.found]
    assert told.rates == {"all_reduce": max(bandwidths, key=lambda rate: rate.value)}
    assert len(told.left) <= 2  # the ranks have ended; multiprocessing's own two end with their parent


def test_ranks_share_the_cores():
    assert measured(work="shares").missing == {"all_reduce_2_0": "1", "all_reduce_2_1": "1"}


def test_a_size_without_memory_is_left_out_and_the_others_are_measured():
    told = measured(work="crowded")
    assert [one.bytes for one in told.found] == list(SIZES[:-1])
    assert told.missing.keys() == {f"all_reduce_2_{SIZES[-1]}"}
    assert "MiB free" in told.missing[f"all_reduce_2_{SIZES[-1]}"]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"work": "die"}, "rank 1: killed by SIGKILL"),
        ({"work": "hang", "deadline_s": 5}, "was not done after 5 s"),
        ({"work": "sum_wrongly"}, "ArithmeticError: an all-reduce of 1024 bytes is wrong in 256 of 256 places"),
        ({"refused": True}, "failed to listen"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value.values())),
)
def test_ranks_that_fail_leave_a_reason_and_nothing_else(asked, reason):
    told = measured(**asked)
    assert told.missing.keys() == {"all_reduce"}
    assert reason in told.missing["all_reduce"]
    assert told.rates == {}
    assert told.found == ()
    assert len(told.left) <= 2


# --- what is measured -------------------------------------------------------------------------------


def test_sizes_go_from_a_kibibyte_to_256_mebibytes_in_factors_of_four():
    assert FULL.all_reduce_bytes[0] == 2**10
    assert FULL.all_reduce_bytes[-1] == 256 * 2**20
    assert all(b == 4 * a for a, b in zip(FULL.all_reduce_bytes, FULL.all_reduce_bytes[1:], strict=False))


@pytest.mark.parametrize(
    ("devices", "worlds"),
    [(0, []), (1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (6, [2, 4, 6]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])],
)
def test_worlds_double_up_to_all_devices(devices, worlds):
    assert worlds_of(devices) == worlds


def test_one_core_or_one_accelerator_is_missing_with_its_reason(monkeypatch):
    tally = Tally(SMALL)
    assert collectives.measure_all_reduce(tally, CPU, 1) == ()
    assert "one core" in tally.missing["all_reduce"]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert collectives.measure_all_reduce(tally, torch.device("cuda"), 8) == ()
    assert "one accelerator" in tally.missing["all_reduce"]


def test_a_larger_world_that_fails_leaves_the_smaller_ones(monkeypatch):
    asked = []

    def among(size, extent, *, share_s, cores):
        asked.append((size, share_s))
        if size == 4:
            raise RuntimeError("no link")
        return Found(found=[collectives.AllReduce(backend="nccl", world_size=size, bytes=1024, seconds=1e-6)])

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(collectives, "among", among)
    tally = Tally(SMALL)
    found = collectives.measure_all_reduce(tally, torch.device("cuda"), 8)
    assert asked == [(2, pytest.approx(0.1)), (4, pytest.approx(0.1))]  # of 0.3 s for three worlds
    assert [one.world_size for one in found] == [2]
    assert tally.rates["all_reduce"].value == pytest.approx(1024 / 1e-6)
    assert tally.missing == {"all_reduce_4": "RuntimeError: no link"}


# --- sums -------------------------------------------------------------------------------------------


def test_a_sum_is_checked_in_every_place():
    check_sum(torch.empty(2048), 1, 3, lambda buffer: buffer.mul_(3))  # 1 + 2 + 3 times what rank 1 gives

    def spoiled(buffer: torch.Tensor) -> None:
        buffer.mul_(3)
        buffer[700] += 1

    with pytest.raises(ArithmeticError, match="of 8192 bytes is wrong in 1 of 2048 places"):
        check_sum(torch.empty(2048), 1, 3, spoiled)
    with pytest.raises(ArithmeticError, match="2048 of 2048"):
        check_sum(torch.empty(2048), 1, 3, lambda buffer: None)
