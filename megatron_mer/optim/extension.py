"""Whether a resumed run may go on with its schedule, and what to write where it may not."""

from __future__ import annotations

from dataclasses import fields, replace

from megatron_mer.config import ScheduleConfig, ScheduleSegmentConfig
from megatron_mer.errors import Problem
from megatron_mer.optim.schedule import contradictions, horizon, lr_at


def horizon_on_resume(config: ScheduleConfig, fixed: int, step: int, stream_steps: int) -> int:
    """Updates over which the first schedule runs from here on.

    What was fixed at first launch stays, but for one case: the constant phase of `wsd` and
    `infinite` may be made longer or shorter as long as its decay has not begun, if the phases
    around it are given in steps, for then no rate of before changes.

    Args:
        config: the schedule's section of the configuration, as it is now.
        fixed: updates over which it runs so far.
        step: updates applied so far.
        stream_steps: batches of the stream, as it is now.
    """
    if _stretches(config, fixed, step, stream_steps):
        return config.total_steps or stream_steps
    return horizon(config, fixed)


def _stretches(config: ScheduleConfig, fixed: int, step: int, stream_steps: int) -> bool:
    """Whether another length changes nothing but the constant phase, in which the run still is."""
    given = config.decay_steps is not None and not config.then and not config.per_task
    if config.kind == "infinite":
        given = given and config.cooldown_steps is not None
    if config.kind not in ("wsd", "infinite") or not given:
        return False
    wanted = config.total_steps or stream_steps
    return step <= min(fixed, wanted) - (config.decay_steps or 0)


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
    if config.per_task:
        return []  # Each entry has a schedule of its own length.
    if _stretches(config, fixed, step, stream_steps):
        return contradictions(config, peak_lr, config.total_steps or stream_steps)
    problems = contradictions(config, peak_lr, horizon(config, fixed))
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
