"""torch's switches: set as a case asks, and read back as they were in force."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from bsprof.model import Backends, Settings

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_CUBLAS_WORKSPACE = ":4096:8"
"""With it cuBLAS is deterministic (cuBLAS Library, 'Results Reproducibility'); torch refuses to run without."""

TF32_CAPABILITY = (8, 0)
"""Ampere is the first whose matrix units take fp32 as tf32."""


def configure(settings: Settings) -> None:
    """Set what `settings` ask of this process; what they leave null stays as it is.

    Call it before the device is used: cuBLAS reads its workspace from the environment when its handle is made.
    """
    if settings.cudnn_benchmark is not None:
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    if settings.cudnn_deterministic is not None:
        torch.backends.cudnn.deterministic = settings.cudnn_deterministic
    if settings.deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
        torch.use_deterministic_algorithms(True)


def in_force() -> Backends:
    """Return the switches as they are: a model, or a library it imports, may have changed them."""
    algorithms: Literal["off", "warn", "on"] = "off"
    if torch.are_deterministic_algorithms_enabled():
        algorithms = "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "on"
    cudnn = torch.backends.cudnn
    return Backends(
        cudnn_enabled=bool(cudnn.enabled),
        cudnn_version=cudnn.version() if torch.cuda.is_available() else None,  # type: ignore[no-untyped-call]
        cudnn_benchmark=bool(cudnn.benchmark),
        cudnn_deterministic=bool(cudnn.deterministic),
        cudnn_allow_tf32=_convolutions_allow_tf32(),
        matmul_allow_tf32=_products_allow_tf32(),
        deterministic_algorithms=algorithms,
        cublas_workspace_config=os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        allocator_config=os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    )


def compute_dtype(
    model: nn.Module, amp: Literal["off", "bf16", "fp16"], device: torch.device
) -> Literal["fp32", "tf32", "bf16", "fp16"]:
    """Return what most of the model's arithmetic is done in: a network with convolutions goes by cuDNN's switch."""
    if amp != "off":
        return amp
    if lacks_tf32(device):
        return "fp32"
    convolves = any(isinstance(module, _CONVOLUTIONS) for module in model.modules())
    return "tf32" if (_convolutions_allow_tf32() if convolves else _products_allow_tf32()) else "fp32"


def lacks_tf32(device: torch.device) -> str:
    """Return why `device` has no TF32, or nothing where it has: elsewhere torch computes in fp32, whatever is asked."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "TF32 is a format of NVIDIA's devices"
    if torch.cuda.get_device_capability(device) < TF32_CAPABILITY:
        return "the device has no TF32"
    return ""


def _convolutions_allow_tf32() -> bool:
    return _allows_tf32(getattr(torch.backends.cudnn, "conv", None), lambda: torch.backends.cudnn.allow_tf32)


def _products_allow_tf32() -> bool:
    return _allows_tf32(torch.backends.cuda.matmul, lambda: torch.backends.cuda.matmul.allow_tf32)


def _allows_tf32(switch: Any, older: Callable[[], bool]) -> bool:
    """Read the switch that torch 2.9 brought, or the older one where the new one says nothing.

    Whoever has set the new one cannot read the old one any more: torch raises then.
    """
    precision = getattr(switch, "fp32_precision", "none")
    if precision != "none":
        return bool(precision == "tf32")
    try:
        return bool(older())
    except RuntimeError:
        return False
