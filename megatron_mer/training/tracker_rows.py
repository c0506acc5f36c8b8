"""The lines of metrics.jsonl and evaluations.jsonl as named numbers for metric services."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, float]

# Line of metrics.jsonl -> name of the number; what is not here is no number, or nested.
_NAMES = {
    "loss": "train/loss",
    "loss_fresh": "train/loss_fresh",
    "loss_replay": "train/loss_replay",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "replay_rows": "train/replay_rows",
    "batch": "progress/batch",
    "consumed_samples": "progress/consumed_samples",
    "consumed_fresh_samples": "progress/consumed_fresh_samples",
    "step_seconds": "speed/step_seconds",
    "data_wait_seconds": "speed/data_wait_seconds",
    "replay_wait_seconds": "speed/replay_wait_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "memory_gib": "speed/memory_gib",
    "updates_since_reptile": "reptile/updates_since",
    "reptile_delta_norm": "reptile/delta_norm",
    "reptile_delta_cosine": "reptile/delta_cosine",
}


def metrics_row(line: Mapping[str, Any]) -> Row:
    """A line of metrics.jsonl; null and what is no number are left out."""
    row = {name: line.get(key) for key, name in _NAMES.items()}
    for key in ("task", "dataset"):
        for source, kinds in line.get(f"loss_by_{key}", {}).items():
            for kind, (loss, _) in kinds.items():
                row[f"by_{key}/{source}/{kind}"] = loss
    return {name: float(value) for name, value in row.items() if value is not None}


def evaluation_row(line: Mapping[str, Any]) -> Row:
    """A line of evaluations.jsonl."""
    groups = {"eval": line["losses"], "eval_anchor": line.get("losses_anchor", {})}
    return {
        f"{group}/{name}": float(loss)
        for group, losses in groups.items()
        for name, loss in losses.items()
        if loss is not None
    }


def summary_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The measures of summary.json as (name, number)."""
    for where, part in (("", summary), ("anchor/", summary.get("anchor", {}))):
        for measure in (
            "retained",
            "learned",
            "forgetting",
            "backward_transfer",
            "forward_transfer",
        ):
            found = part.get(measure, {})
            named = {"mean": found.get("mean"), **found.get("sets", {})}
            for name, value in named.items():
                if value is not None:
                    yield f"{where}{measure}/{name}", float(value)
    for key in ("steps", "batches", "skipped_batches", "tokens", "wall_seconds"):
        if key in summary:
            yield key, float(summary[key])
