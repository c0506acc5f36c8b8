"""Tokenizers behind one protocol, named by a string `kind:place`.

Today: `sentencepiece:PATH`, a SentencePiece model file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.sidecar import file_sha256
from megatron_mer.errors import ConfigError, DataError


class Tokenizer(Protocol):
    """Turns text into ids and back."""

    @property
    def kind(self) -> str:
        """Kind of tokenizer, the part of its name before the colon."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""

    @property
    def eod_id(self) -> int:
        """Id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model, in hexadecimal: equal fingerprints give equal ids."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, shape (n,), without eod_id."""

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        """Return the ids of many texts, in order."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of ids."""

    def num_bytes(self, samples: NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes that the ids of samples add to the text of the id before them.

        Args:
            samples: shape (rows, n), ids in [0, vocab_size); a row's first id counts nothing.

        Returns:
            None if an id stands for text that is not known (an unknown piece).
        """


class SentencePieceTokenizer:
    """A SentencePiece model; documents end with its `</s>`.

    Args:
        path: of the `.model` file.

    Raises:
        DataError: the file is missing, is no model, or has no end-of-sentence id.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        # Not at the top: reading a dataset needs no tokenizer library.
        from sentencepiece import SentencePieceProcessor

        self.fingerprint = file_sha256(Path(path))
        self._path = Path(path)
        # The bindings' arguments and methods carry no usable types.
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        self.vocab_size = int(self._model.GetPieceSize())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0:
            raise DataError(
                f"{path}: the model has no end-of-sentence piece (</s>), which ends documents; "
                "train "
                "one with an eos_id"
            )

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, shape (n,), without eod_id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        """Return the ids of many texts, in order.

        Args:
            texts: without lone surrogates (they have no UTF-8 form).
            num_threads: threads of this process.

        Raises:
            DataError: a text cannot be encoded as UTF-8.
        """
        try:
            encoded = [text.encode("utf-8") for text in texts]
        except UnicodeEncodeError as error:
            raise DataError(f"a text is not valid Unicode: {error}") from error
        ids = self._model.Encode(encoded, num_threads=num_threads, return_type="numpy")
        return cast("list[NDArray[np.int32]]", ids)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of ids.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        numbers = [int(number) for number in ids]
        if numbers and (min(numbers) < 0 or max(numbers) >= self.vocab_size):
            raise DataError(
                f"{self._path}: ids {min(numbers)} to {max(numbers)}; the vocabulary has 0 to "
                f"{self.vocab_size - 1}"
            )
        return str(self._model.Decode(numbers))

    def num_bytes(self, samples: NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes that the ids of samples add to the text of the id before them.

        The text is the tokenizer's own, normalized. A space that the model puts before each
        document counts nothing, and neither do pieces that are no text (the end of a document).

        Args:
            samples: shape (rows, n), ids in [0, vocab_size); a row's first id counts nothing.

        Returns:
            None if an id stands for text that is not known (an unknown piece).
        """
        lengths, leading = self._pieces
        ids = samples[:, 1:]
        counts = lengths[ids]
        if (counts < 0).any():
            return None
        first = (samples[:, :-1] == self.eod_id) & leading[ids]
        return int(counts.sum() - first.sum())

    @cached_property
    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """UTF-8 bytes of each piece (-1: unknown), and whether it begins with the added space."""
        model, space = self._model, "\u2581"
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        leading = np.zeros(self.vocab_size, dtype=np.bool_)
        adds_space = str(model.IdToPiece(model.EncodeAsIds("a")[0])).startswith(space)
        for number in range(self.vocab_size):
            piece = str(model.IdToPiece(number))
            if model.IsByte(number):
                lengths[number] = 1
            elif model.IsUnknown(number):
                lengths[number] = -1
            elif not model.IsControl(number) and not model.IsUnused(number):
                lengths[number] = len(piece.replace(space, " ").encode())
                leading[number] = adds_space and piece.startswith(space)
        return lengths, leading


KINDS: dict[str, Callable[[str], Tokenizer]] = {"sentencepiece": SentencePieceTokenizer}


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer by its name.

    Args:
        spec: `kind:place`, such as `sentencepiece:build/tokenizer.model`.

    Raises:
        ConfigError: the name has no known kind or no place.
        DataError: the model cannot be read.
    """
    kind, separator, place = spec.partition(":")
    if not separator or not place or kind not in KINDS:
        allowed = ", ".join(f"{known}:PATH" for known in KINDS)
        raise ConfigError(f"tokenizer {spec!r}; allowed: {allowed}")
    return KINDS[kind](place)
