"""What other data orders fail at: many datasets, odd weights, huge counts, the very last sample.

Each test names the fault that it is about; they were found in other training frameworks' builders.
"""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from megatron_mer import _index
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.errors import ConfigError


def entry(
    *sizes: int, steps: int | None = None, weights=None, name: str = "d", **more
) -> EntrySpec:
    weights = weights or [None] * len(sizes)
    pairs = enumerate(zip(sizes, weights, strict=True))
    datasets = tuple(DatasetSpec(f"{name}{i}", size, weight) for i, (size, weight) in pairs)
    return EntrySpec(more.pop("task", name), datasets, steps, **more)


def make(*stream: EntrySpec, rows: int = 1, alpha: str | None = None, seq: int = 8, **more) -> Plan:
    replay = None if alpha is None else ReplaySpec(Decimal(alpha), **more)
    return Plan(PlanSpec(2**64 - 1, rows, seq, replay, stream))


def problems(*stream: EntrySpec, **more) -> list[str]:
    with pytest.raises(ConfigError) as error:
        make(*stream, **more)
    return str(error.value).splitlines()


def test_forty_thousand_datasets_of_a_task_keep_their_numbers() -> None:
    """Dataset numbers of 16 bits wrap at 32,768."""
    count = 40_000
    plan = make(entry(*[1] * count, steps=40), entry(*[1000] * 5, steps=5, name="e"), rows=1000)
    rows = [plan.rows(batch) for batch in range(40)]
    numbers = np.concatenate([one.dataset for one in rows])
    assert sorted(numbers.tolist()) == list(range(count))
    assert len(plan.datasets) == count + 5
    ledger = plan.ledger(40)["datasets"]
    assert all(ledger[f"d{i}"]["fresh"] == 1 for i in (0, 254, 255, 32_767, 32_768, count - 1))


def test_a_million_datasets_are_apportioned() -> None:
    """An index with a counter a dataset on the stack ends in a segmentation fault."""
    count = 1_200_000
    tree = _index.WeightTree.from_weights(np.ones(count))
    counts = tree.counts(3 * count)
    assert counts.sum() == 3 * count
    assert counts.min() >= 2
    assert counts.max() <= 4
    last, ordinal = tree.locate(3 * count - 1)
    assert tree.count(last, 3 * count) == ordinal + 1
    sizes = np.arange(1, count + 1, dtype=np.int64)
    tree = _index.WeightTree.from_sizes(sizes)
    assert np.array_equal(tree.counts(int(sizes.sum())), sizes)


@pytest.mark.slow
def test_a_plan_of_a_million_datasets() -> None:
    count = 1_200_000
    plan = make(entry(*[5] * count, steps=1200, weights=[1.0] * count), rows=1000, alpha="0")
    numbers = np.concatenate([plan.rows(batch).dataset for batch in range(1200)])
    assert np.bincount(numbers, minlength=count).max() <= 2
    assert len(np.unique(numbers)) > count / 2


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, -0.0])
def test_a_weight_that_is_none_is_named(weight: float) -> None:
    """With a weight of NaN, dataset 0 gets everything."""
    lines = problems(entry(9, 9, 9, steps=1, weights=[1.0, weight, weight]))
    assert len(lines) == 2
    for place, line in zip((1, 2), lines, strict=True):
        assert line.startswith(f"stream.0.train.{place}.weight: {weight}; allowed: a finite number")
    array = np.array([1.0, weight])
    with pytest.raises(ValueError, match=str(abs(weight)).replace(".", r"\.")):
        _index.WeightTree.from_weights(array)


@pytest.mark.parametrize(
    "weights",
    [
        [1e-300, 1e300, 1e300, 1.0],
        [5e-324, 5e-324, 1e-323, 5e-324],
        [1.7e308, 1.7e308, 1.7e308, 1.7e308],
        [2.0**-1074, 2.0**1023, 2.0**-1074, 1.0],
        [1 / 3, 1 / 3, 1 / 3, 1e-17],
    ],
)
def test_extreme_weights_keep_their_shares(weights: list[float]) -> None:
    """Sums that overflow, or shares that round to 0, end in an index out of range."""
    plan = make(entry(*[10**6] * 4, steps=3000, weights=weights))
    total = sum(map(Fraction, weights))
    counts = np.zeros(4)
    for batch in range(plan.total_batches):
        counts[plan.rows(batch).dataset[0]] += 1
        shares = [float(Fraction(weight) / total * (batch + 1)) for weight in weights]
        assert np.abs(counts - shares).max() < 2
    tree = _index.WeightTree.from_weights(np.array(weights))
    assert tree.counts(2**62).sum() == 2**62


def test_no_row_is_lost_to_single_precision() -> None:
    """2,048,000,002 tokens of 2,048 a row take 1,000,001 rows, in single precision one less."""
    plan = make(entry(2_000_000, fresh_tokens=2_048_000_002), seq=2048)
    assert plan.total_batches == plan.fresh_rows_before(1_000_001) == 1_000_001
    assert make(entry(2_000_000, fresh_tokens=2_048_000_000), seq=2048).total_batches == 1_000_000
    # Nor to double precision, beyond 2^53.
    tokens = 2**60 + 1
    assert make(entry(2**61, fresh_tokens=tokens), seq=1).total_batches == tokens
    assert make(entry(2**61, fresh_tokens=tokens), seq=2**7).total_batches == 2**53 + 1


@pytest.mark.parametrize("size", [2**31 + 11, 2**33 + 1, 2**40 + 7])
def test_samples_beyond_32_bits_are_all_reached(size: int) -> None:
    """The last rows of an epoch and the first of the next, in mid-run and after a change."""
    rows = 4096
    steps = size // rows + 2
    plan = make(entry(size, steps=steps, max_epochs=2), rows=rows)
    before = Plan.continued(
        plan.history(),
        PlanSpec(2**64 - 1, 64, 8, None, (entry(size, steps=steps + 100, max_epochs=2),)),
        steps - 3,
    )
    last = [plan.rows(batch) for batch in range(steps - 3, steps)]
    samples = np.concatenate([one.sample[np.argsort(one.ordinal)] for one in last])
    first = (steps - 3) * rows
    epoch = samples[: size - first]  # what of it lies in the first epoch
    assert len(np.unique(epoch)) == len(epoch) == size - first
    assert epoch.max() < size
    assert epoch.max() > size - size // 100
    assert (epoch > size // 2).mean() == pytest.approx(0.5, abs=0.05)
    again = [before.rows(batch) for batch in range(steps - 3, steps + 97)]
    found = np.concatenate([one.sample[np.argsort(one.ordinal)] for one in again])
    assert np.array_equal(found, samples[: len(found)])


def test_data_that_just_lasts_and_data_that_falls_one_short() -> None:
    """Decided before batch 0, exactly."""
    for size, steps in ((7, 7), (2**31 + 1, 2**31 + 1), (2**53 + 1, 2**53 + 1)):
        make(entry(size, steps=steps))
        [line] = problems(entry(size, steps=steps + 1))
        assert line.startswith("stream.0.train.0: ")
        assert f"{steps + 1} samples" in line
        assert f"allowed: {size}," in line
    make(entry(70, steps=30, max_epochs=3), rows=7)
    assert "211 samples" in problems(entry(70, steps=211, max_epochs=3))[0]
    make(entry(100, fresh_tokens=800))
    assert "101 samples" in problems(entry(100, fresh_tokens=801))[0]
    make(entry(1000, steps=1429, max_epochs=1.429))
    assert "allowed: 1428," in problems(entry(1000, steps=1429, max_epochs=1.4289))[0]


def test_a_dataset_may_have_a_limit_of_its_own() -> None:
    long = DatasetSpec("long", 100, max_epochs=2.5)
    short = DatasetSpec("short", 100)
    data = (long, short)
    make(EntrySpec("t", data, steps=20), rows=10)  # 100 of each
    [line] = problems(EntrySpec("t", data, steps=21), rows=10)
    assert line.startswith("stream.0.train.1: ")
    make(EntrySpec("t", data, steps=21, max_epochs=1.05), rows=10)
    make(EntrySpec("t", data, steps=50, max_epochs=2.5), rows=10)
    lines = problems(EntrySpec("t", data, steps=51, max_epochs=1.05), rows=10)
    assert ["allowed: 250," in lines[0], "allowed: 105," in lines[1]] == [True, True]
    strict = (DatasetSpec("long", 100, max_epochs=0.5), short)
    [line] = problems(EntrySpec("t", strict, steps=20, max_epochs=9), rows=10)
    assert "allowed: 50," in line
    for bad in (0, -1, float("nan"), float("inf")):
        given = EntrySpec("t", (DatasetSpec("d", 9, max_epochs=bad),), steps=1)
        assert problems(given)[0].startswith(f"stream.0.train.0.max_epochs: {bad}; allowed: ")


def test_after_a_change_the_limit_is_still_exact() -> None:
    spec = PlanSpec(1, 8, 1, None, (entry(80, steps=10),))
    history = Plan(spec).history()

    def going_on(steps: int, rows: int) -> Plan:
        return Plan.continued(history, PlanSpec(1, rows, 1, None, (entry(80, steps=steps),)), 4)

    assert going_on(10, 8).total_batches == 10
    assert going_on(7, 16).fresh_rows_before(7) == 80
    assert going_on(52, 1).fresh_rows_before(52) == 80
    with pytest.raises(ConfigError, match=r"stream\.0\.train\.0: .* 81 samples .* 80,"):
        going_on(53, 1)
    more = (entry(80, steps=10), entry(80, steps=1, task="again"))
    with pytest.raises(ConfigError, match=r"stream\.1\.train\.0: .* 88 samples .* 80,"):
        Plan.extended(history, PlanSpec(1, 8, 1, None, more))
    listed = Plan(PlanSpec(1, 8, 1, None, more), allow_exhausted=True)
    assert [one.path for one in listed.exhausted] == ["stream.1.train.0"]
    assert Plan(spec).exhausted == []


def test_a_batch_of_a_million_rows() -> None:
    rows = 2**20
    base = entry(999, name="base", trained_before=True)
    plan = make(base, entry(rows, rows, steps=2), rows=rows, alpha="0.29", policy="equal")
    found = plan.rows(1)
    replayed = int(Fraction("0.29") * 2 * rows) - int(Fraction("0.29") * rows)
    assert found.kind.sum() == replayed == plan.replay_rows(1)
    fresh = found.kind == 0
    begin = 999 + plan.fresh_rows_before(1)
    assert sorted(found.ordinal[fresh].tolist()) == list(range(begin, begin + rows - replayed))
    pairs = found.dataset[fresh].astype(np.int64) * rows + found.sample[fresh]
    assert len(np.unique(pairs)) == rows - replayed
    for start in (0, rows // 2 - 1, rows - 5):
        part = plan.rows(1, start, start + 5)
        assert np.array_equal(part.ordinal, found.ordinal[start : start + 5])


@pytest.mark.parametrize("policy", ["uniform", "equal"])
def test_a_run_of_a_trillion_steps(policy: str) -> None:
    """Rows far out cost what the first ones do, and stay exact."""
    steps, rows = 2**40, 2**18
    base = entry(77, name="base", trained_before=True)
    long = entry(2**59, 2**59, steps=steps, weights=[1.0, 1e-9])
    past = entry(2**22, steps=10, name="past")
    plan = make(base, past, long, rows=rows, alpha="0.333", policy=policy)
    total = steps + 10
    assert plan.total_batches == total
    shares = [int(Fraction("0.333") * rows * count) for count in (10, steps - 1, steps)]
    assert plan.fresh_rows_before(total) == total * rows - shares[0] - shares[2]
    assert plan.replay_rows(total - 1) == shares[2] - shares[1]
    last = plan.rows(total - 1, 0, 999)
    fresh = last.kind == 0
    assert last.ordinal.max() < 77 + plan.fresh_rows_before(total)
    assert last.ordinal[fresh].min() >= 77 + plan.fresh_rows_before(total - 1)
    assert last.sample[fresh].max() > 2**57
    assert (last.ordinal[~fresh] < 77 + plan.fresh_rows_before(10)).all()
    again = Plan.from_history(plan.history())
    assert np.array_equal(again.rows(total - 1, 0, 999).sample, last.sample)


def test_more_than_64_bits_count_is_refused_by_name() -> None:
    pool = [entry(2**61, name=f"b{i}", trained_before=True) for i in range(2)]
    for stream, rows in (
        ([entry(2**62, steps=2**62, max_epochs=4)], 2),
        ([entry(2**62, steps=2**61, max_epochs=4)] * 3, 1),
        ([entry(2**62, 1, steps=1, weights=None)], 1),
        ([entry(9, fresh_tokens=2**62, max_epochs=1e30)], 3 * 2**60),
        ([*pool, entry(9, steps=9)], 1),
        ([entry(9, steps=3), entry(9, fresh_tokens=2**62, max_epochs=1e30, name="e")], 1),
    ):
        [line] = problems(
            *stream, rows=rows, seq=1, alpha="0.9" if stream[-1].task == "e" else None
        )
        assert line.startswith("stream: ")
        assert "2^62" in line
    assert "9223372036854775808" in problems(entry(9, steps=2**63))[0]
    assert problems(entry(2**62 + 1, steps=9))[0].startswith(
        "stream.0.train.0: dataset 'd0' has 46"
    )
    for rows in (2**62 + 1, 2**63):
        assert str(rows) in problems(entry(9, steps=1), rows=rows)[0]
    most = make(entry(2**62, steps=2**62))
    assert int(most.rows(2**62 - 1).sample[0]) < 2**62
    spec = PlanSpec(2**64 - 1, 2, 8, None, (entry(2**62, steps=2**62, max_epochs=4),))
    with pytest.raises(ConfigError, match=r"2\^62"):
        Plan.continued(most.history(), spec, 2**61)
