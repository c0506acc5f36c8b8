"""What a tokenizer is to the rest of the project, and what the kinds of tokenizers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mer.errors import DataError

UNKNOWN = -1
"""Bytes of an id that stands for text which is not known."""


NO_END = -1
"""The eod_id of a tokenizer that has none."""


@dataclass(frozen=True)
class FlatIds:
    """The ids of many texts in one array, without a Python object an id or a text."""

    tokens: NDArray[Any]
    """Shape (n,), integers: the texts one after the other."""
    lengths: NDArray[np.int64]
    """Shape (texts,): ids of each."""

    def split(self) -> list[NDArray[Any]]:
        """Return the ids of each text."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


@dataclass(frozen=True)
class Piece:
    """What an id of a vocabulary stands for."""

    name: str
    """As the tokenizer's own file writes it."""
    text: bytes
    """The text, UTF-8, perhaps a part of a character; a control token's own name."""


class Encoder(Protocol):
    """Turns many texts into ids."""

    def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
        """Return the ids of texts, without eod_id.

        Args:
            texts: without lone surrogates (they have no UTF-8 form).
            num_threads: threads of this process.
        """


class Tokenizer(Encoder, Protocol):
    """Turns text into ids and back. Text is text: what looks like a control token is not one."""

    @property
    def kind(self) -> str:
        """Kind of tokenizer, the part of its name before the colon."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""

    @property
    def eod_id(self) -> int:
        """Id that ends a document; NO_END where none does and none is needed."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids, in hexadecimal: equal fingerprints, equal ids."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, shape (n,), without eod_id."""

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        """Return the ids of many texts, in order."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of ids; ids that are no text, such as eod_id, give none."""

    def piece(self, number: int) -> Piece | None:
        """Return what an id in [0, vocab_size) stands for; None if it stands for nothing."""

    def num_bytes(self, samples: NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes that the ids of samples add to the text of the id before them.

        The text is the tokenizer's own, normalized. A space that the model puts before each
        document counts nothing, and neither do ids that are no text (the end of a document).

        Args:
            samples: shape (rows, n), ids in [0, vocab_size); a row's first id counts nothing.

        Returns:
            None if an id stands for text that is not known (an unknown piece).
        """


@dataclass(frozen=True)
class PieceBytes:
    """The UTF-8 bytes of each id of a vocabulary."""

    lengths: NDArray[np.int64]
    """Shape (vocab_size,); 0: no text; UNKNOWN: not known."""
    leading: NDArray[np.bool_]
    """Shape (vocab_size,): whether it begins with the space that is put before each document."""

    @classmethod
    def empty(cls, vocab_size: int) -> PieceBytes:
        """Return a table of ids that are no text, to be filled."""
        return cls(np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.bool_))

    def count(self, samples: NDArray[np.int64], eod_id: int) -> int | None:
        """Return what `Tokenizer.num_bytes` does."""
        ids = samples[:, 1:]
        counts = self.lengths[ids]
        if (counts == UNKNOWN).any():
            return None
        first = (samples[:, :-1] == eod_id) & self.leading[ids]
        return int(counts.sum() - first.sum())


def flatten(ids: Iterable[NDArray[Any]]) -> FlatIds:
    """Return texts' ids, an array a text, as one array."""
    arrays = list(ids)
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return FlatIds(np.concatenate([np.empty(0, np.int32), *arrays]), lengths)


def checked_ids(
    ids: Sequence[int] | NDArray[np.integer[Any]], vocab_size: int, place: object
) -> list[int]:
    """Return ids as a list.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    numbers = [int(number) for number in ids]
    if numbers and (min(numbers) < 0 or max(numbers) >= vocab_size):
        raise DataError(
            f"{place}: ids {min(numbers)} to {max(numbers)}; the vocabulary has 0 to "
            f"{vocab_size - 1}"
        )
    return numbers


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Refuse texts with half a surrogate pair.

    Raises:
        DataError: a text cannot be encoded as UTF-8.
    """
    try:
        for text in texts:
            if not text.isascii():
                text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"a text is not valid Unicode: {error}") from error
