"""A result as a CUDA machine would leave it, made up by arithmetic.

NOTHING IN IT WAS MEASURED. It exercises every noun that only a device fills, where there is no device: the host's
name says so, in the file as well. `python tests/synthetic.py` writes the golden file again.
"""

from __future__ import annotations

import random
from pathlib import Path

from bsprof.model import (
    Accelerator,
    Axes,
    Backends,
    Block,
    Case,
    Ceiling,
    Ceilings,
    Copy,
    Energy,
    Environment,
    Facts,
    Hotspot,
    Measurement,
    Memory,
    Outcome,
    Plan,
    Profile,
    Result,
    Samples,
    Serialised,
    Settings,
    Startup,
    Stop,
    Telemetry,
    case_key,
)

GOLDEN = Path(__file__).parent / "golden" / "cuda-schema-1.json"
HOST = "synthetic (made up by tests/synthetic.py, never measured)"
MS, GIB = 1_000_000, 2**30
STEPS = 24
BATCHES, TOO_LARGE = (32, 64, 128, 256), 8192

ENVIRONMENT = Environment(
    host=HOST,
    os="none",
    kernel="none",
    hypervisor=None,
    cpu="synthetic CPU",
    cores_logical=16,
    cores_physical=8,
    cores_usable=16,
    cpu_quota=None,
    memory_bytes=128 * GIB,
    memory_limit_bytes=None,
    shm_bytes=64 * GIB,
    accelerators=(
        Accelerator(
            name="synthetic GPU",
            kind="cuda",
            index=0,
            uuid="GPU-00000000-0000-0000-0000-000000000000",
            memory_bytes=80 * GIB,
            capability="9.0",
            multiprocessors=132,
            pcie="gen5 x16",
            power_limit_w=700.0,
            mig=False,
        ),
    ),
    driver="0.0",
    python="3.12.0",
    torch="2.11.0",
    torchvision="0.26.0",
    cuda="13.0",
    cudnn="9.0",
    numpy="2.0.0",
    libc="none",
    bsprof="0.1.0",
    git_commit=None,
    variables={},
)

CEILINGS = Ceilings(
    identity="synthetic",
    created="2031-01-01T00:00:00Z",
    rates={
        "h2d_pinned": Ceiling(value=50e9, unit="B/s", low=49e9, high=51e9),
        "h2d_pageable": Ceiling(value=8e9, unit="B/s", low=7e9, high=9e9),
        "matrix_tf32": Ceiling(value=100e12, unit="FLOP/s", low=99e12, high=101e12),
    },
)


def cuda_result() -> Result:
    """Return a sweep of batch sizes with and without cuDNN's search.

    The host needs 9 ms to launch a step whatever the batch, so that small batches are launch-bound and the largest
    computes all the time.
    """
    measurements = [_measured(batch, search) for batch in BATCHES for search in (False, True)]
    measurements += [_out_of_memory(search) for search in (False, True)]
    return Result(
        created="2031-01-01T00:00:00Z",
        plan=Plan(
            axes=Axes(batch_size=(*BATCHES, TOO_LARGE), workers=(8,), cudnn_benchmark=(False, True)),
            stop=Stop(precision=0.02, min_steps=STEPS),
        ),
        environment=ENVIRONMENT,
        measurements=measurements,
        ceilings=CEILINGS,
        wall_s=100.0,
    )


def _settings(batch: int, search: bool) -> Settings:
    return Settings(batch_size=batch, workers=8, cudnn_benchmark=search)


def _measured(batch: int, search: bool) -> Measurement:
    dice = random.Random(f"{batch} {search}")
    jitter = [0.99 + 0.02 * dice.random() for _ in range(STEPS)]
    faster = 0.9 if search else 1.0
    launch = {"data": 0.1, "h2d": 0.1, "forward": 3.0, "backward": 4.0, "optimizer": 2.0}
    busy = {"data": 0.0, "h2d": 0.003 * batch, "forward": 0.02, "backward": 0.04, "optimizer": 0.0}
    busy = {phase: ms * (batch if phase not in ("data", "h2d") else 1) for phase, ms in busy.items()}
    busy["forward"], busy["backward"], busy["optimizer"] = (
        busy["forward"] * faster,
        busy["backward"] * faster,
        0.5,
    )
    device = {phase: max(launch[phase], busy[phase]) for phase in launch}
    device["data"] = 0.02
    ahead = sum(device.values()) - sum(launch.values())
    host = {**launch, "data": launch["data"] + max(ahead, 0.0)}
    host_ns = {phase: [round(ms * MS * factor) for factor in jitter] for phase, ms in host.items()}
    device_ns = {phase: [round(ms * MS * factor) for factor in jitter] for phase, ms in device.items()}
    step_ns = [sum(column) + 20_000 for column in zip(*host_ns.values(), strict=True)]
    device_step_ns = [sum(column) + 20_000 for column in zip(*device_ns.values(), strict=True)]
    warmup = [(2500 if search else 900) * MS, *([(60 if search else 12) * MS] * 3), *step_ns[:17]]
    blocks = []
    for start in range(0, STEPS, 6):
        wall, device_wall = sum(step_ns[start : start + 6]), sum(device_step_ns[start : start + 6])
        blocks.append(Block(kind="instrumented", steps=6, wall_ns=wall, device_wall_ns=device_wall))
        bare = 0.998 + 0.003 * dice.random()
        blocks.append(Block(kind="bare", steps=6, wall_ns=round(wall * bare), device_wall_ns=round(device_wall * bare)))
    settings = _settings(batch, search)
    return Measurement(
        case=Case(key=case_key(settings), settings=settings),
        outcome=Outcome(kind="ok"),
        wall_s=10.0,
        inside_s=9.0,
        facts=_facts(batch, search),
        startup=Startup(process_ns=15 * MS, build_ns=300 * MS, iterator_ns=40 * MS, first_batch_ns=200 * MS),
        samples=Samples(
            batch_size=batch,
            step_ns=step_ns,
            host_ns=host_ns,
            device_step_ns=device_step_ns,
            device_ns=device_ns,
            blocks=blocks,
            warmup_ns=warmup,
            recorder_ns_per_step=21_000,
        ),
        serialised=Serialised(
            host_ns={phase: [round((device[phase] + (1.5 if phase == "data" else 0.1)) * MS)] * 10 for phase in device}
        ),
        memory=_memory(batch, search),
        profile=_profile(host, busy, search),
        telemetry=_telemetry(batch, sum(device_step_ns)),
    )


def _facts(batch: int, search: bool) -> Facts:
    return Facts(
        device="cuda:0",
        clock="host and device",
        backends=Backends(
            cudnn_enabled=True,
            cudnn_version=90000,
            cudnn_benchmark=search,
            cudnn_deterministic=False,
            cudnn_allow_tf32=True,
            matmul_allow_tf32=True,
            deterministic_algorithms="off",
            cublas_workspace_config=None,
            allocator_config=None,
        ),
        dtype="tf32",
        batch_bytes=batch * 3 * 224 * 224 * 4,
        flops_per_step=batch * 1_800_000_000,
        threads=16,
        parameters=3_504_872,
        image_size=224,
        samples_in_dataset=4000,
        classes=1000,
        malloc="pinned",
    )


def _memory(batch: int, search: bool) -> Memory:
    base, a_sample = GIB // 2, 38 * 2**20
    dice = random.Random(batch)
    allocated = base + round(batch * a_sample * (0.99 + 0.02 * dice.random()))
    reserved = allocated + GIB // (2 if search else 4)
    return Memory(
        pool="device",
        allocated_peak=allocated,
        reserved_peak=reserved,
        allocated_between=base,
        phase_allocated_peak={
            "data": base,
            "h2d": base + batch * 600_000,
            "forward": base + batch * a_sample * 3 // 4,
            "backward": allocated,
            "optimizer": base + GIB // 16,
        },
        phase_reserved_peak=dict.fromkeys(("data", "h2d", "forward", "backward", "optimizer"), reserved),
        inactive_split=GIB // 32,
        retries=0,
        total=80 * GIB,
        outside=GIB,
    )


def _profile(host: dict[str, float], busy: dict[str, float], search: bool) -> Profile:
    steps = 5
    busy_ns = {phase: round(ms * MS * steps) for phase, ms in busy.items()}
    kernels_ns = sum(busy_ns.values()) - busy_ns["h2d"]
    shares = {
        "sm90_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nchw_tilesize128x128x32_cudnn": 0.31,
        "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>(float, float, float, float)": 0.22,
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>, std::array<char*, 3>>": 0.11,
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::TensorListMetadata<4>>": 0.05,
    }
    return Profile(
        steps=steps,
        wall_ns=round(sum(host.values()) * 1.3 * MS * steps),
        phase_ns={phase: round(ms * 1.3 * MS * steps) for phase, ms in host.items()},
        busy_ns=busy_ns,
        busy_total_ns=sum(busy_ns.values()),
        launches=steps * (910 if search else 930),
        kernels_ns=kernels_ns,
        kernels=tuple(
            Hotspot(name=name, calls=steps * 52, ns=round(kernels_ns * share)) for name, share in shares.items()
        ),
        copies=(
            Copy(direction="HtoD pinned", calls=steps, ns=busy_ns["h2d"], bytes=round(busy_ns["h2d"] * 48)),
            Copy(direction="DtoD", calls=steps, ns=40_000),
        ),
        operators_ns=round(8 * MS * steps),
        operators=(
            Hotspot(name="aten::convolution_backward", calls=steps * 52, ns=2 * MS * steps),
            Hotspot(name="aten::cudnn_convolution", calls=steps * 52, ns=1 * MS * steps),
        ),
    )


def _telemetry(batch: int, window_ns: int) -> Telemetry:
    """Power and clocks at 10 Hz. Only the windows of large batches hold enough updates of the energy counter."""
    samples = max(window_ns // 100_000_000, 1) + 2
    times = [-50_000_000 + index * 100_000_000 for index in range(samples)]
    power = 150.0 + batch
    enough = batch >= 128
    return Telemetry(
        source="replay",
        device_uuid="GPU-00000000-0000-0000-0000-000000000000",
        time_ns=times,
        window_ns=window_ns,
        device={
            "power_w": [power] * samples,
            "sm_mhz": [1980] * samples,
            "temperature_c": [None, *[52] * (samples - 1)],
        },
        host={"busy_cores": [4.0] * samples},
        limits={"power_limit_w": 700.0, "sm_mhz_max": 1980},
        energy=Energy(
            joules=power * window_ns * 1e-9 if enough else None,
            source="counter",
            window_ns=window_ns,
            steps=float(STEPS),
            updates=12 if enough else 4,
            resolvable=enough,
            reason=None if enough else "4 updates of the energy counter in the timed window; 10 are needed",
        ),
        sampler_cpu_ns=samples * 400_000,
    )


def _out_of_memory(search: bool) -> Measurement:
    settings = _settings(TOO_LARGE, search)
    return Measurement(
        case=Case(key=case_key(settings), settings=settings),
        outcome=Outcome(
            kind="oom",
            message="CUDA out of memory in forward: 1.50 GiB asked for, 78.2 GiB allocated, 78.9 GiB reserved",
            hint="a smaller --batch-size, or --amp bf16",
            phase="forward",
            evidence={"requested_bytes": 3 * GIB // 2, "library": "torch"},
        ),
        wall_s=4.0,
    )


if __name__ == "__main__":
    from bsprof import store

    store.save(cuda_result(), str(GOLDEN))
