"""The profiler window: traces of a CUDA device as Kineto writes them, and real ones of a small network on the CPU."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity

from bsprof.errors import BsprofError
from bsprof.measure import profiling
from bsprof.measure.loop import Stage, running_phase
from bsprof.measure.traces import read_trace, union_ns
from bsprof.model import Copy, Hotspot, Profile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PID, PYTHON, AUTOGRAD = 4711, 4711, 4799
STREAM, COPIES = 7, 20


class Trace:
    """A Chrome trace, event by event, in the form of Kineto's `ChromeTraceLogger` on CUDA. Times are microseconds."""

    BASE = 4_380_313_027_970.25  # microseconds since `baseTimeNanoseconds`: a real trace's numbers are this long

    def __init__(self) -> None:
        self.events: list[str] = []
        self._correlation = 0
        self._meta("process_name", PID, 0, '"name": "python"')
        self._meta("process_labels", 0, 0, '"labels": "GPU 0"')
        self._meta("thread_name", 0, STREAM, '"name": "stream 7 "')
        span = {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler"}
        self.events.append(json.dumps({**span, "ts": self.BASE - 100, "dur": 5000.125, "args": {"Op count": 0}}))

    def _meta(self, name: str, pid: int, tid: int, args: str) -> None:
        self.events.append(
            f'{{"ph": "M", "name": "{name}", "ts": {self.BASE:.3f}, "pid": {pid}, "tid": {tid}, "args": {{{args}}}}}'
        )

    def _complete(self, cat: str, name: str, pid: int, tid: int, ts: float, dur: float, **args: Any) -> None:
        written = json.dumps(args)
        self.events.append(
            f'{{"ph": "X", "cat": "{cat}", "name": "{name}", "pid": {pid}, "tid": {tid}, '
            f'"ts": {self.BASE + ts:.3f}, "dur": {dur:.3f}, "args": {written}}}'
        )

    def _flow(self, ph: str, correlation: int, pid: int, tid: int, ts: float) -> None:
        bound = ', "bp": "e"' if ph == "f" else ""
        self.events.append(
            f'{{"ph": "{ph}", "id": {correlation}, "pid": {pid}, "tid": {tid}, "ts": {self.BASE + ts:.3f}, '
            f'"cat": "ac2g", "name": "ac2g"{bound}}}'
        )

    def phase(self, name: str, ts: float, dur: float, mirrored: bool = True) -> None:
        self._complete("user_annotation", f"bsprof:{name}", PID, PYTHON, ts, dur, **{"External id": 1, "Ev Idx": 0})
        if mirrored:  # on the device's timeline, later and longer than on the host's
            self._complete("gpu_user_annotation", f"bsprof:{name}", 0, STREAM, ts + 500, dur * 3, **{"External id": 1})

    def operator(self, name: str, ts: float, dur: float, tid: int = PYTHON) -> None:
        self._complete("cpu_op", name, PID, tid, ts, dur, **{"External id": 2, "Record function id": 0, "Ev Idx": 1})

    def call(self, name: str, ts: float, *, tid: int = PYTHON, cat: str = "cuda_runtime", dur: float = 4.0) -> int:
        """Add a call of the runtime or the driver and return its correlation."""
        self._correlation += 1
        self._complete(cat, name, PID, tid, ts, dur, cbid=211, correlation=self._correlation)
        self._flow("s", self._correlation, PID, tid, ts)
        return self._correlation

    def kernel(self, correlation: int | None, ts: float, dur: float, name: str = "gemm", stream: int = STREAM) -> None:
        sizes = {"registers per thread": 96, "shared memory": 0, "blocks per SM": 1.5, "grid": [64, 1, 1]}
        told = {} if correlation is None else {"correlation": correlation}
        place = {"queued": 0, "device": 0, "context": 1, "stream": stream}
        self._complete("kernel", name, 0, stream, ts, dur, **{"External id": 3}, **place, **told, **sizes)
        self._flow("f", correlation or 0, 0, stream, ts)

    def copy(self, correlation: int, ts: float, dur: float, name: str, size: int | None, stream: int = COPIES) -> None:
        told = {} if size is None else {"bytes": size, "memory bandwidth (GB/s)": size / 1e3 / dur}
        args = {"device": 0, "context": 1, "stream": stream, "correlation": correlation}
        self._complete("gpu_memcpy", name, 0, stream, ts, dur, **args, **told)

    def memset(self, correlation: int, ts: float, dur: float) -> None:
        args = {"device": 0, "context": 1, "stream": STREAM, "correlation": correlation, "bytes": 64}
        self._complete("gpu_memset", "Memset (Device)", 0, STREAM, ts, dur, **args)

    def text(self) -> bytes:
        head = '"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "GPU"}], "displayTimeUnit": "ms"'
        events = ",\n".join(self.events)
        return f'{{{head}, "baseTimeNanoseconds": 1790857026000000000, "traceEvents": [{events}]}}'.encode()

    def read(self, *phases: str, steps: int = 1) -> Profile:
        return read_trace(self.text(), phases, steps=steps, wall_ns=1_000_000)


# --- a CUDA device's traces -------------------------------------------------------------------------


def test_kernels_are_laid_to_the_phase_that_launched_them_not_to_when_they_ran():
    trace = Trace()
    trace.phase("forward", 0, 100)
    trace.phase("backward", 100, 50)
    trace.kernel(trace.call("cudaLaunchKernel", 10), 90, 200.5)
    trace.kernel(trace.call("cudaLaunchKernelExC", 99), 300, 20)
    trace.kernel(trace.call("cudaLaunchKernel", 110, tid=AUTOGRAD), 400, 30.25)
    profile = trace.read("forward", "backward")
    assert profile.phase_ns == {"forward": 100_000, "backward": 50_000}
    assert profile.busy_ns == {"forward": 220_500, "backward": 30_250}
    assert profile.busy_total_ns == 250_750
    assert profile.launches == 3


def test_kernels_side_by_side_on_two_streams_are_busy_once():
    trace = Trace()
    trace.phase("forward", 0, 100)
    trace.phase("backward", 100, 100)
    trace.kernel(trace.call("cudaLaunchKernel", 1), 50, 100)
    trace.kernel(trace.call("cudaLaunchKernel", 2), 100, 100, stream=COPIES)
    trace.kernel(trace.call("cudaLaunchKernel", 150), 180, 40)
    profile = trace.read("forward", "backward")
    assert profile.busy_ns == {"forward": 150_000, "backward": 40_000}
    assert profile.busy_total_ns == 170_000
    assert profile.kernels_ns == 240_000


def test_collectives_that_run_beside_each_other_count_once_and_no_other_kernel_does():
    trace = Trace()
    trace.phase("backward", 0, 100)
    name = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    trace.kernel(trace.call("cudaLaunchKernel", 1), 50, 100, name=name, stream=COPIES)
    trace.kernel(trace.call("cudaLaunchKernel", 2), 120, 50, name=name, stream=COPIES + 1)
    trace.kernel(trace.call("cudaLaunchKernel", 3), 0, 400)
    assert trace.read("backward").collectives_ns == 120_000
    lonely = Trace()
    lonely.phase("backward", 0, 100)
    lonely.kernel(lonely.call("cudaLaunchKernel", 1), 0, 10)
    assert lonely.read("backward").collectives_ns is None


def test_copies_and_memsets_are_work_too_but_no_kernels():
    trace = Trace()
    trace.phase("h2d", 0, 50)
    trace.copy(trace.call("cudaMemcpyAsync", 5), 20, 10, "Memcpy HtoD (Pinned -> Device)", 4096)
    trace.memset(trace.call("cudaMemsetAsync", 10), 40, 2.5)
    profile = trace.read("h2d")
    assert profile.busy_ns == {"h2d": 12_500}
    assert profile.kernels_ns == 0
    assert profile.kernels == ()
    assert profile.launches == 2


def test_a_cuda_graph_is_one_launch_of_many_kernels():
    trace = Trace()
    trace.phase("forward", 0, 20)
    trace.phase("backward", 20, 20)
    graph = trace.call("cudaGraphLaunch", 5)
    for index in range(4):
        trace.kernel(graph, 100 + 10 * index, 8, name=f"node{index}")
    profile = trace.read("forward", "backward")
    assert profile.launches == 1
    assert profile.busy_ns == {"forward": 32_000, "backward": 0}
    assert sum(kernel.calls for kernel in profile.kernels) == 4


def test_a_kernel_that_the_driver_launched_is_found_as_well():
    trace = Trace()
    trace.phase("forward", 0, 20)
    trace.kernel(trace.call("cuLaunchKernelEx", 5, cat="cuda_driver"), 30, 7, name="triton_poi_fused_relu_0")
    assert trace.read("forward").busy_ns == {"forward": 7_000}


def test_steps_add_up_and_what_came_before_the_first_is_left_out():
    trace = Trace()
    trace.operator("aten::warm", -80, 40)
    trace.kernel(trace.call("cudaLaunchKernel", -70), -60, 30, name="warm")
    late = trace.call("cudaLaunchKernel", -50)
    for step in range(3):
        trace.phase("forward", 100 * step, 60)
        trace.operator("aten::mm", 100 * step + 5, 20)
        trace.kernel(trace.call("cudaLaunchKernel", 100 * step + 10), 100 * step + 20, 40)
    trace.kernel(late, 1, 3, name="warm")  # the clocks of host and device agree to some microseconds only
    profile = trace.read("forward", steps=3)
    assert profile.phase_ns == {"forward": 180_000}
    assert profile.busy_ns == {"forward": 120_000}
    assert profile.busy_total_ns == 120_000
    assert profile.launches == 3
    assert profile.kernels == (Hotspot(name="gemm", calls=3, ns=120_000),)
    assert profile.operators == (Hotspot(name="aten::mm", calls=3, ns=60_000),)


def test_work_outside_all_phases_is_in_the_total_alone():
    trace = Trace()
    trace.phase("forward", 0, 20)
    trace.kernel(trace.call("cudaLaunchKernel", 5), 10, 10)
    trace.kernel(trace.call("cudaLaunchKernel", 25), 40, 5)
    profile = trace.read("forward")
    assert profile.busy_ns == {"forward": 10_000}
    assert profile.busy_total_ns == 15_000


def test_kernels_that_no_call_can_be_found_for_are_not_laid_to_any_phase():
    trace = Trace()
    trace.phase("forward", 0, 20)
    trace.kernel(None, 10, 10)
    trace.kernel(None, 30, 10)
    profile = trace.read("forward")
    assert profile.busy_ns is None
    assert profile.busy_total_ns == 20_000
    assert profile.launches == 2


def test_the_costliest_kernels_are_named_and_all_are_summed():
    trace = Trace()
    trace.phase("forward", 0, 1000)
    for index in range(12):
        for _ in range(2):
            trace.kernel(trace.call("cudaLaunchKernel", 10 + index), 2000 + 100 * index, 1 + index, name=f"k{index:02}")
    profile = trace.read("forward")
    assert [kernel.name for kernel in profile.kernels] == [f"k{index:02}" for index in range(11, 1, -1)]
    assert profile.kernels[0] == Hotspot(name="k11", calls=2, ns=24_000)
    assert profile.kernels_ns == 2 * sum(range(1, 13)) * 1000


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "HtoD pinned"),
        ("Memcpy HtoD (Pageable -> Device)", "HtoD pageable"),
        ("Memcpy DtoH (Device -> Pinned)", "DtoH pinned"),
        ("Memcpy DtoH (Device -> Pageable)", "DtoH pageable"),
        ("Memcpy DtoD (Device -> Device)", "DtoD"),
        ("Memcpy PtoP (Device -> Device)", "PtoP"),
        ("Memcpy HtoD (Host -> Device)", "HtoD"),
        ("zeCommandListAppendMemoryCopy(M2D)", "zeCommandListAppendMemoryCopy(M2D)"),
    ],
)
def test_copies_are_told_by_direction_and_the_hosts_memory(name, direction):
    trace = Trace()
    trace.phase("h2d", 0, 50)
    for size in (1000, 24):
        trace.copy(trace.call("cudaMemcpyAsync", 5), 20, 1.5, name, size)
    assert trace.read("h2d").copies == (Copy(direction=direction, calls=2, ns=3_000, bytes=1024),)


def test_copies_whose_size_is_not_told_have_none():
    trace = Trace()
    trace.phase("h2d", 0, 50)
    trace.copy(trace.call("cudaMemcpyAsync", 5), 20, 1, "Memcpy HtoD (Pinned -> Device)", 4096)
    trace.copy(trace.call("cudaMemcpyAsync", 9), 30, 1, "Memcpy HtoD (Pinned -> Device)", None)
    (copied,) = trace.read("h2d").copies
    assert copied.bytes is None


def test_an_operators_own_time_is_without_those_it_calls_on_its_thread():
    trace = Trace()
    trace.phase("forward", 0, 100)
    trace.operator("aten::linear", 10, 50)
    trace.operator("aten::addmm", 12, 40)
    trace.operator("aten::empty", 13, 5)
    trace.operator("aten::relu", 60, 10)  # begins where the linear ends
    trace.operator("AddmmBackward0", 20, 30, tid=AUTOGRAD)
    profile = trace.read("forward")
    assert {hotspot.name: hotspot.ns for hotspot in profile.operators} == {
        "aten::linear": 10_000,
        "aten::addmm": 35_000,
        "aten::empty": 5_000,
        "aten::relu": 10_000,
        "AddmmBackward0": 30_000,
    }
    assert profile.operators_ns == 90_000
    assert profile.operators[0].name == "aten::addmm"


def test_a_trace_without_the_device_leaves_its_figures_uncaptured():
    trace = Trace()
    trace.phase("forward", 0, 100, mirrored=False)
    trace.operator("aten::mm", 10, 50)
    trace.call("cudaLaunchKernel", 20)
    profile = trace.read("forward")
    assert (profile.busy_ns, profile.busy_total_ns, profile.launches, profile.kernels_ns) == (None, None, None, None)
    assert (profile.kernels, profile.copies) == ((), ())
    assert profile.operators_ns == 50_000


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schemaVersion": 1}', b'{"traceEvents": [{"ph": 1}]}', b"\xff"]
)
def test_what_is_no_trace_is_said(content):
    with pytest.raises(BsprofError, match="trace cannot be read"):
        read_trace(content, ["forward"], steps=1, wall_ns=1)


def test_missing_ranges_are_said():
    trace = Trace()
    trace.phase("forward", 0, 100)
    with pytest.raises(BsprofError, match="0 ranges of backward for 1 steps"):
        trace.read("forward", "backward")
    with pytest.raises(BsprofError, match="1 ranges of forward for 2 steps"):
        trace.read("forward", steps=2)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))))
def test_the_union_counts_each_moment_once(intervals):
    assert union_ns(intervals) == len({moment for start, end in intervals for moment in range(start, end)})


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=20))
def test_own_times_of_a_thread_are_never_more_than_the_time_that_passed(calls):
    trace = Trace()
    trace.phase("forward", 0, 100)
    for start, length in calls:
        trace.operator(f"op{start}+{length}", start, length)
    profile = trace.read("forward")
    assert profile.operators_ns == 1000 * union_ns((start, start + length) for start, length in calls)
    assert all(operator.ns >= 0 for operator in profile.operators)


# --- real traces of a CPU ---------------------------------------------------------------------------


def network() -> tuple[Stage, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 196, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held: dict[str, torch.Tensor] = {}

    def data() -> None:
        held["images"], held["labels"] = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))

    def h2d() -> None:
        held["images"] = held["images"].to(CPU)

    def forward() -> None:
        held["loss"] = nn.functional.cross_entropy(model(held["images"]), held["labels"])

    def backward() -> None:
        held["loss"].backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return ("data", data), ("h2d", h2d), ("forward", forward), ("backward", backward), ("optimizer", update)


def test_a_real_window_tells_phases_and_operators(tmp_path):
    stages = network()
    profile = profiling.profile(stages, 3, CPU, tmp_path / "trace.json")
    assert list(profile.phase_ns) == [phase for phase, _ in stages]
    assert all(ns > 0 for ns in profile.phase_ns.values())
    assert 0 < sum(profile.phase_ns.values()) <= profile.wall_ns
    assert profile.busy_ns is profile.busy_total_ns is profile.launches is profile.kernels_ns is None
    calls = {operator.name: operator.calls for operator in profile.operators}
    assert calls["aten::convolution_backward"] == 3
    assert sum(operator.ns for operator in profile.operators) <= profile.operators_ns
    # All of it runs on this thread, inside the phases.
    assert 0 < profile.operators_ns <= sum(profile.phase_ns.values())
    assert profiling.untraced(profile, CPU) is None


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_is_a_chrome_trace_with_each_steps_phases(name, tmp_path):
    path = tmp_path / name
    stages = network()
    profile = profiling.profile(stages, 2, CPU, path)
    content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    events = json.loads(content)["traceEvents"]
    ranges = sorted(
        (event for event in events if event["name"].startswith("bsprof:")), key=lambda event: float(event["ts"])
    )
    assert [event["name"] for event in ranges] == [f"bsprof:{phase}" for phase, _ in stages] * 2
    assert all({"ph", "ts", "dur", "pid", "tid"} <= event.keys() for event in ranges)
    assert profile.trace == str(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_profilers_own_first_step_is_run_and_left_out():
    ran = []
    profile = profiling.profile([("forward", lambda: ran.append(torch.ones(2).add(1)))], 4, CPU)
    assert len(ran) == 5
    assert {operator.name: operator.calls for operator in profile.operators}["aten::add"] == 4
    assert profile.trace is None


def test_a_trace_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(BsprofError, match=r"--trace: .*gone.trace\.json"):
        profiling.profile(network(), 1, CPU, tmp_path / "gone" / "trace.json")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(profiling.TraceNotKeptError, match=r"--trace: .*taken\.json") as raised:
        profiling.profile(network(), 1, CPU, tmp_path / "taken.json")
    assert raised.value.profile.operators  # what it says was learned all the same
    assert raised.value.profile.trace is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.json"]


def test_a_trace_takes_an_older_ones_place(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("older")
    profiling.profile(network(), 1, CPU, path)
    assert json.loads(path.read_text())["traceEvents"]


def fail_at(call: int, error: BaseException) -> Stage:
    calls = iter(range(call + 1))

    def backward() -> None:
        if next(calls) == call:
            raise error

    return "backward", backward


@pytest.mark.parametrize("call", [0, 2])
def test_what_a_stage_raises_comes_through_with_its_phase_and_the_profiler_stops(call):
    stages = [("forward", lambda: None), fail_at(call, torch.OutOfMemoryError("CUDA out of memory."))]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        profiling.profile(stages, 3, CPU)
    assert running_phase(stages, caught.value) == "backward"
    assert profiling.profile(network(), 1, CPU).operators_ns > 0


def test_another_profiler_around_the_window_is_said_and_goes_on():
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as outer:
        with pytest.raises(BsprofError, match="another profiler") as caught:
            profiling.profile(network(), 1, CPU)
        torch.ones(2).add(1)
    assert "--profile-steps 0" in (caught.value.hint or "")
    assert "aten::add" in {event.key for event in outer.key_averages()}


@pytest.mark.parametrize("only_first", [True, False])
def test_a_profiler_inside_the_training_loop_is_said(only_first):
    """torch cancels the outer session, silently or by an error, and to export a cancelled one is a crash."""
    calls = []

    def forward() -> None:
        calls.append(1)
        if len(calls) == 1 or not only_first:
            with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True):
                torch.ones(2).add(1)

    with pytest.raises(BsprofError, match="a profiler of its own"):
        profiling.profile([("forward", forward)], 2, CPU)
    assert profiling.profile(network(), 1, CPU).operators_ns > 0


# --- a device that could not be traced --------------------------------------------------------------


def on_device(**figures: Any) -> Profile:
    return Profile(steps=1, wall_ns=1, phase_ns={"forward": 1}, **figures)


def test_why_a_device_was_not_traced_is_told(monkeypatch):
    monkeypatch.setattr(profiling, "supported_activities", lambda: {ProfilerActivity.CPU, ProfilerActivity.CUDA})
    empty = profiling.untraced(on_device(), CUDA)
    assert empty and empty.code == "device_not_profiled" and "CUPTI" in empty.text
    unjoined = profiling.untraced(on_device(busy_total_ns=5), CUDA)
    assert unjoined and "call that launched it" in unjoined.text
    monkeypatch.setattr(profiling, "supported_activities", lambda: {ProfilerActivity.CPU})
    unsupported = profiling.untraced(on_device(), CUDA)
    assert unsupported and "does not trace cuda" in unsupported.text
    unknown = profiling.untraced(on_device(), torch.device("mps"))
    assert unknown and "knows no mps" in unknown.text


def test_a_traced_device_has_no_excuse():
    assert profiling.untraced(on_device(busy_ns={"forward": 0}), CUDA) is None


# --- NVTX -------------------------------------------------------------------------------------------


class Nvtx:
    """What torch.cuda.nvtx is called with: its ranges go to a tool that is not here."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def range_push(self, name: str) -> int:
        self.calls.append(f"+{name}")
        return 0

    def range_pop(self) -> int:
        self.calls.append("-")
        return 0


def test_each_stage_runs_inside_a_range_of_its_name(monkeypatch):
    nvtx = Nvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    stages = profiling.ranged([(name, partial(nvtx.calls.append, name)) for name in ("data", "forward")], CUDA)
    assert [phase for phase, _ in stages] == ["data", "forward"]
    nvtx.calls.clear()
    for _, run in stages:
        run()
    assert nvtx.calls == ["+data", "data", "-", "+forward", "forward", "-"]


def test_a_range_ends_where_its_stage_fails(monkeypatch):
    nvtx = Nvtx()
    monkeypatch.setattr(torch.cuda, "nvtx", nvtx)
    bare = [("forward", lambda: None), fail_at(0, LookupError("gone"))]
    stages = profiling.ranged(bare, CUDA)
    nvtx.calls.clear()
    with pytest.raises(LookupError) as caught:
        stages[1][1]()
    assert nvtx.calls == ["+backward", "-"]
    assert running_phase(bare, caught.value) == "backward"
    assert running_phase(stages, caught.value) is None  # not another's phase


def test_nvtx_needs_a_cuda_device():
    with pytest.raises(BsprofError, match=r"--nvtx.*CUDA device"):
        profiling.ranged(network(), CPU)


def test_a_build_without_nvtx_is_said(monkeypatch):
    def missing(name: str) -> int:
        raise RuntimeError("NVTX functions not installed. Are you sure you have a CUDA build?")

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", missing)
    with pytest.raises(BsprofError, match=r"--nvtx.*not installed"):
        profiling.ranged(network(), CUDA)


def test_the_window_leaves_no_files_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    profiling.profile(network(), 1, CPU)
    assert list(Path(tmp_path).iterdir()) == []
