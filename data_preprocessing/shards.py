"""Writing JSON lines as gzip shards of bounded size."""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True)
class Shard:
    """One finished file."""

    file: str
    """Its name."""
    documents: int
    """Lines."""
    text_bytes: int
    """UTF-8 bytes of the texts."""
    sha256: str
    """Of the lines, before compression."""


class ShardWriter:
    """Writes `NAME-00000.jsonl.gz`, `NAME-00001.jsonl.gz`, ...: the same lines give the same bytes.

    Args:
        directory: for the shards.
        name: `train` or `valid`.
        shard_bytes: begin a new shard when the text in one reaches this size.
    """

    def __init__(self, directory: Path, name: str, shard_bytes: int) -> None:
        self._directory = directory
        self._name = name
        self._shard_bytes = shard_bytes
        self._file: gzip.GzipFile | None = None
        self._raw: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._documents = self._text_bytes = 0
        self.shards: list[Shard] = []

    def write(self, line: bytes, text_bytes: int) -> None:
        """Append one document: its JSON line without the newline."""
        if self._file is None:
            self._raw = open(self._directory / self._file_name(), "wb")  # noqa: SIM115
            # No time and no name inside, so that equal content gives equal files.
            self._file = gzip.GzipFile("", "wb", 6, self._raw, mtime=0)
        self._file.write(line + b"\n")
        self._digest.update(line + b"\n")
        self._documents += 1
        self._text_bytes += text_bytes
        if self._text_bytes >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Finish the shard that is being written, if any."""
        if self._file is None or self._raw is None:
            return
        self._file.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()
        name, digest = self._file_name(), self._digest.hexdigest()
        self.shards.append(Shard(name, self._documents, self._text_bytes, digest))
        self._file = self._raw = None
        self._digest = hashlib.sha256()
        self._documents = self._text_bytes = 0

    def _file_name(self) -> str:
        return f"{self._name}-{len(self.shards):05d}.jsonl.gz"
