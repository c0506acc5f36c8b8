"""Which charts a report shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mer.analysis.report.charts import kept_chart, matrix_chart, scatter_chart
from megatron_mer.analysis.report.curves import KINDS
from megatron_mer.analysis.report.drawing import Chart
from megatron_mer.analysis.report.lines import LineOf, line_chart, spans_of

SMALL = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm before clipping",
    "tokens_per_second": "Tokens a second, all ranks",
    "mfu": "Model FLOPs utilisation (MFU), 0 to 1",
    "data_wait_seconds": "Wait for data, seconds a batch",
    "memory_gib": "Memory of the fullest rank, GiB",
    "reptile_delta_norm": "Norm of Reptile's delta",
    "reptile_delta_cosine": "Cosine of Reptile's delta and the one before",
}


def run_charts(content: Mapping[str, Any]) -> dict[str, Chart]:
    """The charts that a run has data for, by key.

    Args:
        content: As `content.run_content` gives it.
    """
    curves, summary = content["curves"], content["summary"]
    spans = spans_of(curves["boundaries"])
    tasks = summary.get("set_tasks", {})
    charts = [
        _lines("held_out", "Held-out loss, nats a token", spans, [
            LineOf(name, points, at, own=tasks.get(name, name))
            for at, (name, points) in enumerate(curves["held_out"].items())
        ], height=420),
        _lines("training", "Training loss, nats a token", spans, [
            LineOf("fresh rows", curves["training"]["fresh"], 0),
            LineOf("replayed rows", curves["training"]["replay"], 1, dashed=True),
        ], height=320),
        _by_source("by_task", "Training loss by task, nats a token", curves["by_task"], spans),
        _by_source("by_dataset", "Training loss by dataset, nats a token", curves["by_dataset"],
                   spans),
        *(
            _lines(key, title, spans, [LineOf(title, curves[key], 0)], small=True, named=False)
            for key, title in SMALL.items()
        ),
    ]  # fmt: skip
    if _has_pairs(summary):
        charts.append(kept_chart(summary))
    if "matrix" in summary and summary["matrix"]["sets"]:
        charts.append(matrix_chart(summary))
    return {chart.key: chart for chart in charts if chart is not None}


def several_charts(runs: Sequence[Mapping[str, Any]], groups: Sequence[Any]) -> dict[str, Chart]:
    """The charts that compare runs.

    Args:
        runs: As `content.run_content` gives them.
        groups: As `compare.seed_groups` gives them: their runs share a colour.
    """
    first = {place: group["runs"][0] for group in groups for place in group["runs"]}
    kinds = list(dict.fromkeys(first.get(at, at) for at in range(len(runs))))
    looks = [kinds.index(first.get(at, at)) for at in range(len(runs))]
    places = []
    for at, run in enumerate(runs):
        learned, retained = (
            run["summary"].get(key, {}).get("mean") for key in ("learned", "retained")
        )
        if learned is not None and retained is not None:
            places.append((str(at + 1), learned, retained, looks[at]))
    charts = [scatter_chart(places)] if places else []
    means = [
        LineOf(f"{at + 1} {run['name']}", _mean(run["curves"]["held_out"]), looks[at])
        for at, run in enumerate(runs)
    ]
    title = "Mean of the held-out losses, nats a token"
    chart = _lines("means", title, [], means, height=340, ends=False)
    return {one.key: one for one in (*charts, chart) if one is not None}


def _lines(
    key: str, title: str, spans: Sequence[Any], lines: Sequence[LineOf], **options: Any
) -> Chart | None:
    if not any(line.points for line in lines):
        return None
    return line_chart(key, title, lines, spans, **options)


def _by_source(
    key: str, title: str, curves: Mapping[str, Mapping[str, Any]], spans: Sequence[Any]
) -> Chart | None:
    """A colour a source; fresh rows whole, replayed ones dashed."""
    lines = [
        LineOf(f"{name} ({kind})", kinds[kind], at, dashed=kind == "replay")
        for at, (name, kinds) in enumerate(curves.items())
        for kind in KINDS
        if kind in kinds
    ]
    return _lines(key, title, spans, lines, height=360, gaps=True, ends=False)


def _has_pairs(summary: Mapping[str, Any]) -> bool:
    learned = summary.get("learned", {}).get("sets", {})
    retained = summary.get("retained", {}).get("sets", {})
    return any(None not in (retained[name], learned.get(name)) for name in retained)


def _mean(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over all sets at the steps where each has a loss."""
    by_step: dict[int, list[float]] = {}
    for points in curves.values():
        for step, loss in points:
            by_step.setdefault(step, []).append(loss)
    return [
        (step, sum(losses) / len(losses))
        for step, losses in sorted(by_step.items())
        if len(losses) == len(curves)
    ]
