"""Signals held back: code that must run to its end does, and whoever was called for hears of it afterwards."""

import os
import signal
import threading

import pytest

from bsprof.measure.signals import held_back


class Deadline(Exception):
    pass


@pytest.fixture
def alarm():
    """Return a function that sends this process a signal whose handler raises."""

    def overdue(number, frame):
        raise Deadline

    before = signal.signal(signal.SIGALRM, overdue)
    yield lambda: os.kill(os.getpid(), signal.SIGALRM)
    signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_waits_for_the_end_of_the_block(alarm):
    done = []
    with pytest.raises(Deadline), held_back():
        alarm()
        alarm()
        done.append("all of it")
    assert done == ["all of it"]
    with pytest.raises(Deadline):  # and it is in force again
        alarm()


def test_each_handler_is_called_although_another_raised(alarm):
    done = []

    def interrupt(number, frame):
        done.append("interrupted")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises((Deadline, KeyboardInterrupt)), held_back():
            os.kill(os.getpid(), signal.SIGINT)
            alarm()
            done.append("all of it")
        assert done == ["all of it", "interrupted"]
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_error_of_the_block_itself_is_not_lost(alarm):
    with pytest.raises(ZeroDivisionError), held_back():
        1 / 0  # noqa: B018
    with pytest.raises(Deadline) as raised, held_back():
        alarm()
        1 / 0  # noqa: B018
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def test_what_the_system_does_by_itself_is_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with held_back():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_holds_nothing_back(alarm):
    found = []

    def beside():
        with held_back():
            found.append(signal.getsignal(signal.SIGALRM))

    before = signal.getsignal(signal.SIGALRM)
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert found == [before]
