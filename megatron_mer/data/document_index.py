"""Where documents lie, answered from a mapped `.idx` file without loading it."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.index_format import IndexHeader, fault, open_file
from megatron_mer.errors import DataError

VERIFY_CHUNK = 1 << 20
"""Sequences that `DocumentIndex.verify` looks at together."""


class DocumentIndex:
    """The mapped arrays of an `.idx` file. Everything it returns is a copy."""

    def __init__(self, path: Path, header: IndexHeader, num_tokens: int) -> None:
        self._path = path
        self._header = header
        self._num_tokens = num_tokens
        with open_file(path) as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be mapped: {error}") from error
        if len(mapped) < header.size:
            raise fault(path, len(mapped), "the file ends", f"{header.size} bytes, as when opened")
        count, entries = header.num_sequences, header.num_entries
        self._lengths = np.frombuffer(mapped, "<i4", count, header.lengths_offset)
        self._pointers = np.frombuffer(mapped, "<i8", count, header.pointers_offset)
        self._documents = np.frombuffer(mapped, "<i8", entries, header.documents_offset)

    def document_range(self, index: int) -> tuple[int, int]:
        """Return the first token of a document and the token after its last."""
        first, last = (int(entry) for entry in self._documents[index : index + 2])
        if not 0 <= first <= last <= self._header.num_sequences:
            raise fault(
                self._path,
                self._header.documents_offset + 8 * index,
                f"document {index} has sequences [{first}, {last})",
                f"a range inside [0, {self._header.num_sequences})",
            )
        start, stop = (int(token) for token in self._token_offsets(np.array([first, last])))
        lengths = self._lengths[first:last].astype(np.int64)
        ends = start + np.cumsum(lengths)
        starts = self._pointers[first:last] // self._header.dtype.itemsize
        whole = np.array_equal(starts, ends - lengths) and int(lengths.sum()) == stop - start
        if np.any(lengths < 0) or not whole:
            raise fault(
                self._path,
                self._header.pointers_offset + 8 * first,
                f"document {index} has tokens [{start}, {stop}), but sequence lengths "
                f"{lengths.tolist()[:8]} from {starts.tolist()[:8]} on",
                "sequences that follow each other and fill the range",
            )
        return start, stop

    def ends_in(
        self, starts: NDArray[np.int64], length: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the document ends in (start, start + length].

        Returns:
            rows, shape (m,): which start each end belongs to, ascending; ends, shape (m,): the
            position after each document's last token, ascending inside a row.
        """
        low, high = self._documents_before(starts), self._documents_before(starts + length)
        counts = high - low
        rows = np.repeat(np.arange(len(starts)), counts)
        firsts = np.cumsum(counts) - counts
        documents = np.arange(int(counts.sum())) - firsts[rows] + low[rows]
        ends = self._document_ends(documents)
        inside = (ends > starts[rows]) & (ends <= starts[rows] + length)
        inside[1:] &= (ends[1:] >= ends[:-1]) | (rows[1:] != rows[:-1])
        if not inside.all():
            document = int(documents[np.argmin(inside)])
            raise fault(
                self._path,
                self._header.documents_offset + 8 * (document + 1),
                f"document {document} ends at token {int(ends[np.argmin(inside)])}",
                "ends in ascending order",
            )
        return rows, ends

    def verify(self) -> None:
        """Check every entry, a chunk at a time."""
        itemsize = self._header.dtype.itemsize
        for first in range(0, self._header.num_sequences, VERIFY_CHUNK):
            lengths = self._lengths[first : first + VERIFY_CHUNK].astype(np.int64)
            pointers = self._pointers[first : first + VERIFY_CHUNK + 1].astype(np.int64)
            self._refuse(lengths < 0, "length", self._header.lengths_offset, 4, first, lengths)
            expected = pointers[:-1] + lengths[: len(pointers) - 1] * itemsize
            wrong = pointers[1:] != expected
            self._refuse(wrong, "pointer", self._header.pointers_offset, 8, first + 1, pointers[1:])
        for first in range(0, self._header.num_entries, VERIFY_CHUNK):
            entries = self._documents[first : first + VERIFY_CHUNK + 1].astype(np.int64)
            wrong = (np.diff(entries) < 0) | (entries[1:] > self._header.num_sequences)
            offset = self._header.documents_offset
            self._refuse(wrong, "document index", offset, 8, first + 1, entries[1:])

    def _refuse(
        self,
        wrong: NDArray[np.bool_],
        what: str,
        offset: int,
        width: int,
        first: int,
        values: NDArray[np.int64],
    ) -> None:
        if wrong.any():
            place = int(np.argmax(wrong))
            raise fault(
                self._path,
                offset + width * (first + place),
                f"{what} {int(values[place])} at entry {first + place}",
                "a value that agrees with its neighbours",
            )

    def _documents_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the documents that end at or before each position.

        Binary search by hand: `numpy.searchsorted` would copy the whole unaligned array.
        """
        low = np.zeros(len(positions), dtype=np.int64)
        high = np.full(len(positions), self._header.num_entries - 1, dtype=np.int64)
        while (active := low < high).any():
            middle = (low[active] + high[active]) // 2
            before = self._document_ends(middle) <= positions[active]
            low[active] = np.where(before, middle + 1, low[active])
            high[active] = np.where(before, high[active], middle)
        return low

    def _document_ends(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._token_offsets(self._documents[documents + 1])

    def _token_offsets(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first token of each sequence; num_tokens for the one after the last."""
        count = self._header.num_sequences
        offsets = np.full(len(sequences), self._num_tokens, dtype=np.int64)
        inside = sequences < count
        if np.any(sequences < 0) or np.any(sequences > count):
            raise DataError(
                f"{self._path}: a document index is outside [0, {count}]; the file is damaged"
            )
        offsets[inside] = self._pointers[sequences[inside]] // self._header.dtype.itemsize
        return offsets
