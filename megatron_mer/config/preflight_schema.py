"""Keys of the checks of nodes before training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mer.config.field_types import NotNegative, Positive


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """Checks of all nodes before anything is loaded. Each must see and write output_dir."""

    min_free_gib: NotNegative = 10.0
    """GiB that must be free at output_dir."""
    max_clock_skew_seconds: Positive = 5.0
    """How far a node's clock may be from the middle one."""
    min_all_reduce_gib_per_second: Positive | None = None
    """What each node must reach in an all-reduce with a neighbour (all of both nodes' ranks; bus
    bandwidth, as nccl-tests count it); on one node, in its own. Default: not measured."""
