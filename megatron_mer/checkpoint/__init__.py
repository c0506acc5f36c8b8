"""Checkpoints: no pickle, any layout on load, whole at any moment."""

from megatron_mer.checkpoint.layout import Fragment
from megatron_mer.checkpoint.load import CheckpointInfo, CheckpointReader, find_latest
from megatron_mer.checkpoint.save import save_checkpoint

__all__ = ["CheckpointInfo", "CheckpointReader", "Fragment", "find_latest", "save_checkpoint"]
