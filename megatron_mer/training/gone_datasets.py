"""Datasets that are not there any more, of tasks whose rows a replay buffer has.

A plan needs their names and sizes for good; a run that replays from a buffer needs their tokens
only while they are trained on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from megatron_mer.config import RunConfig
from megatron_mer.continual.plan import Plan
from megatron_mer.errors import CheckpointError
from megatron_mer.training.outputs import RunDirectory


@dataclass(frozen=True)
class GoneDataset:
    """What a checkpoint knows of a dataset."""

    num_samples: int
    content: str
    """What `IndexedDataset.content_id` gave."""
    prefix: str
    """Where it lay, absolute."""


def known_datasets(config: RunConfig, fresh: bool) -> dict[str, GoneDataset]:
    """Datasets by name of the run that lies in the output directory, if it goes on from a buffer.

    Args:
        config: the run.
        fresh: it begins anew, so that nothing is known.
    """
    from_buffer = config.replay is not None and config.replay.source == "buffer"
    if fresh or not from_buffer or not RunDirectory(config.output_dir).has_checkpoint():
        return {}
    return _known(str(RunDirectory(config.output_dir).checkpoints))


def is_gone(prefix: str) -> bool:
    """Whether nothing of a dataset is there: half of one is a mistake."""
    return not any(Path(f"{prefix}{suffix}").exists() for suffix in (".idx", ".bin", ".json"))


@functools.lru_cache(maxsize=1)
def _known(checkpoints: str) -> dict[str, GoneDataset]:
    # Checkpoints import torch, which a run whose datasets are there does not need so early.
    from megatron_mer.checkpoint import find_latest

    try:
        info = find_latest(checkpoints)
    except CheckpointError:
        return {}  # The start says so.
    if info is None or "buffer" not in info.run_state:
        return {}
    settings = info.run_state["settings"]
    sizes = Plan.from_history(info.run_state["history"]).dataset_sizes
    return {
        name: GoneDataset(sizes[name], content, settings["prefixes"][name])
        for name, content in settings["content"].items()
        if name in sizes
    }
