"""Which records have to go and which stay, without a run."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.checkpoint import CheckpointInfo
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.data.record_store import RecordFormat, RecordStore
from megatron_mer.errors import CheckpointError, ConfigError, DataError
from megatron_mer.training.drop_tasks import erasure, refuse_in_training, rewrite_of
from megatron_mer.training.dropped import dropped_tasks, without_dropped
from megatron_mer.training.kept_buffer import KeptCheckpoint

SEGMENT_RECORDS = 4
FORMAT = RecordFormat(seq_length=4, vocab_size=100, with_ends=False, key=1)


def a_spec(seed: int = 1, capacity: int = 40) -> PlanSpec:
    """Tasks a, b and c; a and b share a dataset."""
    datasets = {"a": ("only_a", "both"), "b": ("both",), "c": ("only_c",)}
    stream = tuple(
        EntrySpec(task, tuple(DatasetSpec(name, 4000) for name in names), steps=5)
        for task, names in datasets.items()
    )
    replay_ = ReplaySpec(alpha=Decimal("0.5"), source="buffer", capacity=capacity)
    return PlanSpec(seed, 10, 4, replay_, stream)


def kept(spec: PlanSpec, batch: int) -> KeptCheckpoint:
    state = {
        "batches": batch,
        "history": Plan(spec).history(),
        "settings": {},
        "buffer": {"id": "x", "segment_records": SEGMENT_RECORDS, "tail": -1, "segments": []},
    }
    return KeptCheckpoint(CheckpointInfo(batch, Path(f"step_{batch:09d}"), state))


def write_all(spec: PlanSpec, store: RecordStore) -> dict[int, list[int]]:
    """Writes all that a run ever writes; the identity by position."""
    log = Plan(spec).buffer_log(SEGMENT_RECORDS)
    written: dict[int, list[int]] = {}
    for batch in range(1, Plan(spec).total_batches + 1):
        log.advance(batch)
        content = kept(spec, batch).content()
        for position, identity in zip(content.position.tolist(), content.identity, strict=True):
            written[position] = identity.tolist()
    positions = np.array(list(written), dtype=np.int64)
    tokens = np.ones((len(written), 5), dtype=np.int64)
    store.write(positions, np.array(list(written.values()), dtype=np.int64), tokens)
    return written


def test_of_a_dataset_of_two_tasks_only_what_is_needed_stays(tmp_path):
    spec = a_spec()
    store = RecordStore(tmp_path, FORMAT, SEGMENT_RECORDS)
    written = write_all(spec, store)
    rewrites = [rewrite_of(kept(spec, batch), {"a"}) for batch in (10, 12)]
    contents = [one.content for one in rewrites]
    assert all(one.dropped_rows for one in rewrites)
    found = erasure(store, ["only_a", "both"], contents)
    assert not len(found.untold)
    gone = set(found.of_tasks.tolist())
    store.erase(found.of_tasks)
    for content in contents:
        assert store.check(content.position, content.identity) == []
        assert {content.plan.entries[one].task for one in content.entry} <= {"b", "c"}
    plan = Plan(spec)
    needed = {one for content in contents for one in content.position.tolist()}
    for position, (ordinal, _, _) in written.items():
        ends = {name: plan.fresh_rows_before(end) for name, end in (("a", 5), ("b", 10), ("c", 15))}
        task = next(name for name, end in ends.items() if ordinal < end)
        if task == "a":
            assert position in gone
        elif task == "c" or position in needed:
            assert position not in gone
    assert len(gone) > 50


def test_the_new_state_is_what_the_new_plan_computes():
    one = kept(a_spec(), 12)
    rewrite = rewrite_of(one, {"a"})
    state = rewrite.run_state
    again = Plan.from_history(state["history"])
    log = again.buffer_log(SEGMENT_RECORDS)
    log.advance(12)
    assert state["buffer"]["tail"] == log.tail == one.content().tail
    assert again.segments[-1].dropped == ("a",)
    assert set(state) == set(one.info.run_state)
    changed = KeptCheckpoint(replace(one.info, run_state=state))
    assert rewrite_of(changed, {"a"}).dropped_rows == 0
    both = rewrite_of(changed, {"b"})
    assert both.plan.segments[-1].dropped == ("a", "b")
    assert not both.content.of_tasks({"a", "b"}).any()


def test_a_checkpoint_without_a_row_of_the_task_stays_as_it_is():
    one = kept(a_spec(), 5)
    assert rewrite_of(one, {"b"}).plan is one.plan


def test_a_run_that_could_not_go_on_is_told():
    """So small a buffer that without b it holds nothing to replay, though a was trained."""

    def every_seed() -> None:
        for seed in range(200):
            rewrite_of(kept(a_spec(seed, capacity=2), 10), {"b"})

    with pytest.raises(DataError, match=r"step_000000010 without b: batch 10: .*holds no sample"):
        every_seed()


@pytest.mark.parametrize(("batch", "task"), [(3, "a"), (9, "b"), (11, "c")])
def test_a_task_in_training_is_refused(batch, task):
    checkpoints = [kept(a_spec(), at) for at in (5, batch, 10, 15)]
    with pytest.raises(ConfigError, match=f"given '{task}', which is in training at") as told:
        refuse_in_training(checkpoints, {task})
    assert len(told.value.problems) == 1
    refuse_in_training(checkpoints, {"a", "b", "c"} - {task})


def test_the_mark_drops_what_an_older_checkpoint_still_has():
    state = kept(a_spec(), 10).info.run_state  # Between b and c.
    now, missing = without_dropped(state, ["b", "x"])
    assert missing == ["b"]
    assert now["history"] == Plan.without(state["history"], ["b"], 10).history()
    assert without_dropped(now, ["b", "x"]) == (now, [])
    assert without_dropped(state, ["c"]) == (state, [])  # No batch has trained it yet.
    with pytest.raises(ConfigError, match="after batch 7 trains task 'b', which was dropped"):
        without_dropped(kept(a_spec(), 7).info.run_state, ["b"])


def test_a_mark_that_cannot_be_read_is_named(tmp_path):
    assert dropped_tasks(tmp_path) == []
    (tmp_path / "dropped.json").write_text('{"tasks": ["b"]}')
    assert dropped_tasks(tmp_path) == ["b"]
    (tmp_path / "dropped.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"dropped.json cannot be read"):
        dropped_tasks(tmp_path)
