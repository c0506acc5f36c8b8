"""Reading corpora as JSON lines, plain or gzip, in pieces of whole lines.

Every error names the file and the line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_mer.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
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

    The file is recognised as gzip by its content.

    Raises:
        DataError: the file cannot be opened or its compression is damaged.
    """
    line, position = 1, 0
    try:
        with open(path, "rb") as raw:
            # Peeked at and not read, so that a pipe works too.
            packed = raw.peek(2)[:2] == GZIP_MAGIC
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
            while data := stream.read(piece_bytes):
                data += stream.readline()
                position = raw.tell() if raw.seekable() else position + len(data)
                yield Piece(str(path), line, data, position)
                line += data.count(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}, after line {line - 1}: cannot be read: {reason}") from error


def documents(piece: Piece, text_key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the JSON object of each line; blank lines are no documents.

    Raises:
        DataError: a line is not a JSON object whose `text_key` is valid text.
    """
    for number, line in enumerate(piece.data.split(b"\n"), piece.first_line):
        if line.strip():
            yield number, _parse(line, text_key, f"{piece.path}, line {number}")


def _parse(line: bytes, text_key: str, place: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{place}: a JSON {type(content).__name__}; expected an object")
    if text_key not in content:
        keys = ", ".join(list(content)[:8]) or "none"
        raise DataError(
            f"{place}: key {text_key!r} is missing; its keys: {keys}. Name the right one with "
            "--text-key"
        )
    text = content[text_key]
    if not isinstance(text, str):
        raise DataError(f"{place}: {text_key!r} is {type(text).__name__}; expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: the text is not valid Unicode: {error}") from error
    return content
