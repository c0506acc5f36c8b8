"""Text to tokens, for any number of workers."""

import gzip
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data import corpus_builder, jsonl
from megatron_mer.data.corpus_builder import build_corpus
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.errors import DataError

TEXTS = [f"the fox number {i}\nsleeps " + "近く " * (i % 7) for i in range(200)]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    def line(text: str) -> bytes:
        return json.dumps({"text": text, "meta": {"n": len(text)}}).encode() + b"\n"

    (tmp_path / "a.jsonl").write_bytes(b"".join(map(line, [*TEXTS[:120], "", " \n"])))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(map(line, TEXTS[120:]))))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]


@pytest.fixture
def name(tokenizer_path: Path) -> str:
    return f"sentencepiece:{tokenizer_path}"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl.read_pieces, "__defaults__", (500,))


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_come_back(
    inputs: list[Path], tmp_path: Path, name: str, append_eod: bool
) -> None:
    sidecar = build_corpus(inputs, tmp_path / "out" / "c", name, append_eod=append_eod)
    dataset, tokenizer = IndexedDataset(tmp_path / "out" / "c"), load_tokenizer(name)
    dataset.verify()
    assert dataset.dtype == np.uint16
    assert dataset.num_documents == sidecar.documents == len(TEXTS)
    for index, text in enumerate(TEXTS):
        ids = dataset.document(index).tolist()
        if append_eod:
            assert ids.pop() == tokenizer.eod_id
        assert tokenizer.decode(ids) == text


def test_sidecar_describes_tokenizer_and_sources(
    inputs: list[Path], tmp_path: Path, name: str
) -> None:
    build_corpus(inputs, tmp_path / "c", name)
    sidecar = IndexedDataset(tmp_path / "c").sidecar
    assert sidecar is not None
    found, tokenizer = sidecar.provenance, load_tokenizer(name)
    assert (found.tokenizer, found.fingerprint) == ("sentencepiece", tokenizer.fingerprint)
    assert (found.vocab_size, found.eod_id, found.append_eod) == (290, 2, True)
    assert [source.file for source in found.sources] == ["a.jsonl", "b.jsonl.gz"]
    assert [(source.documents, source.skipped) for source in found.sources] == [(120, 2), (80, 0)]
    assert sum(s.text_bytes for s in found.sources) == sum(len(t.encode()) for t in TEXTS)
    digest = hashlib.sha256(gzip.decompress(inputs[1].read_bytes())).hexdigest()
    assert found.sources[1].sha256 == digest
    tokens = IndexedDataset(tmp_path / "c").tokens(0, sidecar.tokens)
    assert sidecar.max_token_id == tokens.max()


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    inputs: list[Path], tmp_path: Path, name: str, workers: int
) -> None:
    build_corpus(inputs, tmp_path / "one", name)
    calls: list[tuple[int, int]] = []
    build_corpus(
        inputs,
        tmp_path / "many",
        name,
        workers=workers,
        progress=lambda position, written: calls.append((position, written)),
    )
    for suffix in (".bin", ".idx", ".json"):
        one, many = (Path(f"{tmp_path / stem}{suffix}") for stem in ("one", "many"))
        assert one.read_bytes() == many.read_bytes()
    assert calls == sorted(calls)
    assert calls[-1] == (sum(path.stat().st_size for path in inputs), len(TEXTS))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_everything_and_leaves_nothing(
    inputs: list[Path], tmp_path: Path, name: str, workers: int
) -> None:
    with open(inputs[0], "ab") as file:
        file.write(b'{"txt": "x"}\n{"text": "fine"}\n[]\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 123: key 'text' is missing"):
        build_corpus(inputs, tmp_path / "out" / "c", name, workers=workers)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_worker_that_dies_is_an_error(
    inputs: list[Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(ProcessPoolExecutor):
        def submit(self, function, *arguments):  # type: ignore[no-untyped-def]
            return super().submit(os._exit, 3)

    monkeypatch.setattr(corpus_builder, "ProcessPoolExecutor", Deadly)
    with pytest.raises(DataError, match="a worker process died"):
        build_corpus(inputs, tmp_path / "out" / "c", name, workers=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_errors(inputs: list[Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="workers 0"):
        build_corpus(inputs, tmp_path / "c", name, workers=0)
    with pytest.raises(DataError, match="named twice"):
        build_corpus([inputs[0], inputs[0]], tmp_path / "c", name)
    with pytest.raises(DataError, match="nowhere"):
        build_corpus([tmp_path / "nowhere"], tmp_path / "c", name)
    (tmp_path / "empty").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document was written"):
        build_corpus([tmp_path / "empty"], tmp_path / "c", name)
    build_corpus(inputs, tmp_path / "c", name)
    with pytest.raises(DataError, match="already there"):
        build_corpus(inputs, tmp_path / "c", name)
