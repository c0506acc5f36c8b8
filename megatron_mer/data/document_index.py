"""Where documents lie, answered from an `.idx` file that is neither mapped nor loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.index_format import IndexHeader, fault, file_size
from megatron_mer.data.open_files import DataFile
from megatron_mer.errors import DataError

VERIFY_CHUNK = 1 << 20
"""Sequences that `DocumentIndex.verify` looks at together."""


class DocumentIndex:
    """The arrays of an `.idx` file, read piece by piece.

    Args:
        path: of the `.idx` file.
        header: what its header says.
        num_tokens: tokens of the `.bin` file.
    """

    def __init__(self, path: Path, header: IndexHeader, num_tokens: int) -> None:
        self.file = DataFile(path, file_size(path))
        self._header = header
        self._num_tokens = num_tokens

    @property
    def table(self) -> tuple[int, int, int, int]:
        """What `_index.document_ends` must know: sequences, entries, token bytes and tokens."""
        header = self._header
        return header.num_sequences, header.num_entries, header.dtype.itemsize, self._num_tokens

    def document_range(self, index: int) -> tuple[int, int]:
        """Return the first token of a document and the token after its last."""
        header, itemsize = self._header, self._header.dtype.itemsize
        first, last = self._documents(index, index + 2).tolist()
        if not 0 <= first <= last <= header.num_sequences:
            raise self._fault(
                header.documents_offset + 8 * index,
                f"document {index} has sequences [{first}, {last})",
                f"a range inside [0, {header.num_sequences})",
            )
        lengths, pointers = self._lengths(first, last), self._pointers(first, last + 1)
        whole = pointers[0] % itemsize == 0 and np.array_equal(
            np.diff(pointers), lengths * itemsize
        )
        if np.any(lengths < 0) or not whole:
            raise self._fault(
                header.pointers_offset + 8 * first,
                f"document {index} has sequences of {lengths.tolist()[:8]} tokens at bytes "
                f"{pointers.tolist()[:9]} of the .bin file",
                f"sequences of {itemsize} bytes a token that follow each other",
            )
        return int(pointers[0]) // itemsize, int(pointers[-1]) // itemsize

    def end_fault(self, document: int, sequence: int, end: int) -> DataError:
        """Build the error for a document whose end `_index.document_ends` could not accept."""
        byte, count = self._header.documents_offset + 8 * (document + 1), self._header.num_sequences
        if not 0 <= sequence <= count:
            found, expected = f"document index {sequence}", f"0 to {count}, the sequences there are"
        else:
            found = f"document {document} ends at token {end}"
            expected = f"ends in ascending order, at most {self._num_tokens}"
        return self._fault(byte, found, expected)

    def verify(self) -> None:
        """Check every entry, a chunk at a time; opening checked the first and the last ones.

        Raises:
            DataError: the first entry that does not agree with its neighbours.
        """
        header, itemsize = self._header, self._header.dtype.itemsize
        for first in range(0, header.num_sequences, VERIFY_CHUNK):
            stop = min(first + VERIFY_CHUNK, header.num_sequences)
            lengths = self._lengths(first, stop)
            for place in _first(lengths < 0):
                found = f"sequence {first + place} has length {lengths[place]}"
                raise self._fault(header.lengths_offset + 4 * (first + place), found, "0 or more")
            pointers = self._pointers(first, stop + 1)
            ends = pointers[:-1] + lengths * itemsize
            for place in _first(pointers[1:] != ends):
                byte = header.pointers_offset + 8 * (first + place + 1)
                expected = f"{ends[place]}, where sequence {first + place} ends"
                raise self._fault(byte, f"pointer {pointers[place + 1]}", expected)
        for first in range(0, header.num_entries - 1, VERIFY_CHUNK):
            entries = self._documents(first, min(first + VERIFY_CHUNK + 1, header.num_entries))
            for place in _first(np.diff(entries) < 0):
                byte = header.documents_offset + 8 * (first + place + 1)
                found = f"document index {entries[place + 1]} after {entries[place]}"
                raise self._fault(byte, found, "ascending document indices")

    def _fault(self, byte: int, found: str, expected: str) -> DataError:
        return fault(self.file.path, byte, found, expected)

    def _lengths(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the lengths of sequences [first, stop), in tokens."""
        return self._read("<i4", self._header.lengths_offset + 4 * first, stop - first)

    def _pointers(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return where sequences [first, stop) start, in bytes; the one after the last at the end.

        Args:
            first: at most S.
            stop: above first, at most S + 1.
        """
        count = self._header.num_sequences
        pointers = self._read(
            "<i8", self._header.pointers_offset + 8 * first, min(stop, count) - first
        )
        if stop <= count:
            return pointers
        return np.append(pointers, self._num_tokens * self._header.dtype.itemsize)

    def _documents(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return entries [first, stop) of the document indices."""
        return self._read("<i8", self._header.documents_offset + 8 * first, stop - first)

    def _read(self, dtype: str, byte: int, count: int) -> NDArray[np.int64]:
        values: NDArray[Any] = np.empty(count, dtype=dtype)
        if count:
            self.file.open().read_into(values.view(np.uint8).data, byte)
        return values.astype(np.int64)


def _first(wrong: NDArray[np.bool_]) -> list[int]:
    """Return the first place that is wrong, if any."""
    return [int(np.argmax(wrong))] if wrong.any() else []
