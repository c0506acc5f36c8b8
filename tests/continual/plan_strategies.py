"""Random streams, and random runs over them: skipped batches, and changes that are accepted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from hypothesis import strategies as st

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from tests.continual import plan_oracle as oracle

ALPHAS = ["0.5", "0.25", "0.75", "0.9", "0.333", "0.29", "0.1", "0.5", "0.75", "0"]
WEIGHTS = st.one_of(
    st.floats(1e-3, 10), st.sampled_from([1.0, 1e-300, 1e300, 5e-324]), st.just(2.0)
)
TASK_WEIGHTS = st.sampled_from([1.0, 0.0, 2.0, 0.3, 1e-9, 1e300, 0.0, 7.1, 0.0])
TASKS = ["t0", "t1", "t2", "t3"]
BATCH_SIZES = st.sampled_from([6, 5, 8, 12, 4, 7, 3, 2, 1])
MANY_EPOCHS = 1e6
MOST_BATCHES = 10  # of one entry


@st.composite
def entries(
    draw: st.DrawFn, sizes: dict[str, int], task: str | None = None, trains: bool | None = None
) -> EntrySpec:
    """An entry of any task, over some of the datasets; its length is set by `fitted`."""
    before = draw(st.sampled_from([False] * 3 + [True])) if trains is None else not trains
    names = draw(st.lists(st.sampled_from(list(sizes)), min_size=1, max_size=4, unique=True))
    weighted = draw(st.booleans())
    entry = EntrySpec(
        task=task or draw(st.sampled_from(TASKS)),
        datasets=tuple(
            DatasetSpec(
                name,
                sizes[name],
                draw(WEIGHTS) if weighted else None,
                max_epochs=draw(st.sampled_from([None, 2 * MANY_EPOCHS])),
            )
            for name in names
        ),
        max_epochs=MANY_EPOCHS,
        trained_before=before,
    )
    return entry if before else replace(entry, **draw(lengths()))


@st.composite
def lengths(draw: st.DrawFn) -> dict[str, int | None]:
    if draw(st.booleans()):
        return {"steps": draw(st.sampled_from([5, 4, 8, 7, 3, 6, 2, 1])), "fresh_tokens": None}
    return {"steps": None, "fresh_tokens": draw(st.sampled_from([90, 150, 33, 400, 57, 10, 1]))}


@st.composite
def replays(draw: st.DrawFn, stream: list[EntrySpec]) -> ReplaySpec | None:
    policy = draw(st.sampled_from(["weights", "equal", "uniform", "weights", "uniform", None]))
    if policy is None:
        return None
    weights = None
    if policy == "weights":
        weights = {task: draw(TASK_WEIGHTS) for task in sorted({one.task for one in stream})}
        if not any(weights.values()):
            weights[draw(st.sampled_from(list(weights)))] = 2.0
    return ReplaySpec(
        alpha=Decimal(draw(st.sampled_from(ALPHAS))),
        policy=policy,
        include_current_task=draw(st.booleans()),
        weights=weights,
    )


def fitted(spec: PlanSpec, first: int = 0) -> PlanSpec:
    """The specification, the lengths of its entries from ``first`` on cut to what a test can run.

    Without it, 400 rows at one row a batch and alpha 0.9 would take 4,000 batches.
    """
    alpha = Fraction(spec.replay.alpha) if spec.replay else 0
    rows = max(1, int(MOST_BATCHES * spec.global_batch_size * (1 - alpha)))
    most = rows * spec.seq_length
    stream = [
        replace(entry, fresh_tokens=min(entry.fresh_tokens, most))
        if entry.fresh_tokens and index >= first
        else entry
        for index, entry in enumerate(spec.stream)
    ]
    return replace(spec, stream=tuple(stream))


@st.composite
def specs(draw: st.DrawFn) -> PlanSpec:
    sizes = {f"d{i}": draw(st.integers(1, 40)) for i in range(draw(st.integers(1, 5)))}
    count = draw(st.sampled_from([4, 3, 5, 2, 1]))
    stream = [draw(entries(sizes)) for _ in range(count)]
    if all(entry.trained_before for entry in stream):
        stream.append(draw(entries(sizes, trains=True)))
    return fitted(
        PlanSpec(
            seed=draw(st.integers(0, 2**64 - 1)),
            global_batch_size=draw(BATCH_SIZES),
            seq_length=draw(st.integers(1, 9)),
            replay=draw(replays(stream)),
            stream=tuple(stream),
        )
    )


@st.composite
def like(draw: st.DrawFn, entry: EntrySpec) -> EntrySpec:
    """One more entry trained before: the same again, or another for its task or its weights."""
    weights = draw(st.sampled_from([[one.weight for one in entry.datasets], [2.0, 1.0, 3.0, 1.0]]))
    pairs = zip(entry.datasets, weights, strict=False)
    return replace(
        entry,
        task=draw(st.sampled_from([entry.task, entry.task, "t0"])),
        datasets=tuple(replace(one, weight=weight) for one, weight in pairs),
    )


@st.composite
def changed(draw: st.DrawFn, plan: Plan, batch: int) -> PlanSpec:
    """A specification that a run may go on with from a batch on.

    What is finished stays. The entry in training may get another mix and length, those after it
    may come and go; entries trained before may only be added.
    """
    spec = plan.spec
    begun = [one for one in plan.entries if not one.trained_before and one.first_batch < batch]
    stop = max((one.index for one in begun), default=-1) + 1  # first position not begun
    head, tail = list(spec.stream[:stop]), list(spec.stream[stop:])
    sizes = plan.dataset_sizes
    what = draw(st.sets(st.sampled_from(["batch-size", "replay", "mix", "length", "stream"])))
    if begun and max(one.last_batch for one in begun) > batch:
        if "mix" in what:
            mix = draw(entries(sizes, head[-1].task, trains=True))
            head[-1] = replace(head[-1], datasets=mix.datasets)
        if "length" in what:
            head[-1] = replace(head[-1], **draw(lengths()))
        stop -= 1
    if "stream" in what:
        stays = [one for one in tail if one.trained_before or draw(st.booleans())]
        new = draw(st.lists(entries(sizes | {f"new{batch}": 11}), max_size=2))
        new += [
            draw(like(one)) for one in spec.stream if one.trained_before and draw(st.booleans())
        ]
        tail = draw(st.permutations([*stays, *new]))
    stream = [*head, *tail]
    if all(entry.trained_before for entry in stream):
        stream.append(draw(entries(sizes, trains=True)))
    if "batch-size" in what:
        spec = replace(spec, global_batch_size=draw(BATCH_SIZES))
    named = spec.replay.weights if spec.replay else None
    if "replay" in what or (named is not None and set(named) != {one.task for one in stream}):
        spec = replace(spec, replay=draw(replays(stream)))
    return fitted(replace(spec, stream=tuple(stream)), stop)


class Row(NamedTuple):
    kind: int
    span: tuple[int, int]
    """Segment and position of the entry that the sample belongs to."""
    dataset: int
    sample: int
    ordinal: int
    slot: int


@dataclass
class Life:
    """A run that has been trained to its end."""

    segments: list[tuple[int, PlanSpec]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    plan: Plan = field(init=False, repr=False)
    """As it was at the end."""
    seen: list[list[Row]] = field(default_factory=list, repr=False)
    """Each batch's rows when it was drawn."""

    def begin(self, first: int, spec: PlanSpec) -> None:
        """Starts the run, or goes on with it as another specification says."""
        if self.segments:
            self.plan = Plan.continued(self.plan.history(), spec, first)
        else:
            self.plan = Plan(spec)
        # A segment that came to train nothing leaves nothing behind.
        kept = [one for one in self.segments if one[0] < first]
        self.segments = [*kept, (first, spec)]

    def draw(self, skip: bool) -> None:
        """Draws the next batch, and perhaps finds no update in it."""
        batch = len(self.seen)
        self.seen.append(rows_of(self.plan, batch))
        if skip:
            self.plan.mark_skipped(batch)
            self.skipped.append(batch)


def rows_of(plan: Plan, batch: int, start: int = 0, stop: int | None = None) -> list[Row]:
    """The rows at some places of a batch.

    Spans stand for their numbers in ``plan.entries``: when a change takes away an entry that had
    not begun, the numbers behind it move up.
    """
    rows, entries = plan.rows(batch, start, stop), plan.entries
    spans = [(entries[number].segment, entries[number].index) for number in rows.entry]
    columns = (one.tolist() for one in (rows.dataset, rows.sample, rows.ordinal, rows.slot))
    return [Row(*row) for row in zip(rows.kind.tolist(), spans, *columns, strict=True)]


def stored(plan: Plan) -> list[dict[str, Any]]:
    """The history as a checkpoint gives it back."""
    return json.loads(json.dumps(plan.history()))


def assert_walked(plan: Plan, run: oracle.Run) -> None:
    """Every batch, and every span, is the oracle's."""
    spans = [(one.segment, one.index, one.task, one.trained_before) for one in plan.entries]
    wanted = [(run.entry(span), *span) for span in run.spans()]
    assert spans == [(s, index, one.task, one.trained_before) for one, s, index in wanted]
    assert plan.datasets == tuple(run.names)
    fresh = total = 0
    for batch, (span, rows, _) in enumerate(run.batches):
        found = rows_of(plan, batch)
        assert found == rows, f"batch {batch}: {found} instead of {rows}"
        assert (plan.entry_of(batch).segment, plan.entry_of(batch).index) == span
        assert plan.replay_rows(batch) == sum(row[0] for row in rows)
        assert plan.global_batch_size(batch) == len(rows)
        assert (plan.fresh_rows_before(batch), plan.rows_before(batch)) == (fresh, total)
        fresh, total = fresh + len(rows) - plan.replay_rows(batch), total + len(rows)
    end = len(run.batches)
    assert plan.total_batches == end
    assert (plan.fresh_rows_before(end), plan.rows_before(end)) == (fresh, total)


@st.composite
def lives(draw: st.DrawFn, changes: int = 4) -> Life:
    """A run with skipped batches and up to so many accepted changes."""
    life = Life()
    life.begin(0, draw(specs()))
    for left in range(draw(st.integers(0, changes)), -1, -1):
        first, total = life.segments[-1][0], life.plan.total_batches
        until = total
        if left:  # often in the midst of an entry
            until = draw(
                st.sampled_from([(first + total) // 2, (first + 2 * total) // 3])
                | st.integers(first, total)
            )
        # Often the first batches, since they decide where a pool begins.
        skipped = set(range(first, first + draw(st.sampled_from([0, 2, 1, 4, 6]))))
        skipped |= draw(st.sets(st.integers(first, max(first, until - 1)), max_size=4))
        for batch in range(first, until):
            life.draw(batch in skipped)
        if left:
            life.begin(until, draw(changed(life.plan, until)))
    return life
