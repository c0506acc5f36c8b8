"""Text to tokens, for any number of workers."""

import gzip
import hashlib
import json
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_mer.data.corpus import assembly, pool, streams
from megatron_mer.data.corpus import job as job_module
from megatron_mer.data.corpus.partition import Partition
from megatron_mer.data.dataset_merge import DatasetMerge
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.errors import DataError
from tests.data.corpus.conftest import Build, content, line

TEXTS = [f"the fox number {i}\nsleeps " + "近く " * (i % 7) for i in range(600)]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    data = [line(text, meta={"n": 1}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*data[:400], line(""), b"\n", line(" \n")]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(data[400:500])))
    packed = [zstandard.compress(b"".join(data[at : at + 50])) for at in (500, 550)]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(packed))  # frames follow each other
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst"]


@pytest.fixture
def name(tokenizer_path: Path) -> str:
    return f"sentencepiece:{tokenizer_path}"


@pytest.fixture
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are given to worker processes too."""
    monkeypatch.setattr(job_module, "INLINE_BYTES", 0)


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_come_back(
    build: Build, inputs: list[Path], tmp_path: Path, name: str, append_eod: bool
) -> None:
    sidecar = build(inputs, tmp_path / "out" / "c", append_eod=append_eod).sidecar
    dataset, tokenizer = IndexedDataset(tmp_path / "out" / "c"), load_tokenizer(name)
    dataset.verify()
    assert sidecar is not None
    assert dataset.dtype == np.uint16
    assert dataset.num_documents == sidecar.documents == len(TEXTS)
    for index, text in enumerate(TEXTS):
        ids = dataset.document(index).tolist()
        if append_eod:
            assert ids.pop() == tokenizer.eod_id
        assert tokenizer.decode(ids) == text
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["c.bin", "c.faults.jsonl", "c.idx", "c.json"]


def test_sidecar_describes_tokenizer_and_sources(
    build: Build, inputs: list[Path], tmp_path: Path, name: str
) -> None:
    result = build(inputs, tmp_path / "c")
    sidecar = IndexedDataset(tmp_path / "c").sidecar
    assert sidecar is not None
    assert sidecar == result.sidecar
    found, tokenizer = sidecar.provenance, load_tokenizer(name)
    assert (found.tokenizer, found.fingerprint) == ("sentencepiece", tokenizer.fingerprint)
    assert (found.vocab_size, found.eod_id, found.append_eod) == (290, 2, True)
    assert [source.file for source in found.sources] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    counted = [(source.documents, source.skipped, source.faults) for source in found.sources]
    assert counted == [(400, 2, 0), (100, 0, 0), (100, 0, 0)]
    assert sum(s.text_bytes for s in found.sources) == sum(len(t.encode()) for t in TEXTS)
    assert sum(s.tokens for s in found.sources) == sidecar.tokens
    plain = (
        inputs[0].read_bytes(),  # several shards
        gzip.decompress(inputs[1].read_bytes()),
        b"".join(line(text, meta={"n": 1}) for text in TEXTS[500:]),
    )
    sums = [source.sha256 for source in found.sources]
    assert sums == [hashlib.sha256(data).hexdigest() for data in plain]
    assert all("no gigatoken: only BPE" in source.encoder for source in found.sources)
    tokens = IndexedDataset(tmp_path / "c").tokens(0, sidecar.tokens)
    assert sidecar.max_token_id == tokens.max()


@pytest.mark.usefixtures("_processes")
def test_any_number_of_workers_and_any_sizes_give_the_same_bytes(
    build: Build, inputs: list[Path], tmp_path: Path
) -> None:
    build(inputs, tmp_path / "one")
    calls: list[tuple[int, int]] = []
    build(inputs, tmp_path / "many", lambda *now: calls.append(now), workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert calls == sorted(calls)
    assert calls[-1] == (sum(path.stat().st_size for path in inputs), len(TEXTS))
    for number, sizes in enumerate([(2999, 1), (7777, 64), (1 << 20, 1 << 20)]):
        build(inputs, tmp_path / f"s{number}", shard_bytes=sizes[0], piece_bytes=sizes[1])
        assert content(tmp_path / "one") == content(tmp_path / f"s{number}")


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "pipe"])
def test_one_worker_shows_progress_and_appends_meanwhile(
    build: Build, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single large input: whatever is read of it is told, and shards go into the dataset."""
    texts = [np.random.default_rng(number).bytes(200).hex() for number in range(300)]
    path, data = tmp_path / f"x.{kind}", b"".join(map(line, texts))
    if kind == "pipe":
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
    elif kind == "parquet":
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=50)
    else:
        pack = gzip.compress if kind == "gz" else zstandard.compress
        starts = range(0, len(data), 10_000)
        path.write_bytes(b"".join(pack(data[start : start + 10_000]) for start in starts))
    monkeypatch.setattr(streams, "MOST_CHUNK", 1 << 12)
    appended: list[int] = []
    append = assembly.Assembly._append
    monkeypatch.setattr(
        assembly.Assembly, "_append", lambda *given: (append(*given), appended.append(1))[0]
    )
    calls: list[tuple[int, int, int]] = []
    build([path], tmp_path / "c", lambda *now: calls.append((*now, len(appended))))
    assert calls == sorted(calls)
    columns = [len(set(column)) for column in zip(*calls, strict=True)]
    assert min(columns[kind == "pipe" :]) > 2, calls


@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_everything_and_is_named_by_its_line_in_the_file(
    build: Build, inputs: list[Path], tmp_path: Path, workers: int
) -> None:
    with open(inputs[0], "ab") as file:
        file.write(b'{"txt": "x"}\n{"text": "fine"}\n[]\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 404: key 'text' is missing"):
        build(inputs, tmp_path / "out" / "c", workers=workers)
    left = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert left <= {".parts"}  # finished shards, nothing else


@pytest.mark.usefixtures("_processes")
def test_a_worker_that_dies_is_an_error(
    build: Build, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(ProcessPoolExecutor):
        def submit(self, function, *arguments):  # type: ignore[no-untyped-def]
            return super().submit(os._exit, 3)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Deadly)
    with pytest.raises(DataError, match="a worker process died"):
        build(inputs, tmp_path / "out" / "c", workers=2)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_of_a_job_are_merged_to_the_whole(
    build: Build, inputs: list[Path], tmp_path: Path, count: int
) -> None:
    build(inputs, tmp_path / "whole")
    results = [
        build(inputs, tmp_path / "c", partition=Partition(index, count)) for index in range(count)
    ]
    prefixes = sorted(str(path)[:-4] for path in tmp_path.glob("c.part-*.idx"))
    assert prefixes == [result.prefix for result in results if result.sidecar]
    assert len(prefixes) > 1
    DatasetMerge(prefixes, tmp_path / "merged").write()
    assert content(tmp_path / "merged")[:2] == content(tmp_path / "whole")[:2]


def test_a_part_without_work_writes_nothing(build: Build, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(line("the fox"))
    results = [
        build([tmp_path / "x.jsonl"], tmp_path / "c", partition=Partition(i, 4)) for i in range(4)
    ]
    assert sum(result.sidecar is not None for result in results) == 1
    assert len(list(tmp_path.glob("c.*"))) == 3


def test_a_part_without_documents_is_a_success(build: Build, tmp_path: Path) -> None:
    """The parts after it can be merged, and nothing of an earlier dataset is taken for its own."""
    texts = [["the fox"], ["", " "], ["the dog"]]
    for number, given in enumerate(texts):
        (tmp_path / f"{number}.jsonl").write_bytes(b"".join(map(line, given)).ljust(40))
    inputs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    (stale := build(inputs[:1], tmp_path / "c.part-00001-of-00003"))
    assert stale.sidecar is not None
    given = {"overwrite": True}
    results = [
        build(inputs, tmp_path / "c", partition=Partition(part, 3), **given) for part in range(3)
    ]
    assert [result.sidecar is not None for result in results] == [True, False, True]
    left = sorted(path.name for path in tmp_path.glob("c.part-00001*"))
    assert left == ["c.part-00001-of-00003.faults.jsonl"]
    build(inputs, tmp_path / "whole")
    prefixes = sorted(str(path)[:-4] for path in tmp_path.glob("c.part-*.idx"))
    DatasetMerge(prefixes, tmp_path / "merged").write()
    assert content(tmp_path / "merged")[:2] == content(tmp_path / "whole")[:2]


def test_a_job_without_documents_leaves_only_the_account_of_them(
    build: Build, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_bytes(line("") + b"broken\n")
    with pytest.raises(DataError, match=r"2 were empty or left out, see .*c\.faults\.jsonl"):
        build([tmp_path / "x.jsonl"], tmp_path / "out" / "c", on_error="skip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.faults.jsonl"]
    assert len((tmp_path / "out" / "c.faults.jsonl").read_text().splitlines()) == 2


def test_no_end_is_needed_where_none_is_written(build: Build, tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"fox": 0, "?": 1}, "unk_token": "?"}
    (tmp_path / "t.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (tmp_path / "x.jsonl").write_bytes(line("fox") + line("dog"))
    given = {"tokenizer": f"hf:{tmp_path / 't.json'}"}
    with pytest.raises(DataError, match="which token ends a document"):
        build([tmp_path / "x.jsonl"], tmp_path / "c", **given)
    build([tmp_path / "x.jsonl"], tmp_path / "c", append_eod=False, **given)
    dataset = IndexedDataset(tmp_path / "c")
    assert dataset.tokens(0, 2).tolist() == [0, 1]
    assert dataset.sidecar is not None
    assert dataset.sidecar.provenance.eod_id == -1


def test_other_errors(build: Build, inputs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="workers 0"):
        build(inputs, tmp_path / "c", workers=0)
    with pytest.raises(DataError, match="worker memory of 1 MiB; at least 64"):
        build(inputs, tmp_path / "c", worker_memory=1 << 20)
    with pytest.raises(DataError, match="named twice"):
        build([inputs[0], inputs[0]], tmp_path / "c")
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        build([tmp_path / "nowhere"], tmp_path / "c")
    (tmp_path / "empty").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"no document was written.*; 1 were empty"):
        build([tmp_path / "empty"], tmp_path / "c")
    build(inputs, tmp_path / "c")
    with pytest.raises(DataError, match="already there"):
        build(inputs, tmp_path / "c")
    before = content(tmp_path / "c")
    build(inputs[:1], tmp_path / "c", overwrite=True)
    assert content(tmp_path / "c") != before
