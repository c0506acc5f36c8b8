"""Reading `.bin/.idx`: what is right comes back, what is damaged is a named error."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data import document_index, indexed_dataset
from megatron_mer.data.indexed_dataset import IndexedDataset, missing_sidecars
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance
from megatron_mer.errors import DataError
from tests.data.raw_dataset import patch, write_raw

PROVENANCE = Provenance("sentencepiece", "f" * 64, 100, 2, True)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Four documents of 3, 4, 0 and 5 tokens; the second has two sequences."""
    write_raw(tmp_path / "corpus", [3, 2, 2, 0, 5], [0, 1, 3, 4, 5])
    return tmp_path / "corpus"


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_reads_every_integer_dtype(tmp_path: Path, code: int) -> None:
    write_raw(tmp_path / "c", [3, 4], [0, 1, 2], code)
    dataset = IndexedDataset(tmp_path / "c")
    assert (dataset.num_documents, dataset.num_sequences, dataset.num_tokens) == (2, 2, 7)
    assert dataset.tokens(2, 6).tolist() == [2, 3, 4, 5]
    dataset.verify()


def test_documents_may_have_several_sequences_or_none(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    found = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert found == [[0, 1, 2], [3, 4, 5, 6], [], [7, 8, 9, 10, 11]]
    for index in (-1, 4):
        with pytest.raises(DataError, match=f"document {index} was asked for; it has 4"):
            dataset.document(index)


def test_reading_after_close_opens_again(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    first = dataset.document(1)
    dataset.close()
    assert dataset.document(1).tolist() == first.tolist()


@pytest.fixture
def with_sidecar(tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([5, 6, 2])
        writer.finalize(PROVENANCE)
    return tmp_path / "c"


def change_token(prefix: Path, value: int) -> IndexedDataset:
    patch(Path(f"{prefix}.bin"), 0, "<H", value)
    return IndexedDataset(prefix)


def change_sidecar(prefix: Path, **changes: object) -> IndexedDataset:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return IndexedDataset(prefix)


def test_missing_sidecars_are_one_line(with_sidecar: Path, tmp_path: Path) -> None:
    whole = IndexedDataset(with_sidecar)
    assert missing_sidecars([]) is None
    assert missing_sidecars([whole]) is None
    bare = []
    for name in "pqrs":
        write_raw(tmp_path / name, [3], [0, 1])
        bare.append(IndexedDataset(tmp_path / name))
        assert bare[-1].sidecar is None
    assert missing_sidecars([bare[0], whole]) == (
        "1 of 2 datasets have no sidecar: their tokenizer and their checksums are unknown "
        f"({tmp_path}/p.json missing)"
    )
    line = missing_sidecars([*bare, whole])
    assert line is not None
    assert line.startswith("4 of 5 datasets")
    assert line.endswith(f"({tmp_path}/p.json, {tmp_path}/q.json, {tmp_path}/r.json, ... missing)")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", 4, "says tokens 4, but c.idx has 3"),
        ("documents", 2, "says documents 2, but c.idx has 1"),
        ("dtype", "int32", "says dtype int32, but c.idx has uint16"),
        ("format_version", 2, "format_version 2; expected 1"),
        ("vocab_size", "many", "vocab_size is 'many'; expected int"),
        ("append_eod", None, "append_eod is None; expected bool"),
        ("tokenizer", {"kind": "x"}, "key 'fingerprint' is missing"),
        ("sources", [3], "sources holds 3"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_refused(
    with_sidecar: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        change_sidecar(with_sidecar, **{key: value})


def test_a_torn_sidecar_is_refused(with_sidecar: Path) -> None:
    os.truncate(f"{with_sidecar}.json", 40)
    with pytest.raises(DataError, match=r"c\.json, line \d+: not JSON"):
        IndexedDataset(with_sidecar)


def test_verify_compares_both_files_with_their_checksums(with_sidecar: Path) -> None:
    dataset = change_token(with_sidecar, 3)
    dataset.verify(checksums=False)
    with pytest.raises(DataError, match=r"c\.bin: SHA-256 .* the file changed"):
        dataset.verify()
    dataset = change_token(with_sidecar, 5)
    dataset.verify()
    dataset = change_sidecar(with_sidecar, idx_sha256="0" * 64)
    with pytest.raises(DataError, match=r"c\.idx: SHA-256 .*, but .*c\.json says 0000.* changed"):
        dataset.verify()


def test_verify_holds_ids_against_the_sidecar(with_sidecar: Path) -> None:
    message = r"c\.bin, byte 0: token id 7; expected 0 to 6, up to max_token_id in .*c\.json"
    with pytest.raises(DataError, match=message):
        change_token(with_sidecar, 7).verify()
    dataset = change_sidecar(with_sidecar, max_token_id=200)
    with pytest.raises(
        DataError, match=r"byte 0: token id 100; expected 0 to 99, the vocabulary in"
    ):
        change_token(with_sidecar, 100).verify(checksums=False)
    dataset = change_token(with_sidecar, 5)
    message = r"c\.json says max_token_id 200, but the largest id in c\.bin is 6"
    with pytest.raises(DataError, match=message):
        dataset.verify(vocab_size=1000)


def test_verify_looks_at_the_files_as_they_are_now(with_sidecar: Path) -> None:
    dataset = IndexedDataset(with_sidecar)
    dataset.tokens(0, 3)  # this file stays open when another one takes its name
    for suffix, content in ((".bin", bytes(6)), (".idx", None)):
        path = Path(f"{with_sidecar}{suffix}")
        new = path.with_suffix(".new")
        new.write_bytes(content or path.read_bytes())
        os.replace(new, path)
    with pytest.raises(DataError, match=r"max_token_id 6, but the largest id in c\.bin is 0"):
        dataset.verify()
    write_raw(with_sidecar, [1, 2], [0, 1, 2])
    with pytest.raises(DataError, match=r"c\.idx, byte 0: another header; expected the one that"):
        dataset.verify()


@pytest.mark.parametrize("code", [2, 4, 8])
def test_verify_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(indexed_dataset, "CHUNK", 8)
    monkeypatch.setattr(document_index, "VERIFY_CHUNK", 2)
    prefix = tmp_path / "c"
    write_raw(prefix, [2, 0, 2, 3, 1, 2, 1, 2], [0, 2, 2, 3, 5, 6, 8], code)
    dataset, calls = IndexedDataset(prefix), []
    dataset.verify(13, progress=lambda done, total: calls.append((done, total)))
    idx_size, bin_size = (Path(f"{prefix}{suffix}").stat().st_size for suffix in (".idx", ".bin"))
    total = idx_size + bin_size
    assert calls == [(done, total) for done in [*range(idx_size, total, 8), total]]
    for token in range(1, 13):
        byte = token * dataset.dtype.itemsize
        message = rf"\.bin, byte {byte}: token id {token}; expected 0 to {token - 1},"
        with pytest.raises(DataError, match=message):
            dataset.verify(token)


@pytest.mark.parametrize(
    ("byte", "layout", "value", "found"),
    [(34 + 4 * i, "<i", -1, f"sequence {i} has length -1") for i in range(2, 6)]
    + [(66 + 8 * i, "<q", 1, "pointer 1") for i in range(2, 6)]
    + [
        (130 + 8 * i, "<q", -1, f"document index -1 after {e}") for i, e in ((1, 0), (2, 2), (3, 2))
    ],
)
def test_verify_finds_damage_wherever_pieces_meet(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    byte: int,
    layout: str,
    value: int,
    found: str,
) -> None:
    monkeypatch.setattr(document_index, "VERIFY_CHUNK", 2)
    write_raw(tmp_path / "c", [2, 0, 2, 3, 1, 2, 1, 2], [0, 2, 2, 3, 5, 6, 8])
    patch(tmp_path / "c.idx", byte, layout, value)
    dataset = IndexedDataset(tmp_path / "c")
    with pytest.raises(DataError, match=rf"c\.idx, byte {byte}: {found}; expected"):
        dataset.verify()


def test_content_ids_notice_changes(with_sidecar: Path, tmp_path: Path) -> None:
    sidecar = IndexedDataset(with_sidecar).sidecar
    assert sidecar is not None
    assert IndexedDataset(with_sidecar).content_id() == sidecar.bin_sha256
    count = (1 << 20) + 5  # more than two pieces of a MiB
    write_raw(tmp_path / "raw", [count], [0, 1])
    first = IndexedDataset(tmp_path / "raw").content_id()
    assert first.startswith("edges:")
    assert IndexedDataset(tmp_path / "raw").content_id() == first
    found = {first}
    for suffix, byte in ((".bin", 0), (".bin", 2 * count - 1), (".idx", 17)):
        path = Path(f"{tmp_path}/raw{suffix}")
        old = path.read_bytes()
        patch(path, byte, "<B", 3)
        found.add(IndexedDataset(tmp_path / "raw").content_id())
        path.write_bytes(old)
    write_raw(tmp_path / "raw", [count - 3, 3], [0, 1, 2])  # other documents of equal tokens
    found.add(IndexedDataset(tmp_path / "raw").content_id())
    assert len(found) == 5


def test_sidecar_says_why_a_run_cannot_use_the_corpus(with_sidecar: Path) -> None:
    sidecar = IndexedDataset(with_sidecar).sidecar
    assert sidecar is not None
    assert sidecar.problems("f" * 64, 7) == []
    assert sidecar.problems(None, None) == []
    other, small = sidecar.problems("a" * 64, 6)
    assert "has aaaaaaaaaaaaaaaa..." in other
    assert "holds token id 6, the model's vocabulary has ids 0 to 5" in small
