"""What is wrong is named by file and line, and stops the job or is left out."""

import gzip
import json
import resource
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_mer.data.corpus import worker
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.data.tokenizers.base import FlatIds
from megatron_mer.data.tokenizers.fast import Choice
from megatron_mer.errors import DataError
from tests.data.corpus.conftest import Build, content, line

GOOD = [f"the fox number {i}" for i in range(200)]
BAD = {
    b'{"text": "a"\n': ("not JSON", "not JSON: Expecting"),
    b'{"text": "\xff"}\n': ("invalid UTF-8", "byte 10 of 13 is not UTF-8"),
    b'{"body": "a"}\n': ("missing key", "key 'text' is missing; its keys: body"),
    b'{"text": 3}\n': ("not text", "'text' is int"),
    b'{"text": null}\n': ("not text", "'text' is null"),
    b'"text"\n': ("not JSON", "a JSON str; expected an object"),
    b'{"text": "\\ud800"}\n': ("invalid UTF-8", "the text is not valid Unicode"),
    b"[" * 100_000 + b"\n": ("not JSON", "not JSON"),
}


def faults(prefix: Path) -> list[dict[str, object]]:
    lines = Path(f"{prefix}.faults.jsonl").read_text().splitlines()
    return [json.loads(fault) for fault in lines]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_stop_and_skip(build: Build, tmp_path: Path, bad: bytes) -> None:
    kind, reason = BAD[bad]
    path, good = tmp_path / "x.jsonl", list(map(line, GOOD))
    path.write_bytes(b"".join([*good[:150], bad, line(" "), b"\n", *good[150:], bad]))
    with pytest.raises(DataError, match="line 151: ") as error:
        build([path], tmp_path / "c", shard_bytes=1000)
    assert reason in str(error.value)
    result = build([path], tmp_path / "c", shard_bytes=1000, on_error="skip")
    named = [(fault["file"], fault["line"], fault["kind"]) for fault in faults(tmp_path / "c")]
    lines = {(151, kind), (152, "empty"), (204, kind)}
    assert {(at, what) for _, at, what in named} == lines
    assert {file for file, _, _ in named} == {str(path)}
    assert result.sidecar is not None
    (source,) = result.sidecar.provenance.sources
    assert (source.documents, source.skipped, source.faults) == (200, 1, 2)
    (tmp_path / "good.jsonl").write_bytes(b"".join(good))
    build([tmp_path / "good.jsonl"], tmp_path / "good")
    assert content(tmp_path / "c")[:2] == content(tmp_path / "good")[:2]


@pytest.mark.parametrize("damage", ["torn", "flipped"])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_damaged_compression(build: Build, tmp_path: Path, kind: str, damage: str) -> None:
    texts = [
        f"{text} {np.random.default_rng(at).bytes(1500).hex()}" for at, text in enumerate(GOOD)
    ]
    plain = b"".join(map(line, texts))
    level = zstandard.ZstdCompressor(write_checksum=True)
    data = bytearray(gzip.compress(plain) if kind == "gz" else level.compress(plain))
    data[-20:] = b"" if damage == "torn" else bytes(byte ^ 255 for byte in data[-20:])
    (tmp_path / f"x.{kind}").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.{kind}, line \d+: cannot be read on: .*"):
        build([tmp_path / f"x.{kind}"], tmp_path / "c")
    kept = []
    for number, piece in enumerate((4000, 50_000, 1 << 20)):
        prefix = tmp_path / f"{number}"
        build([tmp_path / f"x.{kind}"], prefix, on_error="skip", piece_bytes=piece)
        kept.append(content(prefix))
        assert faults(prefix)[-1]["kind"] == "damaged file"
    assert kept[0] == kept[1] == kept[2]
    assert 0 < IndexedDataset(tmp_path / "0").num_documents <= len(texts)


def test_a_word_that_is_too_long(build: Build, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(line("fox") + line("x" * 3_000_000) + line("dog"))
    with pytest.raises(DataError, match=r"line 2: .* cannot be cut .*; split it .*--on-error skip"):
        build([tmp_path / "x.jsonl"], tmp_path / "c", shard_bytes=1 << 30)
    result = build([tmp_path / "x.jsonl"], tmp_path / "c", shard_bytes=1 << 30, on_error="skip")
    assert result.sources[0].faults == {"too long": 1}
    assert [(fault["line"], fault["kind"]) for fault in faults(tmp_path / "c")] == [(2, "too long")]
    (tmp_path / "y.jsonl").write_bytes(line("fox") + line("dog"))
    build([tmp_path / "y.jsonl"], tmp_path / "d")
    assert content(tmp_path / "c")[:2] == content(tmp_path / "d")[:2]


def test_damaged_parquet(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"text": GOOD, "n": list(range(len(GOOD)))})
    parquet.write_table(table, path, row_group_size=50, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"x\.parquet, row 1: not a whole Parquet file"):
        build([path], tmp_path / "c")
    path.write_bytes(whole)
    group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.data_page_offset
    path.write_bytes(whole[: start + 20] + b"\xff" * 60 + whole[start + 80 :])
    with pytest.raises(DataError, match=r"x\.parquet, row 51: row group 1 is damaged"):
        build([path], tmp_path / "c")
    build([path], tmp_path / "c", on_error="skip")
    assert IndexedDataset(tmp_path / "c").num_documents == 150


def test_parquet_rows_and_columns(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"text": ["a", None, "", "fox"]}), path, row_group_size=2)
    with pytest.raises(DataError, match=r"x\.parquet, row 2: 'text' is null"):
        build([path], tmp_path / "c")
    build([path], tmp_path / "c", on_error="skip")
    assert [(fault["line"], fault["kind"]) for fault in faults(tmp_path / "c")] == [
        (2, "not text"),
        (3, "empty"),
    ]
    with pytest.raises(DataError, match=r"no column 'body'; its columns: text"):
        build([path], tmp_path / "d", text_keys=("body",))
    parquet.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"column 'text' is int64; expected strings"):
        build([path], tmp_path / "d")


def test_ids_are_never_wrapped(
    build: Build, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that gives an id beyond its vocabulary: 290 would fit uint16."""
    tokenizer = load_tokenizer(f"sentencepiece:{tokenizer_path}")
    for wrong in (290, -1, 1 << 16):

        def encode(texts: list[str], num_threads: int = 1, wrong: int = wrong) -> FlatIds:
            return FlatIds(np.array([5, wrong], np.int32), np.array([2]))

        monkeypatch.setattr(tokenizer, "encode_flat", encode)
        settings = worker.JobSettings(f"sentencepiece:{tokenizer_path}")
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "x.jsonl").write_bytes(line("a"))
        from megatron_mer.data.corpus.inputs import expand_inputs
        from megatron_mer.data.corpus.reading import Unit

        unit = Unit(0, expand_inputs([str(tmp_path / "x.jsonl")])[0])
        working = worker.UnitWorker(settings, tmp_path / "p", tokenizer, Choice(None, ""))
        with pytest.raises(DataError, match=f"token id {wrong}; the tokenizer's vocabulary has 0"):
            working.run(unit)
        assert list((tmp_path / "p").iterdir()) == []


def test_a_full_disk(build: Build, tmp_path: Path) -> None:
    """A limit on file sizes stands for it: both refuse a write in its middle."""
    (tmp_path / "x.jsonl").write_bytes(b"".join(map(line, GOOD)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(DataError, match="cannot be written: File too large"):
            build([tmp_path / "x.jsonl"], tmp_path / "out" / "c", shard_bytes=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_target_that_is_not_writable(build: Build, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(line("a"))
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(DataError, match="cannot be written"):
        build([tmp_path / "x.jsonl"], tmp_path / "file" / "c")


def test_an_input_that_changes_meanwhile(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(line("the fox"))

    def change(position: int, documents: int) -> None:
        # Once: what is read while it grows has no end.
        if path.stat().st_size == len(line("the fox")):
            with open(path, "ab") as file:
                file.write(line("one more"))

    with pytest.raises(DataError, match="changed while it was read"):
        build([path], tmp_path / "c", change)
    assert not (tmp_path / "c.idx").exists()
