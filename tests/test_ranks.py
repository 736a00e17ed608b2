"""A case with several ranks: real processes, gloo, real deaths."""

from __future__ import annotations

import contextlib
import os
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from commands import by_name, eventually, only_result, run
from machines import environment

from bsprof.errors import BsprofError
from bsprof.measure.case import CaseRun
from bsprof.measure.ranks import Answer, hanging, has_lost_another, put_together
from bsprof.measure.world import Alone
from bsprof.model import (
    Axes,
    Case,
    Energy,
    Environment,
    Measurement,
    Outcome,
    Plan,
    Rank,
    Samples,
    Settings,
    Telemetry,
    case_key,
)
from bsprof.noun import Note
from bsprof.sweep.plan import collapse, expand, worlds
from bsprof.workloads.loading import EndlessSampler

WORLD = (
    "--data", "factories:Pixels", "--workers", "0", "--threads", "1", "--batch-size", "4", "--order", "listed",
    "--max-case-time", "2", "--precision", "0.5",
)  # fmt: skip


def at_work_in(directory: Path) -> list[psutil.Process]:
    """Return the processes that are there: all of a case are, its ranks and their server too.

    This process' own children may be: the fork server that cases come from was started in some directory.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(directory) and os.getpid() not in (process.pid, process.ppid()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scaled")
    done = run(directory, "bench", "--model", "factories:Perceptron", *WORLD, "--world-size", "1,2")
    assert done.returncode == 0, done.stderr + done.stdout
    assert eventually(lambda: not at_work_in(directory))
    return by_name(only_result(directory), "world_size"), done


def test_ranks_train_together_and_each_tells_its_own_steps(scaled):
    found, _ = scaled
    alone, both = found["1"], found["2"]
    assert both.outcome.kind == "ok", both.outcome
    assert [one.rank for one in both.ranks] == [0, 1]
    assert not alone.ranks
    assert alone.samples.batch_size == 4
    assert both.samples.batch_size == 8
    assert [one.samples.batch_size for one in both.ranks] == [4, 4]
    lengths = {len(one.samples.step_ns) for one in both.ranks}
    assert len(lengths) == 1
    assert both.facts.threads == 1
    assert both.inside_s is not None


def test_what_a_rank_does_before_its_first_exchange_is_part_of_backward(scaled):
    found, _ = scaled
    for rank in found["2"].ranks:
        backward = rank.samples.host_ns["backward"]
        assert len(rank.before_reduce_ns) == len(backward)
        assert all(0 <= before <= whole for before, whole in zip(rank.before_reduce_ns, backward, strict=True))
        assert any(before > 0 for before in rank.before_reduce_ns)
        assert set(rank.samples.host_ns) == {"data", "h2d", "forward", "backward", "optimizer"}


def test_blocks_with_and_without_an_exchange_come_in_turns_on_all_ranks_alike(scaled):
    found, _ = scaled
    kinds = [[(block.kind, block.steps) for block in rank.blocks] for rank in found["2"].ranks]
    assert kinds[0] == kinds[1]
    assert len(kinds[0]) >= 4
    pairs = list(zip(kinds[0][::2], kinds[0][1::2], strict=True))
    assert all({a[0], b[0]} == {"synchronised", "unsynchronised"} for a, b in pairs)
    assert pairs[0][0] != pairs[1][0]


def test_the_bytes_exchanged_are_those_of_the_gradients(scaled):
    found, _ = scaled
    told = found["2"].communication
    assert told.backend == "gloo"
    assert sum(told.bucket_bytes) == 4 * found["2"].facts.parameters
    assert found["1"].communication is None


def test_a_rank_that_fails_ends_its_case_alone_and_is_named(tmp_path):
    names = ("Killed", "Raises", "Leaves", "OutOfMemory")
    done = run(
        tmp_path, "bench", *WORLD, "--world-size", "2", "--deadline", "120",
        "--model", ",".join([*(f"rank_models:{name}" for name in names), "factories:Perceptron"]),
    )  # fmt: skip
    assert eventually(lambda: not at_work_in(tmp_path))
    found = by_name(only_result(tmp_path), "model")
    assert done.returncode == 0, done.stderr
    outcomes = {name: found[name].outcome for name in (*names, "Perceptron")}
    assert {name: outcome.kind for name, outcome in outcomes.items()} == {
        "Killed": "crash",
        "Raises": "error",
        "Leaves": "crash",
        "OutOfMemory": "host_oom",
        "Perceptron": "ok",
    }
    for name in names:
        assert (outcomes[name].message or "").startswith("rank 1"), outcomes[name]
        assert outcomes[name].evidence["rank"] == 1
    assert "SIGKILL" in outcomes["Killed"].message
    assert "no weights today" in outcomes["Raises"].message
    assert outcomes["Raises"].phase == "forward"
    assert "code 5" in outcomes["Leaves"].message


def test_a_rank_that_hangs_is_named_with_its_place(tmp_path):
    # Most of the deadline is for the ranks' start on a busy machine.
    done = run(
        tmp_path, "bench", *WORLD, "--world-size", "2", "--deadline", "15", "--model", "rank_models:Hangs",
    )  # fmt: skip
    assert eventually(lambda: not at_work_in(tmp_path))
    assert done.returncode == 2, done.stderr
    (measurement,) = only_result(tmp_path).measurements
    outcome = measurement.outcome
    assert outcome.kind == "timeout", outcome
    assert outcome.phase == "forward"
    assert outcome.message.startswith("rank 1 still in forward after 15 s (rank_models.py:")
    assert outcome.message.endswith("rank 0 waits for it")


def test_a_hook_of_ones_own_is_part_of_the_exchange(tmp_path):
    done = run(
        tmp_path, "bench", "--model", "factories:Perceptron", *WORLD, "--world-size", "2",
        "--comm-hook", "none,rank_models:slow_hook,fp16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = by_name(only_result(tmp_path), "comm_hook")

    def exposed(name: str) -> float:
        means = {}
        for kind in ("synchronised", "unsynchronised"):
            blocks = [block for block in found[name].ranks[0].blocks if block.kind == kind]
            means[kind] = sum(block.wall_ns for block in blocks) / sum(block.steps for block in blocks)
        return (means["synchronised"] - means["unsynchronised"]) / 1e6

    assert {name: one.outcome.kind for name, one in found.items()} == {"none": "ok", "slow_hook": "ok", "fp16": "ok"}
    assert exposed("slow_hook") - exposed("none") > 5


class OneOfFour(Alone):
    """Rank 2 of four on this machine, whose peers are not needed to build."""

    rank = local_rank = 2
    size = local_size = 4


def test_ranks_share_the_cores_and_workers_beyond_them_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("bsprof.measure.case.cores_of_this_process", lambda: 6)
    threads = torch.get_num_threads()
    found = {}
    for workers in (1, 2):
        settings = Settings(model="mnist_cnn", data="synthetic", image_size=28, workers=workers, world_size=4)
        case = Case(key="k", settings=settings)
        run = CaseRun(case, Plan(malloc="default"), tmp_path, lambda *_: None, None, world=OneOfFour())
        run.build()
        found[workers] = [note.text for note in run.notes]
        assert run.facts.threads == 1
    torch.set_num_threads(threads)
    assert found[1] == []
    assert found[2] == ["4 ranks with 2 workers each: 8 processes on this machine load with 6 cores"]


# --- data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_one_shuffle_an_epoch(ranks):
    size = 12
    orders = [list(islice(EndlessSampler(size, 5, (rank, ranks)), 2 * size // ranks)) for rank in range(ranks)]
    each = size // ranks
    for epoch in range(2):
        parts = [order[epoch * each : (epoch + 1) * each] for order in orders]
        assert sorted(index for part in parts for index in part) == list(range(size))
    assert orders[0][:each] != orders[0][each:]


def test_uneven_data_gives_every_rank_as_much():
    orders = [list(islice(EndlessSampler(7, 0, (rank, 2)), 4)) for rank in range(2)]
    assert {len(order) for order in orders} == {4}
    assert set(orders[0]) | set(orders[1]) == set(range(7))


# --- plans ------------------------------------------------------------------------------------------


@pytest.fixture
def machine() -> Environment:
    return environment(accelerators=(), cores_usable=6)


def test_weak_scaling_gives_each_rank_the_batch_and_strong_shares_it(machine):
    axes = Axes(batch_size=(32,), world_size=(1, 2, 4))
    for scaling, batches in (("weak", {1: 32, 2: 32, 4: 32}), ("strong", {1: 32, 2: 16, 4: 8})):
        cases = expand(Plan(axes=axes, scaling=scaling), machine).cases
        assert {case.settings.world_size: case.settings.batch_size for case in cases} == batches


def test_a_batch_that_cannot_be_shared_equally_is_refused(machine):
    plan = Plan(axes=Axes(batch_size=(30,), world_size=(4,)), scaling="strong")
    with pytest.raises(BsprofError, match="30 cannot be shared equally by 4 ranks") as caught:
        expand(plan, machine)
    assert "32" in (caught.value.hint or "")


def test_a_world_that_the_machine_cannot_make_is_refused(machine):
    plan = Plan(axes=Axes(world_size=(3,)), nodes=2)
    with pytest.raises(BsprofError, match="3 ranks cannot be shared equally by 2 nodes"):
        expand(plan, machine)


def test_auto_means_powers_of_two_and_all(machine):
    assert worlds(machine, 1) == (1, 2, 4, 6)
    assert worlds(machine, 2) == (2, 4, 8, 12)


def test_what_only_ranks_have_means_nothing_in_a_world_of_one(machine):
    alone = collapse(Settings(comm_hook="fp16", sync_batchnorm=True), machine)
    assert alone.comm_hook == "none"
    assert case_key(alone) == case_key(collapse(Settings(), machine))
    both = collapse(Settings(comm_hook="fp16", sync_batchnorm=True, world_size=2), machine)
    assert both.comm_hook == "fp16"
    assert not both.sync_batchnorm


# --- put together -----------------------------------------------------------------------------------

CASE = Case(key="k", settings=Settings(world_size=3, batch_size=2))


def answer(rank: int, outcome: Outcome | None = None, *, step_ns: int = 10, lost: bool = False, **more) -> Answer:
    samples = Samples(batch_size=2, step_ns=[step_ns] * 4, host_ns={})
    measurement = Measurement(case=CASE, outcome=outcome or Outcome(kind="ok"), wall_s=1.0, samples=samples, **more)
    return Answer(rank=Rank(rank=rank, node=0, host="h", samples=samples), measurement=measurement, lost=lost)


def test_the_figures_are_those_of_the_slowest_rank():
    told = put_together(CASE, {rank: answer(rank, step_ns=10 + rank) for rank in (2, 0, 1)}, {}, None, None)
    assert told.outcome.kind == "ok"
    assert told.samples.step_ns == [12] * 4
    assert told.samples.batch_size == 6
    assert [one.rank for one in told.ranks] == [0, 1, 2]


def energetic(rank: int, joules: float | None) -> Answer:
    energy = Energy(
        joules=joules, source="counter", window_ns=10**9, steps=4.0, updates=9, resolvable=joules is not None
    )
    return answer(rank, telemetry=Telemetry(source="nvml", time_ns=[0], window_ns=10**9, energy=energy))


def test_energy_is_that_of_all_devices_or_not_told():
    whole = put_together(CASE, {rank: energetic(rank, 8.0 + rank) for rank in range(3)}, {}, None, None)
    assert whole.telemetry.energy.joules == pytest.approx(27)
    part = put_together(CASE, {rank: energetic(rank, 8.0 if rank else None) for rank in range(3)}, {}, None, None)
    assert part.telemetry.energy.joules is None
    assert not part.telemetry.energy.resolvable


def test_the_cause_goes_before_those_that_only_lost_a_peer():
    lost = Outcome(kind="error", message="Connection closed by peer")
    cause = Outcome(kind="oom", message="out of memory", evidence={"asked_bytes": 4})
    told = put_together(CASE, {0: answer(0, lost, lost=True), 2: answer(2, cause)}, {}, "a rank failed", None)
    assert told.outcome.kind == "oom"
    assert told.outcome.message == "rank 2: out of memory"
    assert told.outcome.evidence == {"asked_bytes": 4, "rank": 2}


def test_a_death_goes_before_what_others_say_of_it():
    lost = Outcome(kind="error", message="Connection closed by peer")
    told = put_together(CASE, {0: answer(0, lost, lost=True)}, {1: -9}, "a rank failed", None)
    assert told.outcome.kind == "crash"
    assert told.outcome.message == "rank 1: killed by SIGKILL"


def test_ranks_that_never_came_are_told():
    told = put_together(CASE, {}, {}, "RendezvousTimeoutError: x", None)
    assert told.outcome.kind == "crash"
    assert "RendezvousTimeoutError" in told.outcome.message
    part = put_together(CASE, {0: answer(0)}, {}, None, None)
    assert part.outcome.kind == "crash"
    assert "1, 2" in part.outcome.message


def test_a_note_of_some_ranks_says_of_which():
    common = Note(code="steal", text="stolen")
    own = Note(code="no_steady_state", text="not steady")
    told = put_together(
        CASE, {0: answer(0, notes=(common,)), 1: answer(1, notes=(common, own)), 2: answer(2, notes=(common,))},
        {}, None, None,
    )  # fmt: skip
    assert [note.text for note in told.notes] == ["stolen", "not steady (rank 1)"]


STACK = """Current thread 0x1 (most recent call first):
  File "{inner}", line 7 in {name}
  File "/x/bsprof/measure/loop.py", line 120 in {stage}
  File "/x/bsprof/measure/loop.py", line 40 in run_block
"""


def test_whoever_does_not_wait_is_the_one_that_hangs():
    waits = STACK.format(inner="/t/autograd/__init__.py", name="backward", stage="backward")
    sleeps = STACK.format(inner="/u/mine.py", name="act", stage="forward")
    outcome = hanging({0: waits, 1: sleeps, 2: waits}, 30.0)
    assert outcome.kind == "timeout"
    assert outcome.phase == "forward"
    assert outcome.message == "rank 1 still in forward after 30 s (mine.py:7 in act); rank 0, 2 wait for it"


def test_where_all_wait_for_each_other_all_are_named():
    waits = STACK.format(inner="/t/autograd/__init__.py", name="backward", stage="backward")
    assert "rank 0, 1 still in backward" in hanging({0: waits, 1: waits}, 30.0).message


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", True),
        ("Read timeout", False),
        ("CUDA out of memory", False),
    ],
)
def test_a_lost_peer_is_known_by_its_words(text, lost):
    assert has_lost_another(RuntimeError(text)) == lost
    assert not has_lost_another(ValueError(text))
