"""Two ranks of one replay buffer in one process, with disks that are as late as a test wants."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mer.checkpoint.layout import step_name
from megatron_mer.config import load_config
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.replay_buffer import ReplayBuffer, Share
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.packing import RowReader
from megatron_mer.data.record_store import RecordStore
from megatron_mer.data.sidecar import Provenance
from megatron_mer.training.buffer_folder import BufferFolder
from megatron_mer.training.run_buffer import RunBuffer
from tests.tiny_run import TinyRun

SEQ_LENGTH, VOCAB, ROWS, STEPS, AHEAD, MOST_LATE = 7, 500, 8, 40, 4, 3
TASKS = ("en", "fr", "de")


class Rank:
    """One rank's part, whose disk takes a batch only when it is told to."""

    def __init__(self, rows: ReplayBuffer, run: RunBuffer) -> None:
        self.rows, self.run = rows, run
        self._turn = threading.Semaphore(0)
        write = rows._write_job

        def in_turn(writes: Any) -> None:
            self._turn.acquire()
            write(writes)

        rows._write_job = in_turn  # type: ignore[method-assign]
        self._allowed = 0

    def catch_up(self, batches: int) -> None:
        """Have the rows of so many batches of the run on the disk."""
        while self._allowed < batches:
            self._allowed += 1
            self._turn.release()
        deadline = time.monotonic() + 20
        while self.rows.report() < batches:
            assert self.rows.failure() is None, self.rows.failure()
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def close(self) -> None:
        for _ in range(2 * MOST_LATE):
            self._turn.release()
        self.run.close()


@pytest.fixture
def datasets(tmp_path: Path) -> dict[str, IndexedDataset]:
    generator = np.random.default_rng(1)
    for task in TASKS:
        writer = IndexedDatasetWriter(tmp_path / task, np.uint16)
        for length in generator.integers(5, 60, 80).tolist():
            writer.add_document(generator.integers(1, VOCAB, length))
        writer.finalize(Provenance("random", "0" * 64, VOCAB, 0, append_eod=False))
    return {task: IndexedDataset(tmp_path / task) for task in TASKS}


def plan_of(datasets: dict[str, IndexedDataset], capacity: int) -> Plan:
    sizes = {name: (one.num_tokens - 1) // SEQ_LENGTH for name, one in datasets.items()}
    stream = tuple(
        EntrySpec(task, (DatasetSpec(task, sizes[task]),), steps=STEPS, max_epochs=100.0)
        for task in TASKS
    )
    replay = ReplaySpec(Decimal("0.5"), source="buffer", capacity=capacity)
    return Plan(PlanSpec(3, ROWS, SEQ_LENGTH, replay, stream))


Make = Callable[[Plan], list[Rank]]


@pytest.fixture
def make(tiny: TinyRun, datasets: dict[str, IndexedDataset]) -> Iterator[Make]:
    made: list[Rank] = []

    def ranks(plan: Plan) -> list[Rank]:
        config = load_config(
            tiny.write("run"), ["--replay.source=buffer", "--replay.capacity_samples=9"]
        )
        folder = BufferFolder(config, "0" * 64, tiny.folder / "checkpoints")
        about, _ = folder.open(None, plan.num_slots)
        for rank in (0, 1):
            format = about.record_format()
            format = type(format)(SEQ_LENGTH, VOCAB, False, format.key)
            # Few records a segment, so that segments come and go.
            store = RecordStore(folder.path, format, 4)
            rows = ReplayBuffer(plan, store, datasets, 0, Share(rank, 2))
            own = folder if rank == 0 else None
            made.append(Rank(rows, RunBuffer(about, own, rows, str(folder.path))))
        return made

    yield ranks
    for one in made:
        one.close()


def read(rank: Rank, plan: Plan, batch: int, datasets: dict[str, IndexedDataset]) -> Any:
    """Look the rows of a batch up now; what is returned reads them later, and compares."""
    rows = plan.rows(batch)
    at = rank.rows.find(rows)
    which = np.flatnonzero(at >= 0)

    def later() -> int:
        # A file that is open would be read although it was removed.
        rank.rows._store.release(list(rank.rows._store._readers))
        found, _ = rank.rows.read(rows, at, which)
        reader = RowReader(list(datasets.values()), SEQ_LENGTH, VOCAB)
        dataset, sample = rows.dataset[which], rows.sample[which].astype(np.int64)
        np.testing.assert_array_equal(found, reader.read(dataset.astype(np.int64), sample))
        return len(which)

    return later


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("capacity", [24, 60])
def test_rows_are_found_however_late_the_disks_are(make, datasets, tmp_path, capacity, every):
    """A training run's order of calls, at its worst.

    Reports are older than the flush of the checkpoint that is named next; rank 1 comes to its
    `settle` when rank 0 has removed what it could already; rows are read long after they were
    looked up, and records are moved long after it was decided from where.
    """
    plan = plan_of(datasets, capacity)
    ranks = make(plan)
    random_ = random.Random(capacity * 10 + every)
    checkpoints = tmp_path / "checkpoints"
    replayed = 0
    for batch in range(plan.total_batches):
        reports = [one.run.report() for one in ranks]
        ahead = range(batch + 1, min(batch + 1 + AHEAD, plan.total_batches))
        waiting = [read(one, plan, later, datasets) for one in ranks for later in ahead]
        for one in ranks:
            one.run.apply(batch)
            one.run.settle(reports)
            replayed += sum(work() for work in waiting)
            waiting = [read(one, plan, later, datasets) for one in ranks for later in ahead]
        for one in ranks:
            one.catch_up(batch + 1 - random_.randint(0, MOST_LATE))
        if batch % every == 0:
            save(ranks, checkpoints, batch)
        replayed += sum(work() for work in waiting)
    assert replayed > 1000
    ranks[0].run.finish()
    for one in ranks:
        one.catch_up(plan.total_batches)
    # What the last checkpoint needs, and what came since: not much more than is live.
    there = len(list(ranks[0].rows._store.segments()))
    assert there <= len(ranks[0].rows.live_segments()) + (every * ROWS) // 4 + 2


def save(ranks: list[Rank], checkpoints: Path, batch: int) -> None:
    """As a checkpoint does: its records first, then its name, then older ones go."""
    ranks[0].run.saved(batch)
    flushed = [one.run.flush() for one in ranks]
    for one, wait in zip(ranks, flushed, strict=True):
        one.catch_up(batch + 1)
        wait()
    (checkpoints / step_name(batch)).mkdir(parents=True)
    for old in checkpoints.iterdir():
        if old.name != step_name(batch):
            os.rmdir(old)
    ranks[0].run.committed()
