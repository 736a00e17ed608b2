"""What a cause of slow loading is, and the words and figures that all of them use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from bsprof.evidence import Scene
from bsprof.loading import MAIN, Change, Loading, Worker
from bsprof.replay import (
    Load,
    Setting,
)

Remove: TypeAlias = Callable[[Load, Setting], tuple[Load, Setting]]
Evidence: TypeAlias = dict[str, float | int | str | None]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A cause for which there is evidence, before it is known what it costs."""

    label: str
    """In the first sentence: 'decode (71 % of worker CPU)'."""
    text: str
    evidence: Evidence
    prescription: str
    remove: Remove | None = None
    """What a load and a setting would be without the cause; None where `gives_back` is known, and for a risk."""
    gives_back: float | None = None
    change: Change | None = None
    code_change: str | None = None
    not_separable_from: tuple[str, ...] = ()
    takes: frozenset[str] = field(default=frozenset())
    """Stages whose time it accounts for, so that they are no causes besides."""
    size_s: float = 0.0
    """Time of a batch that it is about: decides between causes that give back alike."""
    vague: bool = False
    """Whether quite other causes would leave the same evidence: then it explains no other, nor stands before one."""
    even_if_free: bool = False
    """Whether a loop that is input-bound has to hear of it although it gives nothing back: then it is a risk."""


class Judged(NamedTuple):
    """What a rule is given: the scene, and the load as it is without the causes that explain this one."""

    scene: Scene
    load: Load
    setting: Setting
    taken: frozenset[str]
    """Stages that another cause accounts for."""

    @property
    def loading(self) -> Loading:
        """The recording itself."""
        return self.scene.loading


class Rule(NamedTuple):
    """One cause: what it is called, how it is found, and how it stands to the others."""

    code: str
    find: Callable[[Judged], Iterator[Found]]
    rank: Literal["specific", "beside", "setting", "general", "start", "risk"]
    """Among causes that give back alike the specific one stands first, then the one that a setting cures. A `start` is
    judged by the time of epochs, what is `beside` by the consumer's own part of the step, a `risk` costs no time yet:
    all three whether or not the loop is input-bound."""
    side: Literal["worker", "consumer", "both"] = "worker"
    """Whose time it takes. Workers and consumer run side by side: trouble of the one hides that of the other."""
    explains: tuple[str, ...] = ()
    """Causes that are judged with this one taken away; an asterisk for all that stand below it."""


def time(value_s: float) -> str:
    """Return a duration in the unit that it is read in: `41 ms`, `0.3 ms`, `1.2 s`."""
    if value_s >= 1:
        return f"{value_s:.3g} s"
    if value_s >= 0.1e-3:
        return f"{value_s * 1e3:.0f} ms" if value_s >= 10e-3 else f"{value_s * 1e3:.2g} ms"
    return f"{value_s * 1e6:.3g} µs"


def size(value: float) -> str:
    """Return bytes in the unit that they are read in."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def share(value: float) -> str:
    """Return a share in per cent."""
    return f"{value:.0%}".replace("%", " %") if value >= 0.1 else f"{value * 100:.2g} %"


def mean_of(values: list[int | None]) -> float | None:
    """Return the mean of what was captured; None where nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def workers_of(j: Judged) -> list[Worker]:
    """Return the worker processes, without the consuming one."""
    return [worker for worker in j.loading.workers if worker.id != MAIN]


def taken_at_once(scene: Scene, load: Load) -> Load:
    """Return the load with a consumer that does not wait for a core either, which it did as much as the workers."""
    return load._replace(handoff_s=load.handoff_s * (1 - scene.runqueue_share))


def without_stage(scene: Scene, load: Load, stage: str, part: float = 1.0) -> Load:
    """Return the load with `part` of a stage's time taken out of every batch."""
    row, rows = scene.stages[stage], scene.stages.values()

    def kept(of: str) -> float:
        own, whole = getattr(row, of), [getattr(other, of) for other in rows]
        if own is None or None in whole or sum(whole) <= 0:
            own, whole = row.wall_s, [other.wall_s for other in rows]
        return max(0.0, 1 - part * own / sum(whole)) if sum(whole) > 0 else 1.0

    return load._replace(cpu_s=load.cpu_s * kept("cpu_s"), blocked_s=load.blocked_s * kept("blocked_s"))


def takes_out(scene: Scene, stage: str, part: float = 1.0) -> Remove:
    """Return what takes `part` of a stage's time out of a load."""
    return lambda load, setting: (without_stage(scene, load, stage, part), setting)
