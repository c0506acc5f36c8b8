"""Learning-rate schedules as pure functions of the step.

A schedule is the first one, which the run's first launch fixes to a number of steps, its horizon,
and then the segments of `schedule.then`, one behind the other.
"""

from __future__ import annotations

from megatron_mer.config import ScheduleConfig, ScheduleSegmentConfig, check_segments
from megatron_mer.errors import ConfigError, Problem
from megatron_mer.optim.shapes import Phases, decayed, phase_problems


def horizon(config: ScheduleConfig, stream_steps: int) -> int:
    """Updates over which the first schedule runs: its total_steps, or else the stream.

    Args:
        config: the schedule's section of the configuration.
        stream_steps: batches of the stream, as they were at the run's first launch.
    """
    return config.total_steps or stream_steps


def end_of_schedule(config: ScheduleConfig, stream_steps: int) -> int | None:
    """The step from which on the rate stays as it is; None if a constant without end is the last.

    Args:
        config: the schedule's section of the configuration.
        stream_steps: batches of the stream, as they were at the run's first launch.
    """
    if config.per_task:
        return None
    if not config.then:
        return None if config.kind == "constant" else horizon(config, stream_steps)
    lengths = [part.steps for part in config.then if part.steps is not None]
    if len(lengths) < len(config.then):
        return None
    return horizon(config, stream_steps) + sum(lengths)


def check_schedule(config: ScheduleConfig, peak_lr: float, total_steps: int) -> None:
    """Checks that warm-ups, floors and lengths fit each other.

    Args:
        config: the schedule's section of the configuration.
        peak_lr: the learning rate after the first warm-up, > 0.
        total_steps: updates over which the first schedule runs, unless it has `total_steps`.

    Raises:
        ConfigError: with every problem found.
    """
    problems = contradictions(config, peak_lr, horizon(config, total_steps))
    if problems:
        raise ConfigError(problems)


def contradictions(config: ScheduleConfig, peak_lr: float, total_steps: int) -> list[Problem]:
    """Finds everything that `check_schedule` refuses.

    Args:
        config: the schedule's section of the configuration.
        peak_lr: the learning rate after the first warm-up, > 0.
        total_steps: updates over which the first schedule runs.
    """
    problems = []
    if total_steps < 1:
        problems.append(Problem("schedule.total_steps", str(total_steps), "an integer >= 1"))
    else:
        problems += phase_problems(config, peak_lr, total_steps)
    if config.warmup_steps < 0:
        problems.append(Problem("schedule.warmup_steps", str(config.warmup_steps), ">= 0"))
    return problems + check_segments(config)


def lr_at(config: ScheduleConfig, peak_lr: float, total_steps: int, step: int) -> float:
    """The learning rate of one update.

    Linear warm-up gives update i the share (i + 1) / warmup_steps of the peak, so that the first
    update is not lost; the first one after warm-up has the peak. From there `constant` stays, and
    `cosine` falls along half a cosine to `min_lr` at step total_steps; `wsd` (Hu et al. 2024, arXiv
    2404.06395) stays until decay_steps before it; `infinite` (Ibrahim et al. 2024, arXiv
    2403.08763) falls to constant_lr first. The forms of decay: `optim.shapes.decayed`.

    A segment of `then` begins at the rate R at which what stands before it ended (`min_lr` of a
    cosine, the peak of a constant): its update i has R + (lr - R) * (i + 1) / warmup_steps, as in
    the first warm-up, so that no update is lost to a rate of 0. Without warm-up update 0 has lr.
    After the last segment, or the first schedule if none follows, the rate stays at which it ended.

    Args:
        config: the schedule's section of the configuration.
        peak_lr: the learning rate after the first warm-up, > 0.
        total_steps: updates over which the first schedule runs, as fixed at the run's first launch;
            not read if the schedule has its own `total_steps`.
        step: updates applied before this one, >= 0.

    Raises:
        ConfigError: the schedule contradicts itself, see `check_schedule`.
        ValueError: the step is negative.
    """
    check_schedule(config, peak_lr, total_steps)
    if step < 0:
        raise ValueError(f"step {step}; must be >= 0")
    phases = Phases.of(config, peak_lr, horizon(config, total_steps))
    begin, before = phases.end, _end_rate(config, peak_lr)
    if not config.then or step < begin:
        return phases.rate(step)
    for part in config.then:
        end = begin + (part.steps or 0)
        if part.steps is None or step < end or part is config.then[-1]:
            break
        begin, before = end, _end_rate(part, part.lr)
    return _rate(part, before, step - begin)


def lr_in_task(
    config: ScheduleConfig, peak_lr: float, total_steps: int, step: int, is_first: bool
) -> float:
    """The learning rate of one batch of an entry, with `per_task`.

    The entry's own batches are the clock: a batch without an update uses its step up, so that the
    schedule ends with the entry. The first entry warms up from 0, each later one from `min_lr`,
    where the entry before it ended.

    Args:
        config: the schedule's section of the configuration, with `per_task`.
        peak_lr: the learning rate after each warm-up, > 0.
        total_steps: batches of the entry.
        step: batches of the entry before this one, >= 0.
        is_first: whether no entry was trained before it.

    Raises:
        ConfigError: the phases do not fit into the entry.
    """
    if problems := phase_problems(config, peak_lr, total_steps):
        raise ConfigError(problems)
    return Phases.of(config, peak_lr, total_steps).rate(step, 0.0 if is_first else config.min_lr)


def _rate(part: ScheduleSegmentConfig, before: float, step: int) -> float:
    """The rate of a part's update `step`; `before` is the one at which the part ahead ended."""
    if step < part.warmup_steps:
        return before + (part.lr - before) * (step + 1) / part.warmup_steps
    if part.kind == "constant" or part.steps is None:
        return part.lr
    share = min(1.0, (step - part.warmup_steps) / (part.steps - part.warmup_steps))
    return decayed("cosine", part.lr, part.min_lr, share)


def _end_rate(part: ScheduleConfig | ScheduleSegmentConfig, peak: float) -> float:
    return peak if part.kind == "constant" else part.min_lr
