"""A finished piece of a job: its tokens, and the manifest that says so.

`FOLDER/SOURCE-SHARD.tokens`, `.lengths` and `.faults` are written first and made durable; the
manifest `.json` comes last and under its name only when it is whole. Its key tells what the shard
was made from and how, so that a later run knows whether it can be used.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.corpus.faults import Fault
from megatron_mer.data.index_format import MAX_SEQUENCE_TOKENS

TOKENS, LENGTHS, FAULTS, MANIFEST = ".tokens", ".lengths", ".faults", ".json"
BUFFER, LENGTHS_BUFFER = 1 << 20, 1 << 16


@dataclass
class Counts:
    """What was counted."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def add(self, other: Counts) -> None:
        """Add another's numbers."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens


@dataclass
class Manifest:
    """What a finished shard holds."""

    key: str
    """What it was made from and how."""
    end: int
    """Where it ends in its file, see `reading.Mark`."""
    lines: int
    """Lines (rows) of the unit up to there."""
    last: bool
    """Whether it is the last of its unit."""
    counts: Counts = field(default_factory=Counts)
    """Documents that were written, their UTF-8 bytes and their tokens."""
    languages: dict[str, Counts] = field(default_factory=dict)
    """The same by language, if that was asked for."""
    faults: dict[str, int] = field(default_factory=dict)
    """Documents that were left out, by kind."""
    max_token_id: int = -1
    """Largest id."""
    encoder: str = ""
    """Library that gave the ids."""
    sha256: str = ""
    """Of the whole file's decompressed content, at the last shard of a unit that is a file."""
    tokens_crc32: int = 0
    """Of the tokens: a disk that lost what it took is noticed, whatever the files' sizes."""
    lengths_crc32: int = 0
    """Of the lengths."""

    def write(self, path: Path) -> None:
        """Write the manifest; it has its name only when it is whole."""
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @classmethod
    def read(cls, stem: Path, key: str, itemsize: int) -> Manifest | None:
        """Read a shard's manifest.

        Args:
            stem: path of its files without their endings.
            key: that the shard has to have.
            itemsize: bytes of a token.

        Returns:
            None if there is no such finished shard.
        """
        try:
            content = json.loads(path_of(stem, MANIFEST).read_text(encoding="utf-8"))
            content["counts"] = Counts(**content["counts"])
            languages = content["languages"].items()
            content["languages"] = {name: Counts(**counts) for name, counts in languages}
            found = cls(**content)
            sizes = [path_of(stem, ending).stat().st_size for ending in (TOKENS, LENGTHS)]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        whole = [found.counts.tokens * itemsize, found.counts.documents * 4]
        return found if found.key == key and sizes == whole else None


def stem_of(folder: Path, source: int, shard: int) -> Path:
    """Return the path of a shard's files without their endings."""
    return folder / f"{source:05d}-{shard:06d}"


def path_of(stem: Path, ending: str) -> Path:
    """Return the path of one of a shard's files."""
    return stem.with_name(stem.name + ending)


def _new_file(path: Path) -> BinaryIO:
    return open(path, "wb", buffering=BUFFER)


class ShardWriter:
    """Writes a shard.

    Args:
        stem: path of its files without their endings.
        dtype: of the tokens.
    """

    def __init__(self, stem: Path, dtype: np.dtype[Any]) -> None:
        self._stem = stem
        self.dtype = dtype
        for ending in (MANIFEST, FAULTS):  # of an earlier job
            path_of(stem, ending).unlink(missing_ok=True)
        self._tokens = _new_file(path_of(stem, TOKENS))
        self._lengths_file = _new_file(path_of(stem, LENGTHS))
        self._faults_file: BinaryIO | None = None
        self._lengths = array("i")
        self._open_tokens = 0
        self._crc32 = self._kept_crc32 = self._lengths_crc32 = 0
        self.counts = Counts()
        self.languages: dict[str, Counts] = {}
        self.faults: dict[str, int] = {}
        self.max_token_id = -1

    def add(self, tokens: NDArray[Any], lengths: NDArray[np.int64], size: int) -> None:
        """Add whole documents.

        Args:
            tokens: of all of them, one after the other; ids that were checked.
            lengths: tokens of each.
            size: UTF-8 bytes of all.
        """
        self._write(tokens)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._keep(Counts(len(lengths), size, len(tokens)))
        if len(self._lengths) >= LENGTHS_BUFFER:
            self._flush_lengths()

    def add_part(self, tokens: NDArray[Any]) -> bool:
        """Add the next tokens of a long document; tell whether it may be that long."""
        self._write(tokens)
        self._open_tokens += len(tokens)
        return self._open_tokens <= MAX_SEQUENCE_TOKENS

    def end_document(self, size: int) -> None:
        """End the long document.

        Args:
            size: its UTF-8 bytes.
        """
        self._lengths.append(self._open_tokens)
        self._keep(Counts(1, size, self._open_tokens))
        self._open_tokens = 0

    def drop_document(self) -> None:
        """Take back the tokens of the long document that was begun."""
        self._tokens.flush()
        self._tokens.truncate(self.counts.tokens * self.dtype.itemsize)
        self._tokens.seek(0, os.SEEK_END)
        self._crc32, self._open_tokens = self._kept_crc32, 0

    def add_language(self, language: str, counts: Counts) -> None:
        """Count documents of a language."""
        self.languages.setdefault(language, Counts()).add(counts)

    def add_fault(self, fault: Fault) -> None:
        """Note a document that is left out."""
        self.faults[fault.kind] = self.faults.get(fault.kind, 0) + 1
        if self._faults_file is None:
            self._faults_file = _new_file(path_of(self._stem, FAULTS))
        line = json.dumps(asdict(fault), ensure_ascii=False)
        self._faults_file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def finish(self, manifest: Manifest) -> Manifest:
        """Make everything durable and leave the manifest, with what was counted here."""
        self._flush_lengths()
        for file in (self._tokens, self._lengths_file, self._faults_file):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        manifest.counts, manifest.languages = self.counts, self.languages
        manifest.faults, manifest.max_token_id = self.faults, self.max_token_id
        manifest.tokens_crc32, manifest.lengths_crc32 = self._crc32, self._lengths_crc32
        manifest.write(path_of(self._stem, MANIFEST))
        return manifest

    def abort(self) -> None:
        """Remove what was written."""
        for file in (self._tokens, self._lengths_file, self._faults_file):
            try:
                if file is not None:
                    file.close()
            except OSError:  # a full disk refuses the rest of the buffer too
                pass
        for ending in (TOKENS, LENGTHS, FAULTS, ".partial"):
            path_of(self._stem, ending).unlink(missing_ok=True)

    def _write(self, tokens: NDArray[Any]) -> None:
        if len(tokens):
            self.max_token_id = max(self.max_token_id, int(tokens.max()))
            data: NDArray[Any] = np.ascontiguousarray(tokens, dtype=self.dtype)
            raw = data.view(np.uint8).data
            self._tokens.write(raw)
            self._crc32 = zlib.crc32(raw, self._crc32)

    def _keep(self, counts: Counts) -> None:
        """Count documents whose tokens were written."""
        self.counts.add(counts)
        self._kept_crc32 = self._crc32

    def _flush_lengths(self) -> None:
        raw = self._lengths.tobytes()
        self._lengths_file.write(raw)
        self._lengths_crc32 = zlib.crc32(raw, self._lengths_crc32)
        del self._lengths[:]
