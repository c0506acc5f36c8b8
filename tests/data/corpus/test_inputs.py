"""Every kind of input gives the same documents."""

import gzip
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from megatron_mer.data.corpus.inputs import expand_inputs
from megatron_mer.errors import DataError
from tests.data.corpus.conftest import Build, content, line

TEXTS = [f"the fox number {i} sleeps " + "近く " * (i % 7) for i in range(300)]
TOKENS = (".bin", ".idx")


@pytest.fixture
def whole(build: Build, tmp_path: Path) -> list[bytes]:
    """Tokens and index of the dataset that every input has to give."""
    (tmp_path / "plain.jsonl").write_bytes(b"".join(map(line, TEXTS)))
    build([tmp_path / "plain.jsonl"], tmp_path / "whole")
    return content(tmp_path / "whole")[:2]


def write_parquet(path: Path, rows: int = 70) -> Path:
    table = pa.table({"n": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, path, row_group_size=rows)
    return path


@pytest.mark.parametrize(
    "kind", ["gz", "zst", "parquet", "large", "dictionary", "binary", "pipe", "skip"]
)
def test_the_same_documents(build: Build, whole: list[bytes], tmp_path: Path, kind: str) -> None:
    data, path = b"".join(map(line, TEXTS)), tmp_path / f"x.{kind}"
    if kind == "gz":  # members and padding
        path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]) + b"\0" * 9)
    elif kind == "zst":
        path.write_bytes(zstandard.compress(data))
    elif kind == "skip":  # a frame of notes before the text, as pzstd writes it
        path.write_bytes(b"\x5e\x2a\x4d\x18\x04\0\0\0note" + zstandard.compress(data))
    elif kind == "parquet":
        write_parquet(path)
    elif kind == "pipe":
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(data,), daemon=True).start()
    else:
        kinds = {"large": pa.large_string(), "binary": pa.binary()}
        column = pa.array(TEXTS, kinds.get(kind))
        column = column.dictionary_encode() if kind == "dictionary" else column
        path = path.with_suffix(".parquet")
        parquet.write_table(pa.table({"text": column}), path, row_group_size=100)
    build([path], tmp_path / "c")
    assert content(tmp_path / "c")[:2] == whole
    build([path] if kind != "pipe" else [tmp_path / "plain.jsonl"], tmp_path / "d", shard_bytes=999)
    assert content(tmp_path / "d")[:2] == whole


def test_lines_of_plain_text(build: Build, whole: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\r\n".join(TEXTS))
    build([tmp_path / "x.txt"], tmp_path / "c", text_unit="line")
    assert content(tmp_path / "c")[:2] == whole


def test_files_of_plain_text_and_directories(
    build: Build, whole: list[bytes], tmp_path: Path
) -> None:
    for at, text in enumerate(TEXTS[:40]):
        path = tmp_path / "books" / f"{at // 10}" / f"{at:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if at % 5 == 0:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    (tmp_path / "books" / "readme.md").write_text("no corpus")
    (tmp_path / "books" / ".hidden.txt").write_text("neither")
    (tmp_path / "first.jsonl").write_bytes(b"".join(map(line, TEXTS[:40])))
    build([tmp_path / "books"], tmp_path / "c")
    build([tmp_path / "books" / "*" / "*.txt*"], tmp_path / "d")
    build([tmp_path / "first.jsonl"], tmp_path / "wanted")
    assert content(tmp_path / "c")[:2] == content(tmp_path / "wanted")[:2]
    assert content(tmp_path / "c") == content(tmp_path / "d")


@pytest.mark.parametrize("unit", ["file", "line", "jsonl", "gz"])
def test_a_mark_at_the_start_is_no_text(build: Build, tmp_path: Path, unit: str) -> None:
    """Some programs begin UTF-8 with it; in JSON lines it would be a fault."""
    plain = b"".join(map(line, TEXTS)) if unit in ("jsonl", "gz") else "\n".join(TEXTS).encode()
    name = f"x.{unit}" if unit in ("jsonl", "gz") else "x.txt"
    given = {"text_unit": unit} if name == "x.txt" else {}
    for prefix, mark in (("a", b""), ("b", b"\xef\xbb\xbf")):
        data = mark + plain
        (tmp_path / name).write_bytes(gzip.compress(data) if unit == "gz" else data)
        build([tmp_path / name], tmp_path / prefix, **given)
    assert content(tmp_path / "a")[:2] == content(tmp_path / "b")[:2]


def test_several_keys_are_joined(build: Build, tmp_path: Path) -> None:
    pairs = [(f"title {at}", f"the body {at}") for at in range(20)]
    (tmp_path / "x.jsonl").write_bytes(b"".join(line(b, title=t) for t, b in pairs))
    table = pa.table({"text": [b for _, b in pairs], "title": [t for t, _ in pairs]})
    parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "j.jsonl").write_bytes(b"".join(line(f"{t}--{b}") for t, b in pairs))
    for name in ("x.jsonl", "x.parquet"):
        keys = {"text_keys": ("title", "text"), "separator": "--", "overwrite": True}
        build([tmp_path / name], tmp_path / "c", **keys)
        build([tmp_path / "j.jsonl"], tmp_path / "j", overwrite=True)
        assert content(tmp_path / "c")[:2] == content(tmp_path / "j")[:2]


def test_languages_are_counted(build: Build, tmp_path: Path) -> None:
    rows = [("the fox", "en"), ("le renard", "fr"), ("the dog", "en"), ("?", None)]
    (tmp_path / "x.jsonl").write_bytes(b"".join(line(t, lang=name) for t, name in rows))
    table = pa.table({"text": [t for t, _ in rows], "lang": [name for _, name in rows]})
    parquet.write_table(table, tmp_path / "y.parquet")
    result = build(
        [tmp_path / "x.jsonl", tmp_path / "y.parquet"], tmp_path / "c", language_key="lang"
    )
    found = {
        name: (counts.documents, counts.text_bytes) for name, counts in result.languages.items()
    }
    assert found == {"en": (4, 28), "fr": (2, 18), "": (2, 2)}
    assert result.sidecar is not None
    assert sum(counts.tokens for counts in result.languages.values()) == result.sidecar.tokens


def test_standard_input(tokenizer_path: Path, whole: list[bytes], tmp_path: Path) -> None:
    tool = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
    command = [sys.executable, str(tool), "--input", "-", "--output-prefix", "c"]
    command += ["--tokenizer", f"sentencepiece:{tokenizer_path}", "--workers", "2"]
    data = gzip.compress(b"".join(map(line, TEXTS)))
    subprocess.run(command, input=data, cwd=tmp_path, check=True, capture_output=True)
    assert content(tmp_path / "c")[:2] == whole


def test_names_that_stand_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("x")
    for name in (str(tmp_path), str(tmp_path / "*.jsonl")):
        with pytest.raises(DataError, match="no input file there"):
            expand_inputs([name])
    with pytest.raises(DataError, match=r"nowhere: cannot be read: No such file"):
        expand_inputs([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="nonsense://"):
        expand_inputs(["nonsense://bucket/x.jsonl"])
    with pytest.raises(DataError, match=r"ftp://127\.0\.0\.1:1/x: .*refused"):
        expand_inputs(["ftp://127.0.0.1:1/x"])
    with pytest.raises(DataError, match="-: Parquet is read from its end"):
        expand_inputs(["-"], "parquet")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "x.md")
    with pytest.raises(DataError, match="named twice"):
        expand_inputs([str(tmp_path / "x.md"), str(tmp_path / "link.jsonl")])


def test_remote_paths_of_fsspec(build: Build, whole: list[bytes], tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    data = b"".join(map(line, TEXTS))
    cut = data.rfind(b"\n", 0, len(data) // 2) + 1
    system.pipe("/corpus/a.jsonl", data[:cut])
    system.pipe("/corpus/b.jsonl.gz", gzip.compress(data[cut:]))
    build(["memory://corpus/*.jsonl*"], tmp_path / "c")
    assert content(tmp_path / "c")[:2] == whole
    with pytest.raises(DataError, match=r"memory:///?corpus/nowhere: cannot be read"):
        build(["memory://corpus/nowhere"], tmp_path / "d")


def test_s3(
    build: Build, whole: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        system = s3fs.S3FileSystem()
        system.mkdir("corpora")
        data = [line(text) for text in TEXTS]
        system.pipe("corpora/fr/a.jsonl.gz", gzip.compress(b"".join(data[:200])))
        packed = io.BytesIO()
        parquet.write_table(pa.table({"text": TEXTS[200:]}), packed, row_group_size=30)
        system.pipe("corpora/fr/b.parquet", packed.getvalue())
        build(["s3://corpora/fr"], tmp_path / "c")
        assert content(tmp_path / "c")[:2] == whole
        with pytest.raises(DataError, match=r"s3://corpora/none\.jsonl: cannot be read"):
            build(["s3://corpora/none.jsonl"], tmp_path / "d")
    finally:
        server.stop()
