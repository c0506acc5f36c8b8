"""Samples cut from a corpus."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data import packing
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.packing import RowReader, num_samples
from megatron_mer.errors import DataError


@pytest.mark.parametrize(
    ("tokens", "seq_length", "expected"),
    [
        (5, 4, 1),
        (8, 4, 1),
        (9, 4, 2),
        (2, 1, 1),
        (2_048_000_001, 2048, 1_000_000),
        (2**60, 1, 2**60 - 1),
    ],
)
def test_num_samples(tokens: int, seq_length: int, expected: int) -> None:
    assert num_samples(tokens, seq_length) == expected


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_no_sample_is_an_error(tokens: int) -> None:
    message = rf"data/fr has {tokens} tokens, .* seq_length 4: at least 5 tokens"
    with pytest.raises(DataError, match=message):
        num_samples(tokens, 4, "data/fr")
    with pytest.raises(DataError, match="seq_length 0"):
        num_samples(tokens, 0)


@pytest.fixture
def datasets(tmp_path: Path) -> list[IndexedDataset]:
    """Three corpora of 11, 200 and 50 tokens, of different dtypes."""
    opened = []
    for name, count, dtype in (("a", 11, np.int16), ("b", 200, np.uint16), ("c", 50, np.int32)):
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            writer.add_documents(np.arange(count), [5, 0, count - 5])
            writer.finalize()
        opened.append(IndexedDataset(tmp_path / name))
    return opened


def test_samples_share_one_token_with_their_neighbours(datasets: list[IndexedDataset]) -> None:
    rows = RowReader(datasets, 4, 200).read(np.array([0, 0]), np.array([1, 0]))
    assert rows.dtype == np.int64
    assert rows.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_rows_of_many_datasets_keep_their_order(
    datasets: list[IndexedDataset], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(packing, "FILES_AT_ONCE", at_once)
    reader, generator = RowReader(datasets, 4, 200), np.random.default_rng(0)
    dataset = generator.integers(0, 3, 100).astype(np.int32)
    sample = generator.integers(0, np.array([2, 49, 12])[dataset])
    expected = (4 * sample)[:, None] + np.arange(5)
    np.testing.assert_array_equal(reader.read(dataset, sample), expected)
    rows, positions = reader.document_ends(dataset, sample)
    marks = np.zeros((100, 4), dtype=int)
    np.add.at(marks, (rows, positions), 1)
    ends = np.array([10, 199, 49])[dataset][:, None]
    inputs = expected[:, :4]
    np.testing.assert_array_equal(marks, (inputs == 4) | (inputs == ends))


def test_no_rows(datasets: list[IndexedDataset]) -> None:
    reader, none = RowReader(datasets, 4, 200), np.zeros(0, dtype=np.int64)
    assert reader.read(none, none).shape == (0, 5)
    rows, positions = reader.document_ends(none, none)
    assert (rows.shape, positions.shape) == ((0,), (0,))


def test_no_dataset_is_counted_from_the_end(datasets: list[IndexedDataset]) -> None:
    reader = RowReader(datasets, 4, 200)
    for read in (reader.read, reader.document_ends):
        with pytest.raises(DataError, match="rows come from dataset -1, which is not among those"):
            read(np.array([0, -1]), np.array([0, 0]))


def test_errors_name_the_corpus_among_many(datasets: list[IndexedDataset]) -> None:
    dataset, sample = np.array([1, 2, 0, 1]), np.array([3, 11, 1, 2])
    reader = RowReader(datasets, 4, 47)
    with pytest.raises(
        DataError, match=r"/c: sample 11 holds token id 47 at position 3, .* 0 to 46"
    ):
        reader.read(dataset, sample)
    os.truncate(datasets[2].bin_path, 47 * 4)
    with pytest.raises(DataError, match=r"/c\.bin, byte 188: the file ends; expected 8 more bytes"):
        reader.read(dataset, sample)
    datasets[2].index.file.open()
    os.truncate(datasets[2].idx_path, 80)
    with pytest.raises(DataError, match=r"/c\.idx, byte 80: the file ends"):
        reader.document_ends(dataset, sample)


def test_a_read_that_the_system_refuses_is_named(
    datasets: list[IndexedDataset], tmp_path: Path
) -> None:
    file = datasets[1].bin_file
    descriptor, folder = file.open().descriptor, os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, descriptor)
    os.close(folder)
    with pytest.raises(DataError, match=r"/b\.bin, byte 16: \[Errno 21\] Is a directory"):
        RowReader(datasets, 4, 200).read(np.array([1]), np.array([2]))
    with pytest.raises(DataError, match=r"/b\.bin, byte 16: \[Errno 21\] Is a directory"):
        datasets[1].tokens(8, 9)
