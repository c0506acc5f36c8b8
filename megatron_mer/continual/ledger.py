"""What became of the samples: fresh, replayed and skipped, by dataset and by entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

from megatron_mer import _index
from megatron_mer.continual.segments import Segment, pool_key, sizes_of
from megatron_mer.continual.spec import PlanSpec


class SampleCounts(TypedDict):
    """What became of some samples."""

    fresh: int
    """Samples trained on as fresh rows."""
    replayed: int
    """Times that they were trained on again, as replay rows."""
    skipped: int
    """Fresh rows of batches without an update: spent, and never replayed."""


class DatasetLedger(SampleCounts):
    """What became of a dataset's samples."""

    epochs: float
    """Fresh and skipped samples over the dataset's samples."""


class EntryLedger(SampleCounts):
    """What became of an entry's samples, and how much of its training was replay."""

    entry: int
    """Its place in the stream."""
    task: str
    trained_before: bool
    batches: int
    replay_rows: int
    """Replay rows drawn while it was trained."""
    pool_batches: int
    """Batches that had anything to replay."""
    replay_share: float | None
    """Replay rows over all rows of those batches."""
    datasets: dict[str, SampleCounts]


class Ledger(TypedDict):
    """What a number of batches took."""

    batches: int
    datasets: dict[str, DatasetLedger]
    tasks: list[EntryLedger]
    """By entry, in the order of the stream."""


def take_ledger(index: _index.Plan, segments: Sequence[Segment], batches: int) -> Ledger:
    """Counts what the first batches of a plan took, exactly.

    Raises:
        ValueError: the plan has fewer batches.
    """
    fresh, replayed, skipped, counts, replay_rows, pool_batches = index.ledger(batches)
    sizes = sizes_of(segments)
    totals = {name: SampleCounts(fresh=0, replayed=0, skipped=0) for name in sizes}
    entries: dict[int, EntryLedger] = {}
    pool_rows: Counter[int] = Counter()
    places = _places_trained_before(segments[-1].spec)
    for span, (position, _, number, *_, trained_before) in enumerate(index.spans().tolist()):
        spec = segments[number].spec
        asked = spec.stream[position]
        if trained_before:  # Its place may have moved behind tasks that were inserted since.
            position = places[pool_key(asked)].pop(0)
        entry = entries.setdefault(position, _empty(position, asked.task, bool(trained_before)))
        entry["batches"] += int(counts[span])
        entry["replay_rows"] += int(replay_rows[span])
        entry["pool_batches"] += int(pool_batches[span])
        pool_rows[position] += int(pool_batches[span]) * spec.global_batch_size
        columns = (fresh[span].tolist(), replayed[span].tolist(), skipped[span].tolist())
        for one, *values in zip(asked.datasets, *columns, strict=True):
            empty = SampleCounts(fresh=0, replayed=0, skipped=0)
            for counted in (totals[one.name], entry, entry["datasets"].setdefault(one.name, empty)):
                counted["fresh"] += values[0]
                counted["replayed"] += values[1]
                counted["skipped"] += values[2]
    for position, entry in entries.items():
        if pool_rows[position]:
            entry["replay_share"] = entry["replay_rows"] / pool_rows[position]
    return {
        "batches": batches,
        "datasets": {
            name: {**one, "epochs": (one["fresh"] + one["skipped"]) / sizes[name]}
            for name, one in totals.items()
        },
        "tasks": [entries[position] for position in sorted(entries)],
    }


def _places_trained_before(spec: PlanSpec) -> dict[tuple[object, ...], list[int]]:
    places: dict[tuple[object, ...], list[int]] = {}
    for position, entry in enumerate(spec.stream):
        if entry.trained_before:
            places.setdefault(pool_key(entry), []).append(position)
    return places


def _empty(position: int, task: str, trained_before: bool) -> EntryLedger:
    return {
        "entry": position,
        "task": task,
        "trained_before": trained_before,
        "batches": 0,
        "fresh": 0,
        "replayed": 0,
        "skipped": 0,
        "replay_rows": 0,
        "pool_batches": 0,
        "replay_share": None,
        "datasets": {},
    }
