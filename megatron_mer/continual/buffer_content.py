"""What a replay buffer holds after some batches, by task, dataset and age: exact, from the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_mer.continual.entries import Entry
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.replay_buffer import dataset_key

AGES = 10
"""Equal parts of all fresh rows that `report` counts by age."""

_Key = TypeVar("_Key")


@dataclass
class _Share:
    """Rows that entered, those of them that are held, and how many were to be expected."""

    fresh_rows: int = 0
    rows: int = 0
    expected: float = 0.0

    def add(self, fresh_rows: int, rows: int, chance: float) -> None:
        self.fresh_rows += fresh_rows
        self.rows += rows
        self.expected += fresh_rows * chance


@dataclass(frozen=True)
class BufferContent:
    """The rows that a buffer holds, in the order of their records in the log."""

    plan: Plan
    batch: int
    """Batches whose rows entered."""
    tail: int
    """Positions of the log that were given out by then."""
    segments: tuple[int, ...]
    """Segments of the log with a row that is held, increasing."""
    position: NDArray[np.int64]
    """(n,) where each row's record lies."""
    ordinal: NDArray[np.int64]
    """(n,) as `Rows.ordinal`."""
    dataset: NDArray[np.int64]
    """(n,) index into the plan's datasets."""
    sample: NDArray[np.int64]
    """(n,) sample within the dataset."""
    entry: NDArray[np.int64]
    """(n,) index into the plan's entries."""

    @classmethod
    def at(cls, plan: Plan, segment_records: int, batch: int) -> BufferContent:
        """What the buffer holds before a batch.

        Args:
            plan: with a buffer, and with every batch marked that was skipped before `batch`.
            segment_records: of the log.
            batch: 0 to the plan's `total_batches`.
        """
        log = plan.buffer_log(segment_records)
        log.advance(batch)
        position, _, ordinal, dataset, sample = log.content()
        entry = entries_of(plan, ordinal)
        segments = tuple(log.live_segments())
        return cls(plan, batch, log.tail, segments, position, ordinal, dataset, sample, entry)

    @property
    def identity(self) -> NDArray[np.int64]:
        """(n, 3) what each record must be."""
        keys = np.array([dataset_key(name) for name in self.plan.datasets], dtype=np.int64)
        return np.stack([self.ordinal, keys[self.dataset], self.sample], axis=1)

    @property
    def age(self) -> NDArray[np.int64]:
        """(n,) fresh rows that the run took from each row on, itself and skipped ones included."""
        return self.fresh_rows - self.ordinal

    @property
    def fresh_rows(self) -> int:
        """Fresh rows that the run took so far, those trained before and skipped ones included."""
        before = sum(sum(rows) for one, rows in self._taken() if one.trained_before)
        return before + self.plan.fresh_rows_before(self.batch)

    def of_tasks(self, tasks: set[str]) -> NDArray[np.bool_]:
        """(n,) which rows belong to one of some tasks."""
        ours = np.array([one.task in tasks for one in self.plan.entries], dtype=np.bool_)
        return ours[self.entry]

    def report(self) -> dict[str, Any]:
        """What is held by task, dataset, entry and age, as JSON types."""
        tasks: dict[str, _Share] = {}
        datasets: dict[tuple[str, str], _Share] = {}
        numbers = {name: number for number, name in enumerate(self.plan.datasets)}
        taken = list(self._taken())
        for at, (entry, fresh) in enumerate(taken):
            chance = self._chance(entry, taken)
            held = np.bincount(self.dataset[self.entry == at], minlength=len(numbers))
            for name, count in zip(self._names(entry), fresh, strict=True):
                rows = int(held[numbers[name]])
                tasks.setdefault(entry.task, _Share()).add(count, rows, chance)
                datasets.setdefault((entry.task, name), _Share()).add(count, rows, chance)
        replay = self.plan.spec.replay
        return {
            "batch": self.batch,
            "capacity_samples": replay.capacity if replay else None,
            "capacity": self.plan.num_slots,
            "rows": len(self.position),
            "fresh_rows": self.fresh_rows,
            "tasks": [{"task": task, **one} for task, one in _shares(tasks)],
            "datasets": [
                {"task": task, "dataset": name, **one} for (task, name), one in _shares(datasets)
            ],
            "entries": self._by_entry(),
            "ages": self._by_age(),
        }

    def _taken(self) -> Iterator[tuple[Entry, list[int]]]:
        """Rows that entered of each of the plan's entries, by its datasets."""
        fresh, *_ = self.plan._index.ledger(self.batch)
        for entry, rows in zip(self.plan.entries, fresh, strict=True):
            segment = self.plan.segments[entry.segment]
            if not entry.trained_before:
                yield entry, rows.tolist()
                continue
            came = segment.first_batch <= self.batch
            sizes = [one.num_samples for one in segment.spec.stream[entry.index].datasets]
            yield entry, sizes if came else [0] * len(sizes)

    def _names(self, entry: Entry) -> list[str]:
        stream = self.plan.segments[entry.segment].spec.stream
        return [one.name for one in stream[entry.index].datasets]

    def _chance(self, entry: Entry, taken: list[tuple[Entry, list[int]]]) -> float:
        """The probability that a row of an entry is held; 0 if its task was dropped since."""
        later = self.plan.segments[entry.segment + 1 :]
        if any(entry.task in one.dropped for one in later if one.first_batch <= self.batch):
            return 0.0
        capacity = self.plan.spec.replay.capacity if self.plan.spec.replay else None
        of = None
        if isinstance(capacity, Mapping):
            of, capacity = entry.task, capacity.get(entry.task, 1)
        entered = sum(sum(rows) for one, rows in taken if of in (None, one.task))
        return min(1.0, (capacity or 0) / max(entered, 1))

    def _by_entry(self) -> list[dict[str, Any]]:
        held = np.bincount(self.entry, minlength=len(self.plan.entries))
        rows: dict[tuple[int, str], int] = {}
        for entry, count in zip(self.plan.entries, held.tolist(), strict=True):
            key = (entry.index, entry.task)
            rows[key] = rows.get(key, 0) + count
        return [{"entry": at, "task": task, "rows": count} for (at, task), count in rows.items()]

    def _by_age(self) -> dict[str, list[int]]:
        edges = np.unique(np.linspace(0, self.fresh_rows, AGES + 1).astype(np.int64))
        counts, _ = np.histogram(self.age - 1, edges) if len(edges) > 1 else (edges[:0], None)
        return {"edges": edges.tolist(), "rows": counts.tolist()}


def entries_of(plan: Plan, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
    """The entry of each fresh row, as an index into the plan's entries; shape (n,)."""
    # In a segment the rows trained before come first, wherever they stand in its stream.
    places = range(len(plan.entries))
    order = sorted(
        places, key=lambda at: (plan.entries[at].segment, not plan.entries[at].trained_before)
    )
    ends = np.cumsum([_ordinals(plan, plan.entries[at]) for at in order])
    return np.array(order, dtype=np.int64)[np.searchsorted(ends, ordinals, side="right")]


def _ordinals(plan: Plan, entry: Entry) -> int:
    if entry.trained_before:
        stream = plan.segments[entry.segment].spec.stream
        return sum(one.num_samples for one in stream[entry.index].datasets)
    return plan.fresh_rows_before(entry.last_batch) - plan.fresh_rows_before(entry.first_batch)


def _shares(shares: Mapping[_Key, _Share]) -> Iterator[tuple[_Key, dict[str, Any]]]:
    """Each one's rows with their share, and the share that is to be expected."""
    rows = sum(one.rows for one in shares.values()) or 1
    expected = sum(one.expected for one in shares.values()) or 1
    for key, one in shares.items():
        counts = {"fresh_rows": one.fresh_rows, "rows": one.rows}
        yield (
            key,
            {**counts, "share": one.rows / rows, "expected_share": one.expected / expected},
        )
