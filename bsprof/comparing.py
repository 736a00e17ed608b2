"""`bsprof compare`: from two paths to a table, and to the exit code that a gate needs."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import click
import msgspec

from bsprof import store
from bsprof.compare import MACHINE, Comparison, compare, environment_differences
from bsprof.errors import BsprofError, Exit
from bsprof.metrics import METRICS, find_metric
from bsprof.model import AXES, Gate, Result
from bsprof.report import comparison as report
from bsprof.report import terminal

Format = Literal["rich", "markdown", "json", "github"]


class Request(NamedTuple):
    """What the command line asks for; None where a flag was not given."""

    base: Path
    new: Path
    format: Format
    threshold: float | None
    strict: bool | None
    allow: tuple[str, ...]
    paired: bool | None = None


def run(request: Request) -> int:
    """Compare, print, and return the exit code."""
    gate = find_gate(Path.cwd(), threshold=request.threshold, strict=request.strict, allow=request.allow)
    with _uncollected():
        base, new = read(request.base), read(request.new)
        comparison = compare(base, new, gate, names=(str(request.base), str(request.new)), paired=request.paired)
        show(comparison, request.format)
    return exit_code(comparison)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the cycle collector from going through hundreds of thousands of results' objects, which make no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def exit_code(comparison: Comparison) -> Exit:
    """Return what a gate makes of it: the gravest of incomparable, regressed, missing and, if strict, inconclusive."""
    verdicts = {case.verdict for case in comparison.cases}
    nothing = not (comparison.cases or comparison.missing or comparison.added)
    if comparison.refused or "incomparable" in verdicts or nothing:
        return Exit.INCOMPARABLE
    if "regressed" in verdicts:
        return Exit.VERDICT
    if comparison.missing:
        return Exit.MISSING
    if comparison.gate.strict and "inconclusive" in verdicts:
        return Exit.INCONCLUSIVE
    return Exit.DONE


# --- what is compared -------------------------------------------------------------------------------


def read(path: Path) -> Result:
    """Return the result at `path`; of a folder the measurements of all results in it, as of one.

    Raises BsprofError for what cannot be read, a folder without results, and results that differ in their environment.
    """
    paths = files_at(path)
    results = [store.load(one) for one in paths]
    for other, name in zip(results[1:], paths[1:], strict=True):
        differences = environment_differences(results[0].environment, other.environment)
        if differences:
            raise BsprofError(
                f"{path}: {paths[0].name} and {name.name} are of different environments: "
                + "; ".join(map(str, differences)),
                hint="a folder is one side of a comparison: measured on one machine, with one software",
                exit_code=Exit.INCOMPARABLE,
            )
    return msgspec.structs.replace(results[0], measurements=[one for result in results for one in result.measurements])


def files_at(path: Path) -> list[Path]:
    """Return the results in a folder, by name; a path that is none is one result itself.

    Raises BsprofError for a folder without results.
    """
    if not path.is_dir():
        return [path]
    paths = sorted(one for one in path.iterdir() if one.name.endswith((".json", ".json.gz")) and one.is_file())
    if not paths:
        raise BsprofError(
            f"{path}: no results there", hint="a result is a .json or .json.gz, written by `bsprof bench`"
        )
    return paths


def find_gate(
    folder: Path, *, threshold: float | None = None, strict: bool | None = None, allow: Sequence[str] = ()
) -> Gate:
    """Return what the nearest pyproject.toml from `folder` upwards asks for, and the flags over it.

    Raises BsprofError that names the flag, or the file and the place in it.
    """
    upwards = (parent / "pyproject.toml" for parent in (folder, *folder.parents))
    place = next(filter(Path.is_file, upwards), None)
    gate = Gate() if place is None else store.load_gate(place)
    for key in gate.metrics:
        _check_metric(f"{place}: $.tool.bsprof.gate.metrics.{key}", key)
    for index, case in enumerate(gate.cases):
        unknown = case.settings.keys() - AXES.keys()
        if unknown:
            raise BsprofError(
                f"{place}: $.tool.bsprof.gate.cases[{index}].settings.{min(unknown)}: no such axis",
                hint=f"axes are {', '.join(AXES)}",
            )
    if threshold is not None:
        if not 0 < threshold < 1:
            raise BsprofError(f"--threshold: {threshold:g} is not between 0 and 1", hint="0.02 lets 2 % pass")
        # A flag is for this once: it goes before what the file says of single cases.
        gate = msgspec.structs.replace(gate, threshold=threshold, cases=())
    if strict is not None:
        gate = msgspec.structs.replace(gate, strict=strict)
    allowed = _allowed("--allow", allow) or _allowed(f"{place}: $.tool.bsprof.gate.allow", gate.allow)
    return msgspec.structs.replace(gate, allow=tuple(allowed))


def _check_metric(place: str, key: str) -> None:
    try:
        metric = find_metric(key)
    except KeyError:
        raise BsprofError(f"{place}: no such metric", hint=f"as {', '.join(list(METRICS)[:6])}, forward.time") from None
    if metric.better is None:
        raise BsprofError(f"{place}: neither more nor less of it is better", hint="gate on one that has a direction")


def _allowed(place: str, names: Sequence[str]) -> list[str]:
    allowed = [name.strip() for one in names for name in one.split(",") if name.strip()]
    for name in allowed:
        if name not in MACHINE:
            raise BsprofError(f"{place}: '{name}' is nothing that is refused", hint=f"one of {', '.join(MACHINE)}")
    return allowed


# --- how it is said ---------------------------------------------------------------------------------


def show(comparison: Comparison, output_format: Format) -> None:
    """Print a comparison; in a workflow of GitHub's also into its summary."""
    match output_format:
        case "rich":
            report.render(comparison, terminal.console())
        case "markdown":
            click.echo(report.markdown(comparison))
        case "json":
            click.echo(store.to_json(comparison).decode())
        case "github":
            for line in report.commands(comparison):
                click.echo(line)
            summary = os.environ.get("GITHUB_STEP_SUMMARY")
            if summary:
                with Path(summary).open("a", encoding="utf-8") as file:
                    file.write(report.markdown(comparison) + "\n")
