"""Reading JSON lines: whole lines, any compression, errors with file and line."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_mer.data.jsonl import documents, read_pieces
from megatron_mer.errors import DataError

TEXTS = ["one", "zwei\nZeilen", "三" * 100, "", "fünf", "ستة"]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(path: Path, piece_bytes: int = 1 << 20) -> list[tuple[int, str]]:
    pieces = read_pieces(path, piece_bytes)
    return [(n, content["text"]) for piece in pieces for n, content in documents(piece, "text")]


@pytest.mark.parametrize("piece_bytes", [1, 30, 1000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("final_newline", [False, True])
def test_every_line_once_with_its_number(
    tmp_path: Path, piece_bytes: int, packed: bool, final_newline: bool
) -> None:
    data = lines(TEXTS) if final_newline else lines(TEXTS)[:-1]
    (tmp_path / "x").write_bytes(gzip.compress(data) if packed else data)
    assert read(tmp_path / "x", piece_bytes) == list(enumerate(TEXTS, 1))


def test_blank_lines_count_but_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'\n{"text": "a"}\r\n  \n{"text": "b"}\n\n')
    assert read(tmp_path / "x") == [(2, "a"), (4, "b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"\xff\xfe", "byte 0 of 2 is not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "a JSON list; expected an object"),
        (b'{"content": "a"}', "key 'text' is missing; its keys: content"),
        (b'{"text": 3}', "'text' is int; expected a string"),
        (b'{"text": "\\ud800"}', "the text is not valid Unicode"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1, 1000])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str, piece_bytes: int) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines(TEXTS) + line + b"\n" + lines(TEXTS))
    with pytest.raises(DataError, match=rf"x\.jsonl, line 7: {message}"):
        read(tmp_path / "x.jsonl", piece_bytes)


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_damaged_compression_is_named(tmp_path: Path, damage: str) -> None:
    data = bytearray(gzip.compress(lines(TEXTS)))
    if damage == "torn":
        del data[-20:]
    else:
        data[-6] ^= 255  # in the checksum
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.gz, after line \d+: cannot be read"):
        read(tmp_path / "x.gz")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot be read: No such file"):
        read(tmp_path / "nowhere")
