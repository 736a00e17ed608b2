"""The search for the largest batch: its answer, what it costs, and that nothing of it is lost."""

from __future__ import annotations

import io
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import commands
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bsprof import store
from bsprof.errors import BsprofError
from bsprof.model import (
    Axes,
    Block,
    Case,
    LargestBatch,
    LargestBatchSearch,
    Measurement,
    Memory,
    Outcome,
    OutcomeKind,
    Plan,
    Result,
    Samples,
    Settings,
    case_key,
)
from bsprof.report.largest import render_largest, render_searches
from bsprof.sweep.largest import Searched, next_batch, probe_plan, search
from bsprof.sweep.plan import convert_flags, expand, make_plan
from bsprof.sweep.runner import Watcher

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden" / "result-schema-1.json"
MIB = 2**20


class Machine:
    """An executor whose trainings need what `need` says of their batch, in bytes, and may have `total`."""

    def __init__(self, need: Callable[[int], int], total: int, *, tells: bool = True, limit: int = 200) -> None:
        self.need, self.total, self.tells, self.limit = need, total, tells, limit
        self.asked: list[int] = []
        self.plans: list[Plan] = []
        self.other: dict[int, OutcomeKind] = {}

    def measure(self, case: Case, plan: Plan, watcher: Watcher) -> Measurement:
        assert case.settings is not None
        batch = case.settings.batch_size
        self.asked.append(batch)
        self.plans.append(plan)
        if len(self.asked) == self.limit:
            raise KeyboardInterrupt
        if batch in self.other:
            return Measurement(case=case, outcome=Outcome(kind=self.other[batch], message="no good"), wall_s=1.0)
        needed = self.need(batch)
        if needed > self.total:
            return Measurement(case=case, outcome=Outcome(kind="oom", phase="backward"), wall_s=1.0)
        memory = Memory(pool="device", allocated_peak=needed, reserved_peak=needed, total=self.total)
        blocks = [Block(kind=kind, steps=plan.stop.max_steps, wall_ns=1) for kind in ("instrumented", "bare")]
        samples = Samples(batch_size=batch, step_ns=[1], host_ns={"forward": [1]}, blocks=blocks, warmup_ns=[1])
        return Measurement(
            case=case, outcome=Outcome(kind="ok"), wall_s=1.0, samples=samples, memory=memory if self.tells else None
        )


class Log:
    def __init__(self, room: int = 1000) -> None:
        self.kept: list[Measurement] = []
        self.room = room

    def append(self, measurement: Measurement) -> None:
        if len(self.kept) == self.room:
            raise BsprofError("out.json.journal: no space left on device")
        self.kept.append(measurement)


class Silence:
    def started(self, case: Case) -> None: ...
    def advanced(self, case: Case, stage: str, steps: int, precision: float | None) -> None: ...
    def tick(self) -> None: ...
    def finished(self, measurement: Measurement) -> None: ...


class Stop:
    requested = False


def case(**fields: object) -> Case:
    settings = msgspec.convert(fields, Settings)
    return Case(key=case_key(settings), settings=settings)


def run(
    machine: Machine,
    *cases: Case,
    most: int = 2**20,
    done: list[Measurement] | None = None,
    log: Log | None = None,
    stop: Stop | None = None,
) -> Searched:
    plan = Plan(largest_batch=LargestBatchSearch(most=most))
    return search(cases or (case(),), plan, machine, log or Log(), Silence(), stop or Stop(), done or [])


def only(searched: Searched) -> LargestBatch:
    (found,) = searched.found
    return found


# --- the answer -------------------------------------------------------------------------------------


@st.composite
def monotone_needs(draw: st.DrawFn) -> Callable[[int], int]:
    """Straight, bent, stepped and flat: whatever never falls."""
    fixed = draw(st.integers(0, 10**6))
    each = draw(st.integers(0, 10**4))
    power = draw(st.sampled_from([1.0, 1.0, 0.5, 1.3, 2.0]))
    floor = draw(st.integers(0, 10**7))
    step = draw(st.sampled_from([1, 1, 512, 2 * MIB]))
    return lambda batch: -(-max(floor, fixed + round(each * batch**power)) // step) * step


@given(need=monotone_needs(), total=st.integers(0, 10**9), tells=st.booleans())
def test_for_any_monotone_need_the_answer_is_the_largest_and_nothing_is_tried_twice(need, total, tells):
    machine = Machine(need, total, tells=tells)
    found = only(run(machine))
    assert len(machine.asked) == len(set(machine.asked)) == len(found.tried)
    fits = found.batch_size or 0
    assert not fits or need(fits) <= total
    if found.complete:
        assert need(fits + max(1, fits // 64)) > total
    else:
        assert fits == 2**20
    assert len(machine.asked) <= 60


@given(fixed=st.integers(0, 10**9), each=st.integers(1, 10**7), fits=st.integers(64, 10**5))
def test_where_memory_grows_in_proportion_few_tries_are_enough(fixed, each, fits):
    machine = Machine(lambda batch: fixed + each * batch, fixed + each * fits)
    found = only(run(machine))
    assert found.batch_size is not None
    assert found.batch_size <= fits < found.batch_size + max(1, found.batch_size // 64)
    assert len(machine.asked) <= 9
    assert found.predicted == pytest.approx(fits, rel=1e-6)


def test_small_batches_are_found_to_the_sample():
    for fits in range(0, 70):
        found = only(run(Machine(lambda batch: batch, fits)))
        assert (found.batch_size, found.complete) == (fits or None, True)


def test_nothing_fits():
    machine = Machine(lambda batch: 10, 5)
    found = only(run(machine))
    assert found.batch_size is None
    assert found.complete
    assert found.steps == 0
    assert found.tried == {"1": "oom", "2": "oom", "4": "oom", "8": "oom"}
    assert (found.memory_bytes, found.predicted) == (None, None)


def test_no_more_than_most_is_tried():
    machine = Machine(lambda batch: 10, 50)
    found = only(run(machine, most=100))
    assert (found.batch_size, found.complete) == (100, False)
    assert max(machine.asked) == 100


def test_the_prediction_has_seen_no_batch_above_half_of_the_answer():
    """Above 600 samples another algorithm needs more: the prediction is wrong, and stays what it was."""
    machine = Machine(lambda batch: 1000 + 10 * batch if batch <= 600 else 6000 + 30 * batch, 1000 + 10 * 2000)
    found = only(run(machine))
    assert found.batch_size is not None
    assert found.predicted == pytest.approx(2000)
    assert found.batch_size <= 600 < found.batch_size + 10
    assert found.memory_bytes == 21_000


def test_without_three_peaks_there_is_no_prediction():
    found = only(run(Machine(lambda batch: batch, 20)))
    assert (found.predicted, found.predicted_low, found.predicted_high) == (None, None, None)


def test_another_failure_ends_that_search_and_is_kept():
    machine = Machine(lambda batch: batch, 100)
    machine.other = {16: "timeout"}
    searched = run(machine, case(amp="off"), case(amp="bf16"))
    assert machine.asked == [8, 16, 8, 16]
    assert [found.batch_size for found in searched.found] == [8, 8]
    assert [found.tried for found in searched.found] == [{"8": "ok", "16": "timeout"}] * 2
    assert not any(found.complete for found in searched.found)
    assert [m.outcome.kind for m in searched.swept.measurements] == ["ok", "timeout"] * 2


def test_a_batch_that_crashes_does_not_fit():
    """A library that gets no memory may crash instead of saying so."""
    machine = Machine(lambda batch: batch, 1000)
    machine.other = {batch: kind for batch, kind in zip(range(20, 1000), ["crash", "shm"] * 490, strict=True)}
    (found,) = run(machine, case()).found
    assert (found.batch_size, found.complete) == (19, True)


def test_each_combination_has_an_answer_of_its_own():
    searched = run(Machine(lambda batch: batch, 10), case(workers=0), case(workers=1))
    assert [found.settings.workers for found in searched.found] == [0, 1]
    assert [found.batch_size for found in searched.found] == [10, 10]
    keys = [m.case.key for m in searched.swept.measurements]
    assert len(keys) == len(set(keys))


def test_a_try_runs_the_steps_to_survive_and_little_else():
    machine = Machine(lambda batch: batch, 10)
    found = only(run(machine))
    assert found.steps == 51
    for plan in machine.plans:
        assert 2 * plan.stop.min_steps >= 50
        assert plan.stop.min_steps == plan.stop.max_steps
        assert (plan.profile_steps, plan.serialised_steps, plan.repeat) == (0, 0, 1)
        assert plan.largest_batch is not None
        assert plan.stop.max_case_time_s >= plan.deadline_s
    assert probe_plan(Plan(largest_batch=LargestBatchSearch(steps=1))).stop.max_steps == 2


# --- interrupted and resumed ------------------------------------------------------------------------


@given(after=st.integers(1, 30), fits=st.integers(0, 5000))
def test_a_resumed_search_tries_what_is_left_and_nothing_again(after, fits):
    whole = Machine(lambda batch: 7 * batch + 5, 7 * fits + 5)
    expected = run(whole, case(workers=0), case(workers=1))
    first = Machine(lambda batch: 7 * batch + 5, 7 * fits + 5, limit=after)
    stop, log = Stop(), Log()
    original = first.measure

    def measure(case: Case, plan: Plan, watcher: Watcher) -> Measurement:
        if len(first.asked) + 1 == after:
            stop.requested = True
        return original(case, plan, watcher)

    first.measure = measure  # type: ignore[method-assign]
    begun = run(first, case(workers=0), case(workers=1), stop=stop, log=log)
    if stop.requested:
        assert begun.swept.interrupted
        assert log.kept[-1].outcome.kind == "interrupted"
        assert not begun.found[-1].complete
    second = Machine(lambda batch: 7 * batch + 5, 7 * fits + 5)
    done = [m for m in log.kept if m.outcome.kind != "interrupted"]
    ended = run(second, case(workers=0), case(workers=1), done=done)
    assert ended.found == expected.found
    assert len(done) + len(second.asked) == len(whole.asked)
    assert ended.swept.measurements == expected.swept.measurements


def test_a_log_that_fails_ends_all_searches():
    machine = Machine(lambda batch: batch, 100)
    searched = run(machine, case(workers=0), case(workers=1), log=Log(room=3))
    assert len(machine.asked) == 4
    assert searched.swept.failure is not None
    assert [found.tried for found in searched.found][1] == {}
    assert not any(found.complete for found in searched.found)


def test_the_next_batch_is_a_function_of_what_was_tried():
    assert next_batch({}, 2**20) == 8
    assert next_batch({}, 3) == 3


# --- what is asked for ------------------------------------------------------------------------------


def environment(**changes: object):
    return msgspec.structs.replace(store.load(GOLDEN).environment, **changes)


SEARCH = LargestBatchSearch()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(largest_batch=SEARCH, host_memory_bytes=2**30, axes=Axes(batch_size=(8,))), "batch_size"),
        (Plan(largest_batch=SEARCH, host_memory_bytes=2**30, blocks=(Axes(), Axes(batch_size=(8,)))), "batch_size"),
        (Plan(largest_batch=SEARCH, host_memory_bytes=2**30, repeat=3), "repeat"),
        (Plan(largest_batch=SEARCH), "--max-batch"),
    ],
)
def test_what_contradicts_a_search_is_refused(plan, message):
    with pytest.raises(BsprofError, match=message) as refused:
        expand(plan, environment(accelerators=()))
    assert refused.value.hint


def test_a_margin_of_everything_is_refused():
    with pytest.raises(BsprofError, match=r"--max-batch-margin: expected"):
        convert_flags({"largest_batch": {"margin": 1.5}})


def test_a_search_has_no_axis_of_batch_sizes():
    plan = make_plan(
        {"workers": (0, 1)}, environment(), quick=False, stop={}, largest_batch={}, host_memory_bytes=2**30
    )
    assert plan.axes.batch_size is msgspec.UNSET
    assert len(expand(plan, environment()).cases) == 2


# --- its table --------------------------------------------------------------------------------------


def table(searched: Searched, width: int = 120, most: int = 2**20) -> str:
    result = Result(
        created="2026-01-01T00:00:00Z",
        plan=Plan(largest_batch=LargestBatchSearch(most=most)),
        environment=environment(),
        measurements=searched.swept.measurements,
        largest_batches=searched.found,
    )
    assert msgspec.json.decode(store.encode(result), type=Result) == result
    console = Console(width=width, record=True, file=io.StringIO())
    render_largest(result, console)
    return console.export_text()


def test_the_table_says_what_fits_and_what_no_longer_does():
    text = table(run(Machine(lambda batch: batch * MIB, 1000 * MIB), case(amp="off"), case(amp="bf16")))
    assert "largest batch" in text
    assert "1000" in text
    assert "oom in backward" in text
    assert "1000 MiB of 1000 MiB" in text
    assert "bf16" in text
    assert "!" not in text


def test_a_dry_run_says_what_would_be_searched():
    plan = Plan(largest_batch=LargestBatchSearch(margin=0.25, steps=4), deadline_s=60)
    console = Console(width=100, record=True, file=io.StringIO())
    assert plan.largest_batch is not None
    render_searches([case(workers=0), case(workers=1)], plan, plan.largest_batch, console)
    text = " ".join(console.export_text().split())
    for words in ("2 combinations", "4 steps", "25% of the memory", "60 s", "workers"):
        assert words in text
    assert "batch 32" not in text


def test_the_table_says_both_where_prediction_and_search_disagree():
    text = table(run(Machine(lambda batch: batch if batch <= 600 else 3 * batch, 3000)))
    assert "was found where 3000" in text


def test_the_table_says_why_a_search_has_no_end():
    assert "no larger batch was to be tried" in table(run(Machine(lambda batch: 1, 2), most=64), most=64)
    assert "it is not finished" in table(run(Machine(lambda batch: 1, 2, limit=3)))
    machine = Machine(lambda batch: batch, 100)
    machine.other = {32: "timeout"}
    text = table(run(machine))
    assert "at least 16" in text
    assert "timeout: no good" in text


def test_a_result_without_searches_has_no_such_table():
    assert table(Searched(run(Machine(lambda batch: 1, 0)).swept, [])) == ""


# --- real processes ---------------------------------------------------------------------------------

PLAN = """
host_memory_bytes = 2147483648
[largest_batch]
margin = 0.1
steps = 4
[axes]
model = ["factories:Hungry"]
data = ["factories:Pixels"]
workers = [0]
threads = [1]
"""


def bench(directory: Path, *arguments: str) -> tuple[int, str, str]:
    done = commands.run(directory, "bench", *arguments)
    return done.returncode, done.stdout, done.stderr


def check(result: Result) -> LargestBatch:
    """Hold what was found against the measurements."""
    (found,) = result.largest_batches
    by_batch = {m.case.settings.batch_size: m for m in result.measurements if m.case.settings}
    assert {str(batch): m.outcome.kind for batch, m in by_batch.items()} == found.tried
    assert found.complete
    assert found.batch_size is not None
    assert by_batch[found.batch_size].outcome.kind == "ok"
    beyond = by_batch[found.batch_size + 1].outcome
    assert (beyond.kind, beyond.phase) == ("host_oom", "forward")
    assert beyond.evidence["asked_bytes"] == (found.batch_size + 1) * 2**25
    assert beyond.evidence["limit_bytes"]
    return found


def test_a_search_in_real_processes_killed_and_resumed(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN)
    process = commands.start(tmp_path, "bench", "--plan", "plan.toml", "-o", "out.json")
    journal = tmp_path / "out.json.journal"
    end = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = [json.loads(line) for line in journal.read_bytes().split(b"\n")[1:-1]]
    assert kept

    code, out, err = bench(tmp_path, "--resume", "out.json")
    assert code == 0, err
    result = store.load(tmp_path / "out.json")
    found = check(result)
    assert f"{found.batch_size + 1}: host_oom in forward" in out  # type: ignore[operator]
    tried = [m.case.key for m in result.measurements]
    assert [line["case"]["key"] for line in kept] == tried[: len(kept)]
    assert found.steps >= 4
    assert store.read_plan(tmp_path / "out.json") == store.read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-batch", "--batch-size", "8", "--host-memory", "1GiB"), "--batch-size and --max-batch"),
        (("--max-batch", "--max-batch-margin", "nan", "--host-memory", "1GiB"), "--max-batch-margin: nan"),
        (("--max-batch-margin", "0.1"), "--max-batch-margin: there is no search"),
    ],
)
def test_flags_that_contradict_each_other_are_named(tmp_path, arguments, message):
    code, out, err = bench(tmp_path, *arguments)
    assert code == 2
    assert message in err
    assert "hint: " in err
    assert out == ""
