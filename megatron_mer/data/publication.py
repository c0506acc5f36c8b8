"""How the files of a dataset get their final names: all at once, and only when they are whole.

Everything goes to `PREFIX.bin.partial` and its siblings; only `publish` gives the final names, the
`.idx` last, so a dataset that can be opened is whole. A process that is killed leaves `.partial`
files, which the next one that writes the same prefix reuses; one that fails removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.index_format import IndexHeader
from megatron_mer.errors import DataError

BIN_BUFFER = 1 << 20
SUFFIXES = (".bin", ".json", ".idx")


def existing_files(prefix: str | Path) -> list[Path]:
    """Return the files of a dataset that are already there under its final names."""
    paths = (Path(f"{prefix}{suffix}") for suffix in SUFFIXES)
    return [path for path in paths if path.exists()]


def index_pieces(
    header: IndexHeader,
    lengths: Callable[[], Iterable[NDArray[np.int32]]],
    documents: Iterable[NDArray[np.int64]],
) -> Iterator[bytes]:
    """Yield the content of an `.idx` file in pieces of any size.

    Args:
        header: of the file.
        lengths: called twice, gives the sequence lengths in pieces, in tokens.
        documents: the document indices in pieces, from 0 to the number of sequences.
    """
    yield header.pack()
    for piece in lengths():
        yield piece.astype("<i4").tobytes()
    offset = 0
    for piece in lengths():
        sizes = piece.astype("<i8") * header.dtype.itemsize
        yield (np.cumsum(sizes) - sizes + offset).astype("<i8").tobytes()
        offset += int(sizes.sum())
    for entries in documents:
        yield entries.astype("<i8").tobytes()


class Publication:
    """The files of one dataset while they are written; holds a lock on its prefix.

    Use it as a context manager: leaving it without `publish` removes what was written.

    Args:
        prefix: path without `.bin` and `.idx`; its directory is made when missing.
        overwrite: whether `publish` may replace an existing dataset.

    Raises:
        DataError: the dataset exists, another process writes it, or the disk refuses.
    """

    published = False
    """Whether the dataset is there, whole, under its final names."""

    def __init__(self, prefix: str | Path, overwrite: bool = False) -> None:
        self.prefix = str(prefix)
        self._overwrite = overwrite
        self._written = {".bin"}
        self._bin: BinaryIO | None = None
        self.refuse_existing()
        self._bin = self._open_exclusively()

    @property
    def bin(self) -> BinaryIO:
        """The `.bin` file that is being written, at its end.

        Raises:
            DataError: it was published or removed already.
        """
        if self._bin is None:
            raise DataError(f"{self.prefix}: this writer is finished; make a new one")
        return self._bin

    def refuse_existing(self) -> None:
        """Raise a DataError where the dataset exists and may not be replaced."""
        existing = existing_files(self.prefix)
        if existing and not self._overwrite:
            names = ", ".join(path.name for path in existing)
            raise DataError(
                f"{self.prefix}: {names} already there; choose another prefix, remove it, or "
                "--overwrite it"
            )

    def remove_existing(self) -> None:
        """Remove a dataset that may be replaced and has no successor.

        Raises:
            DataError: it may not be replaced, or the disk refuses.
        """
        self.refuse_existing()
        with self.disk_errors():
            for path in reversed(existing_files(self.prefix)):
                path.unlink()

    def write_file(self, suffix: str, pieces: Iterable[bytes]) -> str:
        """Write one of the other files, durably.

        Args:
            suffix: `.idx` or `.json`.
            pieces: its content.

        Returns:
            SHA-256 of the content, in hexadecimal.
        """
        digest = hashlib.sha256()
        self._written.add(suffix)
        with open(self._partial(suffix), "wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def publish(self) -> None:
        """Make everything durable and give the final names.

        Raises:
            DataError: the dataset appeared meanwhile.
        """
        file = self.bin
        file.flush()
        os.fsync(file.fileno())
        self.refuse_existing()
        with _signals_wait():
            self._rename()
            file.close()
            self._bin = None
            self.published = True

    def abort(self) -> None:
        """Remove what was written; the final names stay untouched."""
        if self._bin is None:
            return
        file, self._bin = self._bin, None
        # The .bin last: it carries the lock, so nobody writes the others meanwhile.
        for suffix in reversed(SUFFIXES):
            self._partial(suffix).unlink(missing_ok=True)
        # On a full disk, closing tries to write the rest of the buffer and fails again.
        with contextlib.suppress(OSError):
            file.close()

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn what the disk refuses inside the block into a DataError and remove what was written.

        Raises:
            DataError: with the system's reason.
        """
        try:
            yield
        except OSError as error:
            self.abort()
            raise DataError(
                f"{self.prefix}: cannot be written: {error.strerror or error}; nothing was left "
                "behind"
            ) from error

    def __enter__(self) -> Publication:
        """Return the publication."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was written unless `publish` succeeded."""
        self.abort()

    def _partial(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.partial")

    def _open_exclusively(self) -> BinaryIO:
        path = self._partial(".bin")
        with self.disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Neither "w", which would empty a file before its lock is held, nor "a", which cannot
            # leave holes.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            file = os.fdopen(descriptor, "wb", buffering=BIN_BUFFER)
        try:
            self._lock(path, file)
            with self.disk_errors():
                file.truncate(0)
                for suffix in (".json", ".idx"):  # of a process that was killed
                    self._partial(suffix).unlink(missing_ok=True)
        except BaseException:
            file.close()
            raise
        return file

    def _lock(self, path: Path, file: BinaryIO) -> None:
        busy = DataError(f"{path}: another process is writing this dataset")
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError:
            pass  # A file system without locks: two writers at once are then the user's care.
        # Between opening and locking the file may have become another process's finished dataset.
        try:
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except FileNotFoundError:
            ours = False
        if not ours:
            raise busy

    def _rename(self) -> None:
        """Give the final names. The old index goes first and the new one comes last.

        Between the two there is no index, so no reader can pair files of different corpora.
        """
        for suffix in (".idx", ".json"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            if suffix in self._written:
                os.replace(self._partial(suffix), self.prefix + suffix)
        directory = os.open(Path(self.prefix).parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the end of the block, which takes milliseconds.

    A handler that raises would leave some files under the new names and some under none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread only.
        return
    waiting: list[int] = []
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) not in (None, signal.SIG_IGN)
    }
    for number in handlers:
        signal.signal(number, lambda received, frame: waiting.append(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for received in waiting:
            signal.raise_signal(received)
