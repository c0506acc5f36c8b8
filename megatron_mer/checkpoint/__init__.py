"""Checkpoints: no pickle, any layout on load, whole at any moment."""

from megatron_mer.checkpoint.find import (
    CheckpointInfo,
    candidates,
    damaged,
    find_latest,
    first_whole,
)
from megatron_mer.checkpoint.layout import Fragment
from megatron_mer.checkpoint.load import CheckpointReader
from megatron_mer.checkpoint.writer import CheckpointWriter, save_checkpoint

__all__ = [
    "CheckpointInfo",
    "CheckpointReader",
    "CheckpointWriter",
    "Fragment",
    "candidates",
    "damaged",
    "find_latest",
    "first_whole",
    "save_checkpoint",
]
