"""How numbers are written: one unit a column, as many digits as mean something, a dash for what was not captured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bsprof.metrics import Unit
from bsprof.model import AXES, Case

MISSING = "–"  # noqa: RUF001 - an en dash, so that it is never read as a minus


class TimeUnit(NamedTuple):
    """A unit of time and how many of it are in a second."""

    name: str
    per_second: float


_TIME_UNITS = (TimeUnit("s", 1.0), TimeUnit("ms", 1e3), TimeUnit("µs", 1e6))


def time_unit(seconds: Iterable[float | None]) -> TimeUnit:
    """Return the one unit in which a column of times reads best: ms from 1 ms up to 10 s, by their median."""
    known = [abs(value) for value in seconds if value]
    middle = statistics.median(known) if known else 1e-3
    s, ms, us = _TIME_UNITS
    return s if middle >= 10 else ms if middle >= 1e-3 else us


def decimals(values: Iterable[float | None], digits: int = 3) -> int:
    """Return the decimals, at most two, that leave the median of a column with that many digits."""
    known = [abs(value) for value in values if value]
    whole = len(str(int(statistics.median(known)))) if known else 1
    return min(max(digits - whole, 0), 2)


def column(values: Sequence[float | None], scale: float = 1.0) -> list[str]:
    """Write a column of numbers with the same decimals for all."""
    scaled = [None if value is None else value * scale for value in values]
    places = decimals(scaled)
    return [MISSING if value is None else f"{value:.{places}f}" for value in scaled]


def duration(seconds: float | None) -> str:
    """Write one time in the unit that suits it: `38.2 ms`, `2.1 µs`, `1.42 s`, `2 min 05 s`."""
    if seconds is None:
        return MISSING
    if abs(seconds) >= 100:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    unit = next((unit for unit in _TIME_UNITS if abs(seconds) * unit.per_second >= 1), _TIME_UNITS[-1])
    return f"{_three_digits(seconds * unit.per_second)} {unit.name}"


def rate(per_second: float | None) -> str:
    """Write a rate without its unit: `77.6`, `1234`."""
    return MISSING if per_second is None else _three_digits(per_second)


def percent(share: float | None, *, signed: bool = False) -> str:
    """Write a fraction in percent, with two significant digits below 10 %: `31%`, `4.2%`, `+0.12%`.

    Without a space, so that no line ends between a figure and its sign.
    """
    if share is None:
        return MISSING
    hundredths = abs(share) * 100
    if 0 < hundredths < 0.005:
        return "<0.01%"
    digits = 0 if hundredths >= 9.95 or not share else 1 if hundredths >= 0.995 else 2
    return f"{share * 100:{'+' if signed and share else ''}.{digits}f}%"


class ByteUnit(NamedTuple):
    """A binary unit and how many bytes it is."""

    name: str
    bytes: int


_BYTE_UNITS = (ByteUnit("GiB", 2**30), ByteUnit("MiB", 2**20), ByteUnit("KiB", 2**10))


def byte_unit(sizes: Iterable[float | None]) -> ByteUnit:
    """Return the one unit in which a column of sizes reads best, by their median."""
    known = [abs(value) for value in sizes if value]
    middle = statistics.median(known) if known else 2**30
    return next((unit for unit in _BYTE_UNITS if middle >= unit.bytes), _BYTE_UNITS[-1])


def energy(joules: float | None) -> str:
    """Write an energy in the unit that suits it: `12.3 J`, `48.1 mJ`."""
    if joules is None:
        return MISSING
    return f"{_three_digits(joules)} J" if abs(joules) >= 1 else f"{_three_digits(joules * 1e3)} mJ"


def size(count: float) -> str:
    """Write a number of bytes in binary units: `7.8 GiB`."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "B" else f"{value:.1f} {units[0]}"


def bandwidth(bytes_per_s: float) -> str:
    """Write a rate of bytes in decimal units, as links are sold: `48.0 GB/s`, `812 MB/s`."""
    name, factor = ("GB/s", 1e9) if abs(bytes_per_s) >= 1e9 else ("MB/s", 1e6)
    return f"{_three_digits(bytes_per_s / factor)} {name}"


def thousands(count: float) -> str:
    """Write a large count shortly: `3.5 M`, `812 k`."""
    for name, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{_three_digits(count / factor)} {name}"
    return f"{count:.0f}"


def ceiling_name(name: str) -> str:
    """Write a ceiling's name for a reader: `matrix_bf16` is `matrix bf16`."""
    return name.replace("_", " ")


def setting(value: object) -> str:
    """Write a setting as the command line takes it: `on`, `off`, a number, a name; a dash where it means nothing."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def axis_setting(axis: str, value: object) -> str:
    """Write the value of an axis; null is `auto` where the axis means something everywhere."""
    return "auto" if value is None and AXES[axis].info.needs is None else setting(value)


def case_name(case: Case, varying: Sequence[str]) -> str:
    """Name a case by what varies: `batch 64, workers 2`; by its model or key where nothing does."""
    if case.settings is None:
        return case.key
    named = [(AXES[name].info.column, axis_setting(name, getattr(case.settings, name))) for name in varying]
    return ", ".join(f"{name} {text}" for name, text in named if text != MISSING) or case.settings.model


def amount(unit: Unit, value: float) -> str:
    """Return a value of any metric with its unit: `61.2 ms`, `1.17 GiB`, `143 1/s`."""
    match unit:
        case "s":
            return duration(value)
        case "B":
            return size(value)
        case "B/s":
            return bandwidth(value)
        case "J":
            return energy(value)
        case "share":
            return percent(value)
        case _:
            return f"{rate(value)}{'' if unit == 'count' else f' {unit}'}"


def escaped(text: str) -> str:
    """Return text that cannot end a cell, a line or a piece of code of a Markdown page."""
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def printable(text: str) -> str:
    """Replace each character that is none, such as the escapes that steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Write a count with its noun: `1 case`, `3 cases`."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"


def is_telling(interval: tuple[float, float]) -> bool:
    """Say whether a share's interval tells anything: one as wide as the whole on either side does not."""
    return interval[1] - interval[0] < 2.0
