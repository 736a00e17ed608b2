"""A diagnosis of a loader as text: the verdict, causes and cures first, then the figures that they rest on.

Every table holds only what was captured. Nothing is printed where nothing was.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from bsprof.loading import MAIN, Cause, Consumer, Diagnosis, Loading, Rate, Verification, Worker
from bsprof.report import figures
from bsprof.report.batches import (
    render_depth,
    render_samples,
    render_waits,
    render_where,
    render_workers,
    short_name,
)
from bsprof.report.grid import heading, print_line, print_words
from bsprof.report.predictions import arguments, is_measured, render_sweep, render_verifications, speedup

_VERDICTS = {
    "not_input_bound": ("not input-bound", "green"),
    "moderately_input_bound": ("moderately input-bound", "yellow"),
    "highly_input_bound": ("highly input-bound", "red"),
    "no_step": ("the loader alone", "cyan"),
    "unknown": ("unknown", "yellow"),
}

_NEGLIGIBLE = 0.005
"""Share of the consumer's own part of a step below which nobody would miss it."""


def render_loading(
    loading: Loading,
    diagnosis: Diagnosis,
    console: Console,
    *,
    sweep: bool = False,
    verifications: Sequence[Verification] = (),
) -> None:
    """Print a loading and its diagnosis, from the verdict down to the figures it rests on.

    `sweep` adds what other settings are predicted to deliver, `verifications` what a change was measured to give.
    Fits `console.width` down to 80 columns, but for code, which is never wrapped; without colour where the console has
    none.
    """
    _render_verdict(loading, diagnosis, console)
    _render_causes(diagnosis, console)
    render_verifications(verifications, console)
    if sweep:
        render_sweep(loading.settings, diagnosis, console)
    render_where(loading, console)
    render_waits(diagnosis, console)
    render_workers(loading, console)
    render_samples(loading, console)
    render_depth(loading, console)
    _render_rest(loading, diagnosis, console)
    _render_notes(loading, console)


def render_short(diagnosis: Diagnosis) -> Text:
    """Return a diagnosis in one line: the verdict, the wait, the first cause and what to change."""
    name, colour = _VERDICTS[diagnosis.verdict]
    text = Text.assemble((name, f"bold {colour}"))
    if diagnosis.wait_s is not None and diagnosis.step_s is not None and diagnosis.verdict != "no_step":
        text.append(f", waits {figures.duration(diagnosis.wait_s)} of {figures.duration(diagnosis.step_s)}")
        text.append(f" ({figures.percent(diagnosis.wait_share)})" if diagnosis.wait_share is not None else "")
    first = next(iter(diagnosis.causes), None)
    if first is not None:
        share = "" if first.gives_back is None else f" ({figures.percent(first.gives_back)} of the {_whole(diagnosis)})"
        cure = arguments(first.change) if first.change else _tight(first.prescription)
        text.append(f": {_name(first)}{share} → {cure}")
    text.plain = figures.printable(text.plain)
    return text


# --- the verdict ----------------------------------------------------------------------------------------


def _render_verdict(loading: Loading, diagnosis: Diagnosis, console: Console) -> None:
    """Print the sentence, its first words bold, then what was watched and who took the batches."""
    colour = _VERDICTS[diagnosis.verdict][1]
    head, colon, rest = _tight(diagnosis.sentence).partition(":")
    print_words(console, Text.assemble((head + colon, f"bold {colour}"), rest), indent=0)
    print_words(console, Text(" · ".join(_watched(loading)), "dim"), indent=0)
    console.print()


def _watched(loading: Loading) -> Iterator[str]:
    settings, batches = loading.settings, loading.batches
    yield settings.kind + (f" of {settings.dataset}" if settings.dataset else "")
    for name, value in (
        ("batch", settings.batch_size),
        ("workers", settings.workers),
        ("prefetch", settings.prefetch),
        ("", settings.start_method),
        ("", settings.persistent_workers and "persistent workers"),
        ("", settings.pinned and "pinned"),
        ("", settings.in_order is False and "out of order"),
    ):
        if value is not None and value is not False:
            yield f"{name} {value}".strip()
    count = sum(got is not None for got in batches.got_at_ns)
    epochs = len(loading.epochs)
    within = f" in {epochs} epochs" if epochs > 1 else ""
    yield f"{figures.plural(count, 'batch', 'batches')}{within}, {figures.duration(loading.window_ns * 1e-9)}"
    yield _taker(loading.consumer)


def _taker(consumer: Consumer) -> str:
    if consumer.kind == "fastest":
        return "taken as fast as possible"
    if consumer.kind == "fixed" and consumer.step_ns is not None:
        return f"taken with a pause of {figures.duration(consumer.step_ns * 1e-9)} each"
    if consumer.kind == "model":
        return f"taken by training {consumer.model}" if consumer.model else "taken by training a model"
    return "taken by your own loop"


# --- causes ---------------------------------------------------------------------------------------------


def _render_causes(diagnosis: Diagnosis, console: Console) -> None:
    costly = [cause for cause in diagnosis.causes if cause.gives_back is not None]
    risks = [cause for cause in diagnosis.causes if cause.gives_back is None]
    if costly:
        heading(console, "Causes", f"by the share of the {_whole(diagnosis)} that removing each alone would give back")
    for place, cause in enumerate(costly, 1):
        title = Text.assemble(f"{place}. ", (_name(cause), "bold"), f"  {_gain(cause)}")
        _render_cause(cause, title, console)
    if costly:
        console.print()
    if risks:
        heading(console, "Risks", "they cost no time yet")
    for cause in risks:
        _render_cause(cause, Text.assemble("! ", (_name(cause), "bold")), console)
    if risks:
        console.print()


def _render_cause(cause: Cause, title: Text, console: Console) -> None:
    print_words(console, title)
    print_words(console, _tight(cause.text), indent=5)
    print_words(console, Text.assemble(("→ ", "bold"), _tight(cause.prescription)), indent=5)
    code = cause.code_change or ""
    if not code and cause.change and arguments(cause.change) not in cause.prescription:
        code = f"DataLoader(…, {arguments(cause.change)})"
    for line in code.strip("\n").splitlines():
        # Code is never wrapped or cut, so that it can be copied.
        console.print(Text(f"         {figures.printable(line)}", "cyan"), soft_wrap=True, highlight=False)
    if cause.not_separable_from:
        names = ", ".join(_words(code) for code in cause.not_separable_from)
        print_words(console, Text(f"the evidence does not separate it from: {names}", "dim"), indent=5)


def _gain(cause: Cause) -> str:
    text = figures.percent(cause.gives_back)
    if cause.gives_back_low is not None and cause.gives_back_high is not None:
        text += f" [{figures.percent(cause.gives_back_low)}, {figures.percent(cause.gives_back_high)}]"
    return text


def _tight(text: str) -> str:
    """Put a figure and its percent sign together, so that no line ends between the two."""
    return re.sub(r"(?<=\d) %", "%", text)


def _name(cause: Cause) -> str:
    """Name a cause, and the stage that it is about where it is about one: `slow stage: decode`."""
    stage = cause.evidence.get("stage")
    return _words(cause.code) + (f": {short_name(stage)}" if isinstance(stage, str) else "")


def _whole(diagnosis: Diagnosis) -> str:
    """Say of what a cause gives a share back."""
    return "time between batches" if diagnosis.verdict == "no_step" else "step"


def _words(code: str) -> str:
    return code.replace("_", " ")


# --- one line each ----------------------------------------------------------------------------------------


def _render_rest(loading: Loading, diagnosis: Diagnosis, console: Console) -> None:
    lines = [
        ("start-up", _startup(loading)),
        ("blocked in", _blocked_in(loading.workers)),
        ("cached", _cached(loading, diagnosis)),
        ("contention", _contention(loading, diagnosis)),
        ("machine", _machine(loading)),
        ("GIL", _gil(loading)),
        ("resources", _resources(loading)),
        ("best", _best(loading, diagnosis)),
        ("bsprof", _own_cost(loading)),
    ]
    told = [(label, text) for label, text in lines if text]
    if not told:
        return
    width = max(len(label) for label, _ in told)
    for label, text in told:
        paragraph = Text(text).wrap(console, max(console.width - width - 4, 20))
        for index, part in enumerate(paragraph):
            part.rstrip()
            shown = label if index == 0 else ""
            print_line(console, Text.assemble("  ", (f"{shown:<{width}}", "bold"), "  ", part))
    console.print()


def _startup(loading: Loading) -> str:
    epochs, batches = loading.epochs, loading.batches
    if not epochs:
        return ""
    firsts: dict[int, int] = {}
    for epoch, got in zip(batches.epoch, batches.got_at_ns, strict=True):
        if got is not None:
            firsts[epoch] = min(got, firsts.get(epoch, got))
    several = len(epochs) > 1
    numbered = dict(enumerate(epochs))
    parts = [
        ("iter()", [one.ready_at_ns - one.began_at_ns for one in epochs]),
        ("then the first batch", [got - numbered[key].ready_at_ns for key, got in firsts.items() if key in numbered]),
        (
            "StopIteration",
            [
                one.ended_at_ns - one.last_asked_at_ns
                for one in epochs
                if one.ended_at_ns is not None and one.last_asked_at_ns is not None
            ],
        ),
        (
            "from one epoch's end to the next one's first batch",
            [
                got - at
                for key, got in firsts.items()
                if key - 1 in numbered and (at := numbered[key - 1].last_asked_at_ns) is not None
            ],
        ),
        (
            "a worker has the data set after",
            [
                one.entered_at_ns - numbered[one.epoch].began_at_ns
                for one in loading.workers
                if one.id != MAIN and one.entered_at_ns is not None and one.epoch in numbered
            ],
        ),
        (
            "worker_init_fn",
            [
                one.ready_at_ns - one.entered_at_ns
                for one in loading.workers
                if one.id != MAIN and one.ready_at_ns is not None and one.entered_at_ns is not None
            ],
        ),
    ]
    said = [f"{name} {figures.duration(statistics.median(times) * 1e-9)}" for name, times in parts if times]
    pickled = max((one.pickled_bytes for one in epochs if one.pickled_bytes is not None), default=None)
    if pickled is not None:
        said.append(f"{figures.size(pickled)} pickled for the workers")
    return " · ".join(said) + (f" (medians of {len(epochs)} epochs)" if several else "")


def _blocked_in(workers: Sequence[Worker]) -> str:
    looks = sum(one.looks for one in workers)
    seen = sum((Counter(one.blocked_in) for one in workers), Counter[str]())
    if not looks:
        return ""
    if not seen:
        return f"nothing, at any of {looks} looks at the workers"
    most = [f"{short_name(name)} {figures.percent(count / looks)}" for name, count in seen.most_common(4)]
    return f"{' · '.join(most)} of {looks} looks at the workers"


def _cached(loading: Loading, diagnosis: Diagnosis) -> str:
    if not loading.cached_step_ns:
        return ""
    step = statistics.median(loading.cached_step_ns) * 1e-9
    text = f"{figures.duration(step)} a step on batches that are there already, while no worker runs"
    if step and diagnosis.step_s:
        ratio = diagnosis.step_s / step
        faster = f"{figures.rate(ratio)}× as fast" if ratio > 1 else "no faster"  # noqa: RUF001
        text += f": with a perfect loader the steps would be {faster}"
    return text


def _contention(loading: Loading, diagnosis: Diagnosis) -> str:
    if diagnosis.contention_s is None or not diagnosis.busy_s or not loading.settings.workers:
        return ""
    share = diagnosis.contention_s / diagnosis.busy_s
    if share < _NEGLIGIBLE:
        return "the workers do not lengthen the consumer's own part of the step"
    return (
        f"the workers lengthen the consumer's own part of the step by {figures.duration(diagnosis.contention_s)}, "
        f"{figures.percent(share)} of its {figures.duration(diagnosis.busy_s)}"
    )


def _machine(loading: Loading) -> str:
    machine, capacity = loading.machine, loading.capacity_cores
    parts = []
    if machine is not None:
        parts.append(f"{machine.cores:g} cores")
        for text, cores in (("this program took", machine.own_cores), ("others took", machine.foreign_cores)):
            if cores is not None:
                parts.append(f"{text} {figures.rate(cores)}")
    if capacity is not None:
        interval = (
            "" if capacity.low is None or capacity.high is None else f" [{capacity.low:.2f}, {capacity.high:.2f}]"
        )
        parts.append(f"{capacity.value:.2f}{interval} really ran at once")
    if machine is not None:
        for text, share in (
            ("stolen", machine.stolen_share),
            ("throttled", machine.throttled_share),
            ("waiting for a core", machine.pressure_share),
        ):
            if share:
                parts.append(f"{text} {figures.percent(share)} of the time")
    return " · ".join(parts)


def _gil(loading: Loading) -> str:
    if not loading.gil_overshoot_ns:
        return ""
    middle, most = statistics.median(loading.gil_overshoot_ns), max(loading.gil_overshoot_ns)
    return (
        "a thread of the consumer that sleeps for 1 ms gets the interpreter "
        f"{figures.duration(middle * 1e-9)} late (median), {figures.duration(most * 1e-9)} at most"
    )


def _resources(loading: Loading) -> str:
    found = loading.resources
    if found is None:
        return ""
    parts = []
    if found.shm_free_bytes is not None:
        whole = "" if found.shm_bytes is None else f" of {figures.size(found.shm_bytes)}"
        parts.append(f"{figures.size(found.shm_free_bytes)}{whole} shared memory free at the least")
    if found.open_files is not None:
        limit = "" if found.open_files_limit is None else f" of {found.open_files_limit}"
        parts.append(f"{found.open_files}{limit} files open at the most")
    if found.sharing is not None:
        parts.append(f"tensors shared by {_words(found.sharing)}")
    return " · ".join(parts)


def _best(loading: Loading, diagnosis: Diagnosis) -> str:
    best = diagnosis.best
    if best is None:
        return ""
    if is_measured(best, loading.settings):
        return "as it is, it is the smallest setting predicted to come within 2% of the best"
    prefetch = "" if best.prefetch is None or not best.workers else f", prefetch_factor={best.prefetch}"
    order = "" if best.in_order else ", in_order=False"
    rate = Rate(value=best.speedup, low=best.speedup_low, high=best.speedup_high)
    return (
        f"num_workers={best.workers}{prefetch}{order} is the smallest setting within 2% of the best: "
        f"predicted {speedup(rate)}"
    )


def _own_cost(loading: Loading) -> str:
    """Say what watching cost, and what that is of the time in which the batches here were made."""
    probe, batches = loading.probe, loading.batches
    if probe is None:
        return ""
    calls = sum(stage.calls for stage in loading.stages.values())
    text = f"watching costs {_price(probe.batch_ns)} a batch, {_price(probe.sample_ns)} a sample"
    text += f", {_price(probe.stage_ns)} a call of a stage" if calls else ""
    fetches = [
        produced - begun
        for begun, produced in zip(batches.begun_at_ns, batches.produced_at_ns, strict=True)
        if begun is not None and produced is not None
    ]
    if sum(fetches) <= 0:
        return text
    samples = loading.samples.count if loading.samples is not None else 0
    whole = sum(cpu is not None for cpu in batches.cpu_ns)
    brief = max(0, len(fetches) - whole)
    cost = whole * probe.batch_ns + brief * (probe.brief_ns or 0.0) + samples * probe.sample_ns + calls * probe.stage_ns
    return f"{text}: {figures.percent(cost / sum(fetches))} of the time in which batches are made"


def _price(ns: float) -> str:
    return f"{ns:.0f} ns" if ns < 1000 else figures.duration(ns * 1e-9)


def _render_notes(loading: Loading, console: Console) -> None:
    for note in loading.notes:
        print_words(console, Text.assemble(("! ", "yellow"), note.text))
    if loading.dropped:
        lost = figures.plural(loading.dropped, "batch was", "batches were")
        print_words(console, Text.assemble(("! ", "yellow"), f"{lost} not recorded: the recording was full"))
    if loading.notes or loading.dropped:
        console.print()
