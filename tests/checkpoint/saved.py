"""Small checkpoints whose numbers are all the same, and what is read back from them."""

from pathlib import Path
from typing import Any

import torch

from megatron_mer.checkpoint import CheckpointReader, Fragment, find_latest, save_checkpoint

ROWS = 6


def fragment(value: float, rank: int = 0, world_size: int = 1) -> Fragment:
    """A rank's equal part of one parameter whose elements are all `value`."""
    part = ROWS * 4 // world_size
    return Fragment(
        "head.weight",
        "master",
        (ROWS, 4),
        None,
        0,
        1,
        rank * part,
        torch.full((part,), float(value)),
    )


def save(root: Path, step: int, value: float | None = None, **options: Any) -> Path:
    """One rank; the value of the parameter is the step unless given."""
    value = float(step if value is None else value)
    return save_checkpoint(
        root, step, [fragment(value)], {"value": value}, rank=0, world_size=1,
        first_failure=lambda reason: reason, **options,
    )  # fmt: skip


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def stored_value(root: Path, world_size: int = 1) -> float:
    """The value that the checkpoint to resume from holds, in its state and in every element."""
    info = find_latest(root)
    assert info is not None
    target = fragment(-1.0)
    CheckpointReader(info.path).fill(target)
    assert torch.equal(target.tensor, torch.full((ROWS * 4,), info.run_state["value"]))
    return info.run_state["value"]
