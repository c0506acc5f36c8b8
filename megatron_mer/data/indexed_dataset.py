"""Reading a tokenized corpus in Megatron's `.bin/.idx` format.

Both files are read with `pread`, never mapped: a file that shrinks under a running job is a named
error instead of a bus error, reads never come back short, and an array that was returned owns its
memory. Opening costs a few small reads and keeps no file open; see `open_files` for how many are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

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
from megatron_mer.data.open_files import DataFile
from megatron_mer.data.sidecar import Sidecar, read_sidecar
from megatron_mer.errors import DataError

CHUNK = 1 << 23
"""Bytes that `IndexedDataset.verify` looks at together; a multiple of every token's size."""
EDGE = 1 << 16
"""Bytes at either end of a file that `IndexedDataset.content_id` looks at."""


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
        bin_size = file_size(self.bin_path)
        self._header = _checked_header(self.idx_path, bin_size)
        self.num_tokens = bin_size // self._header.dtype.itemsize
        self.sidecar = self._checked_sidecar()
        self.bin_file = DataFile(self.bin_path, bin_size)
        self.index = DocumentIndex(self.idx_path, self._header, self.num_tokens)

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
            self.bin_file.open().read_into(out.view(np.uint8).data, start * self.dtype.itemsize)
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
        return self.tokens(*self.index.document_range(index))

    def verify(
        self,
        vocab_size: int | None = None,
        checksums: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Check everything that opening does not: every length, pointer, document index and id.

        The `.bin` file is read once, and memory stays bounded.

        Args:
            vocab_size: ids must be in [0, vocab_size); those above the sidecar's largest id are
                refused in any case.
            checksums: also compare both files with the sidecar's SHA-256, where there is one.
            progress: called with the bytes checked so far and the bytes of both files.

        Raises:
            DataError: the first damaged entry or wrong id, with its file and byte, or the file
                whose content changed.
        """
        self.close()  # the files that have the names now, not those that were opened once
        if _checked_header(self.idx_path, file_size(self.bin_path)) != self._header:
            raise fault(self.idx_path, 0, "another header", "the one that stood there when opened")
        idx_size, total = self.index.file.size, self.index.file.size + self.bin_file.size
        report = progress or (lambda done, total: None)
        sidecar = self.sidecar if checksums else None
        self.index.verify()
        if sidecar is not None:
            self._compare_checksum(self.idx_path, _chunks(self.index.file), sidecar.idx_sha256)
        report(idx_size, total)
        tokens = self._checked_chunks(vocab_size, lambda done: report(idx_size + done, total))
        self._compare_checksum(self.bin_path, tokens, sidecar.bin_sha256 if sidecar else None)

    def content_id(self) -> str:
        """Return a string that changes when the content does.

        It is the sidecar's SHA-256 of the `.bin` file. A dataset without a sidecar has `edges:` and
        the SHA-256 over both files' sizes and first and last 64 KiB: the same cost at any size, but
        a change that keeps all of those is not noticed.

        Raises:
            DataError: a file cannot be read.
        """
        if self.sidecar is not None:
            return self.sidecar.bin_sha256
        digest = hashlib.sha256()
        for file in (self.bin_file, self.index.file):
            digest.update(file.size.to_bytes(8, "little"))
            for first in (0, max(0, file.size - EDGE)):
                edge = bytearray(min(EDGE, file.size))
                file.open().read_into(memoryview(edge), first)
                digest.update(edge)
        return f"edges:{digest.hexdigest()}"

    def close(self) -> None:
        """Release the open files; the next read opens them again. Arrays stay valid."""
        self.bin_file.close()
        self.index.file.close()

    def __del__(self) -> None:
        """Close the files of a dataset that is no longer used."""
        # Without an index its opening failed, and there is nothing to close.
        if hasattr(self, "index"):
            self.close()

    def _checked_sidecar(self) -> Sidecar | None:
        sidecar = read_sidecar(self.prefix)
        if sidecar is None:
            return None
        for name, stored, actual in (
            ("tokens", sidecar.tokens, self.num_tokens),
            ("documents", sidecar.documents, self.num_documents),
            ("dtype", sidecar.dtype, self.dtype.name),
        ):
            if stored != actual:
                raise DataError(
                    f"{self.prefix}.json says {name} {stored}, but {self.idx_path.name} has "
                    f"{actual}; the files do not belong together"
                )
        return sidecar

    def _checked_chunks(
        self, vocab_size: int | None, report: Callable[[int], None]
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the `.bin` file in chunks whose ids were checked."""
        last, reason = self._last_id(vocab_size)
        largest, done = -1, 0
        for chunk in _chunks(self.bin_file):
            tokens = chunk.view(self.dtype)
            largest = max(largest, int(tokens.max()))
            if largest > last or tokens.min() < 0:
                place = int(np.argmax((tokens < 0) | (tokens > last)))
                byte = done + place * self.dtype.itemsize
                expected = f"0 to {last}, {reason}"
                raise fault(self.bin_path, byte, f"token id {tokens[place]}", expected)
            yield chunk
            done += len(chunk)
            report(done)
        if self.sidecar is not None and largest != self.sidecar.max_token_id:
            raise DataError(
                f"{self.prefix}.json says max_token_id {self.sidecar.max_token_id}, but the "
                f"largest id in {self.bin_path.name} is {largest}; the files do not belong together"
            )

    def _last_id(self, vocab_size: int | None) -> tuple[int, str]:
        """Return the largest id that is allowed, and who says so."""
        limits = [(int(np.iinfo(self.dtype).max), f"the ids of {self.dtype.name}")]
        if vocab_size is not None:
            limits.append((vocab_size - 1, "the ids of the vocabulary"))
        if self.sidecar is not None:
            name = f"{self.prefix}.json"
            limits.append((self.sidecar.provenance.vocab_size - 1, f"the vocabulary in {name}"))
            limits.append((self.sidecar.max_token_id, f"up to max_token_id in {name}"))
        return min(limits)

    def _compare_checksum(
        self, path: Path, chunks: Iterator[NDArray[np.uint8]], expected: str | None
    ) -> None:
        """Draw all chunks of a file; compare their SHA-256 with the sidecar's, if there is one."""
        digest = hashlib.sha256()
        for chunk in chunks:
            if expected is not None:
                digest.update(chunk.data)
        if expected is not None and digest.hexdigest() != expected:
            raise DataError(
                f"{path}: SHA-256 {digest.hexdigest()}, but {self.prefix}.json says {expected}; "
                "the file changed since it was written: tokenize the corpus again"
            )


def missing_sidecars(datasets: Collection[IndexedDataset]) -> str | None:
    """Return one line about all datasets without a sidecar; None when each has one."""
    missing = [f"{dataset.prefix}.json" for dataset in datasets if dataset.sidecar is None]
    if not missing:
        return None
    shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"{len(missing)} of {len(datasets)} datasets have no sidecar: their tokenizer and their "
        f"checksums are unknown ({shown} missing)"
    )


def _checked_header(idx_path: Path, bin_size: int) -> IndexHeader:
    with open_file(idx_path) as file:
        header = read_header(idx_path, file, file_size(idx_path))
        check_edges(idx_path, file, header, bin_size)
    return header


def _chunks(file: DataFile) -> Iterator[NDArray[np.uint8]]:
    """Yield a file's bytes in chunks, all in the same memory."""
    opened = file.open()
    buffer = np.empty(min(CHUNK, file.size), dtype=np.uint8)
    for first in range(0, file.size, CHUNK):
        chunk = buffer[: min(CHUNK, file.size - first)]
        opened.read_into(chunk.data, first)
        yield chunk
