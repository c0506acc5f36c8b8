"""Opening inputs wherever they are, undoing their compression, and cutting them into whole lines.

Memory holds one piece; a line longer than that goes to a file. A stream that ends in the middle of
its compressed content is an error, also where a library would call that the end (zstandard does).
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from megatron_mer.data.corpus.inputs import STDIN, is_remote, remote
from megatron_mer.errors import DataError

GZIP_MAGIC = re.compile(rb"\x1f\x8b")
ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"""Of a frame, or of one to be skipped, which pzstd puts first."""
MOST_CHUNK, MOST_OUTPUT = 1 << 16, 1 << 22
"""Compressed bytes that are given at once, and decompressed ones from which on fewer are."""
LONG_LINE = 4 << 20
"""Bytes beyond which a line goes to a file, whatever the memory: so a line alone decides how it is
read."""


class Readable(Protocol):
    """Something that gives bytes in their order."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""


class Torn(Exception):
    """A stream's compression is damaged, or it cannot be read on."""


@dataclass(frozen=True)
class Lines:
    """Some whole lines."""

    first_line: int
    """Number of the first, from 1."""
    data: bytes
    """They end with a newline, but for the last of a file."""
    count: int
    """How many they are."""


@dataclass(frozen=True)
class LongLine:
    """A line of more than LONG_LINE bytes, in a file of its own that is gone when it is closed."""

    first_line: int
    """Its number, from 1."""
    file: BinaryIO
    """At its start; without the line's end."""
    size: int
    """Bytes, with the line's end if it has one."""


class Unpacker:
    """Decompresses gzip members or Zstandard frames, one after the other, and knows a torn one.

    Whatever the sizes of the reads, the same bytes come before an error.

    Args:
        raw: compressed.
        new: makes the library's object that decompresses one frame.
        errors: what that object raises.
    """

    def __init__(self, raw: Readable, new: Callable[[], Any], errors: type[Exception]) -> None:
        self._raw = raw
        self._new = new
        self._errors = errors
        self._frame: Any = None
        self._rest = b""
        self._ready = bytearray()
        self._torn: Torn | None = None
        self._chunk = 1 << 12

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end.

        Raises:
            Torn: the stream is damaged or ends within a frame.
        """
        try:
            while self._torn is None and len(self._ready) < size and self._unpack():
                pass
        except Torn as error:
            self._torn = error
        if self._torn and not self._ready:
            raise self._torn
        data = bytes(memoryview(self._ready)[:size])
        del self._ready[:size]
        return data

    def _unpack(self) -> bool:
        packed = self._rest or self._raw.read(self._chunk)
        self._rest = b""
        if self._frame is None:
            packed = packed.lstrip(b"\0")  # gzip files may be padded
        elif not packed:
            raise Torn("the file ends in the middle of its compressed content")
        if not packed:
            return False
        self._frame = self._frame or self._new()
        try:
            data = self._frame.decompress(packed)
        except self._errors as error:
            raise Torn(f"its compressed content is damaged: {error}") from error
        self._ready += data
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        # Some text is a thousand times its compressed size.
        if len(data) > MOST_OUTPUT:
            self._chunk = max(self._chunk // 2, 512)
        elif self._chunk < MOST_CHUNK:
            self._chunk *= 2
        return True


def _gzip(raw: Readable) -> Unpacker:
    return Unpacker(raw, lambda: zlib.decompressobj(zlib.MAX_WBITS | 16), zlib.error)


def _zstd(raw: Readable) -> Unpacker:
    from zstandard import ZstdDecompressor, ZstdError

    return Unpacker(raw, ZstdDecompressor(max_window_size=1 << 31).decompressobj, ZstdError)


@dataclass
class Opened:
    """An input while it is read."""

    stream: Readable
    """Decompressed."""
    raw: Any
    """The file itself."""
    packed: bool
    """Whether it is compressed."""

    @property
    def position(self) -> int:
        """Bytes of the file itself that were read so far, as far as that is known."""
        try:
            return int(self.raw.tell())
        except (OSError, ValueError):
            return 0


class _PlainReader:
    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def read(self, size: int, /) -> bytes:
        try:
            return cast(bytes, self._raw.read(size))
        except Exception as error:
            # Each remote file system has errors of its own.
            raise Torn(getattr(error, "strerror", None) or str(error)) from error


@contextlib.contextmanager
def open_input(path: str | Path) -> Iterator[Opened]:
    """Open a file, a remote path or standard input (`-`); compression is known by the content.

    Raises:
        DataError: it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            raw = _open_raw(str(path), stack)
            head = raw.peek(4)[:4]
        except DataError:
            raise
        except Exception as error:
            # Each remote file system has errors of its own.
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise DataError(f"{path}: cannot be read: {reason}") from error
        if GZIP_MAGIC.match(head):
            yield Opened(_gzip(_PlainReader(raw)), raw, True)
        elif ZSTD_MAGIC.match(head):
            yield Opened(_zstd(_PlainReader(raw)), raw, True)
        else:
            yield Opened(_PlainReader(raw), raw, False)


def is_packed(path: str) -> bool:
    """Tell whether a file is compressed.

    Raises:
        DataError: it cannot be opened.
    """
    with open_input(path) as opened:
        return opened.packed


def read_lines(
    stream: Readable, piece_bytes: int, folder: Path | None = None
) -> Iterator[Lines | LongLine]:
    """Yield a stream's lines in pieces.

    Args:
        stream: decompressed.
        piece_bytes: read at once, at most LONG_LINE.
        folder: for the files of long lines; None: the system's for temporary files.

    Raises:
        Torn: the stream cannot be read on; what came before was yielded.
    """
    line, rest = 1, b""
    # Not more at once: only the line that goes on from the chunk before can be a long one.
    piece_bytes = min(piece_bytes, LONG_LINE)
    while chunk := stream.read(piece_bytes):
        end = chunk.find(b"\n")
        if len(rest) + (len(chunk) if end < 0 else end) > LONG_LINE:
            long, chunk = _spool(stream, rest, chunk, line, piece_bytes, folder)
            with long.file:
                yield long
            line, rest = line + 1, b""
        data = rest + chunk if rest else chunk
        cut = data.rfind(b"\n") + 1
        if cut:
            count = data.count(b"\n", 0, cut)
            yield Lines(line, data[:cut], count)
            line += count
        rest = data[cut:]
    if rest:
        yield Lines(line, rest, 1)


def _spool(
    stream: Readable, start: bytes, chunk: bytes, line: int, piece_bytes: int, folder: Path | None
) -> tuple[LongLine, bytes]:
    """Write a line to a file, up to its end; return what was read beyond it too."""
    file = tempfile.TemporaryFile(dir=folder, prefix="long-line-")  # noqa: SIM115 - the caller's
    size, rest = file.write(start), b""
    while chunk:
        part, newline, rest = chunk.partition(b"\n")
        size += file.write(part) + len(newline)
        if newline:
            break
        chunk = stream.read(piece_bytes)
    file.seek(-1, io.SEEK_END)
    if file.read() == b"\r":
        file.seek(-1, io.SEEK_END)
        file.truncate()
    file.seek(0)
    return LongLine(line, cast(BinaryIO, file), size), rest


def _open_raw(path: str, stack: contextlib.ExitStack) -> Any:
    if path == STDIN:
        return sys.stdin.buffer
    if not is_remote(path):
        return stack.enter_context(open(path, "rb"))
    system, place = remote(path)
    # The buffer gives `peek`, which remote files lack.
    return stack.enter_context(io.BufferedReader(system.open(place, "rb"), 1 << 20))
