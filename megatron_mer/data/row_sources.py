"""Where the loader's rows come from: datasets, and a replay buffer for what they may not have."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.batches import Rows
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import RowReader


class HeldRows(Protocol):
    """The part of a replay buffer that the loader uses."""

    def find(self, rows: Rows) -> NDArray[np.int64]:
        """Return where the record of each row lies, -1 for a row that its dataset has."""

    def read(
        self, rows: Rows, at: NDArray[np.int64], which: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Return tokens and document ends of the rows `which`, given where all rows lie."""

    def count_ends(
        self, rows: Rows, at: NDArray[np.int64], which: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many inputs of the rows `which` end a document."""


class Samples(NamedTuple):
    """What a rank reads of a batch."""

    tokens: NDArray[np.int64]
    """(n, S + 1), this rank's rows."""
    mask: NDArray[np.float32]
    """(n, S)."""
    num_left_out: int
    """Targets that the masks of all rows leave out, those of other ranks too."""
    buffer_seconds: float
    """How long the buffer took."""


class RowSources:
    """Reads rows from where they are.

    Args:
        datasets: open datasets by name, those that rows may be read from.
        names: of all datasets of the plan; `Rows.dataset` counts into them.
        seq_length: S.
        vocab_size: ids must be in [0, vocab_size).
        eod_mask_loss: whether the first token of each document is no target.
        buffer: has the replayed rows that it holds; None: there is no buffer.
    """

    def __init__(
        self,
        datasets: Mapping[str, IndexedDataset],
        names: Sequence[str],
        seq_length: int,
        vocab_size: int,
        eod_mask_loss: bool,
        buffer: HeldRows | None,
    ) -> None:
        self._rows = RowReader(list(datasets.values()), seq_length, vocab_size)
        places = {name: place for place, name in enumerate(datasets)}
        self._places = np.array([places.get(name, -1) for name in names])
        self._seq_length = seq_length
        self._eod_mask_loss = eod_mask_loss
        self._buffer = buffer
        self._ones = np.ones((0, seq_length), dtype=np.float32)

    def read(self, rows: Rows, own: slice) -> Samples:
        """Read the rows `own`, and count what is left out of all of them.

        Raises:
            DataError: a dataset or the buffer cannot be read.
        """
        dataset, sample = self._places[rows.dataset], np.asarray(rows.sample, dtype=np.int64)
        if self._buffer is None or not (rows.slot >= 0).any():
            mask, num_left_out = self._mask(dataset, sample, own)
            return Samples(self._rows.read(dataset[own], sample[own]), mask, num_left_out, 0.0)
        begin = time.perf_counter()
        at = self._buffer.find(rows)
        here = np.zeros(len(at), dtype=np.bool_)
        here[own] = True
        mine, others = np.flatnonzero(here & (at >= 0)), np.flatnonzero(~here & (at >= 0))
        held, ends = self._buffer.read(rows, at, mine)
        counts = self._buffer.count_ends(rows, at, others) if ends is not None else others[:0]
        seconds = time.perf_counter() - begin
        rest = np.flatnonzero(at < 0)
        mask, num_left_out = self._mask_of_rest(dataset, sample, own, rest)
        tokens = np.empty((own.stop - own.start, self._seq_length + 1), dtype=np.int64)
        own_rest = rest[here[rest]]
        tokens[own_rest - own.start] = self._rows.read(dataset[own_rest], sample[own_rest])
        tokens[mine - own.start] = held
        if ends is not None:
            mask[mine - own.start] = ~ends
            num_left_out += int(np.count_nonzero(ends)) + int(counts.sum())
        return Samples(tokens, mask, num_left_out, seconds)

    def _mask(
        self, dataset: NDArray[np.int32], sample: NDArray[np.int64], own: slice
    ) -> tuple[NDArray[np.float32], int]:
        """Return the mask of this rank's rows, and how many targets of all ranks' do not count."""
        shape = (own.stop - own.start, self._seq_length)
        if not self._eod_mask_loss:
            # One array for all batches: nothing writes to it.
            if self._ones.shape != shape:
                self._ones = np.ones(shape, dtype=np.float32)
            return self._ones, 0
        return self._mask_of_rest(dataset, sample, own, np.arange(len(dataset)))

    def _mask_of_rest(
        self,
        dataset: NDArray[np.int32],
        sample: NDArray[np.int64],
        own: slice,
        rest: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], int]:
        """As `_mask`, of the rows `rest` by their datasets; other rows' masks are ones."""
        if not self._eod_mask_loss:
            return self._mask(dataset, sample, own)
        found, positions = self._rows.document_ends(dataset[rest], sample[rest])
        rows = rest[found]
        inside = (rows >= own.start) & (rows < own.stop)
        mask = np.ones((own.stop - own.start, self._seq_length), dtype=np.float32)
        mask[rows[inside] - own.start, positions[inside]] = 0
        return mask, len(rows)
