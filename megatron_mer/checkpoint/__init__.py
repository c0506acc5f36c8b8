"""Checkpoints: no pickle, any layout on load, whole at any moment."""

from megatron_mer.checkpoint.copier import Copier
from megatron_mer.checkpoint.find import (
    CheckpointInfo,
    candidates,
    damaged,
    find_latest,
    first_whole,
)
from megatron_mer.checkpoint.layout import Fragment
from megatron_mer.checkpoint.load import CheckpointReader
from megatron_mer.checkpoint.place import open_place
from megatron_mer.checkpoint.writer import CheckpointWriter, save_checkpoint

__all__ = [
    "CheckpointInfo",
    "CheckpointReader",
    "CheckpointWriter",
    "Copier",
    "Fragment",
    "candidates",
    "damaged",
    "find_latest",
    "first_whole",
    "open_place",
    "save_checkpoint",
]
