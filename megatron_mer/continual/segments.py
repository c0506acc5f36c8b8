"""Segments of a run: what each asks of the C++ core, given how far the earlier ones came.

A configuration always describes the whole stream. The first segment trains it from its beginning;
one that follows an accepted change trains what remains of the entry in training, and then the rest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_mer import _index
from megatron_mer.continual.spec import EntrySpec, PlanSpec
from megatron_mer.errors import ConfigError, Problem


@dataclass(frozen=True)
class Segment:
    """A resolved configuration, and the batch from which it holds."""

    first_batch: int
    spec: PlanSpec
    skipped: tuple[int, ...] = field(default=(), compare=False)
    """Its batches without an update that are known so far, increasing."""
    skips_known: int = 0
    """Skipped batches of the run when the segment was made: its lengths were decided by them."""
    dropped: tuple[str, ...] = ()
    """Tasks whose rows of earlier segments are never replayed from here on."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Segment:
        """One segment of a plan's history.

        Raises:
            KeyError, TypeError, ValueError, ArithmeticError: it is something else.
        """
        return cls(
            first_batch=values["first_batch"],
            spec=PlanSpec.from_json(values),
            skipped=tuple(batches_of(values["skipped"])),
            skips_known=values.get("skips_known", 0),
            dropped=tuple(values.get("dropped", ())),
        )


@dataclass(frozen=True)
class Progress:
    """What the batches before a segment trained of each entry, by its place in the stream."""

    batches: Mapping[int, int]
    fresh_rows: Mapping[int, int]

    @property
    def last_begun(self) -> int:
        """The place of the entry begun last; -1 before the first batch."""
        return max((place for place, count in self.batches.items() if count), default=-1)


def tasks_of(segments: Sequence[Segment]) -> list[str]:
    """Names of all tasks in the order of first mention; the core counts into them."""
    names = (entry.task for segment in segments for entry in segment.spec.stream)
    return list(dict.fromkeys(names))


def sizes_of(segments: Sequence[Segment]) -> dict[str, int]:
    """Samples of all datasets by name, in the order of first mention."""
    sizes: dict[str, int] = {}
    for segment in segments:
        for name, size in segment.spec.datasets.items():
            sizes.setdefault(name, size)
    return sizes


def progress_at(index: _index.Plan, batch: int) -> Progress:
    """How far the core's plan has come before a batch."""
    batches: Counter[int] = Counter()
    fresh_rows: Counter[int] = Counter()
    for position, _, _, first, last, trained_before in index.spans().tolist():
        end = min(last, batch)
        if not trained_before and end > first:
            batches[position] += end - first
            fresh_rows[position] += index.fresh_rows_before(end) - index.fresh_rows_before(first)
    return Progress(batches, fresh_rows)


def make_index(segments: Sequence[Segment]) -> _index.Plan:
    """Lays all segments out in the C++ core.

    Raises:
        ConfigError: segments contradict each other in what a change may not touch, or the plan has
            more rows than 64-bit integers count.
    """
    problems = [*_contradictions(segments)]
    if problems:
        raise ConfigError(problems)
    tasks = {task: number for number, task in enumerate(tasks_of(segments))}
    sizes = sizes_of(segments)
    numbers = {name: number for number, name in enumerate(sizes)}
    try:
        index = _index.Plan(
            seed=segments[0].spec.seed,
            dataset_keys=np.array([_key(name) for name in sizes], dtype=np.uint64),
            dataset_sizes=np.array(list(sizes.values()), dtype=np.int64),
            buffer_capacities=np.array(_capacities(segments, list(tasks)), dtype=np.int64),
            buffer_by_task=any(isinstance(one, Mapping) for one in _given_capacities(segments)),
        )
        known: Counter[tuple[object, ...]] = Counter()
        skipped = [batch for segment in segments for batch in segment.skipped]
        marked = 0
        for segment in segments:
            for batch in skipped[marked : segment.skips_known]:
                index.mark_skipped(batch)
            marked = max(marked, segment.skips_known)
            _append(index, segment, tasks, numbers, known)
        for batch in skipped[marked:]:
            index.mark_skipped(batch)
    except ValueError as error:
        raise ConfigError([Problem("stream", str(error))]) from error
    return index


def _append(
    index: _index.Plan,
    segment: Segment,
    tasks: Mapping[str, int],
    numbers: Mapping[str, int],
    known: Counter[tuple[object, ...]],
) -> None:
    """Adds a segment; `known` counts the entries trained before that are in the pool already."""
    spec = segment.spec
    progress = progress_at(index, segment.first_batch)
    problems = [*_lost(index, segment, list(tasks), known)]
    if problems:
        raise ConfigError(problems)
    numerator, denominator = spec.replay.alpha.as_integer_ratio() if spec.replay else (0, 1)
    weights = spec.replay.task_weights(list(tasks)) if spec.replay else []
    spans = []
    missing = known.copy()
    for position, entry in enumerate(spec.stream):
        if entry.trained_before:
            if missing[pool_key(entry)] > 0:
                missing[pool_key(entry)] -= 1
                continue
            known[pool_key(entry)] += 1
        elif _remaining(entry, position, progress, spec) == (0, 0):
            continue
        spans.append(_span(entry, position, progress, spec, tasks, numbers))
    index.append(
        first_batch=segment.first_batch,
        global_batch_size=spec.global_batch_size,
        alpha_numerator=numerator,
        alpha_denominator=denominator,
        include_current_task=spec.replay is not None and spec.replay.include_current_task,
        task_weights=np.array(weights, dtype=np.float64),
        from_buffer=spec.replay is not None and spec.replay.source == "buffer",
        dropped=np.array([tasks[task] for task in segment.dropped], dtype=np.int64),
        spans=spans,
    )


def _capacities(segments: Sequence[Segment], tasks: Sequence[str]) -> list[int]:
    """Rows that the run's one buffer holds of all tasks together, or of each; none without one."""
    given = _given_capacities(segments)
    if not given or isinstance(given[0], int):
        return [one for one in given[:1] if isinstance(one, int)]
    by_task = {
        task: rows for one in given if not isinstance(one, int) for task, rows in one.items()
    }
    return [by_task.get(task, 1) for task in tasks]  # 1: of a task from before there was a buffer.


def _given_capacities(segments: Sequence[Segment]) -> list[int | Mapping[str, int]]:
    specs = [segment.spec.replay for segment in segments]
    return [one.capacity for one in specs if one is not None and one.capacity is not None]


def _contradictions(segments: Sequence[Segment]) -> Iterator[Problem]:
    first, sizes = segments[0].spec, sizes_of(segments)
    for earlier, later in pairwise(_given_capacities(segments)):
        if not same_capacity(earlier, later):
            given = f"{later} after {earlier}"
            yield Problem("replay.capacity_samples", given, "one for the whole run")
    for segment in segments[1:]:
        for name in ("seed", "seq_length"):
            was, now = getattr(first, name), getattr(segment.spec, name)
            if was != now:
                yield Problem(name, f"{now} after {was}", "one value for the whole run")
        for name, size in segment.spec.datasets.items():
            if size != sizes[name]:
                given = f"dataset {name!r} with {size} samples after {sizes[name]}"
                yield Problem("stream", given, "one number, since one name is one dataset")


def same_capacity(was: int | Mapping[str, int], now: int | Mapping[str, int]) -> bool:
    """Whether two capacities are those of one buffer; tasks may be added, or be there no more."""
    if isinstance(was, int) or isinstance(now, int):
        return was == now
    return all(now[task] == rows for task, rows in was.items() if task in now)


def _lost(
    index: _index.Plan,
    segment: Segment,
    tasks: Sequence[str],
    known: Counter[tuple[object, ...]],
) -> Iterator[Problem]:
    """What earlier segments began and this one does not have in its place."""
    stream = segment.spec.stream
    for position, task, _, first, last, before in index.spans().tolist():
        if before or min(last, segment.first_batch) <= first:
            continue
        now = stream[position] if position < len(stream) else None
        if now is None or now.trained_before or now.task != tasks[task]:
            given = "another task or none" if now is None else f"task {now.task!r}"
            allowed = f"task {tasks[task]!r}, which was begun"
            yield Problem(f"stream.{position}", given, allowed)
    here = Counter(pool_key(entry) for entry in stream if entry.trained_before)
    for task, _ in known - here:
        yield Problem("stream", f"no task {task!r}, trained before", "it is in the replay pool")


def pool_key(entry: EntrySpec) -> tuple[object, ...]:
    """What makes two entries trained before the same one."""
    return entry.task, tuple((one.name, one.weight) for one in entry.datasets)


def _remaining(
    entry: EntrySpec, position: int, progress: Progress, spec: PlanSpec
) -> tuple[int, int]:
    """Batches or fresh rows that an entry still has to train."""
    batches = (entry.steps or 0) - progress.batches.get(position, 0)
    rows = fresh_rows_of(entry, spec.seq_length) - progress.fresh_rows.get(position, 0)
    return (max(batches, 0), 0) if entry.steps is not None else (0, max(rows, 0))


def fresh_rows_of(entry: EntrySpec, seq_length: int) -> int:
    """Fresh rows that hold an entry's `fresh_tokens`; 0 without."""
    return -(-(entry.fresh_tokens or 0) // seq_length)


def _span(
    entry: EntrySpec,
    position: int,
    progress: Progress,
    spec: PlanSpec,
    tasks: Mapping[str, int],
    numbers: Mapping[str, int],
) -> _index.SpanSpec:
    weights = [one.weight for one in entry.datasets if one.weight is not None]
    batches, rows = _remaining(entry, position, progress, spec)
    return _index.SpanSpec(
        position=position,
        task=tasks[entry.task],
        datasets=np.array([numbers[one.name] for one in entry.datasets], dtype=np.int64),
        weights=np.array(weights, dtype=np.float64),
        batches=batches,
        fresh_rows=rows,
        trained_before=entry.trained_before,
    )


def ranges_of(batches: Sequence[int]) -> list[list[int]]:
    """Increasing numbers as ranges [first, end)."""
    ranges: list[list[int]] = []
    for batch in batches:
        if ranges and ranges[-1][1] == batch:
            ranges[-1][1] += 1
        else:
            ranges.append([batch, batch + 1])
    return ranges


def batches_of(ranges: Sequence[Sequence[int]]) -> Iterator[int]:
    """The numbers of ranges [first, end)."""
    for first, end in ranges:
        yield from range(first, end)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
