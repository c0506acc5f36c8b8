"""Reports about plans, against counting every row of random runs and of small ones."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given, settings

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.continual.stream_report import Spans, batch_rows, ledger_report, summarise
from megatron_mer.continual.stream_tables import (
    SHOWN_DATASETS,
    RowTable,
    ledger_text,
    summary_text,
)
from megatron_mer.continual.text_table import display_width
from megatron_mer.errors import ConfigError
from tests.continual import plan_oracle as oracle
from tests.continual.plan_strategies import Life, lives


def entry(task: str, *datasets: DatasetSpec, **keys) -> EntrySpec:
    return EntrySpec(task, datasets or (DatasetSpec(task, 100),), **keys)


def spec(*stream: EntrySpec, alpha: str | None = "0.25", rows: int = 8) -> PlanSpec:
    return PlanSpec(3, rows, 16, ReplaySpec(Decimal(alpha)) if alpha else None, stream)


def everything(plan: Plan) -> list[list[dict]]:
    spans = Spans(plan)
    return [batch_rows(spans, batch) for batch in range(plan.total_batches)]


# Rows -------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(life=lives(changes=3))
def test_rows_say_what_the_oracle_consumed_and_in_which_epoch(life: Life) -> None:
    run = oracle.walk_run(life.segments, life.skipped)
    taken: Counter = Counter()
    epochs = []
    for one in run.consumed:
        # What was trained before moves no cursor: each such entry begins its datasets anew.
        key = (one.span if one.batch < 0 else None, one.dataset)
        epochs.append(taken[key] // run.sizes[run.names[one.dataset]])
        taken[key] += 1
    for batch, rows in enumerate(everything(life.plan)):
        wanted = [
            {
                "batch": batch,
                "place": place,
                "kind": "replay" if kind else "fresh",
                "task": run.entry(span).task,
                "dataset": run.names[dataset],
                "sample": sample,
                "epoch": epochs[ordinal],
            }
            for place, (kind, span, dataset, sample, ordinal, _) in enumerate(
                run.batches[batch].rows
            )
        ]
        for row, (_, span, *_) in zip(rows, run.batches[batch].rows, strict=True):
            asked, place = run.entry(span), row.pop("entry")
            if asked.trained_before:  # it may have moved in the stream
                assert life.plan.spec.stream[place] == asked
            else:
                assert place == span[1]
        assert rows == wanted


def test_places_of_a_batch_are_a_part_of_it() -> None:
    plan = Plan(spec(entry("en", steps=4), entry("fr", steps=4)))
    spans = Spans(plan)
    assert batch_rows(spans, 6, 2, 5) == batch_rows(spans, 6)[2:5]
    with pytest.raises(ValueError, match="8"):
        batch_rows(spans, 8)


# Summary ----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(life=lives(changes=3))
def test_the_summary_counts_what_the_rows_are(life: Life) -> None:
    plan, run = life.plan, oracle.walk_run(life.segments, life.skipped)
    summary = summarise(plan)
    fresh, replays, taken = Counter(), Counter(), defaultdict(Counter)
    for one in run.consumed:
        taken[one.span][run.names[one.dataset]] += 1
    for batch in run.batches:
        replays[batch.span] += sum(row[0] for row in batch.rows)
        fresh[batch.span] += sum(1 - row[0] for row in batch.rows)
    cursors: Counter = Counter()
    for task, entry in zip(summary["tasks"], plan.entries, strict=True):
        span = entry.segment, entry.index
        before = task["trained_before"]
        assert (task["fresh_rows"], task["replay_rows"]) == (fresh[span], replays[span])
        assert task["fresh_tokens"] == fresh[span] * plan.spec.seq_length
        samples = {one["name"]: one["samples"] for one in task["datasets"]}
        assert samples == {name: taken[span][name] for name in samples}
        if not before:
            cursors.update(samples)
        for one in task["datasets"]:
            after = None if before else cursors[one["name"]] / one["num_samples"]
            assert one["epochs_after_task"] == after
    for task in summary["tasks"]:
        for one in task["datasets"]:
            assert one["epochs_after_run"] == cursors[one["name"]] / one["num_samples"]
    assert summary["fresh_rows"] == fresh.total()
    assert summary["replay_rows"] == replays.total()
    assert summary["tokens"] == (fresh.total() + replays.total()) * plan.spec.seq_length
    json.dumps(summary, allow_nan=False)


def test_replayed_counts_each_task_in_each() -> None:
    stream = (entry("base", trained_before=True), entry("en", steps=5), entry("fr", steps=7))
    plan = Plan(spec(*stream, entry("en", steps=3)))
    counted: dict[int, Counter] = defaultdict(Counter)
    for rows in everything(plan):
        for row in rows:
            if row["kind"] == "replay":
                counted[plan.entry_of(row["batch"]).index][row["entry"]] += 1
    labels = {0: "base", 1: "1 en", 2: "fr", 3: "3 en"}
    found = summarise(plan)["replayed"]
    assert [one["label"] for one in found] == ["1 en", "fr", "3 en"]
    for one in found:
        wanted = {label: counted[one["entry"]][index] for index, label in labels.items()}
        assert one["rows"] == wanted
    assert counted[3][0] > 0
    assert counted[3][1] > 0  # the task's earlier part is past
    assert counted[3][3] == 0
    assert summarise(plan, most_replay_rows=1)["replayed"] is None


def test_a_trillion_tokens_are_described_without_counting() -> None:
    many = [DatasetSpec(f"d{i}", 60_000_000, 1.0 + i % 7) for i in range(300)]
    stream = [
        entry(f"t{i}", *many, fresh_tokens=10**11, max_epochs=2, trained_before=False)
        for i in range(10)
    ]
    plan = Plan(replace(spec(*stream, rows=4096), seq_length=4096))
    summary = summarise(plan)
    assert summary["replayed"] is None
    assert sum(task["fresh_tokens"] for task in summary["tasks"]) >= 10**12
    for task in summary["tasks"]:
        for one in task["datasets"]:
            assert abs(one["share"] - one["share_wanted"]) * task["fresh_rows"] < 2
    text = summary_text(summary, 100)
    assert f"… {300 - SHOWN_DATASETS} more (--all)" in text
    assert "77," in text
    assert "is left out" in text
    assert len(batch_rows(Spans(plan), plan.total_batches - 1)) == 4096


EXHAUSTED = {
    "steps": {"steps": 200},
    "fresh tokens": {"fresh_tokens": 20_000},
    "max_epochs of one": {"steps": 200, "max_epochs": 8.5},
}


@pytest.mark.parametrize("case", EXHAUSTED)
def test_exhaustion_names_what_just_fits(case: str) -> None:
    keys = EXHAUSTED[case]
    big = DatasetSpec("big", 301, 2.0)
    small = DatasetSpec("small", 97, 1.0, max_epochs=1.7 if "of one" in case else None)
    first = entry("en", DatasetSpec("big", 301), steps=6)

    def plan(allow: bool = False, **changed) -> Plan:
        return Plan(spec(first, entry("fr", big, small, **{**keys, **changed})), allow)

    with pytest.raises(ConfigError):
        plan()
    (found,) = summarise(plan(allow=True))["exhausted"]
    assert (found["label"], found["first_batch"]) == ("fr", 6)
    key = "steps" if "steps" in keys else "fresh_tokens"
    fit = found[f"{key}_that_fit"]
    assert 0 < fit < keys[key] == found[key]
    assert not plan(**{key: fit}).exhausted
    with pytest.raises(ConfigError):
        plan(**{key: fit + 1})
    for one in found["datasets"]:
        assert one["asked"] > one["held"]
    needed = found["max_epochs_needed"]
    raised = [replace(one, max_epochs=needed) for one in (big, small)]
    lowered = [replace(one, max_epochs=round(needed - 0.01, 2)) for one in (big, small)]
    Plan(spec(first, entry("fr", *raised, **keys)))
    with pytest.raises(ConfigError):
        Plan(spec(first, entry("fr", *lowered, **keys)))


def test_a_task_for_which_nothing_is_left_is_told_so() -> None:
    plan = Plan(spec(entry("en", steps=13), entry("en", steps=2), alpha=None), True)
    first, second = summarise(plan)["exhausted"]
    assert (first["steps_that_fit"], second["steps_that_fit"]) == (12, 0)
    text = summary_text(summarise(plan), 90)
    assert "Here at most steps: 12 of 13 fit, or max_epochs: 1.04 is needed." in text
    assert "nothing is left for it" in text
    assert text.count("too few") == 2


def test_a_changed_entry_counts_what_it_trained_before_the_change() -> None:
    old = Plan(spec(entry("en", steps=10), alpha=None))
    longer = spec(entry("en", steps=11, max_epochs=2), alpha=None, rows=20)
    history = Plan.continued(old.history(), longer, 5).history()
    history[-1]["stream"][0]["max_epochs"] = 1.0
    (found,) = summarise(Plan.from_history(history))["exhausted"]
    assert (found["steps"], found["steps_that_fit"]) == (11, 8)  # 5 x 8 + 3 x 20 = 100 rows


# Ledger -----------------------------------------------------------------------------------------


def test_the_ledger_report_has_the_plan_s_ledger_and_its_changes() -> None:
    old = Plan(spec(entry("en", steps=10), entry("fr", steps=6)))
    old.mark_skipped(3)
    mixed = spec(entry("en", steps=10), entry("fr", steps=6), alpha="0.5", rows=16)
    plan = Plan.continued(old.history(), mixed, 8)
    plan.mark_skipped(11)
    report = ledger_report(plan, 10)
    assert report["skipped_batches"] == 1
    ledger = plan.ledger(10)
    assert {key: report[key] for key in ledger} == ledger
    assert report["labels"] == ["en", "fr"]
    assert [one["first_batch"] for one in report["segments"]] == [0, 8]
    assert "replay.alpha was 0.25, is 0.5" in " ".join(report["segments"][1]["changes"])
    text = ledger_text(report, 80)
    assert "10 of 16 batches done, 1 of them skipped" in text
    assert "from batch 8: global_batch_size was 8, is 16" in text
    assert ledger_text(ledger_report(old, 0), 80).startswith("0 of 16 batches done\n")


# Tables -----------------------------------------------------------------------------------------


def wide_plan() -> Plan:
    names = ["日本語のデータセット", "a_corpus_of_a_rather_long_name_part_0017", "العربية"]
    many = [DatasetSpec(f"{name}_{i}", 90 + i, 1.0) for name in names for i in range(20)]
    stream = [entry(f"{name}_task", *many, steps=190, max_epochs=9) for name in names]
    return Plan(spec(*stream, rows=64))


@pytest.mark.parametrize("width", [50, 64, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    plan = wide_plan()
    lines = summary_text(summarise(plan), width).splitlines()
    lines += ledger_text(ledger_report(plan, 200), width, all_datasets=True).splitlines()
    for text in (True, False):
        rows = RowTable(Spans(plan), width, text=text, rank=True)
        lines += rows.head().splitlines()
        for row in batch_rows(Spans(plan), 180, 0, 8):
            more = {"dp_rank": 3, **({"text": "語\n\t\x1b[31m" * 50} if text else {})}
            lines += rows.line({**row, **more}).splitlines()
    assert max(map(display_width, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert any("over 4" in line for line in lines)


def test_all_datasets_are_shown_on_demand_and_else_the_most_urgent() -> None:
    datasets = [DatasetSpec(f"d{i:02}", 1000, 1.0 + i) for i in range(30)]
    datasets[0] = DatasetSpec("tiny", 2, 1.0, max_epochs=9)
    datasets[1] = DatasetSpec("short", 2, 1.0)
    plan = Plan(spec(entry("en", *datasets, steps=600), alpha=None), allow_exhausted=True)
    summary = summarise(plan)
    short, whole = summary_text(summary, 100), summary_text(summary, 100, all_datasets=True)
    at = short.splitlines().index(next(line for line in short.splitlines() if "dataset" in line))
    assert [line.split()[:2] for line in short.splitlines()[at + 2 : at + 5]] == [
        ["en", "short"],
        ["tiny", "0.22%"],
        ["d29", "6.47%"],
    ]
    assert "… 10 more (--all)" in short
    assert "more (--all)" not in whole
    assert all(one.name in whole for one in datasets)
    assert "Muennighoff" in short
