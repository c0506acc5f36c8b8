"""Runs that change their mind: the C++ plan against the naive one, and what changes may not do."""

from collections import Counter
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import event, given, settings

from megatron_mer.continual.history import differences
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import CheckpointError, ConfigError
from tests.continual import plan_oracle as oracle
from tests.continual.plan_strategies import Life, assert_walked, lives, stored


def check_history(life: Life) -> None:
    run = oracle.walk_run(life.segments, life.skipped)
    assert life.seen == [batch.rows for batch in run.batches]  # as it was drawn
    assert_walked(life.plan, run)  # as the last segment's plan has it
    assert [one.first_batch for one in life.plan.segments] == [first for first, _ in life.segments]
    assert [one.spec for one in life.plan.segments] == [spec for _, spec in life.segments]
    again = Plan.from_history(stored(life.plan))
    assert stored(again) == stored(life.plan)
    assert again.skipped == life.skipped
    assert_walked(again, run)
    check_pool_batches(life, run)


def check_pool_batches(life: Life, run: oracle.Run) -> None:
    """Batches that had anything to replay, by position; where there is replay at all."""
    pools, rows = Counter(), Counter()
    for span, drawn, had_pool in run.batches:
        replay = life.segments[span[0]][1].replay
        if had_pool and replay is not None and replay.alpha > 0:
            pools[span[1]] += 1
            rows[span[1]] += len(drawn)
    for line in life.plan.ledger(len(run.batches))["tasks"]:
        if not line["trained_before"]:
            assert line["pool_batches"] == pools[line["entry"]]
            share = line["replay_rows"] / rows[line["entry"]] if line["pool_batches"] else None
            assert line["replay_share"] == share


@settings(max_examples=150)
@given(life=lives(changes=4))
def test_every_row_of_a_changed_run_equals_the_oracle(life: Life) -> None:
    event(f"{len(life.segments)} segments")
    check_history(life)


@pytest.mark.slow
@settings(max_examples=3000)
@given(life=lives(changes=4))
def test_every_row_of_many_changed_runs_equals_the_oracle(life: Life) -> None:
    check_history(life)


def entry(task: str, steps: int | None = None, size: int = 300, **more) -> EntrySpec:
    data = (DatasetSpec(more.pop("name", f"{task}_data"), size, more.pop("weight", None)),)
    return EntrySpec(task, data, steps, **{"max_epochs": 100, **more})


BASE = entry("base", size=9, trained_before=True)
A, B = entry("a", 10), entry("b", 6)
HALF = ReplaySpec(Decimal("0.5"))


def lived(*segments: tuple[int, PlanSpec], skipped: tuple[int, ...] = ()) -> Life:
    """A run whose every row is the oracle's."""
    life = Life()
    starts = [first for first, _ in segments]
    for (first, spec), end in zip(segments, [*starts[1:], None], strict=True):
        life.begin(first, spec)
        for batch in range(first, life.plan.total_batches if end is None else end):
            life.draw(batch in skipped)
    check_history(life)
    return life


def spec(*stream: EntrySpec, rows: int = 8, replay: ReplaySpec | None = HALF) -> PlanSpec:
    return PlanSpec(5, rows, 1, replay, stream)


def spans(life: Life) -> list[tuple[int, int, int, int]]:
    """Segment, position, first batch and last batch of what was trained."""
    return [
        (one.segment, one.index, one.first_batch, one.last_batch)
        for one in life.plan.entries
        if not one.trained_before
    ]


def ordinals(life: Life, batch: int, kind: int) -> list[int]:
    return sorted(row.ordinal for row in life.seen[batch] if row.kind == kind)


def test_the_entry_in_training_trains_what_remains_of_its_steps() -> None:
    life = lived((0, spec(A, B)), (4, spec(A, B, rows=12)), (7, spec(entry("a", 12), B)))
    assert spans(life) == [(0, 0, 0, 4), (1, 0, 4, 7), (2, 0, 7, 12), (2, 1, 12, 18)]
    assert [life.plan.rows_before(batch) for batch in (4, 7, 18)] == [32, 68, 156]
    assert [len(rows) for rows in life.seen[2:8]] == [8, 8, 12, 12, 12, 8]


def test_or_what_remains_of_its_fresh_tokens_with_skipped_ones_spent() -> None:
    """16 fresh rows of 4 a batch; one batch skipped, then 3 of 12 and so on."""
    long = entry("a", fresh_tokens=40)
    quarter = replace(HALF, alpha=Decimal("0.75"))
    life = lived(
        (0, spec(BASE, long, B)),
        (4, spec(BASE, long, B, rows=12, replay=quarter)),
        (6, spec(BASE, long, B, replay=None)),
        skipped=(1, 4),
    )
    assert [life.plan.fresh_rows_before(batch) for batch in (4, 6, 9)] == [16, 22, 46]
    assert spans(life)[:3] == [(0, 1, 0, 4), (1, 1, 4, 6), (2, 1, 6, 9)]
    other = lived((0, spec(A, B)), (3, spec(entry("a", fresh_tokens=40), B)))
    assert spans(other)[:2] == [(0, 0, 0, 3), (1, 0, 3, 5)]  # from steps to tokens: 24, then 40


def test_an_entry_cut_short_ends_at_once() -> None:
    life = lived((0, spec(A, B)), (4, spec(entry("a", 3), B)))
    assert spans(life) == [(0, 0, 0, 4), (1, 1, 4, 10)]
    alone = Plan.continued(Plan(spec(A)).history(), spec(entry("a", 4)), 4)
    assert alone.total_batches == 4
    assert len(Plan.from_history(stored(alone)).segments) == 2


def test_a_part_before_a_change_is_not_past() -> None:
    """What an entry trained before a change of its own is still the current task."""
    life = lived((0, spec(A, B)), (4, spec(A, B, rows=10)))
    assert [life.plan.replay_rows(batch) for batch in range(10)] == [0] * 10
    assert all(life.plan.replay_rows(batch) == 4 + (batch >= 10) for batch in range(10, 16))
    drawn = {ordinal for batch in range(10, 16) for ordinal in ordinals(life, batch, 1)}
    assert min(drawn) < 32 <= max(drawn)  # both parts, for the entry after them
    both = ReplaySpec(Decimal("0.5"), include_current_task=True)
    life = lived((0, spec(A, B, replay=both)), (4, spec(A, B, rows=10, replay=both)))
    assert life.plan.replay_rows(4) == 5
    old = life.plan.fresh_rows_before(4)
    assert all(ordinal < old for ordinal in ordinals(life, 4, 1))
    assert any(ordinal < old for batch in (5, 6, 7) for ordinal in ordinals(life, batch, 1))
    assert any(ordinal >= old for batch in (5, 6, 7) for ordinal in ordinals(life, batch, 1))


def test_the_share_of_replay_counts_from_the_change() -> None:
    third = ReplaySpec(Decimal("0.29"))
    life = lived((0, spec(BASE, A, replay=third)), (5, spec(BASE, A, rows=9, replay=third)))
    assert [life.plan.replay_rows(batch) for batch in range(10)] == [
        *(29 * 8 * (t + 1) // 100 - 29 * 8 * t // 100 for t in range(5)),
        *(29 * 9 * (t + 1) // 100 - 29 * 9 * t // 100 for t in range(5)),
    ]


def test_entries_trained_before_come_into_the_pool_with_their_segment() -> None:
    more = entry("more", size=7, trained_before=True)
    for stream in ((A, B, more), (A, more, B)):
        life = lived((0, spec(A, B)), (4, spec(*stream)), (6, spec(*stream, rows=6)))
        assert [life.plan.replay_rows(batch) for batch in (3, 4, 6)] == [0, 4, 3]
        assert {*ordinals(life, 4, 1), *ordinals(life, 5, 1)} <= set(range(32, 39))
        assert ordinals(life, 4, 0) == list(range(39, 43))
        assert [one.task for one in life.plan.entries].count("more") == 1


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ([], 0),  # the same: nothing new
        ([BASE], 9),  # a second one
        ([entry("base", size=9, trained_before=True, weight=2.0)], 9),  # other weights
        ([entry("a", size=9, trained_before=True, name="base_data")], 9),  # another task
        ([BASE, BASE], 18),
    ],
)
def test_what_is_in_the_pool_does_not_come_again(more: list[EntrySpec], rows: int) -> None:
    life = lived((0, spec(BASE, A, B)), (4, spec(BASE, A, B, *more)), (5, spec(BASE, A, B, *more)))
    assert ordinals(life, 4, 0)[0] - ordinals(life, 3, 0)[-1] - 1 == rows


def test_datasets_go_on_at_their_cursors_through_every_change() -> None:
    """The blend changes, x leaves and comes back: no sample of an epoch comes twice."""
    x, y, z = (DatasetSpec(name, size, 1.0) for name, size in (("x", 60), ("y", 90), ("z", 80)))

    def mixed(*data: DatasetSpec) -> EntrySpec:
        return EntrySpec("a", data, 12, max_epochs=3)

    life = lived(
        (0, spec(mixed(x, y), B, replay=None)),
        (3, spec(mixed(y, z), B, replay=None)),
        (6, spec(mixed(z, replace(x, weight=5.0)), B, replay=None)),
        (8, spec(mixed(x), EntrySpec("b", (y, x), 9, max_epochs=3), replay=None)),
    )
    taken: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    for row in sorted((row for rows in life.seen for row in rows), key=lambda row: row.ordinal):
        taken[row.dataset].append(row.sample)
    assert [life.plan.datasets[number] for number in taken] == ["x", "y", "b_data", "z"]
    for number, samples in taken.items():
        size = life.plan.dataset_sizes[life.plan.datasets[number]]
        assert len(set(samples[:size])) == min(len(samples), size)
        assert len(samples) in {0: (92, 93, 94), 1: (60, 61), 2: (0,), 3: (14, 15, 16)}[number]
    # x: 12 of 24, 13 of 16, 32 and 36 of 72; its second epoch began in the last segment.


def test_a_change_at_the_end_or_at_the_beginning() -> None:
    life = lived((0, spec(A)), (10, spec(A, B, rows=4)))
    assert spans(life) == [(0, 0, 0, 10), (1, 1, 10, 16)]
    first = lived((0, spec(A, B)), (0, spec(BASE, B, A, rows=4)))
    assert spans(first) == [(0, 1, 0, 6), (0, 2, 6, 16)]
    assert stored(first.plan) == stored(Plan(spec(BASE, B, A, rows=4)))


def test_a_pool_that_earlier_segments_skipped_empty_stretches_no_length() -> None:
    """All of a was skipped, so that nothing of b's 48 rows is replay, and 6 batches suffice."""
    long = entry("b", fresh_tokens=48)
    lost = lived((0, spec(entry("a", 3), long)), (3, spec(entry("a", 3), long)), skipped=(0, 1, 2))
    assert spans(lost)[-1] == (1, 1, 3, 9)
    kept = lived((0, spec(entry("a", 3), long)), (3, spec(entry("a", 3), long)), skipped=(0, 1))
    assert spans(kept)[-1] == (1, 1, 3, 15)


def test_skips_and_histories_that_do_not_fit_are_refused() -> None:
    plan = Plan(spec(A, B))
    plan.mark_skipped(5)
    for batch, error in ((5, ConfigError), (17, ConfigError)):
        with pytest.raises(error, match=str(batch)):
            Plan.continued(stored(plan), spec(A, B), batch)
    for other, words in (
        (spec(A), "task 'b', which was begun"),
        (replace(spec(A, B), seed=99), "seed: 99 after"),
        (replace(spec(A, B), seq_length=99), "seq_length: 99 after"),
    ):
        with pytest.raises(ConfigError, match=words):
            Plan.continued(stored(plan), other, 15)
    with pytest.raises(ConfigError, match="changes entries of the plan that is being trained"):
        Plan.extended(stored(plan), spec(A, B, rows=4))
    changed = Plan.continued(stored(plan), spec(A, B, rows=4), 8)
    with pytest.raises(ValueError, match=r"batch 3 .* 5"):
        Plan.from_history(stored(changed)).mark_skipped(3)
    history = stored(changed)
    for bad in (
        [history[1]],
        history[::-1],
        [history[0], {**history[1], "first_batch": 17}],
        [history[0], {**history[1], "cursors": {"a_data": 63, "b_data": 0}}],
        [history[0], {**history[1], "batches": [3, 6]}],
        [{**history[0], "batches": [9, 0]}, history[1]],
        [{**history[0], "skipped": [[9, 10]]}, history[1]],
        [*history, history[1]],
    ):
        with pytest.raises(CheckpointError):
            Plan.from_history(bad)


def test_a_skip_ahead_of_a_change_that_is_still_to_come_changes_no_length() -> None:
    """The lengths of a segment were decided when it was made: without the skips after that."""
    one = EntrySpec("one", (DatasetSpec("one", 40),), steps=2, max_epochs=9)
    two = EntrySpec("two", (DatasetSpec("two", 40),), fresh_tokens=48, max_epochs=9)
    longer = replace(one, steps=3)
    replay = ReplaySpec(Decimal("0.5"))
    plan = Plan(PlanSpec(1, 8, 1, replay, (one, two)))
    changed = Plan.continued(stored(plan), PlanSpec(1, 8, 1, replay, (longer, two)), 2)
    for batch in (0, 1):
        changed.mark_skipped(batch)
    again = Plan.from_history(stored(changed))
    assert again.entries == changed.entries
    assert [
        again.rows(batch).sample.tolist() == changed.rows(batch).sample.tolist()
        for batch in range(changed.total_batches)
    ] == [True] * changed.total_batches


@settings(max_examples=100)
@given(life=lives(changes=2))
def test_differences_name_the_first_batch_that_a_change_touches(life: Life) -> None:
    (_, first), *changes = life.segments
    plan = Plan(first)
    for batch, changed in changes:
        found = differences(stored(plan), changed, batch)
        if any(one.accept is None for one in found):
            return
        if found:
            begin = min(one.batch for one in found)
            new = Plan.continued(stored(plan), changed, begin)
        else:
            begin = plan.total_batches
            new = Plan.extended(stored(plan), changed)
        assert begin >= batch
        for number in range(min(begin, new.total_batches)):
            left, right = plan.rows(number), new.rows(number)
            for name in ("kind", "dataset", "sample", "ordinal"):
                assert getattr(left, name).tolist() == getattr(right, name).tolist()
        plan = new
