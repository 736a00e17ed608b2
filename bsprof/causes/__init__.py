"""The causes of slow loading: one row of `RULES` and one function each.

A rule looks for its cause's evidence in a Scene and says what the loader would be without it: what that gives back is
for the replay to say, and nothing that a rule decides. Rules stand from the specific to the general. A cause that
explains a more general one (a lock explains a slow stage) is taken away before that one is judged, so that no time is
charged twice.
"""

from __future__ import annotations

from bsprof.causes import consuming, cores, making, risks, starting
from bsprof.causes.rule import Rule

__all__ = ["RULES", "Rule"]

RULES: tuple[Rule, ...] = (
    Rule("cpu_contended", cores.cpu_contended, "specific", explains=("*",)),
    Rule("affinity_shrunk", cores.affinity_shrunk, "specific", explains=("*",)),
    Rule("gil_held", consuming.gil_held, "specific", "consumer", explains=("many_tensors", "pinning")),
    Rule("thread_oversubscription", cores.thread_oversubscription, "specific",
         explains=("lock", "cpu_saturated", "slow_stage", "slow_collate", "too_few_workers")),
    Rule("hot_sample", making.hot_sample, "specific",
         explains=("uneven_workers", "small_prefetch", "too_few_workers", "slow_stage")),
    Rule("uneven_workers", making.uneven_workers, "specific",
         explains=("small_prefetch", "slow_storage", "too_few_workers", "slow_stage", "cpu_saturated")),
    Rule("lock", making.lock, "specific", explains=("cold_disk", "slow_storage", "too_few_workers", "slow_stage")),
    Rule("cold_disk", making.cold_disk, "specific", explains=("slow_storage", "too_few_workers", "slow_stage")),
    Rule("many_tensors", consuming.many_tensors, "specific", "both", explains=("large_payload", "slow_collate")),
    Rule("pinning", consuming.pinning, "specific", "consumer"),
    Rule("slow_h2d", consuming.slow_h2d, "beside", "consumer"),
    Rule("large_payload", making.large_payload, "specific", "both", explains=("slow_collate", "cpu_saturated")),
    Rule("per_item_overhead", making.per_item_overhead, "specific", explains=("slow_stage",)),
    Rule("slow_storage", making.slow_storage, "specific", explains=("too_few_workers", "slow_stage")),
    Rule("small_prefetch", cores.small_prefetch, "specific", explains=("too_few_workers", "slow_stage")),
    Rule("no_workers", cores.no_workers, "setting"),
    Rule("too_few_workers", cores.too_few_workers, "setting"),
    Rule("cpu_saturated", cores.cpu_saturated, "setting"),
    Rule("slow_collate", making.slow_collate, "general"),
    Rule("slow_stage", making.slow_stage, "general"),
    Rule("slow_start", starting.slow_start, "start"),
    Rule("epoch_restart", starting.epoch_restart, "start"),
    Rule("memory_growth", risks.memory_growth, "risk"),
    Rule("shm_low", risks.shm_low, "risk"),
    Rule("fds_low", risks.fds_low, "risk"),
)  # fmt: skip
"""From the specific to the general."""
