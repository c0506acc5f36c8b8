"""gigatoken in a tokenizer's place: only where its ids are the same."""

import gzip
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.corpus.inputs import expand_inputs
from megatron_mer.data.corpus.parsing import ReadSettings
from megatron_mer.data.corpus.reading import Unit
from megatron_mer.data.corpus.sampling import sample_inputs
from megatron_mer.data.corpus.shards import Manifest
from megatron_mer.data.corpus.worker import JobSettings, UnitWorker
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.data.tokenizers.base import FlatIds
from megatron_mer.data.tokenizers.fast import Choice, choose_encoder, same_ids
from megatron_mer.errors import DataError
from tests.handbook import Handbook

ODD = ["", "  two  spaces\n\n\nlines\ttab ", "🦊\r\n\x01", "한국어", "a <|end_of_text|> </s> <unk>"]


@pytest.mark.parametrize("kind", ["bpe", "hf", "tiktoken"])
def test_the_same_ids_in_all_languages(
    names: Mapping[str, str], handbook: Handbook, kind: str
) -> None:
    tokenizer = load_tokenizer(names[kind])
    texts = [*ODD, *(text for texts in handbook.values() for text in texts)]
    choice = choose_encoder(tokenizer, "auto", texts[:50])
    assert choice.fast is not None, choice.reason
    assert choice.reason.startswith("gigatoken ")
    assert same_ids(choice.fast, tokenizer, texts)
    flat = choice.fast.encode_flat(texts, num_threads=2)
    np.testing.assert_array_equal(flat.tokens, tokenizer.encode_flat(texts).tokens)
    assert len(choice.fast.encode_flat([]).tokens) == 0


def test_unigram_is_left_to_its_library(names: Mapping[str, str]) -> None:
    tokenizer = load_tokenizer(names["unigram"])
    choice = choose_encoder(tokenizer, "auto", ["a"])
    assert choice.fast is None
    assert "sentencepiece" in choice.reason
    assert "no gigatoken: only BPE" in choice.reason
    with pytest.raises(DataError, match="gigatoken cannot take the place of sentencepiece here"):
        choose_encoder(tokenizer, "gigatoken", ["a"])


def test_the_library_on_request(names: Mapping[str, str]) -> None:
    choice = choose_encoder(load_tokenizer(names["hf"]), "library", [])
    assert choice.fast is None
    assert choice.reason.endswith("as --engine asks for")


def test_without_gigatoken(names: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    choice = choose_encoder(load_tokenizer(names["hf"]), "auto", ["a"])
    assert choice.fast is None
    assert "not installed" in choice.reason
    assert "pip install gigatoken" in choice.reason


def test_added_words_are_left_to_the_library(names: Mapping[str, str], tmp_path: Path) -> None:
    """gigatoken finds them within words too, perhaps first where no proof looks."""
    content = json.loads(Path(names["hf"].removeprefix("hf:")).read_text())
    number = max(content["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "special"), False)
    added = {"id": number, "content": "owl", "single_word": False, **flags}
    for single_word in (False, True):
        changed = [*content["added_tokens"], {**added, "single_word": single_word}]
        path = tmp_path / f"{single_word}.json"
        path.write_text(json.dumps({**content, "added_tokens": changed}))
        choice = choose_encoder(load_tokenizer(f"hf:{path}"), "auto", ["the fox"])
        assert (choice.fast is None) == single_word, choice.reason
    assert "finds 'owl' within words too" in choice.reason


def test_random_ids_are_refused(names: Mapping[str, str], tmp_path: Path) -> None:
    content = json.loads(Path(names["hf"].removeprefix("hf:")).read_text())
    content["model"]["dropout"] = 0.1
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"model\.dropout is 0\.1.*set it to null"):
        load_tokenizer(f"hf:{tmp_path / 't.json'}")


class Wrong:
    """Gives other ids wherever a text has a fox."""

    def __init__(self, tokenizer: object, expected: int = 0) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
        flat = self._tokenizer.encode_flat(texts)  # type: ignore[attr-defined]
        return FlatIds(flat.tokens + any("fox" in text for text in texts), flat.lengths)


def test_ids_that_differ_are_not_used(
    names: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mer.data.tokenizers import fast

    tokenizer = load_tokenizer(names["hf"])
    monkeypatch.setattr(fast, "GigatokenEncoder", Wrong)
    choice = choose_encoder(tokenizer, "auto", ["the dog", "the fox"])
    assert choice.fast is None
    assert "its ids differ on a sample of 2 documents" in choice.reason


def test_many_documents_are_expected_from_the_sample(
    names: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then batches are used from the first on, with the same ids."""
    texts = [f"fox {number:06}" for number in range(30_000)]
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "x.jsonl").write_bytes(data)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("x.jsonl", "y.jsonl.gz"):
        (file,) = expand_inputs([str(tmp_path / name)])
        sample = sample_inputs([file], ReadSettings())
        assert sample.texts == texts[: len(sample.texts)]
        # Of compressed files more is read than comes out of it.
        assert 0.4 < sample.density * file.size / len(texts) < 1.2
    tokenizer = load_tokenizer(names["hf"])
    calls: list[int] = []
    found = []
    for expected in (0, len(texts)):
        choice = choose_encoder(tokenizer, "auto", sample.texts, expected)
        assert choice.fast is not None
        monkeypatch.setattr(choice.fast, "_backend", Counted(choice.fast._backend, calls))
        found.append(choice.fast.encode_flat(texts[:1000]))
    assert calls == [1000]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_array_equal(found[0].lengths, found[1].lengths)


class Counted:
    """gigatoken, with the sizes of its batches noted."""

    def __init__(self, backend: object, calls: list[int]) -> None:
        self.encode = backend.encode  # type: ignore[attr-defined]
        self._backend, self._calls = backend, calls

    def encode_batch(self, texts: list[str], parallel: bool) -> object:
        self._calls.append(len(texts))
        return self._backend.encode_batch(texts, parallel=parallel)  # type: ignore[attr-defined]


def test_what_batches_import_starts_no_thread() -> None:
    """Else the tool could not fork its workers."""
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    program = (
        f"import os, runpy; runpy.run_path({str(tool)!r})\n"
        "import awkward; print(len(os.listdir('/proc/self/task')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(("size", "characters"), [(1 << 20, 8192), (1 << 25, 16384), (0, 32768)])
def test_the_proof_is_in_proportion_to_the_shard(
    names: Mapping[str, str], tmp_path: Path, size: int, characters: int
) -> None:
    """A pipe (size 0) has shards of the full size."""
    proven: list[int] = []

    class Counting(Wrong):
        def encode_flat(self, texts: Sequence[str], num_threads: int = 1) -> FlatIds:
            proven.append(sum(map(len, texts)))
            return super().encode_flat(texts)

    tokenizer = load_tokenizer(names["hf"])
    (tmp_path / "x.jsonl").write_text('{"text": "' + "a b " * 10_000 + '"}\n')
    (file,) = expand_inputs([str(tmp_path / "x.jsonl")])
    choice = Choice(Counting(tokenizer), "fast")  # type: ignore[arg-type]
    working = UnitWorker(JobSettings(names["hf"]), tmp_path, tokenizer, choice)
    working.run(Unit(0, replace(file, size=size)))
    assert proven == [characters, 40_000]


def test_ids_that_differ_in_a_shard(names: Mapping[str, str], tmp_path: Path) -> None:
    """The sample did not show it; the beginning of the shard does."""
    tokenizer = load_tokenizer(names["hf"])
    for name, text in (("a", "the dog"), ("b", "the fox")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n')
    (tmp_path / "parts").mkdir()
    settings, choice = JobSettings(names["hf"]), Choice(Wrong(tokenizer), "fast")
    working = UnitWorker(settings, tmp_path / "parts", tokenizer, choice)
    encoders = []
    for number, file in enumerate(expand_inputs([str(tmp_path / "*.jsonl")])):
        unit = Unit(number, file)
        working.run(unit)
        stem = tmp_path / "parts" / f"{number:05d}-000000"
        found = Manifest.read(stem, settings.key(tokenizer, True, unit), 2)
        assert found is not None
        encoders.append(found.encoder)
        ids = np.fromfile(stem.with_name(stem.name + ".tokens"), np.uint16)
        text = ("the dog", "the fox")[number]
        assert ids.tolist() == [*tokenizer.encode(text).tolist(), tokenizer.eod_id]
    assert encoders[0] == "fast"
    assert "gigatoken's ids differ in this shard" in encoders[1]
