"""What a rank receives: micro batches of samples with their masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_mer.errors import DataError


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank processes together; B = micro_batch_size, S = seq_length.

    The arrays are views that share memory with each other and with other micro batches: they are
    there to be read, and nothing may write to them.
    """

    inputs: NDArray[np.int64]
    """Shape (B, S)."""
    targets: NDArray[np.int64]
    """Shape (B, S): the token after each input."""
    mask: NDArray[np.float32]
    """Shape (B, S): 1 where the target counts, 0 where it does not."""
    is_replay: NDArray[np.bool_]
    """Shape (B,): whether the row was replayed."""


class Rows(Protocol):
    """Where the rows of a batch come from, one element a row."""

    @property
    def kind(self) -> NDArray[np.uint8]:
        """0 fresh, 1 replay."""

    @property
    def entry(self) -> NDArray[np.int32]:
        """Index into the plan's entries."""

    @property
    def dataset(self) -> NDArray[np.int32]:
        """Index into the plan's datasets."""

    @property
    def sample(self) -> NDArray[np.int64]:
        """Sample number in its dataset."""

    @property
    def ordinal(self) -> NDArray[np.int64]:
        """Number of the fresh row that it is, or repeats."""

    @property
    def slot(self) -> NDArray[np.int64]:
        """Slot of the replay buffer that the row is replayed from; -1: of none."""


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch, in order."""

    batch: int
    """Number of the global batch in the run, from 0: the data clock."""
    micro_batches: list[MicroBatch]
    """This rank's rows."""
    num_unmasked: int
    """Unmasked target tokens of the global batch: what its summed loss is divided by."""
    rows: Rows | None = None
    """Where all rows of the global batch come from, if the loader was asked to keep them."""
    buffer_seconds: float = 0.0
    """How long the replay buffer took to give this rank its rows."""


@dataclass(frozen=True)
class EvaluationBatch:
    """One rank's part of a batch of a held-out set."""

    batch: int
    """Number of the batch in the set, from 0."""
    micro_batches: list[MicroBatch]
    """This rank's rows; those after the set's last sample are masked."""
    num_unmasked: int
    """Unmasked target tokens over all ranks."""


def rank_rows(num_rows: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> range:
    """Return the rows of one rank: a global batch is cut in order into equal blocks.

    Raises:
        DataError: the rows do not divide into ranks of whole micro batches.
    """
    if not 0 <= dp_rank < dp_size or micro_batch_size < 1:
        raise DataError(
            f"dp_rank {dp_rank}, dp_size {dp_size}, micro_batch_size {micro_batch_size}; the rank "
            "must be in [0, dp_size) and the micro batch at least 1"
        )
    if num_rows % (dp_size * micro_batch_size):
        raise DataError(
            f"{num_rows} rows cannot be cut into {dp_size} ranks of micro batches of "
            f"{micro_batch_size}; batch.global_batch_size must be a multiple of their product"
        )
    share = num_rows // dp_size
    return range(dp_rank * share, (dp_rank + 1) * share)


def cut_micro_batches(
    samples: NDArray[np.int64],
    mask: NDArray[np.float32],
    is_replay: NDArray[np.bool_],
    micro_batch_size: int,
) -> list[MicroBatch]:
    """Cut a rank's rows, in order, into micro batches, without a copy.

    Args:
        samples: shape (rows, S + 1).
        mask: shape (rows, S).
        is_replay: shape (rows,).
        micro_batch_size: B, a divisor of rows.
    """
    pieces = (slice(i, i + micro_batch_size) for i in range(0, len(samples), micro_batch_size))
    return [
        MicroBatch(
            inputs=samples[piece, :-1],
            targets=samples[piece, 1:],
            mask=mask[piece],
            is_replay=is_replay[piece],
        )
        for piece in pieces
    ]
