"""Reading and writing what was measured: the result file, the plan, and the journal of a sweep in progress.

A result is JSON, one measurement a line, gzipped where the name ends in `.gz`. It appears whole or not at
all. Whatever is wrong with a file that is read is said in one line that starts with the file, then the
place in it. A number that is not finite has no JSON form and is written as null, 'not captured'.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import gzip
import io
import json
import math
import os
import re
import shlex
import shutil
import stat
import tempfile
import tomllib
import typing
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec

from bsprof.errors import BsprofError
from bsprof.files import sync_directory, write_whole
from bsprof.loading import Loading
from bsprof.model import (
    AXES,
    SCHEMA,
    Environment,
    Gate,
    LargestBatchSearch,
    Measurement,
    Plan,
    Rank,
    Result,
    Samples,
    Stop,
)
from bsprof.noun import Noun

T = TypeVar("T")

# --- results ----------------------------------------------------------------------------------------


COPY_VARIABLE = "BSPROF_RESULT"
"""Names the file where `Recorder.save` leaves a copy, so that `bsprof ab` compares a script by its steps."""


def save(result: Result, path: str | os.PathLike[str]) -> None:
    """Write `result` to `path`, gzipped if the name ends in `.gz`: the whole file, safe on disk, or nothing.

    What stood at `path` stays until the new file is complete; a symbolic link is followed.
    Raises BsprofError where the file cannot be written.
    """
    path = Path(path)
    with _named(path):
        if path.exists() and not path.is_file():
            raise BsprofError(f"{path}: not a regular file")
        write_whole(path, encode(result))


def encode(result: Result) -> bytes:
    """Return `result` as JSON text: a top-level field a line, a measurement a line."""
    fields = []
    for name in result.__struct_fields__:
        value = getattr(result, name)
        if name == "measurements" and value:
            text = b"[\n" + b",\n".join(map(to_json, value)) + b"\n]"
        else:
            text = to_json(value)
        fields.append(to_json(name) + b":" + text)
    return b"{\n" + b",\n".join(fields) + b"\n}\n"


def load(path: str | os.PathLike[str]) -> Result:
    """Return the result saved at `path`, gzipped or not, whatever its name.

    Raises BsprofError for a file that is missing, damaged, from a newer schema, no result of bsprof's, or whose
    samples contradict each other.
    """
    path = Path(path)
    text = _read(path)
    with _explained(path, text):
        try:
            result = msgspec.json.decode(text, type=Result)
        except msgspec.ValidationError:
            # What does not fit may be newer, or something else altogether: that comes before any detail.
            _check_schema(path, msgspec.json.decode(text))
            raise
    _check_schema(path, {"schema": result.schema})
    for index, measurement in enumerate(result.measurements):
        _check_measurement(f"{path}: $.measurements[{index}]", measurement)
    return result


def schema_json() -> bytes:
    """Return the JSON Schema (2020-12) of a result file, as shipped in `result.schema.json`."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:bsprof:result:{SCHEMA}",
        **msgspec.json.schema(Result),
    }
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


def _check_schema(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or "schema" not in content:
        raise BsprofError(f"{path}: not a bsprof result")
    schema = content["schema"]
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise BsprofError(f"{path}: $.schema: expected int, got {type(schema).__name__}")
    if schema > SCHEMA:
        raise BsprofError(
            f"{path}: written by schema {schema}, this bsprof reads up to {SCHEMA}",
            hint="upgrade: pip install --upgrade bsprof",
        )
    if schema < 1:
        raise BsprofError(f"{path}: $.schema: there is no schema {schema}")


def _check_measurement(place: str, measurement: Measurement) -> None:
    _check_samples(f"{place}.samples", measurement.samples)
    for index, rank in enumerate(measurement.ranks):
        _check_rank(f"{place}.ranks[{index}]", rank)
    if measurement.loading is not None:
        _check_loading(f"{place}.loading", measurement.loading)


def _check_rank(place: str, rank: Rank) -> None:
    """Raise BsprofError where a rank's arrays that hold one entry a step disagree."""
    _check_samples(f"{place}.samples", rank.samples)
    steps = len(rank.samples.step_ns) if rank.samples else 0
    if rank.before_reduce_ns is not None and len(rank.before_reduce_ns) != steps:
        raise BsprofError(f"{place}.before_reduce_ns: {len(rank.before_reduce_ns)} entries for {steps} steps")


def _check_loading(place: str, loading: Loading) -> None:
    """Raise BsprofError where columns that hold one entry a batch disagree, or a duration is less than nothing."""
    columns = msgspec.structs.asdict(loading.batches)
    columns |= {f"stage_ns.{stage}": times for stage, times in columns.pop("stage_ns").items()}
    count = len(loading.batches.order)
    for name, column in columns.items():
        if len(column) != count:
            raise BsprofError(f"{place}.batches.{name}: {len(column)} entries for {count} batches")
        is_moment, is_place = name.endswith("_at_ns"), name == "worker"
        least = min((value for value in column if value is not None), default=0)
        if least < 0 and not is_moment and not is_place:
            raise BsprofError(f"{place}.batches.{name}: {least}, less than nothing")
    for index, worker in enumerate(loading.workers):
        if len(worker.memory_at_ns) != len(worker.private_bytes):
            entries = f"{len(worker.private_bytes)} entries for {len(worker.memory_at_ns)} moments"
            raise BsprofError(f"{place}.workers[{index}].private_bytes: {entries}")


def _check_samples(place: str, samples: Samples | None) -> None:
    """Raise BsprofError where arrays that hold one entry a step disagree, or a block is less than nothing."""
    if samples is None:
        return
    arrays = {f"host_ns.{phase}": times for phase, times in samples.host_ns.items()}
    arrays |= {f"device_ns.{phase}": times for phase, times in (samples.device_ns or {}).items()}
    if samples.device_step_ns is not None:
        arrays["device_step_ns"] = samples.device_step_ns
    steps = len(samples.step_ns)
    for name, times in arrays.items():
        if len(times) != steps:
            raise BsprofError(f"{place}.{name}: {len(times)} entries for {steps} steps")
    if samples.batch_size is not None and samples.batch_size < 1:
        raise BsprofError(f"{place}.batch_size: expected int >= 1, got {samples.batch_size}")
    for boundary in samples.epoch_boundaries:
        if not 0 <= boundary < steps:
            raise BsprofError(f"{place}.epoch_boundaries: there is no step {boundary} among {steps}")
    for index, block in enumerate(samples.blocks):
        for count in ("steps", "wall_ns"):
            if getattr(block, count) < 0:
                raise BsprofError(f"{place}.blocks[{index}].{count}: expected int >= 0, got {getattr(block, count)}")


# --- plans ------------------------------------------------------------------------------------------


class _PlanOfResult(msgspec.Struct):
    """The part of a result that repeats it; the measurements are skipped, not read."""

    plan: Plan | None


def read_plan(path: Path) -> Plan:
    """Return the plan in a `.toml` or `.json` file, or the plan that a result (`.json`, `.json.gz`) carries.

    Raises BsprofError that names the place and, where it can be told, the line.
    """
    is_toml = path.suffix == ".toml"
    if not is_toml and not path.name.endswith((".json", ".json.gz")):
        raise BsprofError(f"{path}: a plan is a .toml or .json file")
    text = _read(path)
    with _explained(path, text, is_plan=True):
        if is_toml:
            return msgspec.convert(tomllib.loads(text.decode(), parse_float=_finite_or_text), Plan)
        content = msgspec.json.decode(text)
        if isinstance(content, dict) and "schema" in content:
            _check_schema(path, content)
            return _plan_of_result(path, text)
        plan = msgspec.json.decode(text, type=Plan)
        json.loads(text, object_pairs_hook=_refuse_twins)
        return plan
    raise AssertionError("a context that explains errors does not swallow them")


def _finite_or_text(number: str) -> float | str:
    """Read a TOML number. Infinity and NaN, that the JSON carrying the plan has not, stay text: no number fits."""
    return value if math.isfinite(value := float(number)) else number


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raise ValueError where an object has a key twice: JSON lets the last one win, unseen."""
    names = [name for name, _ in pairs]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twins[0]} is given twice")
    return dict(pairs)


def _plan_of_result(path: Path, text: bytes) -> Plan:
    plan = msgspec.json.decode(text, type=_PlanOfResult).plan
    if plan is None:
        raise BsprofError(
            f"{path}: $.plan: null, there is no plan to repeat",
            hint="it was measured inside a user's own loop; bsprof bench writes results that carry their plan",
        )
    return plan


_A_PLAN = "a plan reads like: axes = { batch_size = [64, 128], workers = [1, 4] }; `bsprof bench --help` has all axes"


_PARTS = {"stop": Stop, "largest_batch": LargestBatchSearch}


def _plan_hint(place: str, what: str) -> str | None:
    """Return what to write instead at `place` in a plan, where that can be said."""
    *_, parent, name = ["", *re.sub(r"\[[\d.]*\]", "", place).split(".")]
    axis = AXES.get(name) if parent in ("axes", "blocks") else None
    if what.startswith("unknown"):
        known = AXES if parent in ("axes", "blocks") else _PARTS.get(parent, Plan).__struct_fields__
        near = difflib.get_close_matches(name, known, n=1)
        return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    if axis and what.startswith("expected array"):
        default = {int: 1, bool: True, str: "auto"}.get(axis.type) if axis.default is None else axis.default
        return f"an axis takes a list of values: {name} = [{msgspec.json.encode(default).decode()}]"
    if axis and what.startswith("invalid") and typing.get_origin(axis.type) is Literal:
        return f"one of {', '.join(typing.get_args(axis.type))}"
    return None


def _line_of(place: str, text: bytes) -> str:
    """Return ` (line N)` of the last key in `place`, where only one line has such a key."""
    key = re.sub(r"\[[\d.]*\]", "", place).rpartition(".")[2]
    pattern = re.compile(rf"""^[^#]*(?<![\w-])["']?{re.escape(key)}["']?\s*[=:]""")
    lines = [number for number, line in enumerate(text.decode(errors="replace").splitlines(), 1) if pattern.match(line)]
    return f" (line {lines[0]})" if len(lines) == 1 else ""


# --- the gate ---------------------------------------------------------------------------------------


class _OwnTable(Noun, frozen=True, kw_only=True):
    gate: Gate = Gate()


class _ToolTable(msgspec.Struct, frozen=True):
    bsprof: _OwnTable = _OwnTable()


class _Pyproject(msgspec.Struct, frozen=True):
    tool: _ToolTable = _ToolTable()


def load_gate(path: str | os.PathLike[str]) -> Gate:
    """Return `[tool.bsprof.gate]` of the pyproject.toml at `path`, the default where it has none.

    Raises BsprofError for a file that cannot be read, and for a table with an unknown key or a value out of range.
    """
    path = Path(path)
    text = _read(path)
    with _explained(path, text):
        try:
            table = tomllib.loads(text.decode())
        except tomllib.TOMLDecodeError as error:
            raise BsprofError(f"{path}: {_lowered(str(error))}") from None
        return msgspec.convert(table, _Pyproject).tool.bsprof.gate
    raise AssertionError("a context that explains errors does not swallow them")


# --- the journal ------------------------------------------------------------------------------------


class Header(Noun, frozen=True, kw_only=True):
    """The first line of a journal: what the measurements below it belong to."""

    kind: Literal["bsprof journal"] = "bsprof journal"
    schema: int = SCHEMA
    created: str
    """UTC, ISO 8601."""
    plan: Plan
    environment: Environment


_JOURNAL_START = b'{"kind":"bsprof journal",'


class Journal:
    """The measurements of a sweep in progress, one a line, so that kill -9 loses at most the case in progress.

    The file is locked for as long as it is open: two sweeps never share one, and the lock dies with its process.
    `header` and `measurements` hold what the file holds. Errors are BsprofErrors that name the file.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self.header: Header
        self.measurements: list[Measurement] = []
        self._file = file
        self._end = 0

    @classmethod
    def create(cls, path: Path, header: Header, *, reserve_bytes: int = 1 << 20) -> Self:
        """Start a journal at `path`, where none may be, once `reserve_bytes` are known to fit beside it.

        Raises BsprofError where the directory cannot be written or has no room, where another process
        writes this journal, and where an unfinished one waits to be resumed.
        """
        with _named(path):
            _reserve(path.parent, reserve_bytes)
            journal = cls(path, _open_locked(path, os.O_CREAT))
            try:
                text = journal._read()
                if b"\n" in text and text.startswith(_JOURNAL_START):
                    target = shlex.quote(str(path.with_suffix("")))
                    raise BsprofError(
                        f"{path}: an unfinished sweep left this journal",
                        hint=f"finish it with `bsprof bench --resume {target}`, or delete the journal",
                    )
                if not (text.startswith(_JOURNAL_START) or _JOURNAL_START.startswith(text)):
                    raise BsprofError(f"{path}: exists and is not a bsprof journal")
                os.ftruncate(journal._file, 0)  # killed before its first line was complete: it holds nothing
                journal.header = header
                journal._write(header)
                sync_directory(path.parent)
            except BaseException:
                journal.close()
                raise
        return journal

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Open the journal an interrupted sweep left at `path`, to append to it.

        A last line without its end is what a crash in the middle of a write leaves: it is cut off. Raises
        BsprofError for any other damage, and where another process writes this journal or there is none.
        """
        with _named(path):
            journal = cls(path, _open_locked(path, 0))
            try:
                journal._parse(journal._read())
                os.ftruncate(journal._file, journal._end)
            except BaseException:
                journal.close()
                raise
        return journal

    def append(self, measurement: Measurement) -> None:
        """Add `measurement`; on return it is safe on disk. Where that fails, the lines before it stay whole."""
        with _named(self.path):
            self._write(measurement)
        self.measurements.append(measurement)

    def close(self) -> None:
        """Release the lock and leave the file, for `resume`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Remove the file: its measurements are in a saved result. It is still locked while it goes."""
        with _named(self.path):
            self.path.unlink(missing_ok=True)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> bytes:
        with os.fdopen(self._file, "rb", closefd=False) as stream:
            stream.seek(0)
            return stream.read()

    def _parse(self, text: bytes) -> None:
        *lines, torn = text.split(b"\n")
        if not lines or not text.startswith(_JOURNAL_START):
            raise BsprofError(f"{self.path}: no journal of bsprof's to resume", hint="start anew, without --resume")
        with _explained(f"{self.path}: line 1", lines[0]):
            _check_schema(self.path, msgspec.json.decode(lines[0]))
            self.header = msgspec.json.decode(lines[0], type=Header)
        for number, line in enumerate(lines[1:], 2):
            with _explained(f"{self.path}: line {number}", line):
                self.measurements.append(msgspec.json.decode(line, type=Measurement))
            _check_measurement(f"{self.path}: line {number}: $", self.measurements[-1])
        self._end = len(text) - len(torn)

    def _write(self, noun: Noun) -> None:
        line = to_json(noun) + b"\n"
        try:
            if os.write(self._file, line) != len(line):  # a part fitted
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)


def _open_locked(path: Path, flags: int) -> int:
    """Return a descriptor of the file at `path`, locked, to be read and appended to."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            os.close(file)
            raise BsprofError(
                f"{path}: another bsprof is writing this journal", hint="wait for it, or name another --output"
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # discarded by its owner between our opening and our locking it


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _reserve(directory: Path, size: int) -> None:
    """Raise OSError unless `size` more bytes can be stored in `directory`. Nothing is left there."""
    with tempfile.TemporaryFile(dir=directory, prefix=".bsprof-") as probe:
        if size <= 0:
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(probe.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        if shutil.disk_usage(directory).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- files and their faults -------------------------------------------------------------------------


def to_json(value: Any) -> bytes:
    """Return `value` as JSON; what is not text in it (a file's name, a message that quotes one) comes out escaped."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        # Names of files need not be text. A failure that names one must be kept all the same.
        return msgspec.json.encode(_escaped(msgspec.to_builtins(value)))


def _escaped(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_escaped(key): _escaped(item) for key, item in value.items()}
        case list() | tuple():
            return [_escaped(item) for item in value]
    return value


def _read(path: Path) -> bytes:
    """Return the bytes of the file, unzipped where they are zipped."""
    with _named(path):
        if stat.S_ISDIR(path.stat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read()
        except EOFError:
            raise BsprofError(f"{path}: truncated: the gzip stream ends early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise BsprofError(f"{path}: damaged gzip stream: {_lowered(str(error))}") from None
    if not content or content.isspace():
        raise BsprofError(f"{path}: empty")
    return content


_HINTS = {
    errno.ENOSPC: "free some space, or write elsewhere with --output",
    errno.EDQUOT: "free some of your quota, or write elsewhere with --output",
    errno.EACCES: "check its permissions, or write elsewhere with --output",
    errno.EROFS: "write elsewhere with --output",
    errno.ENOENT: "check the path",
}


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name `path`."""
    try:
        yield
    except OSError as error:
        reason = _lowered(error.strerror or str(error))
        if error.errno == errno.ENOENT and not path.parent.exists():
            reason = f"there is no directory {path.parent}"
        raise BsprofError(f"{path}: {reason}", hint=_HINTS.get(error.errno or 0)) from error


@contextlib.contextmanager
def _explained(file: Path | str, text: bytes, *, is_plan: bool = False) -> Iterator[None]:
    """Turn what the decoders say about `text` into errors of one line: file, place, what is wrong there."""
    try:
        yield
    except msgspec.ValidationError as error:
        place, what = _place_and_fault(str(error))
        if not is_plan:
            raise BsprofError(f"{file}: {place}: {what}") from None
        if what.startswith("unknown") and re.search(r"\.(axes|blocks\[\d+\])\.[^.]*$", place):
            what = "unknown axis"
        line = _line_of(place, text)
        raise BsprofError(f"{file}: {place}: {what}{line}", hint=_plan_hint(place, what) or _A_PLAN) from None
    except msgspec.DecodeError as error:
        raise BsprofError(f"{file}: {_syntax_fault(str(error), text)}", hint=_A_PLAN if is_plan else None) from None
    except tomllib.TOMLDecodeError as error:
        what, _, where = str(error).rstrip(")").rpartition(" (at ")
        raise BsprofError(f"{file}: {where}: {_lowered(what)}", hint=_A_PLAN) from None
    except UnicodeDecodeError:
        raise BsprofError(f"{file}: not UTF-8 text") from None
    except ValueError as error:  # a key twice, or an integer of thousands of digits
        raise BsprofError(f"{file}: {_lowered(str(error).partition(';')[0])}") from None
    except RecursionError:
        raise BsprofError(f"{file}: nested too deeply") from None


def _place_and_fault(message: str) -> tuple[str, str]:
    """Return where in the file, and what, from a message such as: Expected `int`, got `str` - at `$.plan.seed`."""
    what, _, place = message.rpartition(" - at ")
    what, place = (what or place).replace("`", ""), place.strip("`") if what else "$"
    if field := re.fullmatch(r"Object contains unknown field (.*)", what, re.DOTALL):
        return f"{place}.{' '.join(field[1].split())}", "unknown field"
    if field := re.fullmatch(r"Object missing required field (.*)", what):
        return f"{place}.{field[1]}", "missing"
    return place, _lowered(" ".join(what.replace("Invalid enum value", "invalid value").split()))


def _syntax_fault(message: str, text: bytes) -> str:
    """Return what is wrong, and where, from a message such as: JSON is malformed: invalid character (byte 6)."""
    what, _, offset = message.removeprefix("JSON is malformed: ").rstrip(")").partition(" (byte ")
    at = int(offset) if offset else len(text)
    if "truncated" in what or (what == "invalid number" and at >= len(text)):
        return f"truncated: the JSON ends early, at {_line_and_column(text, len(text))}"
    if what == "trailing characters":
        at -= 1  # msgspec points behind the first of them
    return f"not JSON: {_lowered(what)} at {_line_and_column(text, at)}"


def _line_and_column(text: bytes, offset: int) -> str:
    before = text[:offset].decode(errors="replace")
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
