"""What `bsprof bench` makes of a device: failures, switches, sweeps, the profiler window and memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.command import bench, marked, python, told
from benchmarks.gpu.verdict import Line, Stand, Unable, fail, judge, skip
from bsprof import findings, metrics
from bsprof.model import LargestBatch, Measurement, Result
from bsprof.readings import Reading

SHORT = ("--max-case-time", "4", "--precision", "0.05")
REHEARSED = ("--max-case-time", "0.4", "--precision", "0.5", "--threads", "1")
LEFT_BYTES = 64 * 2**20
"""Free memory may differ by this much before and after: what the driver keeps for itself comes and goes."""
PATIENCE_S = 3.0
"""A driver may take back what a killed process held a moment after that process has been reaped."""
BUSY_TOLERANCE = 0.05
"""Kernels of neighbouring phases may overlap a little, and some belong to no phase."""
BUSY_BORDER = 0.7
"""Of its time on the device, a launch-bound step's kernels run for less than this, another's for more."""
LINE_TOLERANCE = 0.05
CAPPED_BYTES = 4 * 2**30
"""What the search for the largest batch is left on the device."""


def _stop(stand: Stand) -> tuple[str, ...]:
    return REHEARSED if stand.rehearsed else SHORT


# --- out of memory ----------------------------------------------------------------------------------


def out_of_memory(stand: Stand) -> Iterator[Line]:
    """Expect a batch far too large as a row with evidence, the next case measured, and nothing left behind.

    The model asks for 128 MiB a sample in one piece; 8192 samples ask for a tebibyte, more than any device has.
    The failure must name its phase, what was asked, allocated and reserved, and which library said so. After the
    command no process of it lives, and the device has as much free memory and the same processes as before. In a
    rehearsal the host's memory takes the device's place, under a limit.
    """
    before = _device_state(stand)
    arguments = ["--model", "benchmarks.gpu.models:hungry", "--data", "synthetic:3x8x8,n=64", "--batch-size", "8192,8"]
    if stand.rehearsed:
        arguments[1] = "benchmarks.gpu.models:nibbling"
        arguments[-1] = "65536,8"
        arguments += ["--host-memory", "4GiB"]
    arguments += ["--workers", "0", "--order", "listed", *_stop(stand)]
    result, finished = bench(stand, "oom", arguments, timeout_s=120)
    yield from judge_oom(result, kind="host_oom" if stand.rehearsed else "oom")
    alive = marked(finished.mark)
    yield judge(
        "no process is left", not alive, f"{len(alive)} left", "0", f"{[process.pid for process in alive]} live"
    )
    if before is None:
        yield skip("no device memory is left", "no device")
        return
    end = time.monotonic() + PATIENCE_S
    while (line := judge_left(before, _device_state(stand) or before)).verdict == "FAIL" and time.monotonic() < end:
        time.sleep(0.2)
    yield line


def judge_oom(result: Result, *, kind: str = "oom") -> Iterator[Line]:
    """Hold the failed case and the one after it against what was asked of them."""
    large, *rest = result.measurements
    outcome = large.outcome
    yield judge("a batch too large", outcome.kind == kind, told(large), kind, "it ended otherwise")
    needed = ["asked_bytes", "allocated_bytes", "reserved_bytes", "library"] if kind == "oom" else ["asked_bytes"]
    missing = [name for name in needed if outcome.evidence.get(name) is None]
    if outcome.phase is None:
        missing.insert(0, "phase")
    shown = ", ".join(f"{name.removesuffix('_bytes')} {outcome.evidence.get(name)}" for name in needed)
    yield judge(
        "its evidence", not missing, f"phase {outcome.phase}, {shown}", "nothing missing", f"no {', '.join(missing)}"
    )
    ends = [told(case) for case in rest]
    yield judge(
        "the case after it", bool(ends) and set(ends) == {"ok"}, ", ".join(ends) or "none", "ok", "it is not ok"
    )


DeviceState = tuple[int, frozenset[int] | None]
"""Free bytes, and the processes on the device where NVML tells."""


def _device_state(stand: Stand) -> DeviceState | None:
    if stand.rehearsed:
        return None
    stand.device.wait()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(stand.device.torch_device)
    return free, _device_processes(stand.device.torch_device)


def _device_processes(device: torch.device) -> frozenset[int] | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        return frozenset(process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def judge_left(before: DeviceState, after: DeviceState) -> Line:
    """Hold the device's state after a command against that before it."""
    lost = before[0] - after[0]
    more = after[1] - before[1] if before[1] is not None and after[1] is not None else frozenset()
    listed = "NVML lists no processes" if after[1] is None else f"{len(more)} more processes on the device"
    return judge(
        "no device memory is left",
        lost <= LEFT_BYTES and not more,
        f"{lost / 2**20:+.0f} MiB in use, {listed}",
        f"<= {LEFT_BYTES // 2**20} MiB, 0",
        f"still there: {sorted(more)}" if more else "memory is still taken",
    )


# --- cudnn ------------------------------------------------------------------------------------------

LOSSES = """
import sys
from benchmarks.gpu.cases import print_losses
print_losses(sys.argv[1], int(sys.argv[2]))
"""


def cudnn(stand: Stand) -> Iterator[Line]:
    """Expect all four settings of cuDNN in force as asked, and `deterministic` to give two processes the same bits.

    The founding table varied one switch and another with it; here each case says what torch had when it was measured.
    The bits are those of ResNet-20's losses over 20 steps from the same seed, each time in a fresh process.
    """
    switches = ("--cudnn-benchmark", "off,on", "--cudnn-deterministic", "off,on")
    arguments = ["--model", "resnet20", "--data", "synthetic:3x32x32,n=256", *switches]
    arguments += ["--batch-size", "8" if stand.rehearsed else "128", "--workers", "0", *_stop(stand)]
    result, _ = bench(stand, "cudnn", arguments, timeout_s=150)
    if stand.rehearsed:
        yield skip("four settings of cuDNN", f"no cuDNN on a CPU: {[told(case) for case in result.measurements]}")
    else:
        yield from judge_cudnn(result.measurements)
    losses = []
    for _ in range(2):
        place, steps = str(stand.device.torch_device), "2" if stand.rehearsed else "20"
        finished = python(stand, ["-c", LOSSES, place, steps], timeout_s=60)
        if finished.code:
            raise Unable(f"training with deterministic cuDNN: {finished.complaint}")
        losses.append(finished.out.split())
    yield judge_bits(*losses)


def judge_cudnn(measurements: Sequence[Measurement]) -> Iterator[Line]:
    """Ask for all four combinations, each ok and in force as asked."""
    ends = {
        (case.settings.cudnn_benchmark, case.settings.cudnn_deterministic): measurement
        for measurement in measurements
        if (case := measurement.case).settings is not None
    }
    bad = [told(measurement) for measurement in measurements if measurement.outcome.kind != "ok"]
    wanted = {(a, b) for a in (False, True) for b in (False, True)}
    yield judge(
        "four settings of cuDNN",
        ends.keys() == wanted and not bad,
        f"{len(ends)} measured, {len(measurements) - len(bad)} ok",
        "4, all ok",
        "; ".join(bad) or "not the four that were asked",
    )
    wrong = []
    for (asked_benchmark, asked_deterministic), measurement in ends.items():
        backends = measurement.facts.backends if measurement.facts else None
        if backends is None:
            wrong.append("not captured")
        elif (backends.cudnn_benchmark, backends.cudnn_deterministic) != (asked_benchmark, asked_deterministic):
            wrong.append(
                f"asked {asked_benchmark}, {asked_deterministic}: in force "
                f"{backends.cudnn_benchmark}, {backends.cudnn_deterministic}"
            )
    yield judge(
        "in force as asked", bool(ends) and not wrong, f"{len(ends) - len(wrong)} of {len(ends)}", "all", str(wrong)
    )


def judge_bits(first: Sequence[str], second: Sequence[str]) -> Line:
    """Ask that two processes printed the same losses, to the bit."""
    same = sum(a == b for a, b in zip(first, second, strict=False))
    return judge(
        "deterministic losses of two processes",
        bool(first) and list(first) == list(second),
        f"{same} of {max(len(first), len(second))} steps alike, the last {(first or ['none'])[-1]}",
        "all",
        "the bits differ",
    )


def print_losses(place: str, steps: int) -> None:
    """Print the loss of each of `steps` steps of ResNet-20 under `cudnn.deterministic`, as hexadecimal floats."""
    from bsprof.workloads.registration import ImageShape
    from bsprof.workloads.registry import build_model

    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)
    device = torch.device(place)
    model = build_model("resnet20", classes=10, shape=ImageShape(3, 32, 32), seed=0).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    size = 128 if device.type == "cuda" else 4
    for _ in range(steps):
        images = torch.randn(size, 3, 32, 32, generator=generator).to(device)
        labels = torch.randint(0, 10, (size,), generator=generator).to(device)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(float(loss.detach()).hex())


# --- a sweep ----------------------------------------------------------------------------------------


def sweep(stand: Stand) -> Iterator[Line]:
    """Expect a sweep over batch, workers and precision on JPEG files to capture everything that a device can tell.

    Eight cases: all ok, phases on both clocks, serialised window, memory, telemetry and profile not null, the profile
    with the device's busy time. One more case writes a Chrome trace, which must parse and hold what ran on the device.
    """
    axes = [
        "--batch-size",
        "32,128",
        "--workers",
        "0,4",
        "--amp",
        "off,bf16",
        "--data",
        "jpeg:128x128,n=256",
        "--image-size",
        "96",
    ]
    if stand.rehearsed:
        axes = ["--batch-size", "4", "--workers", "0", "--data", "jpeg:48x48,n=10", "--image-size", "32"]
    expected = 1 if stand.rehearsed else 8
    result, _ = bench(stand, "sweep", [*axes, *_stop(stand)], timeout_s=200)
    yield from judge_sweep(result.measurements, expected, on_device=not stand.rehearsed)
    where = stand.folder / "trace.json.gz"
    one = ["--model", "mnist_cnn", "--data", "synthetic:1x28x28,n=64", "--batch-size", "16", "--workers", "0"]
    traced, _ = bench(stand, "traced", [*one, "--trace", str(where), *_stop(stand)], timeout_s=90)
    profile = traced.measurements[0].profile
    if profile is None or profile.trace is None:
        yield fail("a Chrome trace", f"none was written: {told(traced.measurements[0])}")
        return
    yield judge_trace(_trace_bytes(Path(profile.trace), stand.folder), on_device=not stand.rehearsed)


def judge_sweep(measurements: Sequence[Measurement], expected: int, *, on_device: bool = True) -> Iterator[Line]:
    """Ask that all cases are ok and nothing is null that the device can tell."""
    bad = [told(measurement) for measurement in measurements if measurement.outcome.kind != "ok"]
    ok = len(measurements) - len(bad)
    yield judge("cases", ok == expected, f"{ok} of {expected} ok", "all", "; ".join(bad) or "cases are missing")
    needed = ["samples", "memory", "telemetry", "profile", "facts.backends"]
    if on_device:
        needed += [
            "samples.device_ns",
            "samples.device_step_ns",
            "serialised",
            "profile.busy_ns",
            "profile.busy_total_ns",
        ]
    for path in needed:
        missing = sum(_at(measurement, path) is None for measurement in measurements)
        yield judge(
            f"{path} captured",
            bool(measurements) and not missing,
            f"{len(measurements) - missing} of {len(measurements)}",
            "all",
            f"null in {missing}",
        )
    if on_device:
        sources = sorted({m.telemetry.source for m in measurements if m.telemetry})
        yield judge(
            "telemetry's source", sources == ["nvml"], ", ".join(sources) or "none", "nvml", "NVML was not read"
        )
        clocks = sorted({m.facts.clock for m in measurements if m.facts})
        yield judge("clocks", clocks == ["host and device"], ", ".join(clocks), "host and device", "one clock alone")
    residuals = [_value("residual", measurement) for measurement in measurements]
    known = [abs(value) for value in residuals if value is not None]
    worst = max(known, default=float("nan"))
    yield judge(
        "phases account for each case",
        len(known) == len(measurements) > 0 and worst <= 0.01,
        f"largest residual {worst:.3%}",
        "<= 1%",
        "phases and window differ, or no residual is known",
    )


def _at(measurement: Measurement, path: str) -> object:
    value: object = measurement
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _value(name: str, measurement: Measurement) -> float | None:
    if measurement.samples is None:
        return None
    value = metrics.METRICS[name].compute(Reading(measurement.samples))
    return value if isinstance(value, float) else None


def _trace_bytes(named: Path, folder: Path) -> bytes:
    path = next((place for place in (named, folder / named) if place.is_file()), None)
    if path is None:
        raise Unable(f"the trace {named} is not there")
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def judge_trace(content: bytes, *, on_device: bool = True) -> Line:
    """Ask that a Chrome trace is JSON with events, kernels among them, and the phases annotated."""
    what, limit = "a Chrome trace", "events, kernels and phases" if on_device else "events"
    try:
        events = json.loads(content)["traceEvents"]
        kernels = sum(event.get("cat") == "kernel" for event in events)
        annotated = sum(event.get("cat") == "user_annotation" for event in events)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return judge(what, False, f"{len(content)} bytes", limit, f"does not parse: {error!r}")
    return judge(
        what,
        bool(events) and (not on_device or bool(kernels and annotated)),
        f"{len(events)} events, {kernels} kernels, {annotated} annotations",
        limit,
        "it is empty of them",
    )


# --- the profiler window ----------------------------------------------------------------------------


def profiler(stand: Stand) -> Iterator[Line]:
    """Expect kernel-busy time to add up over the phases, and the right verdict on two models of known character.

    Twenty tiny layers take longer to launch than to run: busy for less than 70 % of the step, launch-bound. Products
    of matrices of 8192 keep the device busy from end to end: not launch-bound.
    """
    models = ("tiny_mlp", "small_matmuls") if stand.rehearsed else ("tiny_mlp", "large_matmuls")
    for model, launch_bound in zip(models, (True, False), strict=True):
        batch = "16" if launch_bound or stand.rehearsed else "1024"
        arguments = ["--model", f"benchmarks.gpu.models:{model}", "--data", "synthetic:3x8x8,n=2048"]
        arguments += ["--batch-size", batch, "--workers", "0", *_stop(stand)]
        result, _ = bench(stand, model, arguments, timeout_s=90)
        yield from judge_profile(result, model, launch_bound=launch_bound, on_device=not stand.rehearsed)


def judge_profile(result: Result, model: str, *, launch_bound: bool, on_device: bool = True) -> Iterator[Line]:
    """Hold one case's profile against itself and against what the model is known to be."""
    measurement = result.measurements[0]
    profile = measurement.profile
    if profile is None:
        yield fail(f"profile of {model}", f"not captured: {told(measurement)}")
        return
    if not on_device:
        seen = len(profile.operators)
        yield judge(f"operators of {model}", seen > 0, f"{seen} of the costliest", ">= 1", "none was seen")
        return
    if profile.busy_ns is None or not profile.busy_total_ns:
        notes = "; ".join(note.text for note in measurement.notes)
        yield fail(f"kernels of {model}", f"no busy time was captured; {notes}")
        return
    parts = sum(profile.busy_ns.values()) / profile.busy_total_ns
    yield judge(
        f"busy time of {model}'s phases",
        abs(parts - 1) <= BUSY_TOLERANCE,
        f"{parts:.1%} of the total of {profile.busy_total_ns / profile.steps / 1e6:.3f} ms/step",
        f"100% ± {BUSY_TOLERANCE:.0%}",
        "the phases do not add up to the total",
    )
    mean_ns = _device_step_ns(measurement)
    if mean_ns is None:
        yield fail(f"busy share of {model}", "no device time was captured")
        return
    share = profile.busy_total_ns / profile.steps / mean_ns
    yield judge(
        f"busy share of {model}",
        (share < BUSY_BORDER) == launch_bound,
        f"{share:.1%} of a step of {mean_ns / 1e6:.3f} ms",
        f"{'<' if launch_bound else '>='} {BUSY_BORDER:.0%}",
        "it is not the kind of model that it is known to be",
    )
    yield _verdict(result, model, launch_bound=launch_bound)


def _device_step_ns(measurement: Measurement) -> float | None:
    samples = measurement.samples
    if samples is None or not samples.device_step_ns:
        return None
    return float(np.mean(samples.device_step_ns))


def _verdict(result: Result, model: str, *, launch_bound: bool) -> Line:
    """Ask bsprof itself, which judges from a saved result alone."""
    what, wanted = f"bsprof's verdict on {model}", "launch-bound" if launch_bound else "not launch-bound"
    found = findings.launching(metrics.summarise(result)[0])
    if found is None:
        return judge(what, False, "none", wanted, "it came to no verdict")
    verdict = "launch-bound" if found.whole else "not launch-bound"
    return judge(
        what,
        found.whole == launch_bound,
        f"{verdict}, busy {found.busy_share:.0%}, host {found.host_share:.0%}",
        wanted,
        "it misjudges",
    )


# --- memory -----------------------------------------------------------------------------------------


def memory(stand: Stand) -> Iterator[Line]:
    """Expect peak memory to grow in a line with the batch, and the largest batch found to be the largest.

    MobileNetV2 at four batch sizes: the peaks lie on one line within 5 %. Then the device is filled up to 4 GiB by this
    process, and `--max-batch` searches the largest batch of a model that takes about 256 MiB a sample: it must have
    survived, and a batch at most one sixty-fourth larger (or by one) must have failed.
    """
    arguments = ["--model", "mobilenet_v2", "--data", "synthetic:3x96x96,n=256", "--batch-size", "64,128,192,256"]
    if stand.rehearsed:
        arguments = ["--model", "mnist_cnn", "--data", "synthetic:1x28x28,n=64", "--batch-size", "8,16,32"]
    result, _ = bench(stand, "memory", [*arguments, "--workers", "0", *_stop(stand)], timeout_s=120)
    yield judge_line(result.measurements, pool="host" if stand.rehearsed else "device")
    arguments = ["--model", "benchmarks.gpu.models:hungry", "--data", "synthetic:3x8x8,n=64", "--max-batch"]
    if stand.rehearsed:
        arguments[1] = "benchmarks.gpu.models:capped"
        arguments += ["--host-memory", "4GiB"]
    with _capped(stand):
        result, _ = bench(stand, "largest", [*arguments, "--workers", "0", *_stop(stand)], timeout_s=180)
    yield from judge_largest(result.largest_batches)


@contextlib.contextmanager
def _capped(stand: Stand) -> Iterator[None]:
    """Hold all free memory of the device but CAPPED_BYTES."""
    if stand.rehearsed:
        yield
        return
    free, _ = torch.cuda.mem_get_info(stand.device.torch_device)
    if free <= CAPPED_BYTES:
        raise Unable(f"only {free / 2**30:.1f} GiB of the device are free")
    ballast = torch.empty(free - CAPPED_BYTES, dtype=torch.uint8, device=stand.device.torch_device)
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()


def judge_line(measurements: Sequence[Measurement], *, pool: str = "device") -> Line:
    """Fit allocated peaks against batch sizes, and hold the largest deviation against the peak there."""
    what, limit = "peak memory over the batch", f"a rising line within {LINE_TOLERANCE:.0%}"
    points = [
        (m.case.settings.batch_size, m.memory.allocated_peak)
        for m in measurements
        if m.case.settings is not None and m.memory is not None and m.memory.pool == pool
    ]
    if len(points) < 3:
        return judge(what, False, f"{len(points)} peaks", limit, f"too few: {[told(m) for m in measurements]}")
    batches, peaks = np.asarray(sorted(points), dtype=np.float64).T
    if pool == "host":
        return skip(what, f"a CPU's resident set is no line: {peaks / 2**20} MiB")
    slope, intercept = np.polyfit(batches, peaks, 1)
    worst = float(np.max(np.abs(intercept + slope * batches - peaks) / peaks))
    return judge(
        what,
        slope > 0 and worst <= LINE_TOLERANCE,
        f"{slope / 2**20:.2f} MiB a sample, {intercept / 2**20:.0f} MiB at none, at most {worst:.2%} off",
        limit,
        "the peaks do not lie on a rising line",
        batches=batches.tolist(),
        peaks=peaks.tolist(),
    )


def judge_largest(found: Sequence[LargestBatch]) -> Iterator[Line]:
    """Ask that the batch found survived and one just above it failed."""
    what = "the largest batch"
    if len(found) != 1 or found[0].batch_size is None:
        yield fail(what, f"{len(found)} searches, batch {[one.batch_size for one in found]}")
        return
    (one,) = found
    batch = found[0].batch_size
    ended = one.tried.get(str(batch))
    yield judge(what, ended == "ok", f"{batch}: {ended}", "ok", f"tried: {one.tried}")
    failed = sorted(int(size) for size, how in one.tried.items() if how in ("oom", "host_oom") and int(size) > batch)
    nearest = failed[0] if failed else None
    largest = batch + max(1, batch // 64)
    yield judge(
        "the next larger batch",
        nearest is not None and nearest <= largest,
        f"{nearest}: {one.tried.get(str(nearest))}",
        f"fails, <= {largest}",
        f"tried: {one.tried}",
    )
