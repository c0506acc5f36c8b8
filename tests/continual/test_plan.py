"""A plan's lengths, epochs and limits, at small and at huge sizes."""

import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from megatron_mer import _index
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import ConfigError


def make(
    *stream: EntrySpec, rows: int = 8, seq: int = 16, alpha: str | None = None, **more
) -> Plan:
    replay = None if alpha is None else ReplaySpec(Decimal(alpha), **more)
    return Plan(PlanSpec(1, rows, seq, replay, stream))


def entry(sizes: dict[str, int], steps: int | None = None, weights=None, **more) -> EntrySpec:
    weights = weights or [None] * len(sizes)
    pairs = zip(sizes.items(), weights, strict=True)
    datasets = tuple(DatasetSpec(name, size, weight) for (name, size), weight in pairs)
    return EntrySpec(more.pop("task", "t"), datasets, steps, **more)


def samples_of(plan: Plan, dataset: int) -> list[int]:
    """Fresh samples of a dataset in the order of their ordinals."""
    found = []
    for batch in range(plan.total_batches):
        rows = plan.rows(batch)
        wanted = (rows.kind == 0) & (rows.dataset == dataset)
        found += sorted(zip(rows.ordinal[wanted], rows.sample[wanted], strict=True))
    return [int(sample) for _, sample in found]


def problems_of(*stream: EntrySpec, **more) -> str:
    with pytest.raises(ConfigError) as error:
        make(*stream, **more)
    return str(error.value)


def test_every_epoch_holds_every_sample_once() -> None:
    sizes = {"a": 37, "b": 11, "c": 1}
    plan = make(entry(sizes, 49, max_epochs=8), alpha="0.25", include_current_task=True)
    for dataset, size in enumerate(sizes.values()):
        samples = samples_of(plan, dataset)
        epochs = [samples[start : start + size] for start in range(0, len(samples), size)]
        assert len(epochs) > 4
        for epoch in epochs[:-1]:
            assert sorted(epoch) == list(range(size))
        assert len(set(epochs[-1])) == len(epochs[-1])
        if size > 1:
            assert epochs[0] != epochs[1]


def test_without_weights_one_epoch_takes_all_of_the_data() -> None:
    sizes = {f"d{i}": 1 + i * i % 97 for i in range(50)}
    total = sum(sizes.values())
    plan = make(entry(sizes, total), rows=1)
    for dataset, size in enumerate(sizes.values()):
        assert sorted(samples_of(plan, dataset)) == list(range(size))
    assert problems_of(entry(sizes, total + 1), rows=1).count("\n") == 0  # one dataset, by one


def test_a_dataset_goes_on_where_an_earlier_entry_left_it() -> None:
    size = {"a": 100}
    plan = make(entry(size, 5), entry({"b": 40}, 5), entry({"b2": 9, **size}, 6, [1, 9]))
    samples = samples_of(plan, 0)
    assert len(samples) == 40 + 43
    assert len(set(samples)) == len(samples)
    ledger = plan.ledger(plan.total_batches)["datasets"]["a"]
    assert ledger == {"fresh": 83, "replayed": 0, "skipped": 0, "epochs": 0.83}


@pytest.mark.parametrize("weights", [[1, 1, 1], [1e-3, 1, 7], [5e-324, 1e308, 1e308]])
def test_weights_hold_at_every_moment(weights: list[float]) -> None:
    plan = make(entry({"a": 10**6, "b": 10**6, "c": 10**6}, 1000, weights), rows=1)
    shares = [float(Fraction(w) / sum(map(Fraction, weights))) for w in weights]
    counts = np.zeros(3)
    for batch in range(plan.total_batches):
        counts[plan.rows(batch).dataset[0]] += 1
        assert np.abs(counts - np.array(shares) * (batch + 1)).max() < 1.2


def test_shares_keep_their_precision_at_huge_counts() -> None:
    weights = [1e-9, 1.0, 3e-5]
    shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    counts = _index.WeightTree.from_weights(np.array(weights)).counts(2**50)
    assert all(abs(int(n) - share * 2**50) < 2 for n, share in zip(counts, shares, strict=True))
    sizes = np.array([2**61 - 12345, 1, 7**20, 2**60 + 1, 3**30], dtype=np.int64)
    tree = _index.WeightTree.from_sizes(sizes)
    assert tree.counts(int(sizes.sum())).tolist() == sizes.tolist()


def test_rows_of_a_batch_are_spread() -> None:
    base = entry({"base": 99}, trained_before=True)
    plan = make(base, entry({"a": 9999}, 100), rows=64, alpha="0.5")
    kinds = np.array([plan.rows(batch).kind for batch in range(100)])
    assert (kinds.sum(axis=1) == 32).all()
    assert np.abs(kinds.mean(axis=0) - 0.5).max() < 4 * 0.05
    halves = np.array([plan.rows(batch, 0, 32).kind.sum() for batch in range(100)])
    assert abs(halves.mean() - 16) < 1


@pytest.mark.parametrize(
    ("alpha", "batches"), [(None, 100), ("0", 100), ("0.25", 134), ("0.5", 200), ("0.999", 99_876)]
)
def test_fresh_tokens_are_kept_and_replay_makes_the_entry_longer(alpha, batches) -> None:
    base = entry({"base": 9}, trained_before=True)
    plan = make(base, entry({"a": 900}, fresh_tokens=100 * 8 * 16 - 15), alpha=alpha)
    assert plan.total_batches == batches
    assert plan.fresh_rows_before(batches) >= 800 > plan.fresh_rows_before(batches - 1)
    steps = make(base, entry({"a": 900}, 100), alpha=alpha)
    assert steps.total_batches == 100


def test_fresh_tokens_without_a_pool_are_not_stretched() -> None:
    plan = make(
        entry({"a": 900}, fresh_tokens=12800), entry({"b": 900}, fresh_tokens=1), alpha="0.5"
    )
    assert [one.last_batch - one.first_batch for one in plan.entries] == [100, 1]
    current = make(entry({"a": 900}, fresh_tokens=12800), alpha="0.5", include_current_task=True)
    assert current.total_batches == 199  # the first batch is all fresh


def test_entries_cover_the_batches() -> None:
    stream = (entry({"a": 99}, 3), entry({"b": 9}, trained_before=True), entry({"c": 99}, 4))
    plan = make(*stream)
    spans = [
        (one.index, one.first_batch, one.last_batch, one.trained_before) for one in plan.entries
    ]
    assert spans == [(0, 0, 3, False), (1, 3, 3, True), (2, 3, 7, False)]
    assert [plan.entry_of(batch).index for batch in range(7)] == [0, 0, 0, 2, 2, 2, 2]
    assert plan.datasets == ("a", "b", "c")
    for batch in (-1, 7):
        for ask in (plan.entry_of, plan.rows, plan.replay_rows, plan.mark_skipped):
            with pytest.raises(ValueError, match=f"{batch} .*7"):
                ask(batch)
    with pytest.raises(ValueError, match=r"8 batches .* 7"):
        plan.ledger(8)
    for start, stop in ((-1, 3), (3, 9), (5, 4), (0, 2**62)):
        with pytest.raises(ValueError, match="batch"):
            plan.rows(0, start, stop)
    assert len(plan.rows(0, 3, 3).kind) == 0


def test_data_that_does_not_last_is_refused_with_every_number() -> None:
    one = entry({"a": 50, "b": 60, "c": 999}, 15, [1, 1, 1], task="one")
    two = entry({"a": 50}, 2, task="two", max_epochs=1.1)
    text = problems_of(one, two)
    assert text == problems_of(two.__class__(**{**vars(one)}), two)
    lines = text.splitlines()
    assert len(lines) == 1
    assert "stream.1.train.0" in lines[0]
    assert "56 samples" in lines[0]
    assert "55" in lines[0]
    assert "max_epochs" in lines[0]
    longer = entry({"a": 50, "b": 60, "c": 999}, 30, [1, 1, 1])
    lines = problems_of(longer).splitlines()
    assert [line.split(":")[0] for line in lines] == ["stream.0.train.0", "stream.0.train.1"]
    make(entry({"a": 50, "b": 60, "c": 999}, 30, [1, 1, 1], max_epochs=1.6))


def test_max_epochs_is_taken_as_the_decimal_that_was_written() -> None:
    make(entry({"a": 100}, 29, max_epochs=0.29), rows=1)
    assert "30 samples" in problems_of(entry({"a": 100}, 30, max_epochs=0.29), rows=1)
    exempt = entry({"a": 100, "b": 1}, weights=[1, 1e6], trained_before=True, max_epochs=0.01)
    make(exempt, entry({"a": 100}, 100), rows=1)


def test_bad_values_come_back_together() -> None:
    bad = entry({"a": 0, "b": 5}, 3, [float("nan"), -1.0], max_epochs=0)
    text = problems_of(
        bad,
        entry({"b": 6}, 3, fresh_tokens=4),
        entry({"c": 6}, 3, trained_before=True),
        EntrySpec("t", (DatasetSpec("d", 5, 1.0), DatasetSpec("d", 5), DatasetSpec("e", 5)), 0),
        EntrySpec("t", (), 1),
        alpha="1",
        rows=0,
        seq=0,
        policy="none",
        source="disk",
    )
    for line in (
        "batch.global_batch_size: 0;",
        "model.seq_length: 0;",
        "replay.alpha: 1; allowed: 0 <= alpha < 1",
        "replay.source: disk;",
        "replay.policy: none;",
        "stream.0.train.0: dataset 'a' has 0 samples;",
        "stream.0.train.0.weight: nan;",
        "stream.0.train.1.weight: -1.0;",
        "stream.0.max_epochs: 0;",
        "stream.1: steps: 3, fresh_tokens: 4;",
        "stream.0.train.1: dataset 'b' has 5 samples here and 6 elsewhere",
        "stream.2: steps: 3; allowed: neither",
        "stream.3.steps: 0;",
        "stream.3.train: dataset 'd' 2 times;",
        "stream.3.train: 1 of 3 datasets with a weight;",
        "stream.4.train: no dataset;",
    ):
        assert line in text
    assert "stream: no entry trains a step" in problems_of(entry({"a": 5}, trained_before=True))
    for weight in (0.0, float("inf"), float("-inf")):
        assert "stream.0.train.0.weight" in problems_of(entry({"a": 5}, 1, [weight]))
    assert "18 decimal places" in problems_of(entry({"a": 5}, 1), alpha="0.1234567890123456789")
    assert "replay.alpha: NaN" in problems_of(entry({"a": 5}, 1), alpha="NaN")
    assert "2^62" in problems_of(entry({"a": 2**62}, 2**60))
    assert "2^62" in problems_of(entry({"a": 2**62, "b": 1}, 1))


def test_the_core_refuses_wrong_types_and_values() -> None:
    with pytest.raises(TypeError):
        _index.WeightTree.from_weights(np.ones(3, dtype=np.float32))
    with pytest.raises(TypeError):
        _index.WeightTree.from_sizes(np.ones(3, dtype=np.int32))
    with pytest.raises(ValueError, match="nan"):
        _index.WeightTree.from_weights(np.array([1.0, float("nan")]))
    with pytest.raises(ValueError, match="at least one"):
        _index.WeightTree.from_weights(np.array([]))
    with pytest.raises(TypeError):
        make(entry({"a": 99}, 3)).rows(1.0)


def core_plan(segment: dict | None = None, span: dict | None = None, **table):
    """One segment of three batches from one dataset, with some values changed."""
    table = {
        "dataset_keys": np.array([1], dtype=np.uint64),
        "dataset_sizes": np.array([9], dtype=np.int64),
        "buffer_capacities": np.array([], dtype=np.int64),
        "buffer_by_task": False,
        **table,
    }
    spans = {
        "position": 0,
        "task": 0,
        "datasets": np.array([0], dtype=np.int64),
        "weights": np.array([], dtype=np.float64),
        "batches": 3,
        "fresh_rows": 0,
        "trained_before": False,
        **(span or {}),
    }
    values = {
        "first_batch": 0,
        "global_batch_size": 4,
        "alpha_numerator": 0,
        "alpha_denominator": 1,
        "include_current_task": False,
        "task_weights": np.array([], dtype=np.float64),
        "from_buffer": False,
        "dropped": np.array([], dtype=np.int64),
        **(segment or {}),
    }
    plan = _index.Plan(seed=1, **table)
    plan.append(spans=[_index.SpanSpec(**spans)], **values)
    return plan


def test_the_core_refuses_plans_that_contradict_themselves() -> None:
    assert core_plan().total_batches == 3
    for changes, words in (
        ({"segment": {"alpha_numerator": 1}}, "1 / 1"),
        ({"segment": {"global_batch_size": -4}}, "-4"),
        ({"segment": {"first_batch": 1}}, "first batch must be 0 for the first.* not 1"),
        ({"segment": {"task_weights": np.array([1.0])}, "span": {"task": 1}}, "weights, not 1"),
        ({"dataset_keys": np.array([1, 2], dtype=np.uint64)}, "2 dataset keys"),
        ({"dataset_sizes": np.array([0], dtype=np.int64)}, "not 0"),
        ({"span": {"datasets": np.array([1], dtype=np.int64)}}, "not 1"),
        ({"span": {"fresh_rows": 1}}, "lengths"),
        ({"span": {"weights": np.ones(2)}}, "2 weights"),
    ):
        with pytest.raises(ValueError, match=words):
            core_plan(**changes)


def test_the_core_appends_segments_only_behind_what_was_skipped() -> None:
    def go_on(plan, first_batch):
        plan.append(
            first_batch=first_batch,
            global_batch_size=4,
            alpha_numerator=0,
            alpha_denominator=1,
            include_current_task=False,
            task_weights=np.array([], dtype=np.float64),
            from_buffer=False,
            dropped=np.array([], dtype=np.int64),
            spans=[],
        )

    plan = core_plan()
    plan.mark_skipped(1)
    for first_batch, words in ((1, "cannot follow skipped batch 1"), (4, "not 4")):
        with pytest.raises(ValueError, match=words):
            go_on(plan, first_batch)
    go_on(plan, 2)
    assert plan.total_batches == 2


def test_samples_and_ordinals_beyond_32_bits() -> None:
    size, rows = 2**33 + 12345, 2**20
    base = entry({"base": 2**34}, trained_before=True)
    plan = make(base, entry({"a": size}, 2**33 // rows), rows=rows, alpha="0.25")
    found = plan.rows(2**33 // rows - 1, 0, 5000)
    fresh = found.kind == 0
    assert found.sample.dtype == found.ordinal.dtype == np.int64
    assert (found.sample[fresh] > 2**32).mean() > 0.4
    assert found.sample[fresh].max() < size
    assert len(np.unique(found.sample)) > 4990
    assert found.ordinal[fresh].min() > 2**34 + 2**32
    assert (found.ordinal[~fresh] > 2**33).mean() > 0.4
    # Below a float32's 2^24, neighbouring samples would fall together, and low bits be even.
    assert 0.45 < (found.sample % 2).mean() < 0.55


def test_two_thousand_datasets_and_a_trillion_tokens_start_at_once() -> None:
    random = np.random.default_rng(0)
    sizes = {f"d{i}": int(size) for i, size in enumerate(random.integers(10**5, 10**6, 2000))}
    weights = (random.random(2000) ** 4 + 1e-6).tolist()
    tokens, seq, rows = 10**12, 2048, 4096
    begin = time.perf_counter()
    first = entry(sizes, weights=weights, fresh_tokens=tokens // 2, max_epochs=100)
    plan = make(
        first,
        entry(sizes, fresh_tokens=tokens // 2, max_epochs=100),
        rows=rows,
        seq=seq,
        alpha="0.25",
    )
    last = plan.rows(plan.total_batches - 1)
    assert time.perf_counter() - begin < 3
    assert plan.fresh_rows_before(plan.total_batches) * seq >= tokens
    assert plan.total_batches == 59605 + 79473
    total = plan.fresh_rows_before(plan.entries[0].last_batch)
    ledger = _index.WeightTree.from_weights(np.array(weights)).counts(total)
    assert ledger.sum() == total
    assert np.abs(ledger - np.array(weights) / sum(weights) * total).max() < 2
    assert (last.sample < np.array(list(sizes.values()))[last.dataset]).all()
    fresh = last.kind == 0
    assert (
        len(set(zip(last.dataset[fresh], last.sample[fresh], strict=True))) == fresh.sum() == 3072
    )


def test_threads_may_ask_while_batches_are_marked() -> None:
    base = entry({"base": 50}, trained_before=True)
    stream = (base, entry({"a": 99, "b": 50}, 400, max_epochs=99))
    plan = make(*stream, alpha="0.25", include_current_task=True)
    alone = make(*stream, alpha="0.25", include_current_task=True)
    for batch in range(0, 400, 3):
        alone.mark_skipped(batch)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for batch in range(400):
                rows = plan.rows(batch)
                assert rows.kind.sum() == plan.replay_rows(batch)
                plan.ledger(batch)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for batch in range(0, 400, 3):
        plan.mark_skipped(batch)
    for thread in threads:
        thread.join()
    assert not failures
    assert plan.ledger(400) == alone.ledger(400)
    assert all(np.array_equal(plan.rows(b).ordinal, alone.rows(b).ordinal) for b in range(400))
