"""The ceilings of a machine as text: what it does at the most, with intervals, and what is not known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bsprof.ceilings import bus_bandwidth
from bsprof.model import AllReduce, Ceiling, Ceilings
from bsprof.report import figures

_NAMES = {
    "h2d_pinned": "copy to the accelerator, pinned",
    "h2d_pageable": "copy to the accelerator, pageable",
    "d2d": "copy on the accelerator, read + written",
    "matrix_fp32": "matrix product, fp32",
    "matrix_tf32": "matrix product, tf32",
    "matrix_bf16": "matrix product, bf16",
    "matrix_fp16": "matrix product, fp16",
    "cpu_matrix_fp32": "matrix product on the CPU, fp32",
    "cpu_matrix_bf16": "matrix product on the CPU, bf16",
    "jpeg_core": "JPEG 500x375 decoded by one process",
    "jpeg_all": "JPEG 500x375 decoded on all usable cores",
    "disk_cold": "read from disk",
    "disk_warm": "read from the page cache",
    "cpu_cores": "cores that really run at once",
    "all_reduce": "all-reduce, largest bus bandwidth",
}
"""In the order of the table."""

_UNITS = {
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "1/s": ((1.0, "img/s"),),
    "cores": ((1.0, "cores"),),
}
"""Decimal units, the first that leaves at least 1."""


def render(ceilings: Ceilings | None, path: Path | None, console: Console) -> None:
    """Print ceilings, what is missing and why, and that they are kept at `path`; without any, how to get them."""
    if ceilings is None:
        _say("Ceilings of this machine are not measured yet: `bsprof env --measure`", console)
        return
    table = _table()
    table.add_column("ceiling", overflow="fold")
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_column("95 % interval", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for name in _ordered(ceilings.rates):
        table.add_row(_name(name), *_cells(ceilings.rates[name]))
    if ceilings.rates:
        console.print(table)
    if ceilings.all_reduce:
        largest = max(one.world_size for one in ceilings.all_reduce)
        _render_sizes([one for one in ceilings.all_reduce if one.world_size == largest], console)
    by_reason: dict[str, list[str]] = {}
    for name in _ordered(ceilings.missing):
        by_reason.setdefault(ceilings.missing[name], []).append(_name(name))
    for reason, names in by_reason.items():
        _say(f"not measured ({figures.printable(reason)}): {'; '.join(names)}", console)
    for note in ceilings.notes:
        _say(f"note: {figures.printable(note.text)}", console)
    took = "" if ceilings.wall_s is None else f" in {ceilings.wall_s:.0f} s"
    kept = "not kept" if path is None else f"kept in {figures.printable(str(path))}"
    _say(
        f"measured {figures.printable(ceilings.created)}{took}; {kept}; `bsprof env --refresh` measures again", console
    )


def _render_sizes(of_one_world: Sequence[AllReduce], console: Console) -> None:
    """Print how long an all-reduce of each size takes."""
    first = of_one_world[0]
    backend = figures.printable(first.backend)
    table = _table()
    table.add_column(f"all-reduce in {figures.plural(first.world_size, 'rank')}, {backend}", justify="right")
    for header in ("time", "±", "bus bandwidth"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for one in sorted(of_one_world, key=lambda one: one.bytes):
        half = None if one.low is None or one.high is None else (one.high - one.low) / 2 / one.seconds
        value, _, unit = _cells(bus_bandwidth(one))
        table.add_row(figures.size(one.bytes), figures.duration(one.seconds), figures.percent(half), value, unit)
    console.print(table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="bold", border_style="dim")


_OF_A_WORLD = re.compile(r"all_reduce_(?P<ranks>\d+)(?:_(?P<bytes>\d+))?")


def _name(name: str) -> str:
    """Return what a rate is, or a world or size of the all-reduces that is missing."""
    if one := _OF_A_WORLD.fullmatch(name):
        return f"all-reduce in {one['ranks']} ranks" + (f", {figures.size(int(one['bytes']))}" if one["bytes"] else "")
    return _NAMES.get(name, name)


def _ordered(names: dict[str, Ceiling] | dict[str, str]) -> list[str]:
    """Return the names in the order of the table, those of a later version behind them."""
    return [*(name for name in _NAMES if name in names), *(name for name in names if name not in _NAMES)]


def _cells(ceiling: Ceiling) -> tuple[Text, str, str]:
    scales = _UNITS[ceiling.unit]
    scale, unit = next((found for found in scales if ceiling.value >= found[0]), scales[-1])
    places = figures.decimals([ceiling.value / scale])
    interval = figures.MISSING
    if ceiling.low is not None and ceiling.high is not None:
        interval = f"{ceiling.low / scale:.{places}f} … {ceiling.high / scale:.{places}f}"
    return Text(f"{ceiling.value / scale:.{places}f}", "bold"), interval, unit


def _say(text: str, console: Console) -> None:
    console.print(Text(text, "dim"), highlight=False)
