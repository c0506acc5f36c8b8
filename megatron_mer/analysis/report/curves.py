"""What a run's lines give as curves: points that a page can hold, however long the run was."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from megatron_mer.analysis.run_reader import Line, RunRecord

BINS = 120
MOST_POINTS = 400
KINDS = ("fresh", "replay")

Point = tuple[int, float]
Curve = list[Point]
"""(step, value), steps ascending."""
Weighted = tuple[float, float]
"""A value and its weight."""


def run_curves(run: RunRecord) -> dict[str, Any]:
    """All curves of a run.

    Returns:
        "held_out" and "held_out_anchor" {set: curve}, as evaluated; "training" {"loss", "fresh",
        "replay"}, "by_task" and "by_dataset" {name: {kind: curve}}: means over bins of batches,
        each value weighted with its tokens; "learning_rate", "grad_norm", "tokens_per_second",
        "mfu", "data_wait_seconds", "memory_gib", "reptile_delta_norm", "reptile_delta_cosine":
        curves, empty where the run has none; "batches_a_point" of the means; "boundaries", as
        those of the run.
    """
    bins = _bins(run.metrics)
    return {
        "boundaries": [list(one) for one in run.boundaries],
        "batches_a_point": max((len(one) for one in bins), default=0),
        "held_out": _held_out(run.evaluations, "losses"),
        "held_out_anchor": _held_out(run.evaluations, "losses_anchor"),
        "training": {name: _curve(bins, value) for name, value in _TRAINING.items()},
        "by_task": _by_source(bins, "loss_by_task"),
        "by_dataset": _by_source(bins, "loss_by_dataset"),
        "learning_rate": _ends(bins, "lr"),
        "grad_norm": _curve(bins, _plain("grad_norm")),
        "tokens_per_second": _medians(bins, "tokens_per_second"),
        "mfu": _medians(bins, "mfu"),
        "data_wait_seconds": _curve(bins, _plain("data_wait_seconds")),
        "memory_gib": _most(bins, "memory_gib"),
        "reptile_delta_norm": _each(run.metrics, "reptile_delta_norm"),
        "reptile_delta_cosine": _each(run.metrics, "reptile_delta_cosine"),
    }


def machine_use(metrics: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of what a run measured of its machine; what it has not is absent.

    The first step, which pays for what is done once, does not count where there are others.
    """
    used = {}
    later = metrics[1:] or metrics
    for key in ("tokens_per_second", "step_seconds", "mfu", "data_wait_seconds", "memory_gib"):
        values = [line[key] for line in later if line.get(key) is not None]
        if values:
            used[key] = {
                "median": statistics.median(values), "least": min(values), "greatest": max(values)
            }  # fmt: skip
    return used


def _bins(metrics: Sequence[Line]) -> list[list[Line]]:
    """About `BINS` groups of consecutive batches, none across the begin of a task."""
    width = -(-len(metrics) // BINS) or 1
    bins = []
    for _, lines in groupby(metrics, key=lambda line: line["task"]):
        task = list(lines)
        bins += [task[at : at + width] for at in range(0, len(task), width)]
    return bins


def _step(lines: Sequence[Line]) -> int:
    """The last step of a bin; a batch without an update belongs to the step before it."""
    steps = [line["step"] for line in lines if line["step"] is not None]
    return steps[-1] if steps else 0


def _curve(bins: Iterable[Sequence[Line]], value: Callable[[Line], Weighted | None]) -> Curve:
    """The weighted mean of each bin that has any."""
    curve = []
    for lines in bins:
        found = [one for one in map(value, lines) if one is not None and one[1] > 0]
        if found and (step := _step(lines)):
            total = sum(weight for _, weight in found)
            curve.append((step, sum(number * weight for number, weight in found) / total))
    return curve


def _plain(key: str) -> Callable[[Line], Weighted | None]:
    return lambda line: None if line.get(key) is None else (line[key], 1.0)


def _kind(kind: str) -> Callable[[Line], Weighted | None]:
    """The loss of fresh or replayed rows, weighted with their tokens (older runs: with rows)."""

    def value(line: Line) -> Weighted | None:
        loss = line.get(f"loss_{kind}")
        if loss is None:
            return None
        sources = _sources(line, "loss_by_task")
        tokens = sum(one[kind][1] for one in sources.values() if kind in one)
        rows = line.get("replay_rows") if kind == "replay" else None
        return loss, tokens or rows or 1.0

    return value


_TRAINING = {"loss": _plain("loss"), **{kind: _kind(kind) for kind in KINDS}}


def _sources(line: Line, key: str) -> dict[str, dict[str, Weighted]]:
    """A line's losses by task or dataset, without what is no number."""
    found: dict[str, dict[str, Weighted]] = {}
    for name, kinds in (line.get(key) or {}).items():
        for kind in KINDS:
            pair = kinds.get(kind) if isinstance(kinds, Mapping) else None
            numbers = isinstance(pair, list) and [type(one) in (int, float) for one in pair]
            if pair and numbers == [True, True]:
                found.setdefault(name, {})[kind] = (pair[0], pair[1])
    return found


def _by_source(bins: Iterable[Sequence[Line]], key: str) -> dict[str, dict[str, Curve]]:
    """Curves by task or dataset and kind, in the order of their first appearance."""
    curves: dict[str, dict[str, Curve]] = {}
    for lines in bins:
        sums: dict[tuple[str, str], list[float]] = {}
        for line in lines:
            for name, kinds in _sources(line, key).items():
                for kind, (loss, tokens) in kinds.items():
                    total = sums.setdefault((name, kind), [0.0, 0.0])
                    total[0] += loss * tokens
                    total[1] += tokens
        for (name, kind), (loss, tokens) in sums.items():
            if tokens > 0 and (step := _step(lines)):
                curves.setdefault(name, {}).setdefault(kind, []).append((step, loss / tokens))
    return curves


def _held_out(evaluations: Iterable[Line], key: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in evaluations:
        for name, loss in line.get(key, {}).items():
            if loss is not None:
                curves.setdefault(name, []).append((line["step"], loss))
    return {name: _thin(curve) for name, curve in curves.items()}


def _ends(bins: Iterable[Sequence[Line]], key: str) -> Curve:
    """The first and the last value of each bin: what follows a formula is not averaged."""
    steps: dict[int, float] = {}
    for lines in bins:
        there = [line for line in lines if line["step"] and line.get(key) is not None]
        for line in (*there[:1], *there[-1:]):
            steps[line["step"]] = line[key]
    return sorted(steps.items())


def _medians(bins: Iterable[Sequence[Line]], key: str) -> Curve:
    return _reduced(bins, key, statistics.median)


def _most(bins: Iterable[Sequence[Line]], key: str) -> Curve:
    return _reduced(bins, key, max)


def _reduced(
    bins: Iterable[Sequence[Line]], key: str, reduce: Callable[[list[float]], float]
) -> Curve:
    curve = []
    for lines in bins:
        values = [line[key] for line in lines if line.get(key) is not None]
        if values and (step := _step(lines)):
            curve.append((step, reduce(values)))
    return curve


def _each(metrics: Iterable[Line], key: str) -> Curve:
    return _thin([(line["step"], line[key]) for line in metrics if line["step"] and line.get(key)])


def _thin(curve: Curve) -> Curve:
    """Every n-th point and the last, `MOST_POINTS` about."""
    every = -(-len(curve) // MOST_POINTS) or 1
    kept = curve[::every]
    return kept if not curve or kept[-1] == curve[-1] else [*kept, curve[-1]]
