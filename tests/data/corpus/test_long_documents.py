"""Documents that do not fit memory: the same ids, and the memory stays where the setting says."""

import io
import json
import random
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.corpus import cutting, long_lines, reading, streams
from megatron_mer.data.corpus.cutting import chunks_of, parts
from megatron_mer.data.corpus.faults import FaultError
from megatron_mer.data.corpus.long_lines import read_long_line
from megatron_mer.data.corpus.parsing import ReadSettings, parse_json_lines
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.tokenizers import load_tokenizer
from tests.data.corpus.conftest import Build, content, line
from tests.handbook import Handbook

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
KINDS = ("unigram", "bpe", "hf", "tiktoken")


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_cut_has_the_ids_of_the_whole(
    names: Mapping[str, str], handbook: Handbook, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PART", 3000)
    tokenizer = load_tokenizer(names[kind])
    for texts in handbook.values():
        text = "\n".join(texts[:10])
        found = list(parts(chunks_of(text), tokenizer))
        assert len(found) > 2
        ids = np.concatenate([tokenizer.encode(part) for part in found])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_a_text_that_cannot_be_cut(
    names: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "PART", 3000)
    with pytest.raises(FaultError, match="cannot be cut without changing its ids"):
        list(parts(["x" * 20_000], load_tokenizer(names["hf"])))


def read(data: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch, *keys: str) -> str:
    monkeypatch.setattr(long_lines, "CHUNK", chunk)
    text = read_long_line(io.BytesIO(data), ReadSettings(text_keys=keys or ("text",)), None)
    return "".join(text.chunks())


@pytest.mark.parametrize("seed", range(60))
def test_a_long_line_is_read_as_json_reads_it(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(seed)
    alphabet = ["a", '"', "\\", "\n", "é", "近", "🦊", "\x01", "/", "u", " ", "{", "}", "[", ","]

    def text() -> str:
        return "".join(random.choices(alphabet, k=random.randrange(40)))

    value = {"n": [1.5e3, None, {"text": text(), "x": [text(), []]}], "b": True, "c": -1}
    document = {**value, "text": text(), text(): text(), "title": text()}
    document.pop("", None)
    data = json.dumps(
        document, ensure_ascii=seed % 2 == 0, indent=[None, 2][seed % 3 == 0]
    ).encode()
    for chunk in (1, 2, 3, 5, 7, 1000):
        assert read(data, chunk, monkeypatch) == document["text"]
        both = f"{document['title']}\n{document['text']}"
        assert read(data, chunk, monkeypatch, "title", "text") == both


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", "expected an object"),
        (b'{"text": "a', "ends in the middle"),
        (b'{"text": "a"', "after a value"),
        (b'{"text": "a"} x', "extra data"),
        (b'{"text": "a",}', "a comma before the end"),
        (b'{"text" "a"}', "no colon"),
        (b'{text: "a"}', "where a key is expected"),
        (b'{"text": "a", "x": [1, {"y": 2}', "ends in the middle|after a value"),
        (b'{"text": 3}', "not a string"),
        (b'{"other": "a"}', "key 'text' is missing; its keys: other"),
        (b'{"text": "a", "x": [1,]}', "where a value is expected"),
        (b'{"text": "a", "x": [[tru]]}', "b'tru' where a value is expected"),
        (b'{"text": "a", "x": {"y" 1}}', "no colon"),
        (b'{"text": "a", "x": {1: 1}}', "where a key is expected"),
        (b'{"text": "a", "x": [1 2]}', "after a value"),
        (b'{"text": "a", "x": ' + b"[" * 1001, "more than 1000 brackets"),
        (b'{"text": "\xff"}', "UTF-8"),
        (b'{"text": "\\ud83d"}', "not valid Unicode"),
        (b'{"text": "\\q"}', "not JSON"),
        (b'{"text": "a\nb"}', "not JSON"),
        (b"", "expected an object"),
    ],
)
def test_long_lines_that_are_none(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chunk in (1, 3, 1000):
        with pytest.raises(FaultError) as error:
            read(data, chunk, monkeypatch)
        assert any(part in error.value.reason for part in message.split("|")), error.value.reason


def outcome(data: bytes, monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> str | None:
    """The text of a line, read as a long one or (chunk None) as a short one; None: refused."""
    if chunk is None:
        return next(iter(parse_json_lines(data, 1, ReadSettings()).texts), None)
    try:
        return read(data, chunk, monkeypatch)
    except FaultError:
        return None


@pytest.mark.parametrize("seed", range(20))
def test_long_and_short_lines_are_judged_alike(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was changed at random, its keys doubled, its words torn."""
    change = random.Random(seed)
    values = [1.5e3, None, True, "a\\ é", [], {}, [1, {"y": [2]}], "🦊", float("nan"), -0.5]
    for _ in range(30):
        pairs = [(change.choice(["text", "x", "é"]), change.choice(values)) for _ in range(4)]
        items = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs]
        data = bytearray(f'{{"text": "fox", {", ".join(items)}}}'.encode())
        for _ in range(change.randrange(3)):
            at = change.randrange(len(data))
            data[at : at + change.randrange(2)] = bytes([change.choice(b'"\\,:[]{}10etn-.\xff ')])
        line = bytes(data)
        wanted = outcome(line, monkeypatch, None)
        assert all(outcome(line, monkeypatch, chunk) == wanted for chunk in (1, 7, 1000)), line


def test_memory_does_not_decide_how_a_line_is_read(build: Build, tmp_path: Path) -> None:
    """Lines of 3 MB are longer than a piece of the least memory."""
    long = b"the fox sleeps. " * 190_000
    lines = [
        b'{"text": "first", "text": "' + long + b'"}',
        b'{"x": tru, "text": "' + long + b'"}',
        b'{"text": 3, "x": "' + long + b'", "text": "last"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    for memory in (64, 256):
        given = {"worker_memory": memory << 20, "piece_bytes": 1 << 30, "shard_bytes": 1 << 30}
        result = build([tmp_path / "x.jsonl"], tmp_path / f"{memory}", on_error="skip", **given)
        assert result.sources[0].faults == {"not JSON": 1}
        assert result.sources[0].counts.text_bytes == len(long) + len("last")
    assert content(tmp_path / "64") == content(tmp_path / "256")


@pytest.mark.parametrize("text", [False, True])
def test_long_lines_lose_nothing(
    build: Build, tmp_path: Path, text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the language, and no more than the mark at the file's start and the line's end."""
    documents, languages = ["the fox", "le renard", "the dog", "?"], ["en", "fr", ["en"], None]
    made = [line(t, lang=name, n=[1]) for t, name in zip(documents, languages, strict=True)]
    if text:
        made = [f"{text}\n".encode() for text in documents]
    data = b"\xef\xbb\xbf" + b"".join(made).replace(b"\n", b"\r\n")
    path = tmp_path / ("x.txt" if text else "x.jsonl")
    path.write_bytes(data)
    found = []
    for number, most in enumerate((1 << 20, 40, 8)):
        monkeypatch.setattr(streams, "LONG_LINE", most)
        monkeypatch.setattr(reading, "LONG_TEXT", most // 8)
        given = {"language_key": "lang", "text_unit": "line"}
        result = build([path], tmp_path / f"{number}", **given)
        found.append((content(tmp_path / f"{number}"), result.languages))
        counts = {name: counts.text_bytes for name, counts in result.languages.items()}
        assert counts == ({"": 24} if text else {"en": 7, "fr": 9, "['en']": 7, "": 1})
    assert found[0] == found[1] == found[2]


MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(directory: Path, *arguments: str) -> int:
    """Peak memory of the tool in MiB; the tool must succeed."""
    command = [sys.executable, "-c", MEASURE, str(TOOL), "--worker-memory", "64", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) >> 10


def write_book(path: Path, handbook: Handbook, megabytes: int) -> None:
    """One document as a JSON line, and a short one behind it."""
    text = "\n".join(text for texts in handbook.values() for text in texts[:20])
    part = json.dumps(text + "\n", ensure_ascii=False).encode()[1:-1]
    with open(path, "wb") as file:
        file.write(b'{"id": 1, "text": "')
        for _ in range(megabytes * 1_000_000 // len(part)):
            file.write(part)
        file.write(b'", "end": [1, {}]}\n' + line("the end"))


def compare(directory: Path, name: str, handbook: Handbook, megabytes: int) -> None:
    arguments = ["--output-prefix", "c", "--tokenizer", name, "--workers", "1"]
    write_book(directory / "small.jsonl", handbook, 2)
    small = peak(directory, "--input", "small.jsonl", *arguments)
    write_book(directory / "large.jsonl", handbook, megabytes)
    large = peak(directory, "--input", "large.jsonl", *arguments, "--overwrite")
    assert large < small + 96, f"{small} MiB for a small document, {large} for a large one"
    dataset = IndexedDataset(directory / "c")
    dataset.verify()
    assert dataset.num_documents == 2
    source = dataset.sidecar.provenance.sources[0] if dataset.sidecar else None
    assert source is not None
    assert source.text_bytes > 0.9 * megabytes * 1_000_000


def test_memory_does_not_grow_with_a_document(
    names: Mapping[str, str], handbook: Handbook, tmp_path: Path
) -> None:
    compare(tmp_path, names["tiktoken"], handbook, 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["hf", "bpe"])
def test_a_document_of_a_gigabyte(
    names: Mapping[str, str], handbook: Handbook, tmp_path: Path, kind: str
) -> None:
    compare(tmp_path, names[kind], handbook, 1000)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10 < 600
