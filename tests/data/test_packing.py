"""Samples cut from a corpus."""

from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.packing import num_samples, read_samples
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
def dataset(tmp_path: Path) -> IndexedDataset:
    with IndexedDatasetWriter(tmp_path / "c", np.int16) as writer:
        writer.add_document(np.arange(11))
        writer.finalize()
    return IndexedDataset(tmp_path / "c")


def test_samples_share_one_token_with_their_neighbours(dataset: IndexedDataset) -> None:
    samples = read_samples(dataset, np.array([1, 0]), 4, 11)
    assert samples.dtype == np.int64
    assert samples.tolist() == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]


def test_a_sample_that_the_corpus_lacks_is_an_error(dataset: IndexedDataset) -> None:
    with pytest.raises(DataError, match=r"tokens \[8, 13\) were asked for; it has 11"):
        read_samples(dataset, np.array([2]), 4, 11)


def test_ids_outside_the_vocabulary_are_named(dataset: IndexedDataset) -> None:
    message = r"c: sample 1 holds token id 7 at position 3, .* ids 0 to 6"
    with pytest.raises(DataError, match=message):
        read_samples(dataset, np.array([0, 1]), 4, 7)


def test_negative_ids_are_named(tmp_path: Path) -> None:
    # A uint16 corpus whose index claims int16 has the right size: only the ids can tell.
    with IndexedDatasetWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document([1, 40_000, 3])
        writer.finalize()
    index = bytearray((tmp_path / "c.idx").read_bytes())
    index[17] = 3
    (tmp_path / "c.idx").write_bytes(index)
    with pytest.raises(DataError, match="holds token id -25536 at position 1"):
        read_samples(IndexedDataset(tmp_path / "c"), np.array([0]), 2, 50_000)
