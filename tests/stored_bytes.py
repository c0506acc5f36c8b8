"""Samples as the bytes that a record holds, to look for them in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_mer.data.indexed_dataset import IndexedDataset
from tests.tiny_run import SEQ_LENGTH


def sample_bytes(corpus: Path, task: str) -> list[bytes]:
    """Each sample of a dataset as it would lie in a record."""
    dataset = IndexedDataset(corpus / task)
    count = (dataset.num_tokens - 1) // SEQ_LENGTH
    tokens = [dataset.tokens(at * SEQ_LENGTH, (at + 1) * SEQ_LENGTH + 1) for at in range(count)]
    return [one.astype(np.uint16).tobytes() for one in tokens]


def found_in(folder: Path, needles: list[bytes]) -> int:
    """How many of the byte strings any file of a folder holds."""
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return sum(needle in content for needle in needles)
