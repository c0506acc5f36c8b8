"""Reading a tokenized corpus in Megatron's `.bin/.idx` format.

The `.bin` file is read with `pread`, never mapped: a file that shrinks under a running job is a
named error instead of a bus error, reads never come short, and an array that was returned owns its
memory. The `.idx` file is mapped the first time document ends are asked for; opening costs a few
small reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.document_index import DocumentIndex
from megatron_mer.data.index_format import (
    IndexHeader,
    check_edges,
    fault,
    file_size,
    open_file,
    read_header,
)
from megatron_mer.data.sidecar import Sidecar, file_sha256, read_sidecar
from megatron_mer.errors import DataError
from megatron_mer.log import get_logger

logger = get_logger(__name__)


class IndexedDataset:
    """The tokens of a corpus and where its documents end.

    A document is one or more sequences; the tokens of all sequences lie one after the other.

    Args:
        prefix: path without `.bin` and `.idx`.

    Raises:
        DataError: a file is missing or damaged; names the file, the byte and what was expected.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path = Path(self.prefix + ".bin")
        self.idx_path = Path(self.prefix + ".idx")
        self._lock = Lock()
        self._bin_file: BinaryIO | None = None
        self._index: DocumentIndex | None = None
        bin_size = file_size(self.bin_path)
        self._header = _checked_header(self.idx_path, bin_size)
        self.num_tokens = bin_size // self._header.dtype.itemsize
        self.sidecar = self._checked_sidecar()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored tokens, little endian."""
        return self._header.dtype

    @property
    def num_sequences(self) -> int:
        """Number of sequences, S."""
        return self._header.num_sequences

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return self._header.num_entries - 1

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.num_documents

    def __repr__(self) -> str:
        """Return prefix, counts and dtype."""
        counts = f"documents={self.num_documents}, tokens={self.num_tokens}"
        return f"IndexedDataset({self.prefix!r}, {counts}, dtype={self.dtype})"

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return tokens [start, stop) of the whole corpus: shape (stop - start,), its own memory.

        Raises:
            DataError: the range is not inside [0, num_tokens], or the file came short.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise DataError(
                f"{self.bin_path}: tokens [{start}, {stop}) were asked for; it has "
                f"{self.num_tokens}"
            )
        out = np.empty(stop - start, dtype=self.dtype)
        if stop > start:
            self._read_into(out.view(np.uint8).data, start * self.dtype.itemsize)
        return out

    def document(self, index: int) -> NDArray[Any]:
        """Return the tokens of one document, all its sequences: shape (n,), its own memory.

        Raises:
            DataError: no such document, or the index is damaged there.
        """
        if not 0 <= index < self.num_documents:
            raise DataError(
                f"{self.prefix}: document {index} was asked for; it has {self.num_documents}, "
                "counted from 0"
            )
        return self.tokens(*self._mapped_index().document_range(index))

    def count_document_ends(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """Count the positions p in [start, start + length) that hold the last token of a document.

        Reads the index alone, in O(log documents + documents in the range) for each start.

        Args:
            starts: shape (n,), first positions, in tokens.
            length: tokens from each start on.

        Returns:
            Shape (n,).

        Raises:
            DataError: a range is not inside the corpus, or the index is damaged there.
        """
        starts = self._checked_starts(starts, length)
        rows, ends = self._mapped_index().ends_in(starts, length)
        # Empty documents repeat the end of the one before: a position counts once.
        fresh = np.ones(len(ends), dtype=bool)
        fresh[1:] = (ends[1:] != ends[:-1]) | (rows[1:] != rows[:-1])
        return np.bincount(rows[fresh], minlength=len(starts)).astype(np.int64)

    def document_end_mask(self, start: int, length: int) -> NDArray[np.bool_]:
        """Mark the last tokens of documents in [start, start + length): shape (length,)."""
        return self.document_end_masks(np.array([start]), length).reshape(length)

    def document_end_masks(self, starts: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
        """Mark the last tokens of documents in each [start, start + length).

        Args:
            starts: shape (n,), first positions, in tokens.
            length: tokens from each start on.

        Returns:
            Shape (n, length): True where the token is the last of its document.

        Raises:
            DataError: as `count_document_ends`.
        """
        starts = self._checked_starts(starts, length)
        rows, ends = self._mapped_index().ends_in(starts, length)
        masks = np.zeros((len(starts), length), dtype=np.bool_)
        masks[rows, ends - 1 - starts[rows]] = True
        return masks

    def verify(self, checksums: bool = True) -> None:
        """Check everything that opening does not: every length, pointer and document index.

        Args:
            checksums: also compare both files with the sidecar's SHA-256, where there is one.

        Raises:
            DataError: the first damaged entry, or the file whose content changed.
        """
        self._mapped_index().verify()
        if checksums and self.sidecar is not None:
            for path, expected in (
                (self.bin_path, self.sidecar.bin_sha256),
                (self.idx_path, self.sidecar.idx_sha256),
            ):
                found = file_sha256(path)
                if found != expected:
                    raise DataError(
                        f"{path}: SHA-256 {found}, but {self.prefix}.json says {expected}; the "
                        "file "
                        "changed since it was written: tokenize the corpus again"
                    )

    def content_id(self) -> str:
        """What tells this content from another: the sidecar's checksum of the `.bin` file."""
        return self.sidecar.bin_sha256 if self.sidecar else ""

    def close(self) -> None:
        """Release the open files; the next read opens them again. Arrays stay valid."""
        with self._lock:
            if self._bin_file is not None:
                self._bin_file.close()
            self._bin_file = None
            self._index = None

    def __del__(self) -> None:
        """Close the `.bin` file of a dataset that is no longer used."""
        if getattr(self, "_bin_file", None) is not None:
            self.close()

    def _checked_sidecar(self) -> Sidecar | None:
        sidecar = read_sidecar(self.prefix)
        if sidecar is None:
            logger.warning(
                "%s.json is missing: the tokenizer and the checksums of this dataset are unknown",
                self.prefix,
            )
            return None
        for name, stored, actual in (
            ("tokens", sidecar.tokens, self.num_tokens),
            ("documents", sidecar.documents, self.num_documents),
            ("dtype", sidecar.dtype, self.dtype.name),
        ):
            if stored != actual:
                raise DataError(
                    f"{self.prefix}.json says {name} {stored}, but {self.idx_path.name} has "
                    f"{actual}; "
                    "the files do not belong together"
                )
        return sidecar

    def _checked_starts(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        array = np.asarray(starts, dtype=np.int64)
        if length < 0 or np.any(array < 0) or np.any(array > self.num_tokens - length):
            raise DataError(
                f"{self.prefix}: {length} tokens from each of {array.tolist()[:8]} on were asked "
                "for; "
                f"it has {self.num_tokens}"
            )
        return array

    def _mapped_index(self) -> DocumentIndex:
        with self._lock:
            if self._index is None:
                self._index = DocumentIndex(self.idx_path, self._header, self.num_tokens)
            return self._index

    def _descriptor(self) -> int:
        with self._lock:
            if self._bin_file is None:
                self._bin_file = open_file(self.bin_path)
            return self._bin_file.fileno()

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        descriptor, done = self._descriptor(), 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise DataError(f"{self.bin_path}, byte {offset + done}: {error}") from error
            if count == 0:
                raise fault(
                    self.bin_path,
                    offset + done,
                    "the file ends",
                    f"{len(buffer) - done} more bytes: it was truncated after it was opened",
                )
            done += count


def _checked_header(idx_path: Path, bin_size: int) -> IndexHeader:
    with open_file(idx_path) as file:
        header = read_header(idx_path, file, file_size(idx_path))
        check_edges(idx_path, file, header, bin_size)
    return header
