"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from megatron_mer.config import ScheduleConfig
from megatron_mer.errors import ConfigError, Problem


def check_schedule(config: ScheduleConfig, peak_lr: float, total_steps: int) -> None:
    """Checks that warm-up, floor and length fit each other.

    Args:
        config: the schedule's section of the configuration.
        peak_lr: the learning rate after warm-up, > 0.
        total_steps: updates over which the schedule runs.

    Raises:
        ConfigError: with every problem found.
    """
    problems = []
    if total_steps < 1:
        problems.append(Problem("schedule.total_steps", str(total_steps), "an integer >= 1"))
    if config.warmup_steps < 0:
        problems.append(Problem("schedule.warmup_steps", str(config.warmup_steps), ">= 0"))
    if config.kind == "cosine" and config.warmup_steps >= total_steps >= 1:
        given = f"{config.warmup_steps} with {total_steps} steps in all"
        problems.append(Problem("schedule.warmup_steps", given, f"0 to {total_steps - 1}"))
    if config.kind == "cosine" and not 0 <= config.min_lr <= peak_lr:
        given = f"{config.min_lr:g} with optimizer.lr {peak_lr:g}"
        problems.append(Problem("schedule.min_lr", given, f"0 to {peak_lr:g}"))
    if problems:
        raise ConfigError(problems)


def lr_at(config: ScheduleConfig, peak_lr: float, total_steps: int, step: int) -> float:
    """The learning rate of one update.

    Linear warm-up gives update i the share (i + 1) / warmup_steps of the peak, so that the first
    update is not lost; the first one after warm-up has the peak. From there `constant` stays, and
    `cosine` falls along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5,
    without restarts) to `min_lr` at step total_steps, and stays there for any step after it.

    Args:
        config: the schedule's section of the configuration; its own `total_steps` is not read.
        peak_lr: the learning rate after warm-up, > 0.
        total_steps: updates over which the schedule runs, as fixed at the run's first launch.
        step: updates applied before this one, >= 0.

    Raises:
        ConfigError: the schedule contradicts itself, see `check_schedule`.
        ValueError: the step is negative.
    """
    check_schedule(config, peak_lr, total_steps)
    if step < 0:
        raise ValueError(f"step {step}; must be >= 0")
    if step < config.warmup_steps:
        return peak_lr * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak_lr
    share = min(1.0, (step - config.warmup_steps) / (total_steps - config.warmup_steps))
    return config.min_lr + 0.5 * (peak_lr - config.min_lr) * (1.0 + math.cos(math.pi * share))
