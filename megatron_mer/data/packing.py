"""Samples: how a corpus is cut into training examples.

A corpus of n tokens has (n - 1) // S samples of seq_length S; sample i is its tokens [i S, i S +
S], both ends included: S + 1 tokens, of which the first S are inputs and the last S their targets.
Neighbouring samples share one token, which is a target of the first and an input of the second, so
every token but the first is a target exactly once. Documents are not padded and not kept apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.errors import DataError


def num_samples(num_tokens: int, seq_length: int, name: str = "the dataset") -> int:
    """Return how many samples a corpus holds: integer arithmetic, exact at any size.

    Args:
        num_tokens: tokens of the corpus.
        seq_length: S, at least 1.
        name: of the corpus, for the error.

    Raises:
        DataError: there is not one whole sample.
    """
    if seq_length < 1:
        raise DataError(f"seq_length {seq_length}; it must be at least 1")
    count = (num_tokens - 1) // seq_length
    if count < 1:
        raise DataError(
            f"{name} has {num_tokens} tokens, which hold no sample of seq_length {seq_length}: "
            f"at least {seq_length + 1} tokens are needed; add text or shorten model.seq_length"
        )
    return count


def read_samples(
    dataset: IndexedDataset, samples: NDArray[np.int64], seq_length: int, vocab_size: int
) -> NDArray[np.int64]:
    """Read whole samples.

    Args:
        dataset: corpus.
        samples: shape (n,), sample numbers.
        seq_length: S.
        vocab_size: ids must be in [0, vocab_size).

    Returns:
        Shape (n, S + 1).

    Raises:
        DataError: no such sample, or an id outside the vocabulary (names corpus, sample, id).
    """
    out = np.empty((len(samples), seq_length + 1), dtype=np.int64)
    signed = dataset.dtype.kind == "i"
    for row, sample in enumerate(samples.tolist()):
        start = sample * seq_length
        tokens = dataset.tokens(start, start + seq_length + 1)
        if tokens.max() >= vocab_size or (signed and tokens.min() < 0):
            raise _outside_vocabulary(dataset, sample, tokens.astype(np.int64), vocab_size)
        out[row] = tokens
    return out


def _outside_vocabulary(
    dataset: IndexedDataset, sample: int, tokens: NDArray[np.int64], vocab_size: int
) -> DataError:
    place = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
    return DataError(
        f"{dataset.prefix}: sample {sample} holds token id {int(tokens[place])} at position "
        f"{place}, "
        f"the model's vocabulary has ids 0 to {vocab_size - 1}; the corpus was tokenized with "
        "another vocabulary, or model.vocab_size is too small"
    )
