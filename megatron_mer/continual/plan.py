"""The plan of a run: where every row of every batch comes from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_mer import _index
from megatron_mer.continual.entries import Entry, Rows
from megatron_mer.continual.exhaustion import empty_buffer, exhausted_datasets
from megatron_mer.continual.ledger import Ledger, take_ledger
from megatron_mer.continual.segments import (
    Progress,
    Segment,
    make_index,
    pool_key,
    progress_at,
    ranges_of,
    sizes_of,
    tasks_of,
)
from megatron_mer.continual.spec import PlanSpec, problems_of, shortened
from megatron_mer.errors import CheckpointError, ConfigError, Problem
from megatron_mer.log import get_logger

logger = get_logger(__name__)


class Plan:
    """Maps (batch, place) to a sample, as a pure function of its segments and its skips.

    A row takes O(log datasets) time, and nothing is stored a row. Calls may come from several
    threads.

    Args:
        spec: the resolved stream, trained from its beginning; see `continued` for other plans.
        allow_exhausted: list datasets that do not last in `exhausted` instead of refusing them.

    Raises:
        ConfigError: with every problem of the specification, or with every dataset that would have
            to give more samples than it holds within `max_epochs`.
    """

    def __init__(self, spec: PlanSpec, allow_exhausted: bool = False) -> None:
        self._lay_out([Segment(0, spec)], allow_exhausted)

    @classmethod
    def from_history(cls, history: Sequence[Mapping[str, Any]]) -> Plan:
        """Rebuilds a plan with its segments and skipped batches.

        Raises:
            CheckpointError: it is no history of a plan, or of one that other code laid out.
        """
        try:
            plan = cls._of([Segment.from_json(values) for values in history], allow_exhausted=True)
            for built, saved in zip(plan.history(), history, strict=True):
                for key in ("batches", "cursors"):
                    if built[key] != saved[key]:
                        raise ValueError(f"its {key} are not those that this version lays out")
        except (KeyError, TypeError, ValueError, ArithmeticError, ConfigError) as error:
            raise CheckpointError(f"this history cannot be read as a plan: {error!r}") from error
        return plan

    @classmethod
    def extended(cls, history: Sequence[Mapping[str, Any]], spec: PlanSpec) -> Plan:
        """A plan whose last segment goes on as `spec` says, which changes no batch of before.

        Args:
            history: of the plan that was trained.
            spec: that of the last segment with entries appended, or with other `max_epochs`.

        Raises:
            CheckpointError: it is no history of a plan.
            ConfigError: as for a new plan, or the specification changes more than that.
        """
        old, plan = cls.from_history(history), cls.respecified(history, spec)
        if not _appends(old, plan):
            given = "the configuration changes entries of the plan that is being trained"
            raise ConfigError([Problem("stream", given, remedy="put them back as they were")])
        # What skipped batches drove past its limit was warned of, and is too late to refuse.
        if found := [one for one in plan.exhausted if one not in old.exhausted]:
            raise ConfigError(found)
        return plan

    @classmethod
    def continued(
        cls,
        history: Sequence[Mapping[str, Any]],
        spec: PlanSpec,
        batch: int,
        allow_exhausted: bool = False,
    ) -> Plan:
        """A plan that goes on with another stream, mix, replay or batch size from a batch on.

        Batches before it stay as they were. The entry in training trains what remains of its
        length, entries after it all of theirs, and each dataset goes on at its cursor. Entries
        trained before that the history does not know enter the pool at this batch.

        Args:
            history: of the plan that was trained.
            spec: the whole stream, its begun entries at their places; see
                `continual.history.differences` for what may change.
            batch: the first batch of the new segment, from the batches that were trained to the old
                plan's `total_batches`. A segment of the history that would begin later is dropped.
            allow_exhausted: as for a new plan.

        Raises:
            CheckpointError: it is no history of a plan.
            ConfigError: as for a new plan.
        """
        old = cls.from_history(history).segments
        kept = [one for one in old if one.first_batch < batch]
        known = sum(len(one.skipped) for one in kept)
        dropped = tuple(task for one in old[len(kept) :] for task in one.dropped)
        made = Segment(batch, spec, skips_known=known, dropped=dropped)
        return cls._of([*kept, made], allow_exhausted)

    @classmethod
    def without(
        cls, history: Sequence[Mapping[str, Any]], tasks: Collection[str], batch: int
    ) -> Plan:
        """A plan that from a batch on replays no row of some tasks that was trained before it.

        Rows of these tasks that are trained later may be replayed again.

        Args:
            history: of the plan that was trained.
            tasks: their names.
            batch: batches that were trained.

        Raises:
            CheckpointError: it is no history of a plan.
        """
        plan = cls.continued(history, cls.from_history(history).spec, batch, allow_exhausted=True)
        *earlier, last = plan.segments
        dropped = tuple(dict.fromkeys([*last.dropped, *sorted(tasks)]))
        return cls._of([*earlier, replace(last, dropped=dropped)], allow_exhausted=True)

    @classmethod
    def respecified(cls, history: Sequence[Mapping[str, Any]], spec: PlanSpec) -> Plan:
        """As `extended`, of any specification and unchecked: to be compared with."""
        *earlier, last = cls.from_history(history).segments
        return cls._of([*earlier, replace(last, spec=spec)], allow_exhausted=True)

    @classmethod
    def _of(cls, segments: Sequence[Segment], allow_exhausted: bool = False) -> Plan:
        plan = cls.__new__(cls)
        plan._lay_out(segments, allow_exhausted)
        return plan

    def _lay_out(self, segments: Sequence[Segment], allow_exhausted: bool) -> None:
        if not segments:
            raise ValueError("a plan needs at least one segment")
        problems = problems_of(segments[-1].spec)
        if problems:
            raise ConfigError(problems)
        self._index = make_index(segments)
        self.segments: tuple[Segment, ...] = tuple(segments)
        """In the order of time; each holds up to the next one's first batch."""
        self.exhausted: list[Problem] = list(exhausted_datasets(self._index, segments))
        """Datasets that have to give more samples than they hold within `max_epochs`."""
        if self.exhausted and not allow_exhausted:
            raise ConfigError(shortened(self.exhausted))
        self.dataset_sizes: dict[str, int] = sizes_of(segments)
        """Samples of each dataset, by name."""
        self.datasets: tuple[str, ...] = tuple(self.dataset_sizes)
        """Names, each once; `Rows.dataset` counts into them."""
        self.entries: tuple[Entry, ...] = tuple(self._spans())
        """What each segment trains of each entry, in the order of time."""
        self._trained = [entry for entry in self.entries if not entry.trained_before]
        self._ends = [entry.last_batch for entry in self._trained]
        self._history = [self._segment_json(number) for number in range(len(segments))]

    def _spans(self) -> Iterator[Entry]:
        for position, _, segment, first, last, before in self._index.spans().tolist():
            task = self.segments[segment].spec.stream[position].task
            yield Entry(task, position, segment, first, last, bool(before))

    @property
    def spec(self) -> PlanSpec:
        """What the last segment was made from."""
        return self.segments[-1].spec

    @property
    def has_buffer(self) -> bool:
        """Whether the last segment replays from a buffer."""
        return self.spec.replay is not None and self.spec.replay.source == "buffer"

    @property
    def total_batches(self) -> int:
        """Batches of all entries together."""
        return self._index.total_batches

    @property
    def rows_trained_before(self) -> int:
        """Rows that stand in the replay pool before batch 0."""
        stream = self.segments[0].spec.stream
        return sum(
            one.num_samples for entry in stream if entry.trained_before for one in entry.datasets
        )

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

    def global_batch_size(self, batch: int) -> int:
        """Rows of a batch.

        Raises:
            ValueError: the plan has no such batch.
        """
        return self._index.global_batch_size(batch)

    def rows_before(self, batch: int) -> int:
        """Rows of batches 0 to `batch` - 1, fresh and replayed."""
        ends = [*(segment.first_batch for segment in self.segments[1:]), batch]
        return sum(
            max(min(end, batch) - segment.first_batch, 0) * segment.spec.global_batch_size
            for segment, end in zip(self.segments, ends, strict=True)
        )

    def datasets_from(self, batch: int) -> list[str]:
        """Datasets that the rows of a batch and those after it are read from.

        A buffer has what it replays of the batches before this one.
        """
        replay = self.spec.replay is not None and self.spec.replay.alpha > 0
        replay = replay and not self.has_buffer
        names = [
            one.name
            for entry in self.entries
            if replay or entry.last_batch > batch
            for one in self.segments[entry.segment].spec.stream[entry.index].datasets
        ]
        return list(dict.fromkeys(names))

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
            DataError: the buffer holds no row that the batch may replay.
        """
        try:
            return Rows(*self._index.rows(batch, start, stop))
        except _index.BufferEmpty as error:
            raise empty_buffer(self.segments, *error.args) from error

    @property
    def num_slots(self) -> int:
        """Rows that the plan's buffer holds at most; 0 without one."""
        return self._index.num_slots

    def check_buffer(self) -> None:
        """Make sure that the buffer lasts: every batch finds something to replay in it.

        Rows of past tasks only become fewer while a task is trained, so its last batch tells.

        Raises:
            DataError: names a batch that finds nothing.
        """
        for entry in self.entries if self.has_buffer else ():
            batches = range(entry.last_batch - 1, entry.first_batch - 1, -1)
            last = next((batch for batch in batches if self.replay_rows(batch)), None)
            if last is not None:
                self.rows(last)

    def buffer_log(self, segment_records: int) -> _index.BufferLog:
        """Where the records of the plan's buffer lie, before batch 0; see `replay_buffer`."""
        return _index.BufferLog(self._index, segment_records)

    def replay_rows(self, batch: int) -> int:
        """Number of replay rows of a batch; every rank knows it ahead."""
        return self._index.replay_rows(batch)

    def progress_at(self, batch: int) -> Progress:
        """What batches 0 to `batch` - 1 trained of each entry, by its place in the stream."""
        return progress_at(self._index, batch)

    def fresh_rows_before(self, batch: int) -> int:
        """Number of fresh rows in batches 0 to `batch` - 1; `batch` may be `total_batches`."""
        return self._index.fresh_rows_before(batch)

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
        return take_ledger(self._index, self.segments, batches)

    def history(self) -> list[dict[str, Any]]:
        """The plan as JSON types, for checkpoints; `from_history` gives an equal plan back.

        Returns:
            For each segment: `first_batch`, the specification, `batches` (that it trains of each
            entry of its stream), `cursors` (of each dataset, at the segment's start), `skips_known`
            (skipped batches of the run when it was made) and `skipped` (ranges [first, end)).
        """
        ends = [*(segment.first_batch for segment in self.segments[1:]), self.total_batches + 1]
        skipped = self.skipped
        return [
            {
                **values,
                "cursors": self._cursors(number),
                "skipped": ranges_of([one for one in skipped if segment.first_batch <= one < end]),
            }
            for number, (values, segment, end) in enumerate(
                zip(self._history, self.segments, ends, strict=True)
            )
        ]

    def _cursors(self, number: int) -> dict[str, int]:
        """What each dataset gave ahead of a segment; skips may still move one to come."""
        known = sizes_of(self.segments[: number + 1])
        cursors = self._index.cursors_at(self.segments[number].first_batch).tolist()
        return dict(zip(known, cursors, strict=False))

    def _segment_json(self, number: int) -> dict[str, Any]:
        """What of a segment's JSON stays as it is while the run goes on."""
        segment = self.segments[number]
        batches = [0] * len(segment.spec.stream)
        for entry in self.entries:
            if entry.segment == number:
                batches[entry.index] = entry.last_batch - entry.first_batch
        return {
            "first_batch": segment.first_batch,
            "skips_known": segment.skips_known,
            **({"dropped": list(segment.dropped)} if segment.dropped else {}),
            **segment.spec.to_json(),
            "batches": batches,
        }

    def _warn_of_exhausted(self) -> None:
        """Warns once of each dataset that skipped batches drive past its limit."""
        known = {problem.path for problem in self.exhausted}
        for problem in exhausted_datasets(self._index, self.segments):
            if problem.path not in known:
                self.exhausted.append(problem)
                logger.warning("after skipped batches, %s", problem)


def _appends(old: Plan, new: Plan) -> bool:
    """Whether a plan has all that another one has, in the same batches and the same pool."""
    spans = [[(e.task, e.first_batch, e.last_batch) for e in one._trained] for one in (old, new)]
    pools, mixes = (
        [[pool_key(e) for e in one.spec.stream if e.trained_before is kind] for one in (old, new)]
        for kind in (True, False)
    )
    tasks = [tasks_of(one.segments) for one in (old, new)]  # Policies count into them.
    whole = pools[0] == pools[1] and new.spec.global_batch_size == old.spec.global_batch_size
    starts = (one[1][: len(one[0])] == one[0] for one in (spans, mixes, tasks))
    return whole and all(starts)
