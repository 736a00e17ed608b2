"""`bsprof bench`: from flags to a saved result."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import shlex
import socket
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.control import Control

from bsprof import ceilings, store
from bsprof.compare import environment_differences
from bsprof.errors import BsprofError, Exit
from bsprof.model import AXES, Case, Environment, Measurement, Plan, Result
from bsprof.report import largest as report_largest
from bsprof.report import terminal
from bsprof.report.progress import Progress
from bsprof.sweep.interruption import Interruption
from bsprof.sweep.largest import Searched, search
from bsprof.sweep.nodes import Party, find_party, follow, leading
from bsprof.sweep.plan import (
    Expansion,
    convert_flags,
    expand,
    expected_s,
    make_plan,
    parse_values,
    refuse_undecodable,
    worlds,
)
from bsprof.sweep.runner import UNFINISHED, ProcessExecutor, Swept, check_names, describe_environment, prepare, sweep

RESERVE_BYTES_PER_CASE = 200_000
"""Room that a case's samples may take on disk; reserved before measuring, so that a full disk is known then."""

TRIES = 15
"""Cases that a search for the largest batch may take, for that reserve."""


class Request(NamedTuple):
    """What the command line asks for; `flags` by parameter name, None where not given."""

    plan_file: Path | None
    quick: bool
    resume: Path | None
    output: str | None
    trace: Path | None
    flags: Mapping[str, Any]


def run(request: Request, *, dry_run: bool, version: str) -> int:
    """Do what `request` asks and return the exit code."""
    started = time.monotonic()
    check_output(request.output)
    axes = {
        name: parse_values(axis, request.flags[name], "--" + name.replace("_", "-"))
        for name, axis in AXES.items()
        if request.flags.get(name) is not None and (name, request.flags[name]) != ("world_size", "auto")
    }
    if request.flags["max_batch"] and "batch_size" in axes:
        raise BsprofError("--batch-size and --max-batch: the one gives what the other searches", hint="leave out one")
    stop, rest = _plan_flags(request.flags)
    party = find_party(request.flags["nnodes"], request.flags["rdzv_endpoint"], os.environ)
    if party and not party.leads:
        if not dry_run:
            _follow(party, rest.get("deadline_s", Plan().deadline_s))
        return Exit.DONE
    with contextlib.ExitStack() as stack:
        if not dry_run:
            stack.enter_context(leading(party))
        past = _Past.read(request.resume) if request.resume else None
        if past and past.journal:
            stack.enter_context(past.journal)  # what is refused below leaves it to others
        return _lead(request, past, axes, stop, rest, party, started, dry_run=dry_run)


def _follow(party: Party, patience_s: float) -> None:
    if patience_s <= 0:
        raise BsprofError(f"--deadline: expected more than 0, got {patience_s:g}", hint="see `bsprof bench --help`")
    if not party.launched:
        followed = f"following node 0 at {party.endpoint}: the result is written there"
        terminal.console(stderr=True).print(followed, highlight=False, markup=False, soft_wrap=True)
    with Interruption("\ninterrupted at once\n") as stop:
        follow(party, patience_s, stop)


def _lead(
    request: Request,
    past: _Past | None,
    axes: dict[str, tuple[Any, ...]],
    stop: Mapping[str, Any],
    rest: dict[str, Any],
    party: Party | None,
    started: float,
    *,
    dry_run: bool,
) -> int:
    """Sweep, alone or as node 0."""
    notices = terminal.console(stderr=True)
    from_file = store.read_plan(request.plan_file) if request.plan_file else None
    auto = request.flags.get("world_size") == "auto"
    if from_file and (axes or auto or request.quick):
        flag = "--" + next(iter(axes), "world_size" if auto else "quick").replace("_", "-")
        raise BsprofError(f"{flag}: the axes are the plan's", hint=f"change them in {request.plan_file}")
    margin = request.flags["max_batch_margin"]
    if margin is not None and not (request.flags["max_batch"] or (from_file and from_file.largest_batch)):
        raise BsprofError("--max-batch-margin: there is no search to have a margin", hint="add --max-batch")
    if past and request.output not in (None, "-"):
        raise BsprofError(
            f"--output {request.output}: a resumed sweep stays in {past.target}", hint="leave it out, and copy the file"
        )
    with notices.status("starting") if notices.is_terminal else contextlib.nullcontext():
        environment = describe_environment()
    if party and not past:
        rest["nodes"] = party.nodes
    if auto or not (from_file or past):
        axes |= world_sizes(request.flags.get("world_size"), party, environment)
    plan = _plan(axes, from_file, past, environment, quick=request.quick, stop=stop, rest=rest)
    expansion = _expand(plan, environment, request.plan_file)
    _refuse_other_party(plan, expansion, party)
    if party and party.note:
        expansion.notes.append(party.note)
    for note in expansion.notes:
        notices.print(f"note: {note.text}", highlight=False)
    settings = [case.settings for case in expansion.cases if case.settings]
    if request.trace:
        result = past.target if past else Path(request.output or "-")
        folders = _check_trace(request.trace, plan, expansion.cases, result)
        if not dry_run:
            _make_folders(request.trace, folders)
    if dry_run:
        check_names(settings, plan)
        if plan.largest_batch:
            report_largest.render_searches(expansion.cases, plan, plan.largest_batch, terminal.console())
            return Exit.DONE
        left = _left(expansion.cases, past.finished() if past else [])
        terminal.render_cases(left, f"at most {expected_s(plan, left):.0f} s", terminal.console())
        return Exit.DONE
    with notices.status("preparing the data") if notices.is_terminal else contextlib.nullcontext():
        prepare(settings, plan)
    return _measure(request, plan, environment, expansion, past, started, party)


def world_sizes(asked: str | None, party: Party | None, environment: Environment) -> dict[str, tuple[int, ...]]:
    """Return the axis `world_size` of a launcher, of `auto`, or of a rank for each device of several nodes.

    It is empty where the axis has its values, or its default. Raises BsprofError for others than the launcher's.
    """
    if party and party.world_size is not None:
        if asked not in (None, "auto", str(party.world_size)):
            raise BsprofError(
                f"--world-size {asked}: torchrun has started {party.world_size} ranks",
                hint="leave it out: torchrun's --nproc-per-node says how many",
            )
        return {"world_size": (party.world_size,)}
    nodes = party.nodes if party else 1
    if asked == "auto":
        return {"world_size": worlds(environment, nodes)}
    if asked is None and party:
        return {"world_size": (nodes * max(1, len(environment.accelerators)),)}
    return {}


def _refuse_other_party(plan: Plan, expansion: Expansion, party: Party | None) -> None:
    """Raise BsprofError where a plan is for other machines, or other ranks, than there are."""
    nodes = party.nodes if party else 1
    if plan.nodes != nodes:
        several = f"on each of them: --nnodes {plan.nodes} --rdzv-endpoint HOST"
        raise BsprofError(
            f"--nnodes: the plan is for {plan.nodes} nodes, not {nodes}",
            hint=several if plan.nodes > 1 else "leave --nnodes out",
        )
    sizes = {case.settings.world_size for case in expansion.cases if case.settings}
    if party and party.world_size is not None and (others := sorted(sizes - {party.world_size})):
        raise BsprofError(
            f"world_size: {others[0]} ranks are planned, but torchrun has started {party.world_size}",
            hint="give torchrun another --nproc-per-node, or plan for as many",
        )


def _expand(plan: Plan, environment: Environment, file: Path | None) -> Expansion:
    try:
        return expand(plan, environment)
    except BsprofError as error:
        if file:
            raise BsprofError(f"{file}: {error.message}", hint=error.hint) from error
        raise


def _measure(
    request: Request,
    plan: Plan,
    environment: Environment,
    expansion: Expansion,
    past: _Past | None,
    started: float,
    party: Party | None,
) -> int:
    created = past.created if past else datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = store.Header(created=created, plan=plan, environment=environment)
    reserve = len(expansion.cases) * RESERVE_BYTES_PER_CASE * (TRIES if plan.largest_batch else 1)
    target, journal = past.reopen(header, reserve) if past else _open_journal(request.output, header, reserve)
    notices = terminal.console(stderr=True)
    done = past.finished() if past else []
    with journal, Interruption(_farewell(target, notices)) as stop:
        swept, largest_batches = _sweep(plan, expansion, done, journal, stop, notices, request.trace, party)
        result = Result(
            created=created,
            plan=plan,
            environment=environment,
            measurements=swept.measurements,
            largest_batches=largest_batches,
            ceilings=ceilings.cached(environment),
            wall_s=None if past else time.monotonic() - started,
            notes=tuple(expansion.notes),
        )
        failure = _keep(result, request.output, target, journal, unfinished=swept.interrupted or bool(swept.failure))
        failure = failure or swept.failure
        try:
            terminal.render(result, terminal.console(stderr=request.output == "-"))
        except BrokenPipeError:
            raise
        except OSError as error:
            failure = failure or BsprofError(f"standard output: {error.strerror}")
        if failure:
            raise _with_way_out(failure, target)
    if target.exists():
        notices.print(f"\nsaved {target}", highlight=False, soft_wrap=True)
    if swept.interrupted and plan.largest_batch:
        left = sum(not found.complete for found in largest_batches)
        return _interrupted(f"{left} of {len(largest_batches)} searches", "finish", target, notices)
    return _exit_code(swept, target, notices)


def _sweep(
    plan: Plan,
    expansion: Expansion,
    done: list[Measurement],
    journal: store.Journal,
    stop: Interruption,
    notices: Console,
    trace: Path | None,
    party: Party | None,
) -> Searched:
    """Measure every case, or search the largest batch for each; nothing is found where nothing is searched."""
    executor = ProcessExecutor(stop, trace=_trace_places(trace, expansion.cases), party=party)
    if plan.largest_batch:
        varying = [name for name in AXES if name in (*expansion.varying, "batch_size")]
        with Progress(notices, None, varying, 0.0) as progress:
            return search(expansion.cases, plan, executor, journal, progress, stop, done)
    left = _left(expansion.cases, done)
    with Progress(notices, len(left), expansion.varying, expected_s(plan, left), plan.stop.precision) as progress:
        return Searched(sweep(expansion.cases, plan, executor, journal, progress, stop, done), [])


def _left(cases: Sequence[Case], done: Sequence[Measurement]) -> list[Case]:
    """Return the cases that are not among `done`."""
    finished = {(one.case.key, one.case.process) for one in done}
    return [case for case in cases if (case.key, case.process) not in finished]


def _farewell(target: Path, notices: Console) -> str:
    """Return what to say when there is no time for more: on a terminal its cursor must come back as well."""
    cursor = str(Control.show_cursor(True)) if notices.is_terminal else ""
    return f"{cursor}\ninterrupted at once; to measure the rest:\n  bsprof bench --resume {_quoted(target)}\n"


def _with_way_out(failure: BsprofError, target: Path) -> BsprofError:
    """Return `failure` with what it could not destroy, and how to go on from there."""
    place = next((path for path in (_journal_path(target), target) if path.exists()), None)
    if place is None:
        return failure
    return BsprofError(
        failure.message, hint=f"what was measured is in {place}; go on with: bsprof bench --resume {_quoted(target)}"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _keep(
    result: Result, output: str | None, target: Path, journal: store.Journal, *, unfinished: bool
) -> BsprofError | None:
    """Write the result where it belongs, before anything else can fail; the journal goes when that is done.

    Returns the error that prevented it: the table is still worth printing.
    """
    try:
        if output == "-":
            terminal.print_json(result)
        if output != "-" or unfinished:
            store.save(result, target)
        journal.discard()
    except BsprofError as error:
        return error
    except OSError as error:
        return BsprofError(f"standard output: {error.strerror}")
    return None


def _exit_code(swept: Swept, target: Path, notices: Console) -> int:
    if swept.interrupted:
        left = sum(m.outcome.kind in UNFINISHED for m in swept.measurements)
        return _interrupted(f"{left} of {len(swept.measurements)} cases", "measure", target, notices)
    if not any(m.outcome.kind == "ok" for m in swept.measurements):
        return Exit.USAGE
    return Exit.DONE


def _interrupted(left: str, verb: str, target: Path, notices: Console) -> int:
    notices.print(
        f"interrupted with {left} left; to {verb} the rest:\n  bsprof bench --resume {_quoted(target)}",
        highlight=False,
        soft_wrap=True,
    )
    return Exit.INTERRUPTED


def _plan(
    axes: Mapping[str, tuple[Any, ...]],
    from_file: Plan | None,
    past: _Past | None,
    environment: Environment,
    *,
    quick: bool,
    stop: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> Plan:
    """Return the plan: of the flags, of a file with the flags that are no axes on top, or of the sweep to resume."""
    if past:
        _refuse_other_machine(past, environment)
        if not (axes or from_file or stop or rest or quick):
            return past.plan
    if from_file:
        plan = convert_flags(
            {
                **msgspec.to_builtins(from_file),
                **rest,
                "stop": {**msgspec.to_builtins(from_file.stop), **stop},
                "largest_batch": _search_of(from_file, rest),
            }
        )
    else:
        plan = make_plan(axes, environment, quick=quick, stop=stop, **rest)
    if past and plan != past.plan:
        raise BsprofError(
            f"--resume {past.path}: these flags make another plan than the one being resumed",
            hint="leave them out: the plan is in the file",
        )
    return plan


def _search_of(from_file: Plan, rest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the search of a plan file with the flags that change it on top."""
    asked = rest.get("largest_batch")
    if from_file.largest_batch is None:
        return asked
    return {**msgspec.to_builtins(from_file.largest_batch), **(asked or {})}


_PLAN_FLAGS = (
    *("repeat", "seed", "order", "malloc", "download", "scaling", "max_failures"),
    *("serialised_steps", "profile_steps", "telemetry_hz", "nvtx"),
)
"""Flags that are called like their field in a plan."""

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _plan_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the given flags as fields of Stop and of Plan."""
    for flag in ("precision", "max_case_time", "deadline", "telemetry_hz", "max_batch_margin"):
        if flags[flag] is not None and not math.isfinite(flags[flag]):
            raise BsprofError(f"--{flag.replace('_', '-')}: {flags[flag]} is no finite number", hint="give a number")
    stop = {
        field: flags[flag]
        for flag, field in (("precision", "precision"), ("max_case_time", "max_case_time_s"))
        if flags[flag] is not None
    }
    plan = {name: flags[name] for name in _PLAN_FLAGS if flags[name] is not None}
    if flags["deadline"] is not None:
        plan["deadline_s"] = flags["deadline"]
    if flags["data_root"] is not None:
        refuse_undecodable(flags["data_root"], "--data-root")
        plan["data_root"] = str(Path(flags["data_root"]).resolve())
    if flags["host_memory"] is not None:
        plan["host_memory_bytes"] = _bytes(flags["host_memory"])
    if flags["diagnose"]:
        plan["diagnose"] = "full"
    if flags["max_batch"] or flags["max_batch_margin"] is not None:
        margin = flags["max_batch_margin"]
        plan["largest_batch"] = {} if margin is None else {"margin": margin}
    return stop, plan


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", size.strip().lower())
    if not match:
        raise BsprofError(f"--host-memory: {size!r} is no size", hint="for example --host-memory 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _journal_path(target: Path) -> Path:
    """Return the journal's place: beside the file that will be written, which a symbolic link only points to."""
    target = target.resolve() if target.is_symlink() else target
    return target.with_name(target.name + ".journal")


def _open_journal(output: str | None, header: store.Header, reserve: int) -> tuple[Path, store.Journal]:
    """Create the journal beside the result, and so learn before measuring whether it can be written there."""
    if output and output != "-":
        target = Path(output)
        return target, store.Journal.create(_journal_path(target), header, reserve_bytes=reserve)
    try:
        return _open_named_by_time(Path(), header, reserve)
    except BsprofError:
        if output != "-":
            raise
        # The result goes to standard output, so any place will do for the journal.
        return _open_named_by_time(Path(tempfile.gettempdir()), header, reserve)


def _open_named_by_time(directory: Path, header: store.Header, reserve: int) -> tuple[Path, store.Journal]:
    stem = f"bsprof-{socket.gethostname()}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        target = directory / f"{stem}{suffix}.json"
        if target.exists() or _journal_path(target).exists():
            continue
        try:
            return target, store.Journal.create(_journal_path(target), header, reserve_bytes=reserve)
        except BsprofError:
            # Another bsprof that started in the same second may have been quicker.
            if not _journal_path(target).exists():
                raise
    raise BsprofError(f"{stem}.json: a hundred results of this second exist", hint="name one with --output")


def _trace_places(trace: Path | None, cases: Sequence[Case]) -> dict[Case, Path]:
    """Return where each case's trace goes: the one file that was named, or a file for each case in a folder."""
    if trace is None:
        return {}
    if trace.name.endswith((".json", ".json.gz")):
        if len(cases) > 1:
            raise BsprofError(f"--trace {trace}: {len(cases)} cases, one file", hint="name a folder")
        return {case: trace.absolute() for case in cases}
    folder = trace.absolute()
    return {case: folder / f"trace-{case.key}-{case.process}.json.gz" for case in cases}


def _check_trace(trace: Path, plan: Plan, cases: Sequence[Case], result: Path) -> set[Path]:
    """Refuse a bad `--trace` before anything is measured, and return the folders that it needs."""
    if plan.largest_batch:
        raise BsprofError("--trace: a search for the largest batch profiles nothing", hint="leave --trace out")
    places = set(_trace_places(trace, cases).values())
    if not plan.profile_steps:
        raise BsprofError("--trace: there is no trace without --profile-steps", hint="leave --profile-steps out")
    try:
        if any(place.is_dir() for place in places):
            raise BsprofError(f"--trace {trace}: is a folder", hint="name a file in it")
    except OSError as error:
        raise BsprofError(f"--trace {trace}: {error.strerror}", hint="name another place") from error
    if os.path.realpath(result) in {os.path.realpath(place) for place in places}:
        raise BsprofError(f"--trace {trace}: is where the result goes", hint="name another file")
    return {place.parent for place in places}


def _make_folders(trace: Path, folders: set[Path]) -> None:
    """Make the folders of the traces, and learn whether files can be written there."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except (FileExistsError, NotADirectoryError) as error:
            raise BsprofError(f"--trace {trace}: {folder} is no folder", hint="name another place") from error
        except OSError as error:
            raise BsprofError(f"--trace {trace}: {folder}: {error.strerror}", hint="name another place") from error


def check_output(output: str | None) -> None:
    """Refuse a bad `--output` before anything is started."""
    if output is None or output == "-":
        return
    if not output.endswith((".json", ".json.gz")):
        raise BsprofError(f"--output {output}: expected .json or .json.gz", hint="or - for standard output")
    try:
        mode = Path(output).stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise BsprofError(f"--output {output}: {error.strerror}", hint="name another file") from error
    if stat.S_ISDIR(mode):
        raise BsprofError(f"--output {output}: is a directory", hint="name a file in it")
    if not stat.S_ISREG(mode):
        raise BsprofError(f"--output {output}: not a regular file", hint="or - for standard output")


class _Past(NamedTuple):
    """What a sweep that ended early has left: a journal after a crash, a result after Ctrl-C."""

    path: Path
    target: Path
    created: str
    plan: Plan
    environment: Environment
    measurements: list[Measurement]
    journal: store.Journal | None

    @classmethod
    def read(cls, path: Path) -> _Past:
        """Read what lies at `path`, or in the journal beside it."""
        if path.is_dir():
            raise BsprofError(f"--resume {path}: is a directory", hint="name the result file in it")
        target = path.with_name(path.name.removesuffix(".journal"))
        if _journal_path(target).exists():
            journal = store.Journal.resume(_journal_path(target))
            header = journal.header
            return cls(path, target, header.created, header.plan, header.environment, journal.measurements, journal)
        result = store.load(target)
        if result.plan is None:
            raise BsprofError(
                f"--resume {path}: holds no plan", hint="only the results of `bsprof bench` can be resumed"
            )
        return cls(path, target, result.created, result.plan, result.environment, result.measurements, None)

    def finished(self) -> list[Measurement]:
        """Return the cases that need not be measured again."""
        return [m for m in self.measurements if m.outcome.kind not in UNFINISHED]

    def reopen(self, header: store.Header, reserve: int) -> tuple[Path, store.Journal]:
        """Return the result's path and the journal to go on with; a saved result becomes a journal again."""
        if self.journal:
            return self.target, self.journal
        journal = store.Journal.create(_journal_path(self.target), header, reserve_bytes=reserve)
        for measurement in self.finished():
            journal.append(measurement)
        return self.target, journal


def _refuse_other_machine(past: _Past, environment: Environment) -> None:
    differences = environment_differences(past.environment, environment)
    if differences:
        raise BsprofError(
            f"--resume {past.path}: was measured elsewhere: {'; '.join(map(str, differences))}",
            hint="measure anew, or resume where it was measured",
        )
