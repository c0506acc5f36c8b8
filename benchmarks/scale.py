"""Simulated scale: what a step of the plan costs anywhere in runs of 1G to 1T tokens.

Example:
    python benchmarks/scale.py

20 tasks over 10,000 datasets, and four changes of mind on the way. No data is read: a plan needs
only the datasets' numbers of samples. The processor's caches are swept before each step, as
training does between two. Prints the curve and keeps it as JSON and as a picture below
build/benchmarks; --record keeps them in benchmarks/data and RESULTS.md instead.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.parts.measure import (
    Machine,
    Sample,
    headline,
    markdown,
    number,
    timed,
)
from benchmarks.parts.record import output_folder, record_section, write_json
from benchmarks.parts.scale_picture import draw
from megatron_mer.continual.plan import Plan
from megatron_mer.continual.spec import DatasetSpec, EntrySpec, PlanSpec, ReplaySpec

TASKS = 20
DATASETS = 500
"""Of each task."""
SEQ = 2048
FULL_POOL = "1T, full pool"
"""A run with every dataset in the replay pool from batch 0, so that along it nothing but the step
number changes; in the others each task adds its 500 datasets to what replay draws from."""
RUNS = {"1G": 10**9, "10G": 10**10, "100G": 10**11, "1T": 10**12, FULL_POOL: 10**12}
"""Tokens of the runs; all read the same datasets, which last for the longest."""
CHANGES = ((0.2, "batch size"), (0.4, "alpha"), (0.6, "mix"), (0.8, "all back"))
"""Where in the run, as it stands by then, and what changes; in the end all is as it began."""
MARKS = 500
SWEPT = 8 * 2**20
"""Numbers that are summed to sweep the caches: 64 MiB."""
MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class Run:
    """A plan and what it took to make it."""

    name: str
    tokens: int
    plan: Plan
    start_seconds: float
    change_seconds: tuple[float, ...]


def base_spec(tokens: int, full_pool: bool) -> PlanSpec:
    """The first segment's specification."""
    generator = np.random.default_rng(1)
    mean = 1.5 * max(RUNS.values()) / SEQ / TASKS / DATASETS
    sizes = generator.lognormal(0.0, 1.0, (TASKS, DATASETS))
    sizes = np.maximum(sizes / sizes.mean(axis=1, keepdims=True) * mean, 1).astype(np.int64)
    stream = tuple(
        EntrySpec(
            f"task{task:02}",
            tuple(
                DatasetSpec(f"task{task:02}_{place:03}", size, float(size))
                for place, size in enumerate(row.tolist())
            ),
            fresh_tokens=tokens // TASKS,
            max_epochs=MAX_EPOCHS,
        )
        for task, row in enumerate(sizes)
    )
    if full_pool:
        everything = tuple(replace(one, weight=None) for entry in stream for one in entry.datasets)
        stream = (*stream, EntrySpec("base", everything, trained_before=True))
    return PlanSpec(1, 4096, SEQ, ReplaySpec(Decimal("0.25")), stream)


def other_mix(stream: Sequence[EntrySpec]) -> tuple[EntrySpec, ...]:
    """Every weight of a task changed by a factor of 0.7 to 1.4."""
    factors = np.random.default_rng(2).uniform(0.7, 1.4, (len(stream), DATASETS)).tolist()
    return tuple(
        entry
        if entry.trained_before
        else replace(
            entry,
            datasets=tuple(
                replace(one, weight=factor * one.num_samples)
                for one, factor in zip(entry.datasets, row, strict=True)
            ),
        )
        for entry, row in zip(stream, factors, strict=True)
    )


def segments(first: PlanSpec) -> Iterator[PlanSpec]:
    """The specifications that follow the first one: batch size, then alpha, then mix, then back."""
    larger = replace(first, global_batch_size=8192)
    less_replay = replace(larger, replay=ReplaySpec(Decimal("0.1")))
    yield larger
    yield less_replay
    yield replace(less_replay, stream=other_mix(first.stream))
    yield first


def make_run(name: str, tokens: int) -> Run:
    """Lay a run out and change it four times."""
    spec = base_spec(tokens, full_pool=name == FULL_POOL)
    start = time.perf_counter()
    plan = Plan(spec)
    start_seconds = time.perf_counter() - start
    seconds = []
    for (share, _), following in zip(CHANGES, segments(spec), strict=True):
        history = plan.history()
        batch = int(share * plan.total_batches)
        start = time.perf_counter()
        plan = Plan.continued(history, following, batch)
        seconds.append(time.perf_counter() - start)
    return Run(name, tokens, plan, start_seconds, tuple(seconds))


def step_costs(runs: Sequence[Run], places: int, repetitions: int) -> dict[str, list[float]]:
    """Nanoseconds a row of a step, at evenly spread places of each run: medians.

    Every round visits all places of all runs in another order, so that no drift of the machine
    looks like one along the run.
    """
    found: dict[tuple[int, int], list[float]] = {}
    swept = np.ones(SWEPT)
    visits = list(product(range(len(runs)), range(places)))
    for repetition in range(repetitions + 1):
        random.Random(repetition).shuffle(visits)
        for which, place in visits:
            plan = runs[which].plan
            batch = batch_at(plan, place, places)
            rows = plan.global_batch_size(batch)
            swept.sum()
            seconds = timed(partial(plan.rows, batch))
            if repetition > 0:  # the first round warms up
                found.setdefault((which, place), []).append(seconds / rows * 1e9)
    return {
        run.name: [statistics.median(found[which, place]) for place in range(places)]
        for which, run in enumerate(runs)
    }


def batch_at(plan: Plan, place: int, places: int) -> int:
    """The batch at a place: 0 is the first one, places - 1 the last."""
    return place * (plan.total_batches - 1) // (places - 1)


def trend(costs: Sequence[float], groups: Sequence[int]) -> dict[str, float]:
    """Slope of the cost along the run, fitted with a level of its own for each group of places.

    Settings differ between segments, and so may their cost; what must not be is a growth with the
    step number while they stay the same. Ordinary least squares.

    Returns:
        Slope in ns a row from the first to the last step, its standard error, and the scatter
        about the fit.
    """
    y, x = np.array(costs), np.linspace(0.0, 1.0, len(costs))
    levels = np.array([[group == one for one in sorted(set(groups))] for group in groups], float)
    design = np.column_stack([levels, x])
    fit, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ fit
    scatter = float(np.sqrt(rest @ rest / (len(y) - design.shape[1])))
    error = scatter * float(np.sqrt(np.linalg.inv(design.T @ design)[-1, -1]))
    return {"slope": float(fit[-1]), "standard_error": error, "scatter": scatter}


def curve(run: Run, costs: Sequence[float]) -> dict[str, Any]:
    """What is kept of a run's costs."""
    plan, places = run.plan, len(costs)
    batches = [batch_at(plan, place, places) for place in range(places)]
    starts = [segment.first_batch for segment in plan.segments]
    groups = [bisect_right(starts, batch) for batch in batches]
    first, last = (
        statistics.median([cost for cost, group in zip(costs, groups, strict=True) if group == one])
        for one in (1, len(starts))
    )
    return {
        "tokens": run.tokens,
        "total_batches": plan.total_batches,
        "rows": plan.rows_before(plan.total_batches),
        "segment_starts": starts,
        "batches": batches,
        "ns_a_row": [round(cost, 2) for cost in costs],
        "median": statistics.median(costs),
        "median_first_segment": first,
        "median_last_segment": last,
        **trend(costs, groups),
    }


def other_costs(run: Run) -> dict[str, Any]:
    """Start-up, history, marks of skipped batches and ledger of a run."""
    plan = run.plan
    history = plan.history()
    text = json.dumps(history)
    start = time.perf_counter()
    rebuilt = Plan.from_history(json.loads(text))
    from_history = time.perf_counter() - start
    replayed = plan.rows_before(plan.total_batches) - plan.fresh_rows_before(plan.total_batches)
    ledger = timed(lambda: plan.ledger(plan.total_batches))
    marks = Sample(tuple(mark_seconds(rebuilt)))
    return {
        "start_seconds": run.start_seconds,
        "change_seconds": run.change_seconds,
        "from_history_seconds": from_history,
        "history_seconds": timed(plan.history),
        "history_megabytes": len(text) / 1e6,
        "mark_skipped_milliseconds": marks.scaled(1e3).median,
        "mark_skipped_last_milliseconds": Sample(marks.values[-20:]).scaled(1e3).median,
        "marks": len(marks.values),
        "ledger_seconds": ledger,
        "ledger_replay_rows": replayed,
        "ledger_ns_a_replay_row": ledger / replayed * 1e9,
    }


def mark_seconds(plan: Plan) -> Iterator[float]:
    """Seconds of each of many marks, spread over the last segment."""
    first = plan.segments[-1].first_batch
    count = min(MARKS, plan.total_batches - first)
    for mark in range(count):
        batch = first + mark * (plan.total_batches - first) // count
        yield timed(partial(plan.mark_skipped, batch))


def cost_lines(curves: Mapping[str, Mapping[str, Any]], points: int = 11) -> str:
    """The curves as a table: places down, runs across."""
    names = list(curves)
    places = len(next(iter(curves.values()))["ns_a_row"])
    lines = []
    for point in range(points):
        place = point * (places - 1) // (points - 1)
        near = slice(max(place - 2, 0), place + 3)
        values = [statistics.median(curves[name]["ns_a_row"][near]) for name in names]
        lines.append([f"{point * 100 // (points - 1)}%", *map(number, values)])
    return markdown(["place in the run", *(f"{name}, ns a row" for name in names)], lines)


def summary_lines(curves: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a run: level, slope and noise."""
    head = ["run", "batches", "median", "first segment", "last segment", "slope", "scatter"]
    lines = [
        [
            name,
            f"{one['total_batches']:,}",
            *(number(one[key]) for key in ("median", "median_first_segment")),
            number(one["median_last_segment"]),
            f"{one['slope']:+.1f} ± {one['standard_error']:.1f}",
            number(one["scatter"]),
        ]
        for name, one in curves.items()
    ]
    return markdown(head, lines)


def other_lines(others: Mapping[str, Mapping[str, Any]]) -> str:
    """Start-up, history, marks and ledger: a line a figure, runs across."""
    names = {
        "start_seconds": "new plan, s",
        "change_seconds": "a change of the plan (Plan.continued), s, each",
        "from_history_seconds": "plan from a checkpoint's JSON, s",
        "history_seconds": "history of a plan, s",
        "history_megabytes": "history as JSON, MB",
        "mark_skipped_milliseconds": "mark a batch as skipped, ms",
        "mark_skipped_last_milliseconds": "... the last 20 of the marks, ms",
        "marks": "... number of marks",
        "ledger_seconds": "ledger of the whole run, s",
        "ledger_replay_rows": "... replay rows that it draws again",
        "ledger_ns_a_replay_row": "... ns a replay row",
    }
    lines = []
    for key, what in names.items():
        values = [one[key] for one in others.values()]
        text = [
            ", ".join(number(each) for each in value) if isinstance(value, tuple) else number(value)
            for value in values
        ]
        lines.append([what, *text])
    return markdown(["", *others], lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    add("--places", type=int, default=201, metavar="N", help="of a run (default: 201)")
    add("--repetitions", type=int, default=9, metavar="N", help="of each step (default: 9)")
    add("--record", action="store_true", help="keep the figures as the repository's results")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, keep, draw."""
    arguments = parse_arguments()
    machine = Machine(shlex.join(["python", *sys.argv]))
    runs = [make_run(name, RUNS[name]) for name in arguments.runs]
    costs = step_costs(runs, arguments.places, arguments.repetitions)
    curves = {run.name: curve(run, costs[run.name]) for run in runs}
    others = {run.name: other_costs(run) for run in runs}
    found = machine.found()
    tables = (cost_lines(curves), summary_lines(curves), other_lines(others))
    text = "\n\n".join((headline(found), *tables))
    print(text)
    folder, changes = output_folder(arguments.record), [what for _, what in CHANGES]
    write_json(folder / "scale.json", found, changes=changes, curves=curves, other_costs=others)
    draw(curves, changes, folder / "scale.png")
    if arguments.record:
        record_section("scale", text)


if __name__ == "__main__":
    main()
