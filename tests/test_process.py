"""A call in a child process: it answers, it dies, or it is ended, and nothing of it stays behind."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from bsprof.errors import BsprofError
from bsprof.sweep.process import Progressed, call


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether `pid` ends, or is but a zombie, within some seconds."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def family(path: Path, within_s: float = 60.0) -> list[int]:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if path.exists() and path.read_text():
            return json.loads(path.read_text())
        time.sleep(0.02)
    raise AssertionError("the family never started")


def test_a_value_and_its_progress_come_back_and_noise_does_not(capfd):
    heard = []
    reply = call("child_targets:echo", b'{"a": [1, null]}', on_progress=heard.append)
    assert reply.value is not None
    assert json.loads(reply.value) == {"a": [1, None]}
    assert [m for m in heard if m] == [Progressed("echo", 3, 0.25)]
    assert reply.wall_s > 0
    assert capfd.readouterr() == ("", "")


def test_the_child_has_torch_and_this_process_need_not():
    assert call("child_targets:torch_loaded", b"null").value == b"true"
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "if __name__ == '__main__':\n"
        "    from bsprof.sweep.process import call\n"
        "    assert call('child_targets:torch_loaded', b'null').value == b'true'\n"
        "    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_a_refusal_crosses_the_boundary_whole():
    with pytest.raises(BsprofError, match="cannot do that") as caught:
        call("child_targets:refuse", b"null")
    assert caught.value.hint == "do something else"


def test_a_defect_shows_its_traceback():
    with pytest.raises(RuntimeError, match=r"child_targets:fail: LookupError: nothing here[\s\S]*in fail"):
        call("child_targets:fail", b"null")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_death_by_signal_has_a_name_and_last_words(number):
    reply = call("child_targets:die", json.dumps(int(number)).encode())
    assert reply.value is None
    assert reply.death is not None
    assert reply.death.signal == number
    assert "last words" in reply.death.last_words
    assert not reply.death.timed_out


def test_leaving_without_a_word_is_a_death_with_its_code():
    death = call("child_targets:leave", b"null").death
    assert death is not None
    assert (death.signal, death.exit_code) == (None, 7)


def test_past_the_deadline_the_whole_family_ends(tmp_path):
    pids = tmp_path / "pids"
    reply = call("child_targets:hang_with_family", json.dumps(str(pids)).encode(), deadline_s=3.0)
    assert reply.death is not None
    assert reply.death.timed_out
    assert all(gone(pid) for pid in json.loads(pids.read_text()))


def test_an_interrupt_ends_the_whole_family(tmp_path):
    pids = tmp_path / "pids"

    def interrupt(message: Progressed | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("child_targets:hang_with_family", json.dumps(str(pids)).encode(), on_progress=interrupt)
    assert all(gone(pid) for pid in family(pids))


def test_when_the_parent_is_killed_nothing_is_left(tmp_path):
    scratch = Path(tempfile.mkdtemp(prefix="b"))  # sockets are made in it, whose paths must be short
    pids = tmp_path / "pids"
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "if __name__ == '__main__':\n"
        "    from bsprof.sweep.process import call\n"
        f"    call('child_targets:hang_with_family', {json.dumps(str(pids)).encode()!r})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(scratch)})
    started = family(pids)
    children = psutil.Process(parent.pid).children(recursive=True)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert all(gone(pid) for pid in started)
    assert all(gone(child.pid) for child in children)
    assert list(scratch.glob("bsprof-*")) == []
    shutil.rmtree(scratch)


def test_no_files_or_descriptors_are_left(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    call("child_targets:echo", b"1")
    gc.collect()  # what earlier tests still held must not be counted
    before = psutil.Process().num_fds()
    for _ in range(3):
        call("child_targets:echo", b"1")
    assert psutil.Process().num_fds() == before
    assert list(tmp_path.glob("bsprof-*")) == []
