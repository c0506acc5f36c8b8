"""What it costs to know where the rows of a batch come from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from decimal import Decimal

import numpy as np

from benchmarks.parts.measure import Row, Sample, Work, interleaved, timed
from benchmarks.parts.peer import STORED_BYTES, Peer
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec

ROWS = 4096
TASKS = 4
STEPS = 2000
"""Batches of a task."""
SAMPLES = 2_441_406
"""Samples of a dataset: 10M documents of 500 tokens, in rows of 2,048."""
PLACES = (0.0, 0.2, 0.3, 0.6, 0.8, 0.99)
"""Where in the run; the first ones lie in the first task, which has nothing to replay."""
LIMITS = {3: 100.0, 100: 150.0, 1000: 250.0}
"""Nanoseconds a row, by datasets of a task."""
PEER_SAMPLES = {3: 400_000, 100: 200_000, 1000: 40_000}

POLICIES = {
    "uniform": ReplaySpec(Decimal("0.25")),
    "uniform, current task too": ReplaySpec(Decimal("0.25"), include_current_task=True),
    "equal": ReplaySpec(Decimal("0.25"), policy="equal"),
    "weights": ReplaySpec(
        Decimal("0.25"),
        policy="weights",
        weights={f"task{task}": 1.0 + task for task in range(TASKS)},
    ),
}


def weights(count: int) -> list[float]:
    """Uneven weights for a number of datasets."""
    return [float(weight) for weight in np.random.default_rng(count).uniform(0.1, 1.0, count)]


def make_plan(datasets: int, replay: ReplaySpec) -> Plan:
    """A run of four tasks with their own weighted datasets each."""
    stream = tuple(
        EntrySpec(
            f"task{task}",
            tuple(
                DatasetSpec(f"task{task}_{place}", SAMPLES, weight)
                for place, weight in enumerate(weights(datasets))
            ),
            steps=STEPS,
            max_epochs=16.0,
        )
        for task in range(TASKS)
    )
    return Plan(PlanSpec(1, ROWS, 2048, replay, stream))


def measure(peer: Peer | None, repetitions: int) -> list[Row]:
    """A line for each number of datasets and policy."""
    return [row for datasets in LIMITS for row in _of_size(datasets, peer, repetitions)]


def _of_size(datasets: int, peer: Peer | None, repetitions: int) -> list[Row]:
    plans = {name: make_plan(datasets, replay) for name, replay in POLICIES.items()}
    works: dict[str, Work] = {
        name: functools.partial(_step_seconds, plan) for name, plan in plans.items()
    }
    samples, shares = PEER_SAMPLES[datasets], weights(datasets)
    if peer is not None:
        works["peer"] = lambda _: timed(lambda: peer.blend(shares, samples))
    found = interleaved(works, repetitions)
    theirs = found.pop("peer").scaled(1e9 / samples) if peer is not None else None
    return [_row(datasets, name, found, theirs) for name in found]


def _step_seconds(plan: Plan, repetition: int) -> float:
    """Seconds for one batch, the mean over places of the run; every time other batches."""
    batches = [int(place * plan.total_batches) + repetition for place in PLACES]
    return timed(lambda: [plan.rows(batch) for batch in batches]) / len(batches)


def _row(datasets: int, name: str, found: Mapping[str, Sample], theirs: Sample | None) -> Row:
    return Row(
        what=f"plan a step of {ROWS:,} rows, {datasets:,} datasets a task, {name}",
        unit="ns a row",
        ours=found[name].scaled(1e9 / ROWS),
        limit=LIMITS[datasets],
        peer=theirs,
        note=f"megatron-core: build of the blend index, {STORED_BYTES} bytes a sample"
        if theirs
        else "",
    )
