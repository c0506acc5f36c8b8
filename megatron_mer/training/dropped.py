"""Tasks that were dropped from a run's replay buffer: a mark beside its checkpoints.

The kept checkpoints say it in their histories. A copy of one that was made before may come back, or
a buffer be built again from the datasets: the mark makes the drop hold there too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_mer.continual.plan import Plan
from megatron_mer.errors import CheckpointError, ConfigError, Problem

NAME = "dropped.json"


def dropped_tasks(root: Path) -> list[str]:
    """Names of the tasks that were dropped from the buffer of the run in a directory.

    Raises:
        CheckpointError: the mark is there and cannot be read.
    """
    path = root / NAME
    if not path.exists():
        return []
    try:
        return [str(task) for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}): it names the tasks that were dropped from the "
            'replay buffer, as {"tasks": ["fr"]}; write it anew'
        ) from error


def without_dropped(
    run_state: Mapping[str, Any], tasks: Collection[str]
) -> tuple[Mapping[str, Any], list[str]]:
    """A checkpoint's run state in which what was dropped since is dropped.

    Args:
        run_state: of the checkpoint.
        tasks: that were dropped from the run's buffer, at whatever time.

    Returns:
        The run state to go on from, and the tasks of it that it still had.

    Raises:
        ConfigError: one of them is in training at this checkpoint.
    """
    history, batches = run_state["history"], int(run_state["batches"])
    done = {task for segment in history for task in segment.get("dropped", ())}
    if "buffer" not in run_state or done >= set(tasks):
        return run_state, []
    plan = Plan.from_history(history)
    trained = {
        entry.task for entry in plan.entries if entry.trained_before or entry.first_batch < batches
    }
    missing = sorted(trained & set(tasks) - done)
    if not missing:
        return run_state, []
    if 0 < batches < plan.total_batches:
        before, now = plan.entry_of(batches - 1), plan.entry_of(batches)
        if now.task in missing and before.index == now.index:
            given = f"the checkpoint after batch {batches} trains task {now.task!r}, which was "
            given += "dropped from the replay buffer after it was written"
            remedy = f"go on from another checkpoint, or take the task out of {NAME} if it may stay"
            raise ConfigError([Problem("resume", given, remedy=remedy)])
    return {**run_state, "history": Plan.without(history, missing, batches).history()}, missing
