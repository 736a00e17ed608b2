"""What the kernel counts while known work is done, and recorded machines on which others were busy."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bsprof.cgroup import Throttling
from bsprof.measure.counters import CounterWindow, Machine, contention_notes, read_machine

# --- this process -----------------------------------------------------------------------------------


def test_sleeping_takes_wall_time_and_gives_the_core_away():
    window = CounterWindow()
    for _ in range(20):
        time.sleep(0.005)
    counters = window.counters()
    assert counters.wall_ns >= 100_000_000
    assert counters.cpu_ns < counters.wall_ns
    assert counters.voluntary_switches >= 20


def test_new_pages_are_counted_as_minor_faults():
    window = CounterWindow()
    block = bytearray(64 * 2**20)
    window.close()
    counters = window.counters()
    assert counters.minor_faults > 20  # 16384 of 4 KiB, 32 where the kernel uses huge pages
    assert counters.cpu_ns > 0
    assert len(block) == 64 * 2**20


def test_a_closed_window_stays_as_it_was():
    window = CounterWindow()
    window.close()
    first = window.counters()
    sum(range(100_000))
    assert window.counters() == first
    assert isinstance(window.notes(), list)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_work_of_workers_counts_as_our_own():
    script = """
import multiprocessing, time
from bsprof.measure.counters import read_machine

def burn(started, stop):
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    started.set()
    stop.wait()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    started, stop = context.Event(), context.Event()
    before = read_machine()
    worker = context.Process(target=burn, args=(started, stop))
    worker.start()
    started.wait()
    running = read_machine()
    stop.set()
    worker.join()
    ended = read_machine()
    print(running.own_s - before.own_s, ended.own_s - before.own_s)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    running, ended = map(float, done.stdout.split())
    assert running >= 0.28  # counted in ticks of 10 ms
    assert ended >= 0.3


# --- recorded machines ------------------------------------------------------------------------------

TEN_SECONDS = 10.0


def machine(**seconds) -> Machine:
    quiet = {"clock_s": 0.0, "busy_s": 0.0, "idle_s": 0.0, "stolen_s": 0.0, "pressure_s": 0.0, "own_s": 0.0}
    return Machine(**{**quiet, "throttling": None, **seconds})


def notes_after(**seconds) -> dict[str, str]:
    notes = contention_notes(machine(), machine(clock_s=TEN_SECONDS, **seconds))
    return {note.code: note.text for note in notes}


def test_a_machine_of_our_own_has_no_notes():
    assert notes_after(busy_s=10.2, idle_s=9.8, own_s=10.0, pressure_s=0.3) == {}


def test_cores_kept_busy_by_others():
    notes = notes_after(busy_s=15.0, idle_s=5.0, own_s=10.0, pressure_s=2.0)
    assert list(notes) == ["cpu_contended"]
    assert "0.50 of 2 cores" in notes["cpu_contended"]
    assert "20% of the time" in notes["cpu_contended"]


def test_waiting_that_is_our_own_doing():
    notes = notes_after(busy_s=20.0, idle_s=0.0, own_s=19.9, pressure_s=9.0)
    assert list(notes) == ["cpu_oversubscribed"]
    assert "90% of the time" in notes["cpu_oversubscribed"]


def test_waiting_where_nothing_else_is_told():
    notes = notes_after(busy_s=None, idle_s=None, stolen_s=None, pressure_s=1.0)
    assert list(notes) == ["cpu_contended"]
    assert "10% of the time" in notes["cpu_contended"]


def test_stolen_time():
    notes = notes_after(busy_s=9.0, idle_s=10.0, stolen_s=1.0, own_s=9.0)
    assert list(notes) == ["steal"]
    assert "10.0%" in notes["steal"]


def test_quota_that_ran_out():
    before = machine(throttling=Throttling(100, 10, 10**9))
    after = machine(clock_s=TEN_SECONDS, throttling=Throttling(200, 35, 3 * 10**9))
    (note,) = contention_notes(before, after)
    assert note.code == "cpu_quota"
    assert "25%" in note.text
    assert "2.00 s" in note.text


def test_a_quota_that_held_has_no_note():
    before = machine(throttling=Throttling(100, 10, 10**9))
    after = machine(clock_s=TEN_SECONDS, throttling=Throttling(200, 10, 10**9))
    assert contention_notes(before, after) == []


def test_too_short_a_window_for_ticks():
    before, after = machine(), machine(clock_s=0.1, busy_s=0.2, idle_s=0.0, stolen_s=0.02, own_s=0.1)
    assert contention_notes(before, after) == []


def test_a_machine_that_tells_nothing(tmp_path):
    reading = read_machine(tmp_path)
    assert (reading.busy_s, reading.idle_s, reading.stolen_s, reading.pressure_s) == (None, None, None, None)
    assert reading.throttling is None
    assert reading.own_s > 0
    assert contention_notes(reading, read_machine(tmp_path)) == []


def test_a_recorded_machine(tmp_path):
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/stat").write_text("cpu  100 50 200 4000 300 5 45 100 30 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    (tmp_path / "proc/pressure/cpu").write_text(
        "some avg10=0.56 avg60=0.33 avg300=0.21 total=7264151\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    reading = read_machine(tmp_path)
    ticks = os.sysconf("SC_CLK_TCK")
    assert reading.busy_s == pytest.approx(400 / ticks)  # without guests, whose time is in user already
    assert reading.idle_s == pytest.approx(4300 / ticks)
    assert reading.stolen_s == pytest.approx(100 / ticks)
    assert reading.pressure_s == pytest.approx(7.264151)
