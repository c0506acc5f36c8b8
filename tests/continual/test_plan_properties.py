"""What every run keeps to, whatever its stream, skips and changes: counted by hand from its rows.

No second plan here: `test_plan_oracle` and `test_plan_segments` compare with one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from tests.continual.plan_strategies import (
    MANY_EPOCHS,
    Life,
    entries,
    lives,
    rows_of,
    specs,
    stored,
)

LIVES = lives(changes=3)
few = settings(max_examples=60)


def spec_of(life: Life, span: tuple[int, int]) -> PlanSpec:
    return life.segments[span[0]][1]


def entry_of(life: Life, span: tuple[int, int]) -> EntrySpec:
    return spec_of(life, span).stream[span[1]]


def span_of(life: Life, batch: int) -> tuple[int, int]:
    entry = life.plan.entry_of(batch)
    return entry.segment, entry.index


def fresh_rows(life: Life) -> list:
    """All fresh rows of a run in the order of their ordinals, skipped ones too."""
    return sorted((row for rows in life.seen for row in rows if not row.kind), key=lambda r: r[4])


def check_coverage(life: Life) -> None:
    """Each epoch of each dataset, over all segments and entries, holds each sample once."""
    samples = defaultdict(list)
    for row in fresh_rows(life):
        samples[life.plan.datasets[row.dataset]].append(row.sample)
    for name, taken in samples.items():
        size = life.plan.dataset_sizes[name]
        for start in range(0, len(taken), size):
            epoch = taken[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))


def check_dataset_shares(life: Life) -> None:
    """After any number of fresh rows of a span each dataset has its share of them."""
    counts, taken = defaultdict(Counter), Counter()
    wanted = {}
    for row in fresh_rows(life):
        if row.span not in wanted:
            datasets = entry_of(life, row.span).datasets
            weights = {one.name: Fraction(one.weight or one.num_samples) for one in datasets}
            total = sum(weights.values())
            wanted[row.span] = {name: weight / total for name, weight in weights.items()}
        counts[row.span][life.plan.datasets[row.dataset]] += 1
        taken[row.span] += 1
        assert counts[row.span].keys() <= wanted[row.span].keys()
        for name, share in wanted[row.span].items():
            assert abs(counts[row.span][name] - share * taken[row.span]) < 2


def available(life: Life, batch: int, trained: set[tuple[str, int]]) -> dict[str, Fraction]:
    """Weights of the tasks that a batch may replay; ``trained`` is what earlier batches were of."""
    span = span_of(life, batch)
    replay = spec_of(life, span).replay
    if replay is None or replay.alpha == 0:
        return {}
    before = {
        entry.task
        for _, spec in life.segments[: span[0] + 1]
        for entry in spec.stream
        if entry.trained_before
    }
    past = {
        task for task, index in trained if replay.include_current_task or index != span[1]
    } | before
    weights = {task: Fraction((replay.weights or {}).get(task, 1)) for task in past}
    return {task: weight for task, weight in sorted(weights.items()) if weight > 0}


def check_replay(life: Life) -> None:
    """How many rows are replay, of which tasks, and that each was trained on before."""
    sources, trained = {}, set()
    local, span = 0, None
    for batch, rows in enumerate(life.seen):
        local = local + 1 if span_of(life, batch) == span else 0
        span = span_of(life, batch)
        spec = spec_of(life, span)
        found = [row for row in rows if row.kind]
        pool = available(life, batch, trained)
        wanted = 0
        if pool:
            rate = Fraction(spec.replay.alpha) * spec.global_batch_size
            wanted = floor(rate * (local + 1)) - floor(rate * local)
        assert len(found) == wanted == life.plan.replay_rows(batch)
        assert len(rows) == spec.global_batch_size == life.plan.global_batch_size(batch)
        for row in found:
            entry = entry_of(life, row.span)
            assert entry.task in pool
            if entry.trained_before:
                assert sources.setdefault(row.ordinal, row[1:]) == row[1:]
            else:
                assert sources[row.ordinal] == row[1:]
                own = row.span[1] == span[1]
                assert not own or spec.replay.include_current_task
        for row in rows:
            if not row.kind:
                assert row.span == span
                assert row.ordinal not in sources
        if batch not in life.skipped:
            fresh = [row for row in rows if not row.kind]
            sources.update({row.ordinal: row[1:] for row in fresh})
            trained |= {(entry_of(life, span).task, span[1])} if fresh else set()


def check_task_shares(life: Life) -> None:
    """While the tasks to choose from stay the same, each has its share of the replay rows."""
    trained, state, counts = set(), None, Counter()
    for batch, rows in enumerate(life.seen):
        span = span_of(life, batch)
        pool = available(life, batch, trained)
        if state != (span, pool):
            state, counts = (span, pool), Counter()
            from_start = batch == life.plan.entry_of(batch).first_batch
        counts.update(entry_of(life, row.span).task for row in rows if row.kind)
        replay = spec_of(life, span).replay
        if pool and replay.policy != "uniform":
            # Two samples from the beginning of a span; between two later moments, twice that.
            allowed = 2 if from_start else 4
            for task, weight in pool.items():
                share = weight / sum(pool.values())
                assert abs(counts[task] - share * counts.total()) < allowed
        if batch not in life.skipped and any(not row.kind for row in rows):
            trained.add((entry_of(life, span).task, span[1]))


def check_unchanged(life: Life) -> None:
    """Later skips and later changes leave every batch as it was when it was drawn."""
    assert len(life.seen) == life.plan.total_batches
    for batch, rows in enumerate(life.seen):
        assert rows_of(life.plan, batch) == rows


def check_cursors(life: Life) -> None:
    """Each segment of the history begins where the datasets were left."""
    for segment in stored(life.plan):
        rows = [row for one in life.seen[: segment["first_batch"]] for row in one if not row.kind]
        taken = Counter(life.plan.datasets[row.dataset] for row in rows)
        assert Counter(segment["cursors"]) == taken


CHECKS = (
    check_coverage,
    check_dataset_shares,
    check_replay,
    check_task_shares,
    check_unchanged,
    check_cursors,
)


@few
@given(life=LIVES)
def test_every_run_keeps_to_what_was_asked(life: Life) -> None:
    for check in CHECKS:
        check(life)


def relived(life: Life, passing: Callable[[Plan, int], Plan]) -> list:
    """The rows of the same run when its plan goes through something before each batch."""
    again = Life()
    ends = [first for first, _ in life.segments[1:]] + [len(life.seen)]
    for (first, spec), end in zip(life.segments, ends, strict=True):
        again.begin(first, spec)
        for batch in range(first, end):
            again.plan = passing(again.plan, batch)
            again.draw(batch in life.skipped)
    return again.seen


@few
@given(life=LIVES, data=st.data())
def test_a_run_that_stops_and_goes_on_draws_the_same_rows(life: Life, data: st.DataObject) -> None:
    stops = data.draw(st.sets(st.integers(0, len(life.seen)), max_size=4))

    def resume(plan: Plan, batch: int) -> Plan:
        return Plan.from_history(stored(plan)) if batch in stops else plan

    assert relived(life, resume) == life.seen


@st.composite
def longer(draw: st.DrawFn, plan: Plan) -> PlanSpec:
    """A specification with more to train at its end, and other limits on epochs."""
    spec = plan.spec
    sizes = {**plan.dataset_sizes, "appended": 13}
    more = draw(st.lists(entries(sizes, trains=True), min_size=1, max_size=2))
    more = [replace(one, steps=3, fresh_tokens=None) for one in more]
    epochs = draw(st.sampled_from([MANY_EPOCHS, 3 * MANY_EPOCHS]))
    old = [replace(entry, max_epochs=epochs) for entry in spec.stream]
    replay = spec.replay
    if replay is not None and replay.weights is not None:
        new = {one.task: 1.0 for one in more if one.task not in replay.weights}
        replay = replace(replay, weights={**replay.weights, **new})
    return replace(spec, replay=replay, stream=(*old, *more))


@few
@given(life=LIVES, data=st.data())
def test_a_longer_stream_changes_no_batch_that_was_there(life: Life, data: st.DataObject) -> None:
    long = Plan.extended(stored(life.plan), data.draw(longer(life.plan)))
    total = life.plan.total_batches
    assert long.total_batches > total
    assert long.skipped == life.skipped
    assert len(long.segments) == len(life.segments)
    assert [rows_of(long, batch) for batch in range(total)] == life.seen
    assert long.datasets[: len(life.plan.datasets)] == life.plan.datasets
    assert Plan.from_history(stored(long)).history() == long.history()


@few
@given(spec=specs(), data=st.data())
def test_a_stream_made_longer_in_mid_run_goes_on_alike(spec: PlanSpec, data: st.DataObject) -> None:
    plan = Plan(spec)
    total = plan.total_batches
    bigger = data.draw(longer(plan))
    at, lost = (data.draw(st.integers(0, total - 1)) for _ in range(2))
    life, whole = Life(), Life()
    life.begin(0, spec)
    whole.begin(0, bigger)
    for batch in range(whole.plan.total_batches):
        if batch == at:
            life.plan = Plan.extended(stored(life.plan), bigger)
        life.draw(batch == lost)
        whole.draw(batch == lost)
    assert life.seen == whole.seen
    assert stored(life.plan) == stored(whole.plan)


@few
@given(life=LIVES, data=st.data())
def test_ranks_and_micro_batches_cut_the_same_batches(life: Life, data: st.DataObject) -> None:
    for batch, rows in enumerate(life.seen):
        ranks = data.draw(st.sampled_from([n for n in range(1, 13) if len(rows) % n == 0]))
        mine = len(rows) // ranks
        micro = data.draw(st.sampled_from([n for n in range(1, 13) if mine % n == 0]))
        for rank in range(ranks):
            starts = range(rank * mine, (rank + 1) * mine, micro)
            parts = [rows_of(life.plan, batch, start, start + micro) for start in starts]
            assert [row for part in parts for row in part] == rows[rank * mine : (rank + 1) * mine]


def counted(life: Life, stop: int) -> tuple[dict, dict, Counter]:
    """What the first batches took by dataset and by (position or task, dataset)."""
    datasets, tasks, replay = defaultdict(Counter), defaultdict(Counter), Counter()
    for batch, rows in enumerate(life.seen[:stop]):
        lost = batch in life.skipped
        for row in rows:
            name = life.plan.datasets[row.dataset]
            entry = entry_of(life, row.span)
            # What was trained before may stand elsewhere after a change.
            place = entry.task if entry.trained_before else row.span[1]
            replay[span_of(life, batch)[1]] += row.kind
            if row.kind and lost:
                continue
            word = "replayed" if row.kind else "skipped" if lost else "fresh"
            datasets[name][word] += 1
            tasks[place, name][word] += 1
    return datasets, tasks, replay


@few
@given(life=LIVES, data=st.data())
def test_the_ledger_is_what_one_counts(life: Life, data: st.DataObject) -> None:
    plan = life.plan
    for stop in [plan.total_batches, data.draw(st.integers(0, plan.total_batches))]:
        ledger = plan.ledger(stop)
        datasets, tasks, replay = counted(life, stop)
        assert list(ledger["datasets"]) == list(plan.datasets)
        for name, line in ledger["datasets"].items():
            words = {word: datasets[name][word] for word in ("fresh", "replayed", "skipped")}
            epochs = (words["fresh"] + words["skipped"]) / plan.dataset_sizes[name]
            assert line == {**words, "epochs": epochs}
        found = defaultdict(Counter)
        spans = [span_of(life, batch) for batch in range(stop)]
        for position, line in enumerate(ledger["tasks"]):
            entry = plan.spec.stream[position]
            assert (line["entry"], line["task"]) == (position, entry.task)
            assert line["trained_before"] == entry.trained_before
            assert line["batches"] == sum(
                index == position and not entry.trained_before for _, index in spans
            )
            assert line["replay_rows"] == (0 if entry.trained_before else replay[position])
            for name, words in line["datasets"].items():
                found[entry.task if entry.trained_before else position, name].update(words)
            for word in ("fresh", "replayed", "skipped"):
                assert line[word] == sum(one[word] for one in line["datasets"].values())
        # Counters compare without their zeros.
        assert {key: +one for key, one in found.items() if +one} == dict(tasks)


@pytest.mark.slow
@settings(max_examples=2000)
@given(life=lives(changes=4))
def test_many_runs_keep_to_what_was_asked(life: Life) -> None:
    for check in CHECKS:
        check(life)


@pytest.mark.parametrize("policy", ["equal", "weights"])
def test_shares_hold_at_every_row_with_many_tasks(policy: str) -> None:
    """One row a batch, so that every moment is seen."""
    plan = Plan(many_tasks(policy))
    assert plan.spec.replay is not None
    weights = plan.spec.replay.weights or dict.fromkeys((f"t{i}" for i in range(30)), 1.0)
    total = sum(map(Fraction, list(weights.values())[:30]))
    counts: Counter[str] = Counter()
    first = plan.entries[-1].first_batch
    for batch in range(first, plan.total_batches):
        counts.update(plan.entries[row.span[1]].task for row in rows_of(plan, batch) if row.kind)
        for task, weight in list(weights.items())[:30]:
            assert abs(counts[task] - Fraction(weight) / total * counts.total()) < 2
    assert counts.total() == 1500


def many_tasks(policy: str) -> PlanSpec:
    data = [(DatasetSpec(f"d{i}", 5 + i),) for i in range(31)]
    stream = [
        EntrySpec(f"t{i}", one, steps=2 if i < 30 else 2000, max_epochs=MANY_EPOCHS)
        for i, one in enumerate(data)
    ]
    weights = {f"t{i}": (i % 7 + 1) ** 3 / 3 for i in range(31)} if policy == "weights" else None
    replay = ReplaySpec(Decimal("0.75"), policy=policy, weights=weights)
    return PlanSpec(5, 1, 8, replay, tuple(stream))
