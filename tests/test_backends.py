"""torch's switches, set as asked in a process of their own and read back as they were in force."""

from __future__ import annotations

import msgspec
import pytest
import torch
from commands import interpret
from torch import nn

from bsprof.measure import backends
from bsprof.model import Backends, Settings


def in_force(code: str, **variables: str) -> Backends:
    """Return what a process of its own has in force after `code`."""
    lines = (
        "import msgspec, sys, torch",
        "from bsprof.measure import backends",
        "from bsprof.model import Settings",
        code,
        "sys.stdout.buffer.write(msgspec.json.encode(backends.in_force()))",
    )
    return msgspec.json.decode(interpret("\n".join(lines), **variables), type=Backends)


def test_torchs_own_defaults():
    found = in_force("")
    assert (found.cudnn_enabled, found.cudnn_benchmark, found.cudnn_deterministic) == (True, False, False)
    assert (found.cudnn_allow_tf32, found.matmul_allow_tf32) == (True, False)
    assert (found.deterministic_algorithms, found.cublas_workspace_config) == ("off", None)


@pytest.mark.parametrize("searching", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnns_two_switches_are_apart_and_apart_from_the_algorithms(searching, deterministic):
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        backends.configure(Settings(cudnn_benchmark=searching, cudnn_deterministic=deterministic))
        found = backends.in_force()
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    assert (found.cudnn_benchmark, found.cudnn_deterministic) == (searching, deterministic)
    assert found.deterministic_algorithms == "off"


def test_deterministic_algorithms_bring_cublas_its_workspace():
    found = in_force("backends.configure(Settings(deterministic_algorithms=True))")
    assert (found.deterministic_algorithms, found.cublas_workspace_config) == ("on", ":4096:8")
    assert found.cudnn_deterministic is False
    chosen = in_force("backends.configure(Settings(deterministic_algorithms=True))", CUBLAS_WORKSPACE_CONFIG=":16:8")
    assert chosen.cublas_workspace_config == ":16:8"


def test_what_a_model_changed_is_what_is_told():
    """A library that sets the switches as it is imported: asked and in force differ, and the result says both."""
    code = (
        "backends.configure(Settings(cudnn_benchmark=True));"
        "torch.backends.cudnn.benchmark = False; torch.use_deterministic_algorithms(True, warn_only=True)"
    )
    found = in_force(code, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")
    assert (found.cudnn_benchmark, found.deterministic_algorithms) == (False, "warn")
    assert found.allocator_config == "expandable_segments:True"


def test_the_newer_switches_for_tf32_are_read_too():
    found = in_force(
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'; torch.backends.cuda.matmul.fp32_precision = 'tf32'"
    )
    assert (found.cudnn_allow_tf32, found.matmul_allow_tf32) == (False, True)


@pytest.mark.parametrize(
    ("model", "amp", "capability", "dtype"),
    [
        (nn.Conv2d(3, 3, 3), "off", (9, 0), "tf32"),
        (nn.Linear(3, 3), "off", (9, 0), "fp32"),
        (nn.Conv2d(3, 3, 3), "off", (7, 5), "fp32"),
        (nn.Conv2d(3, 3, 3), "bf16", (9, 0), "bf16"),
        (nn.Linear(3, 3), "fp16", (7, 0), "fp16"),
    ],
)
def test_what_a_model_computes_in(monkeypatch, model, amp, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.compute_dtype(model, amp, torch.device("cuda")) == dtype


def test_a_cpu_computes_in_what_it_is_given():
    assert backends.compute_dtype(nn.Conv2d(3, 3, 3), "off", torch.device("cpu")) == "fp32"
    assert backends.compute_dtype(nn.Conv2d(3, 3, 3), "bf16", torch.device("cpu")) == "bf16"
