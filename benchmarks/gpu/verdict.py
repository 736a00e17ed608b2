"""What a check says: one line for each promise, with the figure, the limit and the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.device import Device

Verdict = Literal["PASS", "FAIL", "SKIP"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One verdict. `values` are the figures behind it, for the JSON file."""

    what: str
    verdict: Verdict
    figure: str = ""
    limit: str = ""
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        limit = f" (limit {self.limit})" if self.limit else ""
        reason = f" - {self.reason}" if self.reason else ""
        figure = f": {self.figure}" if self.figure else ""
        return f"{self.what}{figure}{limit}{reason}"


def judge(what: str, passed: bool, figure: str, limit: str, reason: str = "", **values: Any) -> Line:
    """Return PASS or FAIL; `reason` explains a failure and is left out of a pass."""
    verdict: Verdict = "PASS" if passed else "FAIL"
    return Line(
        what=what, verdict=verdict, figure=figure, limit=limit, reason="" if passed else reason, values=dict(values)
    )


def fail(what: str, reason: str) -> Line:
    """Return FAIL for what could not even be measured."""
    return Line(what=what, verdict="FAIL", reason=reason)


def skip(what: str, reason: str) -> Line:
    """Return SKIP for what means nothing on this device."""
    return Line(what=what, verdict="SKIP", reason=reason)


class Unable(Exception):
    """A check cannot go on; what it says becomes the reason of a FAIL."""


@dataclass(frozen=True, kw_only=True)
class Stand:
    """Where a check runs: the device, a folder of its own, and one that outlives it (generated images)."""

    device: Device
    folder: Path
    cache: Path

    @property
    def rehearsed(self) -> bool:
        """Whether this is a rehearsal: small sizes, stand-ins, no claim."""
        return self.device.rehearsed


@dataclass(frozen=True, kw_only=True)
class Check:
    """A named check, what it needs in seconds on a GPU, and the function that yields its lines."""

    name: str
    expected_s: float
    run: Callable[[Stand], Iterator[Line]]

    @property
    def about(self) -> str:
        """The first line of the function's docstring."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]
