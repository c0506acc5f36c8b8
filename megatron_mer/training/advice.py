"""What would make a run faster, said at its start and in a dry run."""

from __future__ import annotations

import math

from megatron_mer.config import RunConfig
from megatron_mer.parallel import Layout, num_micro_batches, pipeline_bubble

BAD_BUBBLE = 0.25
"""Share of a step from which idle pipeline stages are worth a warning."""
GOOD_BUBBLE = 0.1
"""Share that the advice aims at."""


def bubble_advice(config: RunConfig, world_size: int) -> str | None:
    """What to do about a pipeline whose stages wait for long; None where they do not.

    Args:
        config: a configuration that runs on so many ranks.
        world_size: number of ranks.
    """
    pp_size = config.parallel.pp_size
    micro_batches = num_micro_batches(config, Layout.of(config.parallel, world_size).dp_size)
    bubble = pipeline_bubble(pp_size, micro_batches)
    if bubble <= BAD_BUBBLE:
        return None
    enough = math.ceil((pp_size - 1) * (1 / GOOD_BUBBLE - 1))
    return (
        f"pipeline: with parallel.pp_size {pp_size} and {micro_batches} micro batches each stage "
        f"waits for {bubble:.0%} of a step, (pp - 1) / (m + pp - 1); {enough} micro batches make "
        f"it {GOOD_BUBBLE:.0%}: lower batch.micro_batch_size (now "
        f"{config.batch.micro_batch_size}), raise batch.global_batch_size (now "
        f"{config.batch.global_batch_size}), or take fewer stages"
    )
