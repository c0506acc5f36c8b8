"""A JSON line that is too long for memory: its texts are written to a file, piece by piece.

The line is one JSON object. Its top-level strings under the wanted keys are decoded on the way;
everything else is checked and skipped. A line is accepted or refused, and its text found, as by
`parsing.parse_json_lines`, which reads shorter lines.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_mer.data.corpus.faults import INVALID_UTF8, NOT_JSON, NOT_TEXT, FaultError
from megatron_mer.data.corpus.parsing import KEYS_TOLD, ReadSettings, language_of, missing

CHUNK = 1 << 18
MAX_WORD, MAX_DEPTH = 1 << 16, 1000
"""Bytes of a key, a number or a language, and brackets that may be open."""
SPACE = b" \t\r\n"
WORD_END = b",}]" + SPACE
STRING_END = re.compile(rb'["\\]')
WORD = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity")
"""What may stand for a value without quotes or brackets, in Python's JSON."""
CLOSING = {b"{": b"}", b"[": b"]"}
HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")


class LongText:
    """A text in files, to be read in pieces.

    Args:
        files: UTF-8, one after the other.
        separator: between them.
        size: bytes of all.
        language: of the document.
    """

    def __init__(
        self, files: list[BinaryIO], separator: str, size: int, language: str = ""
    ) -> None:
        self._files = files
        self._separator = separator
        self.size = size
        self.language = language

    def chunks(self) -> Iterator[str]:
        """Yield the text in pieces of at most about `CHUNK` characters, none empty.

        Raises:
            FaultError: it is not UTF-8.
        """
        for number, file in enumerate(self._files):
            if number and self._separator:
                yield self._separator
            yield from decode_pieces(file)

    def close(self) -> None:
        """Let the files go."""
        for file in self._files:
            file.close()


def decode_pieces(file: BinaryIO) -> Iterator[str]:
    """Yield a file's UTF-8 as text, in pieces.

    Raises:
        FaultError: it is not UTF-8.
    """
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        data = file.read(CHUNK)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # What the decoder still held of the piece before counts too.
            place = position - (len(error.object) - len(data)) + error.start
            raise FaultError(INVALID_UTF8, f"byte {place} is not UTF-8: {error.reason}") from error
        if text:
            yield text
        if not data:
            return
        position += len(data)


def read_long_line(file: BinaryIO, settings: ReadSettings, folder: Path | None) -> LongText:
    """Return the text of a JSON line in a file.

    Args:
        file: the line, at its start.
        settings: which keys; where one comes twice, its last value counts.
        folder: for the files of the texts; None: the system's.

    Raises:
        FaultError: as for a short line.
    """
    scanner, targets = _Scanner(file), {key: temporary_file(folder) for key in settings.text_keys}
    sizes: dict[str, int | FaultError] = {}
    language, first_keys = "", dict[str, None]()
    try:
        for key in scanner:
            if len(first_keys) < KEYS_TOLD:
                first_keys[key] = None
            if key in targets:
                sizes[key] = scanner.copy_string(key, targets[key])
            elif key == settings.language_key:
                language = language_of(scanner.value())
            else:
                scanner.skip_value()
        size = sum(_checked_size(key, sizes, list(first_keys)) for key in settings.text_keys)
    except BaseException:
        for target in targets.values():
            target.close()
        raise
    for target in targets.values():
        target.seek(0)
    return LongText(list(targets.values()), settings.separator, size, language)


def _checked_size(key: str, sizes: dict[str, int | FaultError], first_keys: list[str]) -> int:
    if key not in sizes:
        raise missing(key, first_keys)
    size = sizes[key]
    if isinstance(size, FaultError):
        raise size
    return size


def temporary_file(folder: Path | None) -> BinaryIO:
    """Return a new file that is gone when it is closed.

    Args:
        folder: where; None: the system's for temporary files.
    """
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))


class _Scanner:
    """Walks over a JSON object, a chunk at a time.

    Args:
        file: at the object's start.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = b""
        self._at = 0

    def __iter__(self) -> Iterator[str]:
        """Yield each key; the caller takes or skips its value before it asks for the next."""
        if self._token() != b"{":
            raise FaultError(NOT_JSON, "not JSON: expected an object")
        token = self._token()
        while token != b"}":
            yield self._key(token)
            token = self._token()
            if token == b",":
                token = self._token()
                if token == b"}":
                    raise FaultError(NOT_JSON, "not JSON: a comma before the end")
            elif token != b"}":
                raise FaultError(NOT_JSON, f"not JSON: {token!r} after a value")
        if self._token() != b"":
            raise FaultError(NOT_JSON, "not JSON: extra data after the object")

    def copy_string(self, key: str, target: BinaryIO) -> int | FaultError:
        """Write the value that comes next as UTF-8; return its bytes, or why it is no text."""
        token = self._token()
        if token != b'"':
            self._skip(token)
            return FaultError(NOT_TEXT, f"{key!r} is not a string; expected one")
        target.seek(0)
        target.truncate()
        size: int | FaultError = 0
        for part in self._string():
            if isinstance(size, int):
                try:
                    size += target.write(part.encode("utf-8"))
                except UnicodeEncodeError as error:
                    reason = f"the text is not valid Unicode: {error.reason}"
                    size = FaultError(INVALID_UTF8, reason)
        return size

    def skip_value(self) -> None:
        """Go behind the value that comes next."""
        self._skip(self._token())

    def value(self) -> Any:
        """Return the value that comes next, a small one."""
        start = self._place()
        self.skip_value()
        here, size = self._file.tell(), self._place() - start
        if size > MAX_WORD:
            raise FaultError(NOT_TEXT, f"a language of more than {MAX_WORD} bytes")
        self._file.seek(start)
        data = self._file.read(size)
        self._file.seek(here)
        return json.loads(data)

    def _skip(self, token: bytes) -> None:
        """Go behind a value whose first byte was read."""
        closing = b""  # of the brackets that are open
        while True:
            if token in CLOSING:
                closing += CLOSING[token]
                if len(closing) > MAX_DEPTH:
                    raise FaultError(NOT_JSON, f"more than {MAX_DEPTH} brackets within each other")
                token = self._token()
                if token != closing[-1:]:
                    token = self._first_of(token, closing)
                    continue
                closing = closing[:-1]
            elif token == b'"':
                for _ in self._string():
                    pass
            else:
                self._skip_word(token)
            while closing and (token := self._token()) == closing[-1:]:
                closing = closing[:-1]
            if not closing:
                return
            if token != b",":
                raise FaultError(NOT_JSON, f"not JSON: {token!r} after a value")
            token = self._first_of(self._token(), closing)

    def _first_of(self, token: bytes, closing: bytes) -> bytes:
        """Return a value's first byte; in an object its key comes before."""
        if closing.endswith(b"]"):
            return token
        self._key(token)
        return self._token()

    def _key(self, token: bytes) -> str:
        if token != b'"':
            raise FaultError(NOT_JSON, f"not JSON: {token!r} where a key is expected")
        key = ""
        for part in self._string():
            key += part
            if len(key) > MAX_WORD:
                raise FaultError(NOT_JSON, f"a key of more than {MAX_WORD} characters")
        if self._token() != b":":
            raise FaultError(NOT_JSON, "not JSON: no colon after a key")
        return key

    def _place(self) -> int:
        return self._file.tell() - len(self._data) + self._at

    def _more(self) -> bool:
        self._data, self._at = self._file.read(CHUNK), 0
        return bool(self._data)

    def _token(self) -> bytes:
        """The next byte that is no space; nothing at the end."""
        while True:
            while self._at < len(self._data):
                byte = self._data[self._at : self._at + 1]
                self._at += 1
                if byte not in SPACE:
                    return byte
            if not self._more():
                return b""

    def _skip_word(self, token: bytes) -> None:
        """Go behind a number, true, false or null, whose first byte was read."""
        word = token
        while len(word) <= MAX_WORD and (self._at < len(self._data) or self._more()):
            byte = self._data[self._at : self._at + 1]
            if byte in WORD_END:
                break
            word += byte
            self._at += 1
        if not word:
            raise _end()
        if not WORD.fullmatch(word):
            raise FaultError(NOT_JSON, f"not JSON: {word[:20]!r} where a value is expected")

    def _string(self) -> Iterator[str]:
        """Yield a string in pieces, from behind its first quote to behind its last."""
        rest = b""
        while True:
            data, done = self._until_quote()
            piece = rest + data
            # An escape, or half a pair of them, is kept for the next piece.
            keep = 0 if done else _open_end(piece)
            ready, rest = piece[: len(piece) - keep], piece[len(piece) - keep :]
            if ready:
                yield _unescape(ready)
            if done:
                return

    def _until_quote(self) -> tuple[bytes, bool]:
        """Take from the chunk up to the string's end; say whether that was it."""
        if self._at >= len(self._data) and not self._more():
            raise _end()
        data, start, place = self._data, self._at, self._at
        while match := STRING_END.search(data, place):
            if match[0] == b'"':
                self._at = match.end()
                return data[start : match.start()], True
            place = match.end() + 1
            if place > len(data):
                # The chunk ends within an escape: the byte after it belongs to it.
                more = self._file.read(1)
                self._at = len(data)
                return data[start:] + more, False
        self._at = len(data)
        return data[start:], False


def _open_end(piece: bytes) -> int:
    """Bytes at the end of a piece that belong together with what follows."""
    keep = _unfinished(piece)
    before = piece[: len(piece) - keep]
    if HIGH_SURROGATE.search(before) and not _is_escaped(before, len(before) - 6):
        keep += 6
    return keep


def _unfinished(piece: bytes) -> int:
    """Bytes of an escape or a character that a piece ends within."""
    for length in range(1, min(6, len(piece) + 1)):
        start = len(piece) - length
        if piece[start] == ord("\\") and not _is_escaped(piece, start):
            whole = 6 if piece[start + 1 : start + 2] == b"u" else 2
            if length < whole:
                return length
            break
    for length in range(1, min(4, len(piece) + 1)):
        byte = piece[-length]
        if byte >= 0xC0:
            whole = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if length < whole else 0
    return 0


def _is_escaped(piece: bytes, place: int) -> bool:
    """Whether an odd number of backslashes stands before a place."""
    before = piece[:place]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1


def _unescape(data: bytes) -> str:
    try:
        return cast(str, json.loads('"' + data.decode("utf-8") + '"'))
    except UnicodeDecodeError as error:
        raise FaultError(INVALID_UTF8, f"not UTF-8: {error.reason}") from error
    except ValueError as error:
        raise FaultError(NOT_JSON, f"not JSON: {error}") from error


def _end() -> FaultError:
    return FaultError(NOT_JSON, "not JSON: the line ends in the middle of the object")
