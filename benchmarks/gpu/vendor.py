"""Measured ceilings against the vendor's figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.command import python
from benchmarks.gpu.verdict import Line, Stand, Unable, fail, judge, skip

LOWEST, HIGHEST = 0.5, 1.0
"""What is measured lies between these shares of the vendor's figure: below, the measuring is at fault, or the
machine; above, the measuring is."""


class Figures(NamedTuple):
    """What a vendor says of a device, per second."""

    rates: Mapping[str, float]
    source: str


_SXM_DENSE = {
    "matrix_bf16": 989e12,
    "matrix_fp16": 989e12,
    "matrix_tf32": 494e12,
    "matrix_fp32": 67e12,
    "h2d_pinned": 64e9,
}
_SOURCE = "NVIDIA {} datasheet, SXM: Tensor Core rates halved, as they are given with sparsity; PCIe gen5 x16 one way"

FIGURES: dict[str, Figures] = {
    "NVIDIA H200": Figures({**_SXM_DENSE, "d2d": 4.8e12}, _SOURCE.format("H200")),
    "NVIDIA H100 80GB HBM3": Figures({**_SXM_DENSE, "d2d": 3.35e12}, _SOURCE.format("H100")),
}
"""By the name that the driver gives. `d2d` counts bytes read and bytes written."""


def ceilings(stand: Stand) -> Iterator[Line]:
    """Expect measured bandwidths and matrix rates between 50 % and 100 % of the vendor's figures.

    Each figure comes from a datasheet; a device that is not in the table is skipped, never guessed at. A slice of a
    device (MIG) has other figures and another name.
    """
    flags = [] if stand.rehearsed else ["--measure"]
    finished = python(stand, ["-m", "bsprof", "env", *flags, "--json"], timeout_s=150)
    if finished.code:
        raise Unable(f"bsprof env {' '.join(flags)}: {finished.complaint}")
    if stand.rehearsed:
        known = FIGURES["NVIDIA H200"]
        rates: dict[str, Any] | None = {name: {"value": 0.8 * rate} for name, rate in known.rates.items()}
        yield from judge_rates(rates or {}, known)
        return
    rates = find_rates(json.loads(finished.out))
    if rates is None:
        yield fail("ceilings", "bsprof env --measure --json holds no rates")
        return
    figures = FIGURES.get(stand.device.name)
    if figures is None:
        yield skip("ceilings against the vendor's", f"no figures for {stand.device.name}; measured: {sorted(rates)}")
        return
    yield from judge_rates(rates, figures)


def find_rates(document: Any) -> dict[str, Any] | None:
    """Return the first object named `rates` in a JSON document."""
    if isinstance(document, dict):
        rates = document.get("rates")
        if isinstance(rates, dict):
            return rates
        document = list(document.values())
    if isinstance(document, list):
        return next((found for item in document if (found := find_rates(item)) is not None), None)
    return None


def judge_rates(rates: Mapping[str, Mapping[str, Any]], figures: Figures) -> Iterator[Line]:
    """Hold each measured rate against the vendor's."""
    for name, most in figures.rates.items():
        measured = rates.get(name, {}).get("value")
        if measured is None:
            yield fail(name, "was not measured")
            continue
        share = measured / most
        yield judge(
            name,
            LOWEST <= share <= HIGHEST,
            f"{measured:.4g}/s, {share:.0%} of {most:.4g}/s",
            f"{LOWEST:.0%} to {HIGHEST:.0%}",
            f"too {'low' if share < LOWEST else 'high'}; {figures.source}",
            source=figures.source,
        )
