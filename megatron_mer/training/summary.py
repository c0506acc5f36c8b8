"""What a run says at its end: summary.json, ledger.json and the picture of its losses."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_mer.analysis.pictures import loss_picture
from megatron_mer.analysis.tables import matrix_table
from megatron_mer.continual.forgetting import (
    MatrixRow,
    bits_per_byte,
    matrix_dict,
    summary_dict,
)
from megatron_mer.log import get_logger
from megatron_mer.training.outputs import RunDirectory
from megatron_mer.training.preflight import Prepared
from megatron_mer.training.run_state import RunState

logger = get_logger(__name__)


def write_results(outputs: RunDirectory, prepared: Prepared, state: RunState) -> dict[str, Any]:
    """Write ledger.json, summary.json and report/losses.png.

    Args:
        outputs: the run's directory, with its evaluations.
        prepared: the run, its plan with what was skipped.
        state: where it stands.

    Returns:
        The summary; without losses for a run that evaluates nothing.
    """
    config, plan = prepared.config, prepared.plan
    ledger = plan.ledger(state.batches)
    outputs.write_json("ledger.json", ledger)
    evaluations = outputs.evaluations()
    if evaluations and evaluations[0]["moment"] != "start":
        logger.warning(
            "evaluations.jsonl does not begin before the first step (the run went on from a "
            "checkpoint without its other files): the summary has no learned or retained losses"
        )
        evaluations = []
    skipped = len(plan.skipped)
    if skipped:
        logger.warning("%d of %d batches were skipped: not finite", skipped, state.batches)
    summary: dict[str, Any] = {
        "name": config.name,
        "steps": state.updates,
        "batches": state.batches,
        "skipped_batches": skipped,
        "tokens": plan.rows_before(state.batches) * config.model.seq_length,
        "wall_seconds": round(state.seconds, 1),
        # By entry, since a task may come again: labels as in the matrix.
        "replay_share": {
            f"{t['entry']} {t['task']}": t["replay_share"]
            for t in ledger["tasks"]
            if not t["trained_before"]
        },
    }
    if evaluations:
        summary = _with_losses(prepared, evaluations, summary)
    outputs.write_json("summary.json", summary)
    if evaluations:
        outputs.report.mkdir(exist_ok=True)
        loss_picture(
            evaluations,
            boundaries=_boundaries(evaluations),
            path=outputs.report / "losses.png",
            set_tasks=summary["set_tasks"],
            title=f"{config.name}: held-out loss of every task over the run",
        )
    return summary


def _with_losses(
    prepared: Prepared, evaluations: list[dict[str, Any]], extras: dict[str, Any]
) -> dict[str, Any]:
    stream = prepared.config.stream
    held_out = {
        name: {
            "samples": subject.num_samples,
            "tokens": subject.num_tokens,
            "bytes": subject.num_bytes(prepared.tokenizer),
        }
        for name, subject in prepared.valid.items()
    }
    set_tasks = {name: task.task for task in stream for name in task.valid_sets}
    before = {task.task for task in stream if task.trained_before}
    extras = {
        **extras,
        "held_out": held_out,
        "unigram_entropy": {
            name: subject.unigram_entropy() for name, subject in prepared.valid.items()
        },
    }
    if (anchor := _matrix_rows(evaluations, "losses_anchor")) is not None:
        extras["anchor"] = matrix_dict(anchor, set_tasks, before)
    summary = summary_dict(_matrix_rows(evaluations) or [], set_tasks, before, extras)
    summary["bits_per_byte"] = {
        measure: bits_per_byte(summary[measure]["sets"], held_out)
        for measure in ("retained", "learned")
    }
    return summary


def _matrix_rows(evaluations: list[dict[str, Any]], key: str = "losses") -> list[MatrixRow] | None:
    """The rows of the matrix, from the lines at the ends of entries.

    Args:
        evaluations: lines of `evaluations.jsonl`.
        key: which losses; before the first step fast weights and anchor are the same.

    Returns:
        None if an entry's end has no such losses. A loss that was not finite stands as null in the
        file, since JSON has no NaN.
    """
    rows = []
    for line in evaluations:
        if line["moment"] == "interval":
            continue
        losses = line.get("losses" if line["moment"] == "start" else key)
        if losses is None:
            return None
        numbers = {name: math.nan if v is None else v for name, v in losses.items()}
        rows.append(MatrixRow(line["entry"], line["task"], numbers))
    return rows if len(rows) > 1 or key == "losses" else None


def _boundaries(evaluations: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The step at which each entry ended, and its task."""
    return [(line["step"], line["task"]) for line in evaluations if line["moment"] == "entry_end"]


def read_summary(outputs: RunDirectory) -> dict[str, Any]:
    """The summary of a run that is done; empty when it has none."""
    path = outputs.root / "summary.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def show_results(outputs: RunDirectory) -> None:
    """Log where the results are, and the tables, in one record: no prefix breaks their lines."""
    table = matrix_table(read_summary(outputs))
    logger.info("results in %s%s", outputs.root, f"\n\n{table}\n" if table else "")
