"""Reading corpora as JSON lines, plain or compressed, in pieces of whole lines.

For programs that need whole JSON objects. Every error names the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mer.data.corpus.faults import FaultError
from megatron_mer.data.corpus.parsing import ReadSettings, joined, parse_line
from megatron_mer.data.corpus.streams import Lines, Torn, open_input, read_lines
from megatron_mer.errors import DataError

PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Some whole lines of a file."""

    path: str
    """The file, as it was given."""
    first_line: int
    """Number of its first line, from 1."""
    data: bytes
    """The lines, decompressed."""
    file_position: int
    """How far the (compressed) file has been read, in bytes: for progress."""


def read_pieces(path: str | Path, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Yield a file's lines in pieces of about `piece_bytes`, never cutting a line.

    The file is recognised as gzip or Zstandard by its content.

    Raises:
        DataError: the file cannot be opened or its compression is damaged.
    """
    line = 1
    with open_input(path) as opened:
        try:
            for lines in read_lines(opened.stream, piece_bytes):
                data = lines.data if isinstance(lines, Lines) else lines.file.read() + b"\n"
                yield Piece(str(path), lines.first_line, data, opened.position)
                line = lines.first_line + data.count(b"\n")
        except Torn as error:
            raise DataError(f"{path}, after line {line - 1}: cannot be read: {error}") from error


def documents(piece: Piece, text_key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the JSON object of each line; blank lines are no documents.

    Raises:
        DataError: a line is not a JSON object whose `text_key` is valid text.
    """
    settings = ReadSettings(text_keys=(text_key,))
    for number, line in enumerate(piece.data.split(b"\n"), piece.first_line):
        if not line.strip():
            continue
        try:
            content = parse_line(line)
            joined(content, settings)
        except FaultError as fault:
            raise DataError(f"{piece.path}, line {number}: {fault.reason}") from fault
        yield number, content
