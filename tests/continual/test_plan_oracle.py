"""The C++ plan against the naive one, row by row, over random runs of one specification."""

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_mer import _index
from megatron_mer.continual.plan import Plan
from tests.continual import plan_oracle as oracle
from tests.continual.plan_strategies import (
    WEIGHTS,
    Life,
    assert_walked,
    lives,
    rows_of,
    stored,
)


def check_every_row(life: Life) -> None:
    plan, segment = life.plan, life.segments[0][1]
    policy = segment.replay.policy if segment.replay else None
    event(f"{policy}, skipped {min(len(life.skipped), 3)}")
    run = oracle.walk_run(life.segments, life.skipped)
    assert_walked(plan, run)  # as it stands at the end, later batches marked
    for batch, (_, rows, _) in enumerate(run.batches):
        assert life.seen[batch] == rows  # as it was drawn
        half = len(rows) // 2
        assert rows_of(plan, batch, 0, half) + rows_of(plan, batch, half) == rows
    again = Plan.from_history(stored(plan))
    assert again.history() == plan.history()
    assert_walked(again, run)


@settings(max_examples=150)
@given(life=lives(changes=0))
def test_every_row_equals_the_oracle(life: Life) -> None:
    check_every_row(life)


@pytest.mark.slow
@settings(max_examples=3000)
@given(life=lives(changes=0))
def test_every_row_of_many_runs_equals_the_oracle(life: Life) -> None:
    check_every_row(life)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 100, 4095, 4096, 10_000])
def test_permutation_equals_the_oracle(size: int) -> None:
    key = 0x123456789ABCDEF0 + size
    found = _index.Permutation(size).forward(key, np.arange(size, dtype=np.uint64))
    assert found.tolist() == oracle.permutation(size, key)


@settings(max_examples=60)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=40))
def test_blend_equals_the_oracle_and_leaves_no_holes(weights: list[float]) -> None:
    tree = _index.WeightTree.from_weights(np.array(weights))
    blend = oracle.Blend([], weights)
    for n in range(300):
        assert tree.counts(n).tolist() == blend.taken
        assert [tree.count(leaf, n) for leaf in range(len(weights))] == blend.taken
        assert tree.locate(n) == blend.next()
