"""Runs' directories that no run made: small, exact numbers, any names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_mer.continual.forgetting import MatrixRow, bits_per_byte, matrix_dict, summary_dict

STEPS = 30  # of each entry


def made_run(
    root: Path,
    losses: Sequence[Sequence[float | None]] = ((8.0, 8.5), (5.0, 7.0), (5.5, 4.0)),
    tasks: Sequence[str] = ("en", "fr"),
    name: str = "made",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run that is done.

    Args:
        root: Its directory.
        losses: The matrix, a column a task; None stands for a loss that was not finite.
        tasks: Also the names of the held-out sets.
        name: Of the run.
        config: Changes to its configuration.
    """
    root.mkdir(parents=True)
    stream = [{"task": task, "train": [{"prefix": task}], "valid": task} for task in tasks]
    settings = {"name": name, "seed": 1, "model": {"seq_length": 16}, "stream": stream}
    (root / "config.yaml").write_text(
        yaml.safe_dump({**settings, **(config or {})}, allow_unicode=True), encoding="utf-8"
    )
    write(root, "status.json", {"status": "done", "step": STEPS * len(tasks), "reason": ""})
    write(root, "plan.json", [{"first_batch": 0, "batches": [STEPS] * len(tasks)}])
    write(root, "environment.json", {"command": ["x.py", "a b"], "packages": {"numpy": "2"}})
    write(root, "metrics.jsonl", *metrics(tasks))
    write(root, "evaluations.jsonl", *evaluations(losses, tasks))
    write(root, "ledger.json", ledger(tasks))
    write(root, "summary.json", summary(losses, tasks, name))
    return root


def write(root: Path, name: str, *content: Any) -> None:
    """A JSON file, or JSON lines."""
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in content]
    (root / name).write_text("".join(lines), encoding="utf-8")


def metrics(tasks: Sequence[str]) -> list[dict[str, Any]]:
    lines = []
    for batch in range(STEPS * len(tasks)):
        at = batch // STEPS
        loss = 8.0 - batch / 50
        replay = {tasks[0]: {"replay": [loss + 1, 16]}} if at else {}
        lines.append(
            {
                "step": batch + 1, "batch": batch, "task": tasks[at], "lr": 1e-3, "loss": loss,
                "loss_fresh": loss, "loss_replay": loss + 1 if at else None, "grad_norm": 1.0,
                "replay_rows": int(at > 0), "consumed_samples": 4 * (batch + 1),
                "consumed_fresh_samples": 4 * (batch + 1), "step_seconds": 0.25,
                "tokens_per_second": 256.0 + batch, "mfu": 0.25, "data_wait_seconds": 0.001,
                "memory_gib": 1.5, "loss_by_task": {tasks[at]: {"fresh": [loss, 48]}, **replay},
            }
        )  # fmt: skip
    return lines


def evaluations(
    losses: Sequence[Sequence[float | None]], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "step": STEPS * at, "batches": STEPS * at, "moment": "entry_end" if at else "start",
            "entry": at - 1 if at else None, "task": tasks[at - 1] if at else None,
            "updates_since_reptile": None, "losses": dict(zip(tasks, row, strict=True)),
            "seconds": 0.5,
        }
        for at, row in enumerate(losses)
    ]  # fmt: skip


def ledger(tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "datasets": {
            f"{task}_web": {"fresh": 100 + at, "replayed": 7, "skipped": 0, "epochs": 0.5}
            for at, task in enumerate(tasks)
        },
        "tasks": [
            {
                "entry": at, "task": task, "trained_before": False, "replay_rows": at * 30,
                "pool_batches": at * 30, "replay_share": 0.25 if at else None,
            }
            for at, task in enumerate(tasks)
        ],
    }  # fmt: skip


def summary(
    losses: Sequence[Sequence[float | None]], tasks: Sequence[str], name: str
) -> dict[str, Any]:
    rows = [
        MatrixRow(
            at - 1 if at else None,
            tasks[at - 1] if at else None,
            {task: math.nan if one is None else one for task, one in zip(tasks, row, strict=True)},
        )
        for at, row in enumerate(losses)
    ]
    sets = {task: task for task in tasks}
    held_out = {task: {"samples": 3, "tokens": 48, "bytes": 200 + at}
                for at, task in enumerate(tasks)}  # fmt: skip
    steps = STEPS * len(tasks)
    whole = summary_dict(rows, sets, (), {
        "name": name, "steps": steps, "batches": steps, "skipped_batches": 0,
        "tokens": 64 * steps, "wall_seconds": 3725.4, "held_out": held_out,
        "unigram_entropy": dict.fromkeys(tasks, 6.125), "anchor": matrix_dict(rows, sets),
    })  # fmt: skip
    whole["bits_per_byte"] = {
        measure: bits_per_byte(whole[measure]["sets"], held_out)
        for measure in ("retained", "learned")
    }
    return whole
