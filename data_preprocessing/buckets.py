"""Sorting more documents than memory holds: by key into bucket files, then each bucket in memory.

A bucket takes a range of keys, so sorted buckets one after the other are the sorted whole, for any
number of buckets. Equal texts share a key and meet in one bucket.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from data_preprocessing.keys import KEY_BYTES, bucket_of

RECORD = struct.Struct(f"<{KEY_BYTES}sQ?I")
"""Order key, number of the document in the input, held out or not, bytes of its line."""


class Buckets:
    """Documents on disk, on their way into key order.

    Args:
        directory: for the bucket files; must exist.
        count: number of buckets, at least 1, within the limit of open files.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self._paths = [directory / f"bucket-{index:05d}" for index in range(count)]
        self._stack = ExitStack()
        self._files: list[BinaryIO] = []
        for path in self._paths:
            file = open(path, "wb")  # noqa: SIM115 - the stack closes it
            self._files.append(self._stack.enter_context(file))
        self._added = 0

    def __enter__(self) -> Buckets:
        """Return the buckets."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bucket files."""
        self._stack.close()

    def add(self, key: bytes, held_out: bool, line: bytes) -> None:
        """Add one document: its JSON line without the newline."""
        file = self._files[bucket_of(key, len(self._files))]
        file.write(RECORD.pack(key, self._added, held_out, len(line)))
        file.write(line)
        self._added += 1

    def in_order(self) -> Iterator[tuple[bytes, bool, bytes]]:
        """Yield (key, held out, line) by key, equal keys as they were added; removes the files."""
        self._stack.close()
        for path in self._paths:
            for key, _, held_out, line in sorted(_records(path)):
                yield key, held_out, line
            path.unlink()


def _records(path: Path) -> Iterator[tuple[bytes, int, bool, bytes]]:
    data = path.read_bytes()
    position = 0
    while position < len(data):
        key, number, held_out, length = RECORD.unpack_from(data, position)
        position += RECORD.size + length
        yield key, number, held_out, data[position - length : position]
