"""Lengths of documents: exact against a plain walk, in pieces, beyond every small number."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mer.data import document_lengths as module
from megatron_mer.data.document_lengths import (
    DocumentBounds,
    DocumentLengths,
    document_lengths,
    log_edges,
)
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.errors import DataError


def write_sparse(prefix: Path, lengths: list[int], entries: list[int]) -> IndexedDataset:
    """Write byte tokens that are all zero, without filling the disk."""
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(sum(lengths))
    pointers = [sum(lengths[:at]) for at in range(len(lengths))]
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, len(lengths), len(entries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(entries)}q", *entries)
    )
    return IndexedDataset(prefix)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_lengths_of_documents_of_several_sequences_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    long = 2**31 - 1
    dataset = write_sparse(tmp_path / "c", [3, 2, 2, 0, 5, long, long, long], [0, 1, 3, 3, 4, 5, 8])
    expected = [3, 4, 0, 0, 5, 3 * long]
    found = [length for piece in DocumentBounds(dataset).lengths() for length in piece.tolist()]
    assert found == expected
    lengths = document_lengths(dataset)
    assert (lengths.documents, lengths.empty, lengths.shortest) == (6, 2, 3)
    assert lengths.figures() == {
        "min": 0,
        "median": 3,
        "mean": sum(expected) / 6,
        "p95": 3 * long,
        "max": 3 * long,
    }
    assert DocumentBounds(dataset).of(4, 6).tolist() == [7, 12, 12 + 3 * long]


def test_no_documents(tmp_path: Path) -> None:
    lengths = document_lengths(write_sparse(tmp_path / "c", [], [0]))
    assert (lengths.documents, lengths.figures(), lengths.shortest) == (0, None, None)
    with pytest.raises(DataError, match="without documents has no document lengths"):
        lengths.quantile(50)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        # Lengths at 34, pointers at 54, document indices at 94.
        (110, 9, r"byte 110: document 2 begins at sequence 9; expected sequences of the dataset"),
        (110, 0, r"byte 110: document 2 begins at token 0; expected tokens .* in ascending order"),
        (70, 99, r"byte 110: document 2 begins at token 99"),
    ],
)
def test_damage_is_named(tmp_path: Path, offset: int, value: int, message: str) -> None:
    write_sparse(tmp_path / "c", [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    path = tmp_path / "c.idx"
    data = bytearray(path.read_bytes())
    struct.pack_into("<q", data, offset, value)
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        document_lengths(IndexedDataset(tmp_path / "c"))


def of(lengths: list[int], short: int = 1 << 20) -> DocumentLengths:
    array = np.array(lengths, dtype=np.int64)
    counts = np.bincount(array[array < short], minlength=1 << 20).astype(np.int64)
    return DocumentLengths(counts, np.sort(array[array >= short]), sum(lengths))


LENGTHS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**40)), min_size=1, max_size=40)


@given(LENGTHS, st.integers(0, 100))
def test_quantiles_are_exact(lengths: list[int], percent: int) -> None:
    rank = max(1, -(-len(lengths) * percent // 100))
    assert of(lengths).quantile(percent) == sorted(lengths)[rank - 1]


@given(LENGTHS, st.integers(1, 8))
def test_a_histogram_counts_every_document_that_is_not_empty(
    lengths: list[int], per_doubling: int
) -> None:
    found = of(lengths)
    edges = log_edges(max(1, *lengths), per_doubling)
    assert edges[0] == 1
    assert edges[-2] <= max(1, *lengths) < edges[-1]
    assert np.all(np.diff(edges) > 0)
    expected, _ = np.histogram([n for n in lengths if n], bins=edges - 0.5)
    assert found.histogram(edges).tolist() == expected.tolist()
    assert int(found.histogram(edges).sum()) + found.empty == len(lengths)


def test_edges_are_powers_of_two_for_one_bin_a_doubling() -> None:
    assert log_edges(1, 1).tolist() == [1, 2]
    assert log_edges(8, 1).tolist() == [1, 2, 4, 8, 16]
    assert log_edges(7, 2).tolist() == [1, 2, 3, 4, 6, 8]
