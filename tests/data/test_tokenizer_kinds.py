"""Tokenizers of Hugging Face and tiktoken behind the protocol that SentencePiece's has too."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.data.tokenizers.tiktoken import LLAMA3_RANKS, SCHEMES
from megatron_mer.errors import DataError
from tests.handbook import SPECIALS, VOCAB_SIZE, Handbook

KINDS = ("unigram", "bpe", "hf", "tiktoken")
ODD = [
    "",
    "  two  spaces\n\n\nlines\ttab ",
    "🦊\r\n\x01",
    "한국어",
    "a <|end_of_text|> </s> b",
    "x" * 500,
]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_in_any_language(
    names: Mapping[str, str], handbook: Handbook, kind: str
) -> None:
    tokenizer = load_tokenizer(names[kind])
    texts = [*ODD, *(text for texts in handbook.values() for text in texts[:20])]
    flat = tokenizer.encode_flat(texts)
    row = [tokenizer.eod_id]
    for text, ids in zip(texts, flat.split(), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod_id not in ids  # what looks like a control token is text
        row += [*ids.tolist(), tokenizer.eod_id]
    assert 0 <= flat.tokens.min() <= flat.tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(row) == "".join(texts)
    assert tokenizer.num_bytes(np.array([row])) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_text(names: Mapping[str, str], handbook: Handbook, kind: str) -> None:
    tokenizer = load_tokenizer(names[kind])
    for text in [*ODD[1:], *(texts[0] for texts in handbook.values())]:
        pieces = [tokenizer.piece(int(number)) for number in tokenizer.encode(text)]
        whole = b"".join(piece.text for piece in pieces if piece).decode()
        assert whole.removeprefix(" ") == text.removeprefix(" ")
    end = tokenizer.piece(tokenizer.eod_id)
    assert end is not None
    assert end.text == end.name.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_batches_change_nothing(
    names: Mapping[str, str], handbook: Handbook, kind: str
) -> None:
    tokenizer = load_tokenizer(names[kind])
    texts = [*ODD, *handbook["ja"][:10]]
    batch = tokenizer.encode_batch(texts, num_threads=2)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert len(tokenizer.encode_flat([]).split()) == 0
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(DataError, match=f"vocabulary has 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([tokenizer.vocab_size])


def test_huggingface_and_tiktoken_agree(names: Mapping[str, str], handbook: Handbook) -> None:
    """The same vocabulary: its special tokens come first in one and last in the other."""
    hf, tiktoken = load_tokenizer(names["hf"]), load_tokenizer(names["tiktoken"])
    assert (hf.vocab_size, hf.eod_id) == (VOCAB_SIZE, 1)
    ranks = VOCAB_SIZE - len(SPECIALS)
    assert (tiktoken.vocab_size, tiktoken.eod_id) == (ranks + 256, ranks + 1)
    for text in [*handbook["en"][:20], *handbook["ar"][:20]]:
        np.testing.assert_array_equal(hf.encode(text) - len(SPECIALS), tiktoken.encode(text))


def test_the_libraries_own_ids(bpe_path: Path, handbook: Handbook) -> None:
    from tokenizers import Tokenizer

    own, tokenizer = Tokenizer.from_file(str(bpe_path)), load_tokenizer(f"hf:{bpe_path.parent}")
    for text in handbook["fr"]:
        assert own.encode(text, add_special_tokens=False).ids == tokenizer.encode(text).tolist()
    assert tokenizer.fingerprint == hashlib.sha256(bpe_path.read_bytes()).hexdigest()


def changed(path: Path, target: Path, **content: object) -> Path:
    target.write_text(json.dumps(json.loads(path.read_text()) | content))
    return target


def test_which_token_ends_a_document(bpe_path: Path, tmp_path: Path) -> None:
    assert load_tokenizer(f"hf:{bpe_path}#<|begin_of_text|>").eod_id == 0
    with pytest.raises(DataError, match=r"has no token '<end>' to end documents"):
        load_tokenizer(f"hf:{bpe_path}#<end>")
    added = json.loads(bpe_path.read_text())["added_tokens"]
    vocabulary = json.loads(bpe_path.read_text())["model"]
    for token in added:
        renamed = f"<{token['id']}>"
        vocabulary["vocab"][renamed] = vocabulary["vocab"].pop(token["content"])
        token["content"] = renamed
    path = changed(bpe_path, tmp_path / "x.json", added_tokens=added, model=vocabulary)
    with pytest.raises(
        DataError, match=r"which token ends a document\? .* none of .*hf:PATH#TOKEN"
    ):
        load_tokenizer(f"hf:{path}")
    config = tmp_path / "tokenizer_config.json"
    for stated in ("<1>", {"content": "<1>"}):
        config.write_text(json.dumps({"eos_token": stated}))
        assert load_tokenizer(f"hf:{path}").eod_id == 1


def test_settings_of_the_file_that_change_ids_are_off(
    bpe_path: Path, tmp_path: Path, handbook: Handbook
) -> None:
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    path = changed(bpe_path, tmp_path / "t.json", truncation=truncation)
    text = handbook["en"][0]
    ids = load_tokenizer(f"hf:{path}").encode(text)
    np.testing.assert_array_equal(ids, load_tokenizer(f"hf:{bpe_path}").encode(text))


def test_schemes_are_those_of_the_library() -> None:
    from tiktoken_ext import openai_public

    source = inspect.getsource(openai_public.cl100k_base) + openai_public.r50k_pat_str
    for name in ("r50k_base", "cl100k_base"):
        assert SCHEMES[name].pattern in source
    source = inspect.getsource(openai_public.o200k_base)
    parts = re.findall(r'r"""(.*?)"""', source)
    assert SCHEMES["o200k_base"].pattern == "|".join(parts)


def test_tiktoken_schemes(ranks_path: Path, tmp_path: Path) -> None:
    llama = load_tokenizer(f"tiktoken:{ranks_path}#llama3")
    scheme = tmp_path / "own.json"
    special = {"<end>": llama.vocab_size - 256}
    scheme.write_text(
        json.dumps({"pattern": r"\S+|\s+", "special_tokens": special, "eod": "<end>"})
    )
    own = load_tokenizer(f"tiktoken:{ranks_path}#{scheme}")
    assert (own.vocab_size, own.eod_id) == (llama.vocab_size - 255, llama.vocab_size - 256)
    assert own.fingerprint != llama.fingerprint
    with pytest.raises(DataError, match=r"'tokenizer' is no known scheme; allowed: .*llama3, r50k"):
        load_tokenizer(f"tiktoken:{ranks_path}")
    scheme.write_text(json.dumps({"pattern": "x", "special_tokens": {}, "eod": "<end>"}))
    with pytest.raises(DataError, match="eod '<end>' is not among its special_tokens"):
        load_tokenizer(f"tiktoken:{ranks_path}#{scheme}")
    scheme.write_text("{}")
    with pytest.raises(DataError, match="no tiktoken scheme"):
        load_tokenizer(f"tiktoken:{ranks_path}#{scheme}")


def test_llama_3_is_known_by_its_size(tmp_path: Path) -> None:
    import base64

    tokens = [bytes([at]) for at in range(256)]
    tokens += [bytes([at // 256 % 256, at % 256, 0]) for at in range(65_536)]
    tokens += [bytes([at // 256 % 256, at % 256, 1]) for at in range(LLAMA3_RANKS - len(tokens))]
    lines = (f"{base64.b64encode(token).decode()} {at}" for at, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tokenizer = load_tokenizer(f"tiktoken:{tmp_path / 'tokenizer.model'}")
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (128_256, 128_001)


@pytest.mark.parametrize("kind", ["hf", "tiktoken"])
def test_files_that_are_none(tmp_path: Path, kind: str, names: Mapping[str, str]) -> None:
    with pytest.raises(DataError, match=r"no\.json: cannot be read: No such file"):
        load_tokenizer(f"{kind}:{tmp_path / 'no.json'}")
    (tmp_path / "x.json").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"x\.json.*: (not a Hugging|no tiktoken vocabulary)"):
        load_tokenizer(f"{kind}:{tmp_path / 'x.json'}")
    with pytest.raises(DataError, match=r"sentencepiece:PATH|not a Hugging"):
        load_tokenizer(names["unigram"].replace("sentencepiece:", f"{kind}:"))
    with pytest.raises(DataError, match="tiktoken:PATH"):
        load_tokenizer(names["tiktoken"].replace("tiktoken:", "sentencepiece:").split("#")[0])
