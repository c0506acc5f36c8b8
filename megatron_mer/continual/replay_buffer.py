"""The replay buffer of a run as one rank has it: it writes its share of the records, and reads any.

What the buffer holds and where each record lies follows from the plan (`_index.BufferLog`), so that
ranks need not tell each other. Segment s of the log is written by data-parallel rank s mod dp_size
alone, from its datasets: no file has two writers, and another dp_size moves nothing. Records are
written from a thread. What a rank has written goes with the numbers that the ranks share after
every step (`report`, `settle`); until all have, a row is read from its dataset, which is still
there.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mer.continual.plan import Plan
from megatron_mer.data.batches import Rows
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.packing import RowReader
from megatron_mer.data.record_faults import RecordMissing
from megatron_mer.data.record_store import RecordStore
from megatron_mer.errors import DataError

FAILED = -1.0
"""What a rank reports of a buffer that it could not write."""
NOTHING_TO_WRITE = float(2**53)
"""What a rank reports that writes no record."""

T = TypeVar("T")

_MOST_WAITING = 4
"""Batches whose records wait to be written before training waits for them."""
_ROWS_AT_ONCE = 1024
"""Rows that a build holds in memory at once."""


class Share(NamedTuple):
    """Which segments a rank writes: those with number % dp_size == dp_rank."""

    dp_rank: int
    dp_size: int


class _Job(NamedTuple):
    batch: int
    writes: Sequence[NDArray[np.int64]]
    done: threading.Event | None = None


class ReplayBuffer:
    """Holds the fresh rows that the plan says, as records in segment files.

    Args:
        plan: whose replay comes from a buffer; skipped batches are marked in it first.
        store: the records' files.
        datasets: open datasets by name: those of rows that may still have to be written.
        batch: batches that the run has behind it, whose rows are in the store or will be built.
        share: what this rank writes; None: it only reads.
        sync: flush each batch's records, so that ranks on other hosts can read them.
    """

    def __init__(
        self,
        plan: Plan,
        store: RecordStore,
        datasets: Mapping[str, IndexedDataset],
        batch: int,
        share: Share | None,
        sync: bool = False,
    ) -> None:
        self._store = store
        self._share = share
        self._sync = sync
        self._rows = RowReader(
            list(datasets.values()), store.format.seq_length, store.format.vocab_size
        )
        places = {name: place for place, name in enumerate(datasets)}
        self._names = plan.datasets
        self._places = np.array([places.get(name, -1) for name in plan.datasets])
        self._keys = np.array([dataset_key(name) for name in plan.datasets], dtype=np.int64)
        self._log = plan.buffer_log(store.segment_records)
        self._log.advance(batch)
        self._log.settle(batch)
        self._live: set[int] = set()
        self._done = batch
        self._failure: BaseException | None = None
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name="replay buffer", daemon=True)
        if share is not None:
            self._thread.start()

    @property
    def batch(self) -> int:
        """Batches whose rows entered."""
        return self._log.batch

    @property
    def tail(self) -> int:
        """Positions of the log that were given out so far."""
        return self._log.tail

    def live_segments(self) -> list[int]:
        """Segments with rows that the buffer holds now, increasing."""
        return self._log.live_segments()

    def build(self) -> None:
        """Write this rank's share of all that the buffer holds, from the datasets.

        Raises:
            DataError: a dataset is not there any more, or cannot be read.
            OSError: the disk refuses.
        """
        if self._share is None:
            return
        writes = self._mine(self._log.content())
        self._check_datasets(writes[3])
        for first in range(0, len(writes[0]), _ROWS_AT_ONCE):
            self._write([column[first : first + _ROWS_AT_ONCE] for column in writes])
        self._store.sync()

    def apply(self, batch: int) -> float:
        """The rows of a batch that was trained on, or was marked as skipped, enter.

        Returns:
            Seconds that it waited for the disk, which is several batches behind.
        """
        writes = self._log.advance(batch + 1)
        if self._share is None:
            return 0.0
        begin = time.perf_counter()
        self._put(_Job(batch + 1, self._mine(writes)))
        return time.perf_counter() - begin

    def report(self) -> float:
        """What this rank has to say, for `settle`: FAILED, or batches that are written."""
        if self._share is None:
            return NOTHING_TO_WRITE
        return FAILED if self._failure is not None else float(self._done)

    def settle(self, reports: Sequence[float]) -> None:
        """Read from the buffer what all ranks have written, from now on.

        Args:
            reports: every rank's `report` of one moment, none of them FAILED.
        """
        self._log.settle(int(min(reports)))
        live = set(self._log.live_segments())
        # A removed file keeps its space on the disk as long as somebody has it open. What is open
        # for writing is the other thread's.
        self._store.release(self._live - live)
        self._live = live

    def failure(self) -> str | None:
        """Why this rank could not write, for the others."""
        return None if self._failure is None else _said(self._failure)

    def flush(self) -> Callable[[], None]:
        """Have everything that entered so far flushed to the disk.

        Returns:
            Returns when that is done, called from any thread.

        Raises:
            DataError: by what is returned; a write failed.
        """
        if self._share is None:
            return lambda: None
        done = threading.Event()
        self._put(_Job(0, [], done))

        def wait() -> None:
            while not done.wait(0.05):
                if self._failure is not None or not self._thread.is_alive():
                    raise DataError(f"the replay buffer was not written: {self.failure()}")

        return wait

    def prune(self, needed: set[int], tail: int) -> None:
        """Remove segments that neither a kept checkpoint needs nor the run since.

        Only once all ranks have settled the batches before that checkpoint: until then a row that
        was moved is read from where it was.

        Args:
            needed: what kept checkpoints need.
            tail: of the log at the last of them.
        """
        first_open = tail // self._store.segment_records
        gone = [one for one in self._store.segments() if one < first_open and one not in needed]
        self._store.remove(gone)

    def find(self, rows: Rows) -> NDArray[np.int64]:
        """As `data.row_sources.HeldRows`."""
        at = np.full(len(rows.slot), -1, dtype=np.int64)
        held = rows.slot >= 0
        at[held] = self._log.find(rows.slot[held], rows.ordinal[held])
        return at

    def read(
        self, rows: Rows, at: NDArray[np.int64], which: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """As `data.row_sources.HeldRows`.

        Raises:
            DataError: a record is damaged or gone.
        """
        return self._where_it_is(self._store.read, rows, at, which)

    def count_ends(
        self, rows: Rows, at: NDArray[np.int64], which: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """As `data.row_sources.HeldRows`.

        Raises:
            DataError: a record is damaged or gone.
        """
        return self._where_it_is(self._store.count_ends, rows, at, which)

    def close(self) -> None:
        """Return when this rank writes no record any more; what waits is given up."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                while True:
                    self._jobs.get_nowait()
            self._jobs.put(None)
            self._thread.join()
        self._store.close()

    def _where_it_is(
        self,
        read: Callable[[NDArray[np.int64], NDArray[np.int64]], T],
        rows: Rows,
        at: NDArray[np.int64],
        which: NDArray[np.int64],
    ) -> T:
        """Read records, and where their segments have gone since, those that they were moved to."""
        identity = self._identity(rows.ordinal, rows.dataset, rows.sample)[which]
        place = at[which]
        while True:
            try:
                return read(place, identity)
            except RecordMissing:
                again = self.find(rows)[which]
                if (again == place).all():
                    raise
                place = again

    def _put(self, job: _Job) -> None:
        while self._failure is None:
            try:
                return self._jobs.put(job, timeout=0.05)
            except queue.Full:
                continue

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                if job.done is not None:
                    self._store.sync()
                    job.done.set()
                    continue
                self._write_job(job.writes)
                if self._sync:
                    self._store.sync()
                self._done = job.batch
        except BaseException as error:  # noqa: BLE001 - the training loop must hear of anything
            self._failure = error

    def _write_job(self, writes: Sequence[NDArray[np.int64]]) -> None:
        """Write what an advance of the log asks for, some batches later."""
        position, source, *rest = writes
        if not len(position):
            return
        # What the source was when the job was made may have been moved and removed since.
        moved = np.flatnonzero(source >= 0)
        source = source.copy()
        source[moved] = self._log.sources(position[moved])
        while True:
            try:
                self._write([position, source, *rest])
                break
            except RecordMissing:
                again = self._log.sources(position[moved])
                if (again == source[moved]).all():
                    raise
                source[moved] = again
        # Nothing is written to earlier segments any more.
        self._store.close_written(int(position.min()) // self._store.segment_records)

    def _mine(self, writes: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        if self._share is None:
            return [column[:0] for column in writes]
        segment = writes[0] // self._store.segment_records
        mine = segment % self._share.dp_size == self._share.dp_rank
        return [column[mine] for column in writes]

    def _write(self, writes: Sequence[NDArray[np.int64]]) -> None:
        position, source, ordinal, dataset, sample = writes
        moved = source >= 0
        self._store.copy(source[moved], position[moved])
        fresh = ~moved
        if not fresh.any():
            return
        dataset, sample = dataset[fresh], sample[fresh]
        self._check_datasets(dataset)
        place = self._places[dataset]
        identity = self._identity(ordinal[fresh], dataset, sample)
        ends = None
        if self._store.format.with_ends:
            ends = np.zeros((len(sample), self._store.format.seq_length), dtype=np.bool_)
            ends[self._rows.document_ends(place, sample)] = True
        self._store.write(position[fresh], identity, self._rows.read(place, sample), ends)

    def _check_datasets(self, dataset: NDArray[np.int64]) -> None:
        place = self._places[dataset]
        if (place < 0).any():
            gone = np.unique(dataset[place < 0]).tolist()
            names = ", ".join(repr(self._names[one]) for one in gone)
            raise DataError(
                f"the replay buffer needs samples of dataset {names} that it does not hold yet, "
                "and which is not there; bring it back"
            )

    def _identity(
        self, ordinal: NDArray[np.int64], dataset: NDArray[np.integer], sample: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        return np.stack([ordinal, self._keys[dataset], sample], axis=1)


def dataset_key(name: str) -> int:
    """What stands for a dataset in the identity of its records: 64 bits, signed."""
    digest = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(digest, "little", signed=True)


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, DataError | OSError) else repr(error)
