"""The zoo of slow loaders: what is planted is there, travels into workers, and is judged and cleaned up after."""

import contextlib
import json
import os
import pickle
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from machines import environment

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks.loader import attribution, faults, overhead, scenes, zoo  # noqa: E402
from bsprof.loading import Batches, Consumer, LoaderSettings, Loading  # noqa: E402

# More workers than cores is what some faults are.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

BY_NAME = {fault.name: fault for fault in scenes.FAULTS}
PRIVATE = {"shm_low", "fds_low", "many_tensors"}
"""They change the process or need a mount namespace: only ever built in a process of their own."""


def children():
    """Return this process' children; a fork server and what tests before this one left live among them."""
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_zoo_holds_every_cause_that_can_be_built_here():
    codes = {cause.code for fault in scenes.FAULTS for cause in fault.causes}
    assert len(codes) >= 15
    assert len(BY_NAME) == len(scenes.FAULTS)
    single = [fault for fault in scenes.FAULTS if len(fault.causes) == 1]
    assert {fault.causes[0].code for fault in single} == codes
    assert sum(len(fault.causes) == 2 and not fault.hogged for fault in scenes.FAULTS) >= 4
    assert any(fault.hogged and len(fault.causes) == 2 for fault in scenes.FAULTS)


@pytest.mark.parametrize("healthy", [False, True], ids=["fault", "healthy"])
@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in PRIVATE])
def test_every_scene_can_be_built_here_and_leaves_nothing(name, healthy, tmp_path, one_thread):
    before = children()
    accelerator, pin_memory = torch.accelerator.is_available, torch.Tensor.pin_memory
    try:
        with scenes.built(BY_NAME[name], "fork", 0.25, healthy, tmp_path) as scene:
            assert scene.step_s > 0
            assert len(scene.loader.dataset) > 0 if hasattr(scene.loader.dataset, "__len__") else True
    except scenes.Unable as reason:
        pytest.skip(str(reason))
    assert torch.accelerator.is_available is accelerator
    assert torch.Tensor.pin_memory is pin_memory
    assert children() == before


@pytest.mark.parametrize("name", ["slow_transform_v2", "hot+collate", "epoch_restart", "too_few_workers"])
def test_what_travels_into_a_spawned_worker_can_be_pickled(name, tmp_path):
    with scenes.built(BY_NAME[name], "spawn", 0.25, False, tmp_path) as scene:
        loader = scene.loader
        copy = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    assert type(copy[0]) is type(loader.dataset)


def test_cpu_work_is_cpu_time_and_blocked_work_is_not():
    cpu = time.thread_time()
    faults.Planted(4, cpu_s=0.02)[0]
    assert time.thread_time() - cpu >= 0.02
    cpu, wall = time.thread_time(), time.perf_counter()
    faults.Planted(4, blocked_s=0.05)[0]
    assert time.perf_counter() - wall >= 0.05
    assert time.thread_time() - cpu < 0.05


def test_the_storage_answers_every_worker_and_ends(tmp_path):
    before = children()
    with scenes.built(BY_NAME["slow_storage"], "fork", 0.1, False, tmp_path) as scene:
        batches = iter(scene.loader)
        assert [next(batches).shape for _ in range(3)] == [(scenes.BATCH, faults.FEATURES)] * 3
        del batches
    assert children() == before


def test_a_lock_is_shared_with_the_fault_and_nobodys_without(tmp_path):
    for healthy, locks in ((False, 1), (True, 4)):
        with scenes.built(BY_NAME["lock"], "fork", 0.1, healthy, tmp_path) as scene:
            assert len(scene.loader.dataset.locks) == locks


def test_a_rowwise_and_a_batchwise_data_set_hold_the_same():
    values = torch.arange(8.0).reshape(4, 2)
    rows = faults.Rows(values, torch.arange(4), 100)
    lines = faults.Lines([f"{i},{2.0 * i},{2.0 * i + 1}" for i in range(4)], 100)
    batch, labels = rows.__getitems__([1, 6])
    singles = [lines[1], lines[6]]
    assert torch.equal(batch, torch.stack([value for value, _ in singles]))
    assert labels.tolist() == [label for _, label in singles]


# --- judging ----------------------------------------------------------------------------------------


def said(*codes, text=""):
    causes = [{"code": code, "text": text, "evidence": {}, "gives_back": 0.3} for code in codes]
    return {"causes": causes, "verdict": "highly_input_bound"}


def test_the_planted_cause_must_come_first():
    fault = BY_NAME["slow_collate"]
    assert zoo.judge(fault, False, said("slow_collate", "slow_stage"))[0] is True
    assert zoo.judge(fault, False, said("slow_stage", "slow_collate"))[0] is False
    assert zoo.judge(fault, False, said())[0] is False


def test_a_stage_must_be_named():
    fault = BY_NAME["slow_transform_v1"]
    assert zoo.judge(fault, False, said("slow_stage", text="Blur takes 70 %"))[0] is True
    assert zoo.judge(fault, False, said("slow_stage", text="Jitter takes 70 %"))[0] is False


def test_a_healthy_twin_raises_nothing():
    fault = BY_NAME["lock"]
    assert zoo.judge(fault, True, said())[0] is True
    assert zoo.judge(fault, True, said("memory_growth"))[0] is False


def test_of_two_faults_both_are_named_and_the_larger_first():
    fault = BY_NAME["hot+collate"]
    hot = {"code": "hot_sample", "text": "index 37", "evidence": {}, "gives_back": 0.5}
    collate = {"code": "slow_collate", "text": "", "evidence": {}, "gives_back": 0.2}
    judged = [zoo.judge(fault, False, {"causes": c, "verdict": ""})[0] for c in ([hot, collate], [collate, hot], [hot])]
    assert judged == [True, False, False]


def test_beside_a_hog_both_are_named_in_any_order():
    fault = BY_NAME["hog+collate"]
    assert zoo.judge(fault, False, said("slow_collate", "slow_stage", "cpu_contended"))[0] is True
    assert zoo.judge(fault, False, said("cpu_contended"))[0] is False


def test_what_cannot_be_had_is_no_miss_and_what_failed_is():
    fault = BY_NAME["cold_disk"]
    assert zoo.judge(fault, False, {"unable": "in memory"}) == (None, "in memory")
    assert zoo.judge(fault, True, {"failed": "exit code 1"}) == (False, "exit code 1")


def test_totals_count_what_could_be_judged(capsys):
    run = zoo.Run(BY_NAME["lock"], "fork", 1.0, False)
    told = [
        zoo.Told(run, True, "lock", {}, 1.0),
        zoo.Told(run._replace(healthy=True), True, "nothing", {}, 1.0),
        zoo.Told(run, None, "unable", {}, 1.0),
    ]
    assert zoo.summarise(told)
    assert not zoo.summarise([*told, told[0]._replace(right=False, said="slow_stage 30 %")])
    assert "slow_stage 30 %" in capsys.readouterr().out


def test_runs_meet_all_faults_in_each_repeat_and_change_the_scale():
    runs = zoo.planned({"lock", "no_workers"}, {"fork", "spawn"}, 3)
    names = {"lock", "lock_cpu", "no_workers"}
    assert {run.fault.name for run in runs} == names
    assert [run.scale for run in runs if run.fault.name == "no_workers" and not run.healthy] == list(zoo.SCALES)
    assert not [run for run in runs if run.fault.name == "no_workers" and run.method == "spawn"]


# --- processes --------------------------------------------------------------------------------------


def test_a_hang_is_a_failure_and_nothing_of_it_is_left(tmp_path):
    pids = tmp_path / "pids"
    hang = f"sleep 60 & echo $! > {pids}; sleep 60"
    found = zoo.in_a_process(["sh", "-c", hang], tmp_path / "none.json", 0.5)
    assert found == {"failed": "not done after 0.5 s"}
    assert not is_alive(int(pids.read_text()))


def test_a_crash_tells_its_last_line(tmp_path):
    command = [sys.executable, "-c", "raise ValueError('no such thing')"]
    assert zoo.in_a_process(command, tmp_path / "none.json", 30) == {"failed": "exit code 1: ValueError: no such thing"}


def test_hogs_end_with_their_block():
    before = children()
    with contextlib.suppress(KeyError), zoo.hogs(1):
        raise KeyError
    assert children() == before


def test_a_fault_is_planted_in_a_spawned_worker_of_a_process_of_its_own():
    run = zoo.Run(BY_NAME["too_few_workers"], "spawn", 0.25, False)
    found, _ = zoo.carry_out(run, ["--plain", "--seconds", "0.5"])
    assert found["batch_s"] > 0
    assert found["step_s"] == pytest.approx(0.25 * scenes.STEP_S)


def test_shared_memory_is_limited_for_one_process_alone(tmp_path):
    run = zoo.Run(BY_NAME["shm_low"], "fork", 1.0, False)
    if not zoo.can_limit_shm():
        pytest.skip("no mount namespace may be made here")
    before = os.statvfs("/dev/shm").f_blocks
    command = zoo.command_of(run, tmp_path / "out.json", [])
    told = f"import json, os, sys; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize, file=open({str(tmp_path / 'size')!r}, 'w'))"  # noqa: E501
    place = command.index(sys.executable)
    zoo.in_a_process([*command[:place], sys.executable, "-c", told], tmp_path / "none.json", 30)
    assert int((tmp_path / "size").read_text()) == run.fault.shm_mb[False] << 20
    assert os.statvfs("/dev/shm").f_blocks == before


def is_alive(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


# --- attribution and overhead -----------------------------------------------------------------------


def test_a_stage_is_right_within_the_larger_of_both_limits():
    assert attribution.Row("x", "collate", 0.010, 0.0104).right
    assert not attribution.Row("x", "collate", 0.010, 0.0106).right
    assert attribution.Row("x", "collate", 0.001, 0.00119).right
    assert not attribution.Row("x", "collate", 0.001, None).right


def test_planted_time_lasts_and_writes_down_what_it_took():
    for _ in range(2):
        attribution.last(0.002, "pin")
    assert attribution.taken_s("pin") >= 0.002
    assert attribution.CALLS[attribution.STAGES.index("pin")] == 0


def test_a_stage_that_was_not_found_is_a_failure():
    empty = [None]
    columns = {name: empty for name in Batches.__struct_fields__ if name.endswith("_ns") and name != "stage_ns"}
    rest = {name: empty for name in Batches.__struct_fields__ if name not in columns and name != "stage_ns"}
    batches = Batches(**{**rest, **columns, "epoch": [0], "order": [0], "worker": [0], "stage_ns": {}})
    loading = Loading(
        settings=LoaderSettings(kind="DataLoader"), consumer=Consumer(kind="fixed"), window_ns=1, batches=batches
    )
    assert [row.found_s for row in attribution.held_against("x", loading, {"collate": 0.01}, 0.02)] == [None, None]


def test_a_patch_left_behind_is_seen():
    module = ModuleType("library")

    class Thing:
        def method(self):
            pass

    Thing.__module__ = "library"
    module.Thing, module.function = Thing, len
    before = overhead.attributes([module])
    assert overhead.changed(before, overhead.attributes([module])) == []
    Thing.__call__ = lambda self: None
    module.function = max
    left = overhead.changed(before, overhead.attributes([module]))
    assert left == ["library.function", f"library.{Thing.__qualname__}.__call__"]


def test_watching_replaces_attributes_and_puts_every_one_back():
    inside, still = overhead.left_behind()
    assert "torch.utils.data.dataloader._BaseDataLoaderIter.__next__" in inside
    assert still == []


def test_the_cost_in_a_worker_is_told_for_a_batch_and_a_sample():
    cost = overhead.worker_cost(2, turns=20)
    assert cost.batch_us.n == cost.sample_ns.n == 2
    assert 0 < cost.batch_us.value < 1e4


def test_what_zoo_writes_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "describe_environment", environment)
    monkeypatch.setattr(zoo, "carry_out", lambda run, extra: ({"unable": "not here"}, 0.0))
    out = tmp_path / "zoo.json"
    monkeypatch.setattr(sys, "argv", ["zoo", "--quick", "--only", "lock", "--json", str(out)])
    with pytest.raises(SystemExit):
        zoo.main()
    report = json.loads(out.read_text())
    assert {run["fault"] for run in report["runs"]} == {"lock", "lock_cpu"}
    assert report["environment"]
