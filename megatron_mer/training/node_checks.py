"""Checks of all nodes after the ranks have met and before anything is loaded."""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mer.config import PreflightConfig
from megatron_mer.engine.distributed import device
from megatron_mer.errors import ConfigError, MegatronMerError, NodeError
from megatron_mer.launch.nodes import SECTION, Findings, NodeFacts, Pair, judge, neighbours
from megatron_mer.launch.requeue import BAD_NODES, read_object, write_object
from megatron_mer.log import get_logger
from megatron_mer.training.rank_0 import from_rank_0, raise_everywhere

logger = get_logger(__name__)

GIB = 2**30
SEE_SECONDS = 10.0
"""How long a shared file system may take to show a file that another node wrote."""
_ROUNDS = 4
_CPU_BYTES, _GPU_BYTES = 2**24, 2**28  # what is reduced; fast networks need more to get going


def check_nodes(limits: PreflightConfig, output_dir: Path, rank: int) -> None:
    """Check disk, shared directory, clocks and network of all nodes. Collective.

    What is wrong with nodes is kept in output_dir, so that the next start can leave them out.

    Args:
        limits: what is allowed.
        output_dir: the run's directory; it is there.
        rank: this rank.

    Raises:
        NodeError: on every rank, with all that is wrong.
    """
    begin = time.monotonic()
    members = _members()
    facts = _facts(members, output_dir, rank)
    measured = limits.min_all_reduce_gib_per_second is not None
    speeds = _speeds(list(members.values()), rank) if measured else {}
    problem: MegatronMerError | None = None
    if rank == 0:
        found = judge(facts, speeds, limits)
        if found.problems:
            _keep(found, output_dir)
            problem = NodeError(found.problems)
        else:
            seconds = time.monotonic() - begin
            text = "%d nodes are fit for the run (%.1f s)"
            logger.info(text, len(members), seconds)
    raise_everywhere(problem)


def _members() -> dict[str, list[int]]:
    """The ranks of each node, in the order of the first one. Collective."""
    # Slurm may know a node by another name than it has itself.
    name = os.environ.get("SLURMD_NODENAME") or platform.node()
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, name)
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(names):
        members.setdefault(node, []).append(rank)
    return members


def _facts(members: dict[str, list[int]], output_dir: Path, rank: int) -> list[NodeFacts]:
    """What the first rank of each node says of it. Collective."""
    folder = Path(from_rank_0(rank, lambda: str(_make_folder(output_dir))))
    node = next((name for name, ranks in members.items() if ranks[0] == rank), None)
    trouble = _try(folder, rank) if node is not None else ""
    dist.barrier()
    clock = time.time()
    mine = None
    if node is not None:
        free = 0.0 if trouble else shutil.disk_usage(output_dir).free / GIB
        mine = NodeFacts(node=node, trouble=trouble, free_gib=free, clock=clock)
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return [one for one in said if one is not None]


def _make_folder(output_dir: Path) -> Path:
    folder = output_dir / f".preflight_{uuid.uuid4().hex}"
    try:
        folder.mkdir()
    except OSError as error:
        given = f"output_dir: given {output_dir}, which cannot be written ({error.strerror})"
        raise ConfigError(given) from error
    return folder


def _try(folder: Path, rank: int) -> str:
    """See the folder of rank 0 and write into it; what is wrong, else nothing."""
    end = time.monotonic() + SEE_SECONDS
    while not folder.is_dir():
        if time.monotonic() > end:
            return f"does not see {folder.parent} as rank 0's node does"
        time.sleep(0.1)
    try:
        (folder / str(rank)).write_text("here", encoding="utf-8")
    except OSError as error:
        return f"cannot write into {folder.parent} ({error.strerror})"
    return ""


def _speeds(nodes: Sequence[list[int]], rank: int) -> dict[Pair, float]:
    """What each pair of neighbours reaches, on rank 0. Collective."""
    found: dict[Pair, float] = {}
    for pairs in neighbours(len(nodes)):
        mine: dict[Pair, float] = {}
        for pair in pairs:
            ranks = sorted({one for place in pair for one in nodes[place]})
            if len(ranks) == 1:  # There is nobody to talk to.
                continue
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[pair] = _all_reduce(group, len(ranks))
                dist.destroy_process_group(group)
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
        for one in said:
            for pair, speed in one.items():
                found[pair] = min(speed, found.get(pair, speed))
    return found


def _all_reduce(group: Any, size: int) -> float:
    """Bus bandwidth in GiB/s: 2 (size - 1) / size of the bytes cross each rank's link."""
    count = (_CPU_BYTES if device().type == "cpu" else _GPU_BYTES) // 4
    tensor = torch.zeros(count, dtype=torch.float32, device=device())
    dist.all_reduce(tensor, group=group)  # connects
    float(tensor[0])  # waits for a GPU
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        dist.all_reduce(tensor, group=group)
    float(tensor[0])
    seconds = (time.perf_counter() - begin) / _ROUNDS
    return 2 * (size - 1) / size * count * 4 / GIB / seconds


def _keep(found: Findings, output_dir: Path) -> None:
    path = output_dir / BAD_NODES
    try:
        write_object(path, {**read_object(path), **found.bad})
    except OSError as error:
        logger.error("%s: %s cannot be written: %s", SECTION, path, error)
