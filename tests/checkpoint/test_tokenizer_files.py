"""A folder's tokenizer, as transformers loads it."""

import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_mer.checkpoint.huggingface.tokenizer_files import TokenizerFiles, own_tokenizer
from megatron_mer.data.tokenizers import load_tokenizer
from tests.handbook import Handbook


@pytest.mark.parametrize("kind", ["unigram", "bpe", "hf", "tiktoken"])
def test_auto_tokenizer_gives_our_ids(
    names: Mapping[str, str], handbook: Handbook, tmp_path: Path, kind: str
) -> None:
    type_, _, place = names[kind].partition(":")
    source, _, scheme = place.partition("#")
    alone = shutil.copy(source, tmp_path / Path(source).name)
    spec = f"{type_}:{alone}#{scheme}".removesuffix("#")
    ours, folder = load_tokenizer(spec), tmp_path / "folder"
    folder.mkdir()
    list(TokenizerFiles.of(spec).write(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == ours.eod_id
    for text in itertools.chain(*(texts[:10] for texts in handbook.values())):
        ids = ours.encode(text).tolist()
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text
    again = own_tokenizer(folder, spec)
    assert again is not None
    assert again.fingerprint == ours.fingerprint
