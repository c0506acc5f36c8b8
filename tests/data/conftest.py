"""A small tokenizer that the tests of this folder share."""

import io
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

TEXT = "the quick brown fox jumps over the lazy dog and the slow cat sleeps near the warm stove"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-fallback model of 290 ids."""
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT] * 3),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tok.model"
    path.write_bytes(model.getvalue())
    return path
