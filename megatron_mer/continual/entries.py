"""What a plan says of its parts: entries of the stream, and rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Entry:
    """The part of a stream's entry that one segment trains: all of it, unless a change cuts it."""

    task: str
    index: int
    """The entry's place in the stream."""
    segment: int
    """Index into the plan's segments."""
    first_batch: int
    last_batch: int
    """The batch after its last one; equal to `first_batch` if `trained_before`."""
    trained_before: bool


@dataclass(frozen=True)
class Rows:
    """Where rows come from; one element a row, in the order of the batch."""

    kind: NDArray[np.uint8]
    """(n,) 0 fresh, 1 replay."""
    entry: NDArray[np.int32]
    """(n,) index into the plan's entries: the one that the sample belongs to."""
    dataset: NDArray[np.int32]
    """(n,) index into the plan's datasets."""
    sample: NDArray[np.int64]
    """(n,) sample within the dataset."""
    ordinal: NDArray[np.int64]
    """(n,) number of the fresh row that this one is, or repeats. Rows trained before take theirs
    when the segment that brings them begins: those of the first segment are the first ones."""
    slot: NDArray[np.int64]
    """(n,) slot of the buffer that the row is replayed from; -1: it is read from its dataset."""
