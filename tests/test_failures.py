"""Failures made for real in processes of their own, then those that need an accelerator from torch's own words."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from commands import interpret

from bsprof.errors import BsprofError
from bsprof.measure.failures import classify
from bsprof.model import Outcome

SCRIPT = """
import os, resource, signal, sys
import msgspec, torch
from torch.utils.data import DataLoader, Dataset
from bsprof.measure.failures import classify

class CorruptImageError(Exception):
    pass

class Images(Dataset):
    def __init__(self, failing): self.failing = failing
    def __len__(self): return 64
    def __getitem__(self, index):
        if index == 20: self.failing()
        return torch.zeros(3, 32, 32)

def kill(): os.kill(os.getpid(), signal.SIGKILL)
def leave(): os._exit(3)
def corrupt():
    try:
        raise ValueError("bad marker")
    except ValueError as cause:
        raise CorruptImageError("cannot decode img_00012.jpg\\nafter 512 bytes") from cause
def key(): {}["img_00012"]
def memory(): torch.empty(2**40)
def fine(): pass

def load(name):
    for _ in DataLoader(Images(globals()[name]), batch_size=16, num_workers=2): pass

def host():
    resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
    torch.zeros(2**30)
def numpy_host():
    resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))
    import numpy
    numpy.zeros(2**30)

if __name__ == "__main__":
    what, kills = sys.argv[1], int(sys.argv[2])
    try:
        globals()[what]() if what in ("host", "numpy_host") else load(what)
    except BaseException as error:
        sys.stdout.buffer.write(msgspec.json.encode(classify(error, "data", oom_kills=kills)))
"""


@pytest.fixture
def fails(tmp_path):
    """Run one kind of failure in a process of its own, behind `prefix` if given, and return its outcome."""
    script = tmp_path / "failing.py"
    script.write_text(SCRIPT)

    def run(what: str, oom_kills: int = 0, prefix: tuple[str, ...] = ()) -> Outcome:
        if not prefix:
            return msgspec.json.decode(interpret(SCRIPT, what, str(oom_kills)), type=Outcome)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [*prefix, sys.executable, str(script), what, str(oom_kills)]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        return msgspec.json.decode(done.stdout, type=Outcome)

    return run


# --- real failures ----------------------------------------------------------------------------------


def test_killed_worker_is_a_crash_with_its_pid_and_signal(fails):
    outcome = fails("kill")
    assert (outcome.kind, outcome.phase) == ("crash", "loader")
    assert outcome.evidence["signal"] == "SIGKILL"
    assert f"pid {outcome.evidence['worker_pid']}" in outcome.message


def test_killed_worker_is_host_oom_when_the_kernel_counted_a_kill(fails):
    outcome = fails("kill", oom_kills=1)
    assert outcome.kind == "host_oom"
    assert outcome.evidence["oom_kills"] == 1
    assert "--workers" in outcome.hint


def test_worker_that_leaves_is_a_crash_with_its_exit_code(fails):
    outcome = fails("leave")
    assert outcome.kind == "crash"
    assert outcome.evidence["exit_code"] == 3


def test_exception_in_a_worker_is_told_as_it_was_raised_there(fails):
    outcome = fails("corrupt")
    assert outcome.kind == "error"
    assert outcome.message.startswith("CorruptImageError in DataLoader worker ")
    assert outcome.message.endswith(": cannot decode img_00012.jpg")
    assert "in corrupt" in outcome.traceback
    assert "ValueError: bad marker" in outcome.traceback
    assert "reraise" not in outcome.traceback


def test_key_error_in_a_worker_keeps_its_message(fails):
    assert fails("key").message.endswith(": 'img_00012'")


def test_worker_out_of_memory_is_host_oom(fails):
    outcome = fails("memory")
    assert outcome.kind == "host_oom"
    assert outcome.evidence["asked_bytes"] == 4 * 2**40
    assert "DataLoader worker" in outcome.message


def test_torch_out_of_host_memory(fails):
    outcome = fails("host")
    assert (outcome.kind, outcome.phase) == ("host_oom", "data")
    assert outcome.evidence == {"asked_bytes": 4 * 2**30, "limit_bytes": 2**30}
    assert outcome.message == "host memory ran out: 4.00 GiB asked under a limit of 1.00 GiB"
    assert "in host" in outcome.traceback


def test_numpy_out_of_host_memory(fails):
    outcome = fails("numpy_host")
    assert outcome.kind == "host_oom"
    assert outcome.evidence["asked_bytes"] == 8 * 2**30


def small_shm(size: str, then: str = "true") -> tuple[str, ...]:
    """Return the command that runs what follows it with a /dev/shm of `size`, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && {then}"
    prefix = ("unshare", "--mount", "sh", "-c", mount + ' && exec "$@"', "sh")
    try:
        possible = subprocess.run([*prefix, "true"], capture_output=True, timeout=30).returncode == 0
    except OSError:
        possible = False
    if not possible:
        pytest.skip("needs the right to mount a small /dev/shm (root, Linux)")
    return prefix


def test_batches_larger_than_dev_shm(fails):
    outcome = fails("fine", prefix=small_shm("100k"))
    assert outcome.kind == "shm"
    assert outcome.evidence["shm_total_bytes"] < 2**20
    assert "--shm-size" in outcome.hint
    assert "--workers 0" in outcome.hint


def test_dev_shm_too_full_for_a_lock(fails):
    outcome = fails("fine", prefix=small_shm("100k", then="head -c 100k /dev/zero > /dev/shm/full"))
    assert outcome.kind == "shm"
    assert outcome.evidence["shm_free_bytes"] == 0


# --- an accelerator's, in the words of torch --------------------------------------------------------

PLAIN = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory "
    "75.50 GiB is allocated by PyTorch, and 1.50 GiB is reserved by PyTorch but unallocated. If reserved "
    "but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
WITH_POOLS = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 0 bytes is "
    "free. Process 4242 has 1.00 GiB memory in use. Including non-PyTorch memory, this process has 6.79 GiB memory in "
    "use. 4.00 GiB allowed; Of the allocated memory 3.50 GiB is allocated by PyTorch, with 256.00 MiB allocated in "
    "private pools (e.g., CUDA Graphs), and 12.00 KiB is reserved by PyTorch but unallocated."
)


def test_cuda_out_of_memory():
    outcome = classify(torch.OutOfMemoryError(PLAIN), "backward")
    assert (outcome.kind, outcome.phase) == ("oom", "backward")
    assert outcome.evidence == {
        "asked_bytes": 2 * 2**30,
        "total_bytes": round(79.15 * 2**30),
        "free_bytes": round(1.25 * 2**30),
        "process_bytes": round(77.9 * 2**30),
        "allocated_bytes": round(75.5 * 2**30),
        "reserved_bytes": 77 * 2**30,
        "library": "CUDA",
        "device": 1,
    }
    assert outcome.message == "CUDA out of memory: 2.00 GiB asked, 1.25 GiB of 79.15 GiB free"
    assert "--batch-size" in outcome.hint


def test_cuda_out_of_memory_with_neighbours_a_limit_and_private_pools():
    evidence = classify(torch.OutOfMemoryError(WITH_POOLS)).evidence
    assert evidence["asked_bytes"] == 512 * 2**20
    assert evidence["free_bytes"] == 0
    assert evidence["process_bytes"] == round(6.79 * 2**30)
    assert evidence["allowed_bytes"] == 4 * 2**30
    assert evidence["reserved_bytes"] == round(3.5 * 2**30) + 12 * 2**10


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("CUDA out of memory. Tried to allocate more than 1EB memory.", None),
        (
            "CUDA out of memory. Allocation was preemptively rejected because it would exceed "
            "per_process_memory_fraction limit. Requested size: 3.00 GiB. ",
            3 * 2**30,
        ),
    ],
)
def test_cuda_out_of_memory_in_fewer_words(message, asked):
    outcome = classify(torch.OutOfMemoryError(message))
    assert outcome.kind == "oom"
    assert outcome.evidence.get("asked_bytes") == asked


@pytest.mark.parametrize(
    ("message", "library"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cuBLAS"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuDNN"),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", "cuSOLVER"),
        ("cuFFT error: CUFFT_ALLOC_FAILED", "cuFFT"),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call", "CUDA"),
        ("\nCUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes", "CUDA"),
    ],
)
def test_libraries_that_ran_out_on_the_device(message, library):
    outcome = classify(RuntimeError(message), "forward")
    assert outcome.kind == "oom"
    assert outcome.evidence["library"] == library
    assert outcome.message == f"{library} out of memory"


def test_apple_out_of_memory():
    message = (
        "MPS backend out of memory (MPS allocated: 6.50 GiB, other allocations: 512.00 MiB, max allowed: 9.07 GiB). "
        "Tried to allocate 256.00 MiB on private pool."
    )
    outcome = classify(RuntimeError(message))
    assert outcome.kind == "oom"
    assert outcome.evidence["asked_bytes"] == 256 * 2**20
    assert outcome.evidence["allocated_bytes"] == round(6.5 * 2**30)
    assert outcome.evidence["allowed_bytes"] == round(9.07 * 2**30)


def test_bus_error_of_a_worker_is_shared_memory():
    cause = RuntimeError(
        "DataLoader worker (pid 4808) is killed by signal: Bus error. It is possible that dataloader's workers are "
        "out of shared memory. Please try to raise your shared memory limit."
    )
    error = RuntimeError("DataLoader worker (pid(s) 4808) exited unexpectedly")
    error.__cause__ = cause
    outcome = classify(error)
    assert outcome.kind == "shm"
    assert outcome.evidence["worker_pid"] == 4808


# --- what is none of these --------------------------------------------------------------------------


def test_fork_without_memory():
    assert classify(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "build").kind == "host_oom"


def test_full_disk_is_not_shared_memory():
    assert classify(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out.bin")).kind == "error"


def test_too_many_open_files_is_not_shared_memory():
    message = "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"
    outcome = classify(RuntimeError(message))
    assert outcome.kind == "error"
    assert "Too many open files" in outcome.message


def test_interruption():
    assert classify(KeyboardInterrupt(), "forward").kind == "interrupted"


def test_own_error_keeps_message_and_hint():
    outcome = classify(BsprofError("no such model: resnet19", hint="bsprof workloads lists them"), "build")
    assert (outcome.kind, outcome.phase) == ("error", "build")
    assert outcome.message == "no such model: resnet19"
    assert outcome.hint == "bsprof workloads lists them"


def test_anything_else_is_its_type_and_first_line():
    try:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    except RuntimeError as error:
        outcome = classify(error, "forward")
    assert outcome.kind == "error"
    assert outcome.message.startswith("RuntimeError: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in outcome.message
    assert "test_failures.py" in outcome.traceback


def test_exception_without_a_message():
    assert classify(AssertionError()).message == "AssertionError"


# --- determinism ------------------------------------------------------------------------------------


def test_an_operation_without_a_deterministic_version_is_named():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(before)
    outcome = classify(caught.value, "forward")
    assert (outcome.kind, outcome.phase) == ("nondeterministic", "forward")
    assert "put_" in (outcome.message or "")
    assert "--deterministic-algorithms off" in (outcome.hint or "")


def test_cublas_without_its_workspace_is_nondeterministic():
    text = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
        "CuBLAS and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment "
        "variable before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8"
    )
    assert classify(RuntimeError(text)).kind == "nondeterministic"


@pytest.mark.parametrize(("deterministic", "kind"), [(True, "nondeterministic"), (False, "error")])
def test_cudnn_without_an_algorithm_is_nondeterministic_where_that_was_asked(monkeypatch, deterministic, kind):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    outcome = classify(error, "backward")
    assert outcome.kind == kind
    assert (outcome.hint is not None) is deterministic


@pytest.mark.parametrize("said", ["could not create a primitive", "could not create a memory object"])
def test_onednn_under_a_limit_ran_out_of_memory(monkeypatch, said):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**31, resource.RLIM_INFINITY))
    outcome = classify(RuntimeError(said), "backward")
    assert (outcome.kind, outcome.phase) == ("host_oom", "backward")
    assert outcome.evidence == {"limit_bytes": 2**31, "library": "oneDNN"}
    assert "2.00 GiB" in (outcome.message or "")


def test_onednn_that_knows_no_such_operation_did_not_run_out_of_memory(monkeypatch):
    assert classify(RuntimeError("could not create a primitive"), "backward").kind == "error"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**31, resource.RLIM_INFINITY))
    text = "could not create a primitive descriptor for a convolution forward propagation primitive"
    assert classify(RuntimeError(text), "backward").kind == "error"
