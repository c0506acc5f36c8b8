"""SentencePiece models: `sentencepiece:PATH`, a `.model` file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.sidecar import file_sha256
from megatron_mer.data.tokenizers.base import (
    NO_END,
    UNKNOWN,
    FlatIds,
    Piece,
    PieceBytes,
    checked_ids,
    flatten,
)
from megatron_mer.errors import DataError

SPACE = "\u2581"
"""How pieces write a space."""


class SentencePieceTokenizer:
    """A SentencePiece model; documents end with its `</s>`.

    Args:
        path: of the `.model` file.
        needs_end: whether it must have an end-of-sentence id.

    Raises:
        DataError: the file is missing, is no model, or has no end-of-sentence id.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path, needs_end: bool = True) -> None:
        # Not at the top: reading a dataset needs no tokenizer library.
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        self.fingerprint = file_sha256(self.path)
        # The bindings' arguments and methods carry no usable types.
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"{path}: not a SentencePiece model: {error}. Another kind of tokenizer.model is "
                "Llama-3's, tiktoken:PATH"
            ) from error
        self.vocab_size = int(self._model.GetPieceSize())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0 and not needs_end:
            self.eod_id = NO_END
        elif self.eod_id < 0:
            raise DataError(
                f"{path}: the model has no end-of-sentence piece (</s>), which ends documents; "
                "train one with an eos_id"
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

    def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
        """Return the ids of many texts in one array, as `encode_batch`."""
        return flatten(self.encode_batch(texts, num_threads))

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of ids.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        return str(self._model.Decode(checked_ids(ids, self.vocab_size, self.path)))

    def piece(self, number: int) -> Piece | None:
        """Return what an id stands for."""
        name = str(self._model.IdToPiece(number))
        if self._model.IsByte(number):
            return Piece(name, bytes([int(name[3:5], 16)]))
        if self._model.IsControl(number) or self._model.IsUnknown(number):
            return Piece(name, name.encode())
        return Piece(name, name.replace(SPACE, " ").encode())

    def special_pieces(self) -> dict[str, str]:
        """Return the names of bos_token and unk_token, as far as the model has them."""
        numbers = {"bos_token": self._model.bos_id(), "unk_token": self._model.unk_id()}
        pieces = self._model.IdToPiece
        return {role: str(pieces(number)) for role, number in numbers.items() if number >= 0}

    def num_bytes(self, samples: NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes that the ids of samples add; see `Tokenizer.num_bytes`."""
        return self._pieces.count(samples, self.eod_id)

    @cached_property
    def _pieces(self) -> PieceBytes:
        model, table = self._model, PieceBytes.empty(self.vocab_size)
        adds_space = str(model.IdToPiece(model.EncodeAsIds("a")[0])).startswith(SPACE)
        for number in range(self.vocab_size):
            piece = str(model.IdToPiece(number))
            if model.IsByte(number):
                table.lengths[number] = 1
            elif model.IsUnknown(number):
                table.lengths[number] = UNKNOWN
            elif not model.IsControl(number) and not model.IsUnused(number):
                table.lengths[number] = len(piece.replace(SPACE, " ").encode())
                table.leading[number] = adds_space and piece.startswith(SPACE)
        return table
