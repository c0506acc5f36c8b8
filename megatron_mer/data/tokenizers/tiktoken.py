"""tiktoken vocabularies: `tiktoken:PATH`, a file of mergeable ranks.

Such a file (OpenAI's `cl100k_base.tiktoken`, Llama-3's `tokenizer.model`) has one token a line, in
base64, and its rank. How text is split and which tokens are special stands in the code of those who
publish it. `SCHEMES` has the known ones; `tiktoken:PATH#SCHEME` names one, and
`tiktoken:PATH#FILE.json` a file of one's own: {"pattern": REGEX, "special_tokens": {TOKEN: ID},
"eod": TOKEN}.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.tokenizers.base import (
    FlatIds,
    Piece,
    PieceBytes,
    checked_ids,
    flatten,
    refuse_surrogates,
)
from megatron_mer.errors import DataError

R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS, LLAMA3_SPECIALS = 128_000, 256


@dataclass(frozen=True)
class Scheme:
    """What a file of ranks does not say."""

    pattern: str
    """Regular expression whose matches are encoded apart."""
    special_tokens: dict[str, int]
    """Ids of the tokens that are no text."""
    eod: str
    """The special token that ends a document."""


def _llama3(ranks: int) -> Scheme:
    """The 256 special tokens come after the ranks, begin and end of text first."""
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|special_token_{number}|>" for number in range(2, LLAMA3_SPECIALS)]
    return Scheme(LLAMA3, {name: ranks + at for at, name in enumerate(names)}, names[1])


_END = "<|endoftext|>"
SCHEMES = {
    "r50k_base": Scheme(R50K, {_END: 50256}, _END),
    "cl100k_base": Scheme(
        CL100K,
        {
            _END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        _END,
    ),
    "o200k_base": Scheme(O200K, {_END: 199999, "<|endofprompt|>": 200018}, _END),
}
LLAMA3_NAME = "llama3"
"""The scheme whose special tokens follow the ranks, however many these are."""


class TiktokenTokenizer:
    """A file of mergeable ranks, read by the `tiktoken` library; no network.

    Args:
        place: PATH, PATH#SCHEME or PATH#FILE.json.

    Raises:
        DataError: a file is missing or no such file, or the scheme is not known.
    """

    kind = "tiktoken"

    def __init__(self, place: str | Path) -> None:
        path, _, scheme = str(place).partition("#")
        self.path = Path(path)
        content = _read(self.path)
        self.ranks = _parse_ranks(self.path, content)
        self.scheme = _find_scheme(self.path, scheme, len(self.ranks))
        described = json.dumps([self.scheme.pattern, self.scheme.special_tokens], sort_keys=True)
        digest = hashlib.sha256(content)
        digest.update(described.encode())
        self.fingerprint = digest.hexdigest()
        self._model = self._load()
        self.vocab_size = int(self._model.max_token_value) + 1
        self.eod_id = self.scheme.special_tokens[self.scheme.eod]

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of a text, shape (n,), without eod_id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        """Return the ids of many texts, in order; see `SentencePieceTokenizer.encode_batch`."""
        refuse_surrogates(texts)
        if num_threads == 1:
            ids = [self._model.encode_ordinary(text) for text in texts]
        else:
            ids = self._model.encode_ordinary_batch(list(texts), num_threads=num_threads)
        return [np.array(numbers, dtype=np.int32) for numbers in ids]

    def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
        """Return the ids of many texts in one array, as `encode_batch`."""
        return flatten(self.encode_batch(texts, num_threads))

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Return the text of ids; special tokens are no text.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        numbers = checked_ids(ids, self.vocab_size, self.path)
        return str(self._model.decode([id_ for id_ in numbers if self._pieces.lengths[id_]]))

    def piece(self, number: int) -> Piece | None:
        """Return what an id stands for; some have gaps between their special tokens."""
        return self._by_id.get(number)

    def num_bytes(self, samples: NDArray[np.int64]) -> int | None:
        """Return the UTF-8 bytes that the ids of samples add; see `Tokenizer.num_bytes`."""
        return self._pieces.count(samples, self.eod_id)

    def _load(self) -> Any:
        # Not at the top: reading a dataset needs no tokenizer library.
        from tiktoken import Encoding

        try:
            return Encoding(
                name=self.path.name,
                pat_str=self.scheme.pattern,
                mergeable_ranks=self.ranks,
                special_tokens=self.scheme.special_tokens,
            )
        except ValueError as error:
            raise DataError(f"{self.path}: no such tokenizer can be made: {error}") from error

    @cached_property
    def _by_id(self) -> dict[int, Piece]:
        ranks = {number: Piece(repr(text), text) for text, number in self.ranks.items()}
        special = self.scheme.special_tokens.items()
        return {**ranks, **{number: Piece(name, name.encode()) for name, number in special}}

    @cached_property
    def _pieces(self) -> PieceBytes:
        table = PieceBytes.empty(self.vocab_size)
        for piece, number in self.ranks.items():
            table.lengths[number] = len(piece)
        return table


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path}, line {number}: no tiktoken vocabulary: expected a token in base64 and "
                "its rank. A tokenizer.model of SentencePiece is sentencepiece:PATH"
            ) from error
    if len(set(ranks.values())) != len(ranks) or not ranks:
        raise DataError(f"{path}: no tiktoken vocabulary: {len(ranks)} tokens, with equal ranks")
    return ranks


def _find_scheme(path: Path, name: str, ranks: int) -> Scheme:
    if name.endswith(".json"):
        return _read_scheme(Path(name))
    known = name or path.stem
    if known == LLAMA3_NAME or (not name and ranks == LLAMA3_RANKS):
        return _llama3(ranks)
    if known in SCHEMES:
        return SCHEMES[known]
    raise DataError(
        f"{path}: how does this vocabulary split text? {known!r} is no known scheme; allowed: "
        f"tiktoken:PATH#SCHEME with {', '.join((LLAMA3_NAME, *SCHEMES))}, or #FILE.json with "
        "pattern, special_tokens and eod"
    )


def _read_scheme(path: Path) -> Scheme:
    try:
        scheme = Scheme(**json.loads(_read(path)))
        special = {str(token): int(number) for token, number in scheme.special_tokens.items()}
        known = scheme.eod in special
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: no tiktoken scheme: {error}; expected an object with pattern, special_tokens "
            "and eod"
        ) from error
    if not known:
        raise DataError(f"{path}: eod {scheme.eod!r} is not among its special_tokens")
    return Scheme(str(scheme.pattern), special, scheme.eod)
