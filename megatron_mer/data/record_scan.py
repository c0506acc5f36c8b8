"""Everything that lies in segment files, whoever needs it: what each place holds, in its words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mer import _index
from megatron_mer.data.record_store import ROWS_AT_ONCE, RecordStore

# Faults of a header, by their byte, behind which its checksum holds: its identity can be believed.
_TOLD = (6, 7, 8, 16, 56)


class Found(NamedTuple):
    """Places of a segment file that hold anything but zeros or an erased record."""

    positions: NDArray[np.int64]
    """(n,) in the log."""
    identity: NDArray[np.int64]
    """(n, 3) what their headers say."""
    told: NDArray[np.bool_]
    """(n,) whether that can be believed; a torn or damaged header tells nothing."""


def scan(store: RecordStore, segment: int) -> Iterator[Found]:
    """Read a whole segment file; one that is not there holds nothing.

    Raises:
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(store.path(segment), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        count = -(-os.fstat(descriptor).st_size // store.record_bytes)
        for first in range(0, count, ROWS_AT_ONCE):
            places = np.arange(first, min(first + ROWS_AT_ONCE, count))
            yield _look(store, segment, descriptor, places)
    finally:
        os.close(descriptor)


def _look(store: RecordStore, segment: int, descriptor: int, places: NDArray[np.int64]) -> Found:
    core, count = store.format.records(), len(places)
    content = np.zeros((count, store.record_bytes), dtype=np.uint8)
    told = np.ones(count, dtype=np.bool_)
    first = 0
    while first < count:
        rows = np.arange(first, count)
        descriptors = np.full(len(rows), descriptor, dtype=np.int32)
        try:
            core.fetch(descriptors, places[rows] * store.record_bytes, rows, content)
            break
        except _index.RecordFault as error:
            row, byte, *_ = error.args
            told[first + row] = byte in _TOLD
        except _index.ReadEnded as error:
            row = error.args[0]
            told[first + row] = False
        except _index.ReadFailed as error:
            path = str(store.path(segment))
            raise OSError(error.args[2], os.strerror(error.args[2]), path) from None
        first += row + 1
    # A kill or a power cut may leave half a record under a header of zeros, or of an erased one.
    blank = ~content.any(axis=1) | (content == core.erased()).all(axis=1)
    identity = np.ascontiguousarray(content[:, 24:48]).view("<i8").astype(np.int64)
    positions = segment * store.segment_records + places
    return Found(positions[~blank], identity[~blank], told[~blank])
