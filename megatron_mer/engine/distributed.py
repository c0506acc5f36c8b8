"""Starting DeepSpeed's communication and the process groups of one layout."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store

from megatron_mer.engine.host_memory import keep_freed_memory
from megatron_mer.engine.meeting import meet
from megatron_mer.errors import LaunchError
from megatron_mer.parallel import Layout, TensorParallelGroup

DEFAULT_TIMEOUT = timedelta(minutes=30)


def start_distributed(timeout: timedelta = DEFAULT_TIMEOUT) -> Store:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    DeepSpeed's shared-memory CPU collective is switched off: it compiles itself on first use and
    waits for ever on the lock of a build that was killed.

    Args:
        timeout: how long a rank waits for the others, here and in each collective.

    Returns:
        What the ranks share by name.

    Raises:
        LaunchError: the other ranks did not come or contradict each other, or the address cannot be
            bound.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = meet(timeout, _take_device())
    try:
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timeout,
        )
    except (dist.DistError, RuntimeError) as error:
        raise LaunchError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} met the others and "
            f"then lost them: {error}"
        ) from error
    return store


def set_time_limit(seconds: float) -> None:
    """Let each collective of any group, from the next one on, wait so long. All ranks call it."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _take_device() -> str | None:
    """Make LOCAL_RANK's device the current one; DeepSpeed reads the variable too.

    Returns:
        What is wrong with it.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        keep_freed_memory()
        return None
    local_rank, visible = int(os.environ["LOCAL_RANK"]), accelerator.device_count()
    if local_rank >= visible == 1:
        # The launcher shows each process its own device only.
        local_rank = 0
        os.environ["LOCAL_RANK"] = "0"
    if local_rank >= visible:
        return (
            f"LOCAL_RANK {local_rank} with {visible} visible devices; 0 to {visible - 1} are "
            "allowed; start as many processes on a node as it has devices, or show each its own"
        )
    accelerator.set_device(local_rank)
    return None


def device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def tensor_parallel_group(layout: Layout, rank: int, num_kv_heads: int) -> TensorParallelGroup:
    """Make the tensor-parallel groups of all ranks (collective) and return this rank's.

    Args:
        layout: the rank grid.
        rank: this rank.
        num_kv_heads: of the model, a multiple or a divisor of tp_size: with fewer than tp_size the
            ranks that share a head get a group, too.
    """
    mine = _group_of(rank, layout.tensor_groups())
    copies = layout.tp_size // num_kv_heads
    if copies <= 1:
        return mine
    same = [
        ranks[start : start + copies]
        for ranks in layout.tensor_groups()
        for start in range(0, layout.tp_size, copies)
    ]
    return replace(mine, kv_replicas=_group_of(rank, same))


def _group_of(rank: int, groups: Sequence[Sequence[int]]) -> TensorParallelGroup:
    """Make process groups, on all ranks in the same order, and return the one with this rank."""
    mine = TensorParallelGroup()
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=DEFAULT_TIMEOUT) if len(ranks) > 1 else None
        if rank in ranks:
            mine = TensorParallelGroup(group=group, rank=ranks.index(rank), size=len(ranks))
    return mine


def first_failure(reason: str | None) -> str | None:
    """Why the first rank that failed did so; None if none did. Collective.

    Every rank hears the cause, so whichever notes it first notes the right one.
    """
    flag = torch.tensor([0 if reason is None else 1], dtype=torch.int64, device=device())
    dist.all_reduce(flag)
    if int(flag.item()) == 0:
        return None
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(one for one in reasons if one is not None)


@contextlib.contextmanager
def silence_engine_prints() -> Iterator[None]:
    """Drop what DeepSpeed prints on standard output while it builds.

    It prints its seeds and a table of stages whatever the logging level is; the run logs its own.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        yield
