"""`bsprof history`: from paths to a table, and to the exit code that a gate needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import click

from bsprof import store
from bsprof.compare import MACHINE, environment_differences
from bsprof.comparing import files_at
from bsprof.errors import BsprofError, Exit
from bsprof.history import History, Moment, history, moment
from bsprof.metrics import METRICS, Metric, find_metric
from bsprof.report import history as report
from bsprof.report import terminal

Format = Literal["rich", "markdown", "json"]


class Request(NamedTuple):
    """What the command line asks for."""

    paths: Sequence[Path]
    format: Format
    metric: str
    threshold: float


def run(request: Request) -> int:
    """Follow, print, and return the exit code."""
    metric = _metric(request.metric)
    if not 0 < request.threshold < 1:
        raise BsprofError(f"--threshold: {request.threshold:g} is not between 0 and 1", hint="0.02 lets 2 % pass")
    told = history(read(request.paths, metric), metric, request.threshold)
    match request.format:
        case "rich":
            report.render(told, terminal.console())
        case "markdown":
            click.echo(report.markdown(told))
        case "json":
            click.echo(store.to_json(told).decode())
    return exit_code(told)


def exit_code(told: History) -> Exit:
    """Return what a gate makes of it: the gravest of incomparable and regressed."""
    return {"incomparable": Exit.INCOMPARABLE, "regressed": Exit.VERDICT}.get(told.verdict, Exit.DONE)


def read(paths: Sequence[Path], metric: Metric) -> list[Moment]:
    """Return what a history needs of the results at `paths`, and in the folders among them; each file once.

    Raises BsprofError for what cannot be read, and for results of different machines.
    """
    moments: dict[Path, Moment] = {}
    for path in (file for one in paths for file in files_at(one)):
        if path.resolve() in moments:
            continue
        try:
            found = moment(str(path), store.load(path), metric)
        except ValueError as error:
            raise BsprofError(f"{path}: {error}") from None
        first = next(iter(moments.values()), found)
        differences = environment_differences(first.environment, found.environment)
        foreign = "; ".join(str(one) for one in differences if one.name in MACHINE)
        if foreign:
            raise BsprofError(
                f"{path}: of another machine than {first.name}: {foreign}",
                hint="a history is of one machine: keep a folder for each",
                exit_code=Exit.INCOMPARABLE,
            )
        moments[path.resolve()] = found
    return list(moments.values())


def _metric(key: str) -> Metric:
    try:
        metric = find_metric(key)
    except KeyError:
        hint = f"as {', '.join(list(METRICS)[:6])}, forward.time"
        raise BsprofError(f"--metric: there is no metric '{key}'", hint=hint) from None
    if metric.better is None:
        raise BsprofError(f"--metric: neither more nor less of {key} is better", hint="follow one with a direction")
    return metric
