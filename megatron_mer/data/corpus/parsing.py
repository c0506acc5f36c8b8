"""From lines to documents: JSON objects to their text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_mer.data.corpus.cutting import LONG_TEXT
from megatron_mer.data.corpus.faults import (
    EMPTY,
    INVALID_UTF8,
    MISSING_KEY,
    NOT_JSON,
    NOT_TEXT,
    Fault,
    FaultError,
)

KEYS_TOLD = 8
"""Keys that a message names, where the wanted one is missing."""
TextUnit = Literal["file", "line"]


@dataclass(frozen=True)
class ReadSettings:
    """How documents are found in the inputs."""

    text_keys: tuple[str, ...] = ("text",)
    """Keys (columns) of the text; several are joined."""
    separator: str = "\n"
    """Between the texts of several keys."""
    text_unit: TextUnit = "file"
    """What a document is in plain text: the whole file, or a line."""
    language_key: str | None = None
    """Key (column) of the language, to count by it."""


@dataclass
class Batch:
    """Documents that are in memory together."""

    texts: list[str] = field(default_factory=list)
    """Of those without a fault."""
    languages: list[str] = field(default_factory=list)
    """Of each text, if the settings name a key for it."""
    faults: list[Fault] = field(default_factory=list)
    """Of the others; in order."""
    long_lines: dict[int, int] = field(default_factory=dict)
    """Line of each text that has more than LONG_TEXT characters, by its place in `texts`."""

    def add(self, text: str, line: int, language: str | None = None) -> None:
        """Add a document, or the fault that it is empty."""
        if not text or text.isspace():
            self.faults.append(Fault(line, EMPTY, "the text is empty"))
            return
        if len(text) > LONG_TEXT:
            self.long_lines[len(self.texts)] = line
        self.texts.append(text)
        if language is not None:
            self.languages.append(language)


def parse_json_lines(data: bytes, first_line: int, settings: ReadSettings) -> Batch:
    """Return the documents of whole JSON lines; blank lines are none."""
    import orjson

    batch, loads = Batch(), orjson.loads
    key, texts = settings.text_keys[0], batch.texts
    simple = len(settings.text_keys) == 1 and settings.language_key is None
    for number, line in enumerate(data.split(b"\n"), first_line):
        try:
            content = loads(line)
            text = content[key] if simple else None
        except (ValueError, KeyError, TypeError, IndexError):
            if not line or line.isspace():
                continue
            content = text = None
        if type(text) is str:
            # What `add` does, without a call for each of millions of documents.
            if len(text) <= LONG_TEXT and text and not text.isspace():
                texts.append(text)
            else:
                batch.add(text, number)
            continue
        try:
            _add(batch, parse_line(line) if content is None else content, number, settings)
        except FaultError as fault:
            batch.faults.append(fault.at(number))
    return batch


def parse_text_lines(data: bytes, first_line: int, settings: ReadSettings) -> Batch:
    """Return the lines of plain text as documents, each without its newline."""
    batch, language = Batch(), None if settings.language_key is None else ""
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), first_line):
        try:
            batch.add(decode(line.removesuffix(b"\r")), number, language)
        except FaultError as fault:
            batch.faults.append(fault.at(number))
    return batch


def decode(data: bytes) -> str:
    """Return UTF-8 as text.

    Raises:
        FaultError: it is not UTF-8; names the byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FaultError(
            INVALID_UTF8, f"byte {error.start} of {len(data)} is not UTF-8: {error.reason}"
        ) from error


def parse_line(line: bytes) -> Any:
    """Return a JSON value as Python's own parser reads it, which knows NaN and odd numbers too.

    Raises:
        FaultError: the line is not UTF-8 or not JSON.
    """
    text = decode(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FaultError(NOT_JSON, f"not JSON: {error}") from error


def _add(batch: Batch, content: Any, line: int, settings: ReadSettings) -> None:
    text, language = joined(content, settings), None
    if settings.language_key is not None:
        language = language_of(content.get(settings.language_key))
    batch.add(text, line, language)


def language_of(value: Any) -> str:
    """Return the name under which a document is counted."""
    return "" if value is None else str(value)


def joined(content: Any, settings: ReadSettings) -> str:
    """Return the text of a JSON object.

    Raises:
        FaultError: it is no object, a key is missing, or its value is no valid text.
    """
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise FaultError(NOT_JSON, f"a JSON {kind}; expected an object")
    return settings.separator.join(
        text_of(content, key, list(content)) for key in settings.text_keys
    )


def text_of(content: dict[str, Any], key: str, keys: Sequence[str]) -> str:
    """Return the text of a key.

    Args:
        content: of the document.
        key: of the text.
        keys: all that the document has.

    Raises:
        FaultError: the key is missing, or its value is no valid text.
    """
    if key not in content:
        raise missing(key, keys)
    text = content[key]
    if not isinstance(text, str):
        found = "null" if text is None else type(text).__name__
        raise FaultError(NOT_TEXT, f"{key!r} is {found}; expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FaultError(INVALID_UTF8, f"the text is not valid Unicode: {error}") from error
    return text


def missing(key: str, keys: Sequence[str]) -> FaultError:
    """Return the fault of a document without one of its texts."""
    names = ", ".join(list(keys)[:KEYS_TOLD]) or "none"
    return FaultError(
        MISSING_KEY,
        f"key {key!r} is missing; its keys: {names}. Name the right one with --text-key",
    )
