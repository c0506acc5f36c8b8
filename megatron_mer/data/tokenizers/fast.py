"""The fast path: `gigatoken` in a tokenizer's place, where its ids are the same.

It is many times faster than the libraries and knows byte-level BPE and SentencePiece BPE. Whether
its ids are those of the tokenizer's own library is never assumed: `choose_encoder` compares both on
a sample of the very input that is to be tokenized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np

from megatron_mer.data.tokenizers.base import (
    Encoder,
    FlatIds,
    Tokenizer,
)
from megatron_mer.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_mer.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_mer.data.tokenizers.tiktoken import CL100K, LLAMA3, O200K, R50K, TiktokenTokenizer
from megatron_mer.errors import DataError

Engine = Literal["auto", "library", "gigatoken"]

SCHEMES = {LLAMA3: "gpt4", CL100K: "gpt4", O200K: "o200k", R50K: "gpt2"}
"""gigatoken's names of the ways to split text."""
FEW_TEXTS, FEW_CHARACTERS = 20_000, 1 << 25
"""Texts that are encoded one by one; a batch saves some microseconds each, but has to import
awkward first, which takes as long as that many. With several threads, so many characters."""
LIBRARIES = {"sentencepiece": "sentencepiece", "hf": "tokenizers", "tiktoken": "tiktoken"}


class GigatokenEncoder:
    """Gives a tokenizer's ids by gigatoken.

    Args:
        tokenizer: whose ids are wanted.
        expected: texts that will come, about; where they are many, workers that are forked later
            share what has to be imported for them.

    Raises:
        ValueError: gigatoken does not know this kind of tokenizer.
        ImportError: it is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, expected: int = 0) -> None:
        from gigatoken import Tokenizer as Gigatoken

        if isinstance(tokenizer, SentencePieceTokenizer):
            converted = Gigatoken.from_sentencepiece(tokenizer.path.read_bytes())._hf_json
            model = Gigatoken.from_json(_without_specials(converted))
        elif isinstance(tokenizer, HuggingFaceTokenizer):
            content = tokenizer.path.read_bytes()
            model = Gigatoken.from_json(_without_specials(content))
        elif isinstance(tokenizer, TiktokenTokenizer):
            scheme = SCHEMES.get(tokenizer.scheme.pattern)
            if scheme is None:
                raise ValueError("its way to split text is none that gigatoken knows")
            model = Gigatoken.from_tiktoken(tokenizer.path, scheme, {})
        else:
            raise ValueError(f"gigatoken does not know tokenizers of kind {tokenizer.kind}")
        self._backend: Any = model.backend
        self.expected = expected
        self._texts = self._characters = 0
        if expected > FEW_TEXTS:
            import_module("awkward")  # gigatoken does it with its first batch

    def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
        """Return the ids of many texts in one array; see `Encoder.encode_flat`."""
        if not texts:
            return FlatIds(np.empty(0, np.int32), np.empty(0, np.int64))
        self._texts += len(texts)
        self._characters += sum(map(len, texts)) if num_threads > 1 else 0
        few = max(self._texts, self.expected) <= FEW_TEXTS
        if few and self._characters <= FEW_CHARACTERS:
            arrays = [self._backend.encode(text) for text in texts]
            lengths = np.array([len(array) for array in arrays], dtype=np.int64)
            return FlatIds(np.concatenate(arrays), lengths)
        ids = self._backend.encode_batch(list(texts), parallel=num_threads > 1)
        offsets = np.asarray(ids.layout.offsets.data)
        tokens = np.asarray(ids.layout.content.data)[offsets[0] : offsets[-1]]
        return FlatIds(tokens, np.diff(offsets))


@dataclass(frozen=True)
class Choice:
    """Which library gives the ids, and why."""

    fast: GigatokenEncoder | None
    """gigatoken; None: the tokenizer's own library does."""
    reason: str
    """In words; starts with the package and its version."""


def choose_encoder(
    tokenizer: Tokenizer, engine: Engine, sample: Sequence[str], expected: int = 0
) -> Choice:
    """Decide which library gives the ids.

    Args:
        tokenizer: whose ids are wanted.
        engine: auto: gigatoken where it is installed and proven; library: never; gigatoken: as
            auto, but without it there is an error.
        sample: texts to compare on.
        expected: texts that will come, about.

    Raises:
        DataError: gigatoken was asked for and cannot be used.
    """
    library = LIBRARIES.get(tokenizer.kind, tokenizer.kind)
    own = f"{library} {_version(library)}"
    if engine == "library":
        return Choice(None, f"{own}, as --engine asks for")
    fast, problem = _make(tokenizer, expected)
    size = sum(len(text.encode()) for text in sample)
    if fast is not None and not same_ids(fast, tokenizer, sample):
        fast, problem = None, f"its ids differ on a sample of {len(sample):,} documents"
    if fast is not None:
        proof = f"ids equal to {own}'s at the beginning of each shard"
        if sample:
            proof += f", and on {len(sample):,} documents ({size:,} bytes) before"
        return Choice(fast, f"gigatoken {_version('gigatoken')}: {proof}")
    if engine == "gigatoken":
        raise DataError(
            f"gigatoken cannot take the place of {library} here: {problem}; leave --engine out"
        )
    return Choice(None, f"{own}; no gigatoken: {problem}")


def same_ids(fast: Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Tell whether two encoders give the same ids."""
    own, other = tokenizer.encode_flat(texts), fast.encode_flat(texts)
    return np.array_equal(own.lengths, other.lengths) and np.array_equal(own.tokens, other.tokens)


def _make(tokenizer: Tokenizer, expected: int) -> tuple[GigatokenEncoder | None, str]:
    try:
        return GigatokenEncoder(tokenizer, expected), ""
    except ImportError:
        return None, "it is not installed (`make venv-corpora`, or `pip install gigatoken`)"
    except Exception as error:  # noqa: BLE001 - whatever it cannot read, the library can
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__


def _without_specials(text: str | bytes) -> bytes:
    """Return a tokenizer.json without its special tokens: gigatoken would find them in text.

    Raises:
        ValueError: an added token is found in other places by gigatoken.
    """
    import orjson

    content = orjson.loads(text)
    added = content.get("added_tokens") or []
    content["added_tokens"] = kept = [token for token in added if not token.get("special")]
    if words := [str(token.get("content")) for token in kept if token.get("single_word")]:
        raise ValueError(f"it finds {words[0]!r} within words too, the library only as a whole one")
    return orjson.dumps(content)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
