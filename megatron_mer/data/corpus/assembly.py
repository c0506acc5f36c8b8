"""From finished shards to one dataset: appended in their order while others are still made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.corpus.faults import EMPTY
from megatron_mer.data.corpus.reading import Unit
from megatron_mer.data.corpus.shards import (
    FAULTS,
    LENGTHS,
    MANIFEST,
    TOKENS,
    Counts,
    Manifest,
    path_of,
    stem_of,
)
from megatron_mer.data.index_format import IndexHeader
from megatron_mer.data.publication import Publication, index_pieces
from megatron_mer.data.sidecar import Provenance, Sidecar, Source
from megatron_mer.errors import DataError

COPY_BYTES = 1 << 22
INDEX_PIECE = 1 << 20
FAULTS_SUFFIX = ".faults.jsonl"
"""Of the file beside a dataset that names every document that was left out."""


@dataclass
class SourceTotals:
    """What came out of one input."""

    name: str
    counts: Counts = field(default_factory=Counts)
    faults: dict[str, int] = field(default_factory=dict)
    encoders: list[str] = field(default_factory=list)
    sha256: str = ""

    def add(self, manifest: Manifest) -> None:
        """Add a shard's numbers."""
        self.counts.add(manifest.counts)
        for kind, count in manifest.faults.items():
            self.faults[kind] = self.faults.get(kind, 0) + count
        if manifest.encoder not in self.encoders:
            self.encoders.append(manifest.encoder)
        self.sha256 = manifest.sha256 or self.sha256

    def source(self) -> Source:
        """Return the sidecar's entry."""
        empty = self.faults.get(EMPTY, 0)
        return Source(
            file=self.name,
            documents=self.counts.documents,
            skipped=empty,
            text_bytes=self.counts.text_bytes,
            sha256=self.sha256,
            tokens=self.counts.tokens,
            faults=sum(self.faults.values()) - empty,
            encoder="; ".join(self.encoders),
        )


class Assembly:
    """A dataset while its shards are appended.

    Args:
        publication: of the dataset.
        folder: of the shards.
        units: of the job, in order.
        key: gives the key that a unit's shards must have.
        dtype: of the tokens.
    """

    def __init__(
        self,
        publication: Publication,
        folder: Path,
        units: Sequence[Unit],
        key: Callable[[Unit], str],
        dtype: np.dtype[Any],
    ) -> None:
        self._publication = publication
        self._folder = folder
        self._units = units
        self._key = key
        self._dtype = dtype
        self._at = self._shard = 0
        self._lines_before: dict[int, int] = {}
        self._lengths: list[tuple[Path, int]] = []
        self._digest = hashlib.sha256()
        self._faults = Path(f"{publication.prefix}{FAULTS_SUFFIX}")
        self._partial_faults = self._faults.with_name(self._faults.name + ".partial")
        self._partial_faults.unlink(missing_ok=True)
        self.totals: dict[int, SourceTotals] = {
            unit.source: SourceTotals(unit.file.name) for unit in units
        }
        self.languages: dict[str, Counts] = {}
        self.max_token_id = -1

    @property
    def counts(self) -> Counts:
        """Of everything that was appended."""
        counts = Counts()
        for totals in self.totals.values():
            counts.add(totals.counts)
        return counts

    def advance(self) -> bool:
        """Append the shards that are finished and whose turn it is; tell whether that was all.

        Raises:
            DataError: the disk refuses, or a shard was changed meanwhile.
        """
        while self._at < len(self._units):
            unit = self._units[self._at]
            stem = stem_of(self._folder, unit.source, unit.first_shard + self._shard)
            manifest = Manifest.read(stem, self._key(unit), self._dtype.itemsize)
            if manifest is None:
                return False
            with self._publication.disk_errors():
                self._append(unit, stem, manifest)
            self._shard += 1
            if manifest.last:
                lines = self._lines_before.get(unit.source, 0)
                self._lines_before[unit.source] = lines + manifest.lines
                self._at, self._shard = self._at + 1, 0
        return True

    def publish(self, provenance: Callable[[tuple[Source, ...]], Provenance]) -> Sidecar:
        """Give the dataset its final names.

        Args:
            provenance: made from the sources.

        Raises:
            DataError: the dataset appeared meanwhile, or the disk refuses.
        """
        counts = self.counts
        # Before the account of what was left out takes the place of an earlier one.
        self._publication.refuse_existing()
        header = IndexHeader(self._dtype, counts.documents, counts.documents + 1)
        with self._publication.disk_errors():
            pieces = index_pieces(header, self._read_lengths, _document_ends(counts.documents))
            idx_sha256 = self._publication.write_file(".idx", pieces)
            sidecar = Sidecar(
                provenance=provenance(tuple(total.source() for total in self.totals.values())),
                documents=counts.documents,
                tokens=counts.tokens,
                dtype=self._dtype.name,
                max_token_id=self.max_token_id,
                bin_sha256=self._digest.hexdigest(),
                idx_sha256=idx_sha256,
            )
            self._publication.write_file(".json", [sidecar.to_json().encode()])
            self._publish_faults()
            self._publication.publish()
        shutil.rmtree(self._folder, ignore_errors=True)
        return sidecar

    def publish_nothing(self) -> str:
        """Leave the account of what was left out, and nothing else; return it in words.

        Raises:
            DataError: the disk refuses.
        """
        with self._publication.disk_errors():
            self._publish_faults()
        shutil.rmtree(self._folder, ignore_errors=True)
        left_out = sum(sum(total.faults.values()) for total in self.totals.values())
        named = f", see {self._faults}" if left_out else ""
        return f"{left_out:,} were empty or left out{named}"

    def _publish_faults(self) -> None:
        self._faults.unlink(missing_ok=True)
        if self._partial_faults.exists():
            os.replace(self._partial_faults, self._faults)

    def _append(self, unit: Unit, stem: Path, manifest: Manifest) -> None:
        for ending, wanted in ((TOKENS, manifest.tokens_crc32), (LENGTHS, manifest.lengths_crc32)):
            found = 0
            for data in _pieces(path_of(stem, ending)):
                found = zlib.crc32(data, found)
                if ending == TOKENS:
                    self._digest.update(data)
                    self._publication.bin.write(data)
            if found != wanted:
                path_of(stem, MANIFEST).unlink()
                raise DataError(
                    f"{path_of(stem, ending)}: not what was written there (CRC-32 {found:08x}, not "
                    f"{wanted:08x}); the same command makes this shard again"
                )
        self._lengths.append((path_of(stem, LENGTHS), manifest.counts.documents))
        if manifest.faults:
            self._append_faults(unit, path_of(stem, FAULTS))
        self.totals[unit.source].add(manifest)
        for language, counts in manifest.languages.items():
            self.languages.setdefault(language, Counts()).add(counts)
        self.max_token_id = max(self.max_token_id, manifest.max_token_id)

    def _append_faults(self, unit: Unit, path: Path) -> None:
        """Name the documents that were left out by file and line, from the file's start."""
        before = self._lines_before.get(unit.source, 0)
        with open(path, "rb") as shard, open(self._partial_faults, "ab") as file:
            for line in shard:
                fault = json.loads(line)
                fault = {"file": unit.file.path, **fault, "line": fault["line"] + before}
                file.write(json.dumps(fault, ensure_ascii=False).encode() + b"\n")

    def _read_lengths(self) -> Iterator[NDArray[np.int32]]:
        for path, count in self._lengths:
            with open(path, "rb") as file:
                while count > 0:
                    piece = np.fromfile(file, dtype="<i4", count=min(count, INDEX_PIECE))
                    if not len(piece):
                        raise DataError(f"{path}: was changed while the dataset was put together")
                    count -= len(piece)
                    yield piece


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(COPY_BYTES):
            yield data


def _document_ends(documents: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, documents + 1, INDEX_PIECE):
        yield np.arange(start, min(start + INDEX_PIECE, documents + 1))
