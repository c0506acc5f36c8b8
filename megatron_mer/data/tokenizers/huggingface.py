"""Hugging Face tokenizers: `hf:PATH`, a `tokenizer.json` or the folder that holds one.

The file does not say which token ends a document. `hf:PATH#TOKEN` does; otherwise it is the one of
`END_TOKENS` that the vocabulary has, or else the `eos_token` of a `tokenizer_config.json` beside
it. (A chat model's eos_token ends a turn, not a document, so the known names come first.)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

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
    refuse_surrogates,
)
from megatron_mer.errors import DataError

END_TOKENS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
"""Names of the token that ends a document in models that people use."""
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
SPACES = {"ByteLevel": "\u0120", "Metaspace": "\u2581"}
"""How pieces write a space, by the decoder that undoes it."""


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library.

    Special tokens are never found in text: `<|end_of_text|>` in a document is seven letters and
    some signs, as in the other kinds of tokenizers.

    Args:
        place: PATH or PATH#TOKEN, TOKEN being the one that ends a document.
        needs_end: whether it must be known what ends a document.

    Raises:
        DataError: the file is missing, is no tokenizer, or does not tell what ends a document.
    """

    kind = "hf"

    def __init__(self, place: str | Path, needs_end: bool = True) -> None:
        path, _, self._end_token = str(place).partition("#")
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / "tokenizer.json"
        self.fingerprint = file_sha256(self.path)
        self._model = self._load()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{self.path}: the vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        try:
            self.eod_id = vocabulary[self._find_end(vocabulary)]
        except DataError:
            if needs_end or self._end_token:
                raise
            self.eod_id = NO_END

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, shape (n,), without eod_id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        """Return the ids of many texts, in order; see `SentencePieceTokenizer.encode_batch`."""
        refuse_surrogates(texts)
        _set_threads(num_threads)
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
        """Return the ids of many texts in one array, as `encode_batch`."""
        return flatten(self.encode_batch(texts, num_threads))

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of ids; special tokens are no text.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        numbers = checked_ids(ids, self.vocab_size, self.path)
        return str(self._model.decode(numbers, skip_special_tokens=True))

    def piece(self, number: int) -> Piece | None:
        """Return what an id stands for; a vocabulary may have gaps."""
        name = self._model.id_to_token(number)
        if name is None:
            return None
        if number in self._added or self._style != "ByteLevel":
            if BYTE_TOKEN.fullmatch(name):
                return Piece(name, bytes([int(name[3:5], 16)]))
            space = "" if number in self._added else SPACES[self._style]
            return Piece(name, (name.replace(space, " ") if space else name).encode())
        return Piece(name, bytes(_BYTE_OF[character] for character in name))

    def num_bytes(self, samples: NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes that the ids of samples add; see `Tokenizer.num_bytes`."""
        return self._pieces.count(samples, self.eod_id)

    def _load(self) -> Any:
        # Not at the top: reading a dataset needs no tokenizer library.
        from tokenizers import Tokenizer

        try:
            model: Any = Tokenizer.from_file(str(self.path))
        except Exception as error:
            raise DataError(f"{self.path}: not a Hugging Face tokenizer.json: {error}") from error
        if dropout := getattr(model.model, "dropout", None):
            raise DataError(
                f"{self.path}: model.dropout is {dropout}, so its ids are drawn at random; set it "
                "to null"
            )
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        return model

    def _find_end(self, vocabulary: dict[str, int]) -> str:
        if self._end_token:
            if self._end_token not in vocabulary:
                raise DataError(f"{self.path}: has no token {self._end_token!r} to end documents")
            return self._end_token
        known = [token for token in END_TOKENS if token in vocabulary]
        if len(known) == 1:
            return known[0]
        stated = _stated_end(self.path.with_name("tokenizer_config.json"))
        if stated in vocabulary:
            return stated
        raise DataError(
            f"{self.path}: which token ends a document? The vocabulary has "
            f"{' and '.join(known) or 'none of ' + ', '.join(END_TOKENS)}, and no "
            "tokenizer_config.json beside it tells; name it: hf:PATH#TOKEN"
        )

    @cached_property
    def _added(self) -> dict[int, Any]:
        added: dict[int, Any] = self._model.get_added_tokens_decoder()
        return added

    @cached_property
    def _style(self) -> str:
        decoder = json.loads(self._model.to_str()).get("decoder") or {}
        return "ByteLevel" if "ByteLevel" in json.dumps(decoder) else "Metaspace"

    @cached_property
    def _pieces(self) -> PieceBytes:
        table = PieceBytes.empty(self.vocab_size)
        added, style = self._added, self._style
        space, start = SPACES[style], self._model.encode("a", add_special_tokens=False).tokens
        adds_space = bool(start) and start[0].startswith(space)
        unknown = getattr(self._model.model, "unk_token", None)
        for piece, number in self._model.get_vocab(with_added_tokens=True).items():
            if piece == unknown:
                table.lengths[number] = UNKNOWN
            elif number in added:
                table.lengths[number] = 0 if added[number].special else len(piece.encode())
            elif style == "ByteLevel":
                table.lengths[number] = len(piece)  # A character stands for a byte.
            elif BYTE_TOKEN.fullmatch(piece):
                table.lengths[number] = 1
            else:
                table.lengths[number] = len(piece.replace(space, " ").encode())
            table.leading[number] = adds_space and piece.startswith(space)
        return table


def _byte_letters() -> dict[int, str]:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    return {**letters, **{byte: chr(256 + place) for place, byte in enumerate(hidden)}}


BYTE_LETTERS = _byte_letters()
"""The letters by which byte-level vocabularies write bytes (GPT-2's table)."""
_BYTE_OF = {letter: byte for byte, letter in BYTE_LETTERS.items()}


def _stated_end(path: Path) -> str:
    """The eos_token of a tokenizer_config.json; nothing where there is none."""
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return ""
    return str(token.get("content") if isinstance(token, dict) else token)


def _set_threads(num_threads: int) -> None:
    """Tell the library: it reads the first whenever it encodes, the second once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
    if num_threads > 1:
        os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
