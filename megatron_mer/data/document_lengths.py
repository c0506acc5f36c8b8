"""How long the documents of a dataset are: exact figures in memory that does not grow with them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.index_format import IndexHeader, fault, file_size, open_file, read_header
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.errors import DataError

CHUNK = 1 << 20
"""Documents whose lengths are read together."""
SHORT = 1 << 20
"""Lengths below are counted one by one (8 MiB of counts). Longer documents are listed: a corpus of
n tokens has at most n / SHORT of them, a million for 10^12 tokens."""


class DocumentBounds:
    """The tokens at which documents begin and end, read from a mapped index.

    Args:
        dataset: an open dataset.

    Raises:
        DataError: the index cannot be read.
    """

    def __init__(self, dataset: IndexedDataset) -> None:
        self._path = dataset.idx_path
        self._num_tokens = dataset.num_tokens
        with open_file(self._path) as file:
            self._header: IndexHeader = read_header(self._path, file, file_size(self._path))
            try:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"{self._path}: cannot be mapped: {error}") from error
        self._pointers, self._entries = (
            np.frombuffer(self._mapped, "<i8", count, offset)
            for count, offset in (
                (self._header.num_sequences, self._header.pointers_offset),
                (self._header.num_entries, self._header.documents_offset),
            )
        )

    def of(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return where documents [first, stop) begin, and where the last of them ends.

        Returns:
            Shape (stop - first + 1,), ascending, in tokens.

        Raises:
            DataError: the index is damaged there.
        """
        sequences = self._entries[first : stop + 1].astype(np.int64)
        count = self._header.num_sequences
        self._refuse((sequences < 0) | (sequences > count), first, sequences, "sequence")
        tokens = np.full(len(sequences), self._num_tokens, dtype=np.int64)
        inside = sequences < count
        tokens[inside] = self._pointers[sequences[inside]] // self._header.dtype.itemsize
        outside = (tokens < 0) | (tokens > self._num_tokens)
        outside[1:] |= tokens[1:] < tokens[:-1]
        self._refuse(outside, first, tokens, "token")
        return tokens

    def lengths(self) -> Iterator[NDArray[np.int64]]:
        """Yield the lengths of all documents, in tokens, `CHUNK` at a time."""
        documents = self._header.num_entries - 1
        for first in range(0, documents, CHUNK):
            yield np.diff(self.of(first, min(first + CHUNK, documents)))
            # What was read stays in the system's cache, but counts no longer as this process's.
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def _refuse(
        self, wrong: NDArray[np.bool_], first: int, values: NDArray[np.int64], what: str
    ) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            raise fault(
                self._path,
                self._header.documents_offset + 8 * (first + at),
                f"document {first + at} begins at {what} {int(values[at])}",
                f"{what}s of the dataset in ascending order",
            )


@dataclass(frozen=True)
class DocumentLengths:
    """Every length of a dataset's documents and how often it occurs; empty documents count too."""

    counts: NDArray[np.int64]
    """Shape (SHORT,): documents of each length below SHORT."""
    long: NDArray[np.int64]
    """Lengths of SHORT and more, ascending."""
    tokens: int
    """Of all documents."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.counts.sum()) + len(self.long)

    @property
    def empty(self) -> int:
        """Number of documents without a token."""
        return int(self.counts[0])

    @property
    def mean(self) -> float:
        """Tokens a document."""
        return self.tokens / self.documents

    @property
    def minimum(self) -> int:
        """Length of the shortest document."""
        return self.quantile(0)

    @property
    def maximum(self) -> int:
        """Length of the longest document."""
        return self.quantile(100)

    @property
    def shortest(self) -> int | None:
        """Length of the shortest document that is not empty; None: there is none."""
        short = np.flatnonzero(self.counts[1:])
        lengths = [*(short[:1] + 1), *self.long[:1]]
        return int(lengths[0]) if lengths else None

    def quantile(self, percent: int) -> int:
        """Return the smallest length that at least `percent` % of the documents do not exceed.

        Args:
            percent: 0 (the shortest) to 100 (the longest).

        Raises:
            DataError: there is no document.
        """
        if self.documents == 0:
            raise DataError("a dataset without documents has no document lengths")
        rank = max(1, -(-self.documents * percent // 100))
        short = np.cumsum(self.counts)
        if rank > short[-1]:
            return int(self.long[rank - int(short[-1]) - 1])
        return int(np.searchsorted(short, rank))

    def figures(self) -> dict[str, float] | None:
        """Return min, median, mean, p95 and max, in tokens; None where there is no document."""
        if not self.documents:
            return None
        return {
            "min": self.minimum,
            "median": self.quantile(50),
            "mean": self.mean,
            "p95": self.quantile(95),
            "max": self.maximum,
        }

    def histogram(self, edges: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the documents with edges[i] <= length < edges[i + 1].

        Args:
            edges: shape (n + 1,), ascending.

        Returns:
            Shape (n,).
        """
        short = np.concatenate(([0], np.cumsum(self.counts)))
        below = short[np.minimum(edges, SHORT)] + np.searchsorted(self.long, edges)
        return np.diff(below)


def document_lengths(dataset: IndexedDataset) -> DocumentLengths:
    """Read the lengths of all documents.

    Raises:
        DataError: the index is damaged; names the byte.
    """
    counts, long = np.zeros(SHORT, dtype=np.int64), [np.zeros(0, dtype=np.int64)]
    for lengths in DocumentBounds(dataset).lengths():
        short = lengths[lengths < SHORT]
        found = np.bincount(short)
        counts[: len(found)] += found
        long.append(lengths[lengths >= SHORT])
    return DocumentLengths(counts, np.sort(np.concatenate(long)), dataset.num_tokens)


def log_edges(longest: int, per_doubling: int) -> NDArray[np.int64]:
    """Return edges of histogram bins from length 1 on, each a factor 2^(1/per_doubling) wide.

    Lengths are whole numbers, so among the short ones a bin holds one length and is wider.

    Args:
        longest: length that the last bin still holds, at least 1.
        per_doubling: bins between a length and its double.
    """
    steps = per_doubling * (longest.bit_length() + 1)
    edges = np.unique(np.ceil(2 ** (np.arange(steps + 1) / per_doubling)).astype(np.int64))
    return edges[: int(np.searchsorted(edges, longest, side="right")) + 1]
