"""The sampler is a real process; what it would say of a GPU is replayed from recordings."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pynvml
import pytest
import recorded
import torch
from recorded import CASE, OTHER, RECORDINGS, UUID, tick_ns

from bsprof.errors import BsprofError
from bsprof.measure import companion, telemetry
from bsprof.measure.nvml import Gpu
from bsprof.measure.sampler import Host, descends, next_tick
from bsprof.measure.telemetry import Recording
from bsprof.model import ForeignProcess, Telemetry
from bsprof.noun import Note

PATIENCE_S = 30.0
"""How long a test waits for a process before it gives up; none waits so long unless something is broken."""


def load(name: str) -> Recording:
    return telemetry.read(recorded.FOLDER / f"{name}.jsonl")


def judge(name: str, *, first: int = 5, last: int | None = None, steps: int = 200) -> tuple[Telemetry, dict[str, str]]:
    """Return telemetry and notes of the window from sample `first` to sample `last`."""
    last = RECORDINGS[name][1] - 5 if last is None else last
    found, notes = telemetry.summarise(
        load(name), begin_ns=tick_ns(first), end_ns=tick_ns(last), steps=steps, own_pids=()
    )
    assert all(isinstance(note, Note) for note in notes)
    return found, {note.code: note.text for note in notes}


def wait_for(what):
    end = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    return found


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- recordings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_recordings_are_what_this_sampler_writes(name):
    """A change of the format shows here. The old files must then still be read: raise FORMAT and keep them."""
    assert (recorded.FOLDER / f"{name}.jsonl").read_bytes() == recorded.text(name)


def test_a_steady_gpu_has_no_notes_and_all_columns():
    found, notes = judge("steady")
    assert notes == {}
    assert (found.source, found.device_uuid, found.unsupported) == ("nvml", UUID, ())
    assert found.window_ns == 2_000_000_000
    assert found.time_ns[0] == -500_000_000  # shortly before the window
    assert found.time_ns[-1] == 2_400_000_000
    assert set(found.device["sm_mhz"]) == {1980}
    assert [value for value in found.device["temperature_c"] if value is not None] == [54] * 3  # asked once a second
    assert {len(column) for column in (*found.device.values(), *found.host.values())} == {len(found.time_ns)}
    assert found.host["busy_cores"][0] == 1.25
    assert found.limits["power_limit_w"] == 700.0
    assert found.sampler_cpu_ns == 300_000 * 29
    assert found.foreign == ()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Telemetry) == found


def test_only_samples_around_the_window_are_kept():
    found, notes = judge("poor_host", first=30, last=40)
    assert (found.time_ns[0], found.time_ns[-1]) == (-1_000_000_000, 2_000_000_000)
    assert "telemetry_incomplete" not in notes


def test_heat_is_told_with_its_share():
    _, notes = judge("hot")
    assert list(notes) == ["gpu_throttled_thermal"]
    assert notes["gpu_throttled_thermal"].startswith("clocks were held down by heat in 24% of the samples")
    assert "91 °C" in notes["gpu_throttled_thermal"]
    assert "89 °C" in notes["gpu_throttled_thermal"]


def test_heat_outside_the_window_is_not_told():
    _, notes = judge("hot", first=16)
    assert notes == {}


def test_the_power_limit_is_told():
    _, notes = judge("capped")
    assert list(notes) == ["gpu_throttled_power"]
    assert "52%" in notes["gpu_throttled_power"]
    assert "700 W" in notes["gpu_throttled_power"]


def test_moved_clocks_are_told_with_their_range():
    _, notes = judge("moving_clocks")
    assert list(notes) == ["gpu_clocks_moved"]
    assert "between 1605 and 1980 MHz (23%" in notes["gpu_clocks_moved"]


def test_clocks_and_link_that_rest_while_idle_are_no_fault():
    assert judge("idle_between")[1] == {}


def test_a_slow_link_is_told():
    _, notes = judge("slow_link")
    assert list(notes) == ["gpu_pcie_degraded"]
    assert "gen3 x8 in 100% of the busy samples; card and slot can do gen5 x16" in notes["gpu_pcie_degraded"]


def test_others_on_the_gpu_are_named():
    found, notes = judge("shared")
    assert list(notes) == ["gpu_foreign_process"]
    assert found.foreign == (
        ForeignProcess(pid=OTHER, name=None, memory_bytes=3 * 2**30),
        ForeignProcess(pid=OTHER + 1, name=None, memory_bytes=None),
    )
    assert f"(pid {OTHER}, 3.0 GiB), unnamed (pid {OTHER + 1})" in notes["gpu_foreign_process"]


def test_a_pid_that_the_caller_owns_is_not_foreign():
    found, notes = telemetry.summarise(
        load("shared"), begin_ns=tick_ns(5), end_ns=tick_ns(25), steps=200, own_pids={CASE, OTHER, OTHER + 1}
    )
    assert (found.foreign, notes) == ((), [])


def test_pids_that_mean_nothing_here_accuse_nobody():
    found, notes = judge("container")
    assert found.foreign == ()
    assert "at most one is this case's own" in notes["gpu_foreign_process"]
    assert judge("container_alone")[1] == {}


def test_a_lost_gpu_is_told_and_what_it_said_before_stays():
    found, notes = judge("lost")
    assert "stopped answering 1.3 s into the window: GPU is lost" in notes["gpu_lost"]
    assert found.device["sm_mhz"][:18] == [1980] * 18
    assert set(found.device["sm_mhz"][18:]) == {None}
    assert found.host["runnable"] == [2] * 30
    assert "gpu_lost" not in judge("lost", first=2, last=15)[1]


def test_a_slices_power_is_shared_and_its_energy_not_resolvable():
    found, notes = judge("slice")
    assert "mig_shared_power" in notes
    assert found.energy is not None
    assert (found.energy.joules, found.energy.resolvable) == (None, False)
    assert "slice" in found.energy.reason


def test_a_host_under_pressure_is_told():
    _, notes = judge("poor_host")
    assert set(notes) == {"cpu_clocks_moved", "host_memory_low"}
    assert "only 1.0 GiB of the machine's 32.0 GiB" in notes["host_memory_low"]
    assert "MiB went between memory and swap" in notes["host_memory_low"]


def test_without_a_driver_the_host_is_still_told():
    found, notes = judge("no_driver")
    assert (found.source, found.device, found.energy) == ("none", {}, None)
    assert found.host["runnable"] == [2] * 30
    assert notes == {"telemetry_incomplete": "nothing tells of the GPU (NVML: Driver Not Loaded)"}


def test_a_window_without_samples_is_told():
    _, notes = judge("steady", first=40, last=80)
    assert "0 samples where 40 were due" in notes["telemetry_incomplete"]
    found, notes = telemetry.summarise(
        load("steady"), begin_ns=tick_ns(5) + 1000, end_ns=tick_ns(5) + 2000, steps=1, own_pids=()
    )
    assert (
        "shorter than the time between two samples" in {note.code: note.text for note in notes}["telemetry_incomplete"]
    )
    assert found.window_ns == 1000


# --- energy -----------------------------------------------------------------------------------------


def test_energy_is_counted_from_change_to_change():
    """From sample 5 to sample 25: 21 changes of 40 J, so 20 intervals; all the window, all its steps."""
    energy = judge("steady")[0].energy
    assert energy is not None
    assert (energy.source, energy.updates, energy.resolvable, energy.reason) == ("counter", 21, True, None)
    assert energy.joules == pytest.approx(20 * 40.0)
    assert energy.window_ns == 2_000_000_000
    assert energy.steps == pytest.approx(200)


def test_energys_steps_are_those_of_its_own_time():
    """The window begins and ends between two changes."""
    found, _ = telemetry.summarise(
        load("steady"), begin_ns=tick_ns(5) - 50_000_000, end_ns=tick_ns(25) + 50_000_000, steps=210, own_pids=()
    )
    energy = found.energy
    assert energy is not None
    assert energy.window_ns == 2_000_000_000
    assert energy.steps == pytest.approx(200)
    assert energy.joules == pytest.approx(800)


def test_too_few_updates_give_no_energy():
    energy = judge("rare_updates")[0].energy
    assert energy is not None
    assert (energy.joules, energy.resolvable, energy.updates) == (None, False, 5)
    assert energy.window_ns == 2_000_000_000
    assert "seen to move 5 times" in energy.reason


def test_a_counter_that_runs_backwards_gives_no_energy():
    energy = judge("counter_reset")[0].energy
    assert energy is not None
    assert (energy.joules, energy.resolvable) == (None, False)
    assert "backwards" in energy.reason
    assert judge("counter_reset", first=17)[0].energy.reason != energy.reason  # it had happened before


def test_without_a_counter_power_is_integrated_and_called_an_approximation():
    """300 W + 4 W a sample, from sample 5 to sample 25: 360 W on average over 2 s."""
    found, _ = judge("no_counter")
    energy = found.energy
    assert energy is not None
    assert (energy.source, energy.updates, energy.resolvable) == ("power", 21, True)
    assert energy.joules == pytest.approx(720)
    assert "approximation" in energy.reason
    assert {"energy_mj", "power_instant_w"} <= set(found.unsupported)
    assert "energy_mj" not in found.device


def test_too_few_power_readings_give_no_energy():
    energy = judge("no_counter", last=20)[0].energy
    assert energy is not None
    assert (energy.joules, energy.resolvable, energy.updates) == (None, False, 16)
    assert "16 power readings" in energy.reason


# --- files ------------------------------------------------------------------------------------------


def test_a_recording_cut_off_anywhere_is_read_as_far_as_it_goes(tmp_path):
    whole = (recorded.FOLDER / "steady.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        found = telemetry.read(path)
        assert len(found.samples) <= whole[:size].count(b'"sample"')
        telemetry.summarise(found, begin_ns=tick_ns(5), end_ns=tick_ns(25), steps=20, own_pids=())


def test_a_killed_sampler_is_told(tmp_path):
    head = (recorded.FOLDER / "steady.jsonl").read_bytes().split(b"\n")[:20]
    path = tmp_path / "killed.jsonl"
    path.write_bytes(b"\n".join(head) + b'\n{"line":"sam')
    found, notes = telemetry.summarise(
        telemetry.read(path), begin_ns=tick_ns(5), end_ns=tick_ns(25), steps=200, own_pids=()
    )
    assert [note.code for note in notes] == ["telemetry_incomplete"]
    assert "13 samples where 20 were due; the sampling process was killed 1.2 s into the window" in notes[0].text
    assert len(found.time_ns) == 18


def test_no_recording_at_all_is_told(tmp_path):
    found, notes = telemetry.summarise(
        telemetry.read(tmp_path / "none.jsonl"), begin_ns=0, end_ns=1_000_000_000, steps=1, own_pids=()
    )
    assert (found.source, found.time_ns, found.energy, found.sampler_cpu_ns) == ("none", [], None, None)
    assert [note.code for note in notes] == ["telemetry_incomplete"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"line":"header"}\n', "line 1"),
        (b'{"line":"end","t":1,"cpu_ns":1,"reason":"closed"}\n', "does not begin with a header"),
        (b"not JSON\n", "line 1"),
        (b"\xff\n", "line 1"),
        (b'{"line":"header","t":1,"format":99,"source":"nvml","hz":1.0}\n', "format 99"),
    ],
)
def test_what_is_no_recording_is_refused_by_name(tmp_path, content, fault):
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    with pytest.raises(BsprofError) as caught:
        telemetry.read(path)
    assert caught.value.message.startswith(str(path))
    assert fault in caught.value.message


# --- the schedule -----------------------------------------------------------------------------------


def test_the_schedule_neither_drifts_nor_bursts():
    period = 100
    due, late, seen = 1000, [3, 40, 99, 0, 730, 12, 1], []
    for delay in late:
        seen.append(due)
        due = next_tick(1000, period, due + delay)
    assert all((moment - 1000) % period == 0 for moment in seen)
    assert seen == [1000, 1100, 1200, 1300, 1400, 2200, 2300]  # seven periods stalled, and not one made up for


# --- the host ---------------------------------------------------------------------------------------


def fake_system(root: Path, *, busy: int, cores: int = 0) -> None:
    files = {
        "proc/stat": f"cpu  {busy} 0 0 1000 50 0 0 7 0 0\ncpu0 1 2 3\nctxt 9\nprocs_running 4\nprocs_blocked 0\n",
        "proc/meminfo": "MemTotal:       8388608 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n",
        "proc/vmstat": "nr_free_pages 1\npswpin 3\npswpout 5\n",
    }
    files |= {
        f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq": f"{2_000_000 + 1_000_000 * core}\n"
        for core in range(cores)
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_host_is_read_from_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    fake_system(tmp_path, busy=100, cores=2)
    host = Host(tmp_path)
    try:
        assert host.unsupported == []
        assert host.limits == {"host_memory_bytes": 8 * 2**30}
        start = time.perf_counter_ns()
        host.read(start)
        fake_system(tmp_path, busy=100 + 3 * os.sysconf("SC_CLK_TCK"), cores=2)
        told = host.read(start + 2_000_000_000)
        page = os.sysconf("SC_PAGE_SIZE")
        assert told == {
            "busy_cores": 1.5,
            "runnable": 3,  # without the one that asks
            "memory_available_bytes": 4 * 2**30,
            "swap_in_bytes": 3 * page,
            "swap_out_bytes": 5 * page,
            "cpu_mhz": 2500.0,
        }
        assert host.read(start + 3_000_000_000, slow=False).keys() == {"busy_cores", "runnable"}
    finally:
        host.close()


def test_clocks_that_nobody_governs_are_not_told(tmp_path):
    fake_system(tmp_path, busy=1)
    host = Host(tmp_path)
    host.close()
    assert host.unsupported == ["cpu_mhz"]


def test_elsewhere_psutil_tells_what_it_can(tmp_path):
    host = Host(tmp_path)
    told = host.read(time.perf_counter_ns())
    host.close()
    assert told["memory_available_bytes"] > 0
    assert told["busy_cores"] >= 0
    assert host.unsupported == ["runnable", "swap_in_bytes", "swap_out_bytes", "cpu_mhz"]


def test_who_descends_from_whom():
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert descends(os.getpid(), os.getpid())
        assert descends(child.pid, os.getpid())
        assert not descends(os.getppid(), os.getpid())
        assert not descends(OTHER, os.getpid())
    finally:
        child.kill()
        child.wait()


# --- the process ------------------------------------------------------------------------------------


def test_a_real_sampler_samples_this_machine(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    path.write_text("left over\n")
    with telemetry.record(torch.device("cpu"), 50, path) as running:
        pid = running.pid
        wait_for(lambda: count_lines(path) >= 2)
        begin_ns = time.perf_counter_ns()
        wait_for(lambda: count_lines(path) >= 12)
        end_ns = time.perf_counter_ns()
        assert psutil.Process(pid).memory_info().rss < 100 * 2**20  # no torch in it
    running.close()  # twice is once
    assert not psutil.pid_exists(pid)
    recording = telemetry.read(path)
    assert recording.end is not None
    assert recording.end.reason == "closed"
    times = [sample.t for sample in recording.samples]
    assert times == sorted(times)
    found, _ = telemetry.summarise(recording, begin_ns=begin_ns, end_ns=end_ns, steps=1, own_pids={os.getpid()})
    assert found.source == "none"
    assert max(value for value in found.host["memory_available_bytes"] if value is not None) > 0
    assert found.sampler_cpu_ns > 0
    assert any(0 <= moment <= end_ns - begin_ns for moment in found.time_ns)


FAKE_PYNVML = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("the_real_pynvml", {real!r})
real = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(real)
sys.path.append({tests!r})
from fake_nvml import FakeGpu, FakeNvml
sys.modules[__name__] = FakeNvml(real, [FakeGpu({uuid!r}, processes=[({pid}, 5), ({other}, 7)])])
"""


def test_a_real_sampler_asks_nvml(tmp_path, monkeypatch):
    """It finds what its parent's path finds: here a library of one made-up GPU."""
    text = FAKE_PYNVML.format(
        real=pynvml.__file__, tests=str(Path(__file__).parent), uuid=UUID, pid=os.getpid(), other=OTHER
    )
    (tmp_path / "pynvml.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aaa")
    monkeypatch.setattr(torch.version, "hip", None)
    path = tmp_path / "telemetry.jsonl"
    begin_ns = time.perf_counter_ns()
    with telemetry.record(torch.device("cuda", 0), 50, path):
        wait_for(lambda: count_lines(path) >= 15)
    found, notes = telemetry.summarise(
        telemetry.read(path), begin_ns=begin_ns, end_ns=time.perf_counter_ns(), steps=1, own_pids=()
    )
    assert (found.source, found.device_uuid) == ("nvml", UUID)
    assert set(found.device["power_w"]) == {412.5}
    assert found.foreign == (ForeignProcess(pid=OTHER, name=None, memory_bytes=7),)
    assert "gpu_foreign_process" in {note.code for note in notes}
    assert found.energy is not None
    assert (found.energy.joules, found.energy.updates) == (None, 0)


def test_a_sampler_that_is_killed_hurts_nobody(tmp_path):
    path = tmp_path / "telemetry.jsonl"
    with telemetry.record(torch.device("cpu"), 50, path) as running:
        wait_for(lambda: count_lines(path) >= 4)
        os.kill(running.pid, signal.SIGKILL)
    recording = telemetry.read(path)
    assert recording.end is None
    assert len(recording.samples) >= 3
    last_ns = recording.samples[-1].t
    _, notes = telemetry.summarise(
        recording, begin_ns=recording.samples[0].t, end_ns=last_ns + 1_000_000_000, steps=1, own_pids=()
    )
    assert "was killed" in {note.code: note.text for note in notes}["telemetry_incomplete"]


def test_a_sampler_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(companion, "CLOSE_S", 0.05)
    path = tmp_path / "telemetry.jsonl"
    running = telemetry.record(torch.device("cpu"), 50, path)
    wait_for(lambda: count_lines(path) >= 2)
    pid = running.pid
    os.kill(pid, signal.SIGSTOP)
    running.close()
    assert not psutil.pid_exists(pid)


def test_a_sampler_that_cannot_start_hurts_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    path = tmp_path / "telemetry.jsonl"
    with telemetry.record(torch.device("cpu"), 50, path) as running:
        assert running.pid is None
    assert telemetry.read(path) == Recording(None)


PARENT = """
import os, sys, time
from pathlib import Path
import torch
from bsprof.measure import telemetry
running = telemetry.record(torch.device("cpu"), 50, Path(sys.argv[1]))
if sys.argv[2] == "with a worker" and os.fork() == 0:  # as a DataLoader's: it holds a copy of the sampler's pipe
    time.sleep(60)
print(running.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("company", ["alone", "with a worker"])
def test_the_sampler_goes_when_its_parent_is_killed(tmp_path, company):
    path = tmp_path / "telemetry.jsonl"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", PARENT, str(path), company]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True)
    try:
        pid = int(parent.stdout.readline())
        wait_for(lambda: count_lines(path) >= 3)
        parent.kill()
        parent.wait()
        wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()
    assert telemetry.read(path).end.reason == "orphaned"


def test_a_rate_that_is_none_is_refused(tmp_path):
    with pytest.raises(BsprofError, match="--telemetry-hz"):
        telemetry.record(torch.device("cpu"), 0, tmp_path / "telemetry.jsonl")


def test_the_sampler_loads_no_torch():
    code = "import sys, bsprof.measure.sampler; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0


# --- which device -----------------------------------------------------------------------------------


def test_before_cuda_has_started_a_device_is_its_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert telemetry.cuda_gpu(torch.device("cuda", 1)) == Gpu(1)
    assert telemetry.cuda_gpu(torch.device("cuda")) == Gpu(0)


def test_after_it_has_started_a_device_is_its_uuid(monkeypatch):
    class Properties:
        uuid = UUID.removeprefix("GPU-")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    monkeypatch.setattr(torch.version, "hip", None)
    assert telemetry.cuda_gpu(torch.device("cuda")) == Gpu(1, Properties.uuid)


def test_what_is_no_nvidia_gpu_is_not_looked_for(monkeypatch):
    assert telemetry.cuda_gpu(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert telemetry.cuda_gpu(torch.device("cuda", 0)) is None
