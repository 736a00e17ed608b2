"""What the device did while the steps ran: how busy it was, what it held and drew, and what it spent its time on.

Every table holds only what was captured. Nothing is printed where nothing was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bsprof import findings
from bsprof.metrics import CaseSummary, order_phases
from bsprof.model import Ceilings, Copy, Hotspot, Profile
from bsprof.report import figures
from bsprof.report.cases import axis_columns
from bsprof.report.figures import MISSING, case_name
from bsprof.report.grid import Column, column, heading, is_captured, parts, print_grid, print_words, width_of

_FEW = 2
"""So many cases, and each has its phases and hot spots shown; of more, the fastest alone."""
_HOTSPOTS = 5
_SHORTEST_HOTSPOT = 24
"""Cells that the name of a kernel keeps on the narrowest terminal."""

Values = list[float | None]


def render_device(
    cases: Sequence[CaseSummary], varying: Sequence[str], ceilings: Ceilings | None, console: Console
) -> None:
    """Print what the device did in each case, phases and hot spots of the fastest, and what cases say together."""
    measured = [case for case in cases if case.readings]
    _render_each(measured, varying, console)
    several = len(measured) > _FEW
    best = [case for case in (findings.fastest(measured),) if case]
    for case in best if several else measured:
        name = f" of {case_name(case.case, varying)}" if len(measured) > 1 else ""
        _render_phases(case, f"{name}, the fastest case" if several else name, console)
        _render_hotspots(case, name, ceilings, console)
    _render_payback(measured, varying, console)
    _render_growth(measured, varying, console)
    _render_switches(measured, varying, console)


# --- one row a case ---------------------------------------------------------------------------------------


def _shares(values: Values) -> tuple[str, list[str]]:
    return "", [figures.percent(value) for value in values]


def _whole(values: Values) -> tuple[str, list[str]]:
    return "", [MISSING if value is None else f"{value:.0f}" for value in values]


def _times(values: Values) -> tuple[str, list[str]]:
    unit = figures.time_unit(values)
    return f" {unit.name}", figures.column(values, unit.per_second)


def _sizes(values: Values) -> tuple[str, list[str]]:
    unit = figures.byte_unit(values)
    return f" {unit.name}", figures.column(values, 1 / unit.bytes)


def _plain(values: Values) -> tuple[str, list[str]]:
    return "", figures.column(values)


def _thousandths(values: Values) -> tuple[str, list[str]]:
    return "", figures.column(values, 1e3)


class _Shown(NamedTuple):
    """A metric as a column: its header, how its values are written (with the unit they share), what it says."""

    header: str
    key: str
    write: Callable[[Values], tuple[str, list[str]]]
    explain: str | None = None


_COLUMNS = (
    _Shown("busy", "busy_of_step", _shares, "busy: time in which a kernel or copy ran, in a profiled step / mean step"),
    _Shown("launches", "launches", _whole, "launches: of kernels, a step"),
    _Shown("overlap", "overlap", _times, "overlap: phases one at a time (alone) - mean step"),
    _Shown("peak", "peak_memory", _sizes),
    _Shown("reserved", "reserved_memory", _sizes),
    _Shown("frag", "fragmentation", _shares, "frag: 1 - peak / reserved"),
    _Shown("power W", "power", _whole),
    _Shown("SM MHz", "sm_clock", _whole),
    _Shown("J/step", "energy_per_step", _plain),
    _Shown("mJ/sample", "energy_per_sample", _thousandths, "energy: of the whole device, idle power included"),
    _Shown("MFU", "mfu", _shares, "MFU: FLOP/s of a step / the matrix rate measured here"),
)


def _render_each(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    axes = axis_columns([case.case for case in cases], varying)
    columns, explained = [], []
    for shown in _COLUMNS:
        suffix, cells = shown.write([case.value(shown.key) for case in cases])
        if any(cell != MISSING for cell in cells):
            columns.append(column(shown.header + suffix, cells))
            explained += _held(shown.key, cases) if shown.key in _POOLS else [shown.explain] if shown.explain else []
    columns[1:1] = _launch_bound(cases)
    columns += _binding(cases)
    if columns and columns[-1].header == "ceiling":
        explained.append(_ceilings_explained(cases))
    columns = [column for column in columns if is_captured(column)]
    if not columns:
        return
    on_device = any(case.facts and case.facts.device != "cpu" for case in cases)
    heading(console, "What the device did" if on_device else "What the machine did")
    for part in parts(axes, columns, console.width):
        print_grid(console, part, {}, len(axes))
        console.print()
    print_words(console, Text(" · ".join(explained), "dim"))
    _render_unresolved_energy(cases, varying, console)
    console.print()


_POOLS = {
    "peak_memory": {"device": "peak: most memory in live tensors", "host": "peak: most memory resident"},
    "reserved_memory": {
        "device": "reserved: what the allocator held for it",
        "host": "reserved: most private memory mapped, touched or not",
    },
}
"""What sizes mean, by whose memory it is."""


def _held(key: str, cases: Sequence[CaseSummary]) -> list[str]:
    pools = sorted({reading.memory.pool for case in cases for reading in case.readings if reading.memory})
    return [_POOLS[key][pool] for pool in pools]


def _launch_bound(cases: Sequence[CaseSummary]) -> list[Column]:
    judged = [findings.launching(case) for case in cases]
    if not any(judged):
        return []
    return [column("launch-bound", map(_verdict, judged), right=False)]


def _verdict(found: findings.Launching | None) -> Text:
    if found is None:
        return Text(MISSING)
    where = "step" if found.whole else "+".join(found.phases)
    return Text(where, "yellow") if where else Text("no")


def _binding(cases: Sequence[CaseSummary]) -> list[Column]:
    bounds = [case.binding for case in cases]
    if not any(bounds):
        return []
    shares = [figures.percent(case.value("ceiling_share")) for case in cases]
    widest = max(map(len, shares))
    cells = [
        MISSING if bound is None else f"{share:>{widest}} {bound.name}"
        for bound, share in zip(bounds, shares, strict=True)
    ]
    return [column("ceiling", cells, right=False)]


def _ceilings_explained(cases: Sequence[CaseSummary]) -> str:
    rates = sorted({figures.ceiling_name(case.binding.rate) for case in cases if case.binding})
    return f"ceiling: least time by the measured rate that binds ({', '.join(rates)}) / step"


def _render_unresolved_energy(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Say why there is no energy where telemetry ran: each reason once."""
    reasons: dict[str, list[CaseSummary]] = {}
    for case in cases:
        told = [reading.telemetry.energy for reading in case.readings if reading.telemetry and reading.telemetry.energy]
        if case["energy_per_step"] is None and told and told[0].reason:
            reasons.setdefault(told[0].reason, []).append(case)
    for reason, unresolved in reasons.items():
        where = "" if len(unresolved) == len(cases) else f" ({_these(unresolved, varying)})"
        print_words(console, Text(f"no energy: {reason.rstrip('.')}{where}", "dim"))


def _these(cases: Sequence[CaseSummary], varying: Sequence[str]) -> str:
    first = case_name(cases[0].case, varying)
    return first if len(cases) == 1 else f"{first}; and {len(cases) - 1} more"


# --- one case: its phases -----------------------------------------------------------------------------------


def _render_phases(case: CaseSummary, name: str, console: Console) -> None:
    """Print each phase by its clocks, alone, and by the time in which its kernels ran."""
    phases = order_phases([*case.phases, *(phase for reading in case.readings for phase in reading.serialised)])
    two_clocks = case.has_device_clock

    def values(what: str) -> Values:
        return [case.value(f"{phase}.{what}") for phase in phases]

    unit = figures.time_unit(case.value(f"{phase}.time") for phase in phases)
    columns = [
        column(f"{header} {unit.name}", figures.column(values(what), unit.per_second))
        for header, what in (("host", "host"), ("device", "device"), ("alone", "serialised"), ("busy", "busy"))
        if two_clocks or what == "serialised"
    ]
    peaks = [("peak", values("peak_memory"))]
    if len(set(values("reserved_memory")) - {None}) > 1:  # else it says no more than the row of the case
        peaks.append(("reserved", values("reserved_memory")))
    size = figures.byte_unit([max((value or 0.0 for _, sizes in peaks for value in sizes), default=None)])
    found = findings.launching(case)
    if found is not None:
        bound = (Text("launch-bound" if phase in found.phases else "", "yellow") for phase in phases)
        columns += [column("busy", (figures.percent(value) for value in values("busy_share")))]
        columns += [column("", bound, right=False)]
    columns += [column(f"{header} {size.name}", figures.column(sizes, 1 / size.bytes)) for header, sizes in peaks]
    columns = [column for column in columns if is_captured(column)]
    if not any(column.header.startswith(("alone", "busy", "peak", "reserved")) for column in columns):
        return
    heading(console, f"Phases{name}")
    for part in parts([column("", phases, right=False)], columns, console.width):
        print_grid(console, part, {}, 1)
        console.print()
    said = []
    if two_clocks:
        said.append("host and device: mean of the timed steps")
    headers = {column.header.partition(" ")[0] for column in columns}
    if "alone" in headers:
        said.append("alone: with a synchronisation at each boundary")
    if "busy" in headers:
        said.append("busy: a kernel or copy of the phase ran, in the profiled steps, and its share of device")
    if "peak" in headers:
        said.append("peak: most live memory while it ran")
    print_words(console, Text(" · ".join(said), "dim"))
    console.print()


# --- one case: what took the time ---------------------------------------------------------------------------


def _render_hotspots(case: CaseSummary, name: str, ceilings: Ceilings | None, console: Console) -> None:
    """Print the costliest kernels and the copies, operators where no device was traced, and where the trace is."""
    profile = case.profile
    if profile is None or not profile.steps:
        return
    if profile.kernels and profile.kernels_ns:
        heading(console, f"Costliest kernels{name}")
        _print_hotspots(profile, profile.kernels, profile.kernels_ns, "of kernels", console)
    elif profile.operators and profile.operators_ns:
        heading(console, f"Costliest operators{name}")
        _print_hotspots(profile, profile.operators, profile.operators_ns, "of operators", console)
    copies = [_copy(copy, profile.steps, ceilings) for copy in profile.copies if copy.calls]
    if copies:
        print_words(console, Text("copies: " + " · ".join(copies), "dim"))
        console.print()
    if profile.trace:
        # Its name alone does not tell which case it belongs to. A path is never wrapped, so that it can be copied.
        console.print(Text(f"  trace: {figures.printable(profile.trace)}", "dim"), soft_wrap=True)
        console.print()


def _print_hotspots(profile: Profile, hotspots: Sequence[Hotspot], total_ns: int, of: str, console: Console) -> None:
    most = hotspots[:_HOTSPOTS]
    suffix, times = _times([one.ns * 1e-9 / profile.steps for one in most])
    columns = [
        column(of, (figures.percent(one.ns / total_ns) for one in most)),
        column(f"{suffix.strip()}/step", times),
        column("calls/step", (f"{one.calls / profile.steps:.0f}" for one in most)),
    ]
    room = max(console.width - width_of(columns) - 2, _SHORTEST_HOTSPOT)
    columns.append(column("name", (_shortened(one.name, room) for one in most), right=False))
    print_grid(console, columns, {}, 1)
    console.print()


def _shortened(name: str, room: int) -> str:
    """Shorten a kernel's name to what tells it apart: without its return type, cut at the end."""
    name = name.removeprefix("void ")
    return name if len(name) <= room else f"{name[: room - 1]}…"


_COPY_CEILINGS = {"HtoD pinned": "h2d_pinned", "HtoD pageable": "h2d_pageable"}
"""Directions whose rate was measured in the same way: bytes moved once."""


def _copy(copy: Copy, steps: int, ceilings: Ceilings | None) -> str:
    text = f"{copy.direction} {figures.duration(copy.ns * 1e-9 / steps)} a step"
    if copy.bytes is None or not copy.ns:
        return text
    rate = copy.bytes / copy.ns * 1e9
    text += f" at {figures.rate(rate / 1e9)} GB/s"
    ceiling = ceilings.rates.get(_COPY_CEILINGS.get(copy.direction, "")) if ceilings else None
    if ceiling is None or not ceiling.value:
        return text
    return f"{text}, {figures.percent(rate / ceiling.value)} of the rate measured here"


# --- between cases ------------------------------------------------------------------------------------------


def _render_payback(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Print what cuDNN's search costs and after how many steps it has paid, for each pair of cases."""
    pairs = findings.paybacks(cases)
    if not pairs:
        return
    others = [name for name in varying if name != "cudnn_benchmark"]
    unit = figures.time_unit(case.value("step") for pair in pairs for case in (pair.off, pair.on))
    columns = axis_columns([pair.off.case for pair in pairs], others) if others else []
    lead = len(columns)
    for header, key in (("off", "off"), ("on", "on")):
        times = [getattr(pair, key).value("step") for pair in pairs]
        columns.append(column(f"{header} {unit.name}", figures.column(times, unit.per_second)))
    columns += [
        column("saved a step", (figures.duration(pair.saved_s) for pair in pairs)),
        column("search", (figures.duration(pair.cost_s) for pair in pairs)),
        column("has paid after", (_paid(pair) for pair in pairs)),
    ]
    heading(console, "cudnn.benchmark: what its search costs, and when it has paid")
    print_grid(console, columns, {}, lead)
    console.print()
    print_words(
        console,
        Text("search: warm-up beyond as many steady steps, on - off · has paid after: search / saved a step", "dim"),
    )
    console.print()


def _paid(pair: findings.PayBack) -> str:
    if pair.steps is None:
        return "never: slower" if pair.sure else "never: no sure gain"
    return "at once" if pair.steps == 0 else f"{pair.steps:.0f} steps"


def _render_growth(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Say how memory grows with the batch, what twice the largest would take and what would fit."""
    grown = findings.memory_growth(cases)
    others = [name for name in varying if name != "batch_size"]
    if grown:
        heading(console, "Memory by batch size")
    for growth in grown:
        text = f"{case_name(growth.cases[0].case, others)}: " if len(grown) > 1 else ""
        text += f"{figures.size(growth.a_sample)} a sample; batch {growth.batch_size} would take "
        text += figures.size(growth.peak.value)
        if growth.peak.low is not None and growth.peak.high is not None:
            text += f" ({figures.size(growth.peak.low)} to {figures.size(growth.peak.high)})"
        largest, limit = growth.largest, growth.limit
        if limit is not None and largest is not None and largest.low is not None and largest.high is not None:
            text += f"; {figures.size(limit)} would hold a batch of about {largest.value:.0f}"
            text += f" ({largest.low:.0f} to {largest.high:.0f})"
        print_words(console, text)
    if grown:
        print_words(
            console,
            Text("a line through the peaks measured, with 95 % prediction intervals; `--max-batch` tries it", "dim"),
        )
        console.print()


def _render_switches(cases: Sequence[CaseSummary], varying: Sequence[str], console: Console) -> None:
    """Say where a switch was not in force as it was asked; where one was varied and was, that as well."""
    wrong: dict[findings.Disagreement, list[CaseSummary]] = {}
    for case in cases:
        for one in findings.disagreements(case):
            wrong.setdefault(one, []).append(case)
    for one, members in wrong.items():
        asked, in_force = figures.setting(one.asked), figures.setting(one.in_force)
        where = f" ({_these(members, varying)})" if len(cases) > 1 else ""
        flag = f"--{one.axis.replace('_', '-')}"
        print_words(console, Text.assemble(("! ", "yellow"), f"{flag}: asked {asked}, in force {in_force}{where}"))
    switched = [name for name in varying if name.startswith(("cudnn", "deterministic"))]
    told = [case for case in cases if case.backends]
    if not wrong and switched and told:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in switched)
        print_words(console, Text(f"{flags}: in force as asked, read back in {_all(len(told), len(cases))}", "dim"))
    if wrong or (switched and told):
        console.print()


def _all(count: int, of: int) -> str:
    return f"all {of} cases" if count == of else f"{count} of {of} cases"
