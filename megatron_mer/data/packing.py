"""Samples: how a corpus is cut into training examples.

A corpus of n tokens has (n - 1) // S samples of seq_length S; sample i is its tokens [i S, i S +
S], both ends included: S + 1 tokens, of which the first S are inputs and the last S their targets.
Neighbouring samples share one token, which is a target of the first and an input of the second, so
every token but the first is a target exactly once. Documents are not padded and not kept apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_mer import _index
from megatron_mer.data.index_format import dtype_code
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.open_files import OPEN_FILES, DataFile, read_end, read_failure
from megatron_mer.errors import DataError

FILES_AT_ONCE = 64
"""Files at most that one call to the C++ readers needs open together."""


def num_samples(num_tokens: int, seq_length: int, name: str = "the dataset") -> int:
    """Return how many samples a corpus holds: integer arithmetic, exact at any size.

    Args:
        num_tokens: tokens of the corpus.
        seq_length: S, at least 1.
        name: of the corpus, for the error.

    Raises:
        DataError: there is not one whole sample.
    """
    if seq_length < 1:
        raise DataError(f"seq_length {seq_length}; it must be at least 1")
    count = (num_tokens - 1) // seq_length
    if count < 1:
        raise DataError(
            f"{name} has {num_tokens} tokens, which hold no sample of seq_length {seq_length}: "
            f"at least {seq_length + 1} tokens are needed; add text or shorten model.seq_length"
        )
    return count


class RowReader:
    """Reads samples of many datasets together.

    Args:
        datasets: rows name them by their places here.
        seq_length: S.
        vocab_size: ids must be in [0, vocab_size).
    """

    def __init__(
        self, datasets: Sequence[IndexedDataset], seq_length: int, vocab_size: int
    ) -> None:
        self._datasets = datasets
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._codes = np.array([dtype_code(one.dtype) for one in datasets], dtype=np.uint8)
        tables = [one.index.table for one in datasets]
        self._tables = np.array(tables, dtype=np.int64).reshape(-1, 4)

    def read(self, dataset: NDArray[np.integer], sample: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples, file by file and in ascending order inside a file.

        Args:
            dataset: shape (n,), place of each row's dataset.
            sample: shape (n,), its number there.

        Returns:
            Shape (n, S + 1), rows in the order of the arguments.

        Raises:
            DataError: no such sample, an id outside the vocabulary (names corpus, sample, id), or
                a file that cannot be read.
        """
        out = np.empty((len(sample), self._seq_length + 1), dtype=np.int64)
        order, dataset, sample = self._sorted(dataset, sample)
        starts = sample * self._seq_length
        bytes_ = starts * self._tables[dataset, 2]
        codes = self._codes[dataset]
        for piece, descriptors in self._opened(dataset, lambda one: one.bin_file):
            try:
                _index.read_rows(
                    descriptors, bytes_[piece], codes[piece], order[piece], self._vocab_size, out
                )
            except _index.TokenOutside as error:
                row, position, token = error.args
                row += piece.start
                source = self._datasets[dataset[row]]
                raise self._outside_vocabulary(source, sample[row], position, token) from None
            except (_index.ReadEnded, _index.ReadFailed) as error:
                source = self._datasets[dataset[piece.start + error.args[0]]]
                raise _unreadable(source.bin_file, error) from None
        return out

    def document_ends(
        self, dataset: NDArray[np.integer], sample: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the inputs of samples that are the last token of a document.

        Args:
            dataset: shape (n,), place of each row's dataset.
            sample: shape (n,), its number there.

        Returns:
            Rows and positions in [0, S), both of shape (m,), each pair once, in any order. Read
            from the index alone.

        Raises:
            DataError: no such sample, or the index is damaged there or cannot be read.
        """
        order, dataset, sample = self._sorted(dataset, sample)
        starts, tables = sample * self._seq_length, self._tables[dataset]
        rows, positions = [order[:0]], [order[:0]]
        for piece, descriptors in self._opened(dataset, lambda one: one.index.file):
            try:
                found = _index.document_ends(
                    descriptors, tables[piece], starts[piece], self._seq_length
                )
            except _index.DocumentFault as error:
                row, *place = error.args
                source = self._datasets[dataset[piece.start + row]]
                raise source.index.end_fault(*place) from None
            except (_index.ReadEnded, _index.ReadFailed) as error:
                source = self._datasets[dataset[piece.start + error.args[0]]]
                raise _unreadable(source.index.file, error) from None
            rows.append(order[piece][found[0]])
            positions.append(found[1])
        return np.concatenate(rows), np.concatenate(positions)

    def _sorted(
        self, dataset: NDArray[np.integer], sample: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.int64]]:
        """Check rows; return their order by dataset and sample, and both columns in that order."""
        if len(dataset) and dataset.min() < 0:  # NumPy would count from the end
            raise DataError(
                f"rows come from dataset {dataset.min()}, which is not among those open"
            )
        held = np.maximum(self._tables[dataset, 3] - 1, 0) // self._seq_length
        wrong = (sample < 0) | (sample >= held)
        if wrong.any():
            row = int(np.argmax(wrong))
            source = self._datasets[dataset[row]]
            raise DataError(
                f"{source.prefix}: sample {sample[row]} was asked for; it has {held[row]} of "
                f"{self._seq_length} tokens, counted from 0"
            )
        order = np.lexsort((sample, dataset))
        return order, dataset[order], sample[order]

    def _opened(
        self, dataset: NDArray[np.integer], file: Callable[[IndexedDataset], DataFile]
    ) -> Iterator[tuple[slice, NDArray[np.int32]]]:
        """Cut sorted rows into pieces of few files, which are open until the next piece is drawn.

        Yields:
            The rows of a piece, and their descriptors, shape (rows,).
        """
        first_rows = np.flatnonzero(np.diff(dataset, prepend=-1))
        bounds = [*first_rows.tolist(), len(dataset)]
        at_once = min(FILES_AT_ONCE, OPEN_FILES.limit)
        for first in range(0, len(first_rows), at_once):
            cuts = bounds[first : first + at_once + 1]
            opened = [file(self._datasets[place]).open() for place in dataset[cuts[:-1]].tolist()]
            descriptors = np.array([one.descriptor for one in opened], dtype=np.int32)
            yield slice(cuts[0], cuts[-1]), np.repeat(descriptors, np.diff(cuts))

    def _outside_vocabulary(
        self, dataset: IndexedDataset, sample: int, position: int, token: int
    ) -> DataError:
        return DataError(
            f"{dataset.prefix}: sample {sample} holds token id {token} at position {position}, the "
            f"model's vocabulary has ids 0 to {self._vocab_size - 1}; the corpus was tokenized "
            "with another vocabulary, or model.vocab_size is too small"
        )


def _unreadable(file: DataFile, error: _index.ReadEnded | _index.ReadFailed) -> DataError:
    _, byte, value = error.args
    if isinstance(error, _index.ReadEnded):
        return read_end(file.path, byte, value)
    return read_failure(file.path, byte, OSError(value, os.strerror(value)))
