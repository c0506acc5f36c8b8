"""Vocabularies of SentencePiece and tiktoken in the form that transformers reads."""

import io
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.data.tokenizers.tokenizer_json import tokenizer_json
from tests.handbook import Handbook

ODD = [
    "",
    " ",
    "  two  spaces\n\n\nlines\ttab ",
    "\u3000\u00a0 ½ ﬁ ① 𝔸 e\u0301",
    "🤖👍🏽 \u200b\x01 한국어",
]


def converted(spec: str, folder: Path) -> str:
    text = tokenizer_json(load_tokenizer(spec))
    assert text is not None
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    end = load_tokenizer(spec).piece(load_tokenizer(spec).eod_id)
    return f"hf:{folder / 'tokenizer.json'}#{end.name if end else ''}"


def same_ids_and_text(spec: str, other: str, texts: list[str]) -> None:
    ours, theirs = load_tokenizer(spec), load_tokenizer(other)
    assert (ours.vocab_size, ours.eod_id) == (theirs.vocab_size, theirs.eod_id)
    mine, found = ours.encode_batch(texts), theirs.encode_batch(texts)
    for text, ids, others in zip(texts, mine, found, strict=True):
        assert ids.tolist() == others.tolist(), text[:200]
        if ours.decode(ids).count("\u2047") == 0:  # SentencePiece's word for what is unknown
            assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe", "tiktoken"])
def test_five_languages_have_the_same_ids(
    names: Mapping[str, str], handbook: Handbook, tmp_path: Path, kind: str
) -> None:
    texts = [*ODD, *itertools.chain(*handbook.values())]
    same_ids_and_text(names[kind], converted(names[kind], tmp_path), texts)


@pytest.mark.parametrize("scheme", ["r50k_base", "cl100k_base", "o200k_base"])
def test_each_scheme_of_tiktoken_splits_alike(
    names: Mapping[str, str], handbook: Handbook, tmp_path: Path, scheme: str
) -> None:
    spec = names["tiktoken"].partition("#")[0] + f"#{scheme}"
    numbers = ["a1234567 '12345'LL don't  I'M \r\n\r\n  x\n  ", "ǅ ab/cd//\n HTTPServer's"]
    texts = [*ODD, *numbers, *(text for language in handbook.values() for text in language[:12])]
    same_ids_and_text(spec, converted(spec, tmp_path), texts)


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("rule", "spaces", "byte_fallback"),
    [
        ("nmt_nfkc", "prefix, no extra", False),  # SentencePiece's own defaults
        ("identity", "prefix", True),  # Llama-2's
        ("identity", "prefix, no extra", True),
        ("nmt_nfkc", "as they are", False),
    ],
)
def test_each_setting_of_sentencepiece_is_kept(
    handbook: Handbook, tmp_path: Path, model_type: str, rule: str, spaces: str, byte_fallback: bool
) -> None:
    texts = [*ODD, *(text for language in handbook.values() for text in language[:12])]
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(texts[5:]),
        model_writer=model,
        model_type=model_type,
        vocab_size=1600,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        byte_fallback=byte_fallback,
        add_dummy_prefix=spaces != "as they are",
        remove_extra_whitespaces=spaces == "prefix, no extra",
        minloglevel=2,
    )
    path = tmp_path / "some.model"
    path.write_bytes(model.getvalue())
    spec = f"sentencepiece:{path}"
    same_ids_and_text(spec, converted(spec, tmp_path), texts)


def test_a_kind_that_the_library_lacks_is_not_written(tmp_path: Path) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b c d"] * 3),
        model_writer=model,
        model_type="word",
        vocab_size=7,
        minloglevel=2,
    )
    path = tmp_path / "word.model"
    path.write_bytes(model.getvalue())
    assert tokenizer_json(load_tokenizer(f"sentencepiece:{path}")) is None
