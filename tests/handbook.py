"""Real text in five languages, and small tokenizers of every kind made from it."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_mer.data.tokenizers.tiktoken import LLAMA3

DATA = Path(__file__).parents[1] / "examples" / "quickstart" / "data"
LANGUAGES = ("en", "fr", "de", "ar", "ja")
DOCUMENTS = 60
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>"]
VOCAB_SIZE = 1500

Handbook = Mapping[str, list[str]]
"""Texts by language."""


@pytest.fixture(scope="session")
def handbook() -> Handbook:
    """The first documents of the quick start's corpora."""
    found = {}
    for language in LANGUAGES:
        with gzip.open(DATA / f"{language}.jsonl.gz") as file:
            lines = [line for _, line in zip(range(DOCUMENTS), file, strict=False)]
        found[language] = [json.loads(line)["text"] for line in lines]
    return found


@pytest.fixture(scope="session")
def bpe_path(handbook: Handbook, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE `tokenizer.json` that splits text as Llama-3's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((text for texts in handbook.values() for text in texts), trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def ranks_path(bpe_path: Path) -> Path:
    """The same vocabulary as Llama-3's `tokenizer.model` has it: a token in base64 and its rank."""
    from gigatoken import Tokenizer

    tokens = list(Tokenizer(bpe_path).vocab.values())[len(SPECIALS) :]
    path = bpe_path.with_name("tokenizer.model")
    lines = (f"{base64.b64encode(token).decode()} {at}\n" for at, token in enumerate(tokens))
    path.write_text("".join(lines))
    return path


def train_sentencepiece(handbook: Handbook, model_type: str) -> bytes:
    """A model that loses nothing, as `tools/train_tokenizer.py` makes them."""
    from sentencepiece import SentencePieceTrainer

    lines = [
        line for texts in handbook.values() for text in texts[:20] for line in text.split("\n")
    ]
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def names(
    handbook: Handbook, bpe_path: Path, ranks_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, str]:
    """Tokenizers by what they are: unigram, bpe, hf, tiktoken."""
    found = {"hf": f"hf:{bpe_path}", "tiktoken": f"tiktoken:{ranks_path}#llama3"}
    for model_type in ("unigram", "bpe"):
        path = tmp_path_factory.mktemp("sentencepiece") / f"{model_type}.model"
        path.write_bytes(train_sentencepiece(handbook, model_type))
        found[model_type] = f"sentencepiece:{path}"
    return found
