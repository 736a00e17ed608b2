"""The machine and the software that numbers depend on, as far as the system tells."""

from __future__ import annotations

import fnmatch
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy
import psutil  # type: ignore[import-untyped]
import torch

from bsprof import cgroup
from bsprof.measure import nvml
from bsprof.model import Accelerator, Environment

_VARIABLES = (
    "OMP_*",
    "MKL_*",
    "KMP_*",
    "GOMP_*",
    "OPENBLAS_*",
    "MALLOC_*",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "CUDA_*",
    "NVIDIA_*",
    "NCCL_*",
    "CUBLAS_*",
    "CUDNN_*",
    "PYTORCH_*",
    "TORCH_*",
)
_SECRETS = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)

_GUESTS = re.compile(
    r"KVM|QEMU|VMware|VirtualBox|Xen|HVM domU|Virtual Machine|Google Compute Engine|Amazon EC2|OpenStack|Parallels|"
    r"Apple Virtualization"
)
"""What firmware calls a machine that is none. Where the processor has no flag for it (ARM), this is the only sign."""

_CLOCKS = {"kvm-clock": "KVM", "hyperv": "Hyper-V", "xen": "Xen"}

_GIT_TIMEOUT_S = 5.0


def collect(directory: Path) -> Environment:
    """Return the environment of this process, with the git commit of `directory`.

    Reading the properties of an accelerator initialises CUDA, and a context takes memory on the device: call it in a
    process that ends afterwards, never in one that measures. What cannot be known is null.
    """
    cpuinfo = _read("/proc/cpuinfo")
    logical = psutil.cpu_count() or 1
    quota = cgroup.cpu_quota()
    accelerators = _accelerators()
    cuda = any(device.kind == "cuda" for device in accelerators)
    return Environment(
        host=platform.node(),
        os=_os_name(),
        kernel=f"{platform.system()} {platform.release()}",
        hypervisor=hypervisor(Path("/")),
        cpu=cpu_name(cpuinfo) or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        cores_logical=logical,
        cores_physical=psutil.cpu_count(logical=False),
        cores_usable=cores_of_this_process(),
        cpu_quota=quota,
        memory_bytes=psutil.virtual_memory().total,
        memory_limit_bytes=cgroup.memory_limit(),
        shm_bytes=_shm_bytes(),
        accelerators=accelerators,
        driver=driver_version(_read("/proc/driver/nvidia/version")) or (nvml.driver_version() if cuda else None),
        python=platform.python_version(),
        torch=str(torch.__version__),  # a subclass of str that JSON does not know
        torchvision=_version("torchvision"),
        cuda=torch.version.cuda if cuda else None,
        cudnn=cudnn_version(torch.backends.cudnn.version()) if cuda else None,  # type: ignore[no-untyped-call]
        numpy=numpy.__version__,
        libc=_libc(),
        bsprof=_version("bsprof") or "not installed",
        git_commit=git_commit(directory),
        variables=telling_variables(os.environ),
    )


# --- cores ------------------------------------------------------------------------------------------


def usable_cores(logical: int, affinity: int | None, quota: float | None) -> int:
    """Return the cores that can really run at once: at least one, a started fraction of a quota counting as a whole."""
    limits = [logical, affinity, None if quota is None else math.ceil(quota)]
    return max(1, min(limit for limit in limits if limit is not None))


def cores_of_this_process() -> int:
    """Return the usable cores here and now."""
    return usable_cores(psutil.cpu_count() or 1, _affinity(), cgroup.cpu_quota())


def _affinity() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def cpu_name(cpuinfo: str) -> str | None:
    """Return the processor's name from the text of `/proc/cpuinfo`; ARM kernels often give none."""
    for field in ("model name", "Hardware", "cpu model", "cpu"):
        if match := re.search(rf"^{field}\s*:\s*(\S.*)$", cpuinfo, re.MULTILINE):
            return " ".join(match[1].split())
    return None


def hypervisor(root: Path) -> str | None:
    """Return what runs this machine as a guest, by the best name there is, or `None` on bare metal."""
    dmi = root / "sys/class/dmi/id"
    firmware = " ".join(filter(None, (_read(dmi / "sys_vendor").strip(), _read(dmi / "product_name").strip())))
    flagged = re.search(r"^flags\s*:.*\bhypervisor\b", _read(root / "proc/cpuinfo"), re.MULTILINE) is not None
    named = _GUESTS.search(firmware) is not None and not firmware.endswith(".metal")
    kind = _read(root / "sys/hypervisor/type").strip()
    if not (flagged or named or kind):
        return None
    clocks = _read(root / "sys/devices/system/clocksource/clocksource0/available_clocksource")
    by_clock = next((name for sign, name in _CLOCKS.items() if sign in clocks), None)
    return firmware or kind or by_clock or "unnamed"


# --- accelerators -----------------------------------------------------------------------------------


def _accelerators() -> tuple[Accelerator, ...]:
    if not torch.accelerator.is_available():
        return ()
    current = torch.accelerator.current_accelerator()
    kind = current.type if current is not None else "unknown"
    return tuple(_describe(kind, index) for index in range(torch.accelerator.device_count()))


def _describe(kind: str, index: int) -> Accelerator:
    """Read what this kind of device tells: CUDA, ROCm and XPU have properties, Apple's has none."""
    read = getattr(getattr(torch, kind, None), "get_device_properties", None)
    properties = read(index) if read is not None else None
    major, minor = getattr(properties, "major", None), getattr(properties, "minor", None)
    uuid, memory = getattr(properties, "uuid", None), getattr(properties, "total_memory", None)
    uuid = None if uuid is None else str(uuid)
    # What a slice of a GPU computes with is CUDA's to tell; link, power limit and the name of the slice are NVML's.
    source = nvml.open_source(nvml.Gpu(index, uuid) if kind == "cuda" and not torch.version.hip else None, os.environ)
    source.close()
    generation, width = source.limits.get("pcie_generation_max"), source.limits.get("pcie_width_max")
    return Accelerator(
        name=getattr(properties, "name", None) or _sysctl("machdep.cpu.brand_string") or kind,
        kind=kind,
        index=index,
        uuid=source.uuid or uuid,
        memory_bytes=None if memory is None else int(memory),
        capability=None if major is None or minor is None else f"{major}.{minor}",
        multiprocessors=getattr(properties, "multi_processor_count", None),
        pcie=None if generation is None or width is None else f"gen{generation} x{width}",
        power_limit_w=source.limits.get("power_limit_w"),
        mig=source.mig,
    )


def driver_version(text: str) -> str | None:
    """Return the version from the text of `/proc/driver/nvidia/version`, of the open or the closed kernel module."""
    line = next((line for line in text.splitlines() if line.startswith("NVRM version")), "")
    match = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", line)
    return match[0] if match else None


def cudnn_version(number: int | None) -> str | None:
    """Return `9.5.1` for 90501 and `8.9.2` for 8902: the places moved with version 9."""
    if number is None:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


# --- software ---------------------------------------------------------------------------------------


def git_commit(directory: Path) -> str | None:
    """Return the short commit of `directory`, `+` behind it where tracked files have changed.

    `None` outside a repository, before its first commit, without git, or where git does not answer in time.
    """
    commit = _git(directory, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    # Untracked files do not count: the results themselves would.
    return commit + ("+" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")


def _git(directory: Path, *arguments: str) -> str | None:
    # Taking no lock keeps this from disturbing a git command that the user runs at the same time.
    return _output(["git", "--no-optional-locks", "-C", str(directory), *arguments])


def telling_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that change how fast things go, sorted, and never one whose name smells of a secret."""
    return {
        name: variables[name]
        for name in sorted(variables)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _VARIABLES) and not _SECRETS.search(name)
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _os_name() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    except (ValueError, OSError):  # another C library does not know the question
        return " ".join(filter(None, platform.libc_ver())) or "unknown"


def _shm_bytes() -> int | None:
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return None
    return stats.f_frsize * stats.f_blocks


def _sysctl(name: str) -> str | None:
    return _output(["sysctl", "-n", name]) if sys.platform == "darwin" else None


def _output(command: list[str]) -> str | None:
    """Run a short command and return what it wrote, or `None` where it failed, is missing or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
