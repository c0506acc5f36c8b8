"""Learning-rate schedules as pure functions of the step.

A schedule is the first one, which the run's first launch fixes to a number of steps, its horizon,
and then the segments of `schedule.then`, one behind the other.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

from megatron_mer.config import ScheduleConfig, ScheduleSegmentConfig, check_segments
from megatron_mer.errors import ConfigError, Problem


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
    if not config.then:
        return horizon(config, stream_steps) if config.kind == "cosine" else None
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
    problems = _contradictions(config, peak_lr, horizon(config, total_steps))
    if problems:
        raise ConfigError(problems)


def _contradictions(config: ScheduleConfig, peak_lr: float, total_steps: int) -> list[Problem]:
    problems = []
    cosine = config.kind == "cosine"
    if total_steps < 1:
        problems.append(Problem("schedule.total_steps", str(total_steps), "an integer >= 1"))
    if config.warmup_steps < 0:
        problems.append(Problem("schedule.warmup_steps", str(config.warmup_steps), ">= 0"))
    # A constant schedule that nothing follows may warm up longer than a short run lasts.
    most = total_steps - cosine
    if (cosine or config.then) and config.warmup_steps > most and total_steps >= 1:
        given = f"{config.warmup_steps} with {total_steps} steps in all"
        problems.append(Problem("schedule.warmup_steps", given, f"0 to {most}"))
    if cosine and not 0 <= config.min_lr <= peak_lr:
        given = f"{config.min_lr:g} with optimizer.lr {peak_lr:g}"
        problems.append(Problem("schedule.min_lr", given, f"0 to {peak_lr:g}"))
    return problems + check_segments(config)


def lr_at(config: ScheduleConfig, peak_lr: float, total_steps: int, step: int) -> float:
    """The learning rate of one update.

    Linear warm-up gives update i the share (i + 1) / warmup_steps of the peak, so that the first
    update is not lost; the first one after warm-up has the peak. From there `constant` stays, and
    `cosine` falls along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5,
    without restarts) to `min_lr` at step total_steps.

    A segment of `then` begins at the rate R at which what stands before it ended (`min_lr` of a
    cosine, the peak of a constant): its update i has R + (lr - R) * i / warmup_steps, so that no
    joint jumps, and update warmup_steps has lr. Without warm-up update 0 has lr. After the last
    segment, or the first schedule if none follows, the rate stays at which it ended.

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
    if step < config.warmup_steps:
        return peak_lr * (step + 1) / config.warmup_steps
    first = ScheduleSegmentConfig(
        kind=config.kind,
        steps=horizon(config, total_steps),
        lr=peak_lr,
        warmup_steps=config.warmup_steps,
        min_lr=config.min_lr,
    )
    part, before, begin = first, 0.0, 0
    for following in config.then:
        end = begin + (part.steps or 0)
        if step < end:
            break
        part, before, begin = following, _end_rate(part), end
    return _rate(part, before, step - begin)


def _rate(part: ScheduleSegmentConfig, before: float, step: int) -> float:
    """The rate of a part's update `step`; `before` is the one at which the part ahead ended."""
    if step < part.warmup_steps:
        return before + (part.lr - before) * step / part.warmup_steps
    if part.kind == "constant" or part.steps is None:
        return part.lr
    share = min(1.0, (step - part.warmup_steps) / (part.steps - part.warmup_steps))
    return part.min_lr + 0.5 * (part.lr - part.min_lr) * (1.0 + math.cos(math.pi * share))


def _end_rate(part: ScheduleSegmentConfig) -> float:
    return part.min_lr if part.kind == "cosine" else part.lr


def horizon_problems(
    config: ScheduleConfig, peak_lr: float, fixed: int, step: int, stream_steps: int
) -> list[Problem]:
    """Says why a resumed run may not go on with this schedule.

    A longer stream must not stretch a cosine, as that would change its rate from one update to the
    next: the configuration has to say what follows it.

    Args:
        config: the schedule's section of the configuration, as it is now.
        peak_lr: the learning rate after the first warm-up, as it is now.
        fixed: updates over which the first schedule runs, as fixed at the run's first launch.
        step: updates applied so far.
        stream_steps: batches of the stream, as it is now.

    Returns:
        Every problem; with a longer stream its remedy holds the configuration that ends it.
    """
    problems = _contradictions(config, peak_lr, horizon(config, fixed))
    wanted = config.total_steps
    if config.kind == "constant":
        # It has the same rate at any length, so that only an end in the past contradicts the run.
        if config.then and wanted is not None and wanted != fixed and wanted < step:
            given = f"{wanted}, where schedule.then would begin, but {step} steps were applied"
            allowed = f"{fixed}, or {step} and above"
            problems.append(Problem("schedule.total_steps", given, allowed))
    elif wanted is not None and wanted != fixed:
        given = f"{wanted}, but the run began with a schedule of {fixed} steps"
        problems.append(Problem("schedule.total_steps", given, str(fixed), _BEGIN_ANEW))
    elif wanted is None and stream_steps > fixed and not problems:
        problems.append(_stretched(config, peak_lr, fixed, step, stream_steps))
    return problems


_BEGIN_ANEW = "undo the change, or begin anew with --fresh"


def _stretched(
    config: ScheduleConfig, peak_lr: float, fixed: int, step: int, stream_steps: int
) -> Problem:
    now, end = (
        [lr_at(config, peak_lr, total, place) for total in (fixed, stream_steps)]
        for place in (step, fixed)
    )
    given = (
        f"now {stream_steps} batches, but the learning-rate schedule was fixed at first launch to "
        f"end after {fixed} steps. Stretched to {stream_steps}, the rate would go from "
        f"{now[0]:.4g} to {now[1]:.4g} at step {step}, where the run stands; at step {fixed} it "
        f"would be {end[1]:.4g} instead of {end[0]:.4g}"
    )
    stay = replace(config, total_steps=fixed)
    more = _second_cosine(config, peak_lr, stream_steps - fixed)
    option = f"--schedule.total_steps {fixed}"
    remedy = (
        f"stay at {config.min_lr:g}: `schedule: {_flow(stay)}`, as an option `{option}`; "
        f"or one more cosine: `schedule: {_flow(replace(stay, then=(more,)))}`, as options "
        f"`{option} --schedule.then '[{_flow(more)}]'`; or begin anew with --fresh"
    )
    return Problem("stream", given, f"a schedule that says what follows step {fixed}", remedy)


def _second_cosine(config: ScheduleConfig, peak_lr: float, steps: int) -> ScheduleSegmentConfig:
    """The first schedule once more over what was added, with a shorter warm-up if it is short."""
    return ScheduleSegmentConfig(
        kind="cosine",
        steps=steps,
        lr=peak_lr,
        warmup_steps=config.warmup_steps if config.warmup_steps < steps else steps // 2,
        min_lr=config.min_lr,
    )


def _flow(section: ScheduleConfig | ScheduleSegmentConfig) -> str:
    """A section on one line of YAML, without the keys that have their default."""
    values = {one.name: getattr(section, one.name) for one in fields(section)}
    defaults = {one.name: one.default for one in fields(section)}
    said = [f"{key}: {_text(value)}" for key, value in values.items() if value != defaults[key]]
    return "{" + ", ".join(said) + "}"


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value)
