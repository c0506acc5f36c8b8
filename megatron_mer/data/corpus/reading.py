"""Reading a unit of work: part of a file or all of it, as batches of documents."""

from __future__ import annotations

import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from megatron_mer.data.corpus.cutting import LONG_TEXT
from megatron_mer.data.corpus.faults import DAMAGED, Fault, FaultError
from megatron_mer.data.corpus.inputs import InputFile
from megatron_mer.data.corpus.long_lines import (
    LongText,
    read_long_line,
    temporary_file,
)
from megatron_mer.data.corpus.parsing import (
    Batch,
    ReadSettings,
    parse_json_lines,
    parse_text_lines,
)
from megatron_mer.data.corpus.streams import (
    LongLine,
    Opened,
    Readable,
    Torn,
    is_packed,
    open_input,
    read_lines,
)

SKIP_BYTES = 1 << 20
FEW_UNITS, UNIT_BYTES = 4, 16 << 20
"""A file below a few shards is split too, for several workers, but not into less than that."""


@dataclass(frozen=True)
class Unit:
    """What one worker takes at a time."""

    source: int
    """Number of the input."""
    file: InputFile
    """The input."""
    first_shard: int = 0
    """Number of the first shard that it makes."""
    start: int = 0
    """Byte of a plain file at which it begins: the lines that begin from there on."""
    stop: int | None = None
    """Byte before which its lines begin, for a single shard; None: the whole file, in shards."""

    @property
    def size(self) -> int:
        """Bytes of the input, as far as they are known."""
        return (self.file.size if self.stop is None else self.stop) - self.start


@dataclass(frozen=True)
class Mark:
    """How far a file has been read: where a shard ends and the next begins."""

    offset: int = 0
    """Decompressed bytes from the file's start; in Parquet files row groups."""
    lines: int = 0
    """Lines (rows) from the unit's start."""


@dataclass
class Reading:
    """Documents that were read together."""

    batch: Batch
    """Short ones, and faults."""
    mark: Mark
    """Behind them."""
    position: int
    """Bytes of the file itself that were read, for progress."""
    long: LongText | None = None
    """A document that does not fit memory, instead of texts."""
    may_end: bool = True
    """Whether a shard may end behind them: a row group is not divided."""


def plan_units(
    inputs: list[InputFile], settings: ReadSettings, shard_bytes: int
) -> list[list[Unit]]:
    """Return the units of each input, in order.

    A plain file of lines is split into equal ranges of at most `shard_bytes`, by its size alone; a
    compressed one, a Parquet file, a text that is one document and a pipe are read by one worker
    from their start to their end.
    """
    return [_plan_file(number, file, settings, shard_bytes) for number, file in enumerate(inputs)]


def _plan_file(
    number: int, file: InputFile, settings: ReadSettings, shard_bytes: int
) -> list[Unit]:
    by_line = file.format == "jsonl" or (file.format == "text" and settings.text_unit == "line")
    count = max(-(-file.size // shard_bytes), min(FEW_UNITS, file.size // UNIT_BYTES))
    if not (by_line and file.is_local_file and count > 1) or is_packed(file.path):
        return [Unit(number, file)]
    ends = [file.size * shard // count for shard in range(count + 1)]
    return [
        Unit(number, file, shard, start, stop) for shard, (start, stop) in enumerate(pairwise(ends))
    ]


@dataclass
class UnitReader:
    """Reads a unit from a mark on.

    Args:
        unit: what.
        settings: how documents are found.
        piece_bytes: read at once.
        folder: for files of what does not fit memory.
        begin: where to go on; its lines are counted on.
        stopped: asked now and then while nothing is yielded; raises where the work is to end.
    """

    unit: Unit
    settings: ReadSettings
    piece_bytes: int
    folder: Path | None = None
    begin: Mark = field(default_factory=Mark)
    stopped: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256()
        self._mark = self.begin

    @property
    def sha256(self) -> str:
        """Of the decompressed content that was read, in hexadecimal."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Reading]:
        """Yield the documents in order. A file that cannot be read on ends with a fault."""
        if self.unit.file.format == "parquet":
            from megatron_mer.data.corpus.parquet import read_parquet

            yield from read_parquet(self.unit.file.path, self.settings, self.begin, self._digest)
            return
        with open_input(self.unit.file.path) as opened:
            try:
                if self.unit.file.format == "text" and self.settings.text_unit == "file":
                    yield self._whole_text(opened)
                else:
                    yield from self._lines(opened)
            except Torn as error:
                fault = Fault(self._mark.lines + 1, DAMAGED, f"cannot be read on: {error}")
                yield Reading(Batch(faults=[fault]), self._mark, opened.position)

    def _lines(self, opened: Opened) -> Iterator[Reading]:
        stream: Readable = _Hashed(opened.stream, self._digest)
        if self.unit.stop is not None:
            stream = LineRange(opened, self.unit.start, self.unit.stop)
        self._skip(stream, self.begin.offset)
        parse = parse_json_lines if self.unit.file.format == "jsonl" else parse_text_lines
        for piece in read_lines(stream, self.piece_bytes, self.folder):
            line = piece.first_line + self.begin.lines
            at_start = line == 1 and self.unit.start == 0
            if isinstance(piece, LongLine):
                if at_start:
                    _skip_mark(piece.file)
                batch, long = self._long_line(piece, line)
                size, lines = piece.size, 1
            else:
                data = piece.data.removeprefix(BOM_UTF8) if at_start else piece.data
                batch, long = parse(data, line, self.settings), None
                size, lines = len(piece.data), piece.count
            self._mark = Mark(self._mark.offset + size, self._mark.lines + lines)
            yield Reading(batch, self._mark, opened.position, long)

    def _skip(self, stream: Readable, size: int) -> None:
        """Read over what finished shards hold; it counts for the checksum."""
        while size > 0 and (data := stream.read(min(size, SKIP_BYTES))):
            size -= len(data)
            self.stopped()

    def _long_line(self, piece: LongLine, line: int) -> tuple[Batch, LongText | None]:
        try:
            if self.unit.file.format == "text":
                text = LongText([piece.file], "", piece.size)
            else:
                text = read_long_line(piece.file, self.settings, self.folder)
            return self._fitting(text, line)
        except FaultError as fault:
            return Batch(faults=[fault.at(line)]), None

    def _whole_text(self, opened: Opened) -> Reading:
        stream, size = _Hashed(opened.stream, self._digest), 0
        file = temporary_file(self.folder)
        while data := stream.read(self.piece_bytes):
            size += file.write(data)
            self.stopped()
        file.seek(0)
        _skip_mark(file)
        self._mark = Mark(size, 1)
        try:
            batch, long = self._fitting(LongText([file], "", size), 1)
        except FaultError as fault:
            batch, long = Batch(faults=[fault.at(1)]), None
        return Reading(batch, self._mark, opened.position, long)

    def _fitting(self, text: LongText, line: int) -> tuple[Batch, LongText | None]:
        """Take a text into memory if it fits. Its length decides, not the settings."""
        if text.size > 4 * LONG_TEXT:
            return Batch(), text
        batch = Batch()
        language = None if self.settings.language_key is None else text.language
        batch.add("".join(text.chunks()), line, language)
        text.close()
        return batch, None


def _skip_mark(file: BinaryIO) -> None:
    """Go behind the mark that some programs put at the start of UTF-8; it is no text."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)


@dataclass
class _Hashed:
    """A stream whose content goes into a checksum."""

    stream: Readable
    digest: hashlib._Hash

    def read(self, size: int, /) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        return data


class LineRange:
    """The lines of a plain file that begin within a range of bytes.

    Args:
        opened: the file, at its start.
        start: first byte at which a line may begin.
        stop: first byte at which it may not.
    """

    def __init__(self, opened: Opened, start: int, stop: int) -> None:
        self._stream = opened.stream
        self._at = start
        self._stop = stop
        self._in_line = False
        if start:
            # A line that begins before belongs to the range before.
            opened.raw.seek(start - 1)
            self._at = start - 1 + _to_line_end(opened)
        self._done = self._at >= stop

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, none at the end."""
        if self._done:
            return b""
        if self._at < self._stop:
            data = self._stream.read(min(size, self._stop - self._at))
            self._at += len(data)
            self._done = not data or (self._at == self._stop and data.endswith(b"\n"))
            return data
        data = self._stream.read(min(size, SKIP_BYTES))
        cut = data.find(b"\n") + 1
        self._done = not data or cut > 0
        return data[:cut] if cut else data


def _to_line_end(opened: Opened) -> int:
    """Go behind the next newline; return how far that was."""
    size = 0
    while data := opened.stream.read(SKIP_BYTES):
        cut = data.find(b"\n") + 1
        if cut:
            opened.raw.seek(cut - len(data), 1)
            return size + cut
        size += len(data)
    return size


def count_lines(path: str, stop: int) -> int:
    """Return how many lines of a plain file end before the line that a range from `stop` on begins.

    Args:
        path: of the file.
        stop: start of the range.
    """
    lines = 0
    with open(path, "rb") as file:
        rest = max(stop - 1, 0)
        while data := file.read(min(rest, SKIP_BYTES)):
            lines += data.count(b"\n")
            rest -= len(data)
        file.seek(max(stop - 1, 0))
        if stop and file.readline(SKIP_BYTES):
            lines += 1
    return lines
