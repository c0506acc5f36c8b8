"""Held-out sets: every sample once, for every layout."""

from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.evaluation_set import EvaluationSet
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.errors import DataError

SEQ_LENGTH = 4
VOCAB_SIZE = 50


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    """44 tokens, 10 samples; documents end at tokens 9, 10 and 43."""
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 44)
    with IndexedDatasetWriter(tmp_path / "valid", np.uint16) as writer:
        writer.add_documents(tokens, [10, 1, 33])
        writer.finalize()
    return IndexedDataset(tmp_path / "valid")


def gather(
    subject: EvaluationSet, dp_size: int, micro: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return all ranks' rows together: tokens (rows, S + 1), mask (rows, S), counts a batch."""
    ranks = [list(subject.batches(rank, dp_size, micro)) for rank in range(dp_size)]
    tokens, masks, counts = [], [], []
    for number, parts in enumerate(zip(*ranks, strict=True)):
        assert {part.batch for part in parts} == {number}
        (count,) = {part.num_unmasked for part in parts}
        counts.append(count)
        for micro_batch in (m for part in parts for m in part.micro_batches):
            assert micro_batch.inputs.shape == (micro, SEQ_LENGTH)
            assert not micro_batch.is_replay.any()
            tokens.append(np.hstack((micro_batch.inputs, micro_batch.targets[:, -1:])))
            masks.append(micro_batch.mask)
    return np.concatenate(tokens), np.concatenate(masks), counts


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_every_sample_once_in_order(dataset: IndexedDataset, dp_size: int, micro: int) -> None:
    subject = EvaluationSet(dataset, SEQ_LENGTH, 4, None, VOCAB_SIZE)
    tokens, mask, counts = gather(subject, dp_size, micro)
    assert (subject.num_samples, subject.num_batches, len(tokens)) == (10, 3, 12)
    for sample in range(10):
        expected = dataset.tokens(sample * SEQ_LENGTH, (sample + 1) * SEQ_LENGTH + 1)
        np.testing.assert_array_equal(tokens[sample], expected)
    assert mask[:10].all()
    assert not mask[10:].any()
    assert not tokens[10:].any()
    assert counts == [16, 16, 8]
    assert subject.num_tokens == 40


def test_max_samples_takes_the_first_whatever_the_batch(dataset: IndexedDataset) -> None:
    for rows, batches in ((1, 7), (4, 2), (8, 1)):
        subject = EvaluationSet(dataset, SEQ_LENGTH, rows, None, VOCAB_SIZE, max_samples=7)
        assert (subject.num_samples, subject.num_batches, subject.num_tokens) == (7, batches, 28)
        tokens, mask, _ = gather(subject, 1, 1)
        np.testing.assert_array_equal(mask.sum(1), [SEQ_LENGTH] * 7 + [0] * (rows * batches - 7))
        np.testing.assert_array_equal(tokens[6], dataset.tokens(24, 29))
    both = EvaluationSet(dataset, SEQ_LENGTH, 4, 1, VOCAB_SIZE, max_samples=7)
    assert both.num_samples == 4


def test_max_batches_takes_the_first(dataset: IndexedDataset) -> None:
    subject = EvaluationSet(dataset, SEQ_LENGTH, 4, 2, VOCAB_SIZE)
    tokens, mask, counts = gather(subject, 1, 4)
    assert (subject.num_tokens, counts, len(tokens), mask.all()) == (32, [16, 16], 8, True)
    assert EvaluationSet(dataset, SEQ_LENGTH, 4, 99, VOCAB_SIZE).num_tokens == 40


def test_unigram_entropy(dataset: IndexedDataset) -> None:
    subject = EvaluationSet(dataset, SEQ_LENGTH, 4, None, VOCAB_SIZE)
    targets = dataset.tokens(1, 41)
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    assert subject.unigram_entropy() == pytest.approx(-sum(p * np.log(p) for p in shares))


def test_no_whole_sample_is_an_error(dataset: IndexedDataset) -> None:
    with pytest.raises(DataError, match=r"valid has 44 tokens, .* seq_length 44"):
        EvaluationSet(dataset, 44, 4, None, VOCAB_SIZE)


def test_rows_must_divide(dataset: IndexedDataset) -> None:
    subject = EvaluationSet(dataset, SEQ_LENGTH, 4, None, VOCAB_SIZE)
    with pytest.raises(DataError, match="4 rows cannot be cut into 3 ranks"):
        next(subject.batches(0, 3, 1))


def test_ids_outside_the_vocabulary(dataset: IndexedDataset) -> None:
    subject = EvaluationSet(dataset, SEQ_LENGTH, 4, None, 5)
    with pytest.raises(DataError, match="the model's vocabulary has ids 0 to 4"):
        next(subject.batches(0, 1, 4))
