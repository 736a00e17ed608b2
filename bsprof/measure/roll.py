"""Where processes of bsprof meet for a case, who has come, and who is still there.

They meet at a store, node 0's for the time of a case, or one that a launcher keeps for longer. Its key `case` says what
is measured now; all else of a case lies under the case's own name. Whoever takes part beats there, for a machine that
dies or is cut off says nothing.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple

import msgspec
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from bsprof.model import Outcome

LOOPBACK = "127.0.0.1"

POLL_S = 0.25

BEAT_S = 1.0

GONE_S = 10.0
"""Who has not beaten for so long is gone: ten beats, so that a machine that was busy for a moment is not."""

END = "end"
"""In place of a case's name: no case follows."""

_TIMEOUT = timedelta(seconds=60)
_CONNECTING_S = 5.0
_CASE = "case"

Emit = Callable[[str, int, float | None], None]


class Meeting(msgspec.Struct, frozen=True):
    """Where the ranks of one case meet."""

    host: str = LOOPBACK
    port: int = 0
    """0 for any that is free, where all are on this machine."""
    nodes: int = 1
    """Processes of bsprof that bring ranks: one a machine, or one a rank where they were launched already."""
    name: str = "case"
    """Of this case, and of no other that meets there."""
    launched: bool = False
    """Whether each process brings just the rank that its environment describes, as under torchrun."""
    kept: bool = False
    """Whether a launcher keeps the store; else it is node 0's."""
    prefix: str = ""
    """Of our keys in a store that others use too."""

    @property
    def endpoint(self) -> str:
        """Return HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Stopped(NamedTuple):
    """How the ranks of one node ended: all well, or else which of them died without a word, and of what."""

    exit_codes: dict[int, int]
    failure: str | None = None


class Follower(msgspec.Struct):
    """A process that brings ranks to node 0's case."""

    host: str
    owner: str
    """What its ranks name as their owner."""


# --- the store --------------------------------------------------------------------------------------


@contextlib.contextmanager
def hosted(meeting: Meeting) -> Iterator[Meeting]:
    """Keep a store while the block runs, unless one is kept already; yields the meeting with its port."""
    if meeting.kept:
        yield meeting
        return
    store = TCPStore(meeting.host, meeting.port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    yield msgspec.structs.replace(meeting, port=store.port)


def connect(meeting: Meeting) -> Store:
    """Return a connection of one's own to the keys of one case: a client that waits lets nobody else ask through it."""
    return PrefixStore(meeting.name, _root(meeting, _TIMEOUT))


def announce(meeting: Meeting) -> None:
    """Say which case is measured now."""
    put(_root(meeting, _TIMEOUT), _CASE, meeting.name)


def put(store: Store, key: str, value: str | bytes) -> None:
    """Set a key, and return once it has arrived: setting alone does not wait, and whoever sets may be gone at once."""
    store.set(key, value)  # type: ignore[arg-type]
    store.check([key])


def _root(meeting: Meeting, timeout: timedelta) -> Store:
    store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
    return PrefixStore(meeting.prefix, store) if meeting.prefix else store


def dismiss(meeting: Meeting, patience_s: float) -> None:
    """Tell all followers that no case follows, and wait so long for those who have not heard it yet."""
    with hosted(msgspec.structs.replace(meeting, name=END)) as here:
        announce(here)
        store = connect(here)
        end = time.monotonic() + patience_s
        while store.add("heard", 0) < here.nodes - 1 and time.monotonic() < end:
            time.sleep(POLL_S)


# --- node 0 -----------------------------------------------------------------------------------------


class Roll:
    """Node 0's list of the other nodes: who has come to a case, and who is gone. While entered it calls them.

    `on_gone` is called about once a second while one of them is gone.
    """

    def __init__(self, meeting: Meeting, on_gone: Callable[[Store], None]) -> None:
        self._meeting, self._on_gone = meeting, on_gone
        self._others = range(1, meeting.nodes)
        self._gone: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._store = connect(meeting)

    def __enter__(self) -> Roll:
        if self._others:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        if self._others:
            self._thread.join()

    @property
    def gone(self) -> bool:
        """Whether a node is gone that had come."""
        return bool(self._gone)

    def gather(self, patience_s: float) -> Outcome | None:
        """Wait until all nodes are ready, but no longer than that; return why they are not, or None."""
        began = time.monotonic()
        while True:
            missing = [other for other in self._others if not self._store.check([f"ready/{other}"])]
            if not missing:
                return None
            if self._gone:
                return self.loss(0)
            if time.monotonic() - began >= patience_s:
                return self._absence(missing, time.monotonic() - began)
            time.sleep(POLL_S)

    def _absence(self, missing: list[int], waited_s: float) -> Outcome:
        come = [other for other in self._others if self._store.check([f"node/{other}"])]
        nodes = self._meeting.nodes
        if late := [self._follower(other).host for other in missing if other in come]:
            message = f"{', '.join(late)}: still preparing the data after {waited_s:.0f} s"
            return Outcome(kind="timeout", message=message, hint="raise --deadline", phase="joining")
        return Outcome(
            kind="timeout",
            message=f"only {1 + len(come)} of {nodes} nodes came to {self._meeting.endpoint} within {waited_s:.0f} s",
            hint="start the same command on every node; the port must be open between them",
            phase="joining",
            evidence={"nodes": nodes, "came": 1 + len(come)},
        )

    def told(self) -> dict[int, Stopped]:
        """Return how the ranks of other nodes ended, by node, as far as they have told."""
        return {
            other: msgspec.json.decode(self._store.get(f"stopped/{other}"), type=Stopped)
            for other in self._others
            if self._store.check([f"stopped/{other}"])
        }

    def all_accounted_for(self) -> bool:
        """Whether each node has told how its ranks ended, or one is gone."""
        return self.gone or all(self._store.check([f"stopped/{other}"]) for other in self._others)

    def loss(self, size: int) -> Outcome | None:
        """Return the outcome of a case of `size` ranks whose node is gone, or None where none is."""
        if not self._gone:
            return None
        lost = self._follower(self._gone[0])
        theirs = [str(rank) for rank, (owner, _) in registered(self._store, size).items() if owner == lost.owner]
        ranks = f" (rank {', '.join(theirs)})" if theirs else ""
        stage = "joining"
        if self._store.check(["progress"]):
            stage = msgspec.json.decode(self._store.get("progress"), type=tuple[str, int, float | None])[0]
        return Outcome(
            kind="crash",
            message=f"node {lost.host} is gone{ranks}: nothing heard of it for {GONE_S:g} s",
            hint="bsprof has ended there, or the network between has",
            phase=stage,
            evidence={"node": lost.host, "ranks": ", ".join(theirs), "silent_s": GONE_S},
        )

    def _follower(self, number: int) -> Follower:
        if not self._store.check([f"node/{number}"]):
            return Follower(f"number {number}", "")
        return msgspec.json.decode(self._store.get(f"node/{number}"), type=Follower)

    def _call(self) -> None:
        """Beat, and listen for the others' beats."""
        store = connect(self._meeting)
        last: dict[int, tuple[int, float]] = {}
        while not self._done.wait(BEAT_S):
            with contextlib.suppress(RuntimeError):
                store.add("beat/0", 1)
                for other in self._others:
                    beats, now = store.add(f"beat/{other}", 0), time.monotonic()
                    if beats != last.get(other, (0, 0.0))[0]:
                        last[other] = (beats, now)
                    elif beats and now - last[other][1] > GONE_S and not store.check([f"stopped/{other}"]):
                        self._gone = sorted({*self._gone, other})
                if self._gone:
                    self._on_gone(store)


def registered(store: Store, size: int) -> Mapping[int, tuple[str, int]]:
    """Return owner and process of each rank that has come."""
    found = {}
    for rank in range(size):
        if store.check([f"pid/{rank}"]):
            owner, pid = store.get(f"pid/{rank}").decode().split()
            found[rank] = (owner, int(pid))
    return found


def register(store: Store, rank: int, owner: str, pid: int) -> None:
    """Say which process a rank is, and whose: process numbers are the same on many machines."""
    store.set(f"pid/{rank}", f"{owner} {pid}")


# --- the other nodes --------------------------------------------------------------------------------


def next_case(meeting: Meeting, seen: str, patience_s: float, emit: Emit) -> str | None:
    """Return the name of the case that is measured now, once it is not `seen`; END after the last one.

    None where node 0 was not there for `patience_s`. `emit` is called whenever it was.
    """
    heard = time.monotonic()
    while (left_s := heard + patience_s - time.monotonic()) > 0:
        with contextlib.suppress(RuntimeError):  # nobody is there, or not any longer
            store = _root(meeting, timedelta(seconds=min(_CONNECTING_S, left_s)))
            while (name := store.get(_CASE).decode()) == seen:
                heard = time.monotonic()
                emit("", 0, None)
                time.sleep(POLL_S)
            if name == END:
                with contextlib.suppress(RuntimeError):
                    PrefixStore(END, store).add("heard", 1)
            return name
        time.sleep(POLL_S)
    return None


class Seat:
    """A follower's seat in a case. While entered it beats, and calls `on_over` when the case is over without it.

    `emit` is called at each beat, so that somebody hears when a beat is stuck in a network that has gone.
    """

    def __init__(self, meeting: Meeting, number: int, on_over: Callable[[], None], emit: Emit) -> None:
        self._meeting, self._number, self._on_over, self._emit = meeting, number, on_over, emit
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._store = connect(meeting)

    @classmethod
    def take(cls, meeting: Meeting, owner: str, on_over: Callable[[], None], emit: Emit) -> Seat | None:
        """Come to the case; None where all seats are taken."""
        store = connect(meeting)
        number = store.add("came", 1)
        if number >= meeting.nodes:
            return None
        store.set(f"node/{number}", msgspec.json.encode(Follower(platform.node(), owner)).decode())
        return cls(meeting, number, on_over, emit)

    def __enter__(self) -> Seat:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()

    def ready(self) -> None:
        """Say that this node's ranks can start."""
        self._store.set(f"ready/{self._number}", "")

    def tell(self, stopped: Stopped) -> None:
        """Say how the ranks of this node ended."""
        put(self._store, f"stopped/{self._number}", msgspec.json.encode(stopped))

    def _beat(self) -> None:
        try:
            store, root = connect(self._meeting), _root(self._meeting, _TIMEOUT)
            last, since = 0, time.monotonic()
            while True:
                store.add(f"beat/{self._number}", 1)
                beats = store.add("beat/0", 0)
                if beats != last:
                    last, since = beats, time.monotonic()
                if root.get(_CASE).decode() != self._meeting.name or time.monotonic() - since > GONE_S:
                    break
                self._emit(self._meeting.name, 0, None)
                if self._done.wait(BEAT_S):
                    return
        except RuntimeError:
            pass  # node 0's store is gone, and its case with it
        if not self._done.is_set():
            self._on_over()
