"""What a plan will do, or has done, as plain data: JSON types, no input or output.

`stream_tables` makes text of it. Everything but the counts of replayed rows has a closed form, so
that a run of any length is described at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mer import _index
from megatron_mer.continual.entries import Entry
from megatron_mer.continual.history import differences
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.segments import pool_key
from megatron_mer.continual.spec import DatasetSpec, EntrySpec

MANY_EPOCHS = 4
"""Up to about 4 epochs repeated data trains nearly as well as new data, beyond it is worth much
less (Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", arXiv 2305.16264)."""

MOST_REPLAY_ROWS = 20_000_000
"""Replayed rows are counted draw by draw, about 0.1 microseconds each; above this they are not."""

KINDS = ("fresh", "replay")
"""By `Rows.kind`."""


@dataclass(frozen=True)
class Span:
    """The part of a stream entry that one segment trains, and what its fresh rows come from."""

    entry: Entry
    spec: EntrySpec
    position: int
    """The entry's place in the last segment's stream, behind which new tasks may have come."""
    label: str
    """The task's name; "2 fr" where the name stands at several places of the stream."""
    rows: int
    """Rows of its batches; 0 if trained before."""
    fresh: int
    """Fresh rows; the samples that it has in the pool if trained before."""
    first_ordinal: int
    datasets: NDArray[np.int64]
    """(n,) numbers of its datasets among the plan's."""
    starts: NDArray[np.int64]
    """(n,) samples that the run took of each before it."""

    @cached_property
    def tree(self) -> _index.WeightTree:
        """Which dataset each of its fresh rows comes from."""
        weights = [one.weight for one in self.spec.datasets if one.weight is not None]
        if weights:
            return _index.WeightTree.from_weights(np.array(weights, dtype=np.float64))
        sizes = [one.num_samples for one in self.spec.datasets]
        return _index.WeightTree.from_sizes(np.array(sizes, dtype=np.int64))

    @cached_property
    def taken(self) -> NDArray[np.int64]:
        """(n,) samples that it takes of each dataset."""
        return self.tree.counts(self.fresh)

    @cached_property
    def wanted(self) -> NDArray[np.float64]:
        """(n,) share of its fresh rows that each dataset should give."""
        parts = np.array(
            [one.num_samples if one.weight is None else one.weight for one in self.spec.datasets],
            dtype=np.float64,
        )
        parts /= parts.max()  # the sum of weights may be more than a float holds
        shares: NDArray[np.float64] = parts / parts.sum()
        return shares

    def epoch(self, ordinal: int) -> int:
        """How often a dataset had been gone through before the fresh row of this ordinal."""
        leaf, place = self.tree.locate(ordinal - self.first_ordinal)
        return (int(self.starts[leaf]) + place) // self.spec.datasets[leaf].num_samples


class Spans:
    """A plan laid out: its spans in the order of `plan.entries`.

    Args:
        plan: later marks of skipped batches may move its spans, and are not seen here.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cursors = np.zeros(len(plan.datasets), dtype=np.int64)
        """(datasets,) samples that the run takes of each to its end."""
        self.labels = _labels(plan)
        self._numbers = {name: number for number, name in enumerate(plan.datasets)}
        # What was trained before may stand elsewhere by now; what was begun keeps its place.
        self._places: dict[object, list[int]] = defaultdict(list)
        for position, entry in enumerate(plan.spec.stream):
            if entry.trained_before:
                self._places[pool_key(entry)].append(position)
        # What was trained before stands ahead of all fresh rows of its segment.
        order = sorted(
            range(len(plan.entries)),
            key=lambda at: (plan.entries[at].segment, not plan.entries[at].trained_before),
        )
        found: dict[int, Span] = {}
        ordinal = 0
        for at in order:
            span = found[at] = self._span(plan.entries[at], ordinal)
            ordinal += span.fresh
            if not span.entry.trained_before:
                self.cursors[span.datasets] += span.taken
        self.all = [found[at] for at in range(len(found))]

    @property
    def trained(self) -> list[Span]:
        """The spans that take batches, in the order of time."""
        return [span for span in self.all if not span.entry.trained_before]

    def _span(self, entry: Entry, ordinal: int) -> Span:
        plan = self.plan
        spec = plan.segments[entry.segment].spec.stream[entry.index]
        numbers = np.array([self._numbers[one.name] for one in spec.datasets], dtype=np.int64)
        if entry.trained_before:
            rows, fresh = 0, sum(one.num_samples for one in spec.datasets)
            starts = np.zeros(len(numbers), dtype=np.int64)
            position = self._places[pool_key(spec)].pop(0)
        else:
            first, end = entry.first_batch, entry.last_batch
            rows = plan.rows_before(end) - plan.rows_before(first)
            fresh = plan.fresh_rows_before(end) - plan.fresh_rows_before(first)
            starts = self.cursors[numbers]
            position = entry.index
        label = self.labels[position]
        return Span(entry, spec, position, label, rows, fresh, ordinal, numbers, starts)


def batch_rows(
    spans: Spans, batch: int, start: int = 0, stop: int | None = None
) -> list[dict[str, Any]]:
    """The rows at places [start, stop) of a batch.

    Returns:
        One {"batch", "place", "kind", "task", "entry" (its place in the stream), "dataset",
        "sample", "epoch" (from 0)} a row.

    Raises:
        ValueError: the plan has no such batch, or the batch no such places.
    """
    rows = spans.plan.rows(batch, start, stop)
    found = []
    for at in range(len(rows.kind)):
        span = spans.all[int(rows.entry[at])]
        found.append(
            {
                "batch": batch,
                "place": start + at,
                "kind": KINDS[int(rows.kind[at])],
                "task": span.entry.task,
                "entry": span.position,
                "dataset": spans.plan.datasets[int(rows.dataset[at])],
                "sample": int(rows.sample[at]),
                "epoch": span.epoch(int(rows.ordinal[at])),
            }
        )
    return found


def summarise(plan: Plan, most_replay_rows: int = MOST_REPLAY_ROWS) -> dict[str, Any]:
    """What a plan will do from its first batch to its last.

    Args:
        plan: may ask for more data than there are (`Plan(spec, allow_exhausted=True)`).
        most_replay_rows: count which rows are replayed up to so many of them.

    Returns:
        "batches", "seq_length", "global_batch_size" (of the last segment), rows and tokens of the
        whole run; "tasks", one for each span in the order of training; "replayed", how many rows of
        each task each span replays, None if there are too many to count; "exhausted", the spans
        that ask for more than their datasets hold.
    """
    spans = Spans(plan)
    total = plan.total_batches
    rows, fresh = plan.rows_before(total), plan.fresh_rows_before(total)
    return {
        "batches": total,
        "global_batch_size": plan.spec.global_batch_size,
        "seq_length": plan.spec.seq_length,
        "tokens": rows * plan.spec.seq_length,
        **_row_counts(rows, fresh),
        "tasks": [_task(spans, span) for span in spans.all],
        "replayed": _replayed(spans) if rows - fresh <= most_replay_rows else None,
        "exhausted": [found for span in spans.trained if (found := _exhausted(spans, span))],
    }


def ledger_report(plan: Plan, batches: int) -> dict[str, Any]:
    """What the first batches of a run took: its ledger, with the changes that it went through.

    Args:
        plan: of the run, with its skipped batches.
        batches: how far it has come, 0 to `total_batches`.

    Returns:
        The plan's `ledger`, and "total_batches", "skipped_batches", "seq_length", "labels" (of each
        task) and "segments", [{"first_batch", "changes": [text]}].

    Raises:
        ValueError: the plan has fewer batches.
    """
    labels = _labels(plan)
    ledger = plan.ledger(batches)
    return {
        "total_batches": plan.total_batches,
        "skipped_batches": sum(batch < batches for batch in plan.skipped),
        "seq_length": plan.spec.seq_length,
        "segments": list(_segments(plan)),
        **ledger,
        "labels": [labels[task["entry"]] for task in ledger["tasks"]],
    }


def _labels(plan: Plan) -> list[str]:
    """The name of each task of the stream, with its place if the name stands there again."""
    tasks = [entry.task for entry in plan.spec.stream]
    times = Counter(tasks)
    return [task if times[task] == 1 else f"{at} {task}" for at, task in enumerate(tasks)]


def _row_counts(rows: int, fresh: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "fresh_rows": fresh,
        "replay_rows": rows - fresh,
        "replay_share": (rows - fresh) / rows if rows else 0.0,
    }


def _task(spans: Spans, span: Span) -> dict[str, Any]:
    entry, seq_length = span.entry, spans.plan.spec.seq_length
    before = entry.trained_before
    return {
        "entry": span.position,
        "task": entry.task,
        "label": span.label,
        "segment": entry.segment,
        "trained_before": before,
        "first_batch": entry.first_batch,
        "end_batch": entry.last_batch,
        **_row_counts(span.rows, 0 if before else span.fresh),
        "fresh_tokens": 0 if before else span.fresh * seq_length,
        "datasets": list(_datasets(spans, span)),
    }


def _datasets(spans: Spans, span: Span) -> Iterator[dict[str, Any]]:
    before, seq_length = span.entry.trained_before, spans.plan.spec.seq_length
    at_end = spans.cursors[span.datasets]
    columns = zip(
        span.spec.datasets,
        span.wanted.tolist(),
        span.taken.tolist(),
        (span.starts + span.taken).tolist(),
        at_end.tolist(),
        strict=True,
    )
    for dataset, wanted, taken, after, last in columns:
        size = dataset.num_samples
        yield {
            "name": dataset.name,
            "num_samples": size,
            "share_wanted": wanted,
            "share": taken / span.fresh if span.fresh else 0.0,
            "samples": taken,
            "tokens": taken * seq_length,
            "max_epochs": None if before else span.spec.epoch_limit(dataset),
            "epochs_after_task": None if before else after / size,
            "epochs_after_run": last / size,
            "exhausted": not before and after > span.spec.sample_limit(dataset),
        }


def _replayed(spans: Spans) -> list[dict[str, Any]]:
    """For each trained span the rows of every task, by label, that are replayed during it."""
    found = []
    last: Counter[str] = Counter()
    for span in spans.trained:
        tasks = spans.plan.ledger(span.entry.last_batch)["tasks"]
        now = Counter({spans.labels[task["entry"]]: task["replayed"] for task in tasks})
        found.append(
            {
                "entry": span.position,
                "label": span.label,
                "first_batch": span.entry.first_batch,
                "rows": {label: count - last[label] for label, count in now.items()},
            }
        )
        last = now
    return found


def _exhausted(spans: Spans, span: Span) -> dict[str, Any] | None:
    """What a span asks beyond what its datasets hold, and what would fit; None if all is there."""
    held = [min(span.spec.sample_limit(one), 2**62) for one in span.spec.datasets]
    limits, asked = np.array(held, dtype=np.int64), span.starts + span.taken
    over = np.flatnonzero(asked > limits).tolist()
    if not over:
        return None
    plan, first, end = spans.plan, span.entry.first_batch, span.entry.last_batch

    def fresh_rows(batches: int) -> int:
        return plan.fresh_rows_before(first + batches) - plan.fresh_rows_before(first)

    def too_many(batches: int) -> bool:
        return bool((span.starts + span.tree.counts(fresh_rows(batches)) > limits).any())

    fit = bisect_right(range(1, end - first + 1), False, key=too_many)
    # The configuration's length counts what earlier segments trained of the same entry too.
    done = [
        one
        for one in spans.trained
        if one.entry.index == span.entry.index and one.entry.first_batch < first
    ]
    done_batches = sum(one.entry.last_batch - one.entry.first_batch for one in done)
    rows_that_fit = sum(one.fresh for one in done) + fresh_rows(fit)
    return {
        "entry": span.position,
        "label": span.label,
        "first_batch": first,
        "steps": done_batches + end - first,
        "steps_that_fit": done_batches + fit,
        "fresh_tokens": span.spec.fresh_tokens,
        "fresh_tokens_that_fit": rows_that_fit * plan.spec.seq_length,
        "max_epochs_needed": max(
            _epochs_needed(int(asked[at]), span.spec.datasets[at]) for at in over
        ),
        "datasets": [
            {
                "name": span.spec.datasets[at].name,
                "asked": int(asked[at]),
                "held": held[at],
                "max_epochs": span.spec.epoch_limit(span.spec.datasets[at]),
                "max_epochs_needed": _epochs_needed(int(asked[at]), span.spec.datasets[at]),
            }
            for at in over
        ],
    }


def _epochs_needed(asked: int, dataset: DatasetSpec) -> float:
    """The smallest `max_epochs` of two decimal places that allows so many samples."""
    return -(-100 * asked // dataset.num_samples) / 100


def _segments(plan: Plan) -> Iterator[dict[str, Any]]:
    """Where the run was changed, and how: each segment against the plan as it was until then."""
    first, *others = plan.segments
    yield {"first_batch": first.first_batch, "changes": []}
    until = Plan(first.spec, allow_exhausted=True)
    skipped = plan.skipped
    for before, after in zip(plan.segments, others, strict=False):
        batch = after.first_batch
        for one in skipped:
            if before.first_batch <= one < batch:
                until.mark_skipped(one)
        history = until.history()
        changes = [change.text for change in differences(history, after.spec, batch)]
        changes += [f"task {task} was dropped from the replay buffer" for task in after.dropped]
        yield {"first_batch": batch, "changes": changes}
        until = Plan.continued(history, after.spec, batch, allow_exhausted=True)
