"""Tokenizing a text that is too long to be tokenized at once, with the same ids.

The text is cut where the ids on both sides do not depend on each other. Whether that is so is not
assumed but tried, at each place: the surroundings are tokenized whole and in two parts, and the ids
have to be equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from megatron_mer.data.corpus.faults import TOO_LONG, FaultError
from megatron_mer.data.tokenizers import Encoder

LONG_TEXT = 1 << 20
"""Characters from which on a text is cut, whatever the memory: so ids never depend on settings."""
PART = 1 << 18
"""Characters of a part, about."""
AROUND = 512
"""Characters on both sides of a place that are tokenized to try it."""
TRIES = 200
"""Places that are tried for a part."""
PLACE = re.compile("(?<=\\S)[\n \u3002](?=\\S)")
"""Where a cut may succeed: a newline, a space or a full stop between two other characters."""


def parts(chunks: Iterable[str], encoder: Encoder) -> Iterator[str]:
    """Yield a text in parts whose ids, one after the other, are those of the whole.

    Args:
        chunks: the text in pieces of any size.
        encoder: of the tokenizer.

    Raises:
        FaultError: no place to cut was found, so the text cannot be tokenized in bounded memory.
    """
    text, done = "", 0
    for chunk in chunks:
        text += chunk
        while len(text) >= 2 * PART:
            end, start = _cut(text, encoder, done)
            yield text[:end]
            done += start
            text = text[start:]
    if text:
        yield text


def chunks_of(text: str) -> Iterator[str]:
    """Yield a text in pieces."""
    for start in range(0, len(text), PART):
        yield text[start : start + PART]


def _cut(text: str, encoder: Encoder, done: int) -> tuple[int, int]:
    """Return where the first part ends and where the second begins."""
    places = PLACE.finditer(text, PART - AROUND, len(text) - AROUND)
    tried = 0
    for match in islice(places, TRIES):
        tried += 1
        start, end = match.span()
        # Behind the sign; before it; or without it, where the tokenizer puts a space before a text.
        for cut in ((end, end), (start, start), (start, end)):
            if _is_free(text, *cut, encoder):
                return cut
    raise FaultError(
        TOO_LONG,
        f"a text of more than {LONG_TEXT:,} characters that cannot be cut without changing its "
        f"ids: of {tried} places from character {done + PART:,} on, none will do; split it "
        "beforehand, or leave it out with --on-error skip",
    )


def _is_free(text: str, end: int, start: int, encoder: Encoder) -> bool:
    before, after = text[max(0, end - AROUND) : end], text[start : start + AROUND]
    whole = text[max(0, end - AROUND) : start + AROUND]
    flat = encoder.encode_flat([whole, before, after])
    split = int(flat.lengths[0])
    return bool(np.array_equal(flat.tokens[:split], flat.tokens[split:]))
