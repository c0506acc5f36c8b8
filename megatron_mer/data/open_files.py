"""Open files of a process: a bounded number of them, whatever number of datasets is in use.

A `DataFile` stands for a file that can be opened at any time. The open files themselves are kept in
one cache of the process, the least recently used ones leave it first. Whoever reads holds its own
reference, so a file that leaves the cache meanwhile is closed only when the last reader is done.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import RLock

from megatron_mer.data.index_format import fault
from megatron_mer.errors import DataError

MIN_OPEN_FILES, MAX_OPEN_FILES = 16, 65_536
"""Between these lies how many files the process keeps open, whatever descriptors it may have."""
ANY_SIZE = -1
"""The size of a file that may have any, since it grows."""


class OpenFile:
    """A file open for reading; closed when its last reference goes.

    Args:
        path: of the file.
        size: bytes that it must have, or ANY_SIZE.

    Raises:
        DataError: it cannot be opened, or its size is another one.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self.descriptor).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from error
        if size not in (ANY_SIZE, found):
            raise fault(
                path,
                min(found, size),
                f"the file has {found} bytes",
                f"{size}, as when the dataset was opened: it was truncated or replaced since",
            )

    def read_into(self, buffer: memoryview, byte: int) -> None:
        """Fill a buffer of bytes from `byte` on.

        Raises:
            DataError: the file ends too early, or reading fails.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], byte + done)
            except OSError as error:
                raise read_failure(self.path, byte + done, error) from error
            if count == 0:
                raise read_end(self.path, byte + done, len(buffer) - done)
            done += count

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file; when the interpreter ends, this module's names may be gone before."""
        if self.descriptor >= 0:
            close(self.descriptor)


def read_end(path: Path, byte: int, missing: int) -> DataError:
    """Build the error for a file that ends at `byte`, `missing` bytes too early."""
    expected = f"{missing} more bytes: it was truncated after it was opened"
    return fault(path, byte, "the file ends", expected)


def read_failure(path: Path, byte: int, error: OSError) -> DataError:
    """Build the error for a read that the system refused."""
    return DataError(f"{path}, byte {byte}: {error}")


class OpenFiles:
    """The open files that were used last. Methods may be called from several threads.

    Args:
        limit: how many are kept; None: half of the descriptors that the process may have at the
            time, between `MIN_OPEN_FILES` and `MAX_OPEN_FILES`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        # Reentrant: the garbage collector may drop a dead dataset's file inside `get`.
        self._lock = RLock()
        self._files: OrderedDict[DataFile, OpenFile] = OrderedDict()

    def __len__(self) -> int:
        """Return how many files are kept open."""
        return len(self._files)

    @property
    def limit(self) -> int:
        """How many files are kept open at most."""
        if self._limit is not None:
            return self._limit
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft // 2
        return min(max(allowed, MIN_OPEN_FILES), MAX_OPEN_FILES)

    def get(self, file: DataFile) -> OpenFile:
        """Return the open file, the most recently used one from now on."""
        with self._lock:
            kept = self._files.pop(file, None)
            if kept is not None:
                self._files[file] = kept
                return kept
        # Opening may take long on a network file system: other threads go on meanwhile.
        opened = OpenFile(file.path, file.size)
        leaving = []  # closed after the lock is released
        with self._lock:
            leaving.append(self._files.pop(file, None))
            self._files[file] = opened
            while len(self._files) > self.limit:
                leaving.append(self._files.popitem(last=False)[1])
        return opened

    def drop(self, file: DataFile) -> None:
        """Keep a file no longer; nothing happens if it is not kept."""
        with self._lock:
            dropped = self._files.pop(file, None)
        del dropped


OPEN_FILES = OpenFiles()
"""The cache of the process."""


class DataFile:
    """A file of a dataset, opened when it is read and kept open while it is used often.

    Args:
        path: of the file.
        size: bytes that it must have whenever it is opened, or ANY_SIZE.
        cache: what keeps it open.
    """

    def __init__(self, path: Path, size: int, cache: OpenFiles = OPEN_FILES) -> None:
        self.path = path
        self.size = size
        self._cache = cache

    def open(self) -> OpenFile:
        """Return the open file. Keep the reference as long as its descriptor is in use.

        Raises:
            DataError: it cannot be opened, or its size is another one.
        """
        return self._cache.get(self)

    def close(self) -> None:
        """Keep the file open no longer than its readers need it; the next one opens it again."""
        self._cache.drop(self)
