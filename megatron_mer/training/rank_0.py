"""What rank 0 finds out for all ranks, its errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_mer.errors import CheckpointError, MegatronMerError


def raise_everywhere(problem: MegatronMerError | None) -> None:
    """Raise rank 0's error on all ranks. Collective."""
    said: list[Any] = [problem]
    dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise said[0]


def from_rank_0(rank: int, make: Callable[[], Any]) -> Any:
    """What rank 0 makes, or its error, on all ranks. Collective."""
    made: list[Any] = [None]
    problem: MegatronMerError | None = None
    if rank == 0:
        try:
            made = [make()]
        except MegatronMerError as error:
            problem = error
        except OSError as error:
            problem = CheckpointError(f"the checkpoints cannot be read: {error}")
    raise_everywhere(problem)
    dist.broadcast_object_list(made, src=0)
    return made[0]
