"""What the metrics of a step cost on rank 0, in microseconds, beside the limit of 500.

    python benchmarks/metrics.py [--repetitions 300]

Plans runs with few and many datasets and times what the loop adds to a step for its line in
metrics.jsonl: the losses by kind, task and dataset, and writing the line. Where the rows came from
is found by the thread that reads them ahead. What the engine adds is one reduction of 16 bytes a
row where 40 bytes in all went before.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec
from megatron_mer.data.batches import Rows
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.sources import SourceLosses

LIMIT = 500.0
"""Microseconds a step."""
CASES = ((64, 5, 1), (256, 5, 4), (1024, 5, 4), (1024, 20, 50), (4096, 20, 50))
"""Rows of a batch, tasks, datasets of a task."""
EVERY = 10
"""Steps from one loss by dataset to the next, the default."""
STEPS = 1000
"""Batches of a task."""


def make_plan(rows: int, tasks: int, datasets: int) -> Plan:
    """A run with replay in which every task has datasets of its own."""
    stream = tuple(
        EntrySpec(
            f"task{task}",
            tuple(DatasetSpec(f"task{task}_{n}", 10_000_000 // datasets) for n in range(datasets)),
            steps=STEPS,
            max_epochs=16.0,
        )
        for task in range(tasks)
    )
    return Plan(PlanSpec(1, rows, 2048, ReplaySpec(Decimal("0.25")), stream))


def step(
    sources: SourceLosses, outputs: RunDirectory, losses: np.ndarray, rows: Rows, by_dataset: bool
) -> None:
    """What the loop does for the line of one batch."""
    kinds = sources.by_kind(rows, losses)
    outputs.append_metrics(
        {
            **dict.fromkeys(("lr", "loss", "grad_norm", "step_seconds", "mfu"), 0.123456789),
            "loss_fresh": kinds["fresh"],
            "loss_replay": kinds["replay"],
            "loss_by_task": sources.by_task(rows, losses),
            **({"loss_by_dataset": sources.by_dataset(rows, losses)} if by_dataset else {}),
        }
    )


def main() -> int:
    """Measure every case; exit code 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repetitions", type=int, default=300, help="steps a case, default 300")
    repetitions = parser.parse_args().repetitions
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        outputs = RunDirectory(folder)
        for rows, tasks, datasets in CASES:
            plan = make_plan(rows, tasks, datasets)
            losses = np.random.default_rng(1).uniform(1, 9, (rows, 2))
            work = functools.partial(step, SourceLosses(plan), outputs, losses)
            times = []
            for at in range(repetitions):
                # In the last task, in which every other one is replayed.
                origins = plan.rows(plan.total_batches - 1 - at % STEPS)
                begin = time.perf_counter()
                work(origins, at % EVERY == 0)
                times.append((time.perf_counter() - begin) * 1e6)
            mean, dearest = statistics.fmean(times), statistics.median(times[::EVERY])
            missed += mean > LIMIT
            print(
                f"{rows:5} rows, {tasks:2} tasks of {datasets:2} datasets: {mean:4.0f} us a step, "
                f"limit {LIMIT:.0f}; a step with losses by dataset {dearest:4.0f}"
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
