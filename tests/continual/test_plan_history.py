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


def test_an_appended_entry_changes_no_earlier_batch_and_is_no_difference() -> None:
    plan = Plan(SPEC)
    plan.mark_skipped(4)
    more = (EntrySpec("en2", (DatasetSpec("en", 200), DatasetSpec("zh", 99)), steps=9), FR)
    for current in (False, True):
        spec = replace(SPEC, replay=ReplaySpec(Decimal("0.25"), include_current_task=current))
        short, long = Plan(spec), Plan(replace(spec, stream=(*spec.stream, *more)))
        for one in (short, long):
            one.mark_skipped(4)
        assert differences(stored(short), long) == []
        assert_same_rows(short, long, short.total_batches)
    longer = Plan(replace(SPEC, stream=(*SPEC.stream, *more)))
    longer.restore_skipped(stored(plan))
    assert longer.skipped == [4]
    assert_same_rows(plan, longer, plan.total_batches)


def test_what_changes_nothing_is_no_difference() -> None:
    old = stored(Plan(SPEC))
    assert differences(old, Plan(SPEC)) == []
    assert differences(old, Plan(with_entry(1, max_epochs=5))) == []
    off = stored(Plan(replace(SPEC, replay=None)))
    assert differences(off, Plan(replace(SPEC, replay=ReplaySpec(Decimal("0"))))) == []
    same_length = Plan(with_entry(2, fresh_tokens=None, steps=14))
    assert differences(old, same_length) == []
    assert_same_rows(Plan(SPEC), same_length, 24)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (replace(SPEC, seed=4), ["from batch 0: seed was 3, is 4"]),
        (
            replace(SPEC, seq_length=8),
            [
                "from batch 0: seq_length was 16, is 8",
                "from batch 24: stream.2 (task 'fr'): it had 14 batches, has 27",
            ],
        ),
        (replace(SPEC, global_batch_size=4), ["from batch 0: global_batch_size was 8, is 4"]),
        (replace(SPEC, replay=None), ["from batch 0: replay was alpha 0.25"]),
        (
            with_entry(1, steps=12),
            ["from batch 10: stream.1 (task 'en'): it had 10 batches, has 12"],
        ),
        (with_entry(1, steps=7), ["from batch 7: stream.1 (task 'en'): it had 10 batches, has 7"]),
        (
            with_entry(2, fresh_tokens=160 * 16),
            ["from batch 24: stream.2 (task 'fr'): it had 14 batches, has 27"],
        ),
        (
            with_entry(2, task="french"),
            ["from batch 10: stream.2 (task 'french'): its name was 'fr'"],
        ),
        (
            with_entry(1, datasets=(DatasetSpec("en", 200, 4.0), EN.datasets[1])),
            ["from batch 0: stream.1 (task 'en'): dataset 'en' had weight 3.0, has 4.0"],
        ),
        (
            with_entry(1, datasets=EN.datasets[::-1]),
            ["from batch 0: stream.1 (task 'en'): its datasets stood as en, web, stand as web, en"],
        ),
        (
            with_entry(2, datasets=(DatasetSpec("de", 900),)),
            [
                "from batch 10: stream.2 (task 'fr'): dataset 'fr' is gone",
                "from batch 10: stream.2 (task 'fr'): dataset 'de' was not there",
            ],
        ),
        (
            with_entry(2, datasets=(DatasetSpec("fr", 901),)),
            ["from batch 10: stream.2 (task 'fr'): dataset 'fr' had 900 samples, has 901"],
        ),
        (replace(SPEC, stream=SPEC.stream[:2]), ["from batch 10: stream.2: task 'fr' is gone"]),
        (
            replace(SPEC, stream=(*SPEC.stream, replace(BASE, task="more"))),
            ["from batch 0: stream.3: task 'more', trained before, was not in the pool"],
        ),
        (
            with_entry(0, datasets=(DatasetSpec("old", 77),)),
            [
                "from batch 0: stream.0 (task 'base'): dataset 'web' is gone",
                "from batch 0: stream.0 (task 'base'): dataset 'old' was not there",
            ],
        ),
    ],
)
def test_differences_name_what_changed_and_the_first_batch(spec: PlanSpec, expected) -> None:
    old, new = Plan(SPEC), Plan(spec)
    found = differences(stored(old), new)
    assert len(found) >= len(expected)
    for line in expected:
        assert any(one.startswith(line) for one in found)
    # The batch named is right: nothing before it differs.
    first = min(int(one.split(":")[0].removeprefix("from batch ")) for one in found)
    if "seq_length" not in found[0]:
        assert_same_rows(old, new, min(first, new.total_batches))


def test_replay_that_only_starts_later_touches_no_earlier_batch() -> None:
    old = Plan(replace(SPEC, stream=(EN, FR)))
    for replay in (None, ReplaySpec(Decimal("0.5"))):
        new = Plan(replace(old.spec, replay=replay, stream=(EN, FR)))
        assert any(
            one.startswith("from batch 10: replay was") for one in differences(stored(old), new)
        )
        assert_same_rows(old, new, 10)


def test_what_is_no_history_is_refused() -> None:
    [segment] = stored(Plan(SPEC))
    bad = (
        [],
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
