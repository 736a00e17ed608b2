"""From what the user asked to the cases that mean something on this machine."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec

from bsprof.errors import BsprofError
from bsprof.metrics import varying_axes
from bsprof.model import AXES, Axes, Axis, Case, Environment, Needs, Plan, Settings, case_key
from bsprof.noun import Note

FULL_BUDGET_S = 98.0
QUICK_BUDGET_S = 24.0
"""Time that the cases of a default plan share. With starting up it is about 2 minutes, or 30 s."""
AROUND_S = 2.5
"""A case's process, its data, its epoch's end and reading the profiler's trace take about as much on two cores."""
WORLD_START_S = 6.0
"""Ranks come from a server of their own, that loads torch, and find each other: 4 to 8 s on two cores."""
MOST_CASES = 100_000
"""More than any sweep would ever finish: beyond it a plan is a slip."""
CASE_TIME_RANGE_S = (5.0, 20.0)
"""A case given less cannot warm up; one given more rarely gains."""


class Expansion(NamedTuple):
    """The cases of a plan in the order they are measured, the axes that vary among them, and what was collapsed."""

    cases: list[Case]
    varying: tuple[str, ...]
    notes: list[Note]


def expand(plan: Plan, environment: Environment) -> Expansion:
    """Return every case of `plan` that differs from the others on the machine of `environment`.

    An axis that means nothing there is set to null and the cases that become equal are measured once, which a note
    says. Raises BsprofError for values that bsprof cannot measure.
    """
    if plan.largest_batch is not None:
        _refuse_search(plan, environment)
    requested: list[Settings] = []
    asked = 0
    for block in plan.blocks or (Axes(),):
        values = {**_given(plan.axes), **_given(block)}
        choices = [values.get(name, (axis.default,)) for name, axis in AXES.items()]
        for name, given in values.items():
            if not given:
                raise BsprofError(f"$.axes.{name}: no values", hint="give at least one, or leave the axis out")
        asked += plan.repeat * math.prod(map(len, choices))
        if asked > MOST_CASES:
            raise BsprofError(
                f"{asked:,} cases or more: bsprof measures {MOST_CASES:,} at the most", hint="ask for less"
            )
        points = (Settings(**dict(zip(AXES, point, strict=True))) for point in itertools.product(*choices))
        requested.extend(_of_one_rank(settings, plan) for settings in points)
    for world_size in sorted({settings.world_size for settings in requested}):
        _refuse_world(world_size, plan, environment)
    if plan.nvtx and not any(device.kind == "cuda" for device in environment.accelerators):
        raise BsprofError("nvtx: there is no CUDA device here", hint="leave it out; --trace works everywhere")
    meaningful = {case_key(collapsed): collapsed for s in requested for collapsed in (collapse(s, environment),)}
    cases = [
        Case(key=key, settings=settings, process=process)
        for process in range(plan.repeat)
        for key, settings in _ordered(meaningful, plan, process)
    ]
    named = {name for axes in (plan.axes, *plan.blocks) for name in _given(axes)}
    return Expansion(cases, tuple(varying_axes(meaningful.values())), _collapse_notes(requested, named, environment))


def _of_one_rank(settings: Settings, plan: Plan) -> Settings:
    """Return `settings` with the batch of one rank; strong scaling shares one batch among all of them."""
    if plan.scaling == "weak" or settings.world_size == 1:
        return settings
    if settings.batch_size % settings.world_size:
        raise BsprofError(
            f"batch_size: {settings.batch_size} cannot be shared equally by {settings.world_size} ranks",
            hint=f"with --scaling strong every batch size is a multiple of every world size, as {_near(settings)}",
        )
    return msgspec.structs.replace(settings, batch_size=settings.batch_size // settings.world_size)


def _near(settings: Settings) -> int:
    return -(-settings.batch_size // settings.world_size) * settings.world_size


def _refuse_world(world_size: int, plan: Plan, environment: Environment) -> None:
    """Raise BsprofError for a world that this machine, or the machines that share it, cannot make."""
    if world_size % plan.nodes:
        raise BsprofError(
            f"world_size: {world_size} ranks cannot be shared equally by {plan.nodes} nodes",
            hint=f"give multiples of {plan.nodes}",
        )
    devices = len(environment.accelerators)
    if devices and world_size > devices * plan.nodes:
        raise BsprofError(
            f"world_size: {world_size} ranks, but {devices * plan.nodes} devices",
            hint="each rank trains on a device of its own; `auto` takes 1, 2, 4 … all of them",
        )
    if world_size > 1 and plan.largest_batch is not None:
        raise BsprofError(
            "world_size: the largest batch is searched with one rank",
            hint="leave it out: DDP adds the gradients' buckets, once the model's size",
        )


def worlds(environment: Environment, nodes: int) -> tuple[int, ...]:
    """Return the world sizes that `auto` means: 1, 2, 4 … all devices; cores where there is no accelerator.

    On several nodes: as many ranks on each of them.
    """
    most = len(environment.accelerators) or environment.cores_usable
    return tuple(nodes * each for each in sorted({*(2**power for power in range(most.bit_length())), most}))


def _refuse_search(plan: Plan, environment: Environment) -> None:
    """Raise BsprofError where a search for the largest batch contradicts the rest of `plan`, or could find no end."""
    if any("batch_size" in _given(axes) for axes in (plan.axes, *plan.blocks)):
        raise BsprofError(
            "batch_size: cannot be given beside largest_batch, which searches it",
            hint="leave out one of them: batch_size (--batch-size), or largest_batch (--max-batch)",
        )
    if plan.repeat > 1:
        raise BsprofError(
            f"repeat: {plan.repeat} processes a case, but a search for the largest batch tries each batch once",
            hint="leave it out, or search again with another --output",
        )
    if not environment.accelerators and plan.host_memory_bytes is None:
        raise BsprofError(
            "--max-batch: without an accelerator only the machine's end limits the memory, and it must not be tried",
            hint="say what a process may have: --host-memory 4GiB",
        )


def collapse(settings: Settings, environment: Environment) -> Settings:
    """Return `settings` without the values of axes that mean nothing, here or beside the other values."""
    cuda, ranks = any(device.kind == "cuda" for device in environment.accelerators), settings.world_size > 1
    has: dict[Needs | None, bool] = {
        "accelerator": bool(environment.accelerators),
        "cuda": cuda,
        "workers": settings.workers > 0,
        "ranks": ranks,
        "cuda ranks": cuda and ranks,
        None: True,
    }
    idle = [axis for axis in AXES.values() if not has[axis.info.needs]]
    return msgspec.structs.replace(settings, **{axis.name: _idle_value(axis) for axis in idle})


def _idle_value(axis: Axis) -> Any:
    """Return what stands for an axis that means nothing: null, or the default of one that knows no null."""
    return None if axis.nullable else axis.default


def default_axes(environment: Environment, *, quick: bool) -> dict[str, tuple[Any, ...]]:
    """Return the sweep that fits the machine: batch sizes by its memory, workers up to its usable cores.

    Without an accelerator the images are small, so that a step takes a fraction of a second and can be repeated.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    cores = environment.cores_usable
    memory = min((device.memory_bytes or 0 for device in environment.accelerators), default=0)
    if environment.accelerators:
        axes["batch_size"] = (64, 128, 256) if memory >= 16 * 2**30 else (16, 32, 64)
    else:
        axes["batch_size"] = (8, 16, 32) if cores < 16 else (16, 32, 64)
        axes["image_size"] = (64,) if cores < 16 else (128,)
    workers = {0, 1, cores} if cores <= 2 else {0, cores // 4, cores // 2, cores}
    axes["workers"] = tuple(sorted(workers))
    if quick:
        axes["batch_size"] = axes["batch_size"][-1:]
        axes["workers"] = (0, max(workers))
    return axes


def case_time_s(cases: int, *, quick: bool) -> float:
    """Return the time each of `cases` may take when the user names none."""
    low, high = CASE_TIME_RANGE_S
    return min(high, max(low, (QUICK_BUDGET_S if quick else FULL_BUDGET_S) / max(1, cases)))


def make_plan(
    axes: Mapping[str, tuple[Any, ...]], environment: Environment, *, quick: bool, stop: Mapping[str, Any], **rest: Any
) -> Plan:
    """Return the plan of a command line: the user's `axes`, the defaults where they name none."""
    defaults = default_axes(environment, quick=quick)
    if not {"jpeg", "synthetic"}.issuperset(axes.get("data", ())):
        # Other data has a size of its own.
        defaults.pop("image_size", None)
    if rest.get("largest_batch") is not None:
        defaults.pop("batch_size", None)
        defaults["workers"] = defaults["workers"][-1:]  # one search; more of them are asked for by name
    plan = convert_flags({"axes": {**defaults, **axes}, "stop": stop, **rest})
    if "max_case_time_s" not in stop:
        share = case_time_s(len(expand(plan, environment).cases), quick=quick)
        plan = msgspec.structs.replace(plan, stop=msgspec.structs.replace(plan.stop, max_case_time_s=round(share, 1)))
    return plan


_FLAGS = {
    "max_case_time_s": "max-case-time",
    "deadline_s": "deadline",
    "host_memory_bytes": "host-memory",
    "margin": "max-batch-margin",
}
"""Flags that are not called like their field in a plan."""


def convert_flags(fields: Mapping[str, Any]) -> Plan:
    """Return the plan of `fields`, or raise BsprofError naming the flag whose value does not fit."""
    try:
        return msgspec.convert(fields, Plan)
    except msgspec.ValidationError as error:
        fault, _, place = str(error).replace("`", "").rpartition(" - at ")
        field = re.sub(r"\[[\d.]*\]", "", place).rpartition(".")[2]
        flag = _FLAGS.get(field, field.replace("_", "-"))
        raise BsprofError(f"--{flag}: {fault[:1].lower()}{fault[1:]}", hint="see `bsprof bench --help`") from error


def expected_s(plan: Plan, cases: Sequence[Case]) -> float:
    """Return the most that a sweep should take: every case to its time's end, and what lies around that."""
    worlds = sum(case.settings is not None and case.settings.world_size > 1 for case in cases)
    return len(cases) * (plan.stop.max_case_time_s + AROUND_S) + worlds * WORLD_START_S


def parse_values(axis: Axis, text: str, flag: str) -> tuple[Any, ...]:
    """Return the values of a comma-separated list on the command line, or raise BsprofError naming `flag`."""
    refuse_undecodable(text, flag)
    return tuple(_parse_value(axis, word.strip(), flag) for word in _split(axis, text))


def refuse_undecodable(text: str, flag: str) -> None:
    """Raise BsprofError for bytes of the command line that are no text: neither a plan nor a result could hold them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise BsprofError(f"{flag}: {shown}: not UTF-8", hint="a link to it with another name helps") from error


def _split(axis: Axis, text: str) -> list[str]:
    # jpeg:500x375,n=64 is one data set: a part that reads key=value belongs to the part before it.
    parts: list[str] = []
    for part in text.split(","):
        if axis.name == "data" and parts and "=" in part:
            parts[-1] += "," + part
        else:
            parts.append(part)
    return parts


_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def _parse_value(axis: Axis, word: str, flag: str) -> Any:
    if not word:
        raise BsprofError(f"{flag}: an empty value", hint=f"for example {flag} {_example(axis)}")
    if axis.nullable and word.lower() in ("auto", "none"):
        return None
    if get_origin(axis.type) is Literal:
        choices = get_args(axis.type)
        if word not in choices:
            raise BsprofError(f"{flag}: {word!r} is none of {', '.join(choices)}", hint=f"for example {_example(axis)}")
        return word
    if axis.type is bool:
        if word.lower() not in _SWITCH:
            raise BsprofError(f"{flag}: {word!r} is neither on nor off", hint=f"for example {flag} on,off")
        return _SWITCH[word.lower()]
    if axis.type is int:
        try:
            value = int(word)
            msgspec.convert({axis.name: value}, Settings)
        except ValueError as error:
            limit = f" ({str(error).split(' - at')[0].lower().replace('`', '')})" if word.lstrip("-").isdigit() else ""
            raise BsprofError(
                f"{flag}: expected a whole number, got {word!r}{limit}", hint=f"for example {flag} {_example(axis)}"
            ) from error
        return value
    return word


def _example(axis: Axis) -> str:
    if get_origin(axis.type) is Literal:
        return ",".join(get_args(axis.type)[:2])
    return {bool: "on,off", int: "1,2,4"}.get(axis.type, str(axis.default))


def _given(axes: Any) -> dict[str, tuple[Any, ...]]:
    return {name: value for name in AXES if (value := getattr(axes, name)) is not msgspec.UNSET}


def _ordered(meaningful: Mapping[str, Settings], plan: Plan, process: int) -> list[tuple[str, Settings]]:
    # Shuffled, so that the machine's drift over the sweep does not look like the effect of an axis.
    points = list(meaningful.items())
    if plan.order == "shuffled":
        random.Random(plan.seed * 1009 + process).shuffle(points)
    return points


_NEEDS: dict[Needs, str] = {
    "accelerator": "without an accelerator",
    "cuda": "without a CUDA device",
    "workers": "with 0 workers",
    "ranks": "with a world of 1",
    "cuda ranks": "without several ranks on CUDA devices",
}


def _collapse_notes(requested: list[Settings], named: set[str], environment: Environment) -> list[Note]:
    notes = []
    for name, axis in AXES.items():
        if axis.info.needs is None or name not in named:
            continue
        idle = [s for s in requested if getattr(collapse(s, environment), name) != getattr(s, name)]
        if not idle:
            continue
        left = {case_key(collapse(s, environment)) for s in idle}
        # Where it has but one value it is not this axis that makes cases equal, but another that means nothing either.
        merges = len({case_key(msgspec.structs.replace(s, **{name: _idle_value(axis)})) for s in idle}) < len(idle)
        once = f": {len(idle)} cases are measured as {len(left)}" if merges else ""
        notes.append(Note(code="axis_collapsed", text=f"{name} means nothing {_NEEDS[axis.info.needs]}{once}"))
    return notes
