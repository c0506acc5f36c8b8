"""Which task a replay row is drawn from: equal shares, own weights, the current task in or out."""

from collections import Counter
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import ConfigError
from tests.continual.plan_strategies import rows_of


def entry(task: str, steps: int | None = None, size: int = 500, **more) -> EntrySpec:
    data = (DatasetSpec(more.pop("name", f"{task}_data"), size),)
    return EntrySpec(task, data, steps, **{"max_epochs": 10**6, **more})


BASE = entry("base", size=40, trained_before=True)
A, B, C = entry("a", 5), entry("b", 7), entry("c", 200)


def make(*stream: EntrySpec, rows: int = 16, alpha: str = "0.5", **more) -> Plan:
    policy = "weights" if "weights" in more else "equal"
    replay = ReplaySpec(Decimal(alpha), **{"policy": policy, **more})
    return Plan(PlanSpec(1, rows, 8, replay, stream))


def tasks_of(plan: Plan, batch: int) -> Counter[str]:
    """Tasks of a batch's replay rows."""
    return Counter(plan.spec.stream[row.span[1]].task for row in rows_of(plan, batch) if row.kind)


def tasks_during(plan: Plan, number: int) -> Counter[str]:
    span = range(plan.entries[number].first_batch, plan.entries[number].last_batch)
    return sum((tasks_of(plan, batch) for batch in span), Counter())


def test_each_past_task_gets_an_equal_share_whatever_its_size() -> None:
    plan = make(BASE, A, B, C)
    assert tasks_during(plan, 1) == {"base": 5 * 8}
    assert tasks_during(plan, 2) == {"base": 28, "a": 28}
    counts: Counter[str] = Counter()
    for batch in range(plan.entries[3].first_batch, plan.total_batches):
        counts += tasks_of(plan, batch)
        assert all(abs(counts[task] - counts.total() / 3) < 2 for task in ("base", "a", "b"))
    assert counts.total() == 200 * 8


def test_own_weights_share_the_replay_rows() -> None:
    weights = {"base": 5.0, "a": 0.0, "b": 1.5, "c": 100.0}
    plan = make(BASE, A, B, C, weights=weights)
    assert tasks_during(plan, 2) == {"base": 7 * 8}
    counts: Counter[str] = Counter()
    for batch in range(plan.entries[3].first_batch, plan.total_batches):
        counts += tasks_of(plan, batch)
        assert counts.keys() <= {"base", "b"}
        assert abs(counts["base"] - Fraction(10, 13) * counts.total()) < 2
    assert counts.total() == 200 * 8


def test_the_current_task_joins_when_a_batch_of_it_was_trained_on() -> None:
    plan = make(BASE, A, C, include_current_task=True)
    plan.mark_skipped(0)
    assert [tasks_of(plan, batch)["a"] for batch in range(5)] == [0, 0, 4, 4, 4]
    assert tasks_of(plan, 5) == tasks_of(plan, 5) & Counter(base=8, a=8)  # not of c itself
    assert all(2 <= tasks_of(plan, batch)[task] <= 3 for batch in (6, 99) for task in "ac")


def test_without_it_only_earlier_entries_of_the_task_are_replayed() -> None:
    plan = make(A, B, entry("a", 30, name="more"))
    assert plan.replay_rows(4) == 0
    assert tasks_during(plan, 1) == {"a": 7 * 8}
    assert tasks_during(plan, 2) == {"a": 15 * 8, "b": 15 * 8}
    for batch in range(plan.entries[2].first_batch, plan.total_batches):
        assert all(row.span[1] < 2 for row in rows_of(plan, batch) if row.kind)


@pytest.mark.parametrize("current", [False, True])
def test_a_task_that_came_back_is_one_pool(current: bool) -> None:
    """Rows of all its entries are drawn alike."""
    again = entry("a", 10, name="more")
    plan = make(A, entry("b", 10), again, entry("c", 900), include_current_task=current)
    counts: Counter[int] = Counter()
    for batch in range(plan.entries[3].first_batch, plan.total_batches):
        counts.update(row.ordinal for row in rows_of(plan, batch) if row.kind)
    sources = {row.ordinal: row for batch in range(25) for row in rows_of(plan, batch)}
    mine = [counts[o] for o, row in sources.items() if row.span[1] in (0, 2)]
    size = len(mine)
    assert size == plan.fresh_rows_before(5) + plan.fresh_rows_before(25) - (
        plan.fresh_rows_before(15)
    )
    expected = sum(mine) / size
    value = sum((one - expected) ** 2 for one in mine) / expected
    assert abs(value - (size - 1)) < 4 * (2 * (size - 1)) ** 0.5
    share = Fraction(1, 3 if current else 2)
    assert abs(sum(mine) - share * counts.total()) < (10 if current else 2)


def test_what_weighs_nothing_is_no_pool() -> None:
    """Batches are all fresh, as with nothing to replay, and count as such."""
    weights = {"base": 0, "a": 0, "b": 3}
    plan = make(BASE, A, B, entry("a", 4, name="more"), weights=weights)
    assert [plan.replay_rows(batch) for batch in range(16)] == [0] * 12 + [8] * 4
    assert [line["pool_batches"] for line in plan.ledger(16)["tasks"]] == [0, 0, 0, 4]
    assert [line["replay_share"] for line in plan.ledger(16)["tasks"]] == [None] * 3 + [0.5]
    long = entry("b", fresh_tokens=100 * 16 * 8)
    for current, batches in ((False, 100), (True, 199)):  # with replay of itself it takes longer
        own = make(BASE, long, weights={"base": 0, "b": 1}, include_current_task=current)
        assert own.total_batches == batches


def test_a_single_task_is_drawn_from_as_without_a_policy() -> None:
    stream = (entry("a", 5), entry("b", 9))
    uniform = make(*stream, policy="uniform")
    for other in (make(*stream), make(*stream, weights={"a": 1e-300, "b": 1e300})):
        for batch in range(14):
            assert rows_of(other, batch) == rows_of(uniform, batch)


def test_equal_is_all_weights_alike() -> None:
    stream = (BASE, A, B, C)
    equal = make(*stream)
    for weight in (1.0, 7.25, 2.0**900):
        own = make(*stream, weights=dict.fromkeys(["c", "b", "a", "base"], weight))
        for batch in (0, 6, 20, 211):
            assert rows_of(own, batch) == rows_of(equal, batch)


def test_extreme_weights_neither_fail_nor_take_what_is_not_theirs() -> None:
    weights = {"base": 1e-300, "a": 5e-324, "b": 1e300, "c": 1.0}
    plan = make(BASE, A, B, C, weights=weights)
    assert tasks_during(plan, 2)["base"] >= 7 * 8 - 1
    assert tasks_during(plan, 3)["b"] >= 200 * 8 - 1


def test_shares_hold_at_huge_counts() -> None:
    """Rows of one batch late in a run of 2^45 rows."""
    weights = {"base": 5.0, "a": 0.3, "b": 1.5, "c": 1.0}
    plan = make(
        BASE, A, B, entry("c", 2**33, size=2**45), rows=4096, weights=weights, alpha="0.333"
    )
    total = Fraction(sum(map(Fraction, (5.0, 0.3, 1.5))))
    for batch in (2**32 + 1, 2**33 - 1):
        counts = tasks_of(plan, batch)
        for task in ("base", "a", "b"):
            wanted = Fraction(weights[task]) / total * counts.total()
            assert abs(counts[task] - wanted) < 4  # the difference of two moments


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"policy": "fair"}, "replay.policy: fair; allowed: uniform, equal or weights"),
        ({"policy": "weights"}, "replay.weights: no weights with policy weights"),
        ({"policy": "equal", "weights": {"a": 1, "b": 1}}, "weights with policy equal"),
        ({"policy": "uniform", "weights": {"a": 1, "b": 1}}, "weights with policy uniform"),
        ({"weights": {"a": 1}}, "replay.weights: none for task 'b'"),
        ({"weights": {"a": 1, "b": 1, "d": 1}}, "replay.weights.d: no task of the stream"),
        ({"weights": {"a": 0, "b": 0.0}}, "replay.weights: every task has weight 0"),
        ({"weights": {"a": 1, "b": -1}}, "replay.weights.b: -1"),
        ({"weights": {"a": float("nan"), "b": 1}}, "replay.weights.a: nan"),
        ({"weights": {"a": 1, "b": float("inf")}}, "replay.weights.b: inf"),
    ],
)
def test_bad_policies_are_named(more: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(A, B, **more)
    assert words in str(error.value)


def test_the_policy_changes_neither_fresh_rows_nor_their_places() -> None:
    plans = [make(BASE, A, B, C, policy=policy) for policy in ("uniform", "equal")]
    for batch in (0, 7, 100):
        one, other = (plan.rows(batch) for plan in plans)
        assert np.array_equal(one.kind, other.kind)
        assert np.array_equal(one.sample[one.kind == 0], other.sample[other.kind == 0])
        assert np.array_equal(one.ordinal, other.ordinal) == (batch == 0)  # only base is there
