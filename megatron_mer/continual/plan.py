"""The plan of a run: where every row of every batch comes from."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from megatron_mer import _index
from megatron_mer.continual.spec import EntrySpec, PlanSpec, problems_of
from megatron_mer.errors import CheckpointError, ConfigError, Problem
from megatron_mer.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Entry:
    """An entry of the stream as the plan lays it out."""

    task: str
    index: int
    """Its place in the stream."""
    first_batch: int
    last_batch: int
    """The batch after its last one; equal to `first_batch` if `trained_before`."""
    trained_before: bool


@dataclass(frozen=True)
class Rows:
    """Where rows come from; one element a row, in the order of the batch."""

    kind: NDArray[np.uint8]
    """(n,) 0 fresh, 1 replay."""
    entry: NDArray[np.int32]
    """(n,) index of the stream entry that the sample belongs to."""
    dataset: NDArray[np.int32]
    """(n,) index into the plan's datasets."""
    sample: NDArray[np.int64]
    """(n,) sample within the dataset."""
    ordinal: NDArray[np.int64]
    """(n,) number of the fresh row that this one is, or repeats. Entries trained before the run
    take the first ones, so that the run's own begin at `plan.rows_trained_before`."""


class DatasetLedger(TypedDict):
    """What became of a dataset's samples."""

    fresh: int
    """Samples trained on as fresh rows."""
    replayed: int
    """Samples trained on as replay rows."""
    skipped: int
    """Fresh rows of batches without an update: spent, and never replayed."""
    epochs: float
    """Fresh and skipped samples over the dataset's samples."""


class EntryLedger(TypedDict):
    """How much of an entry was replay."""

    entry: int
    task: str
    replay_rows: int
    pool_batches: int
    """Batches that had anything to replay."""
    replay_share: float | None
    """Replay rows over all rows of those batches."""


class Ledger(TypedDict):
    """What a number of batches took."""

    batches: int
    datasets: dict[str, DatasetLedger]
    tasks: list[EntryLedger]


class Plan:
    """Maps (batch, place) to a sample, as a pure function of its specification and its skips.

    A row takes O(log datasets) time, and nothing is stored a row. Calls may come from several
    threads.

    Args:
        spec: the resolved stream.

    Raises:
        ConfigError: with every problem of the specification, or with every dataset that would have
            to give more samples than it holds within `max_epochs`.
    """

    def __init__(self, spec: PlanSpec) -> None:
        problems = problems_of(spec)
        if problems:
            raise ConfigError(problems)
        self.spec = spec
        self._index = _make_index(spec)
        self._exhausted = list(self._exhausted_datasets())
        if self._exhausted:
            raise ConfigError(self._exhausted)
        self.datasets: tuple[str, ...] = tuple(spec.datasets)
        """Names, each once; `Rows.dataset` counts into them."""
        self.entries: tuple[Entry, ...] = tuple(
            Entry(entry.task, index, *self._index.span(index), entry.trained_before)
            for index, entry in enumerate(spec.stream)
        )
        self._trained = [entry for entry in self.entries if not entry.trained_before]
        self._ends = [entry.last_batch for entry in self._trained]

    @property
    def total_batches(self) -> int:
        """Batches of all entries together."""
        return self._index.total_batches

    @property
    def rows_trained_before(self) -> int:
        """Fresh rows that stand in the replay pool before batch 0."""
        return self._index.ordinal_at(0)

    @property
    def skipped(self) -> list[int]:
        """Batches marked as skipped, increasing."""
        return [int(batch) for batch in self._index.skipped()]

    def entry_of(self, batch: int) -> Entry:
        """The entry that trains a batch.

        Raises:
            ValueError: the plan has no such batch.
        """
        if not 0 <= batch < self.total_batches:
            raise ValueError(f"batch {batch} is outside of the plan's {self.total_batches} batches")
        return self._trained[bisect_right(self._ends, batch)]

    def rows(self, batch: int, start: int = 0, stop: int | None = None) -> Rows:
        """The rows at places [start, stop) of a batch; only these are computed.

        A batch draws its replay rows without what was skipped before it, whenever it is asked for;
        later marks never change it.

        Args:
            batch: 0 to `total_batches` - 1.
            start: first place, 0 to `global_batch_size`.
            stop: place after the last; default: all.

        Raises:
            ValueError: the plan has no such batch, or the batch no such places.
        """
        return Rows(*self._index.rows(batch, start, stop))

    def replay_rows(self, batch: int) -> int:
        """Number of replay rows of a batch; every rank knows it ahead."""
        return self._index.replay_rows(batch)

    def fresh_rows_before(self, batch: int) -> int:
        """Number of fresh rows in batches 0 to `batch` - 1; `batch` may be `total_batches`."""
        return self._index.ordinal_at(batch) - self.rows_trained_before

    def mark_skipped(self, batch: int) -> None:
        """Notes that a batch was drawn but not trained on: no later batch replays its fresh rows.

        If it leaves a pool empty for longer, the batches meanwhile are all fresh. A dataset that
        must therefore give more than `max_epochs` allows is warned of, since it is too late to
        refuse it.

        Args:
            batch: above all batches marked before.

        Raises:
            ValueError: it is not, or the plan has no such batch.
        """
        self._index.mark_skipped(batch)
        self._warn_of_exhausted()

    def restore_skipped(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the skipped batches of a history that this plan continues.

        Raises:
            CheckpointError: it is no history of a plan.
            ValueError: batches were marked already, or the plan has no such batch.
        """
        for first, end in _segment(history)["skipped"]:
            for batch in range(first, end):
                self._index.mark_skipped(batch)
        self._warn_of_exhausted()

    def ledger(self, batches: int) -> Ledger:
        """What the first `batches` batches took of each dataset, exactly.

        Fresh rows have a closed form; replay rows are counted draw by draw, about 0.1 microseconds
        each, and a later call goes on where an earlier one ended. Replay rows of a skipped batch
        count nowhere among the datasets; the tasks count rows as they were drawn.

        Args:
            batches: 0 to `total_batches`.

        Raises:
            ValueError: the plan has fewer batches.
        """
        fresh, replayed, skipped, replay_rows, pool_batches = self._index.ledger(batches)
        datasets: dict[str, DatasetLedger] = {}
        for place, (name, size) in enumerate(self.spec.datasets.items()):
            datasets[name] = {
                "fresh": int(fresh[place]),
                "replayed": int(replayed[place]),
                "skipped": int(skipped[place]),
                "epochs": int(fresh[place] + skipped[place]) / size,
            }
        tasks: list[EntryLedger] = []
        for entry in self._trained:
            rows = int(replay_rows[entry.index])
            pool = int(pool_batches[entry.index])
            tasks.append(
                {
                    "entry": entry.index,
                    "task": entry.task,
                    "replay_rows": rows,
                    "pool_batches": pool,
                    "replay_share": rows / (pool * self.spec.global_batch_size) if pool else None,
                }
            )
        return {"batches": batches, "datasets": datasets, "tasks": tasks}

    def history(self) -> list[dict[str, Any]]:
        """The plan as JSON types, for checkpoints; `from_history` gives an equal plan back.

        Returns:
            One segment: `first_batch`, the specification, `batches` (of each entry), `cursors` (of
            each dataset, at the segment's start), and `skipped` (ranges [first, end) of batches).
        """
        return [
            {
                "first_batch": 0,
                **self.spec.to_json(),
                "batches": [entry.last_batch - entry.first_batch for entry in self.entries],
                "cursors": dict.fromkeys(self.datasets, 0),
                "skipped": _ranges(self.skipped),
            }
        ]

    @classmethod
    def from_history(cls, history: Sequence[Mapping[str, Any]]) -> Plan:
        """Rebuilds a plan with its skipped batches.

        Raises:
            CheckpointError: it is no history of a plan, or of one that other code laid out.
        """
        segment = _segment(history)
        try:
            plan = cls(PlanSpec.from_json(segment))
            if plan.history()[0]["batches"] != segment["batches"]:
                raise ValueError(f"its entries have {segment['batches']} batches")
            plan.restore_skipped(history)
        except (KeyError, TypeError, ValueError, ArithmeticError, ConfigError) as error:
            raise CheckpointError(f"this history cannot be read as a plan: {error!r}") from error
        return plan

    def _exhausted_datasets(self) -> Iterator[Problem]:
        for index, entry in enumerate(self.spec.stream):
            if entry.trained_before:
                continue
            asked_of = self._index.cursors_after(index)
            for place, (dataset, asked) in enumerate(zip(entry.datasets, asked_of, strict=True)):
                held = entry.sample_limit(dataset)
                if asked > held:
                    epochs = asked / dataset.num_samples
                    yield Problem(
                        f"stream.{index}.train.{place}",
                        f"by the end of task {entry.task!r} dataset {dataset.name!r} would have "
                        f"given {asked} samples ({epochs:.4g} epochs)",
                        f"{held}, which it holds within max_epochs {entry.max_epochs:g} "
                        f"({dataset.num_samples} samples)",
                        "shorten the task (steps, fresh_tokens), lower the dataset's weight, add "
                        "data, or raise max_epochs",
                    )

    def _warn_of_exhausted(self) -> None:
        """Warns once of each dataset that skipped batches drive past its limit."""
        known = {problem.path for problem in self._exhausted}
        for problem in self._exhausted_datasets():
            if problem.path not in known:
                self._exhausted.append(problem)
                logger.warning("after skipped batches, %s", problem)


def _make_index(spec: PlanSpec) -> _index.Plan:
    numbers = {name: number for number, name in enumerate(spec.datasets)}
    numerator, denominator = spec.replay.alpha.as_integer_ratio() if spec.replay else (0, 1)
    try:
        return _index.Plan(
            seed=spec.seed,
            global_batch_size=spec.global_batch_size,
            alpha_numerator=numerator,
            alpha_denominator=denominator,
            include_current_task=spec.replay is not None and spec.replay.include_current_task,
            dataset_keys=np.array([_key(name) for name in numbers], dtype=np.uint64),
            dataset_sizes=np.array(list(spec.datasets.values()), dtype=np.int64),
            entries=[_index_entry(entry, numbers, spec.seq_length) for entry in spec.stream],
        )
    except ValueError as error:  # more rows than 64-bit integers count
        raise ConfigError([Problem("stream", str(error))]) from error


def _index_entry(entry: EntrySpec, numbers: Mapping[str, int], seq_length: int) -> _index.EntrySpec:
    weights = [one.weight for one in entry.datasets if one.weight is not None]
    return _index.EntrySpec(
        datasets=np.array([numbers[one.name] for one in entry.datasets], dtype=np.int64),
        weights=np.array(weights, dtype=np.float64),
        batches=entry.steps or 0,
        fresh_rows=-(-(entry.fresh_tokens or 0) // seq_length),
        trained_before=entry.trained_before,
    )


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _segment(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(history) != 1 or "stream" not in history[0] or "skipped" not in history[0]:
        raise CheckpointError(
            f"a plan's history must be one segment with its stream, not {history!r:.200}"
        )
    return history[0]


def _ranges(batches: Sequence[int]) -> list[list[int]]:
    """Increasing numbers as ranges [first, end)."""
    ranges: list[list[int]] = []
    for batch in batches:
        if ranges and ranges[-1][1] == batch:
            ranges[-1][1] += 1
        else:
            ranges.append([batch, batch + 1])
    return ranges
