"""The learning rate of a run's batches."""

from __future__ import annotations

from megatron_mer.config import RunConfig
from megatron_mer.continual.plan import Plan
from megatron_mer.errors import ConfigError, Problem
from megatron_mer.optim.schedule import lr_at, lr_in_task
from megatron_mer.optim.shapes import phase_problems


def lr_of(config: RunConfig, plan: Plan, batch: int, updates: int, horizon: int) -> float:
    """The learning rate of the update that a batch gives.

    Args:
        config: the run.
        plan: its plan; with `schedule.per_task` the entries' batches are the schedules' lengths.
        batch: number of the batch.
        updates: updates applied before it.
        horizon: updates over which the schedule of the whole run goes.

    Raises:
        ConfigError: the schedule contradicts itself.
    """
    if not config.schedule.per_task:
        return lr_at(config.schedule, config.optimizer.lr, horizon, updates)
    first, last = entry_span(plan, batch)
    return lr_in_task(
        config.schedule, config.optimizer.lr, last - first, batch - first, is_first=first == 0
    )


def entry_span(plan: Plan, batch: int) -> tuple[int, int]:
    """First batch, and batch after the last, of the entry that trains a batch.

    A change in mid-run may cut an entry into spans; together they are one schedule.
    """
    index = plan.entry_of(batch).index
    spans = [one for one in plan.entries if one.index == index and not one.trained_before]
    return spans[0].first_batch, spans[-1].last_batch


def check_tasks(config: RunConfig, plan: Plan) -> None:
    """Check that the schedule fits into each entry, with `schedule.per_task`.

    Raises:
        ConfigError: naming the entries that are too short.
    """
    problems = []
    for entry in plan.entries:
        if entry.trained_before or entry.last_batch <= entry.first_batch:
            continue
        first, last = entry_span(plan, entry.first_batch)
        for problem in phase_problems(config.schedule, config.optimizer.lr, last - first):
            given = f"{problem.given} (entry {entry.index}, task {entry.task})"
            problems.append(Problem(problem.path, given, problem.allowed, problem.remedy))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
