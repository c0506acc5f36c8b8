"""Reading files that somebody else is writing: what is new in them, in bounded memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20
_MARK = 64  # bytes before the place of reading that must still be what they were
_WINDOW = 16 * 1024  # bytes read at first to find one line of a sample
_LONGEST = MIB  # bytes that a line of a sample may take


@dataclass(frozen=True)
class News:
    """What one look at a file brought."""

    lines: list[bytes] = field(default_factory=list)
    """Whole lines without their newlines, in the order of the file."""
    restarted: bool = False
    """Whatever came before is void: the file was replaced, cut or removed. `lines` are of the
    file that is there now."""
    left_out: bool = False
    """Lines before these were passed over, since there were more than are kept."""
    more: bool = False
    """There is more to read at once."""


class LineTail:
    """Follows a file of lines that grows, and perhaps is replaced, cut or removed meanwhile.

    A last line without a newline is still being written, or was torn by a kill: it is given when
    its newline is there. Each look opens the file anew, since only that makes a network file system
    ask its server for what is new.

    Args:
        path: the file; need not be there yet.
        keep: where there are more than so many bytes to read, all but the last of them are passed
            over; None: everything is read.
        most: bytes that one look reads and holds in memory, >= 1. A longer line is passed over.
    """

    def __init__(self, path: str | Path, keep: int | None = None, most: int = 4 * MIB) -> None:
        self.path = Path(path)
        self._keep = keep if keep is None else min(keep, most)
        self._most = most
        self._forget()

    def _forget(self) -> None:
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._mark = b""
        self._inside = False  # of a line whose beginning was passed over

    def read(self) -> News:
        """What is new since the last look; nothing while the file cannot be read.

        A file that was removed is one restart without lines. After other errors (a network file
        system that does not answer) the next look goes on where this one would have.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                return self._news(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            known = self._file is not None
            self._forget()
            return News(restarted=known)
        except OSError:
            return News()

    def _news(self, file: int) -> News:
        state = os.fstat(file)
        identity = (state.st_dev, state.st_ino)
        restarted = self._file is not None and not (
            identity == self._file and state.st_size >= self._offset and self._mark_stands(file)
        )
        if restarted:
            self._forget()
        self._file = identity
        left_out = self._keep is not None and state.st_size - self._offset > self._keep
        if self._keep is not None and left_out:
            # From the byte before, so that a line that begins right there is whole.
            self._offset, self._inside = state.st_size - self._keep - 1, True
        wanted = min(state.st_size - self._offset, self._most + 1)
        chunk = os.pread(file, wanted, self._offset)
        end = chunk.rfind(b"\n") + 1
        lines = chunk[:end].split(b"\n")[:-1]
        if self._inside and lines:
            del lines[0]
        if end:
            self._inside = False
        elif len(chunk) > self._most:
            end, self._inside, left_out = len(chunk), True, True
        self._mark = (self._mark + chunk[:end])[-_MARK:] if not left_out else chunk[:end][-_MARK:]
        self._offset += end
        more = end > 0 and len(chunk) > self._most and self._offset < state.st_size
        return News(lines, restarted, left_out, more)

    def _mark_stands(self, file: int) -> bool:
        """Whether what was read last is still there: a file cut and grown again has other bytes."""
        return os.pread(file, len(self._mark), self._offset - len(self._mark)) == self._mark


class WholeFile:
    """A small file that is read anew whenever it changed.

    Args:
        path: the file; need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._state: tuple[int, int, int] | None = None

    def changed(self) -> bytes | None:
        """Its content if that is another than at the last call; empty once it is gone; else None.

        Nothing counts as read when reading fails, so that the next call tries again.
        """
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                state = (found.st_ino, found.st_size, found.st_mtime_ns)
                if state == self._state:
                    return None
                content = file.read()
        except (FileNotFoundError, NotADirectoryError):
            known, self._state = self._state is not None, None
            return b"" if known else None
        except OSError:
            return None
        self._state = state
        return content


def sample_lines(path: str | Path, count: int, end: int | None = None) -> list[bytes]:
    """Whole lines from about evenly spaced places of a file, in its order, none twice.

    Args:
        path: the file.
        count: how many places; that many reads of a few KiB, however large the file.
        end: look at its first so many bytes only.

    Returns:
        At most `count` lines without their newlines; none of a file that cannot be read.
    """
    lines: list[bytes] = []
    last = -1
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            size = size if end is None else min(size, end)
            for at in range(count):
                found = _line_from(file.fileno(), size * at // count, size)
                if found is not None and found[0] > last:
                    last = found[0]
                    lines.append(found[1])
    except OSError:
        pass
    return lines


def _line_from(file: int, place: int, size: int) -> tuple[int, bytes] | None:
    """The first whole line that begins at a place or after it, and where it begins."""
    start, window = max(place - 1, 0), _WINDOW
    while True:
        chunk = os.pread(file, min(window, size - start), start)
        first = 0 if place == 0 else chunk.find(b"\n") + 1
        if place == 0 or first:
            end = chunk.find(b"\n", first)
            if end >= 0:
                return start + first, chunk[first:end]
        if window >= _LONGEST or start + len(chunk) >= size:
            return None
        window *= 4
