"""The world that a training belongs to: one process, or ranks that exchange their gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from bsprof.errors import BsprofError
from bsprof.model import Communication, Settings
from bsprof.workloads.registry import import_own

BEFORE_REDUCE = "before_reduce"
"""The mark inside `backward` where the first bucket of gradients is ready: up to there a rank waits for no other."""

HOOKS: dict[str, Any] = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
"""DDP's own communication hooks by the values of the axis `comm_hook`."""


class World(Protocol):
    """Who trains together, and how they agree."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this machine."""
    exchanges: bool
    """Whether gradients go through DDP, be it in a world of one."""

    def agree(self, value: int) -> int:
        """Return rank 0's value. All ranks must ask; none returns before rank 0 has."""

    def join(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Return `model` such that its gradients are those of all ranks."""

    def marking(self, mark: Callable[[str], None]) -> AbstractContextManager[None]:
        """Mark BEFORE_REDUCE in each step of the block."""

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Exchange nothing in the block."""

    def communication(self) -> Communication | None:
        """Return what is exchanged in a step; None where nothing is."""


class Alone:
    """A training in one process."""

    rank = local_rank = 0
    size = local_size = 1
    exchanges = False

    def agree(self, value: int) -> int:
        """Return `value`."""
        return value

    def join(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Return `model`."""
        return model

    def marking(self, mark: Callable[[str], None]) -> AbstractContextManager[None]:
        """Mark nothing."""
        return contextlib.nullcontext()

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Change nothing."""
        return contextlib.nullcontext()

    def communication(self) -> Communication | None:
        """Return None."""
        return None


class Ranks:
    """The default process group of torch.distributed, which must have been initialised, and DDP on it."""

    exchanges = True

    def __init__(self, local_rank: int, local_size: int) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank, self.local_size = local_rank, local_size
        self._model: DistributedDataParallel | None = None

    def agree(self, value: int) -> int:
        """Broadcast rank 0's value between the hosts; no device waits for it."""
        shared = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(shared, 0)
        return int(shared.item())

    def join(self, model: nn.Module, settings: Settings) -> nn.Module:
        """Return `model` under DDP, with the hook and the batch norm that `settings` ask for.

        Raises BsprofError for a hook that cannot be found.
        """
        if settings.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self._model = DistributedDataParallel(model)
        if settings.comm_hook != "none":
            self._model.register_comm_hook(None, find_hook(settings.comm_hook))
        return self._model

    @contextlib.contextmanager
    def marking(self, mark: Callable[[str], None]) -> Iterator[None]:
        """Mark where the gradient is ready that completes the first bucket, just before DDP reduces it."""
        last = self._last_of_first_bucket()
        if last is None:
            yield
            return
        handle = last.register_post_accumulate_grad_hook(lambda _: mark(BEFORE_REDUCE))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            handle.remove()

    def unsynchronised(self) -> AbstractContextManager[None]:
        """Use DDP's `no_sync`."""
        assert self._model is not None
        entered: AbstractContextManager[None] = self._model.no_sync()
        return entered

    def communication(self) -> Communication:
        """Return what DDP's logger tells: DDP makes its buckets anew after the first step."""
        assert self._model is not None
        told, device = self._told(), next(self._model.parameters()).device
        sizes = told.get("rebuilt_bucket_sizes") or told.get("bucket_sizes") or ""
        return Communication(
            # The group has one backend for each kind of device; the logger's name is that of all.
            backend=dist.get_default_backend_for_device(device),
            bucket_bytes=tuple(int(size) for size in str(sizes).split(",") if size.strip()),
            reduce_ns=_positive(told.get("avg_backward_comm_time")),
            overlap_ns=_positive(told.get("avg_backward_compute_comm_overlap_time")),
        )

    def _told(self) -> dict[str, Any]:
        assert self._model is not None
        told: dict[str, Any] = self._model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        return told

    def _last_of_first_bucket(self) -> nn.Parameter | None:
        """Return the parameter whose gradient completes the first bucket; None before DDP knows."""
        assert self._model is not None
        first, _, _ = str(self._told().get("rebuilt_per_bucket_param_indices", "")).partition(",")
        trained = [one for one in self._model.module.parameters() if one.requires_grad]
        indices = [int(index) for index in first.split()]
        return trained[indices[-1]] if indices and indices[-1] < len(trained) else None


def _positive(value: Any) -> int | None:
    return int(value) if value is not None and int(value) > 0 else None


def find_hook(name: str) -> Any:
    """Return the communication hook of that name, or the user's own. Raises BsprofError."""
    if name in HOOKS:
        return HOOKS[name]
    found = import_own("comm_hook", name, ("none", *HOOKS))
    if not callable(found):
        raise BsprofError(f"comm_hook '{name}' is no function", hint="a hook takes (state, bucket), returns a future")
    return found
