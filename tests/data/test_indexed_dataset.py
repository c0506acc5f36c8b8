"""Reading `.bin/.idx`: what is right comes back, what is damaged is a named error."""

import gc
import json
import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance
from megatron_mer.errors import DataError

HEADER = "<9sQBQQ"
PROVENANCE = Provenance("sentencepiece", "f" * 64, 100, 2, True)


def write_raw(
    prefix: Path,
    lengths: list[int],
    entries: list[int],
    code: int = 8,
    pointers: list[int] | None = None,
    tokens: bytes | None = None,
) -> None:
    """Write the format by hand, independent of the library's writer."""
    width = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}.get(code, 4)
    if pointers is None:
        pointers = [width * sum(lengths[:i]) for i in range(len(lengths))]
    if tokens is None:
        dtype = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.get(code, "<f4")
        tokens = np.arange(sum(lengths)).astype(dtype).tobytes()
    Path(f"{prefix}.bin").write_bytes(tokens)
    Path(f"{prefix}.idx").write_bytes(
        struct.pack(HEADER, b"MMIDIDX\0\0", 1, code, len(lengths), len(entries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(entries)}q", *entries)
    )


def patch(path: Path, offset: int, layout: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)


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


def test_sequence_modes_of_multimodal_files_are_ignored(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes() + bytes(5))
    assert IndexedDataset(prefix).num_tokens == 12


@pytest.mark.parametrize("range_", [(-1, 2), (3, 2), (0, 13), (12, 13)])
def test_a_range_outside_the_corpus_is_an_error(prefix: Path, range_: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"were asked for; it has 12"):
        IndexedDataset(prefix).tokens(*range_)


def test_arrays_outlive_their_dataset(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    tokens, counts = dataset.tokens(0, 12), dataset.count_document_ends(np.array([0]), 12)
    dataset.close()
    del dataset
    gc.collect()
    os.unlink(f"{prefix}.bin")
    os.unlink(f"{prefix}.idx")
    assert tokens.tolist() == list(range(12))
    assert tokens.flags.owndata
    assert counts.tolist() == [3]


def test_reading_after_close_opens_again(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    first = dataset.document(1)
    dataset.close()
    assert dataset.document(1).tolist() == first.tolist()


def test_a_file_truncated_after_opening_is_an_error_and_not_garbage(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    os.truncate(f"{prefix}.bin", 20)
    assert dataset.tokens(0, 10).tolist() == list(range(10))
    with pytest.raises(DataError, match=r"byte 20: the file ends; expected 4 more bytes"):
        dataset.tokens(8, 12)


def test_many_open_datasets_hold_no_files_until_they_are_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "c", [3], [0, 1])
    before = len(os.listdir("/proc/self/fd"))
    opened = [IndexedDataset(tmp_path / "c") for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert opened[-1].tokens(0, 3).tolist() == [0, 1, 2]


# Offsets: lengths at 34, pointers at 34 + 4 * 5 = 54, document indices at 54 + 8 * 5 = 94.
FAULTS = {
    "magic": (".idx", 0, "<B", 0, r"byte 0: magic .* expected b'MMIDIDX"),
    "version": (".idx", 9, "<Q", 2, r"byte 9: version 2; expected version 1"),
    "float dtype": (".idx", 17, "<B", 6, r"byte 17: dtype code 6 \(floating"),
    "float dtype of GPT-NeoX": (".idx", 17, "<B", 7, r"byte 17: dtype code 7 \(floating"),
    "unknown dtype": (".idx", 17, "<B", 9, r"byte 17: dtype code 9; expected one of"),
    "wider dtype": (".idx", 17, "<B", 4, r"byte 86: .*dtype is wrong"),
    "narrower dtype": (".idx", 17, "<B", 1, r"byte 86: .*expected its size, 24"),
    "more sequences": (".idx", 18, "<Q", 6, r"the file has 134 bytes; expected 146"),
    "huge count": (".idx", 18, "<Q", 2**63, r"the file has 134 bytes"),
    "more documents": (".idx", 26, "<Q", 7, r"the file has 134 bytes; expected 150"),
    "no entries": (".idx", 26, "<Q", 0, r"byte 26: no document indices"),
    "negative first length": (".idx", 34, "<i", -3, r"byte 34: sequence 0 has length -3"),
    "wrong first length": (".idx", 34, "<i", 4, r"byte 62: pointer 6; expected 8"),
    "negative last length": (".idx", 50, "<i", -5, r"byte 50: sequence 4 has length -5"),
    "last length": (".idx", 50, "<i", 4, r"byte 86: the last sequence ends at byte 22"),
    "first pointer": (".idx", 54, "<q", 2, r"byte 54: first pointer 2; expected 0"),
    "last pointer": (".idx", 86, "<q", 12, r"byte 86: the last sequence ends at byte 22"),
    "first document": (".idx", 94, "<q", 1, r"byte 94: first document index 1; expected 0"),
    "last document": (".idx", 126, "<q", 4, r"byte 126: the document indices end at 4; expected 5"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_index_is_refused_on_open(prefix: Path, name: str) -> None:
    suffix, offset, layout, value, message = FAULTS[name]
    patch(Path(f"{prefix}{suffix}"), offset, layout, value)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert f"{prefix}.idx" in str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_file_is_refused_on_open(prefix: Path, suffix: str) -> None:
    path = Path(prefix.with_name(prefix.name + suffix))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match="truncated" if suffix == ".bin" else "133 bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [0, 20])
def test_a_half_header_is_refused(prefix: Path, size: int) -> None:
    os.truncate(f"{prefix}.idx", size)
    with pytest.raises(DataError, match=rf"byte {size}: the file ends; expected a header"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    os.unlink(f"{prefix}{suffix}")
    with pytest.raises(DataError, match=rf"corpus\{suffix}: cannot be opened: No such file"):
        IndexedDataset(prefix)


def test_merge_that_forgot_its_documents_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "neox", [3, 2], [0])
    with pytest.raises(DataError, match="document indices end at 0; expected 2"):
        IndexedDataset(tmp_path / "neox")


def test_an_empty_dataset_opens_and_holds_nothing(tmp_path: Path) -> None:
    write_raw(tmp_path / "empty", [], [0])
    dataset = IndexedDataset(tmp_path / "empty")
    assert (dataset.num_documents, dataset.num_tokens, len(dataset.tokens(0, 0))) == (0, 0, 0)
    assert dataset.count_document_ends(np.array([0]), 0).tolist() == [0]


INNER_FAULTS = {
    "length": (38, "<i", 3),
    "negative length": (42, "<i", -2),
    "pointer": (70, "<q", 4),
    "document index": (110, "<q", 0),
    "document index too large": (110, "<q", 9),
}


@pytest.mark.parametrize("name", INNER_FAULTS)
def test_verify_finds_damage_inside(prefix: Path, name: str) -> None:
    offset, layout, value = INNER_FAULTS[name]
    patch(Path(f"{prefix}.idx"), offset, layout, value)
    dataset = IndexedDataset(prefix)
    with pytest.raises(DataError, match=r"agrees with its neighbours"):
        dataset.verify()
    with pytest.raises(DataError, match=r"corpus\.idx"):
        [dataset.document(i) for i in range(4)]


def brute_force_ends(dataset: IndexedDataset) -> np.ndarray:
    ends = np.zeros(dataset.num_tokens, dtype=bool)
    position = 0
    for index in range(dataset.num_documents):
        length = len(dataset.document(index))
        position += length
        if length:
            ends[position - 1] = True
    return ends


@pytest.mark.parametrize("seed", range(5))
def test_document_ends_against_a_walk_over_all_documents(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 9, size=200).tolist()
    cuts = sorted(generator.integers(0, 201, size=80).tolist())  # some documents are empty
    write_raw(tmp_path / "c", lengths, [0, *cuts, 200])
    dataset = IndexedDataset(tmp_path / "c")
    ends = brute_force_ends(dataset)
    for length in (0, 1, 7, 64, dataset.num_tokens):
        starts = generator.integers(0, dataset.num_tokens - length + 1, size=50)
        counts = dataset.count_document_ends(starts, length)
        assert counts.tolist() == [int(ends[s : s + length].sum()) for s in starts]
        for start in starts[:10].tolist():
            mask = dataset.document_end_mask(start, length)
            np.testing.assert_array_equal(mask, ends[start : start + length])


def test_document_ends_outside_the_corpus_are_an_error(prefix: Path) -> None:
    for starts, length in ((np.array([-1]), 2), (np.array([0, 11]), 2), (np.array([0]), 13)):
        with pytest.raises(DataError, match="it has 12"):
            IndexedDataset(prefix).count_document_ends(starts, length)


def test_unsorted_document_ends_are_noticed(prefix: Path) -> None:
    patch(Path(f"{prefix}.idx"), 102, "<q", 5)  # document 0 would end after document 1
    with pytest.raises(DataError, match=r"corpus\.idx, byte \d+: document \d ends at"):
        IndexedDataset(prefix).document_end_mask(0, 12)


@pytest.fixture
def with_sidecar(tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([5, 6, 2])
        writer.finalize(PROVENANCE)
    return tmp_path / "c"


def test_a_missing_sidecar_is_one_warning(
    with_sidecar: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert IndexedDataset(with_sidecar).sidecar is not None
    os.unlink(f"{with_sidecar}.json")
    with caplog.at_level("WARNING", logger="megatron_mer"):
        root = logging.getLogger("megatron_mer")
        root.addHandler(caplog.handler)
        try:
            assert IndexedDataset(with_sidecar).sidecar is None
        finally:
            root.removeHandler(caplog.handler)
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith(f"{with_sidecar}.json is missing: the tokenizer")


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
    path = Path(f"{with_sidecar}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=message):
        IndexedDataset(with_sidecar)


def test_a_torn_sidecar_is_refused(with_sidecar: Path) -> None:
    os.truncate(f"{with_sidecar}.json", 40)
    with pytest.raises(DataError, match=r"c\.json, line \d+: not JSON"):
        IndexedDataset(with_sidecar)


def test_verify_notices_changed_tokens(with_sidecar: Path) -> None:
    patch(Path(f"{with_sidecar}.bin"), 0, "<H", 7)
    dataset = IndexedDataset(with_sidecar)
    dataset.verify(checksums=False)
    with pytest.raises(DataError, match=r"c\.bin: SHA-256 .* the file changed"):
        dataset.verify()


def test_sidecar_says_why_a_run_cannot_use_the_corpus(with_sidecar: Path) -> None:
    sidecar = IndexedDataset(with_sidecar).sidecar
    assert sidecar is not None
    assert sidecar.problems("f" * 64, 7) == []
    assert sidecar.problems(None, None) == []
    other, small = sidecar.problems("a" * 64, 6)
    assert "has aaaaaaaaaaaaaaaa..." in other
    assert "holds token id 6, the model's vocabulary has ids 0 to 5" in small
