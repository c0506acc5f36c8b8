"""A vocabulary that grows: new rows from the rows of the pieces that made up the same text before.

The mean of what a text was written with is near what the model knows of it, so that a loss begins
near the old one; and it is a function of the two tokenizers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from megatron_mer.checkpoint.huggingface.read import NewRows
from megatron_mer.data.tokenizers import Tokenizer
from megatron_mer.errors import ConfigError, Problem

_SHOWN = 5  # ids in a message


def extended(old: Tokenizer, new: Tokenizer, rows: int) -> NewRows:
    """The rows of a model that is to know a new tokenizer.

    Args:
        old: the checkpoint's own tokenizer.
        new: has all ids of the old one and perhaps more.
        rows: of the checkpoint's embedding. Those above the old tokenizer's ids are nobody's: a new
            piece with such an id gets a new row there.

    Raises:
        ConfigError: the new one does not extend the old; the first ids that differ are named.
    """
    _refuse_other(old, new)
    parts = _Parts(old)
    sources = {
        number: parts.of(piece.text)
        for number in range(old.vocab_size, new.vocab_size)
        if (piece := new.piece(number)) is not None
    }
    return NewRows(max(rows, new.vocab_size), min(old.vocab_size, rows), sources)


def _refuse_other(old: Tokenizer, new: Tokenizer) -> None:
    if old.fingerprint == new.fingerprint:
        return
    differing = list(_differences(old, new))
    if not differing:
        return
    shown = "; ".join(differing[:_SHOWN])
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    given = f"does not extend the checkpoint's own, whose ids mean other pieces: {shown}{more}"
    allowed = "the checkpoint's own, or one that keeps its ids and adds some behind them"
    raise ConfigError([Problem("tokenizer", given, allowed)])


def _differences(old: Tokenizer, new: Tokenizer) -> Iterator[str]:
    same_kind = old.kind == new.kind
    for number in range(old.vocab_size):
        was = old.piece(number)
        now = new.piece(number) if number < new.vocab_size else None
        if was is None:
            continue
        equal = now is not None and (was.name == now.name if same_kind else was.text == now.text)
        if not equal:
            yield f"id {number} was {was.name!r}, is {now.name if now else None!r}"


class _Parts:
    """What an old tokenizer writes a text with."""

    def __init__(self, old: Tokenizer) -> None:
        self._old = old

    def of(self, text: bytes) -> tuple[int, ...]:
        """Ids whose rows stand for a text; none where the old tokenizer knows nothing of it."""
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError:
            return tuple(self._longest(text))
        if self._adds_space and decoded.startswith(" ") and decoded != " ":
            decoded = decoded[1:]  # It comes back by itself.
            return tuple(int(number) for number in self._old.encode(decoded))
        ids = [int(number) for number in self._old.encode(decoded)]
        if self._adds_space and len(ids) > 1 and self._text(ids[0]) == b" ":
            ids = ids[1:]  # The space that is put before each text is not of this one.
        return tuple(ids)

    @cached_property
    def _adds_space(self) -> bool:
        ids = self._old.encode("a")
        return bool(len(ids)) and self._text(int(ids[0])).startswith(b" ")

    def _text(self, number: int) -> bytes:
        piece = self._old.piece(number)
        return piece.text if piece else b""

    @cached_property
    def _by_text(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for number in range(self._old.vocab_size):
            if text := self._text(number):
                found.setdefault(text, number)
        return found

    def _longest(self, text: bytes) -> Iterator[int]:
        """The parts of a text that is no whole characters, the longest known one first."""
        place = 0
        while place < len(text):
            ends = range(len(text), place, -1)
            end = next((end for end in ends if text[place:end] in self._by_text), None)
            if end is None:
                place += 1
                continue
            yield self._by_text[text[place:end]]
            place = end
