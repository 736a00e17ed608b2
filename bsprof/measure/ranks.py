"""The ranks of a case: started by torch's elastic launcher, they meet at a store, and what they say is put together.

The store (a TCPStore in the process that was asked) outlives every rank, so that what a rank said is known even when
another one has died. It carries the question to ranks on other machines as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import ipaddress
import math
import multiprocessing
import os
import platform
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bsprof import store as results
from bsprof.errors import BsprofError
from bsprof.measure import forks, roll, world
from bsprof.measure.case import CaseRun, Emit, data_request, throttled
from bsprof.measure.clock import host_clock, present_device
from bsprof.measure.failures import classify
from bsprof.measure.roll import LOOPBACK, POLL_S, Meeting, Stopped, connect
from bsprof.model import Case, Communication, Measurement, Outcome, Plan, Profile, Rank, Telemetry
from bsprof.noun import Note
from bsprof.workloads import registry

PRELOAD = ("bsprof.measure.ranks",)
"""Imported once by the fork server of a process that has not forked it from itself: ranks need not each load torch."""

LAST_S = 10.0
"""So long before a case's deadline its ranks are asked where they hang, or a fifth of the deadline if that is less."""

LOST_S = 3.0
"""A rank that has lost another waits so long before it says so: the one that is the cause is to be heard first."""


STACKS_S = 3.0
"""Node 0 waits so long for where the ranks of the others hang."""


class Answer(msgspec.Struct):
    """What one rank has measured, or how it failed."""

    rank: Rank
    measurement: Measurement
    communication: Communication | None = None
    lost: bool = False
    """Whether it failed because another one was gone."""


# --- the process that was asked ---------------------------------------------------------------------


def measure(
    case: Case, plan: Plan, *, cache: Path, requested_ns: int, emit: Emit, trace: Path | None, meeting: Meeting
) -> Measurement:
    """Measure `case` in `world_size` ranks and return what came of all of them; a failure is an outcome.

    `requested_ns` is the parent's reading of the host clock when it asked for this process.
    """
    entered_ns = host_clock()
    assert case.settings is not None
    size = case.settings.world_size
    question = {"case": case, "plan": plan, "cache": str(cache), "trace": str(trace) if trace else None}
    forked = _forked(meeting)
    with _hosted(meeting, size) as shared, _called(shared) as others:
        shared.store.set("question", results.to_json(question).decode())
        roll.announce(shared.meeting)
        end = requested_ns / 1e9 + plan.deadline_s - min(LAST_S, plan.deadline_s / 5)
        emit("joining", 0, None)
        if absence := others.gather(end - host_clock() / 1e9):
            return Measurement(case=case, outcome=absence, wall_s=0.0, inside_s=(host_clock() - entered_ns) / 1e9)
        with _Lookout(shared, end, emit) as lookout:
            stopped = _run_share(shared, _task(shared, requested_ns, entered_ns), forked, end, leads=True)
        answers, exit_codes = _settle(shared, others, stopped)
        cause = others.loss(size) or lookout.hung(plan.deadline_s)
    measurement = put_together(case, answers, exit_codes, stopped.failure, cause)
    inside_s = (host_clock() - entered_ns) / 1e9
    return msgspec.structs.replace(measurement, inside_s=inside_s)


class _Shared(NamedTuple):
    """A case's store with its place, and what the ranks of this process name as their owner."""

    store: Store
    meeting: Meeting
    size: int
    """Ranks in all."""
    owner: str

    def another(self) -> _Shared:
        """Return a connection of one's own: a client that waits lets nobody else ask through it."""
        return self._replace(store=connect(self.meeting))

    def said(self) -> dict[int, bytes]:
        """Return what ranks have said by now, by rank."""
        return {rank: self.store.get(f"said/{rank}") for rank in range(self.size) if self.store.check([f"said/{rank}"])}

    def answers(self) -> dict[int, Answer]:
        """Return the answers of the ranks of a case, as far as there are."""
        read = {rank: zlib.decompress(said) for rank, said in self.said().items()}
        return {rank: msgspec.json.decode(answer, type=Answer) for rank, answer in read.items()}


@contextlib.contextmanager
def _hosted(meeting: Meeting, size: int) -> Iterator[_Shared]:
    with roll.hosted(meeting) as here:
        yield _Shared(connect(here), here, size, uuid.uuid4().hex)


def _called(shared: _Shared) -> roll.Roll:
    """Return the list of the other nodes; as soon as one of them is gone it ends our ranks, which would wait for it."""
    return roll.Roll(shared.meeting, lambda store: _kill(_own_ranks(shared._replace(store=store)).values()))


def _settle(shared: _Shared, others: roll.Roll, stopped: Stopped) -> tuple[dict[int, Answer], dict[int, int]]:
    """Return what all ranks have said, and the exit codes of those that died, on all nodes.

    Where ranks have failed here, and all that is known is that they have lost another, it waits for the other nodes
    to tell why, or to be gone.
    """
    end = time.monotonic() + 2 * roll.GONE_S
    while True:
        answers, exit_codes = shared.answers(), dict(stopped.exit_codes)
        for other in others.told().values():
            exit_codes |= other.exit_codes
        known = any(rank not in answers for rank in exit_codes) or any(
            one.measurement.outcome.kind != "ok" and not one.lost for one in answers.values()
        )
        if known or len(answers) == shared.size or others.all_accounted_for() or time.monotonic() > end:
            return answers, exit_codes
        time.sleep(POLL_S)


def follow(meeting: Meeting, seen: str, patience_s: float, *, cache: Path, emit: Emit) -> str:
    """Bring ranks to the case that node 0 measures next; `seen` is the one before.

    Returns `over`, or `end` after the last case, or `silent` where node 0 was not there for `patience_s`. `emit` is
    called with the case's name, about once a second while node 0 is heard. Raises BsprofError where node 0 measures
    with another number of nodes.
    """
    forked = _forked(meeting)
    name = roll.next_case(meeting, seen, patience_s, emit)
    if name in (None, roll.END):
        return roll.END if name else "silent"
    emit(name, 0, None)
    entered_ns = host_clock()
    try:
        return _follow(msgspec.structs.replace(meeting, name=name), entered_ns, cache, emit, forked)
    except RuntimeError:  # node 0 has gone on without us
        return "over"


def _follow(meeting: Meeting, entered_ns: int, cache: Path, emit: Emit, forked: _Forked | None) -> str:
    store = connect(meeting)
    if not store.check(["question"]):  # it is over, and the store at that place is the next one's
        return "over"
    asked = msgspec.json.decode(store.get("question"), type=_Question)
    settings, plan = asked.case.settings, asked.plan
    assert settings is not None
    if not meeting.launched and plan.nodes != meeting.nodes:
        raise BsprofError(
            f"--nnodes {meeting.nodes}: node 0 measures with {plan.nodes}", hint="give the same on every node"
        )
    shared = _Shared(store, meeting, settings.world_size, uuid.uuid4().hex)
    seat = roll.Seat.take(meeting, shared.owner, _end_all, emit)
    if seat is None:
        return "over"
    with seat:
        with contextlib.suppress(Exception):  # the ranks fail of the same, and say so
            registry.prepare_data(settings.data, data_request(settings, plan, cache))
        seat.ready()
        with _Lookout(shared, math.inf, lambda *_: None):
            task = _task(shared, entered_ns, entered_ns, cache=str(cache))
            stopped = _run_share(shared, task, forked, entered_ns / 1e9 + plan.deadline_s, leads=False)
        seat.tell(stopped)
    return "over"


def _end_all() -> None:
    """End this process and all that it has started: its case is over, and its ranks wait for others in vain."""
    os.killpg(0, signal.SIGKILL)


# --- starting ranks ---------------------------------------------------------------------------------


def _task(shared: _Shared, requested_ns: int, entered_ns: int, *, cache: str | None = None) -> Task:
    meeting = shared.meeting
    local = _own_address(meeting.host, meeting.port)
    return Task(meeting, local, shared.owner, requested_ns, entered_ns, cache)


def _run_share(shared: _Shared, task: Task, forked: _Forked | None, end: float, *, leads: bool) -> Stopped:
    """Run the ranks that this process brings to their end; they must have met before `end`, by the host clock."""
    if forked:
        return forked.run(task)
    patience_s = max(1, int(end - host_clock() / 1e9))
    return _launch(task, shared.size // task.meeting.nodes, patience_s, enter, leads=leads)


def _launch(task: Task, here: int, patience_s: int, entry: Callable[..., None], *given: object, leads: bool) -> Stopped:
    """Run `entry` with the task, and what else is given, in so many ranks here, and in as many on each other node."""
    forkserver.set_forkserver_preload(list(PRELOAD))
    meeting = task.meeting
    config = LaunchConfig(
        min_nodes=meeting.nodes,
        max_nodes=meeting.nodes,
        nproc_per_node=here,
        run_id=meeting.name,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs={
            "is_host": False,
            "timeout": patience_s,
            "join_timeout": patience_s,
            # By default a machine whose clock is 15 s behind ours would be taken for dead. The roll knows who is gone.
            "keep_alive_max_attempt": 1_000_000,
        },
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
        # torch numbers nodes in the order of these names, and rank 0 belongs on node 0: its name is the one that the
        # others know, theirs sort behind any host's.
        local_addr=meeting.host if leads else f"~{task.local}",
    )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    try:
        elastic_launch(config, entry)(task, *given)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return Stopped(codes, "a rank failed")
    except (RendezvousError, dist.DistError, TimeoutError, RuntimeError) as error:
        return Stopped({}, f"{type(error).__name__}: {error}".strip().splitlines()[0])
    return Stopped({})


class _Forked(NamedTuple):
    """A rank that waits for its task: forked while this process had no threads yet."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection

    def run(self, task: Task) -> Stopped:
        """Run it to its end."""
        self.pipe.send(task)
        self.process.join()
        code = self.process.exitcode
        return Stopped({Place.of_environment().rank: code}, "a rank failed") if code else Stopped({})


def _forked(meeting: Meeting) -> _Forked | None:
    """Fork what ranks come from while this process has no threads yet: the one of a launcher, or a server for all."""
    if not meeting.launched:
        forks.serve()
        return None
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_enter_when_told, args=(theirs,))
    process.start()
    return _Forked(process, ours)


def _enter_when_told(pipe: Connection) -> None:
    enter(pipe.recv())


def _own_address(host: str, port: int) -> str:
    """Return the address by which this machine reaches `host`: names need not resolve the same everywhere."""
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    return LOOPBACK


class _Lookout:
    """Passes on where rank 0 is, and shortly before the deadline finds out where each rank of this machine hangs."""

    def __init__(self, shared: _Shared, end: float, emit: Emit) -> None:
        self._shared, self._end, self._emit = shared, end, emit
        self._done = threading.Event()
        self._places: dict[int, str] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Lookout:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()

    def hung(self, deadline_s: float) -> Outcome | None:
        """Return the outcome of ranks that were ended because time was up, or None."""
        return hanging(self._places, deadline_s) if self._places else None

    def _look(self) -> None:
        shared, last = self._shared.another(), b""
        while not self._done.wait(POLL_S):
            with contextlib.suppress(dist.DistError, RuntimeError):
                if shared.store.check(["progress"]) and (told := shared.store.get("progress")) != last:
                    last = told
                    self._emit(*msgspec.json.decode(told, type=tuple[str, int, float | None]))
                if host_clock() / 1e9 > self._end or shared.store.check(["hanging"]):
                    self._places = self._ask(shared)
                    return

    def _ask(self, shared: _Shared) -> dict[int, str]:
        """Return the stack of each rank that has one, and end those of this process."""
        shared.store.set("hanging", "")  # other nodes ask theirs as well
        pids = _own_ranks(shared)
        for pid in pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(2 * POLL_S)
        for rank in pids:
            with contextlib.suppress(OSError):
                shared.store.set(f"stack/{rank}", _stack_file(rank).read_text())
        end = time.monotonic() + (STACKS_S if shared.meeting.nodes > 1 else 2 * POLL_S)
        came = roll.registered(shared.store, shared.size)
        while True:
            known = [rank for rank in came if shared.store.check([f"stack/{rank}"])]
            if len(known) == len(came) or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        stacks = {rank: shared.store.get(f"stack/{rank}").decode() for rank in known}
        _kill(pids.values())
        return stacks


def _own_ranks(shared: _Shared) -> dict[int, int]:
    """Return the processes of the ranks that this process has brought and that still run."""
    known = roll.registered(shared.store, shared.size)
    return {rank: pid for rank, (owner, pid) in known.items() if owner == shared.owner and psutil.pid_exists(pid)}


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- what they said, put together -------------------------------------------------------------------


def put_together(
    case: Case,
    answers: Mapping[int, Answer],
    exit_codes: Mapping[int, int],
    failure: str | None,
    hung: Outcome | None,
) -> Measurement:
    """Return the Measurement of all ranks: figures of the slowest one, and the outcome of the one that failed first.

    `exit_codes` are those of ranks that ended badly, `failure` what the launcher said, `hung` the outcome where the
    ranks were ended at the deadline.
    """
    assert case.settings is not None
    size = case.settings.world_size
    ordered = [answers[rank] for rank in sorted(answers)]
    outcome = hung or _outcome(ordered, exit_codes, failure, size)
    if not ordered:
        return Measurement(case=case, outcome=outcome, wall_s=0.0)
    slowest = max(ordered, key=_mean_step_ns)
    top = slowest.measurement
    samples = top.samples and msgspec.structs.replace(top.samples, batch_size=size * case.settings.batch_size)
    return msgspec.structs.replace(
        top,
        case=case,
        outcome=outcome,
        samples=samples,
        telemetry=_of_all_devices(slowest, ordered),
        ranks=tuple(one.rank for one in ordered),
        communication=next((one.communication for one in ordered if one.communication), None),
        notes=tuple(_notes(ordered)),
    )


def _mean_step_ns(answer: Answer) -> float:
    samples = answer.measurement.samples
    return sum(samples.step_ns) / len(samples.step_ns) if samples and samples.step_ns else 0.0


def _of_all_devices(slowest: Answer, answers: Sequence[Answer]) -> Telemetry | None:
    """Return the slowest rank's telemetry with the energy of all ranks' devices; without, where one does not tell."""
    told = slowest.measurement.telemetry
    if told is None or told.energy is None:
        return told
    energies = [one.measurement.telemetry and one.measurement.telemetry.energy for one in answers]
    joules = [one.joules / one.steps for one in energies if one and one.resolvable and one.joules and one.steps]
    if len(joules) < len(answers):
        reason = told.energy.reason or "a rank's device does not tell its energy"
        energy = msgspec.structs.replace(told.energy, joules=None, resolvable=False, reason=reason)
    else:
        energy = msgspec.structs.replace(told.energy, joules=sum(joules) * told.energy.steps)
    return msgspec.structs.replace(told, energy=energy)


def _outcome(answers: Sequence[Answer], exit_codes: Mapping[int, int], failure: str | None, size: int) -> Outcome:
    """Return the outcome of the rank that is the cause: one that died, then one that failed, then one that lost it."""
    said = {one.rank.rank for one in answers}
    for rank, code in exit_codes.items():
        if rank not in said:
            return _death(rank, code)
    failed = [one for one in answers if one.measurement.outcome.kind != "ok"]
    for one in sorted(failed, key=lambda one: one.lost):
        return _of_rank(one.measurement.outcome, one.rank.rank)
    if failure is None and len(answers) == size:
        return Outcome(kind="ok")
    missing = [rank for rank in range(size) if rank not in said]
    named = f"nothing came from rank {', '.join(map(str, missing))}" if said else "no rank ever answered"
    return Outcome(kind="crash", message=f"{named}: {failure}" if failure else named, evidence={"ranks": len(said)})


def _death(rank: int, code: int) -> Outcome:
    killed = signal.Signals(-code).name if -code in set(signal.Signals) else None
    how = f"killed by {killed}" if killed else f"exited with code {code}"
    evidence: dict[str, int | float | str | None] = {"rank": rank, "signal": killed, "exit_code": code}
    return Outcome(kind="crash", message=f"rank {rank}: {how}", evidence=evidence)


def _of_rank(outcome: Outcome, rank: int) -> Outcome:
    message = f"rank {rank}: {outcome.message}" if outcome.message else f"rank {rank}"
    return msgspec.structs.replace(outcome, message=message, evidence={**outcome.evidence, "rank": rank})


def _notes(answers: Sequence[Answer]) -> Iterator[Note]:
    """Yield each kind of note once, and say which ranks it is of where it is not of all."""
    by_code: dict[str, dict[int, str]] = {}
    for one in answers:
        for note in one.measurement.notes:
            by_code.setdefault(note.code, {}).setdefault(one.rank.rank, note.text)
    for code, texts in by_code.items():
        whose = "" if len(texts) == len(answers) else f" (rank {', '.join(map(str, texts))})"
        yield Note(code=code, text=f"{next(iter(texts.values()))}{whose}")


# --- where they hang --------------------------------------------------------------------------------

_PHASES = {
    "fetch": "data",
    "transfer": "h2d",
    "forward": "forward",
    "forward_mixed": "forward",
    "backward": "backward",
    "backward_scaled": "backward",
    "update": "optimizer",
    "update_scaled": "optimizer",
}
_WAITING = ("backward", "agree", "settle", "communication")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)


def hanging(stacks: Mapping[int, str], deadline_s: float) -> Outcome:
    """Return the outcome of ranks that were still there at the deadline, from faulthandler's stack of each.

    A rank in `backward`, or one that asks for what all agree on, waits for the others; the cause is whoever does not.
    """
    places = {rank: _place(text) for rank, text in stacks.items()}
    causes = {rank: place for rank, place in places.items() if not place.waits} or places
    rank, place = next(iter(causes.items()))
    waiting = [str(other) for other in places if other not in causes]
    message = f"rank {', '.join(map(str, causes))} still in {place.stage} after {deadline_s:g} s ({place.where})"
    if waiting:
        message += f"; rank {', '.join(waiting)} {'wait' if len(waiting) > 1 else 'waits'} for it"
    return Outcome(
        kind="timeout",
        message=message,
        hint="raise --deadline, or make the case smaller",
        phase=place.stage,
        evidence={"deadline_s": deadline_s, "rank": rank, "stack": stacks[rank][-2000:]},
    )


class _Place(NamedTuple):
    stage: str
    where: str
    waits: bool


def _place(stack: str) -> _Place:
    """Read a stack, innermost frame first."""
    frames = list(_FRAME.finditer(stack))
    functions = {frame["function"] for frame in frames if frame["file"].endswith(("loop.py", "world.py", "case.py"))}
    stage = next((phase for name, phase in _PHASES.items() if name in functions), "start")
    inner = frames[0] if frames else None
    where = f"{Path(inner['file']).name}:{inner['line']} in {inner['function']}" if inner else "no stack"
    return _Place(stage, where, bool(functions & set(_WAITING)) or stage == "backward")


# --- in a rank --------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What a rank is told by the process that starts it."""

    meeting: Meeting
    local: str
    """This machine's address, as node 0 sees it."""
    owner: str
    """Names the process that starts it."""
    requested_ns: int
    entered_ns: int
    cache: str | None = None
    """This machine's folder for data, where it is not node 0's."""


def enter(task: Task) -> None:
    """Be a rank: join the others, measure, and say what came of it; ends the process where it failed."""
    place = Place.of_environment()
    faulthandler.register(signal.SIGUSR1, _stack_file(place.rank).open("w"), all_threads=False)
    store = connect(task.meeting)
    roll.register(store, place.rank, task.owner, os.getpid())
    take_device(place.local_rank)
    if not ipaddress.ip_address(task.local.partition("%")[0]).is_loopback:
        _talk_from(task.local)
    group = PrefixStore("group", connect(task.meeting)) if task.meeting.launched else None
    answer = measure_as(place, store, task.requested_ns, task.entered_ns, group=group, cache=task.cache)
    failed = answer.measurement.outcome.kind != "ok"
    _say(store, place.rank, zlib.compress(results.to_json(answer)), lost=answer.lost, failed=failed)


def _say(store: Store, rank: int, answer: bytes, *, lost: bool, failed: bool) -> None:
    """Give a rank's answer, and leave the group; where it has failed the launcher is to end the others."""
    if lost:
        time.sleep(LOST_S)
    roll.put(store, f"said/{rank}", answer)
    if failed:
        os._exit(1)
    dist.destroy_process_group()


class Place(NamedTuple):
    """Which of the ranks this process is."""

    rank: int
    local_rank: int
    local_size: int
    node: int

    @classmethod
    def of_environment(cls) -> Place:
        """Read what torch's launcher says."""
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        return cls(*(int(os.environ[name]) for name in names))


def measure_as(
    place: Place,
    store: Store,
    requested_ns: int,
    entered_ns: int,
    *,
    group: Store | None = None,
    cache: str | None = None,
) -> Answer:
    """Measure the case that the store asks about, as one rank of the group that the environment describes.

    The group is made by the store `group`, if one is given, else by torch's launcher's.
    """
    asked = msgspec.json.decode(store.get("question"), type=_Question)
    started_ns = host_clock()

    def emit(stage: str, steps: int, precision: float | None) -> None:
        if place.rank == 0:
            store.set("progress", msgspec.json.encode((stage, steps, precision)).decode())

    lost = False
    device = present_device()
    emit("joining", 0, None)
    assert asked.case.settings is not None
    if group is None:
        join(device, asked.plan.deadline_s)
    else:
        join(device, asked.plan.deadline_s, store=group, rank=place.rank, world_size=asked.case.settings.world_size)
    joined_ns = host_clock()
    ranks = world.Ranks(place.local_rank, place.local_size)
    trace = Path(asked.trace) if asked.trace and place.rank == 0 else None
    run = CaseRun(asked.case, asked.plan, Path(cache or asked.cache), throttled(emit), trace, world=ranks)
    with run.failing():
        try:
            run.go(requested_ns, joined_ns)
        except BaseException as error:
            lost = has_lost_another(error)
            raise
    measurement = run.measurement(requested_ns, started_ns)
    startup = measurement.startup and msgspec.structs.replace(measurement.startup, world_ns=joined_ns - entered_ns)
    measurement = msgspec.structs.replace(measurement, startup=startup)
    communication = None
    if measurement.outcome.kind == "ok":
        communication = _traced(ranks.communication(), measurement.profile)
    return Answer(
        rank=_rank(place, measurement, run),
        measurement=measurement,
        communication=communication,
        lost=lost,
    )


def _traced(communication: Communication, profile: Profile | None) -> Communication:
    if profile is None or profile.collectives_ns is None or not profile.steps:
        return communication
    return msgspec.structs.replace(communication, collectives_ns=profile.collectives_ns // profile.steps)


class _Question(msgspec.Struct):
    case: Case
    plan: Plan
    cache: str
    trace: str | None = None


def _rank(place: Place, measurement: Measurement, run: CaseRun) -> Rank:
    return Rank(
        rank=place.rank,
        node=place.node,
        host=platform.node(),
        facts=measurement.facts,
        startup=measurement.startup,
        samples=measurement.samples,
        before_reduce_ns=run.before_reduce_ns,
        blocks=run.exchange_blocks,
    )


def join(device: torch.device, deadline_s: float, **group: Any) -> None:
    """Make the process group of all ranks, as torch's launcher describes it or by `group`'s store, rank and world size.

    Hosts talk by gloo in any case.
    """
    backend = dist.get_default_backend_for_device(device)
    both = backend if device.type == "cpu" else f"cpu:gloo,{device.type}:{backend}"
    dist.init_process_group(both, timeout=timedelta(seconds=deadline_s), **group)
    dist.broadcast(torch.zeros(1), 0)


_LOST = re.compile(
    r"[Cc]onnection (?:was )?(?:closed|reset|refused)|[Rr]emote process|Broken pipe|NCCL.*remote|unhandled system error"
    r"|Socket closed|peer"
)


def has_lost_another(error: BaseException) -> bool:
    """Whether `error` says that another rank is gone: gloo and NCCL each have words for it."""
    return isinstance(error, dist.DistError | RuntimeError) and _LOST.search(str(error)) is not None


def take_device(local_rank: int) -> None:
    """Let this process see one CUDA device only, its own; call it before CUDA starts."""
    if torch.version.cuda is None and torch.version.hip is None:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    listed = [name for name in visible.split(",") if name] if visible is not None else None
    if listed is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local_rank)
    elif local_rank < len(listed):
        os.environ["CUDA_VISIBLE_DEVICES"] = listed[local_rank]


def _talk_from(address: str) -> None:
    """Let gloo use the interface that has this address; it would take what the host's name resolves to."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _stack_file(rank: int) -> Path:
    return Path(tempfile.gettempdir(), f"rank-{rank}.stack")


# --- ranks that do something else -------------------------------------------------------------------

Work = Callable[[str], str]
"""What each rank does inside the group of all, from a question to its answer; it is found by its name in its module."""


class _Word(msgspec.Struct):
    """What one rank has said, or how it failed."""

    answer: str = ""
    failure: str | None = None
    lost: bool = False


def ask(work: Work, question: str, size: int, deadline_s: float) -> list[str]:
    """Start `size` ranks on this machine, let each of them do `work`, and return what they answer, by rank.

    None outlives this, and none works longer than `deadline_s` seconds. Raises BsprofError, with the rank that is the
    cause, where one failed, and RuntimeError where they have no place to meet.
    """
    now_ns = host_clock()
    with _hosted(Meeting(), size) as shared:
        shared.store.set("question", question)
        patience_s = max(1, round(deadline_s))
        stopped = _launch(_task(shared, now_ns, now_ns), size, patience_s, _answer, work, deadline_s, leads=True)
        words = {rank: msgspec.json.decode(said, type=_Word) for rank, said in shared.said().items()}
    for rank, code in stopped.exit_codes.items():
        if code == -signal.SIGALRM:
            raise BsprofError(f"rank {rank} was not done after {deadline_s:g} s")
        if rank not in words:
            raise BsprofError(_death(rank, code).message or "")
    for rank, word in sorted(words.items(), key=lambda item: item[1].lost):
        if word.failure is not None:
            raise BsprofError(f"rank {rank}: {word.failure}")
    if len(words) < size:
        raise BsprofError(stopped.failure or "a rank has said nothing")
    return [words[rank].answer for rank in range(size)]


def _answer(task: Task, work: Work, deadline_s: float) -> None:
    """Be a rank that does `work`; the launcher ends the others where it fails."""
    signal.alarm(max(1, round(deadline_s)))  # ends this process wherever it hangs, in a driver too
    place = Place.of_environment()
    store = connect(task.meeting)
    take_device(place.local_rank)
    word = _Word()
    try:
        join(present_device(), deadline_s)
        word.answer = work(store.get("question").decode())
    except Exception as error:
        word.failure = classify(error).message or type(error).__name__
        word.lost = has_lost_another(error)
    _say(store, place.rank, msgspec.json.encode(word), lost=word.lost, failed=word.failure is not None)
