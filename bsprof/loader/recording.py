"""The file in which one process writes down the batches that it makes.

It is mapped into memory, so that an entry costs no system call and what was written survives a SIGKILL. All of it is
64-bit integers: a header, then entries one after the other: their length, their kind, their content. An entry counts
once the header's `END` is past it. Nothing but the process that writes and the one that reads ever sees the file, so
that its byte order is the machine's.
"""

from __future__ import annotations

import array
import mmap
import os
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

BOUND = 64 << 20
"""Bytes at most: some 50 000 batches of 32 samples."""

_CHUNK = 1 << 18
"""Disk space is reserved in pieces of this size: a mapped page that the disk has no room for ends in a SIGBUS."""

ABSENT = -1
"""Stands for 'not captured': no figure here can be below 0."""

_END, _DROPPED, _CLOSED, _WORKER, _PID, _ENTERED, _READY, _CORES, _TORCH_THREADS = range(9)
_HEADER = 16

_KIND_BATCH, _KIND_BRIEF, _KIND_SENT, _KIND_LOOK, _KIND_STAGE, _KIND_INDEX, _KIND_NOTE = range(7)

MADE, ENDED, FAILED = range(3)
"""How a fetch went: a batch, StopIteration, another exception."""

NO_SAMPLES, INDEXED, HASHED, COUNTED = range(4)
"""What names the samples of a batch: nothing, as their times are unknown; whole numbers; the hashes of other indices;
their place in the worker's stream."""

FIGURES_A_STAGE = 6
"""The stage's number, ns, calls, ns looked at closely, CPU ns in that, calls looked at closely."""


class Batch(NamedTuple):
    """One fetch. Moments and durations in ns; `ABSENT` is 'not captured'."""

    generation: int
    """How many fetchers this process had before: one for each pass over the loader."""
    number: int
    """How many fetches came before with the same fetcher."""
    status: int
    begun: int
    produced: int
    items: int
    collate: int
    cpu: int
    runqueue: int
    process_cpu: int
    minor_faults: int
    major_faults: int
    blocks_in: int
    switches: int
    tensors: int
    bytes: int
    float_bytes: int
    samples: int
    naming: int
    timed: int
    """Samples whose times are known."""


BRIEF = ("generation", "number", "status", "begun", "produced")
"""What is known of a batch that was not looked at."""


class Sent(NamedTuple):
    """One batch pickled."""

    generation: int
    place: int
    """The batch's own, as the consuming process gave it out."""
    begun: int
    ended: int
    length: int


class Look(NamedTuple):
    """What is looked at seldom, because it costs much."""

    at: int
    private_bytes: int
    threads: int
    open_files: int


class Recording:
    """The writing end. `append_…` never fails: what finds no room is counted as dropped.

    Raises OSError if the file cannot be made.
    """

    def __init__(self, path: Path, *, worker: int) -> None:
        # The descriptor stays open to reserve space with; the mapping has one of its own.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._file, BOUND)
            _allocate(self._file, 0, _CHUNK)
            self._map = mmap.mmap(self._file, BOUND)
        except BaseException:
            os.close(self._file)
            raise
        self._slots = memoryview(self._map).cast("q")
        self._end = _HEADER
        self._reserved = _CHUNK // 8
        self._lock = threading.Lock()  # the feeder thread appends too
        for slot in (_ENTERED, _READY, _CORES, _TORCH_THREADS):
            self._slots[slot] = ABSENT
        self._slots[_WORKER] = worker
        self._slots[_PID] = os.getpid()
        self._slots[_END] = _HEADER

    OPEN_FILES = 2

    @property
    def closed(self) -> bool:
        """Whether the reader has gone."""
        return self._slots[_CLOSED] != 0

    def close(self) -> None:
        """Give back the descriptor; the mapping goes when nobody holds it any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def entered(self, at: int) -> None:
        """Note when the data set had arrived in this process."""
        self._slots[_ENTERED] = at

    def ready(self, at: int, *, cores: int, torch_threads: int) -> None:
        """Note when the user's own set-up was done, and after it the cores that it may run on and torch's threads."""
        self._slots[_READY], self._slots[_CORES], self._slots[_TORCH_THREADS] = at, cores, torch_threads

    def append_batch(
        self, batch: Batch, stages: list[int], names: array.array[int] | None, ends: list[int] | None
    ) -> None:
        """Append a batch with `FIGURES_A_STAGE` figures a stage, and its samples' names and ends, if there are any.

        `names` has one entry a sample, or a single one, the first sample's place, where the naming is `COUNTED`.
        """
        entry = array.array("q", (0, _KIND_BATCH, *batch, len(stages), *stages))
        if names is not None and ends is not None:
            entry += names
            entry.fromlist(ends)
        if not self._append(entry):
            self._slots[_DROPPED] += 1

    def append_brief(self, figures: list[int]) -> None:
        """Append batches of which only `BRIEF` is known, one after another in one list."""
        if figures and not self._append(array.array("q", (0, _KIND_BRIEF, *figures))):
            self._slots[_DROPPED] += len(figures) // len(BRIEF)

    def append_sent(self, figures: list[int]) -> None:
        """Append when batches were pickled: the fields of `Sent`, one batch after another in one list."""
        if figures:
            self._append(array.array("q", (0, _KIND_SENT, *figures)))

    def append_look(self, look: Look) -> None:
        """Append a look at the process."""
        self._append(array.array("q", (0, _KIND_LOOK, *look)))

    def append_stage(self, number: int, name: str) -> None:
        """Say which stage `number` is, before the first batch that uses it."""
        self._append_text(_KIND_STAGE, number, name)

    def append_index(self, hashed: int, name: str) -> None:
        """Say what the index with this hash looks like."""
        self._append_text(_KIND_INDEX, hashed, name)

    def append_note(self, text: str) -> None:
        """Leave a word for the reader."""
        self._append_text(_KIND_NOTE, 0, text)

    def _append_text(self, kind: int, number: int, text: str) -> None:
        encoded = text.encode("utf-8", "replace")
        entry = array.array("q", (0, kind, number, len(encoded)))
        entry.frombytes(encoded.ljust(-(-len(encoded) // 8) * 8))
        self._append(entry)

    def _append(self, entry: array.array[int]) -> bool:
        entry[0] = len(entry)
        with self._lock:
            begin, end = self._end, self._end + len(entry)
            if end > self._reserved and not self._reserve(end):
                return False
            self._slots[begin:end] = memoryview(entry)
            self._end = self._slots[_END] = end
        return True

    def _reserve(self, end: int) -> bool:
        size = max(_CHUNK, 8 * (end - self._reserved))
        if self._file < 0 or 8 * self._reserved + size > BOUND:
            return False
        try:
            _allocate(self._file, 8 * self._reserved, size)
        except OSError:
            return False
        self._reserved += size // 8
        return True


def _allocate(file: int, begin: int, size: int) -> None:
    """Reserve room on the disk, where the system can: writing to a mapping that finds none ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, begin, size)


@dataclass
class Recorded:
    """What stands in a recording."""

    worker: int
    pid: int
    entered: int
    ready: int
    cores: int
    torch_threads: int
    dropped: int
    batches: list[Batch] = field(default_factory=list)
    stages: list[array.array[int]] = field(default_factory=list)
    """For each batch, `FIGURES_A_STAGE` figures a stage."""
    sample_names: list[array.array[int]] = field(default_factory=list)
    sample_ends: list[array.array[int]] = field(default_factory=list)
    """For each batch, when each of its samples was done."""
    sent: list[Sent] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    stage_names: dict[int, str] = field(default_factory=dict)
    index_names: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, generations: set[int]) -> Recorded:
        """Return the same with the batches of these generations only."""
        kept = [place for place, batch in enumerate(self.batches) if batch.generation in generations]
        return replace(
            self,
            batches=[self.batches[place] for place in kept],
            stages=[self.stages[place] for place in kept],
            sample_names=[self.sample_names[place] for place in kept],
            sample_ends=[self.sample_ends[place] for place in kept],
        )


def close_recording(path: Path) -> None:
    """Tell whoever writes at `path` that nobody will read on. Raises OSError."""
    with path.open("r+b") as file:
        file.seek(8 * _CLOSED)
        file.write((1).to_bytes(8, sys.byteorder))


def read_recording(path: Path) -> bytes:
    """Return the part of the file at `path` that is written; nothing if its process had not begun. Raises OSError."""
    with path.open("rb") as file:
        header = file.read(8 * _HEADER)
        if len(header) < 8 * _HEADER:
            return b""
        return header + file.read(8 * max(0, array.array("q", header)[_END] - _HEADER))


def decode(content: bytes) -> Recorded | None:
    """Decode what `read_recording` returned; None if its process ended before it had written anything."""
    slots = array.array("q", content)
    if not slots or not slots[_END]:
        return None
    recorded = Recorded(
        worker=slots[_WORKER],
        pid=slots[_PID],
        entered=slots[_ENTERED],
        ready=slots[_READY],
        cores=slots[_CORES],
        torch_threads=slots[_TORCH_THREADS],
        dropped=slots[_DROPPED],
    )
    at = _HEADER
    while at < len(slots):
        size, kind = slots[at : at + 2]
        _decode_entry(recorded, kind, slots[at + 2 : at + size])
        at += size
    return recorded


def _decode_entry(recorded: Recorded, kind: int, entry: array.array[int]) -> None:
    if kind == _KIND_BATCH:
        fields = len(Batch._fields)
        batch = Batch(*entry[:fields])
        samples = fields + 1 + entry[fields]
        named = samples + (1 if batch.naming == COUNTED else batch.timed)
        recorded.batches.append(batch)
        recorded.stages.append(entry[fields + 1 : samples])
        recorded.sample_names.append(entry[samples:named])
        recorded.sample_ends.append(entry[named:])
    elif kind == _KIND_BRIEF:
        for at in range(0, len(entry), len(BRIEF)):
            known = dict(zip(BRIEF, entry[at : at + len(BRIEF)], strict=True))
            figures = dict.fromkeys(Batch._fields, ABSENT) | {"naming": NO_SAMPLES, "timed": 0} | known
            recorded.batches.append(Batch(**figures))
            recorded.stages.append(array.array("q"))
            recorded.sample_names.append(array.array("q"))
            recorded.sample_ends.append(array.array("q"))
    elif kind == _KIND_SENT:
        for at in range(0, len(entry), len(Sent._fields)):
            recorded.sent.append(Sent(*entry[at : at + len(Sent._fields)]))
    elif kind == _KIND_LOOK:
        recorded.looks.append(Look(*entry))
    else:
        number, length = entry[:2]
        text = entry[2:].tobytes()[:length].decode("utf-8", "replace")
        if kind == _KIND_NOTE:
            recorded.notes.append(text)
        else:
            (recorded.stage_names if kind == _KIND_STAGE else recorded.index_names)[number] = text
