"""A held-out set: every sample once, in order, the same for every layout and every evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.batches import EvaluationBatch, cut_micro_batches, rank_rows
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import RowReader, num_samples
from megatron_mer.data.tokenizers import Tokenizer


class EvaluationSet:
    """The batches of a held-out set.

    A set is read once from its beginning and never wrapped. Its last batch is filled up with masked
    rows, so every batch has the same shape. Tokens after the last whole sample are left out.
    Every token counts, whatever training masks, so that runs with other masks can be compared.

    Args:
        dataset: the held-out corpus.
        seq_length: S.
        rows_per_batch: rows of a batch over all ranks, at least 1.
        max_batches: use only the first batches; None: all.
        vocab_size: ids must be in [0, vocab_size).
        max_samples: use only the first samples; None: all.

    Raises:
        DataError: there is not one whole sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        rows_per_batch: int,
        max_batches: int | None,
        vocab_size: int,
        max_samples: int | None = None,
    ) -> None:
        samples = num_samples(dataset.num_tokens, seq_length, dataset.prefix)
        if max_batches is not None:
            samples = min(samples, max_batches * rows_per_batch)
        if max_samples is not None:
            samples = min(samples, max_samples)
        self._reader = RowReader([dataset], seq_length, vocab_size)
        self._seq_length = seq_length
        self._rows = rows_per_batch
        self._vocab_size = vocab_size
        self.num_samples = samples
        """Samples that are evaluated."""

    @property
    def num_batches(self) -> int:
        """Batches, the padded last one included."""
        return -(-self.num_samples // self._rows)

    @cached_property
    def num_tokens(self) -> int:
        """Target tokens that count, over all batches."""
        return self._count_unmasked(0, self.num_samples)

    def unigram_entropy(self) -> float:
        """Return the entropy of the counted targets' frequencies, in nats a token.

        It is the loss of the best model that ignores its input: -sum p log p over the ids.
        """
        return self._unigram_entropy

    def num_bytes(self, tokenizer: Tokenizer) -> int | None:
        """UTF-8 bytes of the text that the counted targets stand for.

        Returns:
            None if a target stands for text that the tokenizer does not know.
        """
        total = 0
        for first in range(0, self.num_samples, self._rows):
            found = tokenizer.num_bytes(
                self._read(first, min(first + self._rows, self.num_samples))
            )
            if found is None:
                return None
            total += found
        return total

    @cached_property
    def _unigram_entropy(self) -> float:
        counts = np.zeros(self._vocab_size, dtype=np.int64)
        for first in range(0, self.num_samples, self._rows):
            samples = self._read(first, min(first + self._rows, self.num_samples))
            counts += np.bincount(samples[:, 1:].ravel(), minlength=self._vocab_size)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def batches(
        self, dp_rank: int, dp_size: int, micro_batch_size: int
    ) -> Iterator[EvaluationBatch]:
        """Yield one rank's part of every batch.

        Raises:
            DataError: the rows do not divide into ranks of whole micro batches, or reading fails.
        """
        place = rank_rows(self._rows, dp_rank, dp_size, micro_batch_size)
        for batch in range(self.num_batches):
            first = batch * self._rows
            samples, mask = self._padded(first + place.start, first + place.stop)
            replayed = np.zeros(len(samples), dtype=np.bool_)
            yield EvaluationBatch(
                batch=batch,
                micro_batches=cut_micro_batches(samples, mask, replayed, micro_batch_size),
                num_unmasked=self._count_unmasked(first, min(first + self._rows, self.num_samples)),
            )

    def _padded(self, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read samples [first, stop); rows after the last sample are zeros with mask 0."""
        samples = np.zeros((stop - first, self._seq_length + 1), dtype=np.int64)
        mask = np.zeros((stop - first, self._seq_length), dtype=np.float32)
        real = max(0, min(stop, self.num_samples) - first)
        samples[:real] = self._read(first, first + real)
        mask[:real] = 1
        return samples, mask

    def _read(self, first: int, stop: int) -> NDArray[np.int64]:
        numbers = np.arange(first, stop, dtype=np.int64)
        return self._reader.read(np.zeros_like(numbers), numbers)

    def _count_unmasked(self, first: int, stop: int) -> int:
        return (stop - first) * self._seq_length
