"""Numbered files of a directory, which many processes share: who has them open, and for how long.

A file grows and may be sparse. It has one writer at a time, and is read and written at its places,
never mapped: it may lie on a network file system. What other hosts shall read, the writer has to
`sync` before.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from megatron_mer.data.open_files import ANY_SIZE, DataFile, OpenFile
from megatron_mer.errors import DataError

FILES_WRITTEN_AT_ONCE = 8
"""Files at most that a store keeps open for writing."""
NAME = re.compile(r"segment_(\d{9,})\.rec")


class SegmentFiles:
    """The segment files of a directory. One thread may write while others read.

    Args:
        directory: of the files; it must be there.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._readers: dict[int, DataFile] = {}
        self._writers: OrderedDict[int, BinaryIO] = OrderedDict()  # the last used one last
        self._dirty: set[int] = set()
        self._made_files = False

    def path(self, segment: int) -> Path:
        """Return the file of a segment."""
        return self.directory / f"segment_{segment:09d}.rec"

    def sync(self) -> None:
        """Bring to the disk all that was written since the last call, and the names of new files.

        Raises:
            OSError: the disk refuses; what was written may be lost, also if a second call succeeds.
        """
        for segment in sorted(self._dirty):
            # A file that was closed meanwhile is opened again: the system keeps what is to be
            # written, and an error that nobody has seen, with the file and not its descriptor.
            with contextlib.suppress(FileNotFoundError):  # removed since
                os.fsync(self._writer(segment, create=False).fileno())
            self._dirty.discard(segment)
        if self._made_files:
            _sync_directory(self.directory)
            self._made_files = False

    def segments(self) -> list[int]:
        """Return the numbers of the segment files that are there, in ascending order.

        Raises:
            DataError: the directory cannot be read.
        """
        try:
            names = set(os.listdir(self.directory))
        except OSError as error:
            raise DataError(f"{self.directory}: cannot be read: {error.strerror}") from error
        numbers = (int(match[1]) for name in names if (match := NAME.fullmatch(name)))
        return sorted(number for number in numbers if self.path(number).name in names)

    def remove(self, segments: Iterable[int]) -> None:
        """Remove segment files; one that is not there is no error.

        Who has them open keeps their space on the disk: others until they `release` them, and the
        thread that writes until `close_written`.

        Raises:
            OSError: the system refuses.
        """
        for segment in segments:
            self._close_reader(segment)
            self.path(segment).unlink(missing_ok=True)

    def release(self, segments: Iterable[int]) -> None:
        """Close what this process reads of segment files; they are opened again when needed."""
        for segment in segments:
            self._close_reader(segment)

    def close_written(self, below: int) -> None:
        """Close what this process writes of the segments below a number.

        For the thread that writes, and no other: a descriptor that is closed while it is being
        written to may be another file's by then.
        """
        for segment in [one for one in self._writers if one < below]:
            self._writers.pop(segment).close()

    def bytes_on_disk(self) -> int:
        """Return the bytes that the segment files take on the disk; holes take none."""
        total = 0
        for segment in self.segments():
            with contextlib.suppress(FileNotFoundError):  # removed since
                total += self.path(segment).stat().st_blocks * 512
        return total

    def close(self) -> None:
        """Close all files; the next call opens them again. Nothing is synced, and none writes."""
        self.release(list(self._readers))
        for segment in list(self._writers):
            self._writers.pop(segment).close()

    def __del__(self) -> None:
        """Close the files of a store that is no longer used."""
        if hasattr(self, "_made_files"):  # else a wrong number was refused
            self.close()

    def _reader(self, segment: int) -> OpenFile:
        """Return a segment's file, open for reading; it stays open as long as it is used often.

        Raises:
            DataError: it cannot be opened.
        """
        file = self._readers.get(segment)
        if file is None:
            file = self._readers.setdefault(segment, DataFile(self.path(segment), ANY_SIZE))
        return file.open()

    def _close_reader(self, segment: int) -> None:
        file = self._readers.pop(segment, None)
        if file is not None:
            file.close()

    def _writer(self, segment: int, create: bool) -> BinaryIO:
        """Return a segment's file, open for writing; the least recently used one is closed."""
        file = self._writers.pop(segment, None)
        if file is not None and os.fstat(file.fileno()).st_nlink == 0:  # removed since
            file.close()
            file = None
        if file is None:
            file = self._open_writer(self.path(segment), create)
        self._writers[segment] = file
        if len(self._writers) > FILES_WRITTEN_AT_ONCE:
            self._writers.popitem(last=False)[1].close()
        return file

    def _open_writer(self, path: Path, create: bool) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise
            descriptor = os.open(path, flags | os.O_CREAT, 0o666)
            self._made_files = True
        return os.fdopen(descriptor, "wb", buffering=0)

    def _size(self, segment: int) -> int:
        try:
            return self.path(segment).stat().st_size
        except FileNotFoundError:
            return 0


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
