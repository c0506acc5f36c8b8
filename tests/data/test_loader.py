"""The loader against a plan that is written out by hand."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_mer.data.batches import RankBatch
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.loader import TrainLoader
from megatron_mer.errors import DataError, TrainingError

SEQ_LENGTH = 8
VOCAB_SIZE = 1000
NUM_ROWS = 12


@dataclass
class FakePlan:
    """Rows drawn at random by batch number; skipped batches change those after them."""

    sizes: dict[str, int]
    total_batches: int = 6
    skipped: list[int] = field(default_factory=list)
    fails_at: int | None = None
    error: BaseException = field(default_factory=lambda: ValueError("no such ordinal"))
    drawn: list[int] = field(default_factory=list)
    places: list[tuple[int, int | None]] = field(default_factory=list)
    batch_sizes: dict[int, int] = field(default_factory=dict)
    gone: str | None = None

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def datasets_from(self, batch: int) -> list[str]:
        return [name for name in self.sizes if name != self.gone]

    def rows(self, batch: int, start: int = 0, stop: int | None = None) -> SimpleNamespace:
        self.drawn.append(batch)
        self.places.append((start, stop))
        if batch == self.fails_at:
            raise self.error
        generator = np.random.default_rng([batch, len(self.skipped)])
        size = self.global_batch_size(batch)
        dataset = generator.integers(0, len(self.sizes), size).astype(np.int32)
        limits = np.array(list(self.sizes.values()))[dataset]
        piece = slice(start, stop)
        return SimpleNamespace(
            kind=generator.integers(0, 2, size).astype(np.uint8)[piece],
            dataset=dataset[piece],
            sample=generator.integers(0, limits)[piece],
        )

    def global_batch_size(self, batch: int) -> int:
        return self.batch_sizes.get(batch, NUM_ROWS)

    def mark_skipped(self, batch: int) -> None:
        self.skipped.append(batch)


@pytest.fixture
def datasets(tmp_path: Path) -> dict[str, IndexedDataset]:
    generator = np.random.default_rng(0)
    opened = {}
    for name, dtype in (("en", np.uint16), ("fr", np.int32)):
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            for length in generator.integers(1, 20, 30):
                writer.add_document(generator.integers(0, VOCAB_SIZE, length))
            writer.finalize()
        opened[name] = IndexedDataset(tmp_path / name)
    return opened


@pytest.fixture
def plan(datasets: dict[str, IndexedDataset]) -> FakePlan:
    return FakePlan({name: (d.num_tokens - 1) // SEQ_LENGTH for name, d in datasets.items()})


def load(plan: FakePlan, datasets: dict[str, IndexedDataset], **changes: object) -> TrainLoader:
    settings: dict[str, object] = {
        "seq_length": SEQ_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "dp_rank": 0,
        "dp_size": 1,
        "micro_batch_size": 4,
    }
    return TrainLoader(plan, datasets, **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "data-loader":
            thread.join(0.2)
            assert not thread.is_alive()


def joined(batches: list[RankBatch], name: str) -> np.ndarray:
    return np.concatenate([getattr(m, name) for b in batches for m in b.micro_batches])


def test_rows_come_from_the_plan(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    with load(plan, datasets) as loader:
        batches = list(loader)
    assert [batch.batch for batch in batches] == list(range(6))
    for batch in batches:
        rows = plan.rows(batch.batch)
        tokens = np.hstack((joined([batch], "inputs"), joined([batch], "targets")[:, -1:]))
        for row in range(NUM_ROWS):
            source = datasets[plan.datasets[rows.dataset[row]]]
            start = int(rows.sample[row]) * SEQ_LENGTH
            np.testing.assert_array_equal(tokens[row], source.tokens(start, start + SEQ_LENGTH + 1))
        np.testing.assert_array_equal(joined([batch], "is_replay"), rows.kind == 1)
        assert batch.num_unmasked == NUM_ROWS * SEQ_LENGTH
        assert joined([batch], "mask").all()
        first = batch.micro_batches[0]
        assert (first.inputs.dtype, first.targets.dtype) == (np.int64, np.int64)
        assert (first.mask.dtype, first.is_replay.dtype) == (np.float32, np.bool_)
        assert first.inputs.shape == first.targets.shape == first.mask.shape == (4, SEQ_LENGTH)
        np.testing.assert_array_equal(first.inputs[:, 1:], first.targets[:, :-1])


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 6), (2, 3), (3, 4), (4, 1), (12, 1)])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_every_layout_gets_the_same_global_batches(
    plan: FakePlan,
    datasets: dict[str, IndexedDataset],
    dp_size: int,
    micro: int,
    eod_mask_loss: bool,
) -> None:
    with load(plan, datasets, micro_batch_size=12, eod_mask_loss=eod_mask_loss) as loader:
        whole = list(loader)
    ranks = []
    for rank in range(dp_size):
        layout = {"dp_rank": rank, "dp_size": dp_size, "micro_batch_size": micro}
        with load(plan, datasets, eod_mask_loss=eod_mask_loss, **layout) as loader:
            ranks.append(list(loader))
    for number, expected in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        for name in ("inputs", "targets", "mask", "is_replay"):
            np.testing.assert_array_equal(joined(parts, name), joined([expected], name))
        for part in parts:
            assert len(part.micro_batches) == NUM_ROWS // dp_size // micro
            assert part.num_unmasked == expected.num_unmasked


def test_a_rank_draws_no_rows_but_its_own_unless_masks_need_them(
    plan: FakePlan, datasets: dict[str, IndexedDataset]
) -> None:
    for eod_mask_loss, places in ((False, (6, 9)), (True, (0, NUM_ROWS))):
        plan.places.clear()
        layout = {"dp_rank": 2, "dp_size": 4, "micro_batch_size": 3}
        with load(plan, datasets, eod_mask_loss=eod_mask_loss, **layout) as loader:
            list(loader)
        assert plan.places == [places] * 6


@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_batch_sizes_may_change_from_batch_to_batch(
    plan: FakePlan, datasets: dict[str, IndexedDataset], eod_mask_loss: bool
) -> None:
    plan.batch_sizes = {2: 4, 3: 24}
    ranks = []
    for rank in range(2):
        layout = {"dp_rank": rank, "dp_size": 2, "micro_batch_size": 2}
        with load(plan, datasets, eod_mask_loss=eod_mask_loss, **layout) as loader:
            ranks.append(list(loader))
    for number, size in enumerate([12, 12, 4, 24, 12, 12]):
        parts = [rank[number] for rank in ranks]
        assert [len(part.micro_batches) for part in parts] == [size // 4] * 2
        assert len(joined(parts, "inputs")) == size
        assert {part.num_unmasked for part in parts} == {int(joined(parts, "mask").sum())}
        rows = plan.rows(number)
        firsts = [
            datasets[plan.datasets[d]].tokens(s * SEQ_LENGTH, s * SEQ_LENGTH + 1)[0]
            for d, s in zip(rows.dataset.tolist(), rows.sample.tolist(), strict=True)
        ]
        assert joined(parts, "inputs")[:, 0].tolist() == firsts


def test_micro_batches_share_memory(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    with load(plan, datasets) as loader:
        first, second = next(loader).micro_batches[:2]
        later = next(loader).micro_batches[0]
    assert np.shares_memory(first.inputs, first.targets)
    assert first.inputs.base is second.inputs.base
    assert not np.shares_memory(first.inputs, later.inputs)
    assert np.shares_memory(first.mask, later.mask)


def test_masks_leave_out_the_first_token_of_each_document(
    plan: FakePlan, datasets: dict[str, IndexedDataset]
) -> None:
    lasts = {}
    for name, dataset in datasets.items():
        lengths = [len(dataset.document(i)) for i in range(dataset.num_documents)]
        lasts[name] = np.isin(np.arange(dataset.num_tokens), np.cumsum(lengths) - 1)
    with load(plan, datasets, eod_mask_loss=True) as loader:
        batches = list(loader)
    for batch in batches:
        rows, mask = plan.rows(batch.batch), joined([batch], "mask")
        for row in range(NUM_ROWS):
            start = int(rows.sample[row]) * SEQ_LENGTH
            ends = lasts[plan.datasets[rows.dataset[row]]][start : start + SEQ_LENGTH]
            np.testing.assert_array_equal(mask[row], 1.0 - ends)
        assert 0 < batch.num_unmasked < NUM_ROWS * SEQ_LENGTH
        assert batch.num_unmasked == int(mask.sum())


def test_begins_at_any_batch(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    with load(plan, datasets) as loader:
        whole = list(loader)
    with load(plan, datasets, first_batch=4) as loader:
        rest = list(loader)
    assert [batch.batch for batch in rest] == [4, 5]
    np.testing.assert_array_equal(joined(rest, "inputs"), joined(whole[4:], "inputs"))


def test_reads_no_further_ahead_than_asked(
    plan: FakePlan, datasets: dict[str, IndexedDataset]
) -> None:
    with load(plan, datasets, prefetch=2) as loader:
        next(loader)
        time.sleep(0.1)
        assert plan.drawn == [0, 1, 2]


def test_a_skipped_batch_changes_those_read_ahead(
    plan: FakePlan, datasets: dict[str, IndexedDataset]
) -> None:
    with load(plan, datasets, prefetch=3) as loader:
        before = [next(loader), next(loader)]
        loader.skip(1)
        after = list(loader)
    assert plan.skipped == [1]
    assert [batch.batch for batch in before + after] == list(range(6))
    with load(plan, datasets, first_batch=2) as loader:  # the plan knows of the skip from the start
        np.testing.assert_array_equal(joined(after, "inputs"), joined(list(loader), "inputs"))


def test_only_the_last_batch_can_be_skipped(
    plan: FakePlan, datasets: dict[str, IndexedDataset]
) -> None:
    with load(plan, datasets) as loader:
        next(loader)
        for batch in (-1, 1):
            with pytest.raises(TrainingError, match="the last one delivered is 0"):
                loader.skip(batch)
    assert plan.skipped == []


def test_a_failure_of_the_thread_fails_the_caller_with_its_cause(
    plan: FakePlan, datasets: dict[str, IndexedDataset]
) -> None:
    plan.fails_at = 2
    with load(plan, datasets) as loader:
        assert [next(loader).batch, next(loader).batch] == [0, 1]
        for _ in range(2):
            message = "reading batch 2 failed: ValueError: no such ordinal"
            with pytest.raises(TrainingError, match=message) as caught:
                next(loader)
            assert caught.value.__cause__ is plan.error


def test_a_data_error_stays_one(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    with load(plan, datasets, vocab_size=10) as loader:
        message = r"reading batch 0 failed: .*sample \d+ holds token id \d+"
        with pytest.raises(DataError, match=message):
            next(loader)


def test_rows_that_do_not_divide(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    message = "12 rows cannot be cut into 3 ranks of micro batches"
    with (
        load(plan, datasets, dp_size=3, micro_batch_size=3) as loader,
        pytest.raises(DataError, match=message),
    ):
        next(loader)


def test_a_dataset_that_is_not_open(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    with pytest.raises(DataError, match="not open: fr"):
        load(plan, {"en": datasets["en"]})


def test_close_is_quick_and_final(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    plan.total_batches = 10**9
    loader = load(plan, datasets)
    next(loader)
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 1
    with pytest.raises(TrainingError, match="closed"):
        next(loader)


def test_an_ended_run_stays_ended(plan: FakePlan, datasets: dict[str, IndexedDataset]) -> None:
    with load(plan, datasets, first_batch=6) as loader:
        assert list(loader) == []
        assert list(loader) == []
