"""Samples a second in one process: our loader, megatron-core's datasets, and a plain copy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.parts.corpora import U16, VOCAB, random_dataset
from benchmarks.parts.measure import Row, Sample, Work, interleaved, timed
from benchmarks.parts.peer import Peer
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.data.indexed_dataset import IndexedDataset
from megatron_mer.data.loader import TrainLoader
from megatron_mer.data.packing import num_samples

SEQ = 2048
DATASETS = 3
TOKENS = 34_000_000
"""Tokens of each dataset: 68 MB, so that three are far larger than a processor's caches."""
MEAN_DOCUMENT, LONG_DOCUMENT = 500, 4000
"""Mean tokens of a document. megatron-core gathers a sample from all documents that it touches."""
BATCH = 512
BATCHES = 24
MICRO = 8
PEER_SAMPLES = 2048
SPEEDUP = 8.0
TRAINING_ROWS = 4096
TRAINING_BATCHES = 2
TRAINING_LIMIT = 30.0
"""Microseconds a row."""


@dataclass(frozen=True)
class Corpora:
    """Datasets of random ids, in the page cache."""

    prefixes: tuple[Path, ...]
    """Those of the blend."""
    long: Path
    """One of long documents."""

    @classmethod
    def make(cls, folder: Path) -> Corpora:
        """Write them."""
        prefixes = tuple(folder / f"corpus{i}" for i in range(DATASETS))
        for seed, prefix in enumerate(prefixes):
            random_dataset(prefix, TOKENS, MEAN_DOCUMENT, seed)
        random_dataset(folder / "long", TOKENS, LONG_DOCUMENT, DATASETS)
        return cls(prefixes, folder / "long")


def opened(*prefixes: Path) -> dict[str, IndexedDataset]:
    """Open datasets with our reader."""
    return {prefix.name: IndexedDataset(prefix) for prefix in prefixes}


def entry(task: str, datasets: Mapping[str, IndexedDataset], steps: int) -> EntrySpec:
    """A task over some datasets, in shares 1 : 2 : 3."""
    specs = tuple(
        DatasetSpec(name, num_samples(one.num_tokens, SEQ, name), weight=1.0 + place)
        for place, (name, one) in enumerate(datasets.items())
    )
    return EntrySpec(task, specs, steps=steps, max_epochs=100.0)


def measure(corpora: Corpora, peer: Peer | None, repetitions: int) -> list[Row]:
    """Samples a second over one dataset and over a blend, and the limits of a plain copy."""
    datasets, first = opened(*corpora.prefixes), opened(corpora.prefixes[0])
    long = opened(corpora.long)
    works: dict[str, Work] = {
        "one": lambda at: _loader_seconds(first, at),
        "long": lambda at: _loader_seconds(long, at),
        "blend": lambda at: _loader_seconds(datasets, at),
        "masks": lambda at: _loader_seconds(datasets, at, masks=True),
        "copied": lambda at: _loader_seconds(first, at, copied=True),
        "one core": lambda at: _on_one_core(lambda: _loader_seconds(first, at)),
        **_copies(corpora.prefixes[0]),
    }
    if peer is not None:
        works.update(_peer_works(peer, corpora))
    rates = {
        name: one.rate(PEER_SAMPLES if name.startswith("peer") else BATCH * BATCHES)
        for name, one in interleaved(works, repetitions).items()
    }
    return _rows(rates)


def _rows(rates: Mapping[str, Sample]) -> list[Row]:
    note = f"batches of {BATCH}, micro batches of {MICRO}, as tensors"
    one = f"loader, seq {SEQ}, one dataset, documents of"
    rows = [
        _beside(rates, f"{one} {MEAN_DOCUMENT} tokens", "one", "peer one", SPEEDUP, note),
        _beside(rates, f"loader, a blend of {DATASETS}", "blend", "peer blend", SPEEDUP, note),
        _beside(rates, f"{one} {LONG_DOCUMENT:,} tokens", "long", "peer long"),
        _beside(rates, "the one dataset, each array copied too", "copied", "peer one"),
        _beside(rates, "the blend; megatron-core's collated too", "blend", "peer collated"),
        _beside(rates, "the blend with eod_mask_loss", "masks"),
        _beside(rates, "the one dataset, on one core", "one core", "peer one"),
    ]
    for name, what in COPIES.items():
        share = rates["one"].median / rates[name].median
        rows.append(_beside(rates, what, name, note=f"the loader reaches {share:.0%} of it"))
    return rows


def _beside(
    rates: Mapping[str, Sample],
    what: str,
    name: str,
    peer_name: str = "",
    wanted: float | None = None,
    note: str = "",
) -> Row:
    """A line: our rate, the peer's, how many times it is and has to be."""
    ours, peer = rates[name], rates.get(peer_name)
    if peer is None:
        return Row(what, "samples/s", ours, note=note)
    times = f"{ours.median / peer.median:.1f} times"
    limit = None if wanted is None else wanted * peer.median
    return Row(what, "samples/s", ours, limit, True, peer, "; ".join(filter(None, (times, note))))


def _loader_seconds(
    datasets: Mapping[str, IndexedDataset],
    repetition: int,
    masks: bool = False,
    copied: bool = False,
) -> float:
    """Seconds for a whole short run of a loader, its start included; each time another order."""
    plan = Plan(PlanSpec(repetition, BATCH, SEQ, None, (entry("task", datasets, BATCHES),)))
    start = time.perf_counter()
    _take_all(plan, datasets, masks, copied)
    return time.perf_counter() - start


def _on_one_core(work: Callable[[], float]) -> float:
    """Run something where its thread and ours have to share a core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return work()
    finally:
        os.sched_setaffinity(0, cores)


def _take_all(
    plan: Plan,
    datasets: Mapping[str, IndexedDataset],
    masks: bool,
    copied: bool = False,
    dp: tuple[int, int] = (0, 1),
) -> None:
    """Take every batch of a plan; to the end, so that nothing is read ahead outside of the time.

    Arrays become tensors as in the engine, or with `copied` each a contiguous one of its own.
    """
    import torch

    with TrainLoader(plan, datasets, SEQ, VOCAB, *dp, MICRO, eod_mask_loss=masks) as loader:
        for batch in loader:
            for micro in batch.micro_batches:
                for array in (micro.inputs, micro.targets, micro.mask, micro.is_replay):
                    torch.tensor(array) if copied else torch.from_numpy(array)


def _peer_works(peer: Peer, corpora: Corpora) -> dict[str, Work]:
    parts = [peer.gpt(prefix, SEQ) for prefix in corpora.prefixes]
    long = peer.gpt(corpora.long, SEQ)
    shares = [1.0 + place for place in range(len(parts))]
    most = int(
        min(len(one) * sum(shares) / share for one, share in zip(parts, shares, strict=True))
    )
    blend = peer.blended(parts, shares, most - 100)

    def work(dataset: Any, take: Callable[[Any, range], Any]) -> Work:
        def seconds(repetition: int) -> float:
            """The next samples of the (shuffled) order, round and round."""
            first = repetition * PEER_SAMPLES % (len(dataset) - PEER_SAMPLES)
            return timed(lambda: take(dataset, range(first, first + PEER_SAMPLES)))

        return seconds

    return {
        "peer one": work(parts[0], _take_items),
        "peer blend": work(blend, _take_items),
        "peer long": work(long, _take_items),
        "peer collated": work(blend, _take_collated),
    }


def _take_items(dataset: Any, wanted: range) -> None:
    for index in wanted:
        dataset[index]


def _take_collated(dataset: Any, wanted: range) -> None:
    """Put into micro batches, as torch's DataLoader without worker processes does."""
    from torch.utils.data import default_collate

    for first in range(wanted.start, wanted.stop, MICRO):
        default_collate([dataset[index] for index in range(first, first + MICRO)])


COPIES = {
    "copy each": "raw copy: one NumPy copy a row out of a memory map, uint16",
    "copy all": "raw copy: one NumPy gather of all rows of a batch, uint16",
    "widen all": "raw copy: the same gather, widened to int64 (what a loader has to give)",
}


def _copies(prefix: Path) -> dict[str, Work]:
    tokens = np.memmap(f"{prefix}.bin", dtype=U16, mode="r")
    count = num_samples(len(tokens), SEQ, str(prefix))
    rows = np.lib.stride_tricks.as_strided(tokens, (count, SEQ + 1), (SEQ * 2, 2))
    narrow = np.empty((BATCH, SEQ + 1), dtype=np.uint16)

    def copy_each(places: NDArray[np.int64]) -> None:
        for row, place in enumerate(places.tolist()):
            np.copyto(narrow[row], tokens[place * SEQ : place * SEQ + SEQ + 1])

    def work(copy: Callable[[NDArray[np.int64]], Any]) -> Work:
        def seconds(repetition: int) -> float:
            order = np.random.default_rng(repetition).permutation(count)[: BATCH * BATCHES]
            return timed(lambda: [copy(places) and None for places in np.split(order, BATCHES)])

        return seconds

    return {
        "copy each": work(copy_each),
        "copy all": work(lambda places: rows[places] is None),
        "widen all": work(lambda places: rows[places].astype(np.int64) is None),
    }


def measure_training_path(corpora: Corpora, repetitions: int) -> list[Row]:
    """Microseconds a row of a rank's batch, plan and loader together."""
    datasets = opened(*corpora.prefixes)
    names = list(datasets)
    stream = tuple(
        entry(task, {name: datasets[name] for name in chosen}, TRAINING_BATCHES)
        for task, chosen in (("a", names[:2]), ("b", names[1:]))
    )

    def work(dp_size: int, masks: bool) -> Work:
        def seconds(repetition: int) -> float:
            replay = ReplaySpec(Decimal("0.25"))
            plan = Plan(PlanSpec(repetition, TRAINING_ROWS, SEQ, replay, stream))
            dp = (dp_size // 2, dp_size)
            return timed(lambda: _take_all(plan, datasets, masks, dp=dp))

        return seconds

    cases = [(dp_size, masks) for dp_size in (1, 8) for masks in (False, True)]
    found = interleaved({str(case): work(*case) for case in cases}, repetitions)
    return [
        Row(
            f"plan and loader, batches of {TRAINING_ROWS:,} rows, alpha 0.25, "
            + (f"one rank of dp_size {dp_size}" if dp_size > 1 else "dp_size 1")
            + (", eod_mask_loss" if masks else ""),
            "us a row of the rank",
            found[str((dp_size, masks))].scaled(
                1e6 * dp_size / (TRAINING_ROWS * TRAINING_BATCHES * len(stream))
            ),
            TRAINING_LIMIT,
        )
        for dp_size, masks in cases
    ]
