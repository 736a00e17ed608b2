"""What runs inside a child process: the only door from the sweep to torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from bsprof import cache, store
from bsprof.diagnosis import diagnose
from bsprof.loader import measuring as watching
from bsprof.loading import LoaderRequest
from bsprof.measure import case as measuring
from bsprof.measure import environment, forks, pair, ranks, rates, roll, selftest, world
from bsprof.measure.clock import present_device
from bsprof.model import Case, Plan, Settings
from bsprof.workloads import registry

Emit = Callable[[str, int, float | None], None]


class CaseRequest(msgspec.Struct):
    """A case, what of the plan holds for it, where its trace is kept, if it is, and where its ranks meet."""

    case: Case
    plan: Plan
    trace: str | None = None
    meeting: roll.Meeting = roll.Meeting()


class FollowRequest(msgspec.Struct):
    """Where node 0 measures, the case of it that is known already, and for how long it may not be there."""

    meeting: roll.Meeting
    seen: str
    patience_s: float


class DismissRequest(msgspec.Struct):
    """Where the other nodes wait for a case, and for how long they may not hear that none follows."""

    meeting: roll.Meeting
    patience_s: float


class PairRequest(msgspec.Struct):
    """Two cases that are measured in turns, and what of a plan holds for them."""

    cases: tuple[Case, Case]
    plan: Plan


class WatchRequest(msgspec.Struct):
    """What `bsprof loader` was asked, and whether it is the measurement or a round of a verification."""

    request: LoaderRequest
    deadline_s: float
    thorough: bool = True


class PrepareRequest(msgspec.Struct):
    """All settings of a sweep, before any of them is measured."""

    settings: list[Settings]
    plan: Plan


def cache_dir() -> Path:
    """Return the folder for generated and downloaded data."""
    return cache.place()


def describe(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Return the Environment as seen from the directory that `payload` names."""
    return store.to_json(environment.collect(Path(msgspec.json.decode(payload, type=str))))


def check_names(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Check every name in a PrepareRequest."""
    request = msgspec.json.decode(payload, type=PrepareRequest)
    for model, data in dict.fromkeys((s.model, s.data) for s in request.settings):
        registry.check_names(model, data)
    for hook in dict.fromkeys(s.comm_hook for s in request.settings if s.comm_hook != "none"):
        world.find_hook(hook)
    return b"null"


def prepare(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Check every name and make every data set of a PrepareRequest, so that no case meets a surprise."""
    check_names(payload, requested_ns, emit)
    request = msgspec.json.decode(payload, type=PrepareRequest)
    by_data = {(s.data, s.image_size): s for s in request.settings}
    for settings in by_data.values():
        emit(f"preparing {settings.data}", 0, None)
        registry.prepare_data(settings.data, measuring.data_request(settings, request.plan, cache_dir()))
    return b"null"


def introduce(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Prepare what a PrepareRequest asks for, and return the Environment as seen from the current directory."""
    prepare(payload, requested_ns, emit)
    return store.to_json(environment.collect(Path.cwd()))


def measure(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Measure the case of a CaseRequest."""
    request = msgspec.json.decode(payload, type=CaseRequest)
    emit = measuring.throttled(emit)
    trace = Path(request.trace) if request.trace else None
    together = request.case.settings is not None and request.case.settings.world_size > 1
    how = (
        partial(ranks.measure, meeting=request.meeting)
        if together
        else partial(measuring.measure, watch=watching.watch_training)
    )
    measurement = how(request.case, request.plan, cache=cache_dir(), requested_ns=requested_ns, emit=emit, trace=trace)
    if measurement.loading is not None:
        found = diagnose(measurement.loading, predictions=request.plan.diagnose == "full")
        measurement = msgspec.structs.replace(measurement, diagnosis=found)
    return store.to_json(measurement)


def follow(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Bring ranks to the next case of a FollowRequest and return how that ended, a word of `ranks.follow`."""
    asked = msgspec.json.decode(payload, type=FollowRequest)
    word = ranks.follow(asked.meeting, asked.seen, asked.patience_s, cache=cache_dir(), emit=emit)
    return msgspec.json.encode(word)


def dismiss(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Tell the other nodes of a DismissRequest that no case follows."""
    asked = msgspec.json.decode(payload, type=DismissRequest)
    roll.dismiss(asked.meeting, asked.patience_s)
    return b"null"


def measure_pair(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Measure the cases of a PairRequest."""
    request = msgspec.json.decode(payload, type=PairRequest)
    both = pair.measure(
        request.cases, request.plan, cache=cache_dir(), requested_ns=requested_ns, emit=measuring.throttled(emit)
    )
    return store.to_json(both)


def watch_loader(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Watch the loader of a WatchRequest."""
    asked = msgspec.json.decode(payload, type=WatchRequest)
    measurement = watching.measure(
        asked.request, cache_dir(), emit, deadline_s=asked.deadline_s, thorough=asked.thorough
    )
    return store.to_json(measurement)


def catalogue(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Return the workloads as (kind, name, summary) rows."""
    return msgspec.json.encode([(entry.kind, entry.name, entry.summary) for entry in registry.catalogue()])


def check_clocks(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Run the self-test, on each clock that there is."""
    return msgspec.json.encode(selftest.run(emit) + selftest.run_on_device(emit, present_device()))


def measure_ceilings(payload: bytes, requested_ns: int, emit: Emit) -> bytes:
    """Measure what this machine can do at the most, to be kept under the identity that `payload` names."""
    forks.serve()  # for the all-reduces, which come last
    return store.to_json(rates.measure(msgspec.json.decode(payload, type=str), cache_dir(), emit))
