"""Rules between the values of the learning-rate schedule and of its segments."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mer.config.parse import as_far_as_parsed
from megatron_mer.config.schema import RunConfig, ScheduleConfig, ScheduleSegmentConfig
from megatron_mer.errors import Problem

Problems = Iterator[Problem]


def check_segments(schedule: ScheduleConfig) -> list[Problem]:
    """Finds what keeps `schedule.then` from following the first schedule."""
    found: list[Problem] = []
    if schedule.then and schedule.total_steps is None:
        given = "missing, so that the end of the stream would move where schedule.then begins"
        remedy = "say after how many steps it begins"
        found.append(Problem("schedule.total_steps", given, "a whole number >= 1", remedy))
    last = len(schedule.then) - 1
    for index, segment in enumerate(schedule.then):
        path = f"schedule.then.{index}"
        found += as_far_as_parsed(_values(segment, path))
        found += as_far_as_parsed(_length(segment, path, index == last))
    return found


def _values(segment: ScheduleSegmentConfig, path: str) -> Problems:
    if segment.kind == "constant":
        if segment.min_lr != 0:
            given = f"given {segment.min_lr:g}, which kind constant does not use"
            yield Problem(f"{path}.min_lr", given, "nothing", "leave it out or choose cosine")
    elif not 0 <= segment.min_lr <= segment.lr:
        given = f"{segment.min_lr:g} with {path}.lr {segment.lr:g}"
        yield Problem(f"{path}.min_lr", given, f"0 to {segment.lr:g}")


def _length(segment: ScheduleSegmentConfig, path: str, is_last: bool) -> Problems:
    steps, cosine = segment.steps, segment.kind == "cosine"
    if steps is None:
        if cosine or not is_last:
            given = "missing for a cosine" if cosine else "missing for a segment before another"
            allowed = "a whole number >= 1; only a constant that is the last may leave it out"
            yield Problem(f"{path}.steps", given, allowed, "add it")
        return
    # A cosine of no length is none.
    most = steps - cosine
    if not 0 <= segment.warmup_steps <= most:
        given = f"{segment.warmup_steps} steps of warm-up in a segment of {steps}"
        yield Problem(f"{path}.warmup_steps", given, f"0 to {most}")


def unused_or_above_peak(config: RunConfig) -> Problems:
    """Values that a kind does not read, and a floor above the peak."""
    schedule = config.schedule
    if schedule.kind == "constant":
        if schedule.min_lr != 0:
            given = f"given {schedule.min_lr:g}, which kind constant does not use"
            yield Problem("schedule.min_lr", given, "nothing", "leave it out or choose cosine")
        if schedule.total_steps is not None and not schedule.then:
            given = f"given {schedule.total_steps}, where schedule.then says nothing that begins"
            remedy = "leave it out, choose cosine, or say in schedule.then what follows"
            yield Problem("schedule.total_steps", given, "nothing for kind constant", remedy)
    elif schedule.min_lr > config.optimizer.lr:
        given = f"{schedule.min_lr:g} is above the peak, optimizer.lr {config.optimizer.lr:g}"
        yield Problem("schedule.min_lr", given, f"0 to {config.optimizer.lr:g}")


def warmup_too_long(config: RunConfig) -> Problems:
    """A warm-up that does not fit into the first schedule, as far as its length is known."""
    total, warmup = config.schedule.total_steps, config.schedule.warmup_steps
    trained = [entry for entry in config.stream if not entry.trained_before]
    steps = [entry.steps for entry in trained if entry.steps is not None]
    # A task given in fresh tokens takes a number of steps that only the plan knows.
    if total is None and len(steps) == len(trained):
        total = sum(steps)
    # A cosine of no length is none; see optim.schedule.check_schedule.
    most = total - (config.schedule.kind == "cosine") if total else warmup
    if warmup > most:
        given = f"{warmup} steps of warm-up in a schedule of {total}"
        yield Problem("schedule.warmup_steps", given, f"0 to {most}")


def segments(config: RunConfig) -> Problems:
    """What `check_segments` finds."""
    yield from check_segments(config.schedule)
