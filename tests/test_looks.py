"""What a worker is blocked in is seen from outside, and nothing is left behind."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bsprof.loader.looks import Look, Looking, descendants, during
from bsprof.measure import companion


def nap():
    time.sleep(60)


def test_what_a_child_sleeps_in_is_seen(tmp_path):
    looking = Looking(tmp_path / "looks")
    child = multiprocessing.Process(target=nap)
    child.start()
    try:
        looking.start()
        assert looking._companion is not None
        pid = looking._companion.pid
        end = time.monotonic() + 20
        while time.monotonic() < end:
            seen = [look for look in looking.looks() if look.pid == child.pid]
            if len(seen) >= 3:
                break
            time.sleep(0.05)
        assert child.pid in descendants(multiprocessing.current_process().pid)
    finally:
        looking.close()
        child.kill()
        child.join()
    assert len(seen) >= 3
    wchan_is_told = Path("/proc/self/wchan").exists()
    assert not wchan_is_told or any("nanosleep" in look.blocked_in for look in seen)
    assert not Path(f"/proc/{pid}").exists()


def test_closing_what_was_never_started_is_nothing(tmp_path):
    looking = Looking(tmp_path / "looks")
    looking.close()
    assert looking.looks() == []


def test_a_process_that_cannot_start_hurts_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    looking = Looking(tmp_path / "looks")
    looking.start()
    looking.close()
    assert looking.looks() == []


def test_it_ends_when_it_is_told_to_although_a_worker_holds_its_pipe_open(tmp_path, monkeypatch):
    """Were it killed at last instead, a worker would keep every close waiting for that long."""
    monkeypatch.setattr(companion, "CLOSE_S", 60.0)
    looking = Looking(tmp_path / "looks")
    looking.start()
    worker = multiprocessing.get_context("fork").Process(target=nap)
    worker.start()
    try:
        before = time.monotonic()
        looking.close()
        assert time.monotonic() - before < 30
    finally:
        looking.close()
        worker.kill()
        worker.join()


def test_the_process_that_looks_loads_no_torch():
    code = "import sys, bsprof.loader.looks; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "looks"
    path.write_text("5 7 futex_do_wait\n9 7 \n12")
    assert Looking(path).looks() == [Look(5, 7, "futex_do_wait"), Look(9, 7, "")]


def test_only_looks_within_a_span_count():
    looks = [Look(1, 7, "a"), Look(5, 7, "a"), Look(6, 7, ""), Look(9, 7, "b"), Look(15, 7, "a")]
    assert during(looks, [4, 8], [6, 9]) == ({"a": 1, "b": 1}, 3)


@given(st.lists(st.integers(0, 100), max_size=20), st.lists(st.integers(0, 100), max_size=10))
def test_counts_add_up_to_no_more_than_the_looks(times, edges):
    edges = sorted(edges)
    begun, ended = edges[0::2], edges[1::2]
    begun = begun[: len(ended)]
    counts, seen = during([Look(t, 1, "x" if t % 2 else "") for t in times], begun, ended)
    assert sum(counts.values()) <= seen <= len(times)
