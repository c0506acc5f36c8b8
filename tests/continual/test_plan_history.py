"""Going on with a plan: what is free, and what is named as a difference."""

import json
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from megatron_mer.continual.history import differences
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import CheckpointError

BASE = EntrySpec("base", (DatasetSpec("web", 77),), trained_before=True)
EN = EntrySpec("en", (DatasetSpec("en", 200, 3.0), DatasetSpec("web", 77, 1.0)), steps=10)
FR = EntrySpec("fr", (DatasetSpec("fr", 900),), fresh_tokens=80 * 16)
SPEC = PlanSpec(3, 8, 16, ReplaySpec(Decimal("0.25")), (BASE, EN, FR))
# 10 batches of en, and 14 of fr: 6 of 8 rows are fresh.


def assert_same_rows(left: Plan, right: Plan, batches: int) -> None:
    for batch in range(batches):
        pairs = zip(vars(left.rows(batch)).values(), vars(right.rows(batch)).values(), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


def stored(plan: Plan) -> list[dict]:
    """The history as a checkpoint gives it back."""
    return json.loads(json.dumps(plan.history()))


def with_entry(index: int, **changes) -> PlanSpec:
    stream = list(SPEC.stream)
    stream[index] = replace(stream[index], **changes)
    return replace(SPEC, stream=tuple(stream))


def test_history_is_json_and_rebuilds_the_plan() -> None:
    plan = Plan(SPEC)
    for batch in (0, 1, 2, 7, 11):
        plan.mark_skipped(batch)
    [segment] = plan.history()
    assert segment["first_batch"] == 0
    assert segment["skipped"] == [[0, 3], [7, 8], [11, 12]]
    assert segment["batches"] == [0, 10, 14]
    assert segment["cursors"] == {"web": 0, "en": 0, "fr": 0}
    assert segment["replay"]["alpha"] == "0.25"
    again = Plan.from_history(stored(plan))
    assert again.spec == plan.spec
    assert again.history() == plan.history()
    assert again.skipped == plan.skipped == [0, 1, 2, 7, 11]
    assert_same_rows(again, plan, plan.total_batches)
    off = Plan(replace(SPEC, replay=None))
    assert Plan.from_history(stored(off)).history() == off.history()


def lines(spec: PlanSpec, new: PlanSpec, batch: int = 0) -> list[str]:
    return [str(one) for one in differences(stored(Plan(spec)), new, batch)]


def test_an_appended_entry_changes_no_earlier_batch_and_is_no_difference() -> None:
    more = (EntrySpec("en2", (DatasetSpec("en", 200), DatasetSpec("zh", 99)), steps=9), FR)
    for current in (False, True):
        spec = replace(SPEC, replay=ReplaySpec(Decimal("0.25"), include_current_task=current))
        longer = replace(spec, stream=(*spec.stream, *more))
        short = Plan(spec)
        short.mark_skipped(4)
        assert differences(stored(short), longer, 12) == []
        long = Plan.extended(stored(short), longer)
        assert len(long.segments) == 1
        assert long.skipped == [4]
        assert long.total_batches > short.total_batches
        assert_same_rows(short, long, short.total_batches)


def test_a_task_appended_under_policy_weights_needs_no_flag() -> None:
    replay = ReplaySpec(Decimal("0.5"), policy="weights", weights={"base": 1.0, "en": 2.0, "fr": 1})
    old = Plan(replace(SPEC, replay=replay))
    more = replace(replay, weights={**replay.weights, "de": 5.0})
    spec = replace(SPEC, replay=more, stream=(*SPEC.stream, DE))
    assert differences(stored(old), spec, 12) == []
    assert_same_rows(old, Plan.extended(stored(old), spec), old.total_batches)


def test_thousands_of_differences_are_a_few_lines() -> None:
    def many(weight: float) -> PlanSpec:
        datasets = tuple(DatasetSpec(f"x{i}", 99, weight + i) for i in range(3000))
        return with_entry(2, datasets=datasets)

    old = Plan(many(1.0))
    [text] = [str(one) for one in differences(stored(old), many(2.0), 4)]
    assert text.endswith(
        "other weights: datasets 'x0' from 1 to 2, 'x1' from 2 to 3, 'x2' from 3 to 4, ... (3000 "
        "in all)"
    )


def test_what_changes_nothing_is_no_difference() -> None:
    for batch in (0, 5, 17, 24):
        assert lines(SPEC, SPEC, batch) == []
        assert lines(SPEC, with_entry(1, max_epochs=5), batch) == []
        same_length = with_entry(2, fresh_tokens=None, steps=14)
        assert lines(SPEC, same_length, batch) == []
        off, zero = replace(SPEC, replay=None), ReplaySpec(Decimal("0"))
        assert lines(off, replace(SPEC, replay=zero), batch) == []
        written = replace(SPEC, replay=ReplaySpec(Decimal("0.250")))
        assert lines(SPEC, written, batch) == []
    assert_same_rows(Plan(SPEC), Plan.extended(Plan(SPEC).history(), same_length), 24)


MIX = (DatasetSpec("en", 200, 4.0), EN.datasets[1])
DE = EntrySpec("de", (DatasetSpec("de", 900),), steps=5)
ACCEPTABLE = {
    "batch size": (replace(SPEC, global_batch_size=4), 12, "batch-size", "from batch 12: global"),
    "replay off": (
        replace(SPEC, replay=None),
        3,
        "replay",
        "from batch 3: replay was on with alpha 0.25, policy uniform, is off",
    ),
    "policy": (
        replace(SPEC, replay=ReplaySpec(Decimal("0.25"), policy="equal")),
        11,
        "replay",
        "from batch 11: replay.policy was uniform, is equal",
    ),
    "longer": (
        with_entry(1, steps=12),
        4,
        "length",
        "from batch 10: stream.1 (task 'en'): its length was 10 steps, is 12 steps",
    ),
    "shorter": (with_entry(1, steps=7), 4, "length", "from batch 7: stream.1 (task 'en')"),
    "longer than it was": (with_entry(1, steps=12), 10, "length", "from batch 10: stream.1"),
    "longer to come": (
        with_entry(2, fresh_tokens=160 * 16),
        4,
        "length",
        "from batch 24: stream.2 (task 'fr'): its length was 1280 fresh tokens, is 2560 fresh",
    ),
    "mix": (
        with_entry(1, datasets=MIX),
        4,
        "mix",
        "from batch 4: stream.1 (task 'en'): other weights: dataset 'en' from 3 to 4",
    ),
    "mix to come": (
        with_entry(2, datasets=(DatasetSpec("fr", 900), DatasetSpec("de", 900))),
        4,
        "mix",
        "from batch 10: stream.2 (task 'fr'): dataset 'de' was not there",
    ),
    "order of datasets": (
        with_entry(1, datasets=EN.datasets[::-1]),
        4,
        "mix",
        "from batch 4: stream.1 (task 'en'): its datasets stand in another order, from place 0",
    ),
    "gone": (
        replace(SPEC, stream=SPEC.stream[:2]),
        4,
        "stream",
        "from batch 10: stream.2: task 'fr' is gone",
    ),
    "inserted": (
        replace(SPEC, stream=(BASE, EN, DE, FR)),
        4,
        "stream",
        "from batch 10: stream.2: task 'de' is new before task 'fr'",
    ),
    "reordered": (
        replace(SPEC, stream=(BASE, FR, EN)),
        0,
        "stream",
        "from batch 0: stream.1: task 'fr' is new before task 'en'",
    ),
    "many weights": (
        with_entry(1, datasets=tuple(DatasetSpec(f"x{i}", 9, 1.0) for i in range(9))),
        4,
        "mix",
        "from batch 4: stream.1 (task 'en'): datasets 'en', 'web' are gone",
    ),
    "more trained before": (
        replace(SPEC, stream=(*SPEC.stream, replace(BASE, task="more"))),
        4,
        "stream",
        "from batch 4: task 'more', trained before, was not in the replay pool",
    ),
}


@pytest.mark.parametrize("case", ACCEPTABLE)
def test_a_change_is_named_with_its_first_batch_and_the_kind_to_accept(case) -> None:
    spec, batch, kind, line = ACCEPTABLE[case]
    old = Plan(SPEC)
    found = differences(stored(old), spec, batch)
    assert {one.accept for one in found} == {kind}
    assert str(found[0]).startswith(line)
    # The batch named is right: accepted, the change touches nothing before it, and that batch.
    first = found[0].batch
    new = Plan.continued(stored(old), spec, first)
    assert_same_rows(old, new, first)
    again = Plan.from_history(stored(new))
    assert differences(stored(new), spec, batch) == []
    assert len(again.segments) == (2 if first else 1)
    assert_same_rows(new, again, new.total_batches)
    ends = min(old.total_batches, new.total_batches) == first
    assert ends or any(
        not np.array_equal(one, other)
        for one, other in zip(
            vars(old.rows(first)).values(), vars(new.rows(first)).values(), strict=True
        )
    )


NEVER = {
    "seed": (replace(SPEC, seed=4), "from batch 0: seed was 3, is 4", "set it to 3"),
    "seq_length": (replace(SPEC, seq_length=8), "from batch 0: seq_length was 16", "set it to 16"),
    "size": (
        with_entry(2, datasets=(DatasetSpec("fr", 901),)),
        "from batch 10: dataset 'fr' had 900 samples, has 901",
        "bring the old data back",
    ),
    "finished mix": (
        with_entry(1, datasets=MIX),
        "from batch 0: stream.1 (task 'en'): other weights: dataset 'en' from 3 to 4",
        "trained to its end",
    ),
    "finished length": (
        with_entry(1, steps=11),
        "from batch 10: stream.1 (task 'en'): its length",
        "trained to its end",
    ),
    "less than trained": (
        with_entry(2, fresh_tokens=None, steps=3),
        "from batch 13: stream.2 (task 'fr'): its length was 1280 fresh tokens, is 3 steps, but 3 "
        "batches with 288 fresh tokens were trained",
        "steps: 4 or fresh_tokens: 289",
    ),
    "begun name": (
        with_entry(2, task="french"),
        "from batch 10: stream.2 was task 'fr', is task 'french'",
        "stand first, in their order, up to",
    ),
    "begun gone": (
        replace(SPEC, stream=SPEC.stream[:2]),
        "from batch 10: stream.2: task 'fr' is gone, but was begun",
        "the 3 begun entries stand first, in their order, up to task 'base', trained before, task",
    ),
    "pool gone": (
        replace(SPEC, stream=(EN, FR)),
        "from batch 0: task 'base', trained before, is gone",
        "weight 0",
    ),
    "pool changed": (
        with_entry(0, datasets=(DatasetSpec("old", 77),)),
        "from batch 0: task 'base', trained before, is gone",
        "weight 0",
    ),
    "pool in front": (
        replace(SPEC, stream=(replace(BASE, task="more"), *SPEC.stream)),
        "from batch 0: stream.0 was task 'base', trained before, is task 'more', trained before",
        "new ones go behind them",
    ),
}


@pytest.mark.parametrize("case", NEVER)
def test_what_no_flag_accepts_comes_with_what_to_do(case) -> None:
    spec, line, remedy = NEVER[case]
    [found, *_] = [
        one
        for one in differences(stored(Plan(SPEC)), spec, 13)
        if one.accept is None and str(one).startswith(line)
    ]
    assert remedy in found.remedy


def test_replay_that_only_starts_later_touches_no_earlier_batch() -> None:
    old = replace(SPEC, stream=(EN, FR))
    for replay in (None, ReplaySpec(Decimal("0.5"))):
        [line] = lines(old, replace(old, replay=replay), 3)
        assert line.startswith("from batch 10: replay")


def test_a_second_change_replaces_one_that_has_not_begun() -> None:
    longer = with_entry(1, steps=12)
    once = Plan.continued(stored(Plan(SPEC)), longer, 10)
    shorter = with_entry(1, steps=6)
    [difference] = differences(stored(once), shorter, 4)
    assert (difference.batch, difference.accept) == (6, "length")
    twice = Plan.continued(stored(once), shorter, 6)
    assert [one.first_batch for one in twice.segments] == [0, 6]
    assert [(one.task, one.last_batch) for one in twice.entries[1:]] == [("en", 6), ("fr", 20)]


def test_what_is_no_history_is_refused() -> None:
    [segment] = stored(Plan(SPEC))
    bad = (
        [],
        [segment, {**segment, "first_batch": 30}],
        [segment, segment],
        [{"first_batch": 0}],
        [{**segment, "seed": None}],
        [{**segment, "replay": {"alpha": "much"}}],
        [{**segment, "batches": [0, 10, 15]}],
        [{**segment, "stream": [{"task": "en"}]}],
        [{**segment, "skipped": [[4, 5], [2, 3]]}],
        [{**segment, "skipped": [[24, 25]]}],
    )
    for history in bad:
        with pytest.raises(CheckpointError):
            Plan.from_history(history)


def test_a_history_of_the_first_version_is_read() -> None:
    """It knew no policies but uniform, no max_epochs of a dataset, and one segment."""
    plan = Plan(SPEC)
    plan.mark_skipped(3)
    [segment] = stored(plan)
    del segment["skips_known"]
    del segment["replay"]["weights"]
    for entry in segment["stream"]:
        for dataset in entry["datasets"]:
            del dataset["max_epochs"]
    again = Plan.from_history([segment])
    assert again.history() == plan.history()
    assert differences([segment], SPEC, 12) == []
