"""The datasets that a merge takes: opened, compared, and read in pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.document_index import DocumentIndex
from megatron_mer.data.index_format import IndexHeader, fault, file_size, open_file, read_header
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.sidecar import Provenance, file_sha256, merged_provenance
from megatron_mer.errors import DataError, Problem

PIECE_BYTES = 1 << 24
"""Of a `.bin` file, read together; a multiple of every token's size."""
INDEX_PIECE = 1 << 20
"""Entries of an index that are read together."""
MAX_PROBLEMS = 10
"""Problems of one kind that an error lists; of a thousand datasets the rest is counted."""
FILES = (".bin", ".idx")


@dataclass(frozen=True)
class Shard:
    """One of the datasets that are merged, as it was when it was opened."""

    dataset: IndexedDataset
    """It holds no open file until it is read."""
    header: IndexHeader
    """Of the `.idx` file."""

    @property
    def prefix(self) -> str:
        """Path without `.bin` and `.idx`."""
        return self.dataset.prefix

    @property
    def bin_size(self) -> int:
        """Bytes of the `.bin` file."""
        return self.dataset.num_tokens * self.header.dtype.itemsize

    def check_index(self) -> None:
        """Check every entry of the index, and its checksum where there is a sidecar.

        Raises:
            DataError: names the file and the byte.
        """
        path, sidecar = self.dataset.idx_path, self.dataset.sidecar
        DocumentIndex(path, self.header, self.dataset.num_tokens).verify()
        if sidecar is not None:
            self._compare(path, file_sha256(path), sidecar.idx_sha256)

    def check_content(self, bin_sha256: str) -> None:
        """Compare what was read of the `.bin` file with the sidecar, where there is one.

        Args:
            bin_sha256: of what was read.

        Raises:
            DataError: it is not what was written once.
        """
        if self.dataset.sidecar is not None:
            self._compare(self.dataset.bin_path, bin_sha256, self.dataset.sidecar.bin_sha256)

    def lengths(self) -> Iterator[NDArray[np.int32]]:
        """Yield the sequence lengths in pieces, in tokens."""
        count = self.header.num_sequences
        return self._entries(np.dtype("<i4"), self.header.lengths_offset, count)

    def document_ends(self) -> Iterator[NDArray[np.int64]]:
        """Yield the sequence after the last of each document, in pieces."""
        # The first entry, 0, is the end of no document.
        offset = self.header.documents_offset + 8
        return self._entries(np.dtype("<i8"), offset, self.dataset.num_documents)

    def bin_pieces(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the `.bin` file in pieces of whole tokens; each shares its memory with the next.

        Raises:
            DataError: its size is another than when it was opened, or it cannot be read.
        """
        path = self.dataset.bin_path
        if file_size(path) != self.bin_size:
            found = f"the file has {file_size(path)} bytes"
            raise fault(path, self.bin_size, found, f"{self.bin_size}, as when it was opened")
        memory = np.empty(min(PIECE_BYTES, self.bin_size), dtype=np.uint8)
        with open_file(path) as file:
            for start in range(0, self.bin_size, PIECE_BYTES):
                piece = memory[: self.bin_size - start]
                _fill(piece, file, path, start)
                yield piece

    def _entries(self, dtype: np.dtype[Any], offset: int, count: int) -> Iterator[NDArray[Any]]:
        path = self.dataset.idx_path
        with open_file(path) as file:
            file.seek(offset)
            for first in range(0, count, INDEX_PIECE):
                entries = np.empty(min(INDEX_PIECE, count - first), dtype=dtype)
                _fill(entries.view(np.uint8), file, path, offset + first * dtype.itemsize)
                yield entries

    def _compare(self, path: Path, found: str, expected: str) -> None:
        if found != expected:
            raise DataError(
                f"{path}: SHA-256 {found}, but {self.prefix}.json says {expected}; the file "
                "changed since it was written: tokenize its text again, or leave it out"
            )


def open_shards(prefixes: Sequence[str], output: str) -> list[Shard]:
    """Open datasets that are to become one.

    Args:
        prefixes: of the datasets.
        output: prefix of the merged one, which must be none of them.

    Raises:
        DataError: none, one that is damaged or multimodal, is named twice or is the output, or
            token dtypes that differ; names each.
    """
    if not prefixes:
        raise DataError("no dataset was named; at least one is needed")
    _refuse_repeats(prefixes, output)
    shards, damaged = [], []
    for prefix in prefixes:
        try:
            shards.append(_open(prefix))
        except DataError as error:
            damaged.append(str(error))
    if len(damaged) > MAX_PROBLEMS:
        damaged[MAX_PROBLEMS:] = [f"{len(damaged) - MAX_PROBLEMS} more datasets are damaged"]
    if damaged:
        raise DataError("\n".join(damaged))
    _refuse_mixed_dtypes(shards)
    return shards


def common_provenance(shards: Sequence[Shard], without_sidecar: bool) -> Provenance | None:
    """Return the provenance of the merged dataset.

    Args:
        shards: at least one.
        without_sidecar: datasets may lack a sidecar, and then there is no provenance.

    Returns:
        None with `without_sidecar`.

    Raises:
        DataError: a sidecar is missing, or tokenizers or end-of-document settings differ.
    """
    if not without_sidecar:
        _refuse(
            [
                Problem(
                    f"{shard.prefix}.json",
                    "is missing, so this dataset's tokenizer is unknown",
                    remedy="tokenize it again with tools/preprocess_data.py, or merge "
                    "--without-sidecar, after which nothing knows the tokenizer of the whole",
                )
                for shard in shards
                if shard.dataset.sidecar is None
            ]
        )
    sidecars = {s.prefix: s.dataset.sidecar for s in shards if s.dataset.sidecar is not None}
    provenance = None
    if sidecars:
        try:
            provenance = merged_provenance(sidecars)
        except DataError as error:
            _refuse(error.problems)
    return None if without_sidecar else provenance


def _open(prefix: str) -> Shard:
    dataset = IndexedDataset(prefix)
    size = file_size(dataset.idx_path)
    with open_file(dataset.idx_path) as file:
        header = read_header(dataset.idx_path, file, size)
    if size != header.size:
        raise fault(
            dataset.idx_path,
            header.size,
            "sequence modes (a multimodal dataset)",
            "the end of the file: only datasets of text can be merged",
        )
    return Shard(dataset, header)


def _refuse(problems: Sequence[Problem]) -> None:
    rest = len(problems) - MAX_PROBLEMS
    more = [Problem(f"{rest} more datasets", "have the same problem")] if rest > 0 else []
    if problems:
        raise DataError([*problems[:MAX_PROBLEMS], *more])


def _refuse_mixed_dtypes(shards: Sequence[Shard]) -> None:
    names = [shard.header.dtype.name for shard in shards]
    ((usual, count),) = Counter(names).most_common(1)
    _refuse(
        [
            Problem(
                f"{shard.dataset.idx_path}",
                f"tokens of {name}, but {count} of {len(shards)} datasets have {usual}, such as "
                f"{shards[names.index(usual)].prefix}",
                remedy="tokenize it again with their tokenizer, or merge it apart",
            )
            for shard, name in zip(shards, names, strict=True)
            if name != usual
        ]
    )


def _refuse_repeats(prefixes: Sequence[str], output: str) -> None:
    """Compare files, not names: a link or `./` before a name leads to the same file."""
    targets, seen = _identities(output), dict[tuple[int, int], str]()
    for prefix in prefixes:
        own = _identities(prefix)
        if own & targets:
            raise DataError(
                f"{prefix}: is also the output ({output}); choose another output prefix"
            )
        for repeated in own & seen.keys():
            raise DataError(
                f"{prefix}: is named twice (also as {seen[repeated]}), so its documents would be "
                "repeated; leave it out once. A pattern that must not match .bin and .json too: "
                "PREFIX*.idx"
            )
        seen |= dict.fromkeys(own, prefix)


def _identities(prefix: str) -> set[tuple[int, int]]:
    """Device and inode of the files that are there; opening says why one is not."""
    found = set()
    for suffix in FILES:
        try:
            stat = Path(prefix + suffix).stat()
        except OSError:
            continue
        found.add((stat.st_dev, stat.st_ino))
    return found


def _fill(memory: NDArray[np.uint8], file: BinaryIO, path: Path, offset: int) -> None:
    """Read exactly the bytes that fit, from the file's position on, which is `offset`."""
    view, done = memory.data, 0
    while done < len(view):
        try:
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise DataError(f"{path}, byte {offset + done}: {error.strerror}") from error
        if not count:
            found = "the file ends"
            raise fault(path, offset + done, found, f"{len(view) - done} more bytes")
        done += count
