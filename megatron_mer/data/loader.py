"""Training batches: the plan says which samples, a background thread reads them ahead.

A thread and not worker processes: a batch is read in C++ without the interpreter's lock, and
nothing has to be copied between processes. Threads hand over through one condition variable.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from megatron_mer.data.batches import RankBatch, Rows, cut_micro_batches, rank_rows
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.row_sources import HeldRows, RowSources
from megatron_mer.errors import DataError, MegatronMerError, TrainingError

REPLAY = 1
"""`Rows.kind` of a replayed row."""


class Plan(Protocol):
    """The part of a run's plan that the loader uses."""

    @property
    def total_batches(self) -> int:
        """Batches of the whole run."""

    @property
    def datasets(self) -> Sequence[str]:
        """Dataset names."""

    def datasets_from(self, batch: int) -> Sequence[str]:
        """Datasets that the rows of a batch and those after it may come from."""

    def rows(self, batch: int, start: int = 0, stop: int | None = None) -> Rows:
        """Return the rows [start, stop) of a batch, in order."""

    def global_batch_size(self, batch: int) -> int:
        """Return the rows of a batch over all ranks."""

    def mark_skipped(self, batch: int) -> Any:
        """Note that a batch was drawn but not trained on."""


class TrainLoader:
    """Iterates over one rank's batches of a run, from `first_batch` to the end of the plan.

    Args:
        plan: maps (batch, row) to a sample.
        datasets: open datasets by name; all that the plan's rows may come from.
        seq_length: S.
        vocab_size: ids must be in [0, vocab_size).
        dp_rank: this rank's place among the data-parallel ranks.
        dp_size: number of them.
        micro_batch_size: rows of a micro batch.
        eod_mask_loss: whether the first token of each document is no target.
        first_batch: batch to begin with: the batches drawn so far.
        prefetch: batches read ahead, at least 1.
        keep_rows: whether each batch says where all its rows come from, other ranks' too.
        buffer: has the replayed rows that it holds; None: all rows are read from datasets.

    Raises:
        DataError: a dataset of the plan is missing.
    """

    def __init__(
        self,
        plan: Plan,
        datasets: Mapping[str, IndexedDataset],
        seq_length: int,
        vocab_size: int,
        dp_rank: int,
        dp_size: int,
        micro_batch_size: int,
        eod_mask_loss: bool = False,
        first_batch: int = 0,
        prefetch: int = 2,
        keep_rows: bool = False,
        buffer: HeldRows | None = None,
    ) -> None:
        used = plan.datasets_from(first_batch)
        missing = [name for name in used if name not in datasets]
        if missing:
            raise DataError(f"the plan uses datasets that are not open: {', '.join(missing)}")
        self._plan = plan
        self._sources = RowSources(
            {name: datasets[name] for name in used},
            plan.datasets,
            seq_length,
            vocab_size,
            eod_mask_loss,
            buffer,
        )
        self._seq_length = seq_length
        self._dp = (dp_rank, dp_size)
        self._micro_batch_size = micro_batch_size
        self._eod_mask_loss = eod_mask_loss
        self._keep_rows = keep_rows
        self._delivered = first_batch - 1
        self._prefetch = max(1, prefetch)
        self._closed = False
        self._reader = _ReadAhead(self, first_batch, self._prefetch)

    def __iter__(self) -> TrainLoader:
        """Return the loader."""
        return self

    def __next__(self) -> RankBatch:
        """Return the next batch.

        Raises:
            DataError: a dataset could not be read; also on every later call.
            TrainingError: reading failed for another reason, or the loader is closed.
        """
        if self._closed:
            raise TrainingError("the data loader is closed")
        batch = self._reader.take()
        self._delivered = batch.batch
        return batch

    def skip(self, batch: int) -> None:
        """Note that the batch just delivered was not trained on, and draw the following ones anew.

        Its fresh rows must never be replayed, so batches that were read ahead are dropped.

        Raises:
            TrainingError: it is not the batch that was delivered last.
        """
        if batch != self._delivered:
            raise TrainingError(
                f"batch {batch} cannot be skipped: the last one delivered is {self._delivered}"
            )
        self._reader.stop()
        self._plan.mark_skipped(batch)
        self._reader = _ReadAhead(self, batch + 1, self._prefetch)

    def close(self) -> None:
        """Stop the background thread and wait for it: at most the batch being read."""
        self._closed = True
        self._reader.stop()

    def __enter__(self) -> TrainLoader:
        """Return the loader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the loader."""
        self.close()

    @property
    def total_batches(self) -> int:
        """Batches of the whole run."""
        return self._plan.total_batches

    def read(self, batch: int) -> RankBatch:
        """Read this rank's part of a batch, in the calling thread."""
        size = self._plan.global_batch_size(batch)
        mine = rank_rows(size, *self._dp, self._micro_batch_size)
        # How many targets count is known only from all ranks' rows, unless all of them count.
        places = range(size) if self._eod_mask_loss or self._keep_rows else mine
        rows = self._plan.rows(batch, places.start, places.stop)
        own = slice(mine.start - places.start, mine.stop - places.start)
        samples = self._sources.read(rows, own)
        num_unmasked = size * self._seq_length - samples.num_left_out
        if num_unmasked == 0:
            raise DataError(
                f"no target of batch {batch} counts: batch.eod_mask_loss leaves the first token of "
                f"each document out, and its {size} rows hold nothing but first tokens; leave the "
                "option out or use longer documents"
            )
        replayed = np.asarray(rows.kind)[own] == REPLAY
        return RankBatch(
            batch=batch,
            micro_batches=cut_micro_batches(
                samples.tokens, samples.mask, replayed, self._micro_batch_size
            ),
            num_unmasked=num_unmasked,
            rows=rows if self._keep_rows else None,
            buffer_seconds=samples.buffer_seconds,
        )


class _ReadAhead:
    """A thread that reads batches in order and waits while `limit` of them are ready."""

    def __init__(self, loader: TrainLoader, first_batch: int, limit: int) -> None:
        self._loader = loader
        self._limit = limit
        self._changed = threading.Condition()
        self._ready: deque[RankBatch] = deque()
        self._failure: tuple[int, BaseException] | None = None
        self._finished = self._stopped = False
        self._thread = threading.Thread(
            target=self._run, args=(first_batch,), name="data-loader", daemon=True
        )
        self._thread.start()

    def take(self) -> RankBatch:
        """Wait for the next batch; the failure of the thread comes after what it read before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._finished)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._failure is not None:
                raise _explain(*self._failure) from self._failure[1]
            raise StopIteration

    def stop(self) -> None:
        """Drop what was read ahead and wait for the thread to end."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self, first_batch: int) -> None:
        batch = first_batch
        try:
            for batch in range(first_batch, self._loader.total_batches):
                if not self._offer(batch):
                    return
        except BaseException as error:  # noqa: BLE001 - the training loop must hear of anything
            with self._changed:
                self._failure = (batch, error)
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _offer(self, batch: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._limit)
            if self._stopped:
                return False
        read = self._loader.read(batch)
        with self._changed:
            if not self._stopped:
                self._ready.append(read)
                self._changed.notify_all()
            return not self._stopped


def _explain(batch: int, error: BaseException) -> MegatronMerError:
    kind = DataError if isinstance(error, DataError) else TrainingError
    name = "" if isinstance(error, MegatronMerError) else f"{type(error).__name__}: "
    return kind(f"reading batch {batch} failed: {name}{error}")
