"""The bound on forgetting: what a run does when a held-out set has become too much worse."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from megatron_mer.config import RunConfig, TaskConfig
from megatron_mer.training.outputs import RunDirectory


def over_bound(
    evaluations: Sequence[Mapping[str, Any]], stream: Sequence[TaskConfig], most: float
) -> dict[str, float]:
    """Forgetting now of each held-out set whose forgetting is above a bound.

    It is measured as in `continual.forgetting`, with the last evaluation in place of the end of the
    run: its loss less the best one at the ends of entries since the set's task was first trained
    (for a task trained before this run: since before the first step). Sets of the task that is in
    training are left out, as are tasks not trained yet.

    Args:
        evaluations: lines of `evaluations.jsonl`, the one that was just made last.
        stream: the run's tasks.
        most: nats a token, >= 0.

    Returns:
        Set -> nats a token; infinite for a loss that is not finite (null in the lines).
    """
    *earlier, now = evaluations
    matrix = [line for line in earlier if line["moment"] != "interval"]
    before = {task.task for task in stream if task.trained_before}
    found = {}
    for task in stream:
        if task.task == now["task"]:
            continue
        rows = matrix[_first_training(matrix, task.task, before) :]
        for name in task.valid_sets:
            past = [row["losses"].get(name) for row in rows]
            best = min((loss for loss in past if loss is not None), default=None)
            loss = now["losses"].get(name)
            if best is None:
                continue
            forgetting = math.inf if loss is None else loss - best
            if forgetting > most:
                found[name] = forgetting
    return found


def _first_training(matrix: Sequence[Mapping[str, Any]], task: str, before: Collection[str]) -> int:
    """The row at whose end the task had first been trained; beyond the last one if none has."""
    if task in before:
        return 0
    return next((at for at, row in enumerate(matrix) if row["task"] == task), len(matrix))


def bound_text(found: Mapping[str, float], most: float, step: int) -> str:
    """What is over the bound, in a line for log and status.

    Args:
        found: what `over_bound` gave, not empty.
        most: nats a token.
        step: applied updates so far.
    """
    worst = sorted(found, key=lambda name: -found[name])
    listed = ", ".join(f"{name} {found[name]:.3f}" for name in worst)
    return f"forgetting at step {step} is above evaluate.bounds.max_forgetting {most:g}: {listed}"


def agreed_bound(config: RunConfig, outputs: RunDirectory, rank: int, step: int) -> str | None:
    """Rank 0, which has the evaluations, tells all ranks what is above the bound. Collective.

    Args:
        config: the run.
        outputs: its directory.
        rank: this rank.
        step: applied updates so far.
    """
    bounds = config.evaluate.bounds if config.evaluate else None
    if bounds is None:
        return None
    said: list[str | None] = [None]
    if rank == 0:
        most = bounds.max_forgetting
        if found := over_bound(outputs.evaluations(), config.stream, most):
            said = [bound_text(found, most, step)]
    dist.broadcast_object_list(said, src=0)
    return said[0]
