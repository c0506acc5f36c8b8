"""What is said of a buffer's content agrees with the plan row by row."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_mer.continual.buffer_content import BufferContent, entries_of
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from tests.continual.plan_strategies import stored
from tests.continual.test_plan_buffer import BufferedLife, lives


@settings(max_examples=100)
@given(life=lives())
def test_each_rows_entry_is_the_plans(life: BufferedLife) -> None:
    for batch in range(life.plan.total_batches):
        rows = life.plan.rows(batch)
        assert entries_of(life.plan, rows.ordinal).tolist() == rows.entry.tolist()


def a_spec(capacity, **replay_) -> PlanSpec:
    stream = (
        EntrySpec("old", (DatasetSpec("d", 30),), trained_before=True),
        EntrySpec("a", (DatasetSpec("d0", 4000, 0.75), DatasetSpec("d1", 4000, 0.25)), steps=20),
        EntrySpec("b", (DatasetSpec("d1", 4000),), steps=10),
    )
    values = {"alpha": Decimal("0.5"), "source": "buffer", "capacity": capacity, **replay_}
    return PlanSpec(3, 10, 4, ReplaySpec(**values), stream)


def at_end(plan: Plan) -> BufferContent:
    return BufferContent.at(plan, 4, plan.total_batches)


def test_counts_and_what_is_to_be_expected() -> None:
    plan = Plan(a_spec(50))
    plan.mark_skipped(4)  # Its 5 fresh rows never enter.
    content = at_end(plan)
    report = content.report()
    assert (report["rows"], report["capacity"], report["fresh_rows"]) == (50, 50, 180)
    tasks = {one["task"]: one for one in report["tasks"]}
    assert [tasks[name]["fresh_rows"] for name in ("old", "a", "b")] == [30, 95, 50]
    assert tasks["a"]["expected_share"] == pytest.approx(95 / 175)
    assert sum(one["rows"] for one in report["datasets"]) == 50
    shared = [one["task"] for one in report["datasets"] if one["dataset"] == "d1"]
    assert shared == ["a", "b"]
    held = [content.plan.entries[one].task for one in content.entry]
    assert {name: held.count(name) for name in tasks} == {n: t["rows"] for n, t in tasks.items()}
    assert (content.age.min() >= 1, content.age.max() <= 180) == (True, True)
    ages = np.histogram(content.age, [at + 0.5 for at in report["ages"]["edges"]])[0]
    assert ages.tolist() == report["ages"]["rows"]


def test_a_dropped_task_is_not_expected() -> None:
    plan = Plan.without(stored(Plan(a_spec(50))), {"a"}, 30)
    report = at_end(plan).report()
    tasks = {one["task"]: one for one in report["tasks"]}
    assert (tasks["a"]["rows"], tasks["a"]["expected_share"]) == (0, 0)
    assert tasks["b"]["expected_share"] == pytest.approx(50 / 80)
    assert report["rows"] == tasks["old"]["rows"] + tasks["b"]["rows"] < 50


def test_a_capacity_for_each_task() -> None:
    spec = a_spec({"old": 10, "a": 20, "b": 100}, policy="equal")
    report = at_end(Plan(spec)).report()
    assert [one["rows"] for one in report["tasks"]] == [10, 20, 50]
    assert [one["expected_share"] for one in report["tasks"]] == pytest.approx(
        [10 / 80, 20 / 80, 50 / 80]
    )


def test_before_the_first_batch() -> None:
    spec = a_spec(50)
    plan = Plan(replace(spec, stream=spec.stream[1:]))
    report = BufferContent.at(plan, 4, 0).report()
    assert (report["rows"], report["fresh_rows"], report["ages"]["rows"]) == (0, 0, [])
