r"""Records: samples at the positions of a log, in segment files that many processes share.

Record p lies in segment p // R at byte (p % R) B of `segment_000000123.rec`, where R records of B
bytes, a multiple of 64, make up a segment. A file may be sparse, and is read and written at its
places, never mapped: it may lie on a network file system. Everything is little endian:

| offset             | field                                                                  |
|--------------------|------------------------------------------------------------------------|
| 0                  | magic `RMER`, or `ERAS` before zeros                                   |
| 4                  | u16 version = 1                                                        |
| 6                  | u8 bytes of a token: 2, or 4 where the vocabulary has more than 2^16 ids |
| 7                  | u8 whether there are end bits                                          |
| 8                  | u32 S                                                                  |
| 12                 | u32 number of end bits that are set                                    |
| 16                 | u64 key                                                                |
| 24                 | int64[3] identity: live index, dataset key, sample                     |
| 48                 | u64 checksum of the bytes before                                       |
| 56                 | u64 checksum of the bytes before and behind                            |
| 64                 | S + 1 tokens, then S bits, the lowest of a byte first, then zeros      |

The checksum is described in `csrc/records.hpp`. A file has one writer at a time. What other hosts
shall read, the writer has to `sync` before.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mer import _index
from megatron_mer.data.open_files import OPEN_FILES, OpenFile, read_failure
from megatron_mer.data.packing import FILES_AT_ONCE
from megatron_mer.data.record_faults import Place, ended, missing, outside, wrong_field
from megatron_mer.data.segment_files import FILES_WRITTEN_AT_ONCE, SegmentFiles
from megatron_mer.errors import DataError

ROWS_AT_ONCE = 256
"""Records at most that `RecordStore.copy` and `check` hold in memory."""
GONE = (errno.ENOENT, errno.ESTALE)
"""What the system says of a file that was removed; the second one on a network file system."""


@dataclass(frozen=True)
class RecordFormat:
    """What all records of a store have in common."""

    seq_length: int
    """S, 1 to 2^31; a record holds S + 1 tokens."""
    vocab_size: int
    """Tokens are in [0, vocab_size), 1 to 2^32; up to 2^16 they take 2 bytes each, else 4."""
    with_ends: bool
    """Whether a record also has S bits: the inputs that end a document."""
    key: int
    """64 bits, unsigned, that reader and writer must agree on: a hash of run and tokenizer."""

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, a multiple of 64."""
        return self.records().record_bytes

    def records(self) -> _index.Records:
        """Return the C++ core that reads and writes such records.

        Raises:
            ValueError: seq_length or vocab_size is out of range.
        """
        return _index.Records(
            seq_length=self.seq_length,
            vocab_size=self.vocab_size,
            with_ends=self.with_ends,
            key=self.key,
        )


class Piece(NamedTuple):
    """Some rows of a call, in ascending order of position: those of a few segments."""

    segments: list[int]
    """Their numbers, each once."""
    rows: NDArray[np.int64]
    """How many rows each of them has."""
    positions: NDArray[np.int64]
    """Of the rows' records in the log."""
    bytes: NDArray[np.int64]
    """Where the rows' records start in their files."""
    places: NDArray[np.int64]
    """Where the rows stand in the call's arguments."""

    def descriptors(self, segments: Iterable[int]) -> NDArray[np.int32]:
        """Return the rows' descriptors, given those of the segments."""
        return np.repeat(np.fromiter(segments, dtype=np.int32), self.rows)


Work = Callable[[Piece, NDArray[np.int32]], None]
"""Reads or writes a piece's rows in the files of the descriptors, shape (rows,)."""
FAULTS = (_index.ReadEnded, _index.ReadFailed, _index.RecordFault, _index.TokenOutside)


class RecordStore(SegmentFiles):
    """Fixed-size records at positions 0, 1, 2, ... of a log.

    Positions may be written in any order, and again. One thread may write while others read.
    Methods that write keep the system's OSError, so that the caller can say what the disk is for.

    Args:
        directory: of the segment files; it must be there.
        format: of all records.
        segment_records: records of a segment, at least 1.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, directory: str | Path, format: RecordFormat, segment_records: int) -> None:
        if segment_records < 1:
            raise ValueError(f"{segment_records} records a segment; it must be at least 1")
        super().__init__(directory)
        self.format = format
        self.segment_records = segment_records
        self._records = format.records()

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, a multiple of 64."""
        return self._records.record_bytes

    def write(
        self,
        positions: NDArray[np.int64],
        identity: NDArray[np.int64],
        tokens: NDArray[np.int64],
        ends: NDArray[np.bool_] | None = None,
    ) -> None:
        """Write records; what stood at their positions is lost.

        Args:
            positions: shape (n,), each 0 or more and none twice.
            identity: shape (n, 3): live index, dataset key and sample, any 64 bits each.
            tokens: shape (n, S + 1).
            ends: shape (n, S), the inputs that end a document; None where the format has none.

        Raises:
            DataError: a token is outside of the vocabulary.
            OSError: the disk refuses, with the file's name. Some records may be written by then,
                and one of them in part; they can be written again.
            ValueError: wrong positions or shapes.
        """
        _check_positions(positions, unique=True)
        packed, num_ends = self._packed(len(positions), ends)

        def write(piece: Piece, descriptors: NDArray[np.int32]) -> None:
            self._records.write(
                descriptors, piece.bytes, piece.places, identity, tokens, packed, num_ends
            )

        self._write_pieces(positions, write, identity)

    def read(
        self, positions: NDArray[np.int64], identity: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Read records and verify them, in ascending order of position.

        Args:
            positions: shape (n,), each 0 or more.
            identity: shape (n, 3), what each record must be.

        Returns:
            Tokens, shape (n, S + 1), and the inputs that end a document, shape (n, S), None where
            the format has none; rows in the order of the arguments.

        Raises:
            RecordMissing: a segment file is not there, or ends before the record does.
            DataError: a record was erased, never written, is damaged, of another format, of another
                identity, or cannot be read.
            ValueError: wrong positions or shapes.
        """
        _check_positions(positions)
        tokens = np.empty((len(positions), self.format.seq_length + 1), dtype=np.int64)
        ends = np.empty((len(positions), self._records.end_bytes), dtype=np.uint8)

        def read(piece: Piece, descriptors: NDArray[np.int32]) -> None:
            self._records.read(descriptors, piece.bytes, piece.places, identity, tokens, ends)

        self._read_pieces(positions, read, identity)
        if not self.format.with_ends:
            return tokens, None
        bits = np.unpackbits(ends, axis=1, count=self.format.seq_length, bitorder="little")
        return tokens, bits.view(np.bool_)

    def count_ends(
        self, positions: NDArray[np.int64], identity: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return how many inputs of each record end a document, from the headers alone.

        The arguments and the errors are those of `read`; the tokens are not verified.
        """
        _check_positions(positions)
        counts = np.empty(len(positions), dtype=np.int64)

        def count(piece: Piece, descriptors: NDArray[np.int32]) -> None:
            self._records.count_ends(descriptors, piece.bytes, piece.places, identity, counts)

        self._read_pieces(positions, count, identity)
        return counts

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy records to new positions, verified but for their identity, which stays.

        Args:
            sources: shape (n,), positions to read.
            targets: shape (n,), positions to write, none twice and none a source.

        Raises:
            DataError, OSError, ValueError: as for `read` and `write`.
        """
        _check_positions(sources)
        _check_positions(targets, unique=True)
        if len(sources) != len(targets) or len(np.intersect1d(sources, targets)):
            raise ValueError("each source needs a target, which is no source")
        for first in range(0, len(sources), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            self._copy(sources[some], targets[some])

    def erase(self, positions: NDArray[np.int64]) -> None:
        """Overwrite records with zeros, on the disk when this returns; they say so when read.

        What is not there is left out. Where a file system copies on write, or keeps snapshots, the
        old bytes may live on there.

        Raises:
            OSError: the disk refuses.
            ValueError: wrong positions.
        """
        _check_positions(positions, unique=True)
        segments = positions // self.segment_records
        sizes = {number: self._size(number) for number in np.unique(segments).tolist()}
        ends = np.array([sizes[number] for number in segments.tolist()], dtype=np.int64)
        there = positions % self.segment_records * self.record_bytes < ends
        erased = self._records.erased()

        def erase(piece: Piece, descriptors: NDArray[np.int32]) -> None:
            row = np.zeros_like(piece.places)
            self._records.store(descriptors, piece.bytes, row, erased)

        self._write_pieces(positions[there], erase)
        self.sync()

    def check(
        self, positions: NDArray[np.int64], identity: NDArray[np.int64]
    ) -> list[tuple[int, str]]:
        """Read records as `read` does and go on after each fault.

        Returns:
            Position and message of each record that cannot be had.
        """
        problems = []
        for first in range(0, len(positions), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            if self._problem(positions[some], identity[some]) is None:
                continue
            for row in range(first, min(first + ROWS_AT_ONCE, len(positions))):
                one = slice(row, row + 1)
                if (problem := self._problem(positions[one], identity[one])) is not None:
                    problems.append((int(positions[row]), problem))
        return problems

    def _problem(self, positions: NDArray[np.int64], identity: NDArray[np.int64]) -> str | None:
        try:
            self.read(positions, identity)
        except DataError as error:
            return str(error)
        return None

    def _copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        content = np.empty((len(sources), self.record_bytes), dtype=np.uint8)

        def fetch(piece: Piece, descriptors: NDArray[np.int32]) -> None:
            self._records.fetch(descriptors, piece.bytes, piece.places, content)

        def store(piece: Piece, descriptors: NDArray[np.int32]) -> None:
            self._records.store(descriptors, piece.bytes, piece.places, content)

        self._read_pieces(sources, fetch)
        self._write_pieces(targets, store)

    def _packed(
        self, rows: int, ends: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return end bits in bytes, shape (n, bytes), and how many each row has."""
        if (ends is not None) != self.format.with_ends:
            raise ValueError(f"ends {ends}, but the format says with_ends {self.format.with_ends}")
        if ends is None:
            return np.empty((rows, 0), dtype=np.uint8), np.zeros(rows, dtype=np.int64)
        if ends.dtype != np.bool_ or ends.shape != (rows, self.format.seq_length):
            raise ValueError(
                f"ends of {ends.dtype} {ends.shape}; expected bool {(rows, self.format.seq_length)}"
            )
        return np.packbits(ends, axis=1, bitorder="little"), np.count_nonzero(ends, axis=1)

    def _pieces(self, positions: NDArray[np.int64], files_at_once: int) -> Iterator[Piece]:
        """Cut the rows of a call into pieces of few files."""
        places = np.argsort(positions, kind="stable")
        positions = positions[places]
        segments = positions // self.segment_records
        bytes_ = positions % self.segment_records * self.record_bytes
        first_rows = np.flatnonzero(np.diff(segments, prepend=-1))
        bounds = np.append(first_rows, len(positions))
        for first in range(0, len(first_rows), files_at_once):
            cuts = bounds[first : first + files_at_once + 1]
            rows = slice(cuts[0], cuts[-1])
            numbers = segments[cuts[:-1]].tolist()
            yield Piece(numbers, np.diff(cuts), positions[rows], bytes_[rows], places[rows])

    def _read_pieces(
        self, positions: NDArray[np.int64], read: Work, identity: NDArray[np.int64] | None = None
    ) -> None:
        for piece in self._pieces(positions, min(FILES_AT_ONCE, OPEN_FILES.limit)):
            try:
                self._read_piece(piece, read)
            except FAULTS:
                # A file that was open may have been replaced; and a network file system shows what
                # another host wrote only to who opens a file after that.
                for segment in piece.segments:
                    self._close_reader(segment)
                try:
                    self._read_piece(piece, read)
                except FAULTS as error:
                    raise self._explained(error, piece, identity) from None

    def _read_piece(self, piece: Piece, read: Work) -> None:
        opened = [
            self._open_reader(segment, piece, row)
            for segment, row in zip(piece.segments, np.cumsum(piece.rows) - piece.rows, strict=True)
        ]
        read(piece, piece.descriptors(file.descriptor for file in opened))

    def _open_reader(self, segment: int, piece: Piece, row: int) -> OpenFile:
        """Return the open file of a segment, of which a piece's row is the first that needs it."""
        try:
            return self._reader(segment)
        except DataError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in GONE:
                raise missing(self._place(piece, row)) from error
            raise

    def _write_pieces(
        self, positions: NDArray[np.int64], write: Work, identity: NDArray[np.int64] | None = None
    ) -> None:
        for piece in self._pieces(positions, FILES_WRITTEN_AT_ONCE):
            files = [self._writer(segment, create=True) for segment in piece.segments]
            self._dirty.update(piece.segments)
            try:
                write(piece, piece.descriptors(file.fileno() for file in files))
            except _index.WriteFailed as error:
                row, _, number = error.args
                path = str(self._place(piece, row).path)
                raise OSError(number, os.strerror(number), path) from None
            except _index.TokenOutside as error:
                raise self._explained(error, piece, identity) from None

    def _place(self, piece: Piece, row: int) -> Place:
        position = int(piece.positions[row])
        path = self.path(position // self.segment_records)
        return Place(path, int(piece.bytes[row]), position)

    def _explained(
        self, error: Exception, piece: Piece, identity: NDArray[np.int64] | None
    ) -> DataError:
        """Return the DataError for a fault of the C++ core."""
        row, byte, *values = error.args
        place = self._place(piece, row)
        wanted = [] if identity is None else identity[piece.places[row]].tolist()
        if isinstance(error, _index.TokenOutside):
            return outside(place, wanted, byte, values[0], self.format.vocab_size)
        if isinstance(error, _index.RecordFault):
            found, expected, *held = values
            return wrong_field(place, byte, found % 2**64, expected % 2**64, held, wanted)
        if isinstance(error, _index.ReadEnded):
            return ended(place, byte, values[0])
        if values[0] in GONE:
            return missing(place)
        return read_failure(place.path, byte, OSError(values[0], os.strerror(values[0])))


def _check_positions(positions: NDArray[np.int64], unique: bool = False) -> None:
    if positions.ndim != 1 or (len(positions) and positions.min() < 0):
        raise ValueError("positions must have the shape (n,) and be 0 or more")
    if unique and len(np.unique(positions)) < len(positions):
        raise ValueError("a position is written twice")
