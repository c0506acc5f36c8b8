"""Tokenizers by name."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from megatron_mer.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mer.errors import ConfigError, DataError

TEXTS = [
    "the quick fox",
    "  two  spaces\n\nlines\ttab ",
    "第 12 章 高度な管理",
    "فصل ١٢. مُتقدّم",
    "",
    "🦊\r\n",
]


def test_encodes_and_decodes_without_loss(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{tokenizer_path}")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod_id) == ("sentencepiece", 290, 2)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert not np.isin(ids, [0, 1, 2]).any()
        assert tokenizer.decode(ids) == text


def test_bytes_of_documents_are_those_of_their_text(tokenizer_path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{tokenizer_path}")
    row = [tokenizer.eod_id]
    for text in TEXTS:
        row += [*tokenizer.encode(text).tolist(), tokenizer.eod_id]
    wanted = sum(len(text.encode()) for text in TEXTS)
    assert tokenizer.num_bytes(np.array([row])) == wanted
    # Cut into two rows that share an id, the first of which counts nothing.
    half = len(row) // 2 + 1
    parts = (np.array([row[:half]]), np.array([row[half - 1 :]]))
    assert sum(tokenizer.num_bytes(part) or 0 for part in parts) == wanted


def test_bytes_of_a_model_that_adds_a_space_and_knows_not_all(tmp_path: Path) -> None:
    SentencePieceTrainer.Train(
        sentence_iterator=iter(["one two three", "two one three", "three two one"] * 5),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(f"sentencepiece:{tmp_path / 'plain.model'}")
    one = tokenizer.encode("one two").tolist()
    row = np.array([[tokenizer.eod_id, *one, tokenizer.eod_id, *one]])
    assert tokenizer.num_bytes(row) == 2 * len("one two")
    assert tokenizer.num_bytes(row[:, 1:]) == len("one two") * 2 - len("one"[: _first(tokenizer)])
    unknown = np.array([[tokenizer.eod_id, *tokenizer.encode("one \u65e5")]])
    assert tokenizer.num_bytes(unknown) is None


def _first(tokenizer: Tokenizer) -> int:
    """Letters of "one" in the first id of a text that begins with it."""
    return len(tokenizer.decode(tokenizer.encode("one two")[:1]))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_batch_gives_the_same_ids(tokenizer_path: Path, num_threads: int) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{tokenizer_path}")
    batch = tokenizer.encode_batch(TEXTS * 20, num_threads)
    for text, ids in zip(TEXTS * 20, batch, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_fingerprint_is_the_files_content(tokenizer_path: Path, tmp_path: Path) -> None:
    data = tokenizer_path.read_bytes()
    (tmp_path / "moved.model").write_bytes(data)
    tokenizer = load_tokenizer(f"sentencepiece:{tmp_path / 'moved.model'}")
    assert tokenizer.fingerprint == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["tok.model", "sentencepiece:", "gpt:x", ":x", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer '{name}'; allowed: sentencepiece:PATH"):
        load_tokenizer(name)


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.model: cannot be read: No such file"):
        load_tokenizer(f"sentencepiece:{tmp_path / 'no.model'}")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"x\.model: not a SentencePiece model"):
        load_tokenizer(f"sentencepiece:{tmp_path / 'x.model'}")


def test_a_model_without_an_end_id(tmp_path: Path) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(["a b c d"] * 9),
        model_writer=model,
        vocab_size=7,
        eos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "x.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="no end-of-sentence piece"):
        load_tokenizer(f"sentencepiece:{tmp_path / 'x.model'}")


def test_ids_and_texts_that_cannot_be(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(f"sentencepiece:{tokenizer_path}")
    for ids in ([5, 290], [-1]):
        with pytest.raises(DataError, match="the vocabulary has 0 to 289"):
            tokenizer.decode(ids)
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_reading_data_imports_no_torch_and_no_tokenizer_library() -> None:
    program = (
        "import sys, megatron_mer.data, megatron_mer.data.corpus.job;"
        "assert not {'torch', 'sentencepiece', 'tokenizers', 'tiktoken'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)
