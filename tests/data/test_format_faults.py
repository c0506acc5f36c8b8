"""Every known fault of the format and its readers: a named error with file, byte and expectation.

The dataset in most tests has five sequences of 3, 2, 2, 0 and 5 uint16 tokens in four documents, so
`.idx` has lengths from byte 34, pointers from 54, document indices from 94, and 134 bytes.
"""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatron_mer.data.packing import RowReader
from megatron_mer.errors import DataError
from tests.data.raw_dataset import patch, write_raw


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_raw(tmp_path / "corpus", [3, 2, 2, 0, 5], [0, 1, 3, 4, 5])
    return tmp_path / "corpus"


# What is written where, and the byte, finding and expectation that the error then names.
FAULTS_ON_OPEN = {
    "foreign magic": (0, "<B", 0, r"byte 0: magic b'\\x00MIDIDX.*; expected b'MMIDIDX"),
    "version 2": (9, "<Q", 2, "byte 9: version 2; expected version 1"),
    "float32": (17, "<B", 7, r"byte 17: dtype code 7 \(floating.*; expected an integer dtype"),
    "float32 in GPT-NeoX": (17, "<B", 6, r"byte 17: dtype code 6 \(floating.*; expected an int"),
    "unknown dtype": (17, "<B", 9, r"byte 17: dtype code 9; expected one of \[1, 2, 3, 4, 5, 8\]"),
    "lying dtype, wider": (17, "<B", 4, "byte 86: .*at byte 34 .*; expected its size, 24 bytes"),
    "lying dtype, narrower": (17, "<B", 1, "byte 86: .*at byte 19 .*; expected its size, 24"),
    "more sequences": (18, "<Q", 6, "byte 134: the file has 134 bytes; expected 146 for 6"),
    "2^63 sequences": (18, "<Q", 2**63, r"byte 134: the file has 134 bytes; expected 1106\d+ for"),
    "more documents": (26, "<Q", 7, "byte 134: the file has 134 bytes; expected 150 for 5"),
    "fewer documents": (26, "<Q", 4, "byte 126: the file has 134 bytes; expected 126 for 5"),
    "D = 0": (26, "<Q", 0, r"byte 26: no document indices; expected documents \+ 1 entries"),
    "negative first length": (34, "<i", -3, "byte 34: sequence 0 has length -3; expected 0"),
    "wrong first length": (34, "<i", 4, "byte 62: pointer 6; expected 8, where sequence 0 ends"),
    "negative last length": (50, "<i", -5, "byte 50: sequence 4 has length -5; expected 0"),
    "wrong last length": (50, "<i", 4, "byte 86: .*ends at byte 22 .*; expected its size, 24"),
    "first pointer": (54, "<q", 2, "byte 54: first pointer 2; expected 0"),
    "last pointer": (86, "<q", 12, "byte 86: .*ends at byte 22 .*; expected its size, 24"),
    "documents do not start at 0": (94, "<q", 1, "byte 94: first document index 1; expected 0"),
    "documents do not end at S": (126, "<q", 4, "byte 126: .* indices end at 4; expected 5, the"),
}


@pytest.mark.parametrize("name", FAULTS_ON_OPEN)
def test_refused_on_open(prefix: Path, name: str) -> None:
    offset, layout, value, message = FAULTS_ON_OPEN[name]
    patch(Path(f"{prefix}.idx"), offset, layout, value)
    with pytest.raises(DataError, match=rf"^{re.escape(str(prefix))}\.idx, {message}"):
        IndexedDataset(prefix)


# Damage that opening does not see: found by `verify`, and by whoever reads the document there.
FAULTS_INSIDE = {
    "wrong length in the middle": (
        38,
        "<i",
        3,
        "byte 70: pointer 10; expected 12, where sequence 1 ends",
    ),
    "negative length in the middle": (
        42,
        "<i",
        -2,
        "byte 42: sequence 2 has length -2; expected 0 or more",
    ),
    "wrong pointer in range": (
        70,
        "<q",
        4,
        "byte 70: pointer 4; expected 10, where sequence 1 ends",
    ),
    "descending documents": (
        110,
        "<q",
        0,
        "byte 110: document index 0 after 1; expected ascending",
    ),
    "document index above S": (
        110,
        "<q",
        9,
        "byte 118: document index 4 after 9; expected ascending",
    ),
}


@pytest.mark.parametrize("name", FAULTS_INSIDE)
def test_verify_finds(prefix: Path, name: str) -> None:
    offset, layout, value, message = FAULTS_INSIDE[name]
    patch(Path(f"{prefix}.idx"), offset, layout, value)
    dataset = IndexedDataset(prefix)
    with pytest.raises(DataError, match=rf"^{re.escape(str(prefix))}\.idx, {message}"):
        dataset.verify()


FAULTS_WHEN_READ = {
    "wrong length in the middle": r"byte 62: document 1 has sequences of \[3, 2\] tokens at bytes"
    r" \[6, 10, 14\] .*; expected sequences of 2 bytes a token that follow each other",
    "negative length in the middle": r"byte 62: document 1 has sequences of \[2, -2\] .*; expected",
    "wrong pointer in range": r"byte 62: document 1 has .* at bytes \[6, 4, 14\] .*; expected seq",
    "descending documents": r"byte 102: document 1 has sequences \[1, 0\); expected a range inside",
    "document index above S": r"byte 102: document 1 has sequences \[1, 9\); expected a range",
}


@pytest.mark.parametrize("name", FAULTS_WHEN_READ)
def test_no_document_of_wrong_tokens(prefix: Path, name: str) -> None:
    patch(Path(f"{prefix}.idx"), *FAULTS_INSIDE[name][:3])
    dataset = IndexedDataset(prefix)
    assert dataset.document(0).tolist() == [0, 1, 2]
    message = rf"^{re.escape(str(prefix))}\.idx, {FAULTS_WHEN_READ[name]}"
    with pytest.raises(DataError, match=message):
        dataset.document(1)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (110, 0, "document 1 ends at token 0; expected ends in ascending order, at most 12"),
        (110, 9, "document index 9; expected 0 to 5, the sequences there are"),
        (70, 4, "document 1 ends at token 2; expected ends in ascending order, at most 12"),
        (70, 400, "document 1 ends at token 200; expected ends in ascending order, at most 12"),
    ],
    ids=["descending documents", "document index above S", "pointer back", "pointer out of range"],
)
def test_no_mask_of_wrong_document_ends(
    prefix: Path, offset: int, value: int, message: str
) -> None:
    write_raw(prefix, [3, 2, 2, 1, 4], [0, 1, 2, 3, 4, 5])
    patch(Path(f"{prefix}.idx"), offset, "<q", value)
    reader = RowReader([IndexedDataset(prefix)], 11, 100)
    with pytest.raises(DataError, match=rf"^{re.escape(str(prefix))}\.idx, byte 110: {message}"):
        reader.document_ends(np.array([0]), np.array([0]))


@pytest.mark.parametrize("size", [0, 1, 4, 19, 22, 23])
def test_a_truncated_bin_is_refused_on_open(prefix: Path, size: int) -> None:
    os.truncate(f"{prefix}.bin", size)
    message = rf"corpus\.idx, byte 86: the last sequence ends at byte 24 .*; expected .* {size} b"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [0, 8, 20, 33])
def test_an_idx_that_ends_in_its_header_is_refused(prefix: Path, size: int) -> None:
    os.truncate(f"{prefix}.idx", size)
    message = rf"corpus\.idx, byte {size}: the file ends; expected a header of 34 bytes"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [34, 54, 94, 100, 126, 133])
def test_an_idx_that_ends_in_its_arrays_is_refused(prefix: Path, size: int) -> None:
    os.truncate(f"{prefix}.idx", size)
    message = rf"corpus\.idx, byte {size}: the file has {size} bytes; expected 134 for 5 sequences"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix: Path, suffix: str) -> None:
    os.unlink(f"{prefix}{suffix}")
    with pytest.raises(DataError, match=rf"corpus\{suffix}: cannot be opened: No such file"):
        IndexedDataset(prefix)


def test_merge_that_forgot_its_documents_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "neox", [3, 2], [0])
    with pytest.raises(
        DataError, match=r"neox\.idx, byte 58: .* indices end at 0; expected 2, the"
    ):
        IndexedDataset(tmp_path / "neox")


def test_a_bin_that_shrinks_between_opening_and_reading(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    os.truncate(f"{prefix}.bin", 20)
    message = r"corpus\.bin, byte 20: the file has 20 bytes; expected 24, as when the dataset was"
    with pytest.raises(DataError, match=message):
        dataset.tokens(0, 2)


def test_a_bin_that_shrinks_while_it_is_read(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    reader = RowReader([dataset], 4, 100)
    zero = np.zeros(2, dtype=np.int64)
    assert reader.read(zero, np.array([1, 0]))[:, 0].tolist() == [4, 0]
    os.truncate(f"{prefix}.bin", 15)
    assert dataset.tokens(0, 7).tolist() == list(range(7))
    message = r"corpus\.bin, byte 15: the file ends; expected 3 more bytes: it was truncated after"
    with pytest.raises(DataError, match=message):
        reader.read(zero, np.array([1, 0]))
    with pytest.raises(DataError, match=message):
        dataset.tokens(4, 9)


def test_an_idx_that_shrinks_while_it_is_read(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    reader, first = RowReader([dataset], 11, 100), np.array([0])
    rows, positions = reader.document_ends(first, first)
    assert (rows.tolist(), positions.tolist()) == ([0, 0], [2, 6])
    os.truncate(f"{prefix}.idx", 100)
    message = r"corpus\.idx, byte 102: the file ends; expected 32 more bytes"
    with pytest.raises(DataError, match=message):
        reader.document_ends(first, first)
    with pytest.raises(DataError, match=r"corpus\.idx, byte 110: the file ends; expected 16 more"):
        dataset.document(2)


def test_a_dataset_that_is_replaced_by_another(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    assert dataset.tokens(0, 3).tolist() == [0, 1, 2]
    write_raw(prefix.with_name("new"), [20], [0, 1])
    os.replace(prefix.with_name("new.bin"), f"{prefix}.bin")
    assert dataset.tokens(9, 12).tolist() == [9, 10, 11]  # the file that was opened is still there
    dataset.close()
    with pytest.raises(
        DataError, match=r"corpus\.bin, byte 24: the file has 40 bytes; expected 24"
    ):
        dataset.tokens(0, 3)


def test_a_dtype_that_lies_about_the_sign(prefix: Path) -> None:
    """The sizes agree, so only the ids can tell: negative ones in uint16's upper half."""
    write_raw(prefix, [6], [0, 1], 8, np.array([1, 2, 40_000, 3, 4, 5]))
    patch(Path(f"{prefix}.idx"), 17, "<B", 3)
    dataset = IndexedDataset(prefix)
    with pytest.raises(DataError, match=r"corpus\.bin, byte 4: token id -25536; expected 0 to 999"):
        dataset.verify(1000)
    with pytest.raises(
        DataError, match=r"byte 4: token id -25536; expected 0 to 32767, the ids of"
    ):
        dataset.verify()
    message = r"corpus: sample 1 holds token id -25536 at position 0, .* ids 0 to 49999"
    with pytest.raises(DataError, match=message):
        RowReader([dataset], 2, 50_000).read(np.array([0]), np.array([1]))


def test_an_id_outside_of_the_vocabulary(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    dataset.verify(12)
    message = r"corpus\.bin, byte 22: token id 11; expected 0 to 10, the ids of the vocabulary"
    with pytest.raises(DataError, match=message):
        dataset.verify(11)


@pytest.mark.parametrize("document", [-1, 4, 2**40])
def test_a_document_out_of_range(prefix: Path, document: int) -> None:
    message = rf"corpus: document {document} was asked for; it has 4, counted from 0"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix).document(document)


@pytest.mark.parametrize("sample", [-1, 3, 2**62])
def test_a_sample_out_of_range(prefix: Path, sample: int) -> None:
    reader = RowReader([IndexedDataset(prefix)], 4, 100)
    rows = np.array([0, 0]), np.array([0, sample])
    message = rf"corpus: sample {sample} was asked for; it has 2 of 4 tokens, counted from 0"
    for read in (reader.read, reader.document_ends):
        with pytest.raises(DataError, match=message):
            read(*rows)


@pytest.mark.parametrize("range_", [(-1, 2), (3, 2), (0, 13), (12, 13)])
def test_tokens_out_of_range(prefix: Path, range_: tuple[int, int]) -> None:
    start, stop = range_
    message = rf"corpus\.bin: tokens \[{start}, {stop}\) were asked for; it has 12"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix).tokens(*range_)


def test_an_empty_dataset_opens_and_holds_nothing(tmp_path: Path) -> None:
    write_raw(tmp_path / "empty", [], [0])
    dataset = IndexedDataset(tmp_path / "empty")
    dataset.verify(1)
    assert (dataset.num_documents, dataset.num_tokens, len(dataset.tokens(0, 0))) == (0, 0, 0)
    with pytest.raises(DataError, match="empty: document 0 was asked for; it has 0"):
        dataset.document(0)
    with pytest.raises(DataError, match="empty: sample 0 was asked for; it has 0 of 4 tokens"):
        RowReader([dataset], 4, 100).read(np.array([0]), np.array([0]))


def test_an_empty_index_beside_tokens_is_refused(prefix: Path) -> None:
    write_raw(prefix, [], [0])
    Path(f"{prefix}.bin").write_bytes(b"\0\0")
    message = r"corpus\.idx, byte 18: no sequences, but a \.bin of 2 bytes; expected an empty \.bin"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_an_odd_number_of_bytes_is_refused(prefix: Path) -> None:
    """Pointers of a `.bin` with half a token can agree with each other at both ends."""
    Path(f"{prefix}.bin").write_bytes(bytes(25))
    for byte in (78, 86):
        patch(Path(f"{prefix}.idx"), byte, "<q", 15)
    message = r"corpus\.idx, byte 17: dtype uint16; expected one that divides 25 bytes of \.bin"
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


def test_arrays_outlive_their_dataset(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    reader = RowReader([dataset], 11, 100)
    arrays = [dataset.tokens(0, 12), dataset.document(3), reader.read(np.array([0]), np.array([0]))]
    ends = reader.document_ends(np.array([0]), np.array([0]))
    dataset.close()
    del dataset, reader
    gc.collect()
    for suffix in (".bin", ".idx"):
        os.truncate(f"{prefix}{suffix}", 0)
        os.unlink(f"{prefix}{suffix}")
    assert arrays[0].tolist() == list(range(12))
    assert arrays[1].tolist() == [7, 8, 9, 10, 11]
    assert arrays[2].tolist() == [list(range(12))]
    assert ends[1].tolist() == [2, 6]
    assert all(array.flags.owndata for array in arrays)


def test_sequence_modes_of_multimodal_files_are_ignored(prefix: Path) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes() + bytes([0, 1, 1, 0, 1]))
    dataset = IndexedDataset(prefix)
    dataset.verify(12)
    assert (dataset.num_tokens, dataset.document(1).tolist()) == (12, [3, 4, 5, 6])


def test_checks_do_not_vanish_when_python_optimises(prefix: Path) -> None:
    patch(Path(f"{prefix}.idx"), 126, "<q", 4)
    program = f"""
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.errors import DataError
try:
    IndexedDataset({str(prefix)!r})
except DataError as error:
    print(error, __debug__)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"{prefix}.idx, byte 126: the document indices end at 4; expected 5, the number of "
        "sequences False\n"
    )


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 65_536, 65_537])
def test_every_id_of_a_vocabulary_around_uint16_comes_back(tmp_path: Path, vocab_size: int) -> None:
    ids = np.array([0, vocab_size - 1, 1, 32_768, vocab_size - 2])
    with IndexedDatasetWriter(tmp_path / "c", token_dtype(vocab_size)) as writer:
        writer.add_document(ids)
        writer.finalize()
    dataset = IndexedDataset(tmp_path / "c")
    dataset.verify(vocab_size)
    assert dataset.document(0).tolist() == ids.tolist()
    row = np.zeros(1, dtype=np.int64)
    assert RowReader([dataset], 4, vocab_size).read(row, row).tolist() == [ids.tolist()]
    message = f"sample 0 holds token id {vocab_size - 1} at position 1, .* 0 to {vocab_size - 2}"
    with pytest.raises(DataError, match=message):
        RowReader([dataset], 4, vocab_size - 1).read(row, row)


def test_a_document_of_2_to_the_31_tokens_is_refused_before_it_is_written(tmp_path: Path) -> None:
    tokens = np.broadcast_to(np.uint16(7), 2**31)  # one token in memory
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        message = r"c: document 0: a document of 2147483648 tokens; the format allows 2147483647"
        with pytest.raises(DataError, match=message):
            writer.add_document(tokens)
        assert (writer.num_tokens, writer.num_documents) == (0, 0)
        writer.add_document([5])
        writer.finalize()
    dataset = IndexedDataset(tmp_path / "c")
    assert (dataset.num_documents, dataset.tokens(0, 1).tolist()) == (1, [5])
