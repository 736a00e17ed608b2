"""The machine as this process sees it, and machines recorded elsewhere."""

import os
import platform
import subprocess
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from bsprof import cgroup
from bsprof.compare import environment_differences
from bsprof.measure import environment
from bsprof.model import Accelerator, Environment


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# --- this machine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here() -> Environment:
    return environment.collect(Path(__file__).parent)


def test_environment_of_this_process(here):
    assert here.python == platform.python_version()
    assert here.torch == torch.__version__
    assert here.cpu
    assert here.kernel.endswith(platform.release())
    assert here.memory_bytes == psutil.virtual_memory().total
    assert 1 <= here.cores_usable <= here.cores_logical == psutil.cpu_count()
    assert len(here.accelerators) == (torch.accelerator.device_count() if torch.accelerator.is_available() else 0)
    if not here.accelerators:
        assert here.cuda is None  # a CUDA build of torch on a machine without a GPU has no CUDA
        assert here.cudnn is None


def test_environment_survives_its_file(here):
    assert msgspec.json.decode(msgspec.json.encode(here), type=Environment) == here


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="needs two cores and affinity")
def test_affinity_limits_the_usable_cores():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert environment.collect(Path()).cores_usable == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_accelerators_are_described_by_their_properties(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10 * 2**30, 9, 0
        uuid = "5a3e1f0c-0000-0000-0000-000000000001"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties())
    assert environment._describe("cuda", 1) == Accelerator(
        name="NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        kind="cuda",
        index=1,
        uuid="5a3e1f0c-0000-0000-0000-000000000001",
        memory_bytes=10 * 2**30,
        capability="9.0",
    )


def test_accelerator_without_properties_has_only_a_name():
    device = environment._describe("mps", 0)
    assert device.kind == "mps"
    assert device.name
    assert (device.uuid, device.memory_bytes, device.capability) == (None, None, None)


# --- git --------------------------------------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", *identity, "-C", str(directory), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_commit_with_a_mark_for_changes(tmp_path):
    assert environment.git_commit(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert environment.git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "train.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    (tmp_path / "bsprof-host.json").write_text("{}")
    assert environment.git_commit(tmp_path) == commit  # results lying about are no change
    (tmp_path / "train.py").write_text("2")
    assert environment.git_commit(tmp_path) == commit + "+"


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_commit(Path(__file__).parent) is None


# --- texts ------------------------------------------------------------------------------------------


def test_cpu_name():
    assert environment.cpu_name("processor\t: 0\nmodel name\t: AMD EPYC 7B12  64-Core\n") == "AMD EPYC 7B12 64-Core"
    assert environment.cpu_name("processor\t: 0\nCPU implementer\t: 0x41\n") is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
            "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n",
            "580.65.06",
        ),
        ("", None),
    ],
)
def test_driver_version(text, version):
    assert environment.driver_version(text) == version


@pytest.mark.parametrize(("number", "version"), [(91002, "9.10.2"), (90501, "9.5.1"), (8902, "8.9.2"), (None, None)])
def test_cudnn_version(number, version):
    assert environment.cudnn_version(number) == version


def test_variables_that_tell_and_no_secret():
    given = {
        "OMP_NUM_THREADS": "2",
        "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NVIDIA_API_KEY": "x",
        "TORCH_HUB_TOKEN": "x",
        "HOME": "/home/a",
    }
    names = list(environment.telling_variables(given))
    assert names == ["CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF"]


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"proc/cpuinfo": "flags\t\t: fpu sse2\n"}, None),
        ({"proc/cpuinfo": "flags\t\t: fpu hypervisor sse2\n"}, "unnamed"),
        (
            {
                "proc/cpuinfo": "flags\t\t: fpu hypervisor\n",
                "sys/devices/system/clocksource/clocksource0/available_clocksource": "tsc kvm-clock acpi_pm\n",
            },
            "KVM",
        ),
        ({"proc/cpuinfo": "flags\t\t: fpu hypervisor\n", "sys/hypervisor/type": "xen\n"}, "xen"),
        (
            {
                "proc/cpuinfo": "Features\t: fp asimd\n",
                "sys/class/dmi/id/sys_vendor": "Amazon EC2\n",
                "sys/class/dmi/id/product_name": "c7g.xlarge\n",
            },
            "Amazon EC2 c7g.xlarge",
        ),
        (
            {
                "proc/cpuinfo": "Features\t: fp asimd\n",
                "sys/class/dmi/id/sys_vendor": "Amazon EC2\n",
                "sys/class/dmi/id/product_name": "c7g.metal\n",
            },
            None,
        ),
        (
            {"proc/cpuinfo": "flags\t\t: fpu\n", "sys/class/dmi/id/sys_vendor": "Dell Inc.\n"},
            None,
        ),
    ],
)
def test_hypervisor(tmp_path, files, name):
    assert environment.hypervisor(write(tmp_path, files)) == name


@pytest.mark.parametrize(
    ("logical", "affinity", "quota", "usable"),
    [(8, None, None, 8), (8, 4, None, 4), (8, 8, 1.5, 2), (8, 8, 0.25, 1), (2, 2, 64.0, 2)],
)
def test_usable_cores(logical, affinity, quota, usable):
    assert environment.usable_cores(logical, affinity, quota) == usable


# --- control groups ---------------------------------------------------------------------------------

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:31 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory\n"
)
V1_CGROUP = "11:memory:/slurm/job_7/step_0\n4:cpu,cpuacct:/slurm/job_7/step_0\n1:name=systemd:/init\n"
V1_NO_LIMIT = "9223372036854771712\n"


def test_version_2_takes_the_tightest_limit_on_the_way_up(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/job.scope\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user.slice/memory.max": "8589934592\n",
            "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/job.scope/memory.events": "low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\n",
            "sys/fs/cgroup/user.slice/cpu.stat": "usage_usec 9\nnr_periods 50\nnr_throttled 5\nthrottled_usec 2000\n",
            "sys/fs/cgroup/user.slice/job.scope/cpu.stat": "usage_usec 9\nuser_usec 8\n",
            "sys/fs/cgroup/user.slice/job.scope/cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
        },
    )
    assert cgroup.cpu_quota(root) == 1.5
    assert cgroup.memory_limit(root) == 8 * 2**30
    assert cgroup.oom_kills(root) == 2
    assert cgroup.throttling(root) == cgroup.Throttling(periods=50, throttled_periods=5, throttled_ns=2_000_000)
    assert cgroup.pressure_file(root) == root / "sys/fs/cgroup/user.slice/job.scope/cpu.pressure"


def test_version_2_in_a_container_with_its_own_namespace(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/memory.events": "oom_kill 0\n",
        },
    )
    assert cgroup.cpu_quota(root) == 4.0
    assert cgroup.memory_limit(root) is None
    assert cgroup.oom_kills(root) == 0


def test_version_1_knows_its_own_word_for_no_limit(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": V1_CGROUP,
            "proc/self/mountinfo": V1_MOUNTS,
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.stat": "nr_periods 9\nnr_throttled 3\nthrottled_time 70\n",
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/step_0/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/step_0/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NO_LIMIT,
            "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "4294967296\n",
            "sys/fs/cgroup/memory/slurm/job_7/step_0/memory.limit_in_bytes": V1_NO_LIMIT,
            "sys/fs/cgroup/memory/slurm/job_7/step_0/memory.oom_control": "oom_kill_disable 0\noom_kill 1\n",
        },
    )
    assert cgroup.cpu_quota(root) == 2.0
    assert cgroup.memory_limit(root) == 4 * 2**30
    assert cgroup.oom_kills(root) == 1
    assert cgroup.throttling(root) == cgroup.Throttling(periods=9, throttled_periods=3, throttled_ns=70)


def test_version_1_in_a_container_that_sees_only_its_own_part(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0a1b\n",
            "proc/self/mountinfo": "35 31 0:31 /docker/0a1b /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
        },
    )
    assert cgroup.memory_limit(root) == 2 * 2**30
    assert cgroup.cpu_quota(root) is None


def test_both_versions_mounted_each_with_its_own_controllers(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a\n1:name=systemd:/\n0::/b\n",
            "proc/self/mountinfo": V1_MOUNTS + V2_MOUNT.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1073741824\n",
            "sys/fs/cgroup/unified/b/cpu.max": "50000 100000\n",
        },
    )
    assert cgroup.memory_limit(root) == 2**30
    assert cgroup.cpu_quota(root) == 0.5


def test_a_group_outside_the_namespace_falls_back_to_what_is_mounted(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../other\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cpu.max": "100000 100000\n",
            "other/cpu.max": "1 100000\n",
        },
    )
    assert cgroup.cpu_quota(root) == 1.0


def test_without_control_groups_nothing_is_limited(tmp_path):
    assert cgroup.cpu_quota(tmp_path) is None
    assert cgroup.memory_limit(tmp_path) is None
    assert cgroup.throttling(tmp_path) is None
    assert cgroup.oom_kills(tmp_path) is None
    write(tmp_path, {"proc/vmstat": "pgfault 12\noom_kill 4\n"})
    assert cgroup.oom_kills(tmp_path) == 4


# --- two environments -------------------------------------------------------------------------------


def test_an_environment_does_not_differ_from_itself(here):
    assert environment_differences(here, here) == []


def test_differences_say_what_changed(here):
    gpu = Accelerator(name="NVIDIA L4", kind="cuda", index=0, memory_bytes=24 * 2**30, capability="8.9")
    after = msgspec.structs.replace(
        here,
        torch="2.99.0",
        accelerators=(*here.accelerators, gpu),
        cores_usable=here.cores_usable + 1,
        variables={**here.variables, "OMP_NUM_THREADS": "97"},
    )
    before = msgspec.structs.replace(here, variables={})
    after = msgspec.structs.replace(after, variables={"OMP_NUM_THREADS": "97"})
    said = list(map(str, environment_differences(before, after)))
    assert f"torch: {here.torch} → 2.99.0" in said
    assert "OMP_NUM_THREADS: unset → 97" in said
    assert any(line.startswith("accelerators: ") and line.endswith("NVIDIA L4 (8.9, 24.0 GiB)") for line in said)
    assert len(said) == 4


def test_what_says_nothing_about_speed_is_no_difference(here):
    before = msgspec.structs.replace(
        here, memory_bytes=16 * 2**30, git_commit="0123456789ab", variables={"CUDA_HOME": "/usr/local/cuda"}
    )
    after = msgspec.structs.replace(
        here, memory_bytes=16 * 2**30 - 2**20, git_commit="0123456789ab+", variables={"TORCH_HOME": "/tmp/a"}
    )
    assert environment_differences(before, after) == []
    assert environment_differences(before, msgspec.structs.replace(after, git_commit=None)) == []


def test_another_commit_or_another_limit_is_a_difference(here):
    before = msgspec.structs.replace(here, git_commit="0123456789ab", memory_limit_bytes=None)
    after = msgspec.structs.replace(here, git_commit="ba9876543210", memory_limit_bytes=2**30)
    assert list(map(str, environment_differences(before, after))) == [
        f"memory_limit_bytes: none → {2**30}",
        "git_commit: 0123456789ab → ba9876543210",
    ]
