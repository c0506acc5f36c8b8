"""Tokenizers behind one protocol, named by a string `kind:place`.

`sentencepiece:PATH`, a SentencePiece model; `hf:PATH`, a Hugging Face `tokenizer.json`;
`tiktoken:PATH`, a file of mergeable ranks such as Llama-3's `tokenizer.model`. The same name serves
preprocessing, training and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_mer.data.tokenizers.base import Encoder, FlatIds, Tokenizer
from megatron_mer.data.tokenizers.huggingface import HuggingFaceTokenizer
from megatron_mer.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_mer.data.tokenizers.tiktoken import TiktokenTokenizer
from megatron_mer.errors import ConfigError

__all__ = ["KINDS", "Encoder", "FlatIds", "Tokenizer", "load_tokenizer"]

KINDS: dict[str, Callable[[str, bool], Tokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "hf": HuggingFaceTokenizer,
    "tiktoken": lambda place, needs_end: TiktokenTokenizer(place),  # each scheme names its end
}


def load_tokenizer(spec: str, needs_end: bool = True) -> Tokenizer:
    """Load a tokenizer by its name.

    Args:
        spec: `kind:place`, such as `sentencepiece:build/tokenizer.model`.
        needs_end: whether it is an error that nothing tells which id ends a document.

    Raises:
        ConfigError: the name has no known kind or no place.
        DataError: the model cannot be read.
    """
    kind, separator, place = spec.partition(":")
    if not separator or not place or kind not in KINDS:
        allowed = ", ".join(f"{known}:PATH" for known in KINDS)
        raise ConfigError(f"tokenizer {spec!r}; allowed: {allowed}")
    return KINDS[kind](place, needs_end)
