"""Batches whose loss or gradient is not finite: no update, and the end if they are too many."""

from __future__ import annotations

from megatron_mer.errors import TrainingError
from megatron_mer.log import get_logger

MAX_SKIPPED_IN_A_ROW = 20
"""After so many batches in a row without a finite gradient the weights are beyond mending."""

logger = get_logger(__name__)


def note_skipped(batch: int, loss: float, in_a_row: int, rank: int) -> None:
    """Say that a batch had no update.

    Args:
        batch: its number.
        loss: nats a token.
        in_a_row: batches without an update since the last one, this included.
        rank: this rank.

    Raises:
        TrainingError: they are too many.
    """
    log = logger.warning if rank == 0 else logger.debug
    log(
        "batch %d: loss or gradient is not finite (loss %s); no update, its fresh rows are "
        "marked skipped",
        batch,
        loss,
    )
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"{MAX_SKIPPED_IN_A_ROW} batches in a row gave no finite loss and gradient, the "
            f"last is batch {batch}; start again from the last checkpoint with a lower "
            "optimizer.lr or optimizer.clip"
        )
