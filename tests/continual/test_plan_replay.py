"""Which rows are replay rows, and what they replay."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec


def entry(task: str, samples: int, steps: int | None = None, **more) -> EntrySpec:
    data = (DatasetSpec(f"{task}_data", samples),)
    return EntrySpec(task, data, steps, **{"max_epochs": 10**6, **more})


def make(*stream: EntrySpec, alpha: str | None = "0.25", rows: int = 16, **more) -> Plan:
    current = more.pop("include_current_task", False)
    replay = None if alpha is None else ReplaySpec(Decimal(alpha), include_current_task=current)
    return Plan(PlanSpec(more.pop("seed", 1), rows, 8, replay, stream))


def all_rows(plan: Plan) -> list[tuple[np.ndarray, ...]]:
    found = [plan.rows(batch) for batch in range(plan.total_batches)]
    return [(one.kind, one.entry, one.dataset, one.sample, one.ordinal) for one in found]


def same(left: list[tuple[np.ndarray, ...]], right: list[tuple[np.ndarray, ...]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(np.array_equal(a, b) for one in pairs for a, b in zip(*one, strict=True))


def before(samples: int = 50) -> EntrySpec:
    return entry("base", samples, trained_before=True)


@pytest.mark.parametrize("alpha", ["0.29", "0.1", "0.333", "0.999", "0.5", "0.000001"])
@pytest.mark.parametrize("rows", [1, 7, 100, 4096])
def test_replay_rows_are_exactly_the_floor_of_the_share(alpha: str, rows: int) -> None:
    plan = make(before(), entry("t", 1000, 3000), alpha=alpha, rows=rows, include_current_task=True)
    total = 0
    for batch in range(plan.total_batches):
        total += plan.replay_rows(batch)
        assert total == int(Fraction(alpha) * rows * (batch + 1))
    assert plan.fresh_rows_before(plan.total_batches) == 3000 * rows - total


def test_the_share_stays_exact_at_huge_counts() -> None:
    rows, steps = 10**9 + 7, 4_500_000_000
    for alpha in ("0.29", "0.333", "0.999", "0.123456789012345678"):
        plan = make(before(), entry("t", 2**61, steps, max_epochs=4), alpha=alpha, rows=rows)
        for batch in (1, 2**31, 2**32 + 1, steps - 1, steps):
            replayed = int(Fraction(alpha) * rows * batch)
            assert plan.fresh_rows_before(batch) == rows * batch - replayed


def test_alpha_0_is_no_replay() -> None:
    stream = (entry("a", 40, 9), entry("b", 30, 9))
    off = make(*stream, alpha=None)
    for current in (False, True):
        zero = make(*stream, alpha="0.0", include_current_task=current)
        assert same(all_rows(zero), all_rows(off))
        assert zero.ledger(18) == off.ledger(18)
    assert not any(kind.any() for kind, *_ in all_rows(off))


def test_replay_comes_from_earlier_entries_only() -> None:
    plan = make(entry("a", 200, 10), entry("b", 200, 10), entry("c", 200, 10))
    for batch, (kind, source, _, _, ordinal) in enumerate(all_rows(plan)):
        current = plan.entry_of(batch)
        assert (source[kind == 0] == current.index).all()
        assert (source[kind == 1] < current.index).all()
        first = plan.fresh_rows_before(current.first_batch)
        assert (ordinal[kind == 1] < first).all()
        assert (kind == 1).sum() == (0 if current.index == 0 else 4)
    shares = [line["replay_share"] for line in plan.ledger(30)["tasks"]]
    assert shares == [None, 0.25, 0.25]


def test_the_current_task_replays_earlier_batches_never_its_own() -> None:
    plan = make(entry("a", 200, 30), include_current_task=True, alpha="0.5")
    assert plan.replay_rows(0) == 0
    own = 0
    for batch, (kind, _, _, _, ordinal) in enumerate(all_rows(plan)):
        first = plan.fresh_rows_before(batch)
        assert sorted(ordinal[kind == 0]) == list(range(first, plan.fresh_rows_before(batch + 1)))
        assert (ordinal[kind == 1] < first).all()
        if batch:
            assert kind.sum() == 8
            own += (ordinal[kind == 1] >= plan.fresh_rows_before(batch - 1)).sum()
    assert own > 0  # the batch just before is in the pool


def test_what_was_trained_before_is_in_the_pool_from_batch_0_wherever_it_stands() -> None:
    for stream in ((before(40), entry("a", 200, 10)), (entry("a", 200, 10), before(40))):
        plan = make(*stream)
        index = stream.index(before(40))
        assert plan.rows_trained_before == 40
        assert plan.total_batches == 10
        assert plan.replay_rows(0) == 4
        seen = set()
        for kind, source, _, sample, ordinal in all_rows(plan):
            assert (source[kind == 1] == index).all()
            assert (ordinal[kind == 1] < 40).all()
            seen |= set(sample[kind == 1].tolist())
        assert len(seen) > 15
        assert seen < set(range(40))
        again = {"fresh": 0, "replayed": 40, "skipped": 0, "epochs": 0.0}
        assert plan.ledger(10)["datasets"]["base_data"] == again


def test_trained_before_stands_for_each_sample_once_and_moves_no_cursor() -> None:
    data = (DatasetSpec("x", 37), DatasetSpec("y", 11), DatasetSpec("z", 1))
    stream = (EntrySpec("base", data, trained_before=True), EntrySpec("t", data, steps=350))
    plan = make(*stream, alpha="0.9", rows=1)
    pool, fresh = {}, []
    for kind, _, dataset, sample, ordinal in all_rows(plan):
        source = (int(dataset[0]), int(sample[0]))
        if kind[0]:
            assert pool.setdefault(int(ordinal[0]), source) == source
        else:
            fresh.append(source)
    assert len(set(pool.values())) == len(pool) == 49
    assert set(pool) == set(range(49))
    # All of the data is left to train on, from each dataset's beginning, in the same order.
    assert len(set(fresh)) == len(fresh) == 35
    assert fresh == [pool[ordinal] for ordinal in range(35)]


def draws_of_entry(plan: Plan, index: int) -> np.ndarray:
    span = range(plan.entries[index].first_batch, plan.entries[index].last_batch)
    rows = [plan.rows(batch) for batch in span]
    return np.concatenate([one.ordinal[one.kind == 1] for one in rows])


def assert_uniform(counts: np.ndarray) -> None:
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    value = ((counts - expected) ** 2).sum() / expected
    assert abs(value - freedom) < 4 * (2 * freedom) ** 0.5


def test_draws_are_uniform_over_the_past() -> None:
    plan = make(before(24), entry("a", 500, 4), entry("b", 5000, 1000), alpha="0.5")
    draws = draws_of_entry(plan, 2)
    assert len(draws) == 8000
    pool = 24 + plan.fresh_rows_before(4)
    assert_uniform(np.bincount(draws, minlength=pool))


def test_draws_of_one_batch_and_of_one_row_are_uniform_over_seeds() -> None:
    firsts, pairs = [], []
    for seed in range(4000):
        plan = make(before(10), entry("a", 50, 3), alpha="0.5", rows=4, seed=seed)
        rows = plan.rows(2)
        drawn = np.sort(rows.ordinal[rows.kind == 1])
        firsts.append(drawn)
        pairs.append(drawn[0] == drawn[1])
    assert_uniform(np.bincount(np.concatenate(firsts), minlength=10))
    assert abs(np.mean(pairs) - 0.1) < 4 * (0.09 / 4000) ** 0.5  # rows draw independently


def test_skipped_rows_are_never_replayed_and_the_others_stay_uniform() -> None:
    plan = make(entry("a", 500, 6), entry("b", 5000, 800), alpha="0.5", rows=8)
    for batch in (1, 2, 4):
        plan.mark_skipped(batch)
    counts = np.bincount(draws_of_entry(plan, 1), minlength=48)
    dead = np.isin(np.arange(48) // 8, (1, 2, 4))
    assert not counts[dead].any()
    assert_uniform(counts[~dead])


def test_a_mark_changes_only_later_batches() -> None:
    for current in (False, True):
        plan = make(entry("a", 99, 9), entry("b", 99, 9), include_current_task=current)
        rows = all_rows(plan)
        plan.mark_skipped(4)
        assert same(all_rows(plan)[:5], rows[:5])
        later = np.concatenate([row[4][row[0] == 1] for row in all_rows(plan)[5:]])
        dead = range(plan.fresh_rows_before(4), plan.fresh_rows_before(5))
        assert not np.isin(later, dead).any()
    with pytest.raises(ValueError, match=r"batch 4 .* after batch 4"):
        plan.mark_skipped(4)
    with pytest.raises(ValueError, match="18"):
        plan.mark_skipped(18)


def test_an_empty_pool_makes_batches_fresh_until_one_is_trained_on() -> None:
    plan = make(entry("a", 999, 6), entry("b", 999, 6), include_current_task=True)
    for batch in (0, 1):
        plan.mark_skipped(batch)
    assert [plan.replay_rows(batch) for batch in range(6)] == [0, 0, 0, 4, 4, 4]
    assert [line["pool_batches"] for line in plan.ledger(12)["tasks"]] == [3, 6]
    past = make(entry("a", 999, 2), entry("b", 999, 3), entry("c", 999, 3))
    for batch in (0, 1):
        past.mark_skipped(batch)
    assert [past.replay_rows(batch) for batch in range(8)] == [0] * 5 + [4] * 3


def test_skips_that_drive_a_dataset_past_its_limit_are_warned_of(caplog) -> None:
    plan = make(entry("a", 16 * 2 + 12 * 2, 4, max_epochs=1), include_current_task=True, rows=16)
    assert plan.fresh_rows_before(4) == 52
    with caplog.at_level("WARNING", "megatron_mer"):
        plan.mark_skipped(0)
        assert not caplog.records
        plan.mark_skipped(1)
        plan.mark_skipped(2)
    assert plan.fresh_rows_before(4) == 64
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'a_data' would have given 60 samples" in caplog.text
    assert "56" in caplog.text
