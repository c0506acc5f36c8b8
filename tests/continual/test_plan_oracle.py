"""The C++ plan against the naive one, row by row, over random runs."""

import runpy
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from megatron_mer import _index
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec

oracle = runpy.run_path(str(Path(__file__).with_name("plan_oracle.py")))

ALPHAS = ["0", "0.1", "0.25", "0.29", "0.333", "0.5", "0.75", "0.9", "0.999"]
WEIGHTS = st.one_of(
    st.floats(1e-3, 10), st.sampled_from([1.0, 1e-300, 1e300, 5e-324]), st.just(2.0)
)
MANY_EPOCHS = 1e6


@st.composite
def specs(draw: st.DrawFn) -> PlanSpec:
    sizes = {f"d{i}": draw(st.integers(1, 40)) for i in range(draw(st.integers(1, 5)))}
    stream = []
    for index in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(list(sizes)), min_size=1, unique=True))
        weighted = draw(st.booleans())
        datasets = tuple(
            DatasetSpec(name, sizes[name], draw(WEIGHTS) if weighted else None) for name in names
        )
        length = draw(st.sampled_from(["steps", "fresh_tokens", "before"]))
        stream.append(
            EntrySpec(
                task=f"t{index}",
                datasets=datasets,
                steps=draw(st.integers(1, 8)) if length == "steps" else None,
                fresh_tokens=draw(st.integers(1, 400)) if length == "fresh_tokens" else None,
                max_epochs=MANY_EPOCHS,
                trained_before=length == "before",
            )
        )
    assume(not all(entry.trained_before for entry in stream))
    replay = ReplaySpec(
        alpha=Decimal(draw(st.sampled_from(ALPHAS))), include_current_task=draw(st.booleans())
    )
    return PlanSpec(
        seed=draw(st.integers(0, 2**64 - 1)),
        global_batch_size=draw(st.integers(1, 12)),
        seq_length=draw(st.integers(1, 9)),
        replay=draw(st.sampled_from([replay, replay, None])),
        stream=tuple(stream),
    )


def as_tuples(rows) -> list[tuple[int, ...]]:
    columns = (rows.kind, rows.entry, rows.dataset, rows.sample, rows.ordinal)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


@settings(max_examples=150, deadline=None)
@given(spec=specs(), data=st.data())
def test_every_row_equals_the_oracle(spec: PlanSpec, data: st.DataObject) -> None:
    plan = Plan(spec)
    assume(plan.total_batches <= 60)
    # Often the first batches, since they decide where a pool begins.
    run = data.draw(st.integers(0, min(3, plan.total_batches - 1)))
    more = data.draw(st.sets(st.integers(0, plan.total_batches - 1), max_size=5))
    skipped = sorted({*range(run), *more})
    event(f"skipped {min(len(skipped), 3)}, replay {spec.replay is not None}")
    expected = list(oracle["walk_run"](spec, skipped))
    assert len(expected) == plan.total_batches
    for batch, entry, rows in expected:  # as a run does: asked, then perhaps marked
        assert plan.entry_of(batch).index == entry
        assert as_tuples(plan.rows(batch)) == rows
        assert plan.replay_rows(batch) == sum(row[0] for row in rows)
        if batch in skipped:
            plan.mark_skipped(batch)
    for batch, _, rows in expected:  # and again, when later batches have been marked
        half = spec.global_batch_size // 2
        assert as_tuples(plan.rows(batch, 0, half)) + as_tuples(plan.rows(batch, half)) == rows
    again = Plan.from_history(plan.history())
    assert again.history() == plan.history()
    for batch, _, rows in expected:
        assert as_tuples(again.rows(batch)) == rows
    check_ledger(plan, expected, skipped)


def check_ledger(plan: Plan, expected, skipped) -> None:
    n = plan.spec.global_batch_size
    stops = [0, plan.total_batches // 2, plan.total_batches, plan.total_batches // 3]
    for stop in stops:
        ledger = plan.ledger(stop)
        for number, (name, size) in enumerate(plan.spec.datasets.items()):
            counts = {"fresh": 0, "replayed": 0, "skipped": 0}
            for batch, _, rows in expected[:stop]:
                kinds = [row[0] for row in rows if row[2] == number]
                lost = batch in skipped
                counts["skipped" if lost else "fresh"] += kinds.count(0)
                counts["replayed"] += 0 if lost else kinds.count(1)
            epochs = (counts["fresh"] + counts["skipped"]) / size
            assert ledger["datasets"][name] == {**counts, "epochs": epochs}
        for line in ledger["tasks"]:
            mine = [rows for _, entry, rows in expected[:stop] if entry == line["entry"]]
            assert line["replay_rows"] == sum(row[0] for rows in mine for row in rows)
            if line["pool_batches"]:
                share = line["replay_rows"] / (line["pool_batches"] * n)
                assert line["replay_share"] == share
            else:
                assert line["replay_share"] is None
                assert line["replay_rows"] == 0
    assert plan.fresh_rows_before(plan.total_batches) == sum(
        1 - row[0] for _, _, rows in expected for row in rows
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 100, 4095, 4096, 10_000])
def test_permutation_equals_the_oracle(size: int) -> None:
    key = 0x123456789ABCDEF0 + size
    found = _index.Permutation(size).forward(key, np.arange(size, dtype=np.uint64))
    assert found.tolist() == oracle["permutation"](size, key)


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=40))
def test_blend_equals_the_oracle_and_leaves_no_holes(weights: list[float]) -> None:
    tree = _index.WeightTree.from_weights(np.array(weights))
    blend = oracle["Blend"]([], weights)
    for n in range(300):
        assert tree.counts(n).tolist() == blend.taken
        assert [tree.count(leaf, n) for leaf in range(len(weights))] == blend.taken
        assert tree.locate(n) == blend.next()
