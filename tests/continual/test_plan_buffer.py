"""Replay from a buffer of bounded capacity: which rows it holds, what is drawn, where they lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from megatron_mer import _index
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import ConfigError, DataError
from tests.continual import buffer_oracle
from tests.continual import plan_oracle as oracle
from tests.continual.plan_strategies import ALPHAS, assert_walked, rows_of, specs, stored


@dataclass
class BufferedLife:
    """A run with a buffer that was trained to its end."""

    plan: Plan
    segments: list
    skipped: list[int] = field(default_factory=list)
    dropped: dict[int, set[str]] = field(default_factory=dict)
    seen: list[list] = field(default_factory=list)


@st.composite
def buffered(draw: st.DrawFn, spec: PlanSpec) -> PlanSpec:
    """The specification with replay from a buffer."""
    tasks = sorted({entry.task for entry in spec.stream})
    split = draw(st.booleans())
    capacity: Any = draw(st.sampled_from([5, 8, 12, 30, 1000]))
    if split:
        capacity = {task: draw(st.sampled_from([3, 6, 12, 40])) for task in tasks}
    policy = draw(st.sampled_from(["uniform", "equal", "weights"])) if split else "uniform"
    weights = None
    if policy == "weights":
        weights = {task: draw(st.sampled_from([1.0, 2.0, 0.0])) for task in tasks}
        weights[tasks[0]] = 3.0
    replay_ = ReplaySpec(
        alpha=Decimal(draw(st.sampled_from(ALPHAS))),
        source="buffer",
        policy=policy,
        include_current_task=draw(st.booleans()),
        weights=weights,
        capacity=capacity,
    )
    return replace(spec, replay=replay_)


@st.composite
def lives(draw: st.DrawFn) -> BufferedLife:
    spec = draw(buffered(draw(specs())))
    life = BufferedLife(Plan(spec), [(0, spec)])
    total = life.plan.total_batches
    change = draw(st.sampled_from([None, "replay", "drop", "stream"]))
    at = draw(st.integers(0, total - 1))
    skips = draw(st.sets(st.integers(0, total - 1), max_size=4))
    batch = 0
    while batch < life.plan.total_batches:
        if batch == at and change:
            change_at(draw, life, change, batch)
        try:
            life.seen.append(rows_of(life.plan, batch))
        except DataError:
            reject()  # The buffer is too small for this stream.
        if batch in skips:
            life.plan.mark_skipped(batch)
            life.skipped.append(batch)
        batch += 1
    return life


def change_at(draw: st.DrawFn, life: BufferedLife, change: str, batch: int) -> None:
    history, spec = stored(life.plan), life.segments[-1][1]
    in_training = life.plan.entry_of(batch).task
    if change == "drop":
        gone = {draw(st.sampled_from([entry.task for entry in spec.stream]))} - {in_training}
        life.plan = Plan.without(history, gone, batch)
        life.dropped[1 if batch else 0] = gone
    else:
        own = not spec.replay.include_current_task
        now = replace(spec.replay, include_current_task=own)
        if change == "stream":
            now = replace(now, source="stream", capacity=None)
        spec = replace(spec, replay=now)
        life.plan = Plan.continued(history, spec, batch)
    life.segments = [*(life.segments if batch else []), (batch, spec)]


@settings(max_examples=200)
@given(life=lives())
def test_every_row_equals_the_oracle(life: BufferedLife) -> None:
    run = oracle.walk_run(life.segments, life.skipped, life.dropped)
    assert life.seen == [rows for _, rows, _ in run.batches]
    assert_walked(life.plan, run)
    again = Plan.from_history(stored(life.plan))
    assert again.history() == life.plan.history()
    for batch in reversed(range(again.total_batches)):  # The buffer can be asked backwards.
        assert rows_of(again, batch) == life.seen[batch]
    replayed = Counter(row[2] for rows in life.seen for row in rows if row[0] == 1)
    if not life.skipped:
        ledger = life.plan.ledger(life.plan.total_batches)
        found = {name: one["replayed"] for name, one in ledger["datasets"].items()}
        assert found == {name: replayed[at] for at, name in enumerate(life.plan.datasets)}


@settings(max_examples=200)
@given(data=st.data())
def test_a_buffer_that_does_not_last_is_known_before_the_first_batch(data: st.DataObject) -> None:
    plan = Plan(data.draw(buffered(data.draw(specs()))))
    emptied = [batch for batch in range(plan.total_batches) if is_empty(plan, batch)]
    if emptied:
        with pytest.raises(DataError, match="is too small beside that task"):
            plan.check_buffer()
    else:
        plan.check_buffer()


def is_empty(plan: Plan, batch: int) -> bool:
    try:
        plan.rows(batch)
    except DataError:
        return True
    return False


@settings(max_examples=100)
@given(life=lives(), size=st.integers(1, 7), data=st.data())
def test_the_log_equals_the_oracle_however_it_is_walked(life, size: int, data) -> None:
    run = oracle.walk_run(life.segments, life.skipped, life.dropped)
    if run.buffer is None:
        return
    where, tail = buffer_oracle.positions(run.buffer.log, size)
    total = life.plan.total_batches
    for stops in (range(total + 1), [total], sorted(data.draw(st.sets(st.integers(0, total))))):
        log = _index.BufferLog(life.plan._index, size)
        for stop in [*stops, total]:
            log.advance(stop)
        position, source, ordinal, dataset, sample = log.content()
        assert log.tail == tail
        assert dict(zip(position.tolist(), ordinal.tolist(), strict=True)) == {
            where[slot]: held for slot, held in run.buffer.slots.items()
        }
        rows = [run.consumed[one] for one in ordinal]
        assert [(one.dataset, one.sample) for one in rows] == list(
            zip(dataset.tolist(), sample.tolist(), strict=True)
        )
        assert (source == -1).all()
        assert log.live_segments() == sorted(buffer_oracle.by_segment(where, size))


@settings(max_examples=100)
@given(life=lives(), size=st.integers(1, 7), lag=st.integers(0, 3))
def test_what_is_settled_is_found_and_what_was_written_is_enough(life, size, lag) -> None:
    """A disk that is written by the log's own words alone always has what is looked for."""
    if life.plan._index.num_slots == 0:
        return
    log = _index.BufferLog(life.plan._index, size)
    disk: dict[int, int] = {}
    waiting: list[tuple] = []
    for batch in range(life.plan.total_batches + 1):
        waiting.append(log.advance(batch))
        while len(waiting) > lag:
            position, source, ordinal, *_ = waiting.pop(0)
            for at, origin, row in zip(
                *map(np.ndarray.tolist, (position, source, ordinal)), strict=True
            ):
                assert at not in disk, "written over"
                assert origin == -1 or disk[origin] == row
                disk[at] = row
            log.settle(batch - lag)
        if batch == life.plan.total_batches:
            break
        rows = life.plan.rows(batch)
        replayed = rows.slot >= 0
        slots, ordinals = rows.slot[replayed], rows.ordinal[replayed]
        for at, row in zip(log.find(slots, ordinals).tolist(), ordinals.tolist(), strict=True):
            if at >= 0:
                assert disk[at] == row
            else:  # It entered with one of the last batches.
                assert row not in disk.values()


def a_spec(steps=(100, 100), capacity: Any = 50, batch: int = 10, **replay_) -> PlanSpec:
    values = {"alpha": Decimal("0.5"), "source": "buffer", "capacity": capacity, **replay_}
    stream = tuple(
        EntrySpec(f"t{number}", (DatasetSpec(f"d{number}", 100_000),), steps=count)
        for number, count in enumerate(steps)
    )
    return PlanSpec(1, batch, 4, ReplaySpec(**values), stream)


def kept(spec: PlanSpec, segment_records: int = 8) -> np.ndarray:
    plan = Plan(spec)
    log = _index.BufferLog(plan._index, segment_records)
    log.advance(plan.total_batches)
    return log.content()[2]


def test_every_sample_is_kept_with_the_same_probability() -> None:
    """Counts over 3,000 seeds: each of 40 rows is held by a buffer of 10 in a quarter of them."""
    counts = np.zeros(40)
    pairs = np.zeros((40, 40))
    spec = a_spec(steps=(5,), capacity=10, batch=8)
    for seed in range(3000):
        held = kept(replace(spec, seed=seed))
        assert len(set(held.tolist())) == 10
        counts[held] += 1
        pairs[np.ix_(held, held)] += 1
    # Standard deviation of a count: sqrt(3000 / 4 * 3 / 4) = 23.7.
    assert np.abs(counts - 750).max() < 5 * 23.7
    assert ((counts - 750) ** 2 / (750 * 0.75)).sum() < 39 + 5 * np.sqrt(78)
    # Two rows are held together in 10 / 40 * 9 / 39 of the runs: 173 (12.8).
    off = pairs[~np.eye(40, dtype=bool)]
    assert np.abs(off - 3000 * 10 * 9 / 40 / 39).max() < 5.5 * 12.8


def test_replay_draws_each_held_row_alike() -> None:
    plan = Plan(a_spec(steps=(10, 2000), capacity=64, batch=16))
    counts: Counter[int] = Counter()
    for batch in range(10, 60):
        rows = plan.rows(batch)
        counts.update(rows.slot[rows.kind == 1].tolist())
        assert (rows.ordinal[rows.kind == 1] < 160).all()  # Of the task before.
    assert sum(counts.values()) == 400


def test_disk_use_stays_below_twice_the_capacity() -> None:
    capacity, size = 512, 8
    plan = Plan(a_spec(steps=(3000,), capacity=capacity, batch=16))
    log = _index.BufferLog(plan._index, size)
    most = moved = written = 0
    for batch in range(plan.total_batches + 1):
        position, source, *_ = log.advance(batch)
        written, moved = written + len(position), moved + int((source >= 0).sum())
        log.settle(batch)
        most = max(most, len(log.live_segments()) * size)
    assert most <= 1.6 * capacity + size
    # 48,000 rows leave about C (1 + ln(n / C)) = 2,840 accepted ones.
    assert 2600 < written - moved < 3100
    assert moved < 1.7 * (written - moved)


def test_a_buffer_without_a_past_row_is_told() -> None:
    plan = Plan(a_spec(steps=(1, 4000), capacity=2))

    def every_batch() -> None:
        for batch in range(1, 4000):
            plan.rows(batch)

    with pytest.raises(DataError, match=r"batch \d+: the replay buffer holds no sample that may"):
        every_batch()


@pytest.mark.parametrize(
    ("replay_", "words"),
    [
        ({"capacity": None}, "replay.capacity_samples: none with source buffer"),
        ({"source": "stream"}, "replay.capacity_samples: 50 with source stream"),
        ({"capacity": 0}, "1 or more a task"),
        ({"capacity": 2**31}, "at most 2147483647 in all"),
        ({"policy": "equal"}, "a capacity for each task, as"),
        ({"capacity": {"t0": 5}}, "none for task 't1'"),
        ({"capacity": {"t0": 5, "t1": 5, "x": 5}}, "no task of the stream"),
        ({"source": "disk"}, "replay.source: disk; allowed: stream or buffer"),
    ],
)
def test_what_is_no_buffer_is_refused(replay_: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Plan(a_spec(**{"capacity": 50, **replay_}))


def test_one_buffer_for_the_whole_run() -> None:
    spec = a_spec()
    history = Plan(spec).history()
    other = replace(spec, replay=replace(spec.replay, capacity=60))
    with pytest.raises(ConfigError, match=r"replay.capacity_samples: 60 after 50"):
        Plan.continued(history, other, 20)


def test_a_task_can_be_dropped_at_the_end_of_the_plan() -> None:
    spec = a_spec(steps=(5, 5))
    plan = Plan(spec)
    end = plan.total_batches
    log = plan.buffer_log(8)
    log.advance(end)
    dropped = Plan.without(stored(plan), {"t0"}, end)
    longer = replace(spec, stream=(*spec.stream, replace(spec.stream[1], task="t2")))
    grown = Plan.extended(stored(dropped), longer)
    for after in (dropped, Plan.from_history(stored(dropped)), grown):
        logs = after.buffer_log(8)
        logs.advance(end)
        assert set(logs.content()[3].tolist()) == {1}
        assert logs.tail == log.tail  # Nothing is moved before the next row enters.
    assert 0 in log.content()[3]
